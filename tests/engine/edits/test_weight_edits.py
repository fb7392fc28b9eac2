"""Weights come back bit for bit after every edit, edits stack in any order, and what does not fit is refused."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.tiny_models import tiny, tiny_inputs
from spurge.engine.base.files import FileError, canonical_json
from spurge.engine.base.tensor_files import read_tensors, write_tensors
from spurge.engine.edits import overwrites
from spurge.engine.edits.neuron_edits import EditMismatch, NeuronEdit
from spurge.engine.edits.overwrites import is_overwritten, lifted, overwrites_on
from spurge.engine.edits.weight_edits import WeightEdit, load_edit
from spurge.engine.models import parameters
from spurge.engine.models.heads import Head
from spurge.engine.models.neurons import NeuronSet

HEAD, BIAS = "classifier.weight", "classifier.bias"


def edit_of(model, seed=0, count=5, names=(HEAD, BIAS), **info):
    """New values of some entries of each named parameter."""
    generator = torch.Generator().manual_seed(seed)
    own = dict(model.named_parameters())
    changes = {}
    for name in names:
        indices = torch.randperm(own[name].numel(), generator=generator)[:count]
        changes[name] = (indices, torch.randn(len(indices), generator=generator) * 3)
    return WeightEdit.build(model, changes, info)


def logits(model, family="bert", seed=0):
    with torch.no_grad():
        return model(**tiny_inputs(family, seed=seed)).logits


def state(model):
    """Everything that must come back: bits, identity of parameters, and the names of all attributes."""
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    names = {name: sorted(vars(module)) for name, module in model.named_modules()}
    return bits, [id(p) for p in model.parameters()], [p.requires_grad for p in model.parameters()], names


def assert_same(model, before):
    now = state(model)
    assert now[1:] == before[1:]
    for name, bits in before[0].items():
        assert torch.equal(now[0][name].view(torch.uint8), bits.view(torch.uint8)), name
    assert not is_overwritten(model)


def expected_after(model, *edits):
    """The model's parameters with edits written by hand."""
    found = {name: value.detach().clone() for name, value in model.named_parameters()}
    for edit in edits:
        for name, (indices, values) in edit.changes.items():
            found[name].view(-1)[indices] = values
    return found


def assert_has(model, expected):
    for name, value in model.named_parameters():
        assert torch.equal(value.detach(), expected[name]), name


# ---- apply and undo


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_exactly_the_chosen_entries_change_and_come_back(dtype):
    model = tiny("bert", dtype=dtype)
    before = state(model)
    edit = edit_of(model)
    assert all(values.dtype == dtype for _, values in edit.changes.values())
    expected = expected_after(model, edit)
    with edit.applied(model) as same:
        assert same is model
        assert is_overwritten(model)
        assert_has(model, expected)
    assert_same(model, before)
    handle = edit.apply(model)
    assert_has(model, expected)
    handle.undo()
    handle.undo()
    assert_same(model, before)
    handle = edit.fold(model)
    assert_has(model, expected)
    assert not is_overwritten(model)
    handle.undo()
    handle.undo()
    assert_same(model, before)


