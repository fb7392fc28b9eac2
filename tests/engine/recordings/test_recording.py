"""Recording: what each prompt alone would give, the same bytes after any cut, and a model left as it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, normalizers
from torch import nn

from helpers.tiny_models import HIDDEN, LAYERS, MAX_TOKENS, WIDTH, WORDS, tiny, tiny_tokenizer, tokenizer_for
from helpers.tolerance import assert_near
from spurge import NeuronEdit, NeuronSet, find_sites
from spurge.engine.base.files import FileError
from spurge.engine.models.handle import Handle
from spurge.engine.recordings.generation import continuations
from spurge.engine.recordings.padding import padded
from spurge.engine.recordings.recording import Recording, record

PROMPTS = [f"the {word} was {'very ' * (i * 7 % 5)}good" for i, word in enumerate(WORDS[:20])]
FULL = {"storage": torch.float32}


def language(family: str = "llama", **settings) -> nn.Module:
    """A causal language model with random weights, of the sizes of `tiny`."""
    model = transformers.AutoModelForCausalLM.from_config(tiny(family, **settings).config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    return model.eval()


def decoder_tokenizer(side: str = "right", *, padding: bool = True) -> transformers.PreTrainedTokenizerFast:
    """One that nobody else has; without a padding token it has an end token, as GPT-2's has."""
    core = Tokenizer.from_str(tiny_tokenizer(decoder=True).backend_tokenizer.to_str())
    core.no_padding()  # what it was last called with stays in it
    settings = {"pad_token": "[PAD]"} if padding else {"eos_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", padding_side=side, model_max_length=MAX_TOKENS, **settings
    )


def take(model, tokenizer, folder, prompts=PROMPTS, **settings) -> Recording:
    return record(model, tokenizer, prompts, folder, **({"progress": False, "batch_size": 4, "block": 8} | settings))


