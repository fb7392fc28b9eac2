"""Extraction: what the head reads from any kind of data, a model left as it was, and a cache that cannot go stale."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from helpers.tiny_models import DECODERS, FAMILIES, HIDDEN, WORDS, tiny, tiny_tokenizer, tokenizer_for
from spurge import Examples, NeuronEdit, NeuronSet, extract, find_sites
from spurge.engine.data.examples import Example, encode
from spurge.engine.features.features import Features
from spurge.engine.features.reader import Reader
from spurge.engine.models.heads import find_head

TEXTS = Examples.load(
    [
        {"text": f"the {word} was {'very ' * (i % 5)}good", "label": i % 2, "group": WORDS[i % 3]}
        for i, word in enumerate(WORDS[:30])
    ],
    group="group",
)
LABELS, GROUPS = torch.arange(50) % 3, torch.arange(50) // 3 % 2


class Net(nn.Module):
    """A small image classifier with all that training and evaluation do differently."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.AdaptiveMaxPool2d(1)
        )
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.body(x).flatten(1))


@pytest.fixture
def net() -> Net:
    return Net()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(50, 3, 6, 6)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every forward pass; hooks would keep the model out of the cache."""
    rows: list[int] = []
    read = Reader._read

    def counted(self, batch):
        rows.append(len(batch))
        return read(self, batch)

    monkeypatch.setattr(Reader, "_read", counted)
    return rows


def take(model, data, **settings) -> Features:
    return extract(model, data, **({"progress": False, "batch_size": 8, "block": 16} | settings))


def state(model):
    """All that has to be as it was."""
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return bits, modes, hooks, [p.requires_grad for p in model.parameters()]


def unchanged(before, model) -> bool:
    after = state(model)
    return before[1:] == after[1:] and all(torch.equal(before[0][name], value) for name, value in after[0].items())


def copies(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What is read


@pytest.mark.parametrize("family", FAMILIES)
def test_the_features_of_every_family_give_its_logits(family):
    model = tiny(family, labels=3)
    if family == "vit":
        data = (torch.randn(20, 3, 16, 16), LABELS[:20])
        x = take(model, data)
        with torch.no_grad():
            expected = model(data[0]).logits
    else:
        tokenizer = tokenizer_for(family)
        x = take(model, TEXTS, tokenizer=tokenizer)
        with torch.no_grad():
            expected = torch.cat([model(**encode(tokenizer, [row])).logits for row in TEXTS])
    assert x.values.shape == (len(expected), HIDDEN)
    assert x.values.dtype == torch.float32
    assert torch.allclose(x.logits(), expected, atol=2e-4)
    assert x.head.name == find_head(model)[0]


def test_texts_bring_labels_groups_and_names():
    model = tiny("bert")
    x = take(model, TEXTS, tokenizer=tiny_tokenizer())
    assert torch.equal(x.labels, TEXTS.targets)
    assert x.names == TEXTS.labels
    assert x.group_names == TEXTS.groups
    assert [x.group_names[group] for group in x.groups] == [row.group for row in TEXTS]
    assert x.info["model"] == "BertForSequenceClassification"
    wider = take(tiny("bert", labels=4), TEXTS, tokenizer=tiny_tokenizer(), group_names=("zzz", *TEXTS.groups))
    assert wider.names == ("0", "1", "2", "3")
    assert wider.group_names[0] == "zzz"
    assert torch.equal(wider.groups, x.groups + 1)


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def kinds(images):
    rows = list(zip(images, LABELS.tolist(), GROUPS.tolist(), strict=True))
    named = [{"x": image, "label": label, "group": group} for image, label, group in rows]
    whole = TensorDataset(images, LABELS, GROUPS)
    return {
        "tensors": (images, LABELS, GROUPS),
        "list of tensors": [images, LABELS, GROUPS],
        "dict": {"inputs": images, "labels": LABELS, "groups": GROUPS},
        "named": {"x": images, "labels": LABELS, "groups": GROUPS.tolist()},
        "rows": rows,
        "generator": (row for row in rows),
        "arrays": [(image.numpy(), np.int64(label), np.int32(group)) for image, label, group in rows],
        "dicts": named,
        "Dataset": whole,
        "IterableDataset": Stream(rows),
        "DataLoader": DataLoader(whole, batch_size=8),
        "DataLoader of dicts": DataLoader(named, batch_size=8),
        "names of groups": [(image, label, "ab"[group]) for image, label, group in rows],
    }


def test_all_kinds_of_data_are_the_same_data(net, images):
    expected = take(net, (images, LABELS, GROUPS))
    with torch.no_grad():
        assert torch.allclose(expected.logits(), net.eval()(images), atol=1e-5)
    for kind, data in kinds(images).items():
        x = take(net, data)
        assert torch.equal(x.values, expected.values), kind
        assert torch.equal(x.labels, LABELS), kind
        assert torch.equal(x.groups, GROUPS), kind
        assert x.group_names == (("a", "b") if kind == "names of groups" else ("0", "1")), kind


def test_without_groups(net, images):
    for data in (
        (images, LABELS),
        DataLoader(TensorDataset(images, LABELS), 9),
        list(zip(images, LABELS, strict=True)),
    ):
        assert take(net, data, names=("a", "b", "c")).groups is None


def test_inputs_become_the_type_of_the_model(net, images):
    x = take(net.double(), (images, LABELS), storage=torch.float64)
    assert x.values.dtype == torch.float64
    half = take(net, (images, LABELS), storage=torch.float16)
    assert torch.equal(half.values, x.values.half())


def test_mixed_precision_keeps_wide_features(net, images):
    exact = take(net, (images, LABELS)).values
    mixed = take(net, (images, LABELS), dtype=torch.bfloat16)
    assert mixed.values.dtype == torch.float32
    assert 0 < (mixed.values - exact).abs().max() < 0.05 * exact.abs().max()
    assert mixed.info["autocast"] == "bfloat16"


@pytest.mark.parametrize("family", DECODERS)
def test_tokens_of_a_head_that_reads_all(family):
    model, tokenizer = tiny(family), tokenizer_for(family)
    auto = take(model, TEXTS, tokenizer=tokenizer, batch_size=1, block=1)
    last = take(model, TEXTS, tokenizer=tokenizer, token="last", batch_size=1, block=1)
    assert torch.equal(auto.values, last.values)
    with pytest.raises(ValueError, match="does not make the model's logits"):
        take(model, TEXTS, tokenizer=tokenizer, token="first")
    name = find_head(model)[0]
    first = take(model, TEXTS, tokenizer=tokenizer, token="first", head=name)
    assert not torch.allclose(first.values, last.values, atol=1e-3)


def test_the_last_token_is_the_last_of_the_mask():
    class PerToken(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 2)

        def forward(self, x, attention_mask=None):
            return self.head(x)

    x = torch.arange(24.0).reshape(3, 4, 2)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1]])
    labels = torch.zeros(3, dtype=torch.int64)
    found = take(PerToken(), {"x": x, "attention_mask": mask, "labels": labels}, token="last", head="head")
    assert torch.equal(found.values, torch.stack([x[0, 1], x[1, 3], x[2, 3]]))
    assert torch.equal(take(PerToken(), (x, labels), token="last", head="head").values, x[:, 3])
    with pytest.raises(ValueError, match="token: the head reads every token of this model"):
        take(PerToken(), (x, labels), head="head")


def test_a_head_inside_the_model_by_its_path(images):
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 5), nn.ReLU(), nn.Linear(5, 3), nn.Softmax(1))
    with pytest.raises(ValueError, match=r"layer '3' does not make the model's logits; give head="):
        take(model, (images, LABELS))
    assert take(model, (images, LABELS), head="3").head.name == "3"
    assert torch.equal(take(model, (images, LABELS), head="1").values, images.flatten(1))


def test_a_budget_of_memory_splits_batches(net, images, runs):
    whole = take(net, (images, LABELS), batch_size=50)
    assert runs == [50]
    runs.clear()
    parts = take(net, (images, LABELS), batch_size=50, memory=3 * (4 * 8 * 16) * 4)
    assert max(runs) == 3
    assert torch.allclose(parts.values, whole.values, atol=1e-6)


def test_out_of_memory_halves_the_batch(net, images, monkeypatch):
    read, rows = Reader._read, []

    def small(self, batch):
        rows.append(len(batch))
        if len(batch) > 10:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return read(self, batch)

    monkeypatch.setattr(Reader, "_read", small)
    assert len(take(net, (images, LABELS), batch_size=50)) == 50
    assert rows[:4] == [50, 25, 13, 7]


# The model stays as it was


def test_the_model_comes_back_as_it_was(net, images):
    net.train()
    net.body[3].eval()
    net.fc.bias.requires_grad_(False)
    before = state(net)
    take(net, (images, LABELS))
    assert unchanged(before, net)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_comes_back_after_an_exception(net, images, error):
    net.train()
    before = state(net)

    def rows():
        yield from zip(images[:20], LABELS[:20], strict=True)
        raise error("stop")

    with pytest.raises(error, match="stop"):
        take(net, rows())
    assert unchanged(before, net)


def test_a_compiled_model_runs_as_the_original(net, images):
    expected = take(net, (images, LABELS))
    assert torch.equal(take(torch.compile(net), (images, LABELS)).values, expected.values)


def test_the_model_may_move_and_comes_back(net, images, device):
    x = take(net, (images, LABELS), device=device)
    assert x.values.device.type == "cpu"
    assert next(net.parameters()).device.type == "cpu"
    assert torch.allclose(x.values, take(net, (images, LABELS)).values, atol=1e-3)


# The cache


def test_a_second_run_needs_no_forward_pass(net, images, runs, tmp_path):
    first = take(net, (images, LABELS, GROUPS), cache=tmp_path / "deep" / "cache")
    assert sum(runs) == 50
    second = take(net, (images, LABELS, GROUPS), cache=tmp_path / "deep" / "cache")
    assert sum(runs) == 50
    assert second.fingerprint() == first.fingerprint() == take(net, (images, LABELS, GROUPS)).fingerprint()
    assert second.info == first.info


def test_other_labels_are_no_other_features(net, images, runs, tmp_path):
    take(net, (images, LABELS), cache=tmp_path)
    x = take(net, (images, LABELS.flip(0), GROUPS), cache=tmp_path)
    assert sum(runs) == 50
    assert torch.equal(x.labels, LABELS.flip(0))


def again(net, images, runs, folder, **settings) -> int:
    """Rows that run once more after a full run filled the cache."""
    runs.clear()
    data = settings.pop("data", (images, LABELS))
    x = take(net, data, cache=folder, **settings)
    fresh = sum(runs)
    assert torch.equal(x.values, take(net, data, **settings).values)
    return fresh


def nudge(tensor: torch.Tensor) -> None:
    """The smallest change of one number."""
    with torch.no_grad():
        flat = tensor.view(-1)
        flat[0] = torch.nextafter(flat[0], torch.tensor(9.0))


@pytest.mark.parametrize("name", ["body.0.weight", "body.1.bias", "fc.weight", "body.1.running_mean"])
def test_one_bit_of_one_weight_or_buffer_counts(net, images, runs, tmp_path, name):
    take(net, (images, LABELS), cache=tmp_path)
    nudge(net.state_dict()[name])
    assert again(net, images, runs, tmp_path) == 50
    assert again(net, images, runs, tmp_path) == 0


def test_one_pixel_counts_for_its_block(net, images, runs, tmp_path):
    take(net, (images, LABELS), cache=tmp_path)
    nudge(images[20])
    assert again(net, images, runs, tmp_path) == 16


def test_one_token_counts_for_its_block(runs, tmp_path):
    model, tokenizer = tiny("bert"), tiny_tokenizer()
    take(model, TEXTS, tokenizer=tokenizer, cache=tmp_path)
    rows = list(TEXTS)
    rows[0] = Example(rows[0].text + " today", rows[0].label, group=rows[0].group)
    assert again(model, None, runs, tmp_path, data=Examples(rows, TEXTS.labels), tokenizer=tokenizer) == 16


@pytest.mark.parametrize(
    "settings",
    [{"dtype": torch.bfloat16}, {"storage": torch.float16}, {"batch_size": 7}, {"head": "fc"}, {"token": "last"}],
    ids=str,
)
def test_settings_count(net, images, runs, tmp_path, settings):
    take(net, (images, LABELS), cache=tmp_path)
    assert again(net, images, runs, tmp_path, **settings) == 50


def test_the_order_of_texts_of_one_batch_counts(runs, tmp_path):
    """Batches are sorted by length: two orders of the rows give the same batches, and each its own features."""
    model, tokenizer = tiny("bert"), tiny_tokenizer()
    some = TEXTS.subset([0, 1, 2, 3])
    x = take(model, some, tokenizer=tokenizer, cache=tmp_path)
    runs.clear()
    y = take(model, some.subset([3, 2, 1, 0]), tokenizer=tokenizer, cache=tmp_path)
    assert runs == []
    assert torch.equal(y.values, x.values.flip(0))


def test_attached_edits_count(runs, tmp_path):
    model, tokenizer = tiny("bert"), tiny_tokenizer()
    plain = take(model, TEXTS, tokenizer=tokenizer, cache=tmp_path)
    edit = NeuronEdit.build(model, NeuronSet({find_sites(model)[0].name: [1, 2]}), 0.0)
    for _ in range(2):
        with edit.applied(model):
            edited = take(model, TEXTS, tokenizer=tokenizer, cache=tmp_path)
    assert sum(runs) == 60
    assert not torch.equal(edited.values, plain.values)
    assert torch.equal(take(model, TEXTS, tokenizer=tokenizer, cache=tmp_path).values, plain.values)
    with edit.with_gates(0.5).applied(model):
        take(model, TEXTS, tokenizer=tokenizer, cache=tmp_path)
    assert sum(runs) == 90


def test_a_model_with_foreign_hooks_is_not_cached(net, images, runs, tmp_path):
    take(net, (images, LABELS), cache=tmp_path)
    handle = net.body[0].register_forward_hook(lambda module, args, output: output * 2)
    with pytest.warns(UserWarning, match=r"cache: not used: module 'body.0' has forward hooks"):
        hooked = take(net, (images, LABELS), cache=tmp_path)
    handle.remove()
    assert sum(runs) == 100
    assert not torch.equal(hooked.values, take(net, (images, LABELS), cache=tmp_path).values)
    assert sum(runs) == 100


def test_an_interrupted_run_resumes(net, images, runs, tmp_path):
    expected = take(net, (images, LABELS))
    runs.clear()

    def rows():
        yield from zip(images[:40], LABELS[:40], strict=True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take(net, rows(), cache=tmp_path)
    assert sum(runs) == 32  # two blocks; the third was not complete
    x = take(net, zip(images, LABELS, strict=True), cache=tmp_path)
    assert sum(runs) == 50
    assert x.fingerprint() == expected.fingerprint()


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
from helpers.tiny_models import tiny, tiny_tokenizer
from spurge.engine.features.cache import FeatureCache
from test_extraction import TEXTS, take
keep, kept = FeatureCache.keep, []
def dying(self, key, values):
    keep(self, key, values)
    kept.append(key)
    if len(kept) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
FeatureCache.keep = dying
take(tiny("bert"), TEXTS, tokenizer=tiny_tokenizer(), block=8, cache={folder!r})
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_process_resumes_in_another_with_the_same_bytes(runs, tmp_path):
    """Keys are the same in another process, whatever the seed of its hashes."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    code = KILLED.format(path=[str(Path(__file__).parent), *sys.path], folder=str(killed))
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    before = copies(killed)
    assert len(before) == 2
    x = take(tiny("bert"), TEXTS, tokenizer=tiny_tokenizer(), block=8, cache=killed)
    assert sum(runs) == 14  # of 30
    y = take(tiny("bert"), TEXTS, tokenizer=tiny_tokenizer(), block=8, cache=whole)
    assert x.fingerprint() == y.fingerprint()
    assert before.items() <= copies(killed).items()
    assert copies(killed) == copies(whole)


