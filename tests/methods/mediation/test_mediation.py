from __future__ import annotations

import pytest
import torch

import spurge.methods.mediation.mediation as module
from spurge.demo.oracle import NIE, TE, oracle
from spurge.engine.base.files import FileError, canonical_json, fingerprint
from spurge.engine.base.tensor_files import read_tensors
from spurge.engine.causal.balancing import Unbalanced
from spurge.engine.causal.confounders import Confounders
from spurge.methods.mediation.mediation import Mediation
from spurge.methods.mediation.mediators import Mediators, binary, units_of


def mediation(**settings):
    return Mediation(**{"resamples": 0, "progress": False} | settings)


def effects(made, confounders=None, **settings):
    confounders = made.topics if confounders is None else confounders
    return mediation(**settings).effects(made.units, made.treatment, made.outcome, confounders)


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# ---- the oracle ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeds():
    return [effects(oracle(seed)) for seed in range(20)]


def over(seeds, pick):
    return torch.stack([torch.as_tensor(pick(found), dtype=torch.float64) for found in seeds])


def test_adjusted_effects_are_the_true_ones(seeds):
    for name in ("nie1", "nie0", "aie"):
        found = over(seeds, lambda e, name=name: getattr(e.adjusted, name))
        assert float(found[:, 0].mean()) == pytest.approx(NIE, abs=0.05)
        assert float(found[:, 0].std()) < 0.06
        assert float(found[:, 1].abs().max()) < 0.02
    assert float(over(seeds, lambda e: e.adjusted.total_effect).mean()) == pytest.approx(TE, abs=0.05)


def test_unadjusted_effects_are_the_topics(seeds):
    found = over(seeds, lambda e: e.unadjusted.aie).mean(0)
    assert float(found[0]) == pytest.approx(2.0, abs=0.15)
    assert float(found[1]) == pytest.approx(1.0, abs=0.15)
    assert float(over(seeds, lambda e: e.unadjusted.total_effect).mean()) > 2


def test_parts_add_up(seeds):
    for side in (seeds[0].adjusted, seeds[0].unadjusted):
        torch.testing.assert_close(side.nie1 + side.nde, torch.full((2,), side.total_effect, dtype=torch.float64))
        torch.testing.assert_close(side.aie, (side.nie1 + side.nie0) / 2)
        assert (side.status == 0).all()
        assert float(side.worst.max()) <= 1e-6
        assert (side.ess > 0.1).all()
        assert (side.ess <= 1).all()


def test_the_continuous_unit_agrees():
    found = over([effects(oracle(seed), estimator="continuous_unit") for seed in range(10)], lambda e: e.adjusted.aie)
    assert float(found[:, 0].mean()) == pytest.approx(NIE, abs=0.06)
    assert float(found[:, 1].abs().max()) < 0.05
    only = effects(oracle(0), estimator="continuous_unit")
    assert only.adjusted.nie1.isnan().all()
    assert float(only.unadjusted.aie[0]) == pytest.approx(2.0, abs=0.2)


@pytest.mark.parametrize(("direct", "slope"), [(1.0, 0.0), (3.0, 0.0), (1.0, 1.0), (2.0, 1.0)])
def test_the_continuous_unit_leaves_the_direct_effect_out(direct, slope):
    """q moves the unit by 1, so that NIE is the slope, and the outcome by ``direct``."""
    found = []
    for seed in range(6):
        made = oracle(seed)
        rest = made.outcome - 0.3 * made.treatment - 0.5 * made.units[0]
        answer = rest + direct * made.treatment + slope * made.units[0]
        settings = mediation(estimator="continuous_unit", interact=False)
        found.append(settings.effects(made.units[:1], made.treatment, answer, made.topics).adjusted.aie)
    assert float(torch.stack(found).mean()) == pytest.approx(slope, abs=0.1)


def test_a_constant_unit_has_no_effect():
    made = oracle(7, rows=400)
    units = torch.stack([made.units[0], torch.full_like(made.units[0], 3.0)])
    for estimator in ("balancing", "dichotomised_mediator", "continuous_unit"):
        found = mediation(estimator=estimator).effects(units, made.treatment, made.outcome, made.topics)
        assert float(found.adjusted.aie[1]) == pytest.approx(0, abs=1e-9)
        assert found.adjusted.flags(0.1)[1] == ("constant",)


