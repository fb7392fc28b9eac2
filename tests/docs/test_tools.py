"""What the documentation is built with: roles of docstrings as Markdown, equations as MathML."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[2] / "docs" / "tools"


def tool(name: str, needs: str) -> ModuleType:
    pytest.importorskip(needs)
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "written, read",
    [
        ("As :meth:`edit` and :func:`~spurge.balance`.", "As `edit` and `spurge.balance`."),
        ("``[N, K]`` of :math:`w_i`", "`[N, K]` of $w_i$"),
        ("A:\n\n.. math:: a = b\n\nB", "A:\n\n$$\na = b\n$$\n\n\nB"),
        ("    .. math:: a\n        + b\n\n    B", "    $$\n    a\n        + b\n    $$\n\n\n    B"),
        (".. math::\n    a, \\\n    b\n", "$$\na, \\\nb\n$$\n\n"),
        ("plain", "plain"),
    ],
)
def test_roles_become_markdown(written, read):
    assert tool("roles", "griffe").markdown(written) == read


def test_equations_become_mathml():
    page = '<p>1 <span class="arithmatex">\\(a &lt; b\\)</span></p><div class="arithmatex">\\[\n\\frac{a}{b}\n\\]</div>'
    written = tool("equations", "latex2mathml").on_page_content(page)
    assert "arithmatex" not in written
    assert '<span class="equation"><math' in written
    assert 'display="block"' in written
    assert "<mfrac>" in written
    assert "&lt;" in written or "&#x0003C;" in written
