"""Weights of texts in MacU's localisation: what they leave as it is, what they add up to, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import planted_texts
from helpers.tiny_models import tiny_tokenizer
from spurge.engine.causal.adjustment import confounder_weights
from spurge.engine.data.examples import Examples
from spurge.engine.models.handle import Handle
from spurge.methods.macu.located import Located
from spurge.methods.macu.macu import MacU
from spurge.methods.macu.objectives import KindWeights, counterfactual_set
from spurge.methods.macu.weighted_examples import WeightedExamples

QUICK: dict[str, Any] = {"batch_size": 8, "certify": 2, "certify_texts": 6, "nodes": 2, "progress": False}
TRAIN = planted_texts.train()[:40]
RANDOM = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
objectives = pytest.mark.parametrize("objective", ["proximity", "counterfactual"])


def locate(weights: Any = None, train: Examples = TRAIN, *, resume: Path | None = None, **changes: Any) -> Located:
    macu = MacU(**{**QUICK, **changes})
    return macu.locate(
        planted_texts.model(), tiny_tokenizer(), train, planted_texts.GOLDEN, weights=weights, resume=resume
    )


def assert_same(one: Located, two: Located, *, but: tuple[str, ...] = ()) -> None:
    """The same bits in scores, sets, certificate and info, of which some entries may differ."""
    for side in ("causal", "spurious"):
        for site, vector in getattr(one, side).values.items():
            assert torch.equal(vector, getattr(two, side).values[site])
        assert getattr(one, f"{side}_set") == getattr(two, f"{side}_set")
    assert one.certificate == two.certificate
    assert {k: v for k, v in one.info.items() if k not in but} == {k: v for k, v in two.info.items() if k not in but}


@objectives
@pytest.mark.parametrize("weights", [torch.ones(40), [0.3] * 40, np.full(40, 7)])
def test_equal_weights_are_none(objective: str, weights: Any) -> None:
    assert_same(locate(weights, objective=objective, texts=20), locate(objective=objective, texts=20))


@objectives
def test_only_ratios_matter(objective: str) -> None:
    settings: dict[str, Any] = {"objective": objective, "texts": 20}
    found = locate(RANDOM, **settings)
    assert_same(found, locate(2 * RANDOM, **settings))
    assert_same(found, locate((RANDOM * 2**-40).tolist(), **settings))
    third = locate(3 * RANDOM, **settings)
    for site, vector in found.causal.values.items():
        torch.testing.assert_close(vector, third.causal.values[site], rtol=1e-5, atol=1e-7)
        assert not torch.equal(vector, locate(**settings).causal.values[site]) or not vector.any()
    assert found.info["weights"]["effective_texts"] < 20


@objectives
@pytest.mark.parametrize("texts", [12, None])
def test_a_weight_of_0_leaves_a_text_out(objective: str, texts: int | None) -> None:
    weights = RANDOM.clone()
    weights[[0, 3, 4, 17, 39]] = 0
    rows = weights.nonzero()[:, 0].tolist()
    settings: dict[str, Any] = {"objective": objective, "texts": texts}
    found, short = locate(weights, **settings), locate(weights[rows], TRAIN.subset(rows), **settings)
    assert_same(found, short, but=("data", "weights"))
    assert found.info["weights"] == {**short.info["weights"], "left_out": 5}
    assert found.info["texts"] == (texts or 35)
    zeros = locate((weights > 0).double(), **settings)
    assert_same(zeros, locate(train=TRAIN.subset(rows), **settings), but=("data", "weights", "labels"))


def test_scores_completeness_and_certificate_are_weighted_sums_over_texts() -> None:
    """Against each text alone: a weight of 1 for it and of 0 for all others."""
    train, weights = TRAIN[:5], torch.tensor([0.5, 2.0, 1.0, 0.25, 1.25])
    settings: dict[str, Any] = {"path": "layer", "batch_size": 2, "certify": 64, "certify_texts": 5}
    found = locate(weights, train, **settings)
    alone = [locate(row, train, **settings) for row in torch.eye(5)]
    for site, vector in found.spurious.values.items():
        for side in ("causal", "spurious"):
            each = torch.stack([getattr(one_text, side).values[site] for one_text in alone])
            torch.testing.assert_close(getattr(found, side).values[site], weights @ each, rtol=1e-4, atol=1e-5)
            key = f"{side}_effect"
            effects = [one_text.info["completeness"][site][key] for one_text in alone]
            expected = float(weights @ torch.tensor(effects))
            assert found.info["completeness"][site][key] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert vector.any() or site == list(found.spurious.values)[-1]
    records = [{record["neuron"]: record for record in one_text.certificate["neurons"]} for one_text in alone]
    shared = [record for record in found.certificate["neurons"] if all(record["neuron"] in known for known in records)]
    assert shared
    for record in shared:
        for name in ("causal soft exact", "spurious hard exact"):
            each = torch.tensor([known[record["neuron"]][name] for known in records])
            assert record[name] == pytest.approx(float(weights @ each) / 5, rel=1e-4, abs=1e-5)


def test_made_texts_take_the_weight_of_their_source() -> None:
    handle, chosen = Handle(planted_texts.model(), tiny_tokenizer()), TRAIN[:20]
    made = counterfactual_set(handle, TRAIN, planted_texts.GOLDEN, chosen)
    sources, kinds = RANDOM[:20], KindWeights(kept=3.0)
    size: dict[str, Any] = {"batch_size": 7, "weights": kinds}
    plain, weighted = (made.jobs(handle, sources=w, **size) for w in (None, sources))
    total = sum(getattr(kinds, row.kind) * float(sources[row.source]) for row in made.rows)
    assert sum(float(job.weights.sum()) for job in weighted) == pytest.approx(total)
    for one, two in zip(plain, weighted, strict=True):
        assert torch.equal(one.inputs["input_ids"], two.inputs["input_ids"])
        assert torch.equal(one.labels, two.labels)
    (whole,) = made.take([4]).jobs(handle, sources=sources, **size)
    row = made.rows[4]
    assert whole.weights.tolist() == pytest.approx([getattr(kinds, row.kind) * float(sources[row.source])])


def test_counterfactual_scores_are_linear_in_the_weights() -> None:
    settings: dict[str, Any] = {"objective": "counterfactual", "certify": 0}
    a, b = RANDOM, RANDOM.flip(0)
    one, two, both = (locate(w, **settings) for w in (a, b, a + b))
    for site, vector in both.spurious.values.items():
        parts = a.mean() * one.spurious.values[site] + b.mean() * two.spurious.values[site]
        torch.testing.assert_close((a + b).mean() * vector, parts, rtol=1e-4, atol=1e-5, check_dtype=False)


@objectives
def test_sampled_texts_take_their_own_weights(objective: str) -> None:
    rows = TRAIN.draw(12, 0)
    settings: dict[str, Any] = {"objective": objective, "certify": 0}
    found = locate(RANDOM, texts=12, **settings)
    if objective == "proximity":
        apart = locate(RANDOM[rows], TRAIN.subset(rows), texts=None, **settings)
        assert_same(found, apart, but=("data", "weights", "settings"))
    assert found.info["weights"]["effective_texts"] == pytest.approx(
        float(RANDOM[rows].sum() ** 2 / (RANDOM[rows] ** 2).sum())
    )


def test_info_says_what_was_weighed() -> None:
    assert locate(texts=4).info["weights"] is None
    info = locate(RANDOM, texts=4).info
    assert info["labels"] is None  # nobody knows what the weights were made of
    assert info["weights"].keys() == {"fingerprint", "left_out", "effective_texts"}
    assert info["data"] == TRAIN.fingerprint()


def test_resume_refuses_other_weights(tmp_path: Path) -> None:
    weights = RANDOM.clone()
    weights[2] = 0
    first = locate(weights, texts=10, resume=tmp_path)
    assert_same(first, locate(4 * weights, texts=10, resume=tmp_path))
    other = weights.clone()
    other[7] += 1
    for changed in (None, torch.ones(40), other):
        with pytest.raises(ValueError, match=r"resume: .* was made with other settings, data or model"):
            locate(changed, texts=10, resume=tmp_path)
    masks = torch.ones(2, 40)
    masks[0, 0] = masks[1, 1] = 0  # as many left out, and the rest alike
    locate(masks[0], resume=tmp_path / "mask", certify=0)
    with pytest.raises(ValueError, match=r"resume: .* was made with other settings, data or model"):
        locate(masks[1], resume=tmp_path / "mask", certify=0)
    locate(resume=tmp_path / "even", certify=0)
    locate(torch.ones(40), resume=tmp_path / "even", certify=0)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (torch.ones(39), ValueError, r"weights: expected shape \(40,\), one for each text, got \(39,\)"),
        (torch.ones(40, 1), ValueError, r"weights: expected shape \(40,\), one for each text, got \(40, 1\)"),
        ([], ValueError, r"weights: expected shape \(40,\)"),
        (1.0, ValueError, r"weights: expected shape \(40,\), one for each text, got \(\)"),
        ([1.0] * 39 + [-0.5], ValueError, "weights: expected finite numbers of at least 0, got -0.5 at row 39"),
        ([float("nan")] + [1.0] * 39, ValueError, "weights: expected finite numbers of at least 0, got nan at row 0"),
        ([1.0, float("inf")] + [1.0] * 38, ValueError, "expected finite numbers of at least 0, got inf at row 1"),
        (torch.zeros(40), ValueError, "weights: need at least 1 text with a weight above 0, got 0 for all 40"),
        (["1"] * 40, TypeError, "weights: expected a number for each text, got"),
        (torch.ones(40, dtype=torch.bool), TypeError, "weights: expected a number for each text, got torch.bool"),
        ([[1.0], [1.0, 2.0]], TypeError, "weights: expected a number for each text, got list"),
    ],
)
def test_bad_weights(weights: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        locate(weights)


@given(st.lists(st.floats(0, 1e308), min_size=1, max_size=8).filter(any), st.integers(1, 9), st.integers(0, 3))
def test_weights_have_mean_1(weights: list[float], count: int, seed: int) -> None:
    texts = WeightedExamples.of(TRAIN[: len(weights)], weights)
    assert len(texts) == sum(weight / max(weights) > 0 for weight in weights)
    for found in (texts, texts.sample(count, seed)):
        assert float(found.weights.mean()) == pytest.approx(1)
        assert 1 - 1e-9 <= found.effective <= len(found) + 1e-9
    parts = list(texts.batches(3))
    assert torch.equal(torch.cat([part.weights for part in parts]), texts.weights)
    assert [row for part in parts for row in part.examples] == list(texts.examples)


def test_confounder_weights_part_the_label_from_a_topic() -> None:
    """The planted phrase goes with one label; weighed, it does not, and the scores are other ones."""
    phrase = torch.tensor([int(planted_texts.PHRASE in row.text) for row in TRAIN])
    weights = confounder_weights(TRAIN.targets, phrase)
    shares = [
        float(weights[(TRAIN.targets == label) & (phrase == 1)].sum() / weights[TRAIN.targets == label].sum())
        for label in (0, 1)
    ]
    assert shares[0] == pytest.approx(shares[1])
    plain, adjusted = locate(), locate(weights)
    assert adjusted.info["weights"]["effective_texts"] < 40
    assert any(not torch.equal(vector, adjusted.causal.values[site]) for site, vector in plain.causal.values.items())
