"""A model comes back bit for bit after every edit, folding equals gating, and what does not fit is refused."""

from __future__ import annotations

import copy
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.tiny_models import FAMILIES, WIDTH, tiny, tiny_inputs
from spurge.engine.base.files import FileError, canonical_json
from spurge.engine.base.tensor_files import read_tensors, write_tensors
from spurge.engine.cascade.scores import NeuronSet
from spurge.engine.edits.gates import is_gated
from spurge.engine.edits.neuron_edits import EditMismatch, NeuronEdit
from spurge.engine.models.hooks import hook
from spurge.engine.models.sites import find_sites

KINDS = ("bert", "gpt2", "llama")  # post-norm; Conv1D; gated and pre-norm


def neurons_of(model, per_site=5, seed=0):
    widths = {site.name: site.width for site in find_sites(model)}
    return NeuronSet({site: range(per_site) for site in widths}).random_like(widths, seed)


def edit_of(model, seed=0, gates=None, **info):
    neurons = neurons_of(model, seed=seed)
    values = torch.rand(len(neurons), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return NeuronEdit.build(model, neurons, values if gates is None else gates, info)


def logits(model, family, seed=0):
    with torch.no_grad():
        return model(**tiny_inputs(family, seed=seed)).logits


def hooks(model):
    return sum(
        len(table)
        for module in model.modules()
        for name, table in vars(module).items()
        if "hooks" in name and table is not None
    )


def state(model):
    """Everything that must come back: bits, identity of parameters, hooks, and the names of all attributes."""
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    names = {name: sorted(vars(module)) for name, module in model.named_modules()}
    return bits, [id(p) for p in model.parameters()], hooks(model), names, model.training


def assert_same(model, before):
    now = state(model)
    assert now[1:] == before[1:]
    for name, bits in before[0].items():
        assert torch.equal(now[0][name].view(torch.uint8), bits.view(torch.uint8)), name


# ---- apply and undo


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_gated_folded_and_restored(family):
    model = tiny(family)
    before, plain = state(model), logits(model, family)
    edit = edit_of(model)
    with edit.applied(model) as same:
        assert same is model
        gated = logits(model, family)
        assert is_gated(model)
    assert_same(model, before)
    assert hooks(model) == 0
    assert not is_gated(model)
    assert not torch.allclose(gated, plain, atol=1e-3)  # the edit does something
    assert torch.equal(logits(model, family), plain)
    handle = edit.fold(model)
    torch.testing.assert_close(logits(model, family), gated, rtol=1e-4, atol=1e-5)
    assert hooks(model) == 0
    handle.undo()
    assert_same(model, before)
    assert torch.equal(logits(model, family), plain)


@pytest.mark.parametrize("family", KINDS)
def test_a_gate_multiplies_exactly_its_neuron(family):
    """Against the definition: the input of the down projection, by hand, at every position."""
    model = tiny(family)
    site = find_sites(model)[1]
    edit = NeuronEdit.build(model, NeuronSet({site.name: [3, 40]}), [0.5, 0.0])
    inputs = {}

    def record(name):
        return site.down.register_forward_hook(lambda _, args, out: inputs.update({name: (args[0], out)}))

    handle = record("plain")
    logits(model, family)
    handle.remove()
    with edit.applied(model):
        handle = record("gated")
        logits(model, family)
        handle.remove()
    z, (seen, out) = inputs["plain"][0].clone(), inputs["gated"]
    z[..., 3] *= 0.5
    z[..., 40] *= 0.0
    assert torch.equal(seen, z)
    expected = z @ site.weight().t() + (0 if site.bias() is None else site.bias())
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_error_in_the_body_leaves_nothing(error):
    model = tiny("bert")
    before = state(model)
    edit = edit_of(model)

    def body():
        with edit.applied(model):
            logits(model, "bert")
            raise error

    with pytest.raises(error):
        body()
    assert_same(model, before)


def test_a_real_interrupt_in_the_middle_of_a_forward_leaves_nothing():
    model = tiny("bert")
    before = state(model)
    edit = edit_of(model)

    def forward():
        with edit.applied(model), hook(model.bert.encoder.layer[1], lambda *_: signal.raise_signal(signal.SIGINT)):
            logits(model, "bert")

    with pytest.raises(KeyboardInterrupt):
        forward()
    assert_same(model, before)


def test_an_error_inside_the_forward_leaves_nothing():
    model = tiny("bert")
    before = state(model)
    with pytest.raises(IndexError), edit_of(model).applied(model):
        model(input_ids=torch.full((1, 3), 10**6))
    assert_same(model, before)


def test_edits_nest_and_stack_and_come_off_in_any_order():
    model = tiny("bert")
    before, plain = state(model), logits(model, "bert")
    a, b = edit_of(model, 1), edit_of(model, 2)
    with a.combine(b).applied(model):
        both = logits(model, "bert")
    with a.applied(model):
        only_a = logits(model, "bert")
        with b.applied(model):
            torch.testing.assert_close(logits(model, "bert"), both)
        assert torch.equal(logits(model, "bert"), only_a)
    with a.applied(model), a.applied(model):
        twice = logits(model, "bert")
    with a.with_gates(a.vector() ** 2).applied(model):
        torch.testing.assert_close(logits(model, "bert"), twice)
    assert_same(model, before)
    first, second = a.apply(model), b.apply(model)
    first.undo()
    with b.applied(tiny("bert")) as other:
        only_b = logits(other, "bert")
    assert torch.equal(logits(model, "bert"), only_b)
    second.undo()
    second.undo()
    assert_same(model, before)
    assert torch.equal(logits(model, "bert"), plain)


def test_a_failing_attachment_leaves_nothing(monkeypatch):
    model = tiny("bert")
    before = state(model)
    edit = edit_of(model)
    last = find_sites(model)[-1].down

    def refuse(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(last, "register_forward_pre_hook", refuse)
    for use in (lambda: edit.apply(model), lambda: edit.applied(model).__enter__()):
        with pytest.raises(KeyboardInterrupt):
            use()
        assert hooks(model) == 0
    monkeypatch.undo()
    assert_same(model, before)


def test_gradients_flow_through_a_gate():
    model = tiny("llama")
    site = find_sites(model)[0]
    edit = NeuronEdit.build(model, NeuronSet({site.name: [7]}), 0.0)
    with edit.applied(model):
        model(**tiny_inputs("llama")).logits.sum().backward()
    column = site.weight().grad if site.weight().is_leaf else site.down.weight.grad
    assert column[:, 7].abs().max() == 0  # an erased neuron feeds its column nothing
    assert column[:, 6].abs().max() > 0


def test_an_edit_made_on_the_cpu_fits_the_model_on_any_device(device):
    model = tiny("llama")
    edit = edit_of(model)
    with edit.applied(model):
        expected = logits(model, "llama")
    model.to(device)
    before = state(model)
    inputs = {name: value.to(device) for name, value in tiny_inputs("llama").items()}
    with edit.applied(model), torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits.cpu(), expected, rtol=1e-3, atol=1e-3)
    handle = edit.fold(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits.cpu(), expected, rtol=1e-3, atol=1e-3)
    handle.undo()
    assert_same(model, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_dtypes(family, dtype):
    model = tiny(family, dtype=dtype)
    before = state(model)
    edit = edit_of(model)
    with edit.applied(model):
        gated = logits(model, family)
    assert gated.dtype == dtype
    handle = edit.fold(model)
    # a half-precision gate is rounded once, with the activation or with the weight: three roundings of size eps
    bound = 1e-10 if dtype == torch.float64 else 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(logits(model, family), gated, rtol=bound, atol=bound)
    handle.undo()
    assert_same(model, before)


def test_compiled_models_see_the_gates_and_lose_them():
    """torch.compile does not look for new hooks: without care the gates are ignored, or never leave."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Sequential(nn.Linear(6, 3)))
    x = torch.randn(5, 4)
    compiled = torch.compile(model, backend="eager")
    edit = NeuronEdit.build(compiled, NeuronSet({"2.0": [0, 3]}), 0.0)
    plain = compiled(x)
    with edit.applied(model):
        gated = model(x)
        assert torch.equal(compiled(x), gated)
        with edit.applied(compiled):
            assert torch.equal(compiled(x), gated)
        assert torch.equal(compiled(x), gated)
        fresh = torch.compile(model, backend="eager")
        assert torch.equal(fresh(x), gated)
    assert not torch.equal(gated, plain)
    assert torch.equal(fresh(x), plain)
    assert torch.equal(compiled(x), plain)
    edit.fold(compiled)
    torch.testing.assert_close(compiled(x), gated)


# ---- fold


def test_fold_is_all_or_nothing(monkeypatch):
    model = tiny("bert")
    before = state(model)
    edit = edit_of(model)
    sites = find_sites(model)
    tied = nn.Linear(WIDTH, sites[-1].hidden)
    tied.weight = sites[-1].down.weight
    model.extra = tied
    with pytest.raises(ValueError, match=r"'bert.encoder.layer.2.output.dense' is shared with 'extra.weight'"):
        edit.fold(model)
    del model.extra
    assert_same(model, before)
    writes = []
    write = torch.Tensor.__setitem__

    def fail_once(tensor, key, value):
        write(tensor, key, value)
        writes.append(key)
        if len(writes) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.Tensor, "__setitem__", fail_once)
    with pytest.raises(KeyboardInterrupt):
        edit.fold(model)
    monkeypatch.undo()
    assert len(writes) == 5  # two written, all three put back
    assert_same(model, before)


def test_fold_refuses_overlapping_storage_and_odd_weights():
    model = tiny("llama")
    site = find_sites(model)[0]
    edit = NeuronEdit.build(model, NeuronSet({site.name: [1]}), 0.0)
    model.register_buffer("window", site.down.weight.detach()[1:2, 3:5])
    with pytest.raises(ValueError, match="shared with 'window'"):
        edit.fold(model)
    model.register_buffer("window", None)
    flat = torch.cat([site.down.weight.detach().flatten(), torch.zeros(8)])  # one storage, no overlap: allowed
    site.down.weight = nn.Parameter(flat[:-8].view_as(site.down.weight))
    model.register_buffer("window", flat[-8:])
    edit.fold(model).undo()

    class Quantised(nn.Parameter):
        pass

    plain = site.down.weight
    site.down.weight = Quantised(plain.detach())
    with pytest.raises(ValueError, match="must be a plain float parameter, got Quantised"):
        edit.fold(model, force=True)
    with edit.applied(model, force=True):
        logits(model, "llama")
    site.down.weight = nn.Parameter(plain.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"plain float parameter, got Parameter of torch\.int8"):
        edit.fold(model, force=True)
    site.down.weight = plain
    nn.utils.parametrizations.weight_norm(site.down)
    with pytest.raises(ValueError, match="got computed"):
        edit.fold(model, force=True)


def test_meta_weights_are_refused():
    model = tiny("bert")
    edit = edit_of(model)
    meta = copy.deepcopy(model).to("meta")
    for use in (edit.check, edit.fold, edit.apply, edit_of):
        with pytest.raises(EditMismatch, match="on the meta device"):
            use(meta)
    with pytest.raises(ValueError, match="on the meta device"):
        edit.fold(meta, force=True)


def test_a_fold_under_attached_gates_is_refused():
    model = tiny("bert")
    edit = edit_of(model)
    with edit.applied(model), pytest.raises(ValueError, match=r"gates are attached to .* take them off first"):
        edit.fold(model)
    edit.fold(model).undo()


def test_mixed_precision_sees_a_fold_at_once():
    model = tiny("bert")
    edit = edit_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        plain = logits(model, "bert")
        with edit.applied(model):
            gated = logits(model, "bert")
        handle = edit.fold(model)
        torch.testing.assert_close(logits(model, "bert"), gated, rtol=0.1, atol=0.1)
        handle.undo()
        assert torch.equal(logits(model, "bert"), plain)
        assert not torch.allclose(gated, plain, rtol=0.1, atol=0.1)


def test_folds_are_undone_in_order_only():
    model = tiny("gpt2")
    before = state(model)
    edit = edit_of(model)
    first = edit.fold(model)
    with pytest.raises(EditMismatch, match="with an edit folded in"):
        edit.fold(model)
    second = edit.fold(model, force=True)
    with pytest.raises(ValueError, match="have changed since the fold"):
        first.undo()
    second.undo()
    first.undo()
    first.undo()
    assert_same(model, before)
    handle = edit.fold(model)
    model.double()
    with pytest.raises(ValueError, match="have changed since"):
        handle.undo()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(-3, 3, width=32), min_size=4, max_size=4), st.sets(st.integers(0, 47), min_size=4, max_size=4)
)
def test_folding_is_gating_for_any_gates(gates, indices):
    model = _SHARED
    edit = NeuronEdit.build(model, NeuronSet({"bert.encoder.layer.1.output.dense": indices}), gates)
    before = state(model)
    with edit.applied(model):
        gated = logits(model, "bert")
    handle = edit.fold(model)
    torch.testing.assert_close(logits(model, "bert"), gated, rtol=1e-4, atol=1e-4)
    handle.undo()
    assert_same(model, before)


_SHARED = tiny("bert")


# ---- fingerprints


def test_another_model_is_refused_unless_forced():
    model, other = tiny("bert"), tiny("bert", seed=1)
    edit = edit_of(model)
    edit.check(model)
    edit.check(copy.deepcopy(model))
    before = state(other)
    for use in (edit.check, edit.apply, edit.fold, lambda m: edit.applied(m).__enter__()):
        with pytest.raises(EditMismatch, match="is not the one the edit was made for"):
            use(other)
    assert_same(other, before)
    with edit.applied(other, force=True):
        assert is_gated(other)
    edit.fold(other, force=True).undo()
    assert_same(other, before)


def test_one_changed_bit_of_a_touched_weight_is_noticed():
    model = tiny("gpt2")
    edit = edit_of(model)
    weight = find_sites(model)[2].down.weight
    weight.data.view(-1)[17:18].view(torch.int32).bitwise_xor_(1)
    with pytest.raises(EditMismatch, match=r"transformer.h.2.mlp.c_proj"):
        edit.check(model)


def test_shapes_must_fit_even_by_force():
    edit = edit_of(tiny("bert"))
    wide, short = tiny("bert", intermediate_size=WIDTH + 1), tiny("bert", layers=2)
    for other, message in ((wide, r"is \[32, 49\], the edit needs \[32, 48\]"), (short, "no module")):
        before = state(other)
        for use in (edit.apply, edit.fold, lambda m, force: edit.applied(m, force=force).__enter__()):
            with pytest.raises(EditMismatch, match=message):
                use(other, force=True)
        assert_same(other, before)
    with pytest.raises(EditMismatch, match="made for float32 weights"):
        edit.check(tiny("bert").double())
    with edit.applied(tiny("bert").double(), force=True) as double:
        logits(double, "bert")


def test_an_empty_edit_does_nothing(tmp_path):
    model = tiny("bert")
    edit = NeuronEdit.build(model, NeuronSet(), 0.0)
    edit.save(tmp_path / "e")
    plain = logits(model, "bert")
    with NeuronEdit.load(tmp_path / "e").applied(model):
        assert torch.equal(logits(model, "bert"), plain)
    edit.fold(model).undo()
    assert repr(edit) == "NeuronEdit(0 neurons of 0 sites, 0 erased)"


# ---- building and combining


def test_build_deals_gates_in_the_order_of_the_set():
    model = tiny("bert")
    neurons = NeuronSet({"bert.encoder.layer.2.output.dense": [9], "bert.encoder.layer.0.output.dense": [4, 2]})
    edit = NeuronEdit.build(model, neurons, torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), {"method": "macu"})
    gates = {ref: float(edit.full()[ref.site][ref.index]) for ref in neurons}
    assert list(gates.values()) == [0.5, -1.0, 2.0] == edit.vector().tolist()
    assert edit.neurons == neurons
    assert len(edit) == 3
    assert edit.info["method"] == "macu"
    assert "spurge" in edit.info
    zero = edit.with_gates(0.0)
    assert zero.neurons == neurons
    assert repr(zero) == "NeuronEdit(3 neurons of 2 sites, 3 erased, macu)"
    assert edit.model["bert.encoder.layer.2.output.dense"]["shape"] == [32, 48]


def test_combine_rules():
    model = tiny("bert")
    site, other = "bert.encoder.layer.0.output.dense", "bert.encoder.layer.1.output.dense"
    a = NeuronEdit.build(model, NeuronSet({site: [1, 2]}), [0.5, 3.0], {"method": "a"})
    b = NeuronEdit.build(model, NeuronSet({site: [2, 5], other: [0]}), [0.5, -1.0, 0.0], {"method": "b"})
    product, last = a.combine(b), a.combine(b, rule="last")
    assert product.vector().tolist() == [0.5, 1.5, -1.0, 0.0]
    assert last.vector().tolist() == [0.5, 0.5, -1.0, 0.0]
    assert product.neurons == last.neurons == a.neurons | b.neurons
    assert [edit["method"] for edit in product.info["edits"]] == ["a", "b"]
    c = NeuronEdit.build(tiny("bert", seed=3), NeuronSet({site: [1]}), 0.0)
    with pytest.raises(EditMismatch, match="made for different weights"):
        a.combine(c)
    with pytest.raises(ValueError, match="one of multiply, last, got 'sum'"):
        a.combine(b, rule="sum")
    with pytest.raises(TypeError, match="got dict"):
        a.combine({})


@pytest.mark.parametrize(
    ("neurons", "gates", "error", "message"),
    [
        ({"bert.encoder.layer.0.output.dense": [48]}, 0.0, ValueError, "has 48 neurons, got index 48"),
        ({"bert.encoder.layer.9.output.dense": [0]}, 0.0, ValueError, "no module 'bert.encoder.layer.9.output.dense'"),
        ({"bert.encoder.layer.0": [0]}, 0.0, ValueError, "must be a linear projection"),
        ({"bert.encoder.layer.0.output.dense": [0]}, float("nan"), ValueError, "gates: must be finite, got nan"),
        ({"bert.encoder.layer.0.output.dense": [0]}, float("inf"), ValueError, "gates: must be finite"),
        ({"bert.encoder.layer.0.output.dense": [0]}, 1e300, ValueError, "gates: must be finite"),
        ({"bert.encoder.layer.0.output.dense": [0, 1]}, [0.0], ValueError, r"each of 2 neurons, got \(1,\)"),
        ({"bert.encoder.layer.0.output.dense": [0]}, torch.zeros(1, 1), ValueError, r"got \(1, 1\)"),
        ({"bert.encoder.layer.0.output.dense": [0]}, "zero", TypeError, "gates: expected a number"),
        ({"bert.encoder.layer.0.output.dense": [0]}, None, TypeError, "gates: expected a number"),
    ],
)
def test_build_mistakes(neurons, gates, error, message):
    with pytest.raises(error, match=re.escape(message) if "(" not in message else message):
        NeuronEdit.build(_SHARED, NeuronSet(neurons), gates)


def test_wrong_types():
    with pytest.raises(TypeError, match="neurons: expected a NeuronSet, got dict"):
        NeuronEdit.build(_SHARED, {}, 0.0)
    with pytest.raises(TypeError, match=re.escape("model: expected a torch.nn.Module, got str")):
        NeuronEdit.build("bert", NeuronSet(), 0.0)
    with pytest.raises(TypeError, match="JSON"):
        NeuronEdit.build(_SHARED, NeuronSet(), 0.0, {"a": object()})
    with pytest.raises(ValueError, match="expected a fingerprint of each"):
        NeuronEdit({}, {"a": {}})
    index, model = torch.tensor([1, 1]), {"a": {"shape": [3, 4], "dtype": "float32", "sha256": ""}}
    with pytest.raises(ValueError, match="indices that differ and lie below 4"):
        NeuronEdit({"a": (index, torch.zeros(2))}, model)
    with pytest.raises(ValueError, match="needs int64 indices"):
        NeuronEdit({"a": (index, torch.zeros(3))}, model)


# ---- files


def test_a_saved_edit_applies_in_another_process(tmp_path):
    model = tiny("gpt2")
    edit = NeuronEdit.build(model, neurons_of(model), 0.25, {"settings": {"nodes": 2}, "data": "abc", "seed": 3})
    edit.save(tmp_path / "edit.safetensors")
    with edit.applied(model):
        expected = logits(model, "gpt2")
    code = """
import sys, torch
from helpers.tiny_models import tiny, tiny_inputs
from spurge.engine.edits.neuron_edits import NeuronEdit
edit = NeuronEdit.load(sys.argv[1])
model = tiny("gpt2")
with edit.applied(model), torch.no_grad():
    torch.save(model(**tiny_inputs("gpt2")).logits, sys.argv[2])
assert edit.info["settings"] == {"nodes": 2} and edit.info["seed"] == 3
"""
    tests = str(Path(__file__).parents[2])
    run = [sys.executable, "-c", f"import sys; sys.path.insert(0, {tests!r})\n{code}"]
    subprocess.run([*run, str(tmp_path / "edit.safetensors"), str(tmp_path / "out.pt")], check=True, timeout=120)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected, rtol=1e-6, atol=1e-6)


def test_files_round_trip_and_equal_edits_give_equal_bytes(tmp_path):
    edit = edit_of(_SHARED, method="test")
    edit.save(tmp_path / "a")
    again = NeuronEdit.load(tmp_path / "a")
    again.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert again.neurons == edit.neurons
    assert torch.equal(again.vector(), edit.vector())
    assert (again.model, again.info) == (edit.model, edit.info)
    again.check(_SHARED)


def test_damaged_foreign_and_newer_files_are_refused(tmp_path):
    path = tmp_path / "e.safetensors"
    edit_of(_SHARED).save(path)
    data = path.read_bytes()
    for length in (0, 7, 100, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(FileError, match=r"truncated|not a safetensors file|is empty"):
            NeuronEdit.load(path)
    for place in range(8, len(data), 97):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(FileError, match=re.escape(str(path))):
            NeuronEdit.load(path)
    safetensors.torch.save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(FileError, match="not written by Spurge"):
        NeuronEdit.load(path)
    path.write_bytes(data.replace(b'"schema":"1"', b'"schema":"9"'))
    with pytest.raises(FileError, match="newer than this Spurge"):
        NeuronEdit.load(path)
    write_tensors(path, {}, {"kind": "scores", "info": "{}"})
    with pytest.raises(FileError, match="holds 'scores', expected 'edit'"):
        NeuronEdit.load(path)
    with pytest.raises(FileNotFoundError):
        NeuronEdit.load(tmp_path / "missing")


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, meta: tensors.clear(),
        lambda tensors, meta: tensors.update(extra=torch.ones(1)),
        lambda tensors, meta: meta.pop("model"),
        lambda tensors, meta: meta.update(model="[1]"),
        lambda tensors, meta: meta.update(model=canonical_json({site: {} for site in _SHARED_SITES})),
        lambda tensors, meta: meta.update(info="{"),
        lambda tensors, meta: tensors.update({k: v.float() for k, v in tensors.items()}),
        lambda tensors, meta: tensors.update({k: v * float("nan") for k, v in tensors.items() if "gates" in k}),
    ],
)
def test_whole_files_with_wrong_content_are_refused(tmp_path, change):
    path = tmp_path / "e"
    edit_of(_SHARED).save(path)
    tensors, metadata = read_tensors(path)
    metadata = {key: text for key, text in metadata.items() if key not in ("schema", "spurge", "sha256")}
    change(tensors, metadata)
    write_tensors(path, tensors, metadata)
    with pytest.raises(FileError, match="not an edit of neurons"):
        NeuronEdit.load(path)


_SHARED_SITES = [site.name for site in find_sites(_SHARED)]
