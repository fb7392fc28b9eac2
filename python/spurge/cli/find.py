"""``spurge find``: what a model leans on, as a table for review, and what becomes of it."""

from __future__ import annotations

import argparse
import json
import textwrap
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spurge.cli.arguments import given
from spurge.cli.arguments_find import FIND_SETTINGS
from spurge.cli.inputs import prepare, read_data, read_features, read_golden, read_model, write_results
from spurge.engine.base import files
from spurge.engine.data.examples import Examples
from spurge.engine.data.rows import chosen_rows, of_file, read_column
from spurge.methods.find.find import find
from spurge.methods.find.found import Found
from spurge.methods.find.slices import find_slices
from spurge.report.results import Results
from spurge.report.tables import seconds


def run(arguments: argparse.Namespace) -> int:
    """Searches, or reads what was reviewed; prints the table and writes what was asked for."""
    prepare(arguments, "out", "golden_out", "groups_out", folders=("resume",))
    if arguments.features:
        return _find_slices(arguments)
    _check(arguments)
    model, tokenizer = read_model(arguments)
    examples = read_data(arguments, arguments.data, model)
    columns = _columns(arguments)
    start = time.perf_counter()
    if arguments.reviewed:
        found = _reviewed(arguments, Found.load(arguments.reviewed, examples.labels))
    else:
        found = find(
            model,
            tokenizer,
            examples,
            columns=columns,
            lexicon=read_golden(arguments, examples.labels),
            seed=arguments.seed,
            progress=not arguments.quiet,
            **given(arguments, FIND_SETTINGS),
        )
    elapsed = time.perf_counter() - start
    print(found.table(arguments.top))
    for row in found.of_role("spurious")[:3]:
        print(textwrap.shorten(f"{row.word}: spurious, {row.reason}", 80, placeholder=" …"))
    _write(arguments, found, examples, columns, elapsed)
    results = Results("find", {"model": str(arguments.model), "data": str(arguments.data), **found.info})
    for row in found.rows:
        for metric, unit in (("lean", "nats"), ("flips", "percent"), ("q", "")):
            value = asdict(row)[metric]
            results.add(row.word, row.role, metric, value, n=row.count, unit=unit, note=row.reason or None)
    results.add("all", "find", "seconds", elapsed, unit="s", n=1)
    write_results(arguments, results)
    return 0


def _find_slices(arguments: argparse.Namespace) -> int:
    for name in ("model", "data", "out", "reviewed", "golden_out", "columns", "lexicon"):
        if getattr(arguments, name):
            raise ValueError(f"{name}: features have no texts; leave it away")
    features = read_features(arguments, arguments.features)
    found = find_slices(features, seed=arguments.seed)
    print(found)
    results = Results("find slices", {"features": str(arguments.features), **found.info})
    for row in found.rows:
        results.add(row.name, "none", "errors", row.errors, n=row.count, unit="percent", labels="class")
    if arguments.groups_out:
        found.groups(features).save(arguments.groups_out)
        print(f"{len(found)} groups: {arguments.groups_out}")
    write_results(arguments, results)
    return 0


def _reviewed(arguments: argparse.Namespace, found: Found) -> Found:
    """The table with what the options call spurious and causal."""
    if not arguments.spurious and not arguments.causal:
        return found
    causal: dict[str, list[str]] = {}
    for text in arguments.causal:
        label, equals, words = text.partition("=")
        if not equals or not words:
            raise ValueError(f"causal: expected LABEL=A,B, got {text!r}")
        causal.setdefault(label, []).extend(_words(words))
    return found.reviewed(spurious=_words(arguments.spurious or ""), causal=causal or None)


def _words(text: str) -> list[str]:
    """Words or phrases between commas."""
    return [word for part in text.split(",") if (word := part.strip())]


def _check(arguments: argparse.Namespace) -> None:
    for name in ("model", "data"):
        if not getattr(arguments, name):
            raise ValueError(f"{name}: is needed, or --features")
    arguments.golden = None  # what `read_golden` asks for: here only a lexicon is one
    if not arguments.out and not arguments.reviewed:
        raise ValueError("out: give a file for the table, or --reviewed with one that was reviewed")
    for name in ("spurious", "causal"):
        if getattr(arguments, name) and not arguments.reviewed:
            raise ValueError(f"{name}: says what a person thinks of a table; give it with --reviewed")
    if arguments.out and arguments.reviewed and not (arguments.spurious or arguments.causal):
        raise ValueError("reviewed: its table is not written again; leave --out away, or give --spurious or --causal")
    if arguments.out and Path(arguments.out).suffix.lower() != ".tsv":
        raise ValueError(f"out: expected a file that ends in .tsv, got {arguments.out!r}")


def _columns(arguments: argparse.Namespace) -> dict[str, list[Any]]:
    """The values of ``--columns`` in the rows that `read_data` reads."""
    names = arguments.columns.split(",") if arguments.columns else []
    found: dict[str, list[Any]] = {name: [] for name in names}
    if names:
        with of_file(arguments.data):
            for number, row in chosen_rows(arguments.data, arguments.split, arguments.limit, arguments.quotes):
                for name in names:
                    found[name].append(read_column(row, name, number))
    return found


def _write(
    arguments: argparse.Namespace, found: Found, examples: Examples, columns: dict[str, list[Any]], elapsed: float
) -> None:
    if arguments.out:
        found.save(arguments.out)
        how = "as reviewed" if arguments.reviewed else f"{found.info['passes']} texts run in {seconds(elapsed)}"
        print(f"{len(found)} candidates, {how}: {arguments.out}")
    if arguments.golden_out:
        found.golden().save(arguments.golden_out)
        print(f"golden words: {arguments.golden_out}")
    if arguments.groups_out:
        grouped = found.groups(examples, columns=columns)
        lines = [
            {"text": row.text, "pair": row.pair, "label": examples.labels[row.label], "group": row.group}
            for row in grouped
        ]
        lines = [{name: value for name, value in line.items() if value is not None} for line in lines]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        files.write_bytes(arguments.groups_out, text.encode("utf-8"))
        print(f"{len(grouped.groups)} groups: {arguments.groups_out}")