@pytest.mark.parametrize("family", ["gpt2", "llama", "distilbert"])
def test_other_families_and_any_layer(family):
    model = tiny(family)
    before, plain = state(model), logits(model, family)
    head = "classifier.weight" if family == "distilbert" else "score.weight"
    inner = next(name for name, p in model.named_parameters() if (p.dim() == 2 and "layer" in name) or ".h." in name)
    edit = edit_of(model, names=(head, inner))
    with edit.applied(model):
        assert not torch.equal(logits(model, family), plain)
    assert torch.equal(logits(model, family), plain)
    assert_same(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_error_in_the_body_leaves_nothing(error):
    model = tiny("bert")
    before = state(model)
    edit = edit_of(model)

    def body():
        with edit.applied(model):
            logits(model)
            raise error

    with pytest.raises(error):
        body()
    assert_same(model, before)


def test_a_real_interrupt_in_the_middle_of_a_forward_leaves_nothing():
    model = tiny("bert")
    before = state(model)
    edit = edit_of(model)
    handle = model.dropout.register_forward_hook(lambda *_: signal.raise_signal(signal.SIGINT))

    def forward():
        with edit.applied(model):
            logits(model)

    with pytest.raises(KeyboardInterrupt):
        forward()
    handle.remove()
    assert_same(model, before)


@pytest.mark.parametrize("place", [1, 2, 3])
@pytest.mark.parametrize("after", [False, True])
def test_an_interrupt_between_two_writes_leaves_all_or_nothing(monkeypatch, place, after):
    """Before or after the write of each parameter, while they are written and while they are put back."""
    model = tiny("bert")
    names = (HEAD, BIAS, "bert.pooler.dense.weight")
    edit = edit_of(model, names=names)
    before = state(model)
    write, calls = overwrites.write, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == place and not after:
            signal.raise_signal(signal.SIGINT)
        write(*arguments)
        if len(calls) == place and after:
            signal.raise_signal(signal.SIGINT)

    def use_in_block():
        with edit.applied(model):
            raise AssertionError("not reached")

    for use in (lambda: edit.apply(model), lambda: edit.fold(model), use_in_block):
        calls.clear()
        monkeypatch.setattr(overwrites, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            use()
        monkeypatch.undo()
        assert_same(model, before)
    for use in (edit.apply, edit.fold):
        handle = use(model)
        calls.clear()
        monkeypatch.setattr(overwrites, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            handle.undo()
        monkeypatch.undo()
        assert_same(model, before)
        handle.undo()
        assert_same(model, before)


@pytest.mark.parametrize("place", [1, 2, 3])
def test_where_one_parameter_cannot_be_written_the_others_come_back(monkeypatch, place):
    model = tiny("bert")
    before = state(model)
    edit = edit_of(model, names=(HEAD, BIAS, "bert.pooler.dense.weight"))
    write, calls = overwrites.write, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == place:
            raise RuntimeError("CUDA error")
        write(*arguments)

    for use in (edit.apply, edit.fold):
        handle = use(model)
        calls.clear()
        monkeypatch.setattr(overwrites, "write", failing)
        with pytest.raises(RuntimeError, match="CUDA error"):
            handle.undo()
        monkeypatch.undo()
        now = state(model)[0]
        assert sum(not torch.equal(now[name], bits) for name, bits in before[0].items()) == 1
        handle.undo()
        assert_same(model, before)


def test_edits_stack_and_come_off_in_any_order():
    base = tiny("bert")
    before = state(base)
    edits = [edit_of(base, seed, count=40) for seed in range(3)]  # 40 of 64 entries: all meet
    for order in itertools.permutations(range(3)):
        handles = [edit.apply(base) for edit in edits]
        assert_has(base, expected_after_base(before, *edits))
        left = dict(enumerate(edits))
        for index in order:
            handles[index].undo()
            del left[index]
            assert_has(base, expected_after_base(before, *left.values()))
        assert_same(base, before)


def expected_after_base(before, *edits):
    model = tiny("bert")
    model.load_state_dict(before[0])
    return expected_after(model, *edits)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sets(st.integers(0, 11), min_size=1), st.booleans()), min_size=1, max_size=6), st.data())
def test_any_sequence_of_edits_is_the_stack_it_should_be(steps, data):
    """Applies and undos in any order, against a plain list of dictionaries."""
    layer = nn.Linear(4, 3)
    start = layer.weight.detach().clone()
    applied = []
    for number, (indices, undo) in enumerate(steps):
        values = [float(number * 100 + i) for i in sorted(indices)]
        edit = WeightEdit.build(layer, {"weight": (sorted(indices), values)})
        applied.append((edit.apply(layer), edit))
        if undo:
            applied.pop(data.draw(st.integers(0, len(applied) - 1)))[0].undo()
        expected = start.clone()
        for _, on in applied:
            expected.view(-1)[on.changes["weight"][0]] = on.changes["weight"][1]
        assert torch.equal(layer.weight, expected)
        with lifted(layer):
            assert torch.equal(layer.weight, start)
        assert torch.equal(layer.weight, expected)
    for handle, _ in applied:
        handle.undo()
    assert torch.equal(layer.weight, start)
    assert not is_overwritten(layer)


