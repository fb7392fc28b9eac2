from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest
import torch

from spurge.demo.oracle import oracle
from spurge.engine.base.files import FileError
from spurge.engine.base.tensor_files import write_tensors
from spurge.engine.models.neurons import NeuronSet
from spurge.methods.mediation.effects import Effects, Side
from spurge.methods.mediation.mediation import Mediation
from spurge.methods.mediation.mediators import Mediators
from spurge.report.results import Results


@pytest.fixture(scope="module")
def found():
    """Five neurons of two sites; the first and the fourth mediate."""
    made = oracle(0, rows=1000)
    noise = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)).double()
    values = torch.stack([made.units[0], noise[0], made.units[1], 0.1 * made.units[0] + noise[1], noise[2]])
    place = {"layer.2": slice(0, 2), "layer.10": slice(2, 5)}
    units = Mediators(
        "neuron", {"layer.2": 2, "layer.10": 3}, 1000, 1, {}, lambda site, part: values[place[site]][part]
    )
    return Mediation(resamples=30, progress=False).effects(units, made.treatment, made.outcome, made.topics)


def test_ranking_and_neurons(found):
    assert found.ranking()[0] == 0
    assert found.ranking(alpha=0.01)[0] == 0
    assert 1 not in found.ranking(alpha=0.01)
    assert found.neurons(1) == NeuronSet({"layer.2": [0]})
    assert found.neurons(2, side="unadjusted") == NeuronSet({"layer.2": [0], "layer.10": [0]})
    assert all(float(found.adjusted.aie[unit]) > 0 for unit in found.ranking(sign="positive"))
    with pytest.raises(ValueError, match=r"count: only .* of 5 units qualify, got 9"):
        found.neurons(9)
    with pytest.raises(ValueError, match="expected 'mlp'"):
        found.leading_sites(1)


def test_names_and_scores(found):
    assert found.names()[:3] == ["layer.2[0]", "layer.2[1]", "layer.10[0]"]
    scores = found.scores()
    assert {site: len(vector) for site, vector in scores.values.items()} == {"layer.2": 2, "layer.10": 3}
    torch.testing.assert_close(scores.values["layer.2"], found.adjusted.aie[:2].float())


def test_localisation_has_intervals_and_a_paired_difference(found):
    rows = found.localisation()
    assert [row["measure"] for row in rows] == ["participation", "gini", "entropy", "units_50", "units_90"]
    for row in rows:
        assert row["difference"][0] == pytest.approx(row["adjusted"][0] - row["unadjusted"][0])
        assert row["adjusted"][1] <= row["adjusted"][2]
    assert rows[0]["unadjusted"][0] > rows[0]["adjusted"][0]  # the topic's unit counts in one of them only


def test_taking_the_noise_off_leaves_fewer_units(found):
    plain, corrected = (found.localisation(corrected=on)[0]["adjusted"][0] for on in (False, True))
    assert corrected <= plain
    values, draws = found.adjusted.measures(corrected=True)
    assert values.shape == (5,)
    assert draws.shape == (30, 5)


def test_survives_a_file(found, tmp_path):
    found.save(tmp_path / "effects.safetensors")
    again = Effects.load(tmp_path / "effects.safetensors")
    assert torch.equal(again.adjusted.draws, found.adjusted.draws)
    assert again.info == found.info
    assert again.widths == found.widths
    assert list(again.widths) == ["layer.2", "layer.10"]
    assert str(again) == str(found)


def test_other_files_are_refused(tmp_path):
    write_tensors(tmp_path / "other", {}, {"kind": "other"})
    write_tensors(tmp_path / "broken", {}, {"kind": "effects", "rest": "{}"})
    for name, message in (("other", "holds 'other', expected 'effects'"), ("broken", "not a file of effects")):
        with pytest.raises(FileError, match=message):
            Effects.load(tmp_path / name)


def test_prints_and_exports(found):
    text = str(found)
    for word in ("total effect, adjusted", "participation", "layer.2[0]", "noise taken off"):
        assert word in text
    results = Results("mediate", {})
    results.extend(found.rows())
    metrics = {row["metric"] for row in found.rows()}
    assert {"total effect", "aie", "aie_low", "participation corrected_high", "q", "ess"} <= metrics
    assert len([row for row in found.rows(most=2) if row["metric"] == "aie"]) == 4


def test_without_resamples_there_are_no_intervals():
    made = oracle(1, rows=300)
    found = Mediation(resamples=0, progress=False).effects(made.units, made.treatment, made.outcome, made.topics)
    assert found.adjusted.error.isnan().all()
    assert found.adjusted.interval[0].isnan().all()
    assert "nan" in str(found)


def flagged(units: int) -> Effects:
    """Neurons of which half have no overlap and a quarter a low effective sample size."""
    number = torch.arange(units)
    estimates = number.double() / units
    side = Side(
        estimates,
        estimates,
        estimates,
        ess=torch.where(number % 4 == 1, 0.01, 0.9).double(),
        worst=torch.zeros(units).double(),
        status=(number % 2 == 0).int(),
        constant=torch.zeros(units).bool(),
        total=torch.tensor([1.0, 0.0]).double(),
        draws=estimates.float().repeat(3, 1),
        total_draws=torch.ones(3).double(),
    )
    return Effects(
        side, side, "neuron", {"layer.0": units}, {"settings": {"least_ess": 0.1}, "prompts": 9, "topics": []}
    )


def steps_of_printing(effects: Effects) -> int:
    """Lines of Python that ``str`` runs, a step of a generator counted too."""
    steps = 0

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        steps += 1
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        str(effects)
    finally:
        sys.settrace(before)
    return steps


def test_flags_are_counted():
    assert str(flagged(1000)).endswith("flagged units: overlap 500, low ess 250")


def test_printing_takes_twice_as_long_for_twice_the_units():
    str(flagged(500))  # what is imported or cached on first use
    assert steps_of_printing(flagged(1000)) <= 2.2 * steps_of_printing(flagged(500))
