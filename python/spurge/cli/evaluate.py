"""``spurge evaluate``: accuracy on test sets, with an edit and its controls."""

from __future__ import annotations

import argparse
from pathlib import Path

from spurge.cli.inputs import prepare, read_data, read_golden, read_model, write_results
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.edits.weight_edits import WeightEdit, load_edit
from spurge.engine.evaluation.evaluation import evaluate
from spurge.methods.macu.located import Located
from spurge.report.results import Results


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints the tables."""
    prepare(arguments)
    edit = load_edit(arguments.edit) if arguments.edit else None
    sources = named_files(arguments.data)
    model, tokenizer = read_model(arguments, edit_dtype(edit))
    tests = {name: read_data(arguments, source, model) for name, source in sources.items()}
    report = evaluate(
        model,
        tokenizer,
        tests,
        edit=edit,
        located=Located.load(arguments.located).spurious_set if arguments.located else None,
        controls=not arguments.no_controls,
        draws=arguments.draws,
        golden=read_golden(arguments, next(iter(tests.values())).labels),
        seed=arguments.seed,
        bootstrap=arguments.bootstrap,
        batch_size=arguments.batch_size,
        memory=arguments.memory,
        force=arguments.force,
        progress=not arguments.quiet,
    )
    print(report)
    results = Results("evaluate", {"model": str(arguments.model), **report.settings})
    results.extend(report.rows())
    write_results(arguments, results)
    return 0


def named_files(texts: list[str]) -> dict[str, str]:
    """Set names to files: ``NAME=FILE``, or the file's name up to its first dot.

    Raises:
        ValueError: two sets of one name.
    """
    sources: dict[str, str] = {}
    for text in texts:
        name, equals, source = text.partition("=")
        if not equals or Path(text).is_file():
            name, source = Path(text).name.split(".")[0], text
        if name in sources:
            raise ValueError(f"data: two sets are called {name!r}; name them with NAME=FILE")
        sources[name] = source
    return sources


def edit_dtype(edit: NeuronEdit | WeightEdit | None) -> str:
    """The type of the weights that an edit was made for, so that its fingerprints fit; float32 without one."""
    prints = list(edit.model.values()) if edit is not None else []
    return str(prints[0]["dtype"]) if prints else "float32"
