"""What commands read: models, data, golden words and settings; and what they write."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spurge.cli.arguments import given
from spurge.cli.arguments_macu import MACU_SETTINGS, REPAIR_SETTINGS
from spurge.cli.model_folders import load_model
from spurge.engine.base.checks import device_of
from spurge.engine.base.files import check_writable
from spurge.engine.data.examples import Examples
from spurge.engine.data.rows import chosen_rows, of_file, read_column, read_number
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.edits.parameter_edits import ParameterEdit
from spurge.engine.features.features import Features
from spurge.engine.models.handle import Handle
from spurge.engine.models.verbalizers import Verbalizer
from spurge.methods.golden.corpus_words import FUNCTION_WORDS
from spurge.methods.golden.golden import GoldenTokens
from spurge.methods.macu.macu import MacU
from spurge.methods.macu.training import Repair
from spurge.report.results import Results


def prepare(arguments: argparse.Namespace, *files: str, folders: Sequence[str] = ()) -> None:
    """Sets the number of threads, and tries whether all that is named can be written before the long work begins.

    Args:
        arguments: of the command.
        files: destinations of the options that name files; ``json`` is always one.
        folders: the same of folders, which are made where they do not exist.

    Raises:
        ValueError: a file or folder that cannot be written, or two options that name the same file.
    """
    targets: dict[str, str] = {}
    for name in (*files, "json"):
        path = getattr(arguments, name)
        if path is None:
            continue
        if not Path(path).parent.is_dir():
            raise ValueError(f"{name}: the folder of {path!r} does not exist")
        try:
            check_writable(path)
        except OSError as error:
            raise ValueError(f"{name}: {path!r} cannot be written: {error.strerror or error}") from error
        other = targets.setdefault(os.path.realpath(path), name)
        if other != name and (Path(path).is_file() or not Path(path).exists()):  # not /dev/null, for one
            raise ValueError(f"{name}: expected another file than that of {other}, got {path!r} for both")
    for name in folders:
        path = getattr(arguments, name)
        if path is not None:
            check_folder(name, path)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)


def check_folder(name: str, path: str | os.PathLike[str]) -> None:
    """ValueError where ``path`` is no folder that can be written to, and cannot become one."""
    there = Path(os.path.realpath(path))
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "is not writable" if there.is_dir() else "is no folder"
        raise ValueError(f"{name}: {os.fspath(path)!r} cannot be written: {str(there)!r} {what}")


def read_model(arguments: argparse.Namespace, dtype: str = "float32", device: str | None = None) -> tuple[Any, Any]:
    """The classifier of ``--model`` in evaluation mode, and its tokenizer; nothing is downloaded.

    With ``--verbalizer``, what its label words make of a causal language model and its tokenizer.

    Args:
        dtype: what it is loaded in where ``--dtype`` was not given.
        device: where; by default ``--device``.

    Raises:
        ValueError: not a folder of such a model, no such device, or label words that the model cannot say.
    """
    where = arguments.model, device or arguments.device, arguments.dtype or dtype
    if getattr(arguments, "verbalizer", None) is None:
        return load_model("model", *where)
    verbalizer = Verbalizer.load(arguments.verbalizer)
    return verbalizer.wrap(*load_model("model", *where, "language"))


def read_features(arguments: argparse.Namespace, source: str) -> Features:
    """The features of one file, on ``--device``.

    Raises:
        ValueError: not such a file, or no such device.
    """
    return Features.load(source).to(device_of("device", arguments.device))


def read_data(arguments: argparse.Namespace, source: str, model: nn.Module) -> Examples:
    """The rows of one file, their labels in the order of the model's outputs.

    The names come from ``--labels``, else from the model where it has any, else from the data where it counts them.

    Raises:
        ValueError: rows that cannot be read, or names whose order nobody knows.
    """
    names = arguments.labels.split(",") if arguments.labels else Handle.of(model).labels
    examples = Examples.load(
        source,
        text=arguments.text_column,
        pair=arguments.pair_column,
        label=arguments.label_column,
        group=getattr(arguments, "group_column", None),
        group_separator=getattr(arguments, "group_separator", None),
        split=arguments.split,
        labels=names,
        limit=arguments.limit,
        quoting=arguments.quotes,
    )
    if names is None and not all(name.isdecimal() for name in examples.labels):
        raise ValueError(
            f"labels: the model does not name its outputs; give --labels with {', '.join(examples.labels)} in its order"
        )
    return examples


def named_files(texts: list[str], option: str = "data", what: str = "sets") -> dict[str, str]:
    """Names of sets, or of what else an option names, to files: ``NAME=FILE``, or the file's name up to its first dot.

    Raises:
        ValueError: two of one name.
    """
    sources: dict[str, str] = {}
    for text in texts:
        name, equals, source = text.partition("=")
        if not equals or Path(text).is_file():
            name, source = Path(text).name.split(".")[0], text
        if name in sources:
            raise ValueError(f"{option}: two {what} are called {name!r}; name them with NAME=FILE")
        sources[name] = source
    return sources


def edit_dtype(edit: NeuronEdit | ParameterEdit | None) -> str:
    """The type of the weights that an edit was made for, so that its fingerprints fit; float32 without one."""
    prints = list(edit.model.values()) if edit is not None else []
    return str(prints[0]["dtype"]) if prints else "float32"


def read_weights(arguments: argparse.Namespace, source: str) -> list[float] | None:
    """The numbers of ``--weight-column`` in the rows that :func:`read_data` reads; None where it was not given.

    Raises:
        ValueError: no such column, or a weight that is no finite number of at least 0.
    """
    if arguments.weight_column is None:
        return None
    weights = []
    with of_file(source):
        for number, row in chosen_rows(source, arguments.split, arguments.limit, arguments.quotes):
            name = arguments.weight_column
            weights.append(read_number(read_column(row, name, number), name, number))
            if weights[-1] < 0:
                raise ValueError(f"row {number}: its {name} must be at least 0, got {weights[-1]}")
    return weights


def read_golden(arguments: argparse.Namespace, labels: tuple[str, ...]) -> GoldenTokens | None:
    """Golden words of ``--golden`` or ``--lexicon`` for these labels; None where neither was given.

    A lexicon has no irrelevant words: a list of function words is added.
    """
    if arguments.golden:
        return GoldenTokens.load(arguments.golden).for_labels(labels)
    if not arguments.lexicon:
        return None
    if Path(arguments.lexicon).suffix:
        golden = GoldenTokens.from_table(arguments.lexicon)
        return golden.with_irrelevant(FUNCTION_WORDS).for_labels(labels)
    if len(labels) != 2:
        raise ValueError(f"lexicon: {arguments.lexicon!r} knows negative and positive words, the data has {labels}")
    return GoldenTokens.from_lexicon(arguments.lexicon).for_labels(labels)


def read_macu(arguments: argparse.Namespace, preset: str = "best", **settings: Any) -> MacU:
    """MacU by ``--preset`` (default `preset`) with ``settings`` and, before these, what else was given.

    Raises:
        ValueError: a setting out of range, or two that do not go together.
    """
    start = getattr(MacU, arguments.preset or preset)
    if repair := given(arguments, REPAIR_SETTINGS):
        settings["repair"] = Repair(**repair)
    return start(**settings | given(arguments, MACU_SETTINGS), seed=arguments.seed, progress=not arguments.quiet)


def write_results(arguments: argparse.Namespace, results: Results) -> None:
    """Writes ``--json``, where it was given, with the command that was typed."""
    if arguments.json:
        results.head["settings"]["command"] = shlex.join(["spurge", *arguments.typed])
        results.write(arguments.json)
        print(f"numbers: {arguments.json}")
