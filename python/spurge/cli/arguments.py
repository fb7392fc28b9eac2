"""Arguments that several commands have. Nothing heavy is imported here or in the groups of arguments, so that
``spurge --help`` answers at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

Container = argparse.ArgumentParser | argparse._ArgumentGroup


def add_model(
    parser: Container,
    *,
    verbalizer: bool = False,
    what: str = "transformers folder of a sequence classifier",
    required: bool = True,
) -> None:
    """The model of ``--model``, where it runs, and in which type."""
    parser.add_argument("--model", metavar="FOLDER", required=required, help=what)
    if verbalizer:
        words = "label words and prompt (JSON): the model is a causal language model that classifies by them"
        parser.add_argument("--verbalizer", metavar="FILE", help=words)
    parser.add_argument(
        "--device", default="cpu", metavar="NAME", help="cpu, cuda (a rank: its own) or cuda:N (%(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "float64"),
        help="load weights as this type; default float32, or the type an edit was made for",
    )


def add_features_device(parser: Container) -> None:
    """Where features are taken, and all is computed from them."""
    parser.add_argument(
        "--device", default="cpu", metavar="NAME", help="cpu, cuda or cuda:N: where to work (%(default)s)"
    )


def add_data(
    parser: argparse.ArgumentParser,
    *,
    several: bool = False,
    groups: bool = False,
    weights: bool = False,
    required: bool = True,
) -> None:
    """Labelled texts of one file, or of ``several``, and their columns."""
    group = parser.add_argument_group("data", "CSV, TSV or JSONL, also .gz, .xz or .bz2")
    if several:
        sets = "test set, as often as there are sets; without NAME= it is called by its file"
        group.add_argument("--data", metavar="NAME=FILE", required=True, action="append", help=sets)
    else:
        group.add_argument("--data", metavar="FILE", required=required, help="labelled texts")
    group.add_argument("--text-column", default="text", metavar="NAME", help="column of the texts (%(default)s)")
    group.add_argument("--pair-column", metavar="NAME", help="column of second texts (premise and hypothesis)")
    group.add_argument("--label-column", default="label", metavar="NAME", help="column of the labels (%(default)s)")
    if several or groups:
        group.add_argument("--group-column", metavar="NAME", help="column of groups, for the worst group's accuracy")
        several_groups = "what stands between several groups of one text, such as ';'"
        group.add_argument("--group-separator", metavar="TEXT", help=several_groups)
    if weights:
        group.add_argument("--weight-column", metavar="NAME", help="column of how much each text counts, at least 0")
    group.add_argument("--split", metavar="NAME", help="only rows whose column 'split' has this value")
    group.add_argument("--limit", type=positive, metavar="N", help="only the first N rows")
    group.add_argument("--labels", metavar="A,B", help="names of the labels in the order of the model's outputs")
    add_quotes(group)


def add_quotes(parser: Container) -> None:
    """How quotes in CSV and TSV are read."""
    parser.add_argument(
        "--quotes",
        action=argparse.BooleanOptionalAction,
        help="of CSV and TSV: quotes enclose fields, also over line breaks, or are text; default: they enclose, and "
        "what could be either is refused",
    )


def add_golden(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Golden words, from a file or from a lexicon."""
    group = parser.add_argument_group("golden words", None if required else "for eta, proximity to spurious words")
    choice = group.add_mutually_exclusive_group(required=required)
    choice.add_argument("--golden", metavar="FILE", help="golden words: JSON, or a reviewed table")
    choice.add_argument("--lexicon", metavar="NAME|FILE", help="vader or afinn if installed, or a table of words")


def add_running(parser: argparse.ArgumentParser) -> None:
    """What every command has."""
    group = parser.add_argument_group("output and running")
    group.add_argument("--json", metavar="FILE", help="also write the numbers as JSON")
    group.add_argument("--seed", type=_natural, default=0, metavar="N", help="of all random choices (%(default)s)")
    group.add_argument("--threads", type=positive, metavar="N", help="CPU threads; default all cores")
    group.add_argument("--quiet", action="store_true", help="no progress bars")
    group.add_argument("--debug", action="store_true", help="show tracebacks")


def _natural(text: str) -> int:
    return _at_least(text, 0)


def positive(text: str) -> int:
    return _at_least(text, 1)


def _at_least(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return value


def given(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Those of the named arguments that the user gave."""
    values = {name: getattr(arguments, name, None) for name in names}
    return {name: value for name, value in values.items() if value is not None}
