"""Pages of the documentation as programs: their ``python`` and ``bash`` blocks, run in the order of the page."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from textwrap import dedent
from typing import Any

_BLOCK = re.compile(r"^( *)```(python|bash)[^\n]*\n(.*?)^\1```", re.M | re.S)
_HEAD = re.compile(r"\A---\n(.*?)\n---\n", re.S)
_FIELD = re.compile(r"^(\w+): *(.*)$", re.M)


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        language: python or bash.
        line: of the page where its code begins.
        code: without the page's indentation.
    """

    language: str
    line: int
    code: str


@dataclass(frozen=True)
class Page:
    """A page of Markdown. What is between ``---`` at its top says what it needs.

    ``needs``: modules, separated by commas, without which it cannot run. ``after``: the page whose folder and names it
    goes on with. ``data``: a file that is no part of the project; a test of its own runs such a page on other data.
    """

    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def head(self) -> Mapping[str, str]:
        found = _HEAD.match(self.text)
        return dict(_FIELD.findall(found[1])) if found else {}

    @property
    def needs(self) -> list[str]:
        return [name.strip() for name in self.head.get("needs", "").split(",") if name.strip()]

    @property
    def after(self) -> str | None:
        return self.head.get("after")

    @property
    def data(self) -> str | None:
        return self.head.get("data")

    @property
    def blocks(self) -> list[Block]:
        return [
            Block(found[2], self.text.count("\n", 0, found.start(3)) + 1, dedent(found[3]))
            for found in _BLOCK.finditer(self.text)
        ]


@dataclass
class Runner:
    """Runs pages in one folder; names of Python stay from page to page.

    Attributes:
        folder: where the blocks run. ``bin`` in it holds the command ``spurge``.
        names: what the blocks have defined.
    """

    folder: Path
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})

    def __post_init__(self) -> None:
        command = self.folder / "bin" / "spurge"
        command.parent.mkdir(exist_ok=True)
        command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m spurge "$@"\n', encoding="utf-8")
        command.chmod(0o755)

    def run(self, page: Page) -> Iterator[tuple[Block, str]]:
        """Each block with what it printed; raises where one fails, with the page and line."""
        for block in page.blocks:
            run = self._python if block.language == "python" else self._bash
            try:
                printed = run(page, block)
            except Exception as error:
                raise AssertionError(f"{page.path.name}:{block.line}: {type(error).__name__}: {error}") from error
            yield block, printed

    def _python(self, page: Page, block: Block) -> str:
        code = compile("\n" * (block.line - 1) + block.code, str(page.path), "exec")
        with _within(self.folder), contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, self.names)
        return printed.getvalue()

    def _bash(self, page: Page, block: Block) -> str:
        path = os.pathsep.join([str(self.folder / "bin"), os.environ.get("PATH", "")])
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.code],
            cwd=self.folder,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout


@contextlib.contextmanager
def _within(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