def test_effects_say_what_they_estimate():
    made = oracle(8, rows=400)
    said = {
        "balancing": "the mean of NIE(1) and NIE(0)",
        "dichotomised_mediator": "through the unit cut at its median",
        "continuous_unit": "without an interaction of unit and treatment",
    }
    for estimator, words in said.items():
        found = effects(made, estimator=estimator)
        assert words in found.estimand
        assert found.estimand in " ".join(str(found).split())
    del found.info["slope"]  # as a file of the time when the slope was taken across arms
    assert "estimate again" in str(found)


@pytest.mark.parametrize("name", ["binary_mediator", "dichotomised_mediator"])
def test_the_earlier_name_of_the_dichotomised_mediator_is_taken(name, tmp_path):
    made = oracle(9, rows=400)
    found = mediation(estimator=name).effects(made.units, made.treatment, made.outcome, made.topics, resume=tmp_path)
    assert found.info["settings"]["estimator"] == "dichotomised_mediator"
    first = {key: value for key, value in found.info.items() if key != "spurge"}
    first["settings"] = first["settings"] | {"estimator": "binary_mediator"}  # as resume files have always been marked
    (path,) = tmp_path.iterdir()
    assert read_tensors(path, "mediation block")[1]["fingerprint"] == fingerprint(canonical_json(first))


def test_columns_find_what_topics_find():
    made = oracle(1)
    marks = torch.nn.functional.one_hot(made.topics)[:, :-1].double()
    by_columns = effects(made, Confounders.of(columns=marks))
    by_both = effects(made, Confounders.of(made.topics, torch.randn(len(made.topics))))
    by_topics = effects(made)
    torch.testing.assert_close(by_columns.adjusted.aie, by_topics.adjusted.aie, atol=1e-4, rtol=0)
    torch.testing.assert_close(by_columns.adjusted.total_effect, by_topics.adjusted.total_effect, atol=1e-5, rtol=0)
    torch.testing.assert_close(by_both.adjusted.aie, by_topics.adjusted.aie, atol=0.03, rtol=0)
    torch.testing.assert_close(by_columns.unadjusted.aie, by_topics.unadjusted.aie, atol=1e-4, rtol=0)


def test_units_of_several_numbers():
    made = oracle(2)
    turned = torch.stack([made.units[0] + made.units[1], made.units[0] - made.units[1]], -1)[None]
    found = mediation().effects(units_of(turned), made.treatment, made.outcome, made.topics)
    assert float(found.adjusted.aie) == pytest.approx(NIE, abs=0.1)


def test_the_dichotomised_mediator_is_the_stratified_formula():
    made = oracle(3, rows=600)
    found = effects(made, estimator="dichotomised_mediator", least_arm=1)
    high = made.units > made.units.median(1, keepdim=True).values
    q, x, y = made.treatment, made.topics, made.outcome
    for unit in range(2):
        mu10 = 0.0
        for topic in range(6):
            for m in (False, True):
                cell = y[q & (x == topic) & (high[unit] == m)]
                control = high[unit][~q & (x == topic)] == m
                mu10 += float((x == topic).double().mean() * control.double().mean() * cell.mean())
        assert float(found.adjusted.nie1[unit]) == pytest.approx(float(found.adjusted.total[0]) - mu10, abs=1e-9)


# ---- what cannot be estimated ----------------------------------------------------------------------------------------


def test_units_that_cannot_be_estimated_do_not_stop_the_others():
    made = oracle(4)
    apart = torch.where(made.treatment, 10.0, 0.0) + torch.rand(len(made.treatment))
    units = torch.stack([made.units[0], apart.double(), torch.full_like(apart, 3.0).double()])
    found = mediation().effects(units, made.treatment, made.outcome, made.topics)
    assert found.adjusted.flags(0.1) == [(), ("overlap",), ("constant",)]
    assert found.adjusted.aie.isnan().tolist() == [False, True, False]
    assert float(found.adjusted.aie[2]) == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(found.adjusted.aie[0], effects(made).adjusted.aie[0])
    assert found.ranking() == [0, 2]


def test_a_low_effective_sample_size_is_flagged():
    made = oracle(5)
    near = made.units[:1] + 0.7 * made.treatment
    found = mediation(interact=False).effects(near, made.treatment, made.outcome, made.topics)
    assert found.adjusted.flags(0.1) == [("low ess",)]
    assert 0 < float(found.adjusted.ess) < 0.1


def test_without_overlap_the_dichotomised_mediator_has_no_estimate():
    made = oracle(6)
    apart = made.treatment.double()[None] + 0.01 * torch.rand(1, len(made.treatment))
    found = mediation(estimator="dichotomised_mediator").effects(apart, made.treatment, made.outcome, made.topics)
    assert found.adjusted.flags(0.1) == [("overlap",)]
    assert found.adjusted.aie.isnan().all()


