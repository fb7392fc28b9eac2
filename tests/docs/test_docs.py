"""Every block of code in the documentation runs, page by page; of the README's all are read as what they are."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from helpers.pages import Page, Runner
from spurge.cli.parser import build_parser

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): Page(path) for path in sorted(DOCS.rglob("*.md"))}
FIRST = [name for name, page in PAGES.items() if page.blocks and page.after is None and page.data is None]
WITH_DATA = [page for page in PAGES.values() if page.data]
README = Page(ROOT / "README.md")


def test_pages_go_on_with_pages_that_exist():
    assert {page.after for page in PAGES.values() if page.after} <= set(FIRST)


def lacking(page):
    """Modules that a page needs and that are not installed."""
    return [name for name in page.needs if importlib.util.find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.parametrize("first", FIRST)
def test_every_block_runs(first, tmp_path):
    """A page, and the pages that go on with its folder and names; one whose packages are missing is left out."""
    if missing := lacking(PAGES[first]):
        pytest.skip(f"{missing[0]} is not installed")
    runner = Runner(tmp_path)
    for page in [PAGES[first], *(page for page in PAGES.values() if page.after == first and not lacking(page))]:
        for _ in runner.run(page):
            pass


@pytest.mark.parametrize(
    ("page", "block"),
    [(page, block) for page in (README, *WITH_DATA) for block in page.blocks],
    ids=lambda one: one.path.name if isinstance(one, Page) else f"line {one.line}",
)
def test_a_page_that_is_not_run_shows_code_and_commands_that_exist(page, block):
    if block.language == "python":
        compile(block.code, page.path.name, "exec")
        return
    for line in block.code.replace("\\\n", " ").splitlines():
        for command in re.split(r"&&|;", line):
            words = shlex.split(command, comments=True)
            if words[:1] == ["spurge"]:
                build_parser().parse_args(words[1:])
