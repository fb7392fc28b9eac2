"""Arguments of the commands. Nothing heavy is imported here, so that ``spurge --help`` answers at once."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from spurge.cli.arguments_last_layer import fcr_arguments, features_arguments, neurontune_arguments
from spurge.cli.arguments_mediation import mediate_arguments
from spurge.engine.base.ranks import Place

_Group = argparse.ArgumentParser | argparse._ArgumentGroup


class _Parser(argparse.ArgumentParser):
    """Errors in one line, in the words of all other errors."""

    def error(self, message: str) -> NoReturn:
        if Place.from_environment().rank == 0:
            print(f"spurge: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        try:
            print(f"spurge {importlib.metadata.version('spurge')}")
        except importlib.metadata.PackageNotFoundError:
            print("spurge, from a source tree")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``spurge`` and its commands; ``arguments.command`` names the module that runs."""
    parser = _Parser(
        prog="spurge",
        description="Find the neurons that carry a spurious correlation in a trained model, edit them, and measure "
        "what the edit did.",
        epilog="spurge COMMAND --help tells the arguments of a command. Start with: spurge demo",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and stop")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    _demo(commands.add_parser("demo", help="teach a small model a shortcut, find it, cut it and measure (3 minutes)"))
    _locate(commands.add_parser("locate", help="score all neurons of a classifier by golden words"))
    _plan(commands.add_parser("plan", help="what locating will take: rows, memory, time"))
    _edit(commands.add_parser("edit", help="find gates for located neurons"))
    _evaluate(commands.add_parser("evaluate", help="accuracy with and without an edit, with controls"))
    _apply(commands.add_parser("apply", help="fold an edit into a copy of a model's folder"))
    _features(commands.add_parser("features", help="write what the last layer of a classifier reads"))
    _with_common(mediate_arguments, commands.add_parser("mediate", help="effects of units, adjusted for the topic"))
    _with_common(fcr_arguments, commands.add_parser("fcr", help="remove a class or feature by single weights"))
    _with_common(neurontune_arguments, commands.add_parser("neurontune", help="suppress spurious features, retrain"))
    _doctor(commands.add_parser("doctor", help="what was built, what works, and what is wrong"))
    return parser


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Fine-tunes a small language model on sentences with a planted shortcut, locates the neurons that carry it, "
        "edits them by the paper's procedure and by the best setting, and measures both with their controls."
    )
    parser.add_argument("--out", metavar="DIR", default="spurge-demo", help="folder for all files (%(default)s)")
    parser.add_argument("--keep-model", action="store_true", help="also write the fine-tuned model (90 MB)")
    _common(parser)


def _locate(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Scores every neuron by MacU's Eq. 5; writes two score maps, the chosen sets and their overlap."
    )
    _model(parser, verbalizer=True)
    _data(parser, weights=True)
    _golden(parser, required=True)
    parser.add_argument("--out", metavar="FILE", required=True, help="where to write, e.g. located.safetensors")
    parser.add_argument("--resume", metavar="DIR", help="keep finished batches here; a second run goes on from them")
    settings = _settings(parser)
    _integral(settings)
    settings.add_argument("--top-k", type=int, metavar="K", help="correlation tokens of a text")
    settings.add_argument("--fraction", type=float, metavar="X", help="select neurons with this share of the maximum")
    settings.add_argument("--share", type=float, metavar="X", help="keep neurons that this share of batches selects")
    settings.add_argument("--cap", type=int, metavar="N", help="select at most N neurons for each set")
    settings.add_argument("--texts", type=int, metavar="N", help="training texts the scores are summed over")
    settings.add_argument("--certify", type=int, metavar="N", help="neurons of each side to ablate exactly, 0 for none")
    _common(parser)


def _plan(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Says what scoring the neurons of a model will take, before it is started: rows, blocks, operations, memory, "
        "and time by a measurement of a few seconds on the model itself."
    )
    _model(parser, verbalizer=True)
    _data(parser, required=False)
    parser.add_argument("--tokens", type=int, default=32, metavar="T", help="of a text, without --data (%(default)s)")
    parser.add_argument("--examples", type=int, metavar="N", help="texts; default those of --data, else 1")
    settings = parser.add_argument_group("settings")
    _integral(settings)
    settings.add_argument("--rule", choices=("legendre", "radau"), help="of the quadrature (legendre)")
    settings.add_argument("--batch-size", type=int, default=32, metavar="N", help="texts in a batch (%(default)s)")
    settings.add_argument("--memory", metavar="SIZE", help="budget beyond the model's own, e.g. 256MiB")
    _common(parser)


def _integral(settings: _Group) -> None:
    settings.add_argument("--path", choices=("layer", "joint", "neuron"), help="path of the integral")
    settings.add_argument("--nodes", type=int, metavar="N", help="quadrature nodes")
    settings.add_argument(
        "--tolerance", type=float, metavar="X", help="halve intervals while that moves values by more"
    )


def _edit(parser: argparse.ArgumentParser) -> None:
    parser.description = "Finds gates for located neurons and writes them as an edit file."
    _model(parser, verbalizer=True)
    parser.add_argument("--located", metavar="FILE", required=True, help="what spurge locate wrote")
    _data(parser)
    _golden(parser, required=True)
    parser.add_argument("--out", metavar="FILE", required=True, help="where to write, e.g. edit.safetensors")
    parser.add_argument("--resume", metavar="FILE", help="keep the swarm here; a second run goes on from it")
    settings = _settings(parser)
    settings.add_argument("--search", choices=("pso", "gradient"), help="particle swarm, or gradient")
    settings.add_argument("--neurons", choices=("located", "all"), help="which neurons the search may move")
    settings.add_argument("--texts", dest="edit_texts", type=int, metavar="N", help="training texts the search uses")
    settings.add_argument("--guard", type=float, metavar="X", help="points of accuracy a swarm's particle may lose")
    _common(parser)