def test_topics_with_one_arm_are_left_out_and_named():
    made = oracle(7)
    topics = torch.where(made.treatment & (made.topics == 0), 6, made.topics)
    names = [*"abcdef", "only treated"]
    found = effects(made, Confounders.of(topics, names=names))
    assert {row["topic"] for row in found.info["dropped"]} == {"a", "only treated"}
    assert found.info["prompts"] == int((made.topics != 0).sum())
    kept = made.topics != 0
    again = mediation().effects(made.units[:, kept], made.treatment[kept], made.outcome[kept], made.topics[kept])
    torch.testing.assert_close(found.adjusted.aie, again.adjusted.aie)


def test_a_topic_that_predicts_the_treatment_is_refused():
    made = oracle(8)
    with pytest.raises(ValueError, match="the topic predicts the treatment"):
        effects(made, made.treatment.long())
    with pytest.raises(Unbalanced, match="no weights give these means"):
        effects(made, Confounders.of(columns=made.treatment.double() + 1e-3 * torch.rand(len(made.treatment))))


def test_an_arm_without_prompts_is_refused():
    made = oracle(9, rows=100)
    with pytest.raises(ValueError, match="treatment: 0 untreated prompts, need at least 10"):
        mediation().effects(made.units, torch.ones(100).bool(), made.outcome, made.topics)


def test_duplicated_prompts_change_nothing():
    made = oracle(10, rows=800)
    once = effects(made)
    twice = mediation().effects(
        made.units.repeat(1, 2), made.treatment.repeat(2), made.outcome.repeat(2), made.topics.repeat(2)
    )
    torch.testing.assert_close(once.adjusted.aie, twice.adjusted.aie, atol=1e-6, rtol=0)
    torch.testing.assert_close(once.adjusted.ess, twice.adjusted.ess, atol=1e-6, rtol=0)


def test_fewer_prompts_than_moments():
    made = oracle(11, rows=24)
    found = mediation(least_arm=1).effects(made.units, made.treatment, made.outcome, made.topics)
    for unit, flags in enumerate(found.adjusted.flags(0.1)):
        assert flags or not found.adjusted.aie[unit].isnan()


# ---- resamples, blocks and resuming ----------------------------------------------------------------------------------


def test_resamples_are_the_same_for_a_seed_and_surround_the_estimate():
    made = oracle(12, rows=1000)
    one, two = (effects(made, resamples=60, seed=5) for _ in range(2))
    assert_same(one.adjusted.draws, two.adjusted.draws)
    assert not torch.equal(one.adjusted.draws, effects(made, resamples=60, seed=6).adjusted.draws)
    low, high = one.adjusted.interval
    assert (low < one.adjusted.aie).all()
    assert (one.adjusted.aie < high).all()
    assert float(one.adjusted.p[0]) < 1e-3
    assert float(one.adjusted.p[1]) > 0.01
    assert float(one.unadjusted.error[0]) == pytest.approx(0.09, abs=0.05)


def test_a_resample_is_the_estimate_of_its_rows():
    made = oracle(13, rows=600)
    found = effects(made, resamples=3)
    counts = module.bootstrap_counts(600, 3, 0)
    for draw in range(3):
        rows = torch.repeat_interleave(torch.arange(600), counts[draw].long())
        again = mediation().effects(made.units[:, rows], made.treatment[rows], made.outcome[rows], made.topics[rows])
        torch.testing.assert_close(
            found.adjusted.draws[draw].double(), again.adjusted.aie, atol=2e-5, rtol=0, equal_nan=True
        )


def test_the_memory_budget_changes_nothing():
    made = oracle(14, rows=500)
    units = torch.cat([made.units, torch.randn(30, 500).double()])
    whole = mediation(resamples=4).effects(units, made.treatment, made.outcome, made.topics)
    split = mediation(resamples=4, memory="100 kB").effects(units, made.treatment, made.outcome, made.topics)
    torch.testing.assert_close(whole.adjusted.aie, split.adjusted.aie, rtol=0, atol=1e-10, equal_nan=True)
    torch.testing.assert_close(whole.adjusted.draws, split.adjusted.draws, rtol=0, atol=1e-6, equal_nan=True)


