"""The C++ face: installed as a CMake package and used by a program without Python."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="needs cmake and a C++ compiler"),
]


def run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_a_program_links_the_kernels(tmp_path):
    built, installed, consumer = tmp_path / "built", tmp_path / "installed", tmp_path / "consumer"
    run("cmake", "-S", ROOT, "-B", built, "-DSPURGE_PYTHON=OFF", "-DSPURGE_CUDA=OFF", "-DCMAKE_BUILD_TYPE=Debug")
    run("cmake", "--build", built, "--parallel", 2)
    run("cmake", "--install", built, "--prefix", installed)
    run("cmake", "-S", Path(__file__).parent / "consumer", "-B", consumer, f"-DCMAKE_PREFIX_PATH={installed}")
    run("cmake", "--build", consumer)
    said = run(consumer / "consumer")
    assert said == "-2 6 14 22 | columns: must lie in [0, 4), got 9\n"
