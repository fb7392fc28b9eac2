"""``spurge evaluate``: accuracy on test sets, with an edit and its controls."""

from __future__ import annotations

import argparse
from pathlib import Path

from spurge.cli.inputs import edit_dtype, named_files, prepare, read_data, read_golden, read_model, write_results
from spurge.engine.base.files import canonical_json, write_bytes
from spurge.engine.edits.weight_edits import load_edit
from spurge.engine.evaluation.evaluation import evaluate
from spurge.methods.macu.located import Located
from spurge.report.results import Results


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints the tables."""
    prepare(arguments, "changed")
    name, source = _named_edit(arguments.edit)
    edit = load_edit(source) if source else None
    beside = {name: load_edit(source) for name, source in named_files(arguments.beside, "beside", "edits").items()}
    model, tokenizer = read_model(arguments, edit_dtype(edit))
    tests = {name: read_data(arguments, source, model) for name, source in named_files(arguments.data).items()}
    report = evaluate(
        model,
        tokenizer,
        tests,
        edit=edit,
        name=name,
        located=Located.load(arguments.located) if arguments.located else None,
        controls=not arguments.no_controls,
        draws=arguments.draws,
        beside=beside,
        cue=arguments.cue.split(",") if arguments.cue else (),
        changed=arguments.changed_texts if arguments.changed else 0,
        cross_groups=arguments.cross_groups,
        untouched=read_data(arguments, arguments.untouched, model) if arguments.untouched else None,
        golden=read_golden(arguments, next(iter(tests.values())).labels),
        top_k=arguments.top_k,
        seed=arguments.seed,
        bootstrap=arguments.bootstrap,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        memory=arguments.memory,
        force=arguments.force,
        progress=not arguments.quiet,
    )
    print(report)
    if arguments.changed:
        lines = [canonical_json(one.to_dict()) for one in report.changed]
        write_bytes(arguments.changed, "".join(f"{line}\n" for line in lines).encode())
        print(f"{len(lines)} texts with another answer: {arguments.changed}")
    results = Results("evaluate", {"model": str(arguments.model), **report.settings})
    results.extend(report.rows())
    write_results(arguments, results)
    return 0


def _named_edit(text: str | None) -> tuple[str, str | None]:
    """Name and file of ``--edit``: ``NAME=FILE``, or a file of an edit that is called so."""
    name, equals, source = (text or "").partition("=")
    return (name, source) if equals and text and not Path(text).is_file() else ("edit", text)
