"""The names of ``import spurge``: one table, which the package, type checkers and the documents agree with."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name

import pytest

import spurge

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "spurge"
MOST_NAMES = 44  # what scripts need; the rest is imported from its module

TABLE = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8")).body
HOMES = {alias.name: node.module for node in TABLE if isinstance(node, ast.ImportFrom) for alias in node.names}

ROOMS = ("bench", "csrc", "docs")
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *(path for room in ROOMS for path in sorted((ROOT / room).rglob("*.md")))]
SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_there_are_few_names():
    assert len(HOMES) <= MOST_NAMES


def test_the_package_exports_the_table():
    assert sorted(spurge.__all__) == sorted(["__version__", *HOMES])
    assert dir(spurge) == sorted(spurge.__all__)


@pytest.mark.parametrize("name", HOMES)
def test_a_name_is_its_modules(name):
    value = getattr(spurge, name)
    assert value is getattr(import_module(HOMES[name]), name)
    assert value.__module__ == HOMES[name]  # where it is defined, not a module that passes it on


def test_an_unknown_name_is_an_error():
    with pytest.raises(AttributeError, match="module 'spurge' has no attribute 'Nothing'"):
        spurge.Nothing  # noqa: B018


def test_type_checkers_take_every_name_as_exported():
    """In a stub only ``import X as X`` exports."""
    *imports, version = TABLE
    assert ast.unparse(version) == "__version__: str"
    for node in imports:
        assert isinstance(node, ast.ImportFrom)
        assert node.level == 0
        assert all(alias.asname == alias.name for alias in node.names)


def test_the_readme_and_help_list_every_name():
    section = re.search(r"^## The names\n(.*?)^## ", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert section
    rows = [line for line in section[1].splitlines() if line.startswith("|")]
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(listed) == sorted(HOMES)
    groups = [" ".join(re.findall(r"[\w ]+", row)).split() for row in rows[2:]]
    assert spurge.__doc__ is not None
    assert re.search(r"::\n\n(.*?)\n\n", spurge.__doc__, re.S)[1].split() == [word for row in groups for word in row]


@pytest.mark.parametrize("path", [*DOCUMENTS, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_text_mentions_only_what_exists(path):
    """Dotted paths from ``spurge`` on, and imports."""
    text = path.read_text(encoding="utf-8")
    mentioned = set(re.findall(r"(?<![\w./])spurge(?:\.[A-Za-z_]\w*)+", text))
    for module, names in re.findall(r"from (spurge[\w.]*) import (\w+(?:, \w+)*)", text):
        mentioned |= {f"{module}.{name}" for name in names.split(", ")}
    for name in sorted(mentioned):
        resolve_name(name)


def links(path: Path) -> set[str]:
    """Files that a document links to or names, but patterns and addresses."""
    text = path.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)", text)
    targets += re.findall(r"`([\w.-]+(?:/[\w.-]+)+\.(?:py|pyi|hpp|cpp|cu|cuh|md|json|sh))`", text)
    return {target for target in targets if "://" not in target}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_names_only_files_that_exist(path):
    for target in sorted(links(path)):
        assert any((root / target).exists() for root in (path.parent, ROOT, PACKAGE)), target
