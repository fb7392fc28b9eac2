"""The C++ face: a CMake package, in the wheel or alone, which programs without Python use."""

from __future__ import annotations

import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

import spurge
from spurge.cli import main, parser

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "cpp"
INSTALLED = Path(spurge.__file__).parent / "lib" / "cmake" / "spurge"
EMULATED = Path(spurge.__file__).parent / "small_job_emulated"
needs_compiler = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("c++")), reason="needs cmake and a C++ compiler"
)


def run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package built without the Python module, and installed under a prefix of its own."""
    folder = tmp_path_factory.mktemp("package")
    options = "-DSPURGE_PYTHON=OFF", "-DSPURGE_CUDA=OFF", "-DCMAKE_BUILD_TYPE=Debug"
    run("cmake", "-S", ROOT, "-B", folder / "built", *options)
    run("cmake", "--build", folder / "built", "--parallel", 2)
    run("cmake", "--install", folder / "built", "--prefix", folder / "installed")
    return folder / "installed"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    runpy.run_path(str(EXAMPLE / "small_job.py"))["make"](folder)
    return folder


def lines_of_python(inputs: Path) -> list[str]:
    return runpy.run_path(str(EXAMPLE / "small_job.py"))["run"](inputs)


@pytest.mark.slow
@needs_compiler
def test_a_program_links_the_kernels(alone, tmp_path):
    run("cmake", "-S", Path(__file__).parent / "consumer", "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={alone}")
    run("cmake", "--build", tmp_path)
    said = run(tmp_path / "consumer")
    assert said == "-2 6 14 22 | columns: must lie in [0, 4), got 9\n"


@pytest.mark.slow
@needs_compiler
def test_the_example_prints_what_python_does(request, inputs, tmp_path):
    package = INSTALLED if INSTALLED.is_dir() else request.getfixturevalue("alone")
    run("cmake", "-S", EXAMPLE, "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={package}")
    run("cmake", "--build", tmp_path)
    assert run(tmp_path / "small_job", inputs).splitlines() == lines_of_python(inputs)
    wrong = subprocess.run([tmp_path / "small_job", tmp_path], capture_output=True, text=True)
    assert wrong.returncode == 1
    assert wrong.stderr == f"small_job: {tmp_path}: no block_0\n"


def numbers(lines: list[str]) -> tuple[list[str], list[float]]:
    """The words of the lines, and their fractions: attributions, gates, fitness, rates."""
    words = " ".join(lines).split()
    return [word for word in words if "." not in word], [float(word) for word in words if "." in word]


@pytest.mark.skipif(not EMULATED.exists(), reason="built without SPURGE_EMULATION")
def test_the_example_with_cuda_kernels_prints_what_python_does(inputs):
    words, fractions = numbers(run(EMULATED, inputs, "cuda").splitlines())
    python_words, python_fractions = numbers(lines_of_python(inputs))
    assert words == python_words
    assert fractions == pytest.approx(python_fractions, rel=1e-5)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_the_example_compiles_with_cuda(tmp_path):
    place = "-I", ROOT / "include", "-o", tmp_path / "small_job.o"
    run("nvcc", "-std=c++17", "-DSPURGE_HAS_CUDA", "-c", EXAMPLE / "small_job.cpp", *place)


def test_the_folder_of_the_package_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(parser, "__file__", str(tmp_path / "spurge" / "cli" / "parser.py"))
    assert main(["--cmake-dir"]) == 2
    assert capsys.readouterr().err == (
        "spurge: error: --cmake-dir: this copy of spurge was not installed, and has no CMake package "
        "(see spurge --help)\n"
    )
    folder = tmp_path.resolve() / "spurge" / "lib" / "cmake" / "spurge"
    folder.mkdir(parents=True)
    assert main(["--cmake-dir"]) == 0
    assert capsys.readouterr().out == f"{folder}\n"
