"""Equations as MathML, written while the pages are built: browsers show them without a script from elsewhere."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


def on_page_content(content: str, **_: Any) -> str:
    """Called by mkdocs with a page's HTML."""
    return _EQUATION.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    tag, equation = match.groups()
    written = convert(html.unescape(equation).strip(), display="block" if tag == "div" else "inline")
    return f'<{tag} class="equation">{written}</{tag}>'