def test_damaged_files_are_made_anew(net, images, runs, tmp_path):
    take(net, (images, LABELS), cache=tmp_path)
    before = copies(tmp_path)
    paths = sorted(tmp_path.iterdir())
    paths[0].write_bytes(before[paths[0].name][:-7])
    broken = bytearray(before[paths[1].name])
    broken[-1] ^= 1
    paths[1].write_bytes(broken)
    paths[2].write_bytes(before[paths[3].name])  # whole, but another block
    with pytest.warns(UserWarning, match="cache: made anew") as warned:
        again(net, images, runs, tmp_path)
    assert len(warned) == 3
    assert copies(tmp_path) == before


def test_features_that_are_not_finite_are_not_cached(net, images, tmp_path):
    images[37, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="model: the features of row 37 are not finite"):
        take(net, (images, LABELS), cache=tmp_path)
    assert len(copies(tmp_path)) == 2


def test_without_warnings(net, images, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take(net, (images, LABELS), cache=tmp_path)
        take(tiny("bert"), TEXTS, tokenizer=tiny_tokenizer(), cache=tmp_path)


# What is refused


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (lambda x: (x, LABELS + 1), ValueError, "labels: expected values below 3, got 3 at row 2"),
        (lambda x: (x, LABELS - 1), ValueError, "labels: expected values below 3, got -1 at row 0"),
        (lambda x: (x, LABELS[:9]), ValueError, "data: 50 inputs, but 9 labels"),
        (lambda x: (x, LABELS, GROUPS[:9]), ValueError, "50 labels and 9 groups"),
        (lambda x: (x, LABELS.float()), TypeError, "a label is a whole number, got float 0.0"),
        (lambda x: [(x[0], True)], TypeError, "a label is a whole number, got bool True"),
        (lambda x: [], ValueError, "data: has no rows"),
        (lambda x: iter(()), ValueError, "data: has no rows"),
        (lambda x: (x[:0], LABELS[:0]), ValueError, "at least 1, got {'inputs': 0}"),
        (lambda x: [("a text", 0)], TypeError, "texts go in as Examples"),
        (lambda x: x, TypeError, "data: expected Examples, .* got Tensor"),
        (lambda x: 3, TypeError, "data: expected Examples, .* got int"),
        (lambda x: "rows.csv", TypeError, "data: expected Examples, .* got str"),
        (lambda x: [x[0]], TypeError, "one by one, got a Tensor"),
        (lambda x: [{"x": x[0]}], ValueError, r"data: expected 'labels' and inputs, got \['x'\]"),
        (lambda x: [{"labels": 0}], ValueError, r"data: expected 'labels' and inputs, got \['labels'\]"),
        (lambda x: [(x[0], 0), (x[0, :, :3], 1)], ValueError, "rows that cannot share a batch"),
        (lambda x: [(x[0], 0, 1), (x[0], 0)], ValueError, "either all rows have a group or none has"),
        (lambda x: [(x[0], 0, 1)] * 16 + [(x[0], 0)] * 16, ValueError, "all rows have a group or none has, see row 16"),
        (lambda x: [(x[0], 0, 1), (x[0], 0, "a")], TypeError, "groups: expected numbers, or names"),
        (lambda x: [(x[0], 0, -1)], ValueError, "groups: expected values from 0, got -1 at row 0"),
        (lambda x: TEXTS, ValueError, "tokenizer: needed"),
    ],
)
def test_wrong_data(net, images, data, error, message):
    before = state(net)
    with pytest.raises(error, match=message):
        take(net, data(images))
    assert unchanged(before, net)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"token": "mean"}, ValueError, "token: expected one of auto, first, last, got 'mean'"),
        ({"storage": torch.int8}, ValueError, "storage: expected one of torch.float16"),
        ({"dtype": torch.float32}, ValueError, "dtype: mixed precision is"),
        ({"batch_size": 0}, ValueError, "batch_size: need at least 1"),
        ({"block": 0}, ValueError, "block: need at least 1"),
        ({"memory": "much"}, ValueError, "memory: expected bytes"),
        ({"head": "nowhere"}, ValueError, "'nowhere' is no module of the model"),
        ({"names": ("a",)}, ValueError, "names: expected 3, one for each output, got 1"),
        ({"group_names": ("a",)}, ValueError, "group_names: the data has no groups"),
    ],
)
def test_wrong_settings(net, images, settings, error, message):
    with pytest.raises(error, match=message):
        take(net, (images, LABELS), **settings)


