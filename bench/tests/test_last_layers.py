"""Rivals that retrain a last layer: their weights and choices by hand, and what they do for a planted shortcut."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from experiments import backbones, controls
from experiments.rivals import last_layers
from experiments.tables import Table
from spurge.engine.features.features import Features
from spurge.engine.models.heads import Head


def part(n: int, share: float, seed: int) -> Features:
    """Two classes by one column; a louder one goes with the class in a share of the rows."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(2, (n,), generator=generator)
    spurious = torch.where(torch.rand(n, generator=generator) < share, label, 1 - label)
    values = torch.rand(n, 6, generator=generator)
    values[:, 0] += 0.8 * label
    values[:, 1] += 2.0 * spurious
    head = Head.of(nn.Linear(6, 2))
    return Features(values, label, head, groups=2 * label + spurious, group_names=("a", "b", "c", "d"))


@pytest.fixture(scope="module")
def parts() -> tuple[Features, ...]:
    train, validation, test = part(800, 0.95, 0), part(400, 0.5, 1), part(400, 0.5, 2)
    erm = backbones.erm(train, 0, quick=True)
    return tuple(rows.with_head(erm) for rows in (train, validation, test))


def test_weights_of_afr_follow_its_formula(parts: tuple[Features, ...]):
    rows = parts[0].subset(torch.arange(20))
    own = torch.softmax(rows.logits().double(), 1)[torch.arange(20), rows.labels]
    expected = torch.tensor(
        [torch.exp(-4 * p) / int((rows.labels == y).sum()) for p, y in zip(own, rows.labels, strict=True)]
    ).double()
    torch.testing.assert_close(last_layers.afr_weights(rows, 4.0), expected / expected.sum())


def test_a_pull_keeps_the_head_where_it_is(parts: tuple[Features, ...]):
    rows = parts[0]
    weights = last_layers.afr_weights(rows, 4.0)
    moved = [float((last_layers.descend(rows, weights, pull).weight - rows.head.weight).norm()) for pull in (0.0, 5.0)]
    assert moved[1] < 0.5 * moved[0]


def test_first_of_each_class_are_those_of_largest_order():
    order, labels = torch.tensor([1.0, 5.0, 3.0, 2.0, 9.0]), torch.tensor([0, 0, 0, 1, 1])
    assert sorted(last_layers._first(order, labels, 2).tolist()) == [1, 2, 3, 4]
    assert sorted(last_layers._first(order, labels, 1).tolist()) == [1, 4]


def test_no_parting_in_two_environments_has_steeper_risks(parts: tuple[Features, ...]):
    rows = parts[1].subset(torch.arange(12))
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    losses = F.cross_entropy(scale * rows.logits().double(), rows.labels, reduction="none")
    slopes = torch.stack([torch.autograd.grad(loss, scale, retain_graph=True)[0] for loss in losses])

    def steepness(chosen: torch.Tensor) -> float:
        return float(slopes[chosen].sum().square() + slopes[~chosen].sum().square())

    partings = torch.cartesian_prod(*[torch.tensor([False, True])] * 12)
    assert steepness(last_layers.environments(rows) == 1) == pytest.approx(max(map(steepness, partings)))


def test_rivals_beside_erm(parts: tuple[Features, ...], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(last_layers, "L2", (1e-3, 1e-1))
    monkeypatch.setattr(last_layers, "GAMMAS", (4.0, 12.0))
    monkeypatch.setattr(last_layers, "PULLS", (0.0,))
    table = Table("made")
    last_layers.add_rivals(table, *parts, seed=0)
    assert list(table.lines) == list(last_layers.RIVALS)
    assert {line.labels for line in table.lines.values()} == {"class"}
    before = backbones.robustness(parts[2])["worst_group_accuracy"]
    for name in ("AFR", "JTT on features", "retrained on half of validation"):
        assert table.mean(name, "worst_group_accuracy") > before + 5, name


def test_a_moved_threshold_is_the_bias_that_the_worst_group_likes_best():
    values = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    head = Head.of(nn.Linear(1, 2)).with_(weight=torch.tensor([[0.0], [1.0]]), bias=torch.tensor([0.0, -0.5]))
    labels = torch.tensor([0, 0, 1, 1])
    rows = Features(values, labels, head, groups=labels, group_names=("a", "b"))
    assert backbones.robustness(rows)["worst_group_accuracy"] == 50
    moved = controls.moved_threshold(rows, labels)
    assert torch.equal(moved.predictions(values), labels)
    assert torch.equal(moved.weight, head.weight)
