"""The house rules that a reader should be able to rely on: who may import whom, and who sees what."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "spurge"

# Imports run downwards only. Faces and the package's own front door stand on top.
FLOORS = [
    {"__init__", "__main__", "cli", "demo", "doctor"},
    {"report"},
    {"methods"},
    {"engine"},
    {"ops"},
    {"reference", "_core"},
]
LEVEL = {name: -i for i, names in enumerate(FLOORS) for name in names}

# Within the engine: what may never be imported by what comes before it.
ENGINE = ["files", "sites", "scores", "edits", "evaluation"]


def imports(path: Path) -> set[str]:
    """Dotted names inside spurge that a module imports, those in functions included, those for types not."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    package = parts[:-1]
    found: set[str] = set()

    class Visitor(ast.NodeVisitor):
        def visit_If(self, node: ast.If) -> None:
            if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
                self.generic_visit(node)

        def visit_Import(self, node: ast.Import) -> None:
            found.update(a.name for a in node.names)

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            found.update(".".join([*base, a.name]) for a in node.names)

    Visitor().visit(ast.parse(path.read_text()))
    return {name for name in found if name.split(".")[0] == "spurge" and name != "spurge"}


MODULES = sorted(PACKAGE.rglob("*.py"))


def floor(name: str) -> str:
    """The floor's name: the first part below spurge; a name that spurge itself re-exports counts as its front door."""
    first = name.split(".")[1]
    return first if first in LEVEL else "__init__"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downwards(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    assert parts[0] in LEVEL, f"{parts[0]} has no floor: add it to FLOORS"
    for name in imports(path):
        if name == "spurge.__version__":
            continue
        assert LEVEL[floor(name)] <= LEVEL[parts[0]], f"{'/'.join(parts)} imports {name} from a floor above"


def test_the_engine_is_ordered():
    for i, low in enumerate(ENGINE):
        taken = {name.split(".")[2] for name in imports(PACKAGE / "engine" / f"{low}.py") if name.count(".") >= 2}
        above = taken & set(ENGINE[i + 1 :])
        assert not above, f"engine/{low}.py imports {sorted(above)}"


def test_methods_do_not_import_torch_internals():
    for path in MODULES:
        private = re.findall(r"^\s*(?:from|import) torch\._[a-z]\S*", path.read_text(), re.MULTILINE)
        assert not private, f"{path.name}: {private}"


SOURCES = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".hpp", ".cpp", ".cu", ".cuh", ".h"}]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_bindings_see_python_and_nothing_sees_torch(path):
    included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)
    assert not [i for i in included if i.startswith(("torch/", "ATen/", "c10/"))]
    if "bindings" not in path.parts:
        assert not [i for i in included if i.startswith(("pybind11", "bindings/")) or i == "Python.h"]
    if path.suffix in {".hpp", ".cpp"} and "cuda" not in path.parts:
        assert not [i for i in included if i.startswith("cuda")]


INNER = [p for p in SOURCES if p.name.endswith("_simd.cpp") or p.match("core/simd*.hpp")]


@pytest.mark.parametrize("path", INNER, ids=lambda p: p.name)
def test_code_of_one_instruction_set_includes_nothing_it_could_share(path):
    """A std:: template compiled here for AVX-512 could be linked in place of the common one."""
    allowed = {"core/simd.hpp", "core/half.hpp", "core/philox.hpp", "cstdint", "cstddef", "immintrin.h"}
    stem = path.stem.removesuffix("_simd")
    allowed |= {f"ops/{stem}/{stem}.hpp", f"ops/{stem}/{stem}_math.hpp"}
    if path.parent.name == "core":
        allowed |= {f"core/simd_{part}.hpp" for part in ("avx512", "avx2", "registers", "arrays")}
    assert set(re.findall(r'^#include [<"]([^>"]+)', path.read_text(), re.MULTILINE)) <= allowed


def test_the_face_is_plain_cpp():
    for path in (ROOT / "include").rglob("*.hpp"):
        included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)
        assert all(i.startswith("spurge/") or "/" not in i for i in included), path.name
