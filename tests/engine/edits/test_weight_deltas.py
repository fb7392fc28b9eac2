"""Deltas of weights: applied and folded bit for bit, undone exactly, kept in files that damage cannot pass."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tiny_models import tiny, tiny_inputs
from spurge.engine.base.files import FileError, canonical_json
from spurge.engine.base.tensor_files import read_tensors, write_tensors
from spurge.engine.edits.edit_files import EditMismatch
from spurge.engine.edits.weight_deltas import Dense, LowRank, Slices, WeightDeltas
from spurge.engine.edits.weight_edits import load_edit

UP, DOWN = "bert.encoder.layer.0.intermediate.dense.weight", "bert.encoder.layer.0.output.dense.weight"
BIAS, HEAD = "bert.encoder.layer.0.intermediate.dense.bias", "classifier.weight"


def edit_of(model, seed=0, rank=2):
    """One delta of every form."""
    generator = torch.Generator().manual_seed(seed)
    own = dict(model.named_parameters())

    def draw(*shape):
        return torch.randn(*shape, generator=generator) * 0.1

    outputs, inputs = own[UP].shape
    some = torch.randperm(outputs, generator=generator)[:3].sort()[0]
    deltas = {
        UP: LowRank(draw(outputs, rank), draw(rank, inputs)),
        DOWN: Slices(1, some, draw(inputs, 3)),
        BIAS: Slices(0, some, draw(3)),
        HEAD: Dense(draw(*own[HEAD].shape)),
    }
    return WeightDeltas.build(model, deltas, {"method": "test"})


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)), name


def by_hand(model, edit):
    expected = state(model)
    for name, delta in edit.deltas.items():
        old = expected[name]
        added = torch.zeros(old.shape, dtype=torch.float64)
        if isinstance(delta, LowRank):
            added = delta.up.double() @ delta.down.double()
        elif isinstance(delta, Dense):
            added = delta.values.double()
        elif delta.dim == 0:
            added[delta.indices] = delta.values.double()
        else:
            added[:, delta.indices] = delta.values.double()
        expected[name] = (old.double() + added).to(old.dtype)
    return expected


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.integers(1, 4))
def test_applied_and_folded_have_the_same_bits_and_come_back(seed, dtype, rank):
    model = tiny("bert", dtype=dtype)
    before = state(model)
    edit = edit_of(model, seed, rank)
    expected = by_hand(model, edit)
    with edit.applied(model):
        assert_bits(state(model), expected)
    assert_bits(state(model), before)
    handle = edit.apply(model)
    assert_bits(state(model), expected)
    handle.undo()
    assert_bits(state(model), before)
    handle = edit.fold(model)
    assert_bits(state(model), expected)
    with pytest.raises(EditMismatch, match="not the one"):
        edit.check(model)
    handle.undo()
    assert_bits(state(model), before)


def test_forced_onto_other_weights_it_adds_to_these():
    model, other = tiny("bert"), tiny("bert", seed=1)
    edit = edit_of(model)
    with pytest.raises(EditMismatch, match="not the one"):
        edit.apply(other)
    expected = by_hand(other, edit)
    with edit.applied(other, force=True):
        assert_bits(state(other), expected)


def test_scaled_edits_add_the_share():
    model = tiny("bert")
    edit = edit_of(model)
    half = edit.scaled(0.5, {"alpha": 0.5})
    assert half.info["alpha"] == 0.5
    for name, delta in edit.deltas.items():
        shape = edit.model[name]["shape"]
        torch.testing.assert_close(half.deltas[name].full(shape), delta.full(shape) / 2)


def test_a_file_gives_the_same_edit_and_the_same_bytes(tmp_path):
    model = tiny("bert")
    edit = edit_of(model)
    edit.save(tmp_path / "a")
    again = load_edit(tmp_path / "a")
    assert isinstance(again, WeightDeltas)
    assert again.info == edit.info
    again.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert len(again) == len(edit)
    assert repr(again) == repr(edit)
    with edit.applied(model):
        expected = model(**tiny_inputs("bert")).logits
    with again.applied(model):
        assert torch.equal(model(**tiny_inputs("bert")).logits, expected)


def test_damaged_files_are_refused(tmp_path):
    edit_of(tiny("bert")).save(tmp_path / "edit")
    data = (tmp_path / "edit").read_bytes()
    for place in (len(data) // 2, len(data) - 1):
        damaged = io.BytesIO(data)
        damaged.seek(place)
        damaged.write(bytes([data[place] ^ 1]))
        (tmp_path / "damaged").write_bytes(damaged.getvalue())
        with pytest.raises(FileError):
            load_edit(tmp_path / "damaged")
    (tmp_path / "cut").write_bytes(data[:-8])
    with pytest.raises(FileError):
        load_edit(tmp_path / "cut")


@pytest.mark.parametrize("what", ["missing", "more", "form", "shape", "not finite"])
def test_files_with_wrong_content_are_refused(tmp_path, what):
    edit_of(tiny("bert")).save(tmp_path / "edit")
    tensors, texts = read_tensors(tmp_path / "edit")
    tensors, texts = dict(tensors), {k: v for k, v in texts.items() if k not in ("schema", "spurge", "sha256")}
    if what == "missing":
        del tensors[f"{UP}:up"]
    elif what == "more":
        tensors["other"] = torch.zeros(1)
    elif what == "form":
        texts["forms"] = canonical_json({UP: "Sparse"})
    elif what == "shape":
        tensors[f"{HEAD}:values"] = tensors[f"{HEAD}:values"][:, :-1].clone()
    else:
        tensors[f"{HEAD}:values"][0, 0] = float("nan")
    write_tensors(tmp_path / "wrong", tensors, texts)
    with pytest.raises(FileError):
        WeightDeltas.load(tmp_path / "wrong")


@pytest.mark.parametrize(
    "delta, message",
    [
        (Dense(torch.zeros(2, 3)), "needs the shape"),
        (LowRank(torch.zeros(2, 0), torch.zeros(0, 2)), "a rank"),
        (Slices(2, torch.tensor([0]), torch.zeros(1)), "dimension 2"),
        (Slices(0, torch.tensor([1, 1]), torch.zeros(2)), "ascending"),
        (Slices(0, torch.tensor([0, 99]), torch.zeros(2)), "below"),
        (Slices(0, torch.tensor([0.0]), torch.zeros(1)), "int64"),
    ],
)
def test_deltas_that_do_not_fit_are_refused(delta, message):
    with pytest.raises(ValueError, match=message):
        WeightDeltas.build(tiny("bert"), {HEAD: delta})


def test_things_that_are_no_deltas_are_refused():
    with pytest.raises(TypeError, match="LowRank or Slices"):
        WeightDeltas.build(tiny("bert"), {HEAD: torch.zeros(2)})
    with pytest.raises(TypeError, match="floating"):
        WeightDeltas.build(tiny("bert"), {HEAD: Dense(torch.zeros(2, 2, dtype=torch.long))})