def test_an_interrupted_run_resumes(tmp_path, monkeypatch):
    made = oracle(15, rows=300)
    units = torch.cat([made.units, torch.randn(20, 300).double()])
    settings = mediation(resamples=2, memory="100 kB")
    want = settings.effects(units, made.treatment, made.outcome, made.topics)
    calls, real = [], module._side

    def fails(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "_side", fails)
    with pytest.raises(KeyboardInterrupt):
        settings.effects(units, made.treatment, made.outcome, made.topics, resume=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    calls[:] = [0] * 100
    found = settings.effects(units, made.treatment, made.outcome, made.topics, resume=tmp_path)
    whole = len(calls) - 100 + 4
    assert whole == 2 * len(list(tmp_path.iterdir()))
    assert_same(found.adjusted.draws, want.adjusted.draws)
    found.save(tmp_path / "a")
    want.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_resuming_another_job_or_from_a_damaged_block_is_refused(tmp_path):
    made = oracle(16, rows=300)
    mediation().effects(made.units, made.treatment, made.outcome, made.topics, resume=tmp_path)
    with pytest.raises(ValueError, match=r"resume: .* was made with other settings, data or model"):
        mediation(square=False).effects(made.units, made.treatment, made.outcome, made.topics, resume=tmp_path)
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(FileError, match="truncated"):
        mediation().effects(made.units, made.treatment, made.outcome, made.topics, resume=tmp_path)


def test_blocks_of_other_units_of_a_recording_are_not_taken(tmp_path):
    """The recording is the same; only the names of the units tell them apart."""
    made = oracle(19, rows=300)

    def units(site):
        return Mediators("neuron", {site: 2}, 300, 1, {"recording": "the same"}, lambda *_: made.units)

    mediation().effects(units("layer.0"), made.treatment, made.outcome, made.topics, resume=tmp_path)
    with pytest.raises(ValueError, match="was made with other settings, data or model"):
        mediation().effects(units("layer.1"), made.treatment, made.outcome, made.topics, resume=tmp_path)


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_treatments():
    assert binary([0, 1, 1], 3).tolist() == [False, True, True]
    assert binary([0.2, 0.5, 0.7], 3).tolist() == [False, True, True]
    assert binary(torch.tensor([True]), 1).tolist() == [True]
    assert binary([0.2, 0.5], 2, threshold=0.1).tolist() == [True, True]
    with pytest.raises(ValueError, match="treatment: expected one for each of 2 prompts"):
        binary([1], 2)
    with pytest.raises(ValueError, match="treatment: expected finite numbers, got nan at prompt 1"):
        binary([0.0, float("nan")], 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"outcome": torch.zeros(99)}, ValueError, "outcome: expected one for each of 100 prompts"),
        ({"outcome": torch.full((100,), torch.inf)}, ValueError, "outcome: expected finite numbers, got inf at row 0"),
        ({"confounders": [0] * 99}, ValueError, "confounders: expected 100 prompts like the units, got 99"),
        ({"units": torch.full((1, 100), torch.nan)}, ValueError, "units: expected finite numbers, .* at prompt 0"),
        ({"units": torch.zeros(0, 100)}, ValueError, r"units: expected shape \[U, N\]"),
        ({"units": torch.zeros(1, 100).long()}, TypeError, "units: expected a floating tensor"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    made = oracle(17, rows=100)
    good = {"units": made.units, "treatment": made.treatment, "outcome": made.outcome, "confounders": made.topics}
    with pytest.raises(error, match=message):
        mediation().effects(**good | change)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"estimator": "magic"}, ValueError, "estimator: expected one of balancing"),
        ({"tolerance": 0}, ValueError, "tolerance: expected a number above 0"),
        ({"confidence": 1.0}, ValueError, "confidence: expected a number between 0 and 1"),
        ({"resamples": -1}, ValueError, "resamples: need at least 0"),
        ({"least_ess": 0}, ValueError, "least_ess"),
        ({"interact": 1}, TypeError, "interact: expected True or False"),
        ({"memory": "lots"}, ValueError, "memory: expected bytes"),
        ({"device": "moon"}, ValueError, "device: 'moon' cannot be used here"),
        ({"device": 0}, TypeError, "device: expected a device or its name, got int"),
    ],
)
def test_bad_settings_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        mediation(**settings)


def test_estimators_refuse_what_they_cannot_use():
    made = oracle(18, rows=200)
    columns = Confounders.of(columns=torch.randn(200))
    with pytest.raises(ValueError, match="the dichotomised mediator knows topics and single numbers only, got columns"):
        effects(made, columns, estimator="dichotomised_mediator")
    pair = units_of(made.units.t()[None].contiguous())
    with pytest.raises(ValueError, match="the continuous unit is one number, got 2"):
        mediation(estimator="continuous_unit").effects(pair, made.treatment, made.outcome, made.topics)
