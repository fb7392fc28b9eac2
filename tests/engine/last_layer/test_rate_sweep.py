from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spurge.engine.last_layer.rate_sweep import predicted, sweep

RATES = [0.0, 0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0]  # exact for small whole numbers


def case(samples, outputs, edited, groups, levels=3):
    logits = torch.randint(-levels, levels + 1, (samples, outputs)).float()
    shifts = torch.randint(-levels, levels + 1, (samples, edited)).float()
    rows, labels = torch.randperm(outputs)[:edited], torch.randint(0, outputs, (samples,))
    return logits, shifts, rows, labels, torch.randint(0, groups, (samples,))


def predictions(rate, logits, shifts, rows):
    moved = logits.double().clone()
    moved[:, rows] += rate * shifts.double()
    return moved.argmax(1)


def plateau(found, rate):
    return int((found.rates <= rate).sum()) - 1


@settings(max_examples=120, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 6), st.integers(0, 6), st.integers(1, 30), st.booleans(), st.integers(0, 2**31)
)
def test_any_sweep_is_what_evaluating_every_rate_gives(samples, outputs, edited, groups, by_class, seed):
    torch.manual_seed(seed)
    logits, shifts, rows, labels, group = case(samples, outputs, min(edited, outputs), groups)
    found = sweep(logits, shifts, rows, labels, None if by_class else group, low=0.0, high=2.0)
    group = labels if by_class else group
    averages, accuracies = found.at(RATES)
    for i, rate in enumerate(RATES):
        right = (predictions(rate, logits, shifts, rows) == labels).double()
        assert averages[i].item() == pytest.approx(100 * right.mean().item(), abs=1e-12)
        assert found.average[plateau(found, rate)] == averages[i]
        for g in range(accuracies.shape[1]):
            want = 100 * right[group == g].mean().item()
            assert accuracies[i, g].item() == pytest.approx(want, abs=1e-12, nan_ok=True)


@settings(max_examples=120, deadline=None)
@given(st.integers(1, 60), st.integers(1, 6), st.integers(0, 6), st.integers(1, 70), st.integers(0, 2**31))
def test_any_plateau_holds_the_smallest_group(samples, outputs, edited, groups, seed):
    torch.manual_seed(seed)
    logits, shifts, rows, labels, group = case(samples, outputs, min(edited, outputs), groups)
    found = sweep(logits, shifts, rows, labels, group, low=0.0, high=2.0)
    assert found.rates[0] == 0
    assert (found.rates.diff() > 0).all()
    assert found.rates[-1] <= 2
    averages, accuracies = found.at(found.rates)
    present = accuracies.nan_to_num(nan=1000.0)
    assert torch.equal(averages, found.average)
    assert torch.equal(present.amin(1), found.worst)
    assert torch.equal(present.argmin(1), found.worst_group)
    assert torch.equal(found.gap, found.average - found.worst)
    inner = found.rates[1:].nextafter(torch.tensor(-1.0).double())  # up to its very end nothing changes
    assert torch.equal(found.at(inner)[0], found.average[:-1])


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 5), st.integers(1, 5), st.integers(1, 9),
    st.sampled_from(["worst_group", "gap", "average"]), st.integers(0, 2**31),
)  # fmt: skip
def test_any_best_rate_is_the_best(samples, outputs, edited, groups, criterion, seed):
    torch.manual_seed(seed)
    logits, shifts, rows, labels, group = case(samples, outputs, min(edited, outputs), groups)
    found = sweep(logits, shifts, rows, labels, group, low=0.0, high=2.0)
    rate, value = found.best(criterion)
    curve = {"worst_group": found.worst, "gap": -found.gap, "average": found.average}[criterion]
    assert abs(value) == pytest.approx(curve.max().abs().item(), abs=1e-9)
    at = plateau(found, rate)
    assert curve[at].item() == pytest.approx(curve.max().item(), abs=1e-9)
    assert found.at([rate])[0].item() == found.average[at].item()
    if criterion == "gap":
        same = curve >= curve.max() - 1e-9
        assert found.worst[at] == found.worst[same].max()


def one_weight(crossings, labels=None):
    """Samples of class 0 against class 1, right from their crossing on."""
    logits = torch.tensor([[0.0, c] for c in crossings])
    labels = torch.zeros(len(crossings)).long() if labels is None else torch.tensor(labels)
    return logits, torch.ones(len(crossings), 1), torch.tensor([0]), labels


def test_the_best_rate_lies_in_the_middle_of_the_plateau():
    found = sweep(*one_weight([0.25, 0.5]), low=0.0, high=1.0)
    assert found.rates.tolist() == [0.0, 0.25, 0.5]
    assert found.average.tolist() == [0.0, 50.0, 100.0]
    assert found.best("average") == (0.75, 100.0)  # the last plateau ends with the range


def test_low_itself_where_it_is_as_good():
    found = sweep(*one_weight([-1.0, 2.0]), low=0.0, high=1.0)
    assert found.rates.tolist() == [0.0]
    assert found.best("average") == (0.0, 50.0)


def test_the_first_of_two_plateaus_that_are_equally_good():
    logits, shifts, rows = torch.tensor([[0.0, 0.25], [0.75, 0.0]]), torch.tensor([[1.0], [1.0]]), torch.tensor([0])
    found = sweep(logits, shifts, rows, torch.tensor([0, 0]), low=-1.0, high=1.0)
    assert found.best("average") == (0.625, 100.0)
    twice = sweep(
        torch.tensor([[0.0, 0.25], [0.0, 0.5], [0.0, 0.75]]),
        torch.ones(3, 1), rows, torch.tensor([0, 1, 0]), low=0.0, high=1.0,
    )  # fmt: skip
    assert twice.best("average")[0] == 0.375


