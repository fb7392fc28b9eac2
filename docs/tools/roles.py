"""Docstrings, written in the roles of reStructuredText, as the Markdown that the pages are rendered from."""

from __future__ import annotations

import re
from textwrap import dedent, indent
from typing import Any

from griffe import Class, Extension, Function, Module

_DISPLAY = re.compile(r"^( *)\.\. math:: ?(.*(?:\n\1 {2,}\S.*)*)", re.M)
_INLINE = re.compile(r":math:`([^`]+)`")
_ROLE = re.compile(r":(?:py:)?(?:mod|class|func|meth|attr|data|exc|obj):`~?([^`]+)`")
_LITERAL = re.compile(r"``(.+?)``", re.S)


def markdown(text: str) -> str:
    """A docstring's text in Markdown.

    >>> markdown("As :meth:`edit`, :math:`x^2` of ``[N]``.")
    'As `edit`, $x^2$ of `[N]`.'
    """
    text = _DISPLAY.sub(_display, text)
    text = _INLINE.sub(r"$\1$", text)
    return _LITERAL.sub(r"`\1`", _ROLE.sub(r"`\1`", text))


def _display(match: re.Match[str]) -> str:
    space, equation = match.groups()
    return indent("$$\n" + dedent(equation.replace("\n" + space, "\n")).strip() + "\n$$", space) + "\n"


class Roles(Extension):
    """Rewrites every docstring before it is parsed."""

    def on_module(self, *, mod: Module, **_: Any) -> None:
        _rewrite(mod)

    def on_class(self, *, cls: Class, **_: Any) -> None:
        _rewrite(cls)

    def on_function(self, *, func: Function, **_: Any) -> None:
        _rewrite(func)


def _rewrite(item: Module | Class | Function) -> None:
    if item.docstring is not None:
        item.docstring.value = markdown(item.docstring.value)
