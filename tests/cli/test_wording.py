"""Sentences of the package in the words of the command line."""

from __future__ import annotations

import pytest

from spurge.cli.wording import in_options


@pytest.mark.parametrize(
    ("command", "text", "wanted"),
    [
        ("edit", "edit_texts: need at least 1, got 0", "--texts: need at least 1, got 0"),
        ("neurontune", "select: raise it, or signs='split'", "--criterion: raise it, or --signs split"),
        ("apply", "edit: made for it; force=True applies it", "--edit: made for it; --force applies it"),
        ("evaluate", "quoting=False, else quoting=True", "--no-quotes, else --quotes"),
        ("features", "a.tsv: row 1: it runs on; quoting=False", "a.tsv: row 1: it runs on; --no-quotes"),
        ("mediate", "topic-column, embedder: give one", "--topic-column, --embedder: give one"),
        ("mediate", "label: must lie in 0 to 1, got 2", "--scorer-label: must lie in 0 to 1, got 2"),
        ("locate", "search: use search='pso'", "search: use search='pso'"),  # it has no such option
        ("locate", "model: gives tokens; see spurge.Verbalizer", "--model: gives tokens; see --verbalizer"),
        ("plan", "max_length: cut with max_length=512", "--max-length: cut with --max-length 512"),
        ("locate", "rows.csv: row 2: label 'x' is none of ('a',)", "rows.csv: row 2: label 'x' is none of ('a',)"),
        ("fcr", "something else", "something else"),
    ],
)
def test_arguments_become_options(command: str, text: str, wanted: str) -> None:
    assert in_options(text, command) == wanted