def test_nested_blocks_and_what_is_applied_now():
    model = tiny("bert")
    before = state(model)
    a, b = edit_of(model, 1, 40, who="a"), edit_of(model, 2, 40, who="b")
    with a.applied(model), b.applied(model):
        assert_has(model, expected_after_base(before, a, b))
        changes, infos = overwrites_on(model)
        union = WeightEdit.build(model, changes)
        assert [info["who"] for info in infos] == ["a", "b"]
        with lifted(model):
            assert_same(model, before)
            with union.applied(model):
                assert_has(model, expected_after_base(before, a, b))
            assert_same(model, before)
        assert_has(model, expected_after_base(before, a, b))
        with pytest.raises(KeyboardInterrupt), lifted(model):
            raise KeyboardInterrupt
        assert_has(model, expected_after_base(before, a, b))
    assert_same(model, before)
    both = a.combine(b, rule="last")
    assert len(union) == len(both)
    assert all(torch.equal(union.changes[name][1], both.changes[name][1]) for name in both.changes)


def test_an_edit_undone_while_it_is_lifted_stays_off():
    model = tiny("bert")
    before = state(model)
    edits = [edit_of(model, seed, 40) for seed in range(3)]
    handles = [edit.apply(model) for edit in edits]
    with lifted(model):
        handles[1].undo()
        assert_same(model, before)
    assert_has(model, expected_after_base(before, edits[0], edits[2]))
    with lifted(model):
        handles[0].undo()
        handles[2].undo()
    assert_same(model, before)


def test_versions_are_bumped_and_gradients_flow():
    model = tiny("bert")
    edit = edit_of(model)
    versions = [p._version for p in model.classifier.parameters()]
    with edit.applied(model):
        assert all(p._version > v for p, v in zip(model.classifier.parameters(), versions, strict=True))
        model(**tiny_inputs("bert")).logits.sum().backward()
    assert model.classifier.weight.grad is not None
    loss = model(**tiny_inputs("bert")).logits.sum()
    model.classifier.weight.requires_grad_(False)
    with (
        edit_of(model, names=("bert.pooler.dense.weight",)).applied(model),
        pytest.raises(RuntimeError, match="inplace"),
    ):
        loss.backward()  # autograd sees that a weight it needs is not the one of the forward pass


def test_models_made_or_run_in_inference_mode():
    with torch.inference_mode():
        model = tiny("bert")
    assert model.classifier.weight.is_inference()
    before = state(model)
    edit = edit_of(model)
    with edit.applied(model):
        assert not torch.equal(model.classifier.weight, before[0][HEAD])
    assert_same(model, before)
    normal = tiny("bert")
    before = state(normal)
    with torch.inference_mode(), edit.applied(normal):
        assert not torch.equal(normal.classifier.weight, before[0][HEAD])
    assert_same(normal, before)


def test_mixed_precision_sees_the_edit_at_once():
    layer, x = nn.Linear(4, 3), torch.randn(5, 4)
    edit = WeightEdit.build(layer, {"weight": torch.zeros(3, 4)})
    with torch.autocast("cpu", torch.bfloat16):
        plain = layer(x)
        with edit.applied(layer):
            torch.testing.assert_close(layer(x), layer.bias.bfloat16().expand(5, 3))
        assert torch.equal(layer(x), plain)


def test_interrupts_at_any_moment():
    """Real signals at 200 random moments: the model is as it was, wherever they strike."""
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    before = state(model)
    edit = WeightEdit.build(model, {name: torch.zeros_like(p) for name, p in model.named_parameters()})
    moments = np.random.default_rng(0).uniform(1e-5, 8e-3, 200)
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for moment in moments:
            with contextlib.suppress(KeyboardInterrupt):
                apply_for_ever(model, edit, moment)
            assert_same(model, before)  # the interrupted frames are gone, and with them the blocks they were in
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def apply_for_ever(model, edit, moment):
    signal.setitimer(signal.ITIMER_REAL, moment)
    while True:
        with edit.applied(model), lifted(model):
            pass


def test_changes_inside_the_block_are_noticed():
    model = tiny("bert")
    edit = edit_of(model)

    def train():
        with edit.applied(model), torch.no_grad():
            model.classifier.weight += 1

    with pytest.raises(ValueError, match=r"'classifier.weight' have changed since the edit"):
        train()
    assert not is_overwritten(model)
    model = tiny("bert")
    before = state(model)
    handle = edit.apply(model)
    model.double()
    with pytest.raises(ValueError, match="have changed since the edit"):
        handle.undo()
    for use in (edit.check, edit.apply, overwrites_on, lambda m: lifted(m).__enter__()):
        with pytest.raises(ValueError, match="have changed since the edit"):
            use(model)
    model.float()
    handle.undo()
    assert_same(model, before)


