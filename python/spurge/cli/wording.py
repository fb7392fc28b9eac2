"""Sentences of the package in the words of the command line: options in place of arguments; loads nothing heavy."""

from __future__ import annotations

import argparse
import re

from spurge.cli.arguments import add_running
from spurge.cli.parser import COMMANDS

#: Arguments of functions that a command's option has another name for: to the destination of that option.
_OTHER_NAMES = {
    "mediate": {
        "label": "scorer_label",
        "prompts": "data",
        "outcome": "outcome_column",
        "treatment": "treatment_column",
    },
    "export": {"folder": "out"},
    "evaluate": {"tests": "data", "test": "data"},
    "find": {"examples": "data", "path": "out"},
    "locate": {"train": "data"},
    "edit": {"train": "data"},
}
_VALUE = r"('[^']*'|\"[^\"]*\"|[\w.+-]*\w)"


def in_options(text: str, command: str) -> str:
    """A message with the command's options for the arguments that it names.

    >>> in_options("edit_texts: need at least 1, got 0; use search='pso'", "edit")
    '--texts: need at least 1, got 0; use --search pso'
    >>> in_options("quoting=False takes quotes as text", "evaluate")
    '--no-quotes takes quotes as text'
    """
    options = _options(command)
    subject, colon, rest = text.partition(": ")
    names = [name.replace("-", "_") for name in subject.split(", ")]
    if colon and all(name in options for name in names):
        text = ", ".join(_name(options[name]) for name in names) + colon + rest
    text = re.sub(
        rf"(?<![\w-])({'|'.join(options)})={_VALUE}", lambda match: _given(options[match[1]], match[0], match[2]), text
    )
    if "verbalizer" in options:
        text = text.replace("see spurge.Verbalizer", "see --verbalizer")
    return text


def _options(command: str) -> dict[str, argparse.Action]:
    """The command's options by what they set, by their own name, and by the names that functions have for them."""
    parser = argparse.ArgumentParser(add_help=False)
    COMMANDS[command][1](parser)
    add_running(parser)
    found: dict[str, argparse.Action] = {}
    for action in parser._actions:
        found[_name(action).removeprefix("--").replace("-", "_")] = action
        found[action.dest] = action
    others = {"quoting": "quotes"} | _OTHER_NAMES.get(command, {})
    return found | {name: found[other] for name, other in others.items() if other in found and name not in found}


def _name(action: argparse.Action) -> str:
    return action.option_strings[0] if action.option_strings else str(action.metavar)


def _given(action: argparse.Action, text: str, value: str) -> str:
    """``name=value`` as somebody would type it."""
    value = value.strip("'\"")
    if isinstance(action, argparse.BooleanOptionalAction):
        return action.option_strings[0 if value == "True" else 1]
    if action.nargs == 0:
        return _name(action) if value == "True" else text
    return f"{_name(action)} {value}"