def test_names_of_groups_that_are_not_given(net, images):
    with pytest.raises(ValueError, match=r"group_names: 'b' of the data is none of \['a'\]"):
        take(net, [(images[0], 0, "a"), (images[1], 0, "b")], group_names=("a",))


def test_names_that_do_not_fit_the_outputs():
    named = Examples.load([("good", "yes"), ("bad", "no")])
    with pytest.raises(ValueError, match="names: the head has 3 outputs, the data names its labels"):
        take(tiny("bert", labels=3), named, tokenizer=tiny_tokenizer())


def test_heads_that_are_not_called_once(images):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.unused = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(x[:, 0, 0]) + self.head(x[:, 0, 1])

    for name, times in (("head", 2), ("unused", 0)):
        with pytest.raises(ValueError, match=f"layer '{name}' is called {times} times for a batch, expected once"):
            take(Twice(), (images, LABELS), head=name)


def test_heads_that_read_no_rows(images):
    model = nn.Sequential(nn.Linear(6, 3), nn.Flatten())
    with pytest.raises(ValueError, match=r"layer '0' reads \(8, 3, 6, 6\) for 8 rows"):
        take(model, (images, LABELS), head="0")
    with pytest.raises(ValueError, match="model should answer with logits"):
        take(nn.Sequential(nn.Flatten(), nn.Linear(108, 3), nn.Unflatten(1, (3, 1))), (images, LABELS))


def test_float16_that_is_too_narrow(images):
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 3))
    with pytest.raises(ValueError, match=r"row 0 are not finite \(too large for float16\? storage=torch.float32\)"):
        take(model, (images * 1e6, LABELS), storage=torch.float16)
