"""``bench/device/check.sh``: its stages, each once however many calls it takes, and the first that fails by name."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "device" / "check.sh"
STAGES = [
    *("build", "doctor", "ops", "tests", "workflows", "bench"),
    *("sanitizer memcheck", "sanitizer racecheck", "sanitizer initcheck", "sanitizer synccheck"),
    *("latency", "kernels", "locate", "last-layer"),
]

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="not a checkout")


@pytest.fixture
def call(tmp_path: Path):
    """Calls the script with a Python and a compute-sanitizer that only say what they were asked."""
    asked = tmp_path / "asked"
    asked.touch()
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("python", "compute-sanitizer"):
        tool = tools / name
        lines = f'echo "$@" >>"{asked}"', 'echo "$@" "$SAYS"', 'case "$*" in *"${FAILS:-nothing}"*) exit 7;; esac'
        tool.write_text("\n".join(("#!/bin/sh", *lines, "")))
        tool.chmod(0o755)

    def run(folder: str = "out", **changes: str) -> tuple[int, str, list[str]]:
        out = tmp_path / folder
        asked.write_text("")
        environment = os.environ | {
            "SAYS": "",
            "PYTHON": str(tools / "python"),
            "SPURGE_CHECK_WORK": str(tmp_path / "work"),
        }
        environment |= {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", **changes}
        done = subprocess.run(["bash", SCRIPT, out], env=environment, capture_output=True, text=True)
        return done.returncode, (out / "summary.txt").read_text(), asked.read_text().splitlines()

    return run


def passed(summary: str) -> list[str]:
    return [
        line.removeprefix("ok").rsplit("(", 1)[0].strip() for line in summary.splitlines() if line.startswith("ok ")
    ]


def test_every_stage_runs_once_in_two_calls(call):
    code, summary, _ = call(SPURGE_CHECK_SECONDS="105")
    assert code == 3
    assert "left for the next call with the same OUT: build,tests,kernels" in summary
    code, summary, asked = call()
    assert code == 0
    assert summary.splitlines()[-1] == "all stages passed"
    assert sorted(passed(summary)) == sorted(STAGES)
    assert len(asked) == 1 + 3  # --version, and what was left
    assert sum(map(int, _seconds())) <= 2 * 535


def test_the_first_failure_is_named_and_the_others_run(call):
    code, summary, _ = call(FAILS="racecheck")
    assert code == 1
    assert summary.splitlines()[-1] == "first failure: sanitizer racecheck, see sanitizer.log; all: sanitizer racecheck"
    assert passed(summary) == [stage for stage in STAGES if stage != "sanitizer racecheck"]
    assert call()[0] == 1  # what has ended is not done again


def test_what_is_read_before_it_is_written_fails_where_it_is_ours(call):
    read = "========= Uninitialized __global__ memory read of size 4 bytes\n=========     at void {}(float *)"
    code, summary, _ = call(SAYS=read.format("at::native::sum"))
    assert code == 0, summary
    code, summary, _ = call("other", SAYS=read.format("spurge::ig::node_sum"))
    assert code == 1
    assert "first failure: sanitizer initcheck" in summary


def _seconds() -> list[str]:
    lines = [line.split() for line in SCRIPT.read_text().splitlines() if line.strip().startswith("stage ")]
    numbers = [next(word for word in line if word.isdecimal()) for line in lines]
    return [*numbers, *["45"] * 3]  # four sanitizers share a line
