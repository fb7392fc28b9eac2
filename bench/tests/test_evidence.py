"""The page of evidence follows from the committed results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from experiments import evidence
from experiments.claims import CLAIMS
from experiments.claims.claim import Claim, Number
from spurge.report.results import Results

PAGE = Path(evidence.__file__).with_name("EVIDENCE.md")
CLAIM = Claim(
    "FCR",
    "edited beats plain",
    "1 to 0",
    "made",
    (Number("plain", "a", "none", "accuracy"), Number("edited", "a", "edit", "accuracy")),
    lambda plain, edited: edited > plain,
    "made up",
)


def made(folder: Path, edited: float) -> Path:
    results = Results("made", {})
    for seed in (0, 1):
        results.add("a", "none", "accuracy", 50 + seed, unit="percent", seed=seed)
        results.add("a", "edit", "accuracy", edited, unit="percent", seed=seed)
    results.write(folder / "made.json")
    return folder


def test_the_page_is_what_the_results_say():
    assert PAGE.read_text() == evidence.page(), "run: python bench/experiments/evidence.py --out " + PAGE.name


@pytest.mark.parametrize(("edited", "verdict"), [(60.0, "**holds**"), (50.5, "**does not hold**")])
def test_verdicts_follow_from_means_over_seeds(tmp_path: Path, edited: float, verdict: str):
    row = evidence.page([CLAIM], made(tmp_path, edited)).splitlines()[-1]
    assert f"plain 50.5, edited {edited:.1f}" in row
    assert verdict in row


def test_what_is_too_uncertain_is_not_shown(tmp_path: Path):
    unsure = replace(CLAIM, holds=lambda plain, edited: None)
    assert "**not shown**: made up" in evidence.page([unsure], made(tmp_path, 60.0))


def test_what_is_not_measured_is_not_judged(tmp_path: Path):
    assert "| 1 to 0 | | not measured |" in evidence.page([CLAIM], tmp_path)


def test_a_lost_number_is_named(tmp_path: Path):
    lost = replace(CLAIM, numbers=(Number("plain", "b", "none", "accuracy"),))
    with pytest.raises(ValueError, match=r"made\.json: no row of case 'b', method 'none'"):
        evidence.page([lost], made(tmp_path, 60.0))


def test_every_claim_says_what_decides():
    assert len({claim.text for claim in CLAIMS}) == len(CLAIMS)
    assert all(claim.numbers and claim.reason and claim.published for claim in CLAIMS)
