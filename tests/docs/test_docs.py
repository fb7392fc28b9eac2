"""Every block of code in the documentation runs, page by page, and the README's list of names is the package's."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from helpers.pages import Page, Runner

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {str(path.relative_to(DOCS)): Page(path) for path in sorted(DOCS.rglob("*.md"))}
FIRST = [name for name, page in PAGES.items() if page.blocks and page.after is None]


def test_pages_go_on_with_pages_that_exist():
    assert {page.after for page in PAGES.values() if page.after} <= set(FIRST)


@pytest.mark.slow
@pytest.mark.parametrize("first", FIRST)
def test_every_block_runs(first, tmp_path):
    """A page, and the pages that go on with its folder and names."""
    runner = Runner(tmp_path)
    pages = [PAGES[first], *(page for page in PAGES.values() if page.after == first and page.blocks)]
    for page in pages:
        missing = [name for name in page.needs if importlib.util.find_spec(name) is None]
        if missing:
            pytest.skip(f"{missing[0]} is not installed")
        for _ in runner.run(page):
            pass