def test_a_device_and_a_copy_in_between(device):
    model = tiny("bert")
    before = state(model)
    edit = edit_of(model)
    handle = edit.apply(model)
    other = copy.deepcopy(model)
    model.to(device)
    expected = expected_after_base(before, edit)
    assert_has(model.cpu(), expected)
    model.to(device)
    handle.undo()
    assert_same(model.cpu(), before)
    assert_has(other, expected)  # a copy is a plain model with these weights
    assert not is_overwritten(other)
    with pytest.raises(EditMismatch, match="with an edit folded in"):
        edit.check(other)
    model.to(device)
    with edit.applied(model):
        assert_has(model.cpu(), expected)
    assert_same(model, before)


def test_nothing_is_kept_of_models_that_are_gone():
    model = nn.Linear(3, 2)
    WeightEdit.build(model, {"weight": ([0], [1.0])}).apply(model)
    count = len(overwrites._STACKS)
    del model
    gc.collect()
    assert len(overwrites._STACKS) < count


def test_compiled_models_see_the_edit():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    compiled, x = torch.compile(model, backend="eager"), torch.randn(5, 4)
    plain = compiled(x)
    edit = WeightEdit.build(compiled, {"2.bias": ([1], [9.0])})
    with edit.applied(compiled):
        assert torch.equal(compiled(x), model(x))
        assert not torch.equal(compiled(x), plain)
        assert is_overwritten(compiled)
        assert list(overwrites_on(compiled)[0]) == ["2.bias"]
    assert torch.equal(compiled(x), plain)


def test_odd_layouts():
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(2.0))
    model.turned = nn.Parameter(torch.arange(12.0).view(4, 3).t())
    edit = WeightEdit.build(model, {"scale": ([0], [5.0]), "turned": ([1, 4], [-1.0, -2.0])})
    before = [p.detach().clone() for p in model.parameters()]
    with edit.applied(model):
        assert model.scale.item() == 5
        assert model.turned[0, 1].item() == -1
        assert model.turned[1, 0].item() == -2
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


# ---- fold


def test_folds_are_undone_in_order_only():
    model = tiny("bert")
    before = state(model)
    edit = edit_of(model, 1)
    first = edit.fold(model)
    with pytest.raises(EditMismatch, match="with an edit folded in"):
        edit.apply(model)
    over = WeightEdit.build(model, {name: torch.ones(size) for name, size in ((HEAD, (2, 32)), (BIAS, 2))})
    second = over.fold(model)
    with pytest.raises(ValueError, match="have changed since the edit"):
        first.undo()
    second.undo()
    first.undo()
    assert_same(model, before)


def test_nothing_is_folded_below_what_is_applied():
    model = tiny("bert")
    before = state(model)
    first = edit_of(model, 1).fold(model)
    applied = edit_of(model, 2).apply(model)
    with pytest.raises(ValueError, match=r"undo: an edit is applied to .* now; take it off first"):
        first.undo()
    with pytest.raises(ValueError, match=r"fold: an edit is applied to .* now; take it off first"):
        edit_of(model, 3).fold(model)
    applied.undo()
    first.undo()
    assert_same(model, before)


def test_folding_is_applying():
    model = tiny("bert")
    edit = edit_of(model)
    with edit.applied(model):
        expected = logits(model)
    edit.fold(model)
    assert torch.equal(logits(model), expected)


# ---- what is refused


def test_tied_and_shared_parameters_are_named():
    model = tiny("bert")
    edit = edit_of(model)
    before = state(model)
    extra = nn.Linear(32, 2)
    extra.weight = model.classifier.weight
    model.extra = extra
    for use in (edit.apply, edit.fold, edit.check, edit_of, lambda m: edit.applied(m, force=True).__enter__()):
        with pytest.raises(ValueError, match=r"'classifier.weight' is shared with 'extra.weight' \(tied\)"):
            use(model)
    model.extra = model.classifier  # one module at two places
    with pytest.raises(ValueError, match=r"is shared with 'extra.bias'"):
        edit.apply(model)
    del model.extra
    model.register_buffer("window", model.classifier.weight.detach()[1:2, 3:5])
    with pytest.raises(ValueError, match="is shared with 'window'"):
        edit.apply(model)
    del model.window
    assert_same(model, before)


