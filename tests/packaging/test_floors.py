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
    {"__init__", "__main__", "bench", "cli", "demo", "doctor"},
    {"report"},
    {"methods"},
    {"engine"},
    {"ops"},
    {"reference", "_core"},
]
LEVEL = {name: -i for i, names in enumerate(FLOORS) for name in names}

# The rooms of the engine, from the one that knows least upwards: a room imports from itself and from those before it.
ROOMS = [
    "base",
    "data",
    "models",
    "causal",
    "passes",
    "cascade",
    "edits",
    "recordings",
    "features",
    "last_layer",
    "planning",
    "evaluation",
]
METHODS = {"golden", "find", "macu", "fcr", "neurontune", "mediation"}
SHARED_METHOD = "golden"  # the only one that other methods may import
MOST_FILES = 16  # of a room of the engine, besides __init__
MOST_LINES = 450  # of a module
MOST_CODE = 65  # lines of a function, its docstring apart: of a public one that is half a page of shapes and errors
LONG = {"reference.py", "_core.pyi"}  # one twin for every kernel: read by name, not from end to end

# What a command line needs to be parsed: nothing of it may load torch, so that --help is instant.
TORCH_FREE = [
    "cli.__init__",
    "cli.parser",
    "cli.wording",
    *sorted(f"cli.{p.stem}" for p in (PACKAGE / "cli").glob("arguments*.py")),
]


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


def rooms(path: Path, of: str) -> set[str]:
    """The rooms of a floor that a module imports from."""
    return {name.split(".")[2] for name in imports(path) if name.split(".")[1] == of and name.count(".") >= 2}


@pytest.mark.parametrize("room", ROOMS)
def test_the_rooms_of_the_engine_are_ordered(room):
    above = set(ROOMS[ROOMS.index(room) + 1 :])
    for path in (PACKAGE / "engine" / room).rglob("*.py"):
        assert not rooms(path, "engine") & above, f"engine/{room}/{path.name} imports a room that comes after it"


@pytest.mark.parametrize("room", sorted(METHODS))
def test_a_method_imports_no_other_but_golden(room):
    for path in (PACKAGE / "methods" / room).rglob("*.py"):
        others = rooms(path, "methods") - {room, SHARED_METHOD}
        assert not others, f"methods/{room}/{path.name} imports {sorted(others)}"


def test_every_module_has_a_room():
    for floor, known in (("engine", set(ROOMS)), ("methods", METHODS)):
        found = {p.name for p in (PACKAGE / floor).iterdir() if p.name not in {"__init__.py", "__pycache__"}}
        assert found == known


@pytest.mark.parametrize("room", [f"engine/{name}" for name in ROOMS] + [f"methods/{name}" for name in sorted(METHODS)])
def test_a_room_has_a_caption_and_is_not_crowded(room):
    caption = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))
    assert caption
    assert "\n" not in caption
    assert len(list((PACKAGE / room).glob("*.py"))) - 1 <= MOST_FILES


@pytest.mark.parametrize("path", [p for p in MODULES if p.name not in LONG], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_can_be_read_at_one_sitting(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from ``def`` to the end, without the docstring."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function, clean=False) is not None:
        lines -= function.body[0].end_lineno - function.body[0].lineno + 1
    return lines


@pytest.mark.parametrize("path", [p for p in MODULES if p.name not in LONG], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_function_reads_in_steps(path):
    functions = [
        n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = {function.name: code_lines(function) for function in functions if code_lines(function) > MOST_CODE}
    assert not long, f"more than {MOST_CODE} lines of code: {long}"


def loaded_by(module: str, seen: set[str]) -> set[str]:
    """All modules that importing ``module`` of the package loads, outside functions."""
    path = PACKAGE / (module.replace(".", "/") + ".py")
    if module in seen or not path.exists():
        return seen
    seen.add(module)
    for node in ast.parse(path.read_text()).body:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            first, _, rest = name.partition(".")
            if first == "spurge" and rest:
                loaded_by(rest, seen)
            else:
                seen.add(first)
    return seen


@pytest.mark.parametrize("module", TORCH_FREE)
def test_arguments_need_no_torch(module):
    assert not loaded_by(module, set()) & {"torch", "transformers", "numpy"}


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
