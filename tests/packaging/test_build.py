"""What the compiled module needs, and what building it needs: little."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spurge import _core

ROOT = Path(__file__).parents[2]


def build_requirements() -> list[str]:
    text = (ROOT / "pyproject.toml").read_text()
    table = text[text.index("[build-system]") : text.index("[project]")]
    return re.findall(r'"([A-Za-z0-9_.-]+)[^"]*"', re.search(r"requires = \[(.*?)\]", table, re.DOTALL)[1])


def test_torch_is_not_needed_to_build():
    assert set(build_requirements()) == {"scikit-build-core", "pybind11"}
    for path in [ROOT / "CMakeLists.txt", *(ROOT / "cmake").iterdir()]:
        assert not re.search(r"find_package\(\s*torch", path.read_text(), re.IGNORECASE), path.name


def test_the_constraints_hold_no_index_and_pin_torch():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert not [line for line in lines if line.startswith("-") or "://" in line]
    assert any(line.startswith("torch==") for line in lines)


@pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf")
def test_nothing_of_cuda_or_torch_is_linked():
    headers = subprocess.run(["readelf", "-d", _core.__file__], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", headers)
    assert needed
    assert not [lib for lib in needed if re.search("cuda|cudart|nv|torch|c10|gomp|omp", lib)], needed


@pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf")
def test_no_search_path_is_left_in_the_module():
    headers = subprocess.run(["readelf", "-d", _core.__file__], capture_output=True, text=True, check=True).stdout
    assert "RPATH" not in headers
    assert "RUNPATH" not in headers


def test_the_module_imports_without_torch():
    code = (
        "import sys, importlib.util as u; sys.modules['torch'] = None\n"
        "s = u.spec_from_file_location('_core', sys.argv[1]); m = u.module_from_spec(s); s.loader.exec_module(m)\n"
        "print(m.build_config()['version'], m.built_with_cuda)"
    )
    done = subprocess.run([sys.executable, "-c", code, _core.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [_core.build_config()["version"], str(_core.built_with_cuda)]


def test_one_version_for_all():
    project = re.search(r"project\(spurge VERSION ([0-9.]+)", (ROOT / "CMakeLists.txt").read_text())
    assert _core.build_config()["version"] == project[1]


def test_build_config_says_what_runs():
    config = _core.build_config()
    assert set(config) == {"version", "compiler", "isa_compiled", "isa_selected", "cuda", "cuda_archs"}
    assert config["isa_selected"] in config["isa_compiled"]
    assert (config["cuda"] is not None) == (config["cuda_archs"] is not None) == _core.built_with_cuda