def test_tied_embeddings_of_a_language_model():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=16))
    for name, other in (("lm_head.weight", "transformer.wte.weight"), ("transformer.wte.weight", "lm_head.weight")):
        with pytest.raises(ValueError, match=f"{name!r} is shared with {other!r}"):
            WeightEdit.build(model, {name: ([0], [1.0])})


def test_quantised_wrapped_computed_and_meta_weights():
    model = tiny("bert")
    edit = edit_of(model)

    class Wrapped(nn.Parameter):
        pass

    plain = model.classifier.weight
    model.classifier.weight = Wrapped(plain.detach())
    with pytest.raises(ValueError, match="must be a plain float parameter, got Wrapped"):
        edit.apply(model, force=True)
    model.classifier.weight = nn.Parameter(plain.to(torch.int8), requires_grad=False)
    for use in (lambda: edit.apply(model, force=True), lambda: edit_of(model)):
        with pytest.raises(ValueError, match=r"plain float parameter, got Parameter of torch\.int8"):
            use()
    model.classifier.weight = plain
    for use in (edit.check, edit.apply, edit.fold, edit_of):
        with pytest.raises(ValueError, match=r"'classifier.\w+' is on the meta device"):
            use(copy.deepcopy(model).to("meta"))
    handle = edit.apply(model)
    nn.utils.parametrizations.weight_norm(model.classifier)
    with pytest.raises(EditMismatch, match=r"has no parameter 'classifier.weight'"):
        edit.check(model)
    with pytest.raises(ValueError, match=r"'classifier.weight' is no parameter any more"):
        handle.undo()


def test_another_model_is_refused_unless_forced():
    model, other = tiny("bert"), tiny("bert", seed=1)
    edit = edit_of(model)
    edit.check(copy.deepcopy(model))
    before = state(other)
    for use in (edit.check, edit.apply, edit.fold, lambda m: edit.applied(m).__enter__()):
        with pytest.raises(EditMismatch, match=r"'classifier.weight' is not the one the edit was made for"):
            use(other)
    assert_same(other, before)
    with edit.applied(other, force=True):
        assert_has(other, expected_after_base(before, edit))
    edit.fold(other, force=True).undo()
    assert_same(other, before)
    wide = tiny("bert", labels=3)
    for force in (False, True):
        with pytest.raises(EditMismatch, match=r"'classifier.bias' is \[3\], the edit needs \[2\]"):
            edit.apply(wide, force=force)
        with pytest.raises(EditMismatch, match=r"no parameter 'classifier.bias'; similar ones are"):
            edit.apply(tiny("gpt2"), force=force)
    with pytest.raises(EditMismatch, match="made for float32 weights"):
        edit.check(tiny("bert").double())


def test_one_changed_bit_elsewhere_in_the_parameter_is_noticed():
    model = tiny("bert")
    edit = WeightEdit.build(model, {HEAD: ([3], [1.0])})
    model.classifier.bias.data += 1  # another parameter: no matter
    edit.check(model)
    model.classifier.weight.data.view(-1)[17:18].view(torch.int32).bitwise_xor_(1)
    with pytest.raises(EditMismatch, match=r"'classifier.weight' is not the one"):
        edit.check(model)


