"""The parser of the command line: which commands there are. Nothing heavy is imported, as in the arguments."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from spurge.cli.arguments import add_running
from spurge.cli.arguments_edits import add_apply, add_evaluate, add_export, add_report
from spurge.cli.arguments_find import add_find
from spurge.cli.arguments_last_layer import add_fcr, add_features, add_neurontune
from spurge.cli.arguments_macu import add_edit, add_locate, add_plan
from spurge.cli.arguments_mediation import add_mediate
from spurge.cli.arguments_setup import add_bench, add_demo, add_doctor
from spurge.engine.base.ranks import ProcessRank

#: Name of each command, which is that of its module too, to its line in the list and its arguments.
COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "demo": ("teach a small model a shortcut, find it, cut it and measure (3 minutes)", add_demo),
    "find": ("rank what a classifier leans on, for review", add_find),
    "locate": ("score all neurons of a classifier by golden words", add_locate),
    "plan": ("what locating will take: rows, memory, time", add_plan),
    "edit": ("find gates for located neurons", add_edit),
    "evaluate": ("accuracy with and without an edit, with controls", add_evaluate),
    "report": ("one page of what was found, edited and measured", add_report),
    "apply": ("fold an edit into a copy of a model's folder", add_apply),
    "export": ("write an edit as an adapter that peft loads", add_export),
    "features": ("write what the last layer of a classifier reads", add_features),
    "mediate": ("effects of units, adjusted for the topic", add_mediate),
    "fcr": ("remove a class or feature by single weights", add_fcr),
    "neurontune": ("suppress spurious features, retrain", add_neurontune),
    "bench": ("how fast the kernels are here (2 minutes)", add_bench),
    "doctor": ("what was built, what works, and what is wrong", add_doctor),
}


_GIVEN = "options_given"  # of a namespace: the destinations that have a value already


class _Once(argparse._StoreAction):
    """Stores a value, and refuses a second one: which of them counts would be a guess."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *values: Any) -> None:
        given = vars(namespace).setdefault(_GIVEN, set())
        if self.dest in given:
            raise argparse.ArgumentError(self, "given twice, expected once")
        given.add(self.dest)
        super().__call__(parser, namespace, *values)


class Parser(argparse.ArgumentParser):
    """Errors in one line, in the words of all other errors; an option that is given twice is one."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        for name in (None, "store"):
            self.register("action", name, _Once)

    def error(self, message: str) -> NoReturn:
        if ProcessRank.from_environment().rank == 0:
            print(f"spurge: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


class Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        try:
            print(f"spurge {importlib.metadata.version('spurge')}")
        except importlib.metadata.PackageNotFoundError:
            print("spurge, from a source tree")
        parser.exit()


class CMakeFolder(argparse.Action):
    """Prints the folder of the CMake package that programs in C++ find; where the wheel laid it, beside the modules."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        folder = Path(__file__).resolve().parents[1] / "lib" / "cmake" / "spurge"
        if not folder.is_dir():
            parser.error("--cmake-dir: this copy of spurge was not installed, and has no CMake package")
        print(folder)
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``spurge`` and its commands; ``arguments.command`` names the module that runs."""
    parser = Parser(
        prog="spurge",
        description="Find the neurons that carry a spurious correlation in a trained model, edit them, and measure "
        "what the edit did.",
        epilog="spurge COMMAND --help tells the arguments of a command. Start with: spurge demo",
    )
    parser.add_argument("--version", action=Version, nargs=0, help="print the version and stop")
    parser.add_argument(
        "--cmake-dir", action=CMakeFolder, nargs=0, help="print the folder of the CMake package and stop"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for name, (summary, add_arguments) in COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        add_arguments(command)
        add_running(command)
    return parser
