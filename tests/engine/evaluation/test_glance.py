"""A report at a glance: which control belongs to which edit, and what is said of a moved threshold."""

from __future__ import annotations

import pytest

from spurge.engine.evaluation.glance import grouped, verdict
from spurge.engine.evaluation.report import Measure, Report


def measure(method: str, metric: str, value: float, labels: str = "none") -> Measure:
    return Measure("home", method, metric, value, None, None, None, 10, "percent", labels)


def test_a_line_for_each_edit_with_its_controls_below_it() -> None:
    numbers = {"none": 50, "gates": 60, "DFR": 70, "threshold": 61, "random": 51, "deleted": 65, "DFR: threshold": 52}
    measures = [measure(name, "accuracy", value) for name, value in numbers.items()]
    measures += [measure(name, "worst_group", value / 2) for name, value in numbers.items()]
    measures += [measure("gates", "by_threshold", 90), measure("gates", "by_constant", 80)]
    measures += [measure("DFR", "by_threshold", 12), measure("DFR", "by_constant", 3)]
    settings = {"sets": {"home": {}}, "name": "gates", "beside": {"DFR": {}}, "seed": 0, "draws": 2}
    report = Report(tuple(measures), settings)
    ((title, lines, foot),) = report.glance()
    assert title == "home at a glance, percent"
    assert lines[0] == ["", "average", "worst group", "threshold", "verdict", "labels"]
    assert [line[0] for line in lines[1:]] == [
        *("none", "gates", "· threshold", "· random", "DFR", "· threshold", "deleted"),
    ]
    assert lines[2] == ["gates", "60.0", "30.0", "90, 80", "mostly moves the threshold", "none"]
    assert lines[5] == ["DFR", "70.0", "35.0", "12, 3", "does more", "none"]
    assert lines[1][-2] == lines[-1][-2] == ""
    assert len(foot) == 1
    assert "home at a glance" in str(report)
    assert max(map(len, str(report).splitlines())) <= 80
    assert "at a glance" not in str(Report(tuple(measures), {**settings, "beside": {}}))


def test_last_layers_have_no_edit_of_their_own_name() -> None:
    methods = ["none", "FCR", "random", "FCR: threshold"]
    assert grouped(methods, None, ["random"]) == [("none", ""), ("FCR", ""), ("FCR: threshold", "FCR"), ("random", "")]


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ((None, None), "changes no answer"),
        ((50.0, 99.0), "does more"),
        ((51.0, 75.0), "like a threshold, unevenly"),
        ((51.0, 76.0), "mostly moves the threshold"),
        ((51.0, None), "mostly moves the threshold"),
    ],
)
def test_verdicts(shares: tuple[float | None, float | None], said: str) -> None:
    assert verdict(*shares) == said


def test_many_methods_stand_below_each_other() -> None:
    for count, first in ((8, ["", "a0", "a1"]), (9, ["", "home"])):
        measures = tuple(measure(f"a{number}", "accuracy", number) for number in range(count))
        ((_, lines, _),) = Report(measures, {"sets": {}, "seed": 0}).tables()
        assert lines[0][:3] == first
        assert len(lines) * len(lines[0]) == 2 * (count + 1)