def test_values_are_rounded_once_and_must_fit_the_type():
    half = tiny("bert", dtype=torch.float16)
    edit = WeightEdit.build(half, {HEAD: ([1, 2], [0.1, 2048.5])})
    assert edit.changes[HEAD][1].tolist() == [float(torch.tensor(0.1).half()), 2048.0]
    with pytest.raises(ValueError, match=r"that float16 can hold, got 70000.0 at 'classifier.weight'\[2\]"):
        WeightEdit.build(half, {HEAD: ([1, 2], [0.1, 70000.0])})
    before = state(half)
    wide = WeightEdit.build(tiny("bert"), {BIAS: ([0], [1.0]), HEAD: ([1], [70000.0])})
    for use in (wide.apply, wide.fold):
        with pytest.raises(ValueError, match=r"that float16 can hold, got 70000.0"):
            use(half, force=True)
    assert_same(half, before)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"classifier.wieght": ([0], [1.0])}, ValueError, "no parameter 'classifier.wieght'; similar ones are ['clas"),
        ({HEAD: ([0, 0], [1.0, 2.0])}, ValueError, "indices that differ and lie below 64"),
        ({HEAD: ([64], [1.0])}, ValueError, "indices that differ and lie below 64"),
        ({HEAD: ([-1], [1.0])}, ValueError, "indices that differ and lie below 64"),
        (
            {HEAD: ([0], [1.0, 2.0])},
            ValueError,
            "needs int64 indices [n] and values [n], got torch.int64 (1,) and (2,)",
        ),
        ({HEAD: ([], [1.0])}, ValueError, "needs int64 indices [n]"),
        ({HEAD: ([0.5], [1.0])}, ValueError, "needs int64 indices [n]"),
        ({HEAD: ([0], [float("nan")])}, ValueError, "got nan at 'classifier.weight'[0]"),
        ({HEAD: ([0], torch.tensor([1]))}, TypeError, "needs floating values, got torch.int64"),
        ({HEAD: torch.zeros(2, 31)}, ValueError, "has shape (2, 32), got (2, 31)"),
        ({HEAD: torch.zeros(2, 32, dtype=torch.int64)}, TypeError, "needs a floating tensor, got torch.int64"),
        ({HEAD: torch.full((2, 32), float("inf"))}, ValueError, "got inf at 'classifier.weight'[0]"),
        ({HEAD: 1.0}, TypeError, "needs a tensor, or flat indices and as many values"),
        ({HEAD: ([0], ["a"])}, TypeError, "needs a tensor, or flat indices and as many values"),
        ([HEAD], TypeError, "changes: expected parameter name to new values, got list"),
    ],
)
def test_build_mistakes(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        WeightEdit.build(_SHARED, changes)


def test_wrong_types_and_constructions():
    with pytest.raises(TypeError, match=re.escape("model: expected a torch.nn.Module, got str")):
        WeightEdit.build("bert", {})
    with pytest.raises(TypeError, match="JSON"):
        WeightEdit.build(_SHARED, {}, {"a": object()})
    with pytest.raises(ValueError, match="expected a fingerprint of each"):
        WeightEdit({}, {"a": {}})
    pair = (torch.tensor([1]), torch.zeros(1))
    for found in ({}, {"shape": [3]}, {"shape": [3], "dtype": "int8", "sha256": ""}, {"shape": 3, "dtype": "float32"}):
        with pytest.raises(ValueError, match=r"expected {'shape', 'dtype', 'sha256'} of 'a'"):
            WeightEdit({"a": pair}, {"a": found})


_SHARED = tiny("bert")


# ---- building, heads, combining


def test_build_keeps_what_differs_bit_for_bit():
    model = tiny("bert")
    new = model.classifier.weight.detach().clone()
    new[1, 3] += 1
    new[0, 2] = -new[0, 2]
    edit = WeightEdit.build(model, {HEAD: new, BIAS: model.classifier.bias.detach().clone()}, {"method": "by hand"})
    assert edit.changes.keys() == {HEAD}
    assert edit.changes[HEAD][0].tolist() == [2, 35]
    assert repr(edit) == "WeightEdit(2 weights of 1 parameters, by hand)"
    assert len(edit) == 2
    assert "spurge" in edit.info
    assert edit.model[HEAD]["shape"] == [2, 32]
    same = WeightEdit.build(model, {HEAD: ([5], [model.classifier.weight[0, 5].item()])})
    assert len(same) == 1  # named entries are kept


def test_edits_are_built_and_checked_through_what_is_applied():
    model = tiny("bert")
    a = edit_of(model, 1)
    with a.applied(model):
        b = edit_of(model, 2)
        whole = WeightEdit.build(model, {HEAD: model.classifier.weight})
        a.check(model)
    b.check(model)
    assert torch.equal(whole.changes[HEAD][1], a.changes[HEAD][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_an_edit_of_a_head_is_that_of_its_model(dtype):
    model = tiny("bert", dtype=dtype)
    head = Head.of(model)
    weight, bias = head.weight.clone(), head.bias.clone()
    weight[1, 7], weight[0, 0], bias[1] = 2.5, -1.0, 0.125
    edit = WeightEdit.for_head(head, weight, bias, {"method": "fcr"})
    assert (len(edit), edit.model) == (3, {name: head.prints[name] for name in (BIAS, HEAD)})
    edit.check(model)
    assert len(WeightEdit.for_head(head)) == 0
    assert len(WeightEdit.for_head(head, bias=bias)) == 1
    derived = WeightEdit.for_head(head.with_(weight=weight, bias=bias))
    later = WeightEdit.for_head(head.with_(bias=bias), weight)  # a head that was edited before
    for each in (edit, derived, later):
        with each.applied(model):
            assert torch.equal(model.classifier.weight.detach().to(weight.dtype), weight)
            assert torch.equal(model.classifier.bias.detach().to(bias.dtype), bias)
    assert len(derived) == weight.numel() + bias.numel()


def test_an_edit_of_a_bare_layer_and_of_one_without_bias():
    layer = nn.Linear(4, 3, bias=False)
    edit = WeightEdit.for_head(Head.of(layer), torch.zeros(3, 4))
    with edit.applied(layer):
        assert not layer.weight.any()
    assert list(edit.changes) == ["weight"]
    with pytest.raises(ValueError, match="bias: the head has none"):
        WeightEdit.for_head(Head.of(layer), bias=torch.zeros(3))
    with pytest.raises(ValueError, match="head: belongs to no model"):
        WeightEdit.for_head(Head(torch.zeros(3, 4)))
    with pytest.raises(TypeError, match="head: expected a Head, got Linear"):
        WeightEdit.for_head(layer)
    with pytest.raises(ValueError, match=re.escape("'weight' has shape (3, 4), got (4, 3)")):
        WeightEdit.for_head(Head.of(layer), torch.zeros(4, 3))


def test_combine_rules():
    model = tiny("bert")
    a = WeightEdit.build(model, {HEAD: ([1, 9], [1.0, 2.0])}, {"method": "a"})
    b = WeightEdit.build(model, {HEAD: ([9, 4], [3.0, 4.0]), BIAS: ([0], [5.0])}, {"method": "b"})
    c = WeightEdit.build(model, {HEAD: ([2], [3.0])})
    last = a.combine(b, rule="last")
    assert last.changes[HEAD][0].tolist() == [1, 4, 9]
    assert last.changes[HEAD][1].tolist() == [1.0, 4.0, 3.0]
    assert [edit["method"] for edit in last.info["edits"]] == ["a", "b"]
    assert len(a.combine(c)) == 3
    with pytest.raises(ValueError, match=r"both edits change 'classifier.weight'\[9\]; rule='last'"):
        a.combine(b)
    with pytest.raises(EditMismatch, match="made for different bits"):
        a.combine(WeightEdit.build(tiny("bert", seed=3), {HEAD: ([2], [3.0])}))
    with pytest.raises(ValueError, match="one of disjoint, last, got 'sum'"):
        a.combine(b, rule="sum")
    with pytest.raises(TypeError, match="got dict"):
        a.combine({})


def test_an_empty_edit_does_nothing(tmp_path):
    model = tiny("bert")
    edit = WeightEdit.build(model, {})
    edit.save(tmp_path / "e")
    plain = logits(model)
    with load_edit(tmp_path / "e").applied(model):
        assert torch.equal(logits(model), plain)
    edit.fold(model).undo()
    assert repr(edit) == "WeightEdit(0 weights of 0 parameters)"


def test_gates_and_weights_go_together():
    model = tiny("bert")
    before = state(model)
    neurons = NeuronEdit.build(model, NeuronSet({"bert.encoder.layer.1.output.dense": [1, 2]}), 0.0)
    weights = edit_of(model)
    with neurons.applied(model), weights.applied(model):
        both = logits(model)
    with weights.applied(model), neurons.applied(model):
        assert torch.equal(logits(model), both)
    assert_same(model, before)


# ---- files


def test_a_saved_edit_applies_in_another_process(tmp_path):
    model = tiny("bert")
    edit = edit_of(model, method="test", seed=3)
    edit.save(tmp_path / "edit.safetensors")
    with edit.applied(model):
        expected = logits(model)
    code = """
import sys, torch
from helpers.tiny_models import tiny, tiny_inputs
import spurge
edit = spurge.load_edit(sys.argv[1])
model = tiny("bert")
with edit.applied(model), torch.no_grad():
    torch.save(model(**tiny_inputs("bert")).logits, sys.argv[2])
assert type(edit) is spurge.WeightEdit and edit.info["method"] == "test"
"""
    tests = str(Path(__file__).parents[2])
    run = [sys.executable, "-c", f"import sys; sys.path.insert(0, {tests!r})\n{code}"]
    subprocess.run([*run, str(tmp_path / "edit.safetensors"), str(tmp_path / "out.pt")], check=True, timeout=120)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_files_round_trip_and_equal_edits_give_equal_bytes(tmp_path, dtype):
    edit = edit_of(tiny("bert", dtype=dtype), method="test")
    edit.save(tmp_path / "a")
    again = WeightEdit.load(tmp_path / "a")
    again.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (again.model, again.info) == (edit.model, edit.info)
    for name, (indices, values) in edit.changes.items():
        assert torch.equal(again.changes[name][0], indices)
        assert torch.equal(again.changes[name][1], values)


def test_either_kind_is_loaded_by_its_kind(tmp_path):
    path = tmp_path / "e"
    NeuronEdit.build(_SHARED, NeuronSet({"bert.encoder.layer.1.output.dense": [1]}), 0.0).save(path)
    assert isinstance(load_edit(path), NeuronEdit)
    with pytest.raises(FileError, match="holds 'edit', expected 'weight-edit'"):
        WeightEdit.load(path)
    edit_of(_SHARED).save(path)
    assert isinstance(load_edit(path), WeightEdit)
    with pytest.raises(FileError, match="holds 'weight-edit', expected 'edit'"):
        NeuronEdit.load(path)
    write_tensors(path, {}, {"kind": "scores", "info": "{}"})
    with pytest.raises(FileError, match="holds 'scores', expected an edit of neurons or weights"):
        load_edit(path)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "e.safetensors"
    edit_of(_SHARED).save(path)
    data = path.read_bytes()
    for load in (WeightEdit.load, load_edit):
        for length in (0, 7, 100, len(data) - 1):
            path.write_bytes(data[:length])
            with pytest.raises(FileError, match=r"truncated|not a safetensors file|is empty"):
                load(path)
        for place in range(8, len(data), 53):
            path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
            with pytest.raises(FileError, match=re.escape(str(path))):
                load(path)
        safetensors.torch.save_file({"weight": torch.ones(3)}, path)
        with pytest.raises(FileError, match="not written by Spurge"):
            load(path)
        path.write_bytes(data.replace(b'"schema":"1"', b'"schema":"9"'))
        with pytest.raises(FileError, match="newer than this Spurge"):
            load(path)
        with pytest.raises(FileNotFoundError):
            load(tmp_path / "missing")


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, meta: tensors.clear(),
        lambda tensors, meta: tensors.update(extra=torch.ones(1)),
        lambda tensors, meta: meta.pop("model"),
        lambda tensors, meta: meta.update(model="[1]"),
        lambda tensors, meta: meta.update(model=canonical_json({HEAD: {}, BIAS: {}})),
        lambda tensors, meta: meta.update(info="{"),
        lambda tensors, meta: tensors.update({k: v.float() for k, v in tensors.items()}),
        lambda tensors, meta: tensors.update({k: v * float("nan") for k, v in tensors.items() if "values" in k}),
        lambda tensors, meta: tensors.update({k: v + 1000 for k, v in tensors.items() if "indices" in k}),
    ],
)
def test_whole_files_with_wrong_content_are_refused(tmp_path, change):
    path = tmp_path / "e"
    edit_of(_SHARED).save(path)
    tensors, metadata = read_tensors(path)
    metadata = {key: text for key, text in metadata.items() if key not in ("schema", "spurge", "sha256")}
    change(tensors, metadata)
    write_tensors(path, tensors, metadata)
    for load in (WeightEdit.load, load_edit):
        with pytest.raises(FileError, match="not an edit of weights"):
            load(path)


def test_the_own_bits_of_a_parameter():
    """Through the layers, without touching the parameter; and the parameter itself where there are none."""
    layer = nn.Linear(4, 3)
    place = parameters.find_places(layer, ["weight"])["weight"]
    assert overwrites.original(place).data_ptr() == layer.weight.data_ptr()
    start = layer.weight.detach().clone()
    with WeightEdit.build(layer, {"weight": ([0, 5], [1.0, 2.0])}).applied(layer):
        assert torch.equal(overwrites.original(place), start)
        assert not torch.equal(layer.weight, start)
