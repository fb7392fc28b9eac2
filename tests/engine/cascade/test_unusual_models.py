"""Models that cannot be taken as a stack of layers, each run once: their values are those of the whole model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.tiny_models import HEADS, HIDDEN, LAYERS, WIDTH, drawn, tiny, tiny_inputs
from helpers.tolerance import assert_near
from spurge.engine.base.temporary import Temporaries
from spurge.engine.cascade.cascade import Cascade, predicted_logit
from spurge.engine.cascade.locator import Locator
from spurge.engine.models.hooks import hook_before
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.sites import Site, find_sites
from spurge.engine.passes.whole_pass import WholePass
from spurge.engine.planning.plan import plan

SMALL = {"vocab_size": 99, "num_labels": 3, "pad_token_id": 0}
ENCODER = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
}
ENDS = {"eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 2}
BART = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in (("layers", 2), ("ffn_dim", WIDTH))}
OPT = {"hidden_size": HIDDEN, "word_embed_proj_dim": HIDDEN, "ffn_dim": WIDTH, "num_hidden_layers": 2}

# name -> class, task, configuration; whether the whole model is run for each row
MODELS: dict[str, tuple[str, str, dict[str, Any], bool]] = {
    "albert": ("Albert", "ForSequenceClassification", dict(ENCODER, embedding_size=16), True),
    "bert-chunked": ("Bert", "ForSequenceClassification", dict(ENCODER, chunk_size_feed_forward=1), True),
    "deberta-conv": ("DebertaV2", "ForSequenceClassification", dict(ENCODER, conv_kernel_size=3), True),
    "mobilebert": (
        "MobileBert",
        "ForSequenceClassification",
        dict(ENCODER, embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16, num_feedforward_networks=3),
        True,
    ),
    "funnel": (
        "Funnel",
        "ForSequenceClassification",
        {"d_model": HIDDEN, "block_sizes": [1, 1], "n_head": HEADS, "d_head": 8, "d_inner": WIDTH},
        True,
    ),
    "t5": (
        "T5",
        "ForSequenceClassification",
        {"d_model": HIDDEN, "d_kv": 8, "d_ff": WIDTH, "num_layers": 2, "num_heads": HEADS, **ENDS},
        True,
    ),
    "bart": (
        "Bart",
        "ForSequenceClassification",
        {"d_model": HIDDEN, "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, **BART, **ENDS},
        True,
    ),
    "falcon": ("Falcon", "ForSequenceClassification", {"hidden_size": HIDDEN, "num_hidden_layers": 2}, False),
    "opt": ("OPT", "ForSequenceClassification", OPT, False),
    "opt-language": ("OPT", "ForCausalLM", OPT, False),
    "openai-gpt": (
        "OpenAIGPT",
        "ForSequenceClassification",
        {"n_embd": HIDDEN, "n_layer": 2, "n_head": HEADS, "n_positions": 64},
        False,
    ),
    "convbert": ("ConvBert", "ForSequenceClassification", dict(ENCODER, embedding_size=HIDDEN, head_ratio=2), False),
}


def model_of(name: str, **settings: Any) -> Any:
    kind, task, sizes, _ = MODELS[name]
    if name in ("falcon", "opt", "opt-language"):
        sizes = dict(sizes, num_attention_heads=HEADS)
    return drawn(kind, task, {**SMALL, **sizes, **settings}, seed=1)


def inputs_of(examples: int = 3, tokens: int = 7) -> dict[str, Tensor]:
    ids = torch.randint(5, 99, (examples, tokens), generator=torch.Generator().manual_seed(3))
    ids[:, -1] = 1  # where an encoder-decoder looks for the end
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    logits = model(**inputs).logits
    return logits if logits.dim() == 2 else logits[:, -1]


def whole(model: nn.Module, inputs: dict[str, Tensor], gates: dict[str, Tensor]) -> Tensor:
    """The truth: the whole model with the input of down projections times gates ``[F]``."""

    def multiply(gate: Tensor) -> Callable[..., Any]:
        return lambda module, args, kwargs: ((args[0] * gate, *args[1:]), kwargs)

    sites = {site.name: site for site in find_sites(model)}
    with Temporaries() as stack, torch.no_grad():
        for name, gate in gates.items():
            stack.enter_context(hook_before(sites[name].down, multiply(gate)))
        return logits_of(model, inputs)


def erased(site: Site, *neurons: int) -> dict[str, Tensor]:
    gate = torch.ones(site.width)
    gate[list(neurons) or slice(None)] = 0
    return {site.name: gate}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:.*is run whole for every row")
def test_every_question_is_answered_as_the_whole_model_would(name: str) -> None:
    model, inputs = model_of(name), inputs_of()
    sites, full = find_sites(model), whole(model, inputs, {})
    predicted = full.argmax(1, keepdim=True)

    def effect(gates: dict[str, Tensor]) -> Tensor:
        return (full - whole(model, inputs, gates)).gather(1, predicted)[:, 0]

    cascade = Cascade(model, nodes=3, path="layer")
    found = cascade.attribute(inputs, predicted_logit)
    assert isinstance(cascade.forward, WholePass) == MODELS[name][3]
    assert_near(found.full[0], full.amax(1), terms=100)
    for site in sites:
        assert_near(found.full[0] - found.erased[site.name][0], effect(erased(site)), terms=1000)
    units = {site.name: [1, site.width - 1] for site in (sites[0], sites[-1])}
    off = cascade.ablate(inputs, predicted_logit, NeuronSet(units))[0]
    some = {site.name: site for site in sites}
    for column, ref in enumerate(NeuronSet(units)):
        assert_near(off[:, column], effect(erased(some[ref.site], ref.index)), terms=1000)
    gates = torch.tensor([[0.0, 2.0, 0.5, 1.0], [1.0, 0.0, 1.0, -1.0]])[:, : len(NeuronSet(units))]
    got = cascade.gated(inputs, lambda rows: rows.logits, NeuronSet(units), gates)
    for setting, values in zip(gates, got, strict=True):
        full_gates = {ref.site: torch.ones(some[ref.site].width) for ref in NeuronSet(units)}
        for gate, ref in zip(setting, NeuronSet(units), strict=True):
            full_gates[ref.site][ref.index] = gate
        assert_near(values, whole(model, inputs, full_gates), terms=1000)


def along(model: nn.Module, inputs: dict[str, Tensor], sites: list[Site], points: Tensor) -> dict[str, Tensor]:
    """Means over points of the layer path: whole passes, gradients by what goes into each call of a down projection."""
    predicted, found = whole(model, inputs, {}).argmax(1, keepdim=True), {}
    for site in sites:
        total = torch.zeros(len(predicted), site.width)
        for point in points:
            seen: list[tuple[Tensor, Tensor]] = []

            def scale(module: nn.Module, args: tuple, kwargs: dict, seen: list = seen, point: Tensor = point) -> Any:
                scaled = args[0] * point
                seen.append((args[0].detach(), scaled if scaled.requires_grad else scaled.requires_grad_()))
                return (scaled, *args[1:]), kwargs

            with hook_before(site.down, scale), torch.enable_grad():
                value = logits_of(model, inputs).gather(1, predicted).sum()
            grads = torch.autograd.grad(value, [scaled for _, scaled in seen])
            for grad, (z, _) in zip(grads, seen, strict=True):
                total += 1 / len(points) * (grad * z).reshape(len(predicted), -1, site.width).sum(1)
        found[site.name] = total
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:.*is run whole for every row")
def test_the_gradient_path_is_that_of_the_whole_model(name: str) -> None:
    model, inputs = model_of(name), inputs_of(2, 5)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    sites = find_sites(model)
    want = along(model, inputs, sites, torch.ones(1))
    got = Cascade(model, exact=0, audit=0).attribute(inputs, predicted_logit).values
    for site, value in got.items():
        assert_near(value[0], want[site], terms=1000, size=want[site].abs().max())
    measured = Cascade(model, exact=4, audit=100).attribute(inputs, predicted_logit)
    assert measured.agreement[0].drawn == 100
    exact = measured.values
    every = Cascade(model, path="neuron").attribute(inputs, predicted_logit).values
    moved = {site: (exact[site] != got[site]).any(0) for site in got}  # of an example's unit each
    assert 0 < sum(int(where.sum()) for where in moved.values()) <= measured.exact == 4 * 2
    for site, where in moved.items():
        assert_near(exact[site][:, where], every[site][:, where], terms=1000)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:.*is run whole for every row")
def test_the_layer_path_is_that_of_the_whole_model(name: str) -> None:
    model, inputs = model_of(name), inputs_of(2, 5)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    middles = torch.linspace(0, 1, 401)[1::2]
    want = along(model, inputs, find_sites(model), middles)
    got = Cascade(model, nodes=24, path="layer").attribute(inputs, predicted_logit).values
    for site, value in got.items():  # 200 midpoints and 24 nodes, and a kink of a ReLU wherever it falls
        torch.testing.assert_close(value[0], want[site], rtol=0, atol=0.02 * float(want[site].abs().max()))


@pytest.mark.filterwarnings("ignore:.*is run whole for every row")
@pytest.mark.parametrize("settings", [{"path": "joint"}, {"rule": "radau", "nodes": 8}, {"tolerance": 0.05}])
def test_every_path_of_a_shared_layer_is_complete(settings: dict[str, Any]) -> None:
    model, inputs = model_of("albert"), inputs_of()
    found = Cascade(model, **{"path": "layer", "nodes": 16, **settings}).attribute(inputs, predicted_logit)
    assert found.relative_residual() < 0.01
    kept = Cascade(model, **{"path": "layer", "nodes": 16, **settings})
    again = kept.attribute(kept.read(inputs), predicted_logit)
    for site, value in found.values.items():
        assert_near(again.values[site], value, terms=100)


def test_a_small_budget_cuts_whole_passes_into_blocks() -> None:
    model, inputs = model_of("albert"), inputs_of()
    with pytest.warns(UserWarning, match=r"AlbertForSequenceClassification is run whole .*: it runs its 1 layers as"):
        want = Cascade(model, nodes=8, path="layer").attribute(inputs, predicted_logit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tight = Cascade(model, nodes=8, memory=400_000, path="layer")
        got = tight.attribute(inputs, predicted_logit)
        assert plan(tight, inputs).blocks > plan(Cascade(model, nodes=8, path="layer"), inputs).blocks
        with pytest.raises(ValueError, match="memory: "):
            Cascade(model, memory=1000, path="layer").attribute(inputs, predicted_logit)
    for site, value in got.values.items():
        assert_near(value, want.values[site], terms=1000, size=want.values[site].abs().max())


@pytest.mark.filterwarnings("ignore:.*is run whole for every row")
@pytest.mark.parametrize("name", ["albert", "t5", "opt-language"])
def test_a_plan_knows_models_that_are_run_whole(name: str) -> None:
    cascade, inputs = Cascade(model_of(name), path="layer"), inputs_of()
    made = plan(cascade, inputs)
    sites, layers = len(cascade.sites), len(cascade.forward.blocks)
    assert made.total_rows == 3 * (1 + sites + 2 * sites)
    if name != "opt-language":
        assert made.layer_rows == made.total_rows * layers
    assert made.seconds > 0


def test_a_site_outside_all_layers_is_asked_about() -> None:
    model, inputs = tiny("bert", labels=3), tiny_inputs("bert")
    named = find_sites(model, ["classifier", "bert.encoder.layer.1.output.dense"])
    with pytest.warns(UserWarning, match="is run whole .*: 'classifier' is outside its layers"):
        cascade = Cascade(model, sites=named, path="layer")
    found = cascade.attribute(inputs, predicted_logit)
    logits = model(**inputs).logits
    straight = (logits - model.classifier.bias).gather(1, logits.argmax(1, keepdim=True))[:, 0]
    assert_near(found.values["classifier"][0].sum(1), straight.detach(), terms=1000)
    inner = Cascade(model, path="layer").attribute(inputs, predicted_logit).values[named[0].name]
    assert_near(found.values[named[0].name], inner, terms=1000, size=inner.abs().max())


def test_one_prompt_without_a_padding_token() -> None:
    model, inputs = model_of("openai-gpt", pad_token_id=None), inputs_of(1)
    assert_near(Locator(model, path="layer")(inputs).full[0], whole(model, inputs, {}).amax(1), terms=100)
    assert model.config.pad_token_id is None


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def test_wrapped_layers_are_entered_as_unwrapped_ones() -> None:
    model, inputs = tiny("bert", labels=3), tiny_inputs("bert")
    want = Cascade(copy.deepcopy(model), path="layer").attribute(inputs, predicted_logit)
    model.bert.encoder.layer = nn.ModuleList(Wrapper(layer) for layer in model.bert.encoder.layer)
    assert type(find_sites(model)[-1].ffn).__name__ == "BertIntermediate"
    got = Cascade(model, path="layer").attribute(inputs, predicted_logit)
    for value, right in zip(got.values.values(), want.values.values(), strict=True):
        assert_near(value, right, terms=100, size=right.abs().max())


def test_a_model_that_mixes_the_rows_of_a_batch_is_refused() -> None:
    class Centred(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return self.layer(hidden - hidden.mean(0, keepdim=True), *args, **kwargs)

    model = tiny("bert")
    model.bert.encoder.layer = nn.ModuleList(Centred(layer) for layer in model.bert.encoder.layer)
    with (
        pytest.warns(UserWarning, match="is run whole"),
        pytest.raises(ValueError, match="BertForSequenceClassification mixes the rows of a batch"),
    ):
        Cascade(model, path="layer").attribute(tiny_inputs("bert", pad=False), predicted_logit)


def padded(pad: int) -> dict[str, Tensor]:
    ids = torch.randint(5, 99, (3, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, 5:] = mask[2, 4:] = 0
    return {"input_ids": ids * mask + pad * (1 - mask), "attention_mask": mask}


@pytest.mark.parametrize("name", ["convbert", "deberta-conv"])
@pytest.mark.filterwarnings("ignore:.*is run whole for every row")
def test_padding_that_acts_on_real_tokens_is_refused(name: str) -> None:
    model, inputs = model_of(name), padded(0)
    if name == "deberta-conv":  # sees to it that its convolution reads no padding
        assert Cascade(model, nodes=12, path="layer").attribute(inputs, predicted_logit).relative_residual() < 1e-3
        return
    cascade = Cascade(model, path="layer")
    with pytest.raises(ValueError, match=r"inputs: padding changes what .* answers .*, expected texts of one length"):
        cascade.attribute(inputs, predicted_logit)
    site = cascade.sites[0]
    off = cascade.ablate(inputs, predicted_logit, NeuronSet({site.name: [3]}))[0, :, 0]  # of the batch as it is
    full = whole(model, inputs, {})
    want = (full - whole(model, inputs, erased(site, 3))).gather(1, full.argmax(1, keepdim=True))[:, 0]
    assert_near(off, want, terms=1000)


@pytest.mark.parametrize("first_is_padded", [False, True])
def test_a_head_that_reads_a_padding_token_is_refused(first_is_padded: bool) -> None:
    model = tiny("llama", labels=3, pad_token_id=3)
    inputs = padded(1)
    if not first_is_padded:
        inputs = {name: value.flip(0).roll(1, 0) for name, value in inputs.items()}
    with pytest.raises(ValueError, match="the configuration's pad_token_id is 3, is it the tokenizer's"):
        Cascade(model, path="layer").attribute(inputs, predicted_logit)
    model.config.pad_token_id = 1
    model.model.embed_tokens.padding_idx = 1
    found = Cascade(model, nodes=12, path="layer").attribute(inputs, predicted_logit)
    assert found.relative_residual() < 1e-3
    assert_near(found.full[0], whole(model, inputs, {}).amax(1), terms=100)


def test_a_later_batch_is_looked_at_too() -> None:
    model = tiny("llama", labels=3, pad_token_id=3)
    cascade, inputs = Cascade(model, nodes=8, path="layer"), padded(1)
    plain = {"input_ids": inputs["input_ids"].clamp_min(5), "attention_mask": torch.ones_like(inputs["input_ids"])}
    cascade.attribute(plain, predicted_logit)
    assert cascade.forward.pruned  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="inputs: padding changes"):
        cascade.attribute(inputs, predicted_logit)


def test_states_that_a_layer_writes_into_are_kept_as_they_were() -> None:
    class Scribbling(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            output = self.layer(hidden.clone(), *args, **kwargs)
            hidden.mul_(3)
            return output

    model, inputs = tiny("llama", layers=LAYERS), tiny_inputs("llama")
    want = Cascade(copy.deepcopy(model), path="layer").attribute(inputs, predicted_logit)
    model.model.layers = nn.ModuleList(Scribbling(layer) for layer in model.model.layers)
    got = Cascade(model, path="layer").attribute(inputs, predicted_logit)
    for value, right in zip(got.values.values(), want.values.values(), strict=True):
        assert_near(value, right, terms=100, size=right.abs().max())