def test_a_plateau_of_two_neighbours_gives_its_beginning():
    later = torch.tensor(0.5).double().nextafter(torch.tensor(1.0).double()).item()
    logits = torch.tensor([[0.0, 0.5], [0.0, 0.5]], dtype=torch.float64)
    found = sweep(logits, torch.ones(2, 1).double(), torch.tensor([0]), torch.tensor([0, 1]), low=0.0, high=1.0)
    assert found.rates.tolist() == [0.0, 0.5]  # class 1 loses the tie: its interval ends just before
    logits, rows = torch.tensor([[0.0, 0.5], [0.5, 0.0]], dtype=torch.float64), torch.tensor([0, 1])
    shifts = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    found = sweep(logits, shifts, rows, torch.tensor([0, 0]), low=0.0, high=1.0)
    assert found.rates.tolist() == [0.0, 0.5, later]  # both are right at the tie only
    assert found.best("average") == (0.5, 100.0)


def test_the_gap_prefers_the_better_worst_group():
    """At 0 both groups are at 0 %, from 0.5 on both at 100 %: the gap is 0 either way."""
    found = sweep(*one_weight([0.5, 0.5]), torch.tensor([0, 1]))
    assert found.best("gap") == (0.75, 0.0)
    assert found.worst[-1] == 100


def test_groups_without_samples_count_nowhere():
    found = sweep(*one_weight([0.5, -1.0]), torch.tensor([5, 2]))
    assert found.sizes.tolist() == [0, 0, 1, 0, 0, 1]
    assert found.worst_group.tolist() == [5, 2]
    accuracies = found.at([0.0])[1][0]
    assert accuracies.isnan().tolist() == [True, True, False, True, True, False]


def test_a_sample_with_nan_is_never_right():
    logits, shifts, rows, labels = one_weight([-1.0, -1.0])
    logits[1, 1] = torch.nan
    assert sweep(logits, shifts, rows, labels).average.tolist() == [50.0]


def test_many_groups():
    torch.manual_seed(1)
    logits, labels, group = torch.randn(3000, 4), torch.randint(0, 4, (3000,)), torch.randint(0, 900, (3000,))
    found = sweep(logits, -5 * torch.rand(3000, 1), torch.tensor([1]), labels, group)
    accuracies = found.at(found.rates)[1].nan_to_num(nan=1000.0)
    assert torch.equal(accuracies.amin(1), found.worst)
    assert torch.equal(accuracies.argmin(1), found.worst_group)


def test_prediction_of_every_class():
    logits, shifts, rows, _, _ = case(50, 5, 2, 1)
    intervals = predicted(logits, shifts, rows, low=0.0, high=2.0)
    assert intervals.shape == (5, 50, 2)
    for rate in RATES:
        inside = (intervals[..., 0] <= rate) & (rate <= intervals[..., 1])
        assert (inside.sum(0) == 1).all()
        assert torch.equal(inside.double().argmax(0), predictions(rate, logits, shifts, rows))


def test_on_any_device(device):
    arguments = case(200, 5, 3, 7)
    here = sweep(*arguments)
    there = sweep(*(x.to(device) for x in arguments))
    for name in ("rates", "average", "worst", "worst_group", "sizes"):
        assert getattr(there, name).device == device
        assert torch.equal(getattr(there, name).cpu(), getattr(here, name))
    assert there.best("gap") == here.best("gap")


def test_says_what_it_found():
    text = repr(sweep(*one_weight([0.25, 0.5])))
    assert text == "Sweep(2 samples, 1 groups, 3 plateaus in [0, 1]; worst group 0.0 %, at best 100.0 % at 0.75)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(0, 2), "shifts": torch.zeros(0, 1)}, "logits: expected at least 1 sample, got 0"),
        ({"groups": torch.zeros(3).long()}, r"groups: expected int64 \[4\], got torch.int64 \[3\]"),
        ({"groups": torch.zeros(4)}, r"groups: expected int64 \[4\], got torch.float32 \[4\]"),
        ({"groups": torch.tensor([0, 0, -2, 0])}, "groups: expected values of at least 0, got -2"),
        ({"low": 2.0}, "high: must be at least low"),
        ({"labels": torch.tensor([0, 0, 2, 0])}, r"labels: must lie in \[0, 2\), got 2 at row 2"),
    ],
)
def test_bad_arguments(change, message):
    good = {
        "logits": torch.zeros(4, 2),
        "shifts": torch.zeros(4, 1),
        "rows": torch.tensor([1]),
        "labels": torch.zeros(4).long(),
    }
    with pytest.raises(ValueError, match=message):
        sweep(**(good | change))


def test_bad_questions():
    found = sweep(*one_weight([0.5]))
    with pytest.raises(ValueError, match=r"rates: expected numbers within \[0.0, 1.0\], got 1.5"):
        found.at([0.5, 1.5])
    with pytest.raises(ValueError, match="got nan"):
        found.at([float("nan")])
    with pytest.raises(ValueError, match="got shape"):
        found.at(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="criterion: expected one of worst_group, gap, average, got 'worst'"):
        found.best("worst")
