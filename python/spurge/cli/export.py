"""``spurge export``: an edit as an adapter that ``peft`` loads."""

from __future__ import annotations

import argparse
from pathlib import Path

from spurge.cli.inputs import check_folder, edit_dtype, prepare, write_results
from spurge.cli.model_folders import load_model
from spurge.engine.base.tables import wrapped
from spurge.engine.edits.new_folders import check_new
from spurge.engine.edits.weight_edits import load_edit
from spurge.report.results import Results


def run(arguments: argparse.Namespace) -> int:
    """Writes the adapter for the model of a folder, whose own files stay as they are."""
    prepare(arguments)
    check_new("out", arguments.out)
    check_folder("out", Path(arguments.out).parent)
    edit = load_edit(arguments.edit)
    dtype = arguments.dtype or edit_dtype(edit)
    model, _ = load_model("model", arguments.model, arguments.device, dtype, "any")
    written = edit.export(
        arguments.out,
        model,
        arguments.format,
        max_rank=arguments.max_rank,
        truncate=arguments.truncate,
        force=arguments.force,
    )
    print(wrapped(f"{edit}\nexported as {written}"))
    config = {"model": arguments.model, "edit": edit.info, "out": arguments.out, "dtype": dtype}
    results = Results("export", config | {"format": arguments.format})
    method = str(edit.info.get("method", "edit"))
    for metric, values in (("rank", written.ranks), ("gates", written.gates), ("relative error", written.errors)):
        for name, value in values.items():
            results.add(name, method, metric, value)
    write_results(arguments, results)
    return 0