def _evaluate(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Accuracy on test sets: without an edit, with it, and for an edit of neurons with these erased and with random "
        "ones."
    )
    _model(parser, verbalizer=True)
    _data(parser, several=True)
    parser.add_argument("--edit", metavar="FILE", help="edit to measure; without it only the model is")
    parser.add_argument("--located", metavar="FILE", help="erase its spurious neurons as a control, not the edit's own")
    parser.add_argument("--force", action="store_true", help="apply an edit that was made for other weights")
    parser.add_argument("--no-controls", action="store_true", help="leave out erased and random neurons")
    parser.add_argument("--draws", type=int, default=20, metavar="N", help="draws of random neurons (%(default)s)")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="for intervals (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="texts in a batch (%(default)s)")
    parser.add_argument("--memory", metavar="SIZE", help="budget, e.g. 256MiB")
    _golden(parser, required=False)
    _common(parser)


def _apply(parser: argparse.ArgumentParser) -> None:
    parser.description = "Writes a copy of a model's folder with an edit folded into its weights: a plain checkpoint."
    _model(parser)
    parser.add_argument("--edit", metavar="FILE", required=True, help="edit to fold in")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="new folder; must not exist")
    parser.add_argument("--force", action="store_true", help="apply an edit that was made for other weights")
    _common(parser)


def _features(parser: argparse.ArgumentParser) -> None:
    features_arguments(parser)
    _model(parser)
    _data(parser, groups=True)
    _common(parser)


def _with_common(arguments: Callable[[argparse.ArgumentParser], None], parser: argparse.ArgumentParser) -> None:
    arguments(parser)
    _common(parser)


def _doctor(parser: argparse.ArgumentParser) -> None:
    parser.description = "Prints versions, what was compiled in and devices; checks every kernel against its reference."
    _common(parser)


def _model(parser: _Group, *, verbalizer: bool = False) -> None:
    parser.add_argument("--model", metavar="FOLDER", required=True, help="transformers folder of a sequence classifier")
    if verbalizer:
        help = "label words and prompt (JSON): the model is a causal language model that classifies by them"
        parser.add_argument("--verbalizer", metavar="FILE", help=help)
    parser.add_argument(
        "--device", default="cpu", metavar="NAME", help="cpu, cuda (a rank: its own) or cuda:N (%(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "float64"),
        help="load weights as this type; default float32, or the type an edit was made for",
    )


def _data(
    parser: argparse.ArgumentParser,
    *,
    several: bool = False,
    groups: bool = False,
    weights: bool = False,
    required: bool = True,
) -> None:
    group = parser.add_argument_group("data", "CSV, TSV or JSONL, also .gz, .xz or .bz2")
    if several:
        help = "test set, as often as there are sets; without NAME= it is called by its file"
        group.add_argument("--data", metavar="NAME=FILE", required=True, action="append", help=help)
    else:
        group.add_argument("--data", metavar="FILE", required=required, help="labelled texts")
    group.add_argument("--text-column", default="text", metavar="NAME", help="column of the texts (%(default)s)")
    group.add_argument("--pair-column", metavar="NAME", help="column of second texts (premise and hypothesis)")
    group.add_argument("--label-column", default="label", metavar="NAME", help="column of the labels (%(default)s)")
    if several or groups:
        group.add_argument("--group-column", metavar="NAME", help="column of groups, for the worst group's accuracy")
    if weights:
        group.add_argument("--weight-column", metavar="NAME", help="column of how much each text counts, at least 0")
    group.add_argument("--split", metavar="NAME", help="only rows whose column 'split' has this value")
    group.add_argument("--limit", type=int, metavar="N", help="only the first N rows")
    group.add_argument("--labels", metavar="A,B", help="names of the labels in the order of the model's outputs")


def _golden(parser: argparse.ArgumentParser, *, required: bool) -> None:
    group = parser.add_argument_group("golden words", None if required else "for eta, proximity to spurious words")
    choice = group.add_mutually_exclusive_group(required=required)
    choice.add_argument("--golden", metavar="FILE", help="golden words: JSON, or a reviewed table")
    choice.add_argument("--lexicon", metavar="NAME|FILE", help="vader or afinn if installed, or a table of words")


def _settings(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("settings", "those not given are the preset's")
    group.add_argument("--preset", choices=("best", "paper"), help="settings to start from (best)")
    group.add_argument("--objective", choices=("proximity", "counterfactual"), help="what a neuron is judged by")
    group.add_argument("--batch-size", type=int, metavar="N", help="texts in a batch")
    group.add_argument("--max-length", type=int, metavar="N", help="tokens a text is cut to")
    group.add_argument("--memory", metavar="SIZE", help="budget beyond the model's own, e.g. 256MiB")
    return group


def _common(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output and running")
    group.add_argument("--json", metavar="FILE", help="also write the numbers as JSON")
    group.add_argument("--seed", type=_natural, default=0, metavar="N", help="of all random choices (%(default)s)")
    group.add_argument("--threads", type=_positive, metavar="N", help="CPU threads; default all cores")
    group.add_argument("--quiet", action="store_true", help="no progress bars")
    group.add_argument("--debug", action="store_true", help="show tracebacks")


def _natural(text: str) -> int:
    return _at_least(text, 0)


def _positive(text: str) -> int:
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