def alone(model, tokenizer, text: str, position: str = "last") -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Site name to z and u of one prompt, from a pass of its own without padding."""
    found, handles = {}, []
    for site in find_sites(model):

        def keep(module, args, output, name=site.name):
            values = args[0][0], output[0]
            found[name] = tuple(value[-1] if position == "last" else value.mean(0) for value in values)

        handles.append(site.down.register_forward_hook(keep))
    with torch.no_grad():
        model(**tokenizer([text], return_tensors="pt"))
    for handle in handles:
        handle.remove()
    return found


def state(model):
    """All that has to be as it was."""
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    settings = getattr(model, "generation_config", None)
    return bits, modes, wanted, hooks, model.config.to_dict(), None if settings is None else settings.to_dict()


def unchanged(before, model) -> bool:
    after = state(model)
    return before[1:] == after[1:] and all(torch.equal(after[0][name], value) for name, value in before[0].items())


def copies(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# What is recorded


@pytest.mark.parametrize("position", ["last", "mean"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "llama", "gpt2", "gpt_neox", "gemma"])
def test_values_are_those_of_each_prompt_alone(family, position, tmp_path):
    model, tokenizer = tiny(family), tokenizer_for(family)
    recording = take(model, tokenizer, tmp_path, position=position, **FULL)
    sites = [site.name for site in find_sites(model)]
    assert list(recording.widths) == list(recording.hidden) == sites
    assert set(recording.widths.values()) == {WIDTH}
    assert set(recording.hidden.values()) == {HIDDEN}
    assert (recording.prompts, len(recording), recording.continuations) == (tuple(PROMPTS), len(PROMPTS), None)
    for row in (0, 3, 7, 8, 19):
        for name, (z, u) in alone(model, tokenizer, PROMPTS[row], position).items():
            size = WIDTH * LAYERS
            assert_near(recording.neurons(name)[row], z, terms=size, size=float(z.abs().max()))
            assert_near(recording.outputs(name)[row], u, terms=size, size=float(u.abs().max()))


@pytest.mark.parametrize("position", ["last", "mean"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("padding", [True, False])
def test_the_side_of_padding_does_not_matter(family, position, padding, tmp_path):
    model = language(family)
    for side in ("left", "right"):
        tokenizer = decoder_tokenizer(side, padding=padding)
        take(model, tokenizer, tmp_path / side, position=position, generate=3)
        assert (tokenizer.padding_side, tokenizer.pad_token) == (side, "[PAD]" if padding else None)
    assert copies(tmp_path / "left") == copies(tmp_path / "right")


def test_outputs_are_the_projection_of_the_neurons(tmp_path):
    for family in ("gpt2", "bert"):
        model = tiny(family)
        recording = take(model, tokenizer_for(family), tmp_path / family, **FULL)
        for site in find_sites(model):
            want = recording.neurons(site.name) @ site.weight().t() + site.bias()
            assert_near(recording.outputs(site.name), want.detach(), terms=WIDTH)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("block", [1, 7, 100])
def test_blocks_and_batches_of_any_size_give_the_rows_in_order(batch_size, block, tmp_path):
    model, tokenizer = tiny("llama"), tokenizer_for("llama")
    recording = take(model, tokenizer, tmp_path / "a", PROMPTS[:9], batch_size=batch_size, block=block, **FULL)
    want = take(model, tokenizer, tmp_path / "b", PROMPTS[:9], **FULL)
    for name in want.widths:
        assert_near(recording.neurons(name), want.neurons(name), terms=WIDTH * LAYERS)


def test_a_part_of_a_site(tmp_path):
    recording = take(tiny("gpt2"), tokenizer_for("gpt2"), tmp_path)
    name = list(recording.widths)[1]
    whole = recording.neurons(name)
    for part in (slice(0, 1), slice(5, 17), slice(40, None), slice(-3, None), slice(None), slice(9, 9), slice(50, 60)):
        found = recording.neurons(name, part)
        assert torch.equal(found, whole[:, part])
        assert found.dtype == torch.float32


def test_only_the_part_is_read_once_blocks_are_verified(tmp_path, monkeypatch):
    recording = take(tiny("gpt2"), tokenizer_for("gpt2"), tmp_path)
    name = next(iter(recording.widths))
    recording.neurons(name, slice(0, 1))
    monkeypatch.setattr("spurge.engine.recordings.store.read_tensors", None)
    assert recording.neurons(name).shape == (20, WIDTH)
    assert recording.fingerprint() == recording.fingerprint()


def test_sites_and_outputs_alone(tmp_path):
    model, tokenizer = tiny("llama"), tokenizer_for("llama")
    whole = take(model, tokenizer, tmp_path / "all")
    name = list(whole.widths)[2]
    some = take(model, tokenizer, tmp_path / "some", sites=[name], neurons=False)
    assert some.widths == {name: WIDTH}
    assert torch.equal(some.outputs(name), whole.outputs(name))
    with pytest.raises(ValueError, match="neurons: were not recorded; record with neurons=True"):
        some.neurons(name)
    with pytest.raises(ValueError, match=r"site: 'model\.layers\.0\.mlp\.down_proj' is not among"):
        some.outputs("model.layers.0.mlp.down_proj")


def test_the_head_by_hand_runs_the_whole_model(tmp_path):
    model = tiny("llama")
    recording = take(model, tokenizer_for("llama"), tmp_path, sites=["score"], **FULL)
    with torch.no_grad():
        want = model(**tokenizer_for("llama")([PROMPTS[0]], return_tensors="pt")).logits[0]
    assert_near(recording.outputs("score")[0], want, terms=HIDDEN * LAYERS, size=float(want.abs().max()))


def test_attached_edits_show(tmp_path):
    model, tokenizer = tiny("llama"), tokenizer_for("llama")
    name = find_sites(model)[0].name
    plain = take(model, tokenizer, tmp_path / "plain")
    with NeuronEdit.build(model, NeuronSet({name: [2, 5]}), 0.0).applied(model):
        edited = take(model, tokenizer, tmp_path / "edited")
        with pytest.raises(ValueError, match=r"model: .* holds a recording of another model"):
            take(model, tokenizer, tmp_path / "plain")
    assert plain.neurons(name)[:, [2, 5]].all()
    assert not edited.neurons(name)[:, [2, 5]].any()
    assert edited.fingerprint() != plain.fingerprint()


def test_a_compiled_model_runs_as_the_original(tmp_path):
    model, tokenizer = tiny("gpt2"), tokenizer_for("gpt2")
    take(model, tokenizer, tmp_path / "a")
    take(torch.compile(model), tokenizer, tmp_path / "b")
    assert copies(tmp_path / "a") == copies(tmp_path / "b")


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32])
def test_storage_rounds_only(storage, tmp_path):
    model, tokenizer = tiny("bert"), tokenizer_for("bert")
    recording = take(model, tokenizer, tmp_path / "narrow", storage=storage)
    want = take(model, tokenizer, tmp_path / "wide", **FULL)
    for name in want.widths:
        assert torch.equal(recording.outputs(name), want.outputs(name).to(storage).float())


def test_half_precision_and_devices(device, tmp_path):
    model = language("gpt2").to(device, torch.bfloat16)
    recording = take(model, decoder_tokenizer(), tmp_path, generate=2)
    assert recording.outputs(next(iter(recording.widths))).device.type == "cpu"
    assert next(model.parameters()).device.type == device.type


def test_long_prompts_are_cut(tmp_path):
    model, tokenizer = tiny("gpt2"), tokenizer_for("gpt2")
    long = ["the good film " * 30, "a good film " * 30]
    whole = take(model, tokenizer, tmp_path / "limit", long)
    cut = take(model, tokenizer, tmp_path / "cut", long, max_length=5, **FULL)
    name = next(iter(cut.widths))
    z, _ = alone(model, tokenizer, "the good film the good")[name]
    assert_near(cut.neurons(name)[0], z, terms=WIDTH * LAYERS)
    assert whole.info["max_length"] is None
    assert cut.info["max_length"] == 5


def test_info_and_repr(tmp_path):
    recording = take(language(), decoder_tokenizer(), tmp_path, generate=2)
    expected = {"method": "record", "prompts": 20, "position": "last", "neurons": True, "generate": 2, "block": 8}
    assert expected.items() <= recording.info.items()
    assert repr(recording) == "Recording(20 prompts, 3 sites, last: outputs, neurons, continuations)"


# What the model says


def greedy(model, tokenizer, text: str, count: int, end: int | None = None) -> str:
    """The most likely token each time, from whole passes without a cache."""
    ids = tokenizer([text], return_tensors="pt")["input_ids"]
    new: list[int] = []
    with torch.no_grad():
        while len(new) < count and (not new or new[-1] != end):
            new.append(int(model(input_ids=ids).logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([[new[-1]]])], 1)
    return tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_continuations_are_greedy(family, side, tmp_path):
    model, tokenizer = language(family), decoder_tokenizer(side)
    recording = take(model, tokenizer, tmp_path, generate=6)
    end = model.config.eos_token_id
    assert recording.continuations == tuple(greedy(model, tokenizer, text, 6, end) for text in PROMPTS)
    assert continuations(Handle(model, tokenizer), PROMPTS, 6, batch_size=3) == list(recording.continuations)


def test_the_end_token_ends_and_special_tokens_do_not_show():
    model, tokenizer = language(), decoder_tokenizer()
    first = [greedy(model, tokenizer, text, 1) for text in PROMPTS]
    model.generation_config.eos_token_id = tokenizer(first[0])["input_ids"][0]
    said = continuations(Handle(model, tokenizer), PROMPTS, 5)
    assert said[0] == first[0]
    assert all(tokenizer.pad_token not in text for text in said)


def test_settings_of_the_model_that_are_not_greedy_do_not_count():
    model, tokenizer = language(), decoder_tokenizer()
    want = continuations(Handle(model, tokenizer), PROMPTS, 5)
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0, min_new_tokens=9)
    before = state(model)
    assert continuations(Handle(model, tokenizer), PROMPTS, 5) == want
    assert unchanged(before, model)


def test_padding_is_put_back_after_an_exception():
    tokenizer = decoder_tokenizer("left", padding=False)
    inside = []

    def interrupted():
        with padded(tokenizer):
            inside.append((tokenizer.padding_side, tokenizer.pad_token))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert inside == [("right", "[SEP]")]
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", None)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_classifier_generates_nothing(family, tmp_path):
    with pytest.raises(
        ValueError, match=r"generate: .*ForSequenceClassification has no head that gives the next token"
    ):
        take(tiny(family), tokenizer_for(family), tmp_path, generate=1)
    assert not list(tmp_path.iterdir())


# Cut off, and gone on with


def breaking(error: type[BaseException], calls: int):
    """A hook that raises in the given call. It passes for one of transformers', which do not change a model's print."""
    count = 0

    def broken(module, args, output):
        nonlocal count
        count += 1
        if count == calls:
            raise error("stop")

    broken.__module__ = "transformers"
    return broken


@pytest.mark.parametrize("generate", [0, 3])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("calls", [1, 4, 10])
def test_a_recording_that_was_cut_off_ends_in_the_same_bytes(error, calls, generate, tmp_path):
    model, tokenizer = language(), decoder_tokenizer("left", padding=False)
    model.train()
    model.model.layers[1].mlp.eval()
    model.lm_head.weight.requires_grad_(False)
    before = state(model)
    settings = {"generate": generate, "batch_size": 2, "block": 4}
    take(model, tokenizer, tmp_path / "whole", **settings)
    assert unchanged(before, model)
    # Of the 10 passes of 2 prompts; with generation, 3 more for each.
    handle = model.model.layers[2].mlp.register_forward_hook(breaking(error, calls if not generate else 4 * calls))
    with pytest.raises(error, match="stop"):
        take(model, tokenizer, tmp_path / "cut", **settings)
    handle.remove()
    assert unchanged(before, model)
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", None)
    kept = copies(tmp_path / "cut")
    assert len(kept) == 1 + (calls - 1) // 2  # the header, and the blocks before
    with pytest.raises(FileError, match=rf"cut off: {4 * (len(kept) - 1)} of 20 prompts are recorded; call record"):
        Recording.open(tmp_path / "cut")
    recording = take(model, tokenizer, tmp_path / "cut", **settings)
    assert kept.items() <= copies(tmp_path / "cut").items()
    assert copies(tmp_path / "cut") == copies(tmp_path / "whole")
    assert recording.fingerprint() == Recording.open(tmp_path / "whole").fingerprint()


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
from helpers.tiny_models import tiny, tokenizer_for
from spurge.engine.recordings.store import Store
from test_recording import take
write, written = Store.write, []
def dying(self, number, tensors, texts):
    write(self, number, tensors, texts)
    written.append(number)
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
Store.write = dying
take(tiny("bert"), tokenizer_for("bert"), {folder!r})
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_process_goes_on_in_another_with_the_same_bytes(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    code = KILLED.format(path=[str(Path(__file__).parent), *sys.path], folder=str(killed))
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    before = copies(killed)
    assert len(before) == 3
    take(tiny("bert"), tokenizer_for("bert"), killed)
    take(tiny("bert"), tokenizer_for("bert"), whole)
    assert before.items() <= copies(killed).items()
    assert copies(killed) == copies(whole)


def test_a_whole_recording_runs_nothing(tmp_path):
    model, tokenizer = tiny("bert"), tokenizer_for("bert")
    take(model, tokenizer, tmp_path)
    handle = model.bert.register_forward_hook(breaking(RuntimeError, 1))
    assert len(take(model, tokenizer, tmp_path)) == 20
    handle.remove()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"neurons": False}, "neurons: the recording in .* was begun with True, got False; give another folder, or"),
        ({"position": "mean"}, "position: the recording in .* was begun with 'last', got 'mean'"),
        ({"sites": ["bert.encoder.layer.1.output.dense"]}, r"sites: .* got \['bert.encoder.layer.1.output.dense'\]"),
        ({"batch_size": 5}, "batch_size: .* was begun with 4, got 5"),
        ({"block": 9}, "block: .* was begun with 8, got 9"),
        ({"max_length": 5}, "max_length: .* was begun with None, got 5"),
        ({"storage": torch.float32}, "storage: .* was begun with 'float16', got 'float32'"),
        ({"prompts": PROMPTS[:3]}, "prompts: .* holds a recording of 20 prompts, got 3"),
        ({"prompts": [*PROMPTS[:5], "other", *PROMPTS[6:]]}, "prompts: .* of other prompts, the first at 5"),
        ({"memory": 1}, "memory: 1 prompts fit at once, but the recording in .* was begun with 4"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_another_job_in_the_same_folder_is_refused(settings, message, tmp_path):
    model, tokenizer = tiny("bert"), tokenizer_for("bert")
    take(model, tokenizer, tmp_path)
    before = copies(tmp_path)
    with pytest.raises(ValueError, match=message):
        take(model, tokenizer, tmp_path, **settings)
    assert copies(tmp_path) == before


def test_another_model_or_tokenizer_is_refused(tmp_path):
    model, tokenizer = tiny("bert"), tokenizer_for("bert")
    take(model, tokenizer, tmp_path)
    with pytest.raises(ValueError, match="tokenizer: makes other tokens than for the recording in"):
        take(model, tiny_tokenizer(decoder=True, segments=False), tmp_path)
    with torch.no_grad():
        model.bert.encoder.layer[2].output.dense.bias[0] += 0.5
    with pytest.raises(ValueError, match=r"model: .* holds a recording of another model, or of this one in another"):
        take(model, tokenizer, tmp_path)


def test_a_model_with_foreign_hooks_is_recorded_but_not_gone_on_with(tmp_path):
    model, tokenizer = tiny("bert"), tokenizer_for("bert")
    model.bert.register_forward_hook(lambda module, args, output: None)
    with pytest.warns(UserWarning, match="recording: cannot go on when it is cut off: module 'bert' has forward hooks"):
        take(model, tokenizer, tmp_path)
    assert len(Recording.open(tmp_path)) == 20
    message = r"model: .* cannot be gone on with: see the warning"
    with pytest.warns(UserWarning, match="cannot go on"), pytest.raises(ValueError, match=message):
        take(model, tokenizer, tmp_path)


def test_a_small_budget_splits_batches(tmp_path):
    model, tokenizer = tiny("llama"), tokenizer_for("llama")
    wide = take(model, tokenizer, tmp_path / "wide", **FULL)
    runs: list[int] = []

    def count(module, args, output):
        runs.append(len(output))

    count.__module__ = "transformers"
    handle = model.model.layers[0].mlp.register_forward_hook(count)
    recording = take(model, tokenizer, tmp_path / "one", memory="1 kB", **FULL)
    handle.remove()
    assert runs == [1] * 20
    assert (wide.info["rows"], recording.info["rows"]) == (4, 1)
    for name in wide.widths:
        assert_near(recording.neurons(name), wide.neurons(name), terms=WIDTH * LAYERS)


def test_a_recording_keeps_the_split_that_it_began_with(tmp_path):
    model, tokenizer = tiny("llama"), tokenizer_for("llama")
    take(model, tokenizer, tmp_path, memory=1)
    before = copies(tmp_path)
    (tmp_path / "block-00001.safetensors").unlink()
    take(model, tokenizer, tmp_path)
    assert copies(tmp_path) == before


# Damage


def test_damaged_blocks_are_refused_when_read_and_made_anew(tmp_path):
    model, tokenizer = language(), decoder_tokenizer()
    take(model, tokenizer, tmp_path, generate=2, block=4)
    before = copies(tmp_path)
    paths = sorted(tmp_path.glob("*.safetensors"))
    flipped = bytearray(before[paths[1].name])
    flipped[-1] ^= 1
    paths[0].write_bytes(before[paths[0].name][:-7])
    paths[1].write_bytes(flipped)
    paths[2].write_bytes(before[paths[3].name])  # whole, but another block
    name = find_sites(model)[0].name
    recording = Recording.open(tmp_path)
    again = "call record with the same arguments to make it anew"
    for read in (recording.outputs, recording.neurons, lambda _: recording.continuations):
        with pytest.raises(FileError, match=rf"block-00000.safetensors: truncated: .*; {again}"):
            read(name)
    with pytest.raises(FileError, match="block-00000"):
        recording.fingerprint()
    with pytest.warns(UserWarning, match="recording: made anew: ") as warned:
        take(model, tokenizer, tmp_path, generate=2, block=4)
    texts = [str(warning.message) for warning in warned]
    assert ["truncated" in texts[0], "SHA-256 does not fit" in texts[1], "another block" in texts[2]] == [True] * 3
    assert len(texts) == 3
    assert copies(tmp_path) == before


def test_every_flipped_bit_of_a_block_is_found(tmp_path):
    take(tiny("bert"), tokenizer_for("bert"), tmp_path, PROMPTS[:2], neurons=False)
    path = tmp_path / "block-00000.safetensors"
    before = path.read_bytes()
    name = "bert.encoder.layer.0.output.dense"
    for place in range(8, len(before), 41):
        damaged = bytearray(before)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(FileError, match="block-00000"):
            Recording.open(tmp_path).outputs(name)
    path.unlink()
    with pytest.raises(FileError, match="was cut off: 0 of 2 prompts are recorded"):
        Recording.open(tmp_path)


# Numbers that are not finite


def test_nan_names_site_and_prompt(tmp_path):
    model, tokenizer = tiny("bert"), tokenizer_for("bert")
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[tokenizer.convert_tokens_to_ids("z")] = torch.nan
    prompts = [*PROMPTS[:10], "the z was good", *PROMPTS[10:]]
    before = state(model)
    first = r"outputs of 'bert.encoder.layer.0.output.dense' are not finite at prompt 10$"
    with pytest.raises(ValueError, match=first):
        take(model, tokenizer, tmp_path, prompts)
    assert before[1:] == state(model)[1:]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["block-00000.safetensors", "recording.json"]


@pytest.mark.parametrize("place", ["neurons", "outputs"])
def test_what_is_too_large_for_float16(place, tmp_path):
    model, tokenizer = tiny("gpt2"), tokenizer_for("gpt2")
    down = model.transformer.h[2].mlp.c_proj
    with torch.no_grad():
        if place == "outputs":
            down.weight.mul_(1e6)
        else:
            down.weight.mul_(1e-6)
            model.transformer.h[2].mlp.c_fc.weight.mul_(1e6)
    message = rf"the {place} of 'transformer.h.2.mlp.c_proj' are not finite at prompt \d+ \(too large for float16: stor"
    with pytest.raises(ValueError, match=message):
        take(model, tokenizer, tmp_path / "narrow")
    for dtype in (torch.float32, torch.bfloat16):
        assert len(take(model, tokenizer, tmp_path / str(dtype), storage=dtype)) == 20


def test_padding_need_not_be_finite(tmp_path):
    model, tokenizer = tiny("llama"), tokenizer_for("llama")
    want = take(model, tokenizer, tmp_path / "plain", position="mean")
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 1e30  # the padding token's
    recording = take(model, tokenizer, tmp_path / "wild", position="mean")
    for name in want.widths:
        assert torch.equal(recording.neurons(name), want.neurons(name))


# What is refused


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([], ValueError, "prompts: need at least 1, got 0"),
        ("text", TypeError, "prompts: expected a sequence of str, got str"),
        (["a", 3], TypeError, "prompts: expected str, got int at row 1"),
        (["a", None], TypeError, "prompts: expected str, got NoneType at row 1"),
        (["a", ""], ValueError, "prompts: is empty at row 1"),
        (["a", " \n"], ValueError, "prompts: is empty at row 1"),
        (["a", "\ud800"], ValueError, r"prompts: is not valid Unicode: .* at row 1"),
    ],
)
def test_wrong_prompts(prompts, error, message, tmp_path):
    with pytest.raises(error, match=message):
        take(tiny("llama"), tokenizer_for("llama"), tmp_path / "new", prompts)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"position": "first"}, ValueError, "position: expected one of last, mean, got 'first'"),
        ({"storage": torch.int8}, ValueError, "storage: expected one of torch.float16"),
        ({"generate": -1}, ValueError, "generate: need at least 0, got -1"),
        ({"generate": 1.5}, TypeError, "generate: expected an integer"),
        ({"batch_size": 0}, ValueError, "batch_size: need at least 1"),
        ({"block": 0}, ValueError, "block: need at least 1"),
        ({"max_length": 0}, ValueError, "max_length: need at least 1"),
        ({"memory": "much"}, ValueError, "memory: expected bytes"),
        ({"sites": ["nowhere"]}, ValueError, "names: the model has no module 'nowhere'"),
        ({"generate": 60}, ValueError, "max_length: the longest prompt has 8 tokens and 60 new ones, the model 64 pos"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_settings(settings, error, message, tmp_path):
    with pytest.raises(error, match=message):
        take(language(), decoder_tokenizer(), tmp_path / "new", **settings)
    assert not (tmp_path / "new").exists()


def test_wrong_parts(tmp_path):
    recording = take(tiny("gpt2"), tokenizer_for("gpt2"), tmp_path, PROMPTS[:2])
    name = next(iter(recording.widths))
    with pytest.raises(ValueError, match="part: expected a slice without a step"):
        recording.neurons(name, slice(0, 9, 2))
    with pytest.raises(TypeError, match="part: expected a slice, got int"):
        recording.neurons(name, 3)


def test_a_prompt_without_a_token(tmp_path):
    tokenizer = decoder_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("nothing", "")
    with pytest.raises(ValueError, match="prompts: has no token at row 1, got 'nothing'"):
        take(language(), tokenizer, tmp_path, ["a good film", "nothing", "film"])


def test_models_that_cannot_be_recorded(tmp_path):
    config = transformers.T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    with pytest.raises(ValueError, match="model: T5ForConditionalGeneration has an encoder and a decoder"):
        take(transformers.T5ForConditionalGeneration(config), tokenizer_for("bert"), tmp_path)
    with pytest.raises(ValueError, match=r"sites: expected values .*one vector a token, got"):
        take(tiny("bert"), tokenizer_for("bert"), tmp_path / "head", sites=["classifier"])


def test_a_tokenizer_that_cannot_pad(tmp_path):
    tokenizer = decoder_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="tokenizer: has no padding token"):
        take(language(), tokenizer, tmp_path)


def test_without_warnings(tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take(language(), decoder_tokenizer("left", padding=False), tmp_path, generate=2)
    assert capsys.readouterr().err == ""
