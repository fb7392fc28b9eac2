"""Options and the settings that they stand for."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import spurge.cli
from spurge.cli.arguments import given
from spurge.cli.arguments_last_layer import FCR_SETTINGS, NEURONTUNE_SETTINGS
from spurge.cli.arguments_macu import CASCADE_SETTINGS, MACU_SETTINGS
from spurge.cli.arguments_mediation import MEDIATION_SETTINGS
from spurge.cli.parser import COMMANDS, build_parser
from spurge.engine.cascade.cascade import Cascade
from spurge.methods.fcr.fcr import FCR
from spurge.methods.macu.macu import MacU
from spurge.methods.mediation.mediation import Mediation
from spurge.methods.neurontune.neurontune import NeuronTune

MINIMAL = {
    "locate": "--model m --data d --golden g --out o",
    "plan": "--model m",
    "edit": "--model m --data d --golden g --located l --out o",
    "fcr": "--features f --remove-class c --out o",
    "neurontune": "--features f",
    "mediate": "--model m --data d --treatment-column t --outcome-column y --recording r --out o",
}


def options(command: str) -> set[str]:
    """Names of what a command's parser gives."""
    return set(vars(build_parser().parse_args([command, *MINIMAL[command].split()])))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_a_module(command: str) -> None:
    assert callable(importlib.import_module(f"spurge.cli.{command}").run)


def test_a_module_is_a_command_or_its_arguments() -> None:
    modules = {path.stem for path in Path(spurge.cli.__file__).parent.glob("*.py") if path.stem != "__init__"}
    assert {name for name in modules - {*COMMANDS} if not name.startswith("arguments")} == {
        *("parser", "wording", "inputs", "model_folders")
    }


@pytest.mark.parametrize(
    ("settings", "commands", "method"),
    [
        (MACU_SETTINGS, ("locate", "edit"), MacU),
        (CASCADE_SETTINGS, ("plan",), Cascade),
        (FCR_SETTINGS, ("fcr",), FCR),
        (NEURONTUNE_SETTINGS, ("neurontune",), NeuronTune),
        (MEDIATION_SETTINGS, ("mediate",), Mediation),
    ],
)
def test_settings_are_options_and_parameters(
    settings: tuple[str, ...], commands: tuple[str, ...], method: Callable[..., Any]
) -> None:
    assert set(settings) <= set().union(*map(options, commands))
    assert set(settings) <= set(inspect.signature(method).parameters)


def test_only_what_was_given_counts() -> None:
    arguments = build_parser().parse_args(["locate", *MINIMAL["locate"].split(), "--nodes", "3", "--top-k", "0"])
    assert given(arguments, MACU_SETTINGS) == {"nodes": 3, "top_k": 0}
