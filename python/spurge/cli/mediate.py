"""``spurge mediate``: average indirect effects of MLPs and neurons, adjusted for topics and not."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from spurge.cli.arguments import given
from spurge.cli.arguments_mediation import MEDIATION_SETTINGS
from spurge.cli.inputs import prepare, write_results
from spurge.cli.model_folders import load_model
from spurge.engine.causal.confounders import Confounders
from spurge.engine.causal.topics import find_topics
from spurge.engine.data.rows import chosen_rows, of_file, read_column, read_name, read_number, read_text
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.recordings.embedding import embed
from spurge.engine.recordings.outcomes import score_texts
from spurge.engine.recordings.recording import Recording, record
from spurge.methods.mediation.effects import Effects
from spurge.methods.mediation.masking import mask
from spurge.methods.mediation.mediation import Mediation
from spurge.methods.mediation.mediators import binary, mlp_units, neuron_units
from spurge.report import plots
from spurge.report.results import Results
from spurge.report.tables import grid, seconds


def run(arguments: argparse.Namespace) -> int:
    """Records, scores, finds topics, estimates, prints, and writes the files that were asked for."""
    prepare(arguments, "out", "plot", "neurons_out", "edit", folders=("recording",))
    if arguments.plot:
        plots.check_format(arguments.plot)
    _check_options(arguments)
    start = time.perf_counter()
    table = _read_columns(arguments)
    prompts, treatment = table["text"], binary(table["treatment"], len(table["text"]), arguments.threshold)
    confounders = _confounders(arguments, table)
    model, tokenizer = load_model("model", arguments.model, arguments.device, arguments.dtype, "language")
    recording = record(
        model,
        tokenizer,
        prompts,
        arguments.recording,
        neurons=arguments.leading is not None,
        position=arguments.position,
        generate=0 if arguments.scorer is None else arguments.generate,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        memory=arguments.memory,
        progress=not arguments.quiet,
    ).to(arguments.device)
    scorer, scorer_tokenizer = (None, None) if arguments.scorer is None else _scorer(arguments)
    outcome = _outcome(arguments, table, recording, scorer, scorer_tokenizer)
    mediation = Mediation(**given(arguments, MEDIATION_SETTINGS), progress=not arguments.quiet)
    units = mlp_units(recording, treatment, reduction=arguments.reduction, seed=arguments.seed)
    mlp_effects = mediation.effects(units, treatment, outcome, confounders)
    mlp_effects.save(arguments.out)
    results = Results("mediate", {"model": str(arguments.model), "data": str(arguments.data), **mlp_effects.info})
    _print_effects(mlp_effects, "effects of the MLPs", arguments.out)
    results.extend(mlp_effects.rows())
    if arguments.plot:
        plots.save(plots.effects(mlp_effects), arguments.plot)
        print(f"figure: {arguments.plot}")
    if arguments.leading is not None:
        sites = mlp_effects.leading_sites(arguments.leading)
        neuron_effects = mediation.effects(neuron_units(recording, sites), treatment, outcome, confounders)
        _print_effects(neuron_effects, f"effects of the neurons of {len(sites)} MLPs", arguments.neurons_out)
        results.extend(row | {"case": f"neurons: {row['case']}"} for row in neuron_effects.rows(most=100))
        if arguments.neurons_out:
            neuron_effects.save(arguments.neurons_out)
        if arguments.mask is not None:
            results.extend(
                _mask_leading(arguments, neuron_effects, model, tokenizer, prompts, treatment, scorer, scorer_tokenizer)
            )
    results.add("all", "Mediation", "seconds", time.perf_counter() - start, unit="s", n=1)
    print(f"in {seconds(time.perf_counter() - start)}")
    write_results(arguments, results)
    return 0


def _check_options(arguments: argparse.Namespace) -> None:
    """Refuses options that do not go together, before the long work."""
    if not (arguments.topic_column or arguments.embedder or arguments.columns):
        raise ValueError("confounders: give --topic-column, --embedder or --columns")
    if arguments.topic_column and arguments.embedder:
        raise ValueError("topic-column, embedder: give one of them, not both")
    if arguments.mask is not None and (arguments.leading is None or arguments.scorer is None):
        raise ValueError("mask: needs --leading and --scorer")
    for name, needs in (("neurons_out", "leading"), ("edit", "mask")):
        if getattr(arguments, name) and getattr(arguments, needs) is None:
            raise ValueError(f"{name.replace('_', '-')}: needs --{needs}")
    _cluster_counts(arguments.clusters)


def _cluster_counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"clusters: expected whole numbers with commas between, got {text!r}") from None


def _read_columns(arguments: argparse.Namespace) -> dict[str, list[Any]]:
    """The columns that are needed: ``text``, ``treatment``, ``outcome``, ``topic`` and those of ``--columns``."""
    columns = {"text": arguments.text_column, "treatment": arguments.treatment_column}
    if arguments.outcome_column:
        columns["outcome"] = arguments.outcome_column
    if arguments.topic_column:
        columns["topic"] = arguments.topic_column
    numbers = arguments.columns.split(",") if arguments.columns else []
    table: dict[str, list[Any]] = {name: [] for name in (*columns, *(f"column {name}" for name in numbers))}
    readers = {"text": read_text, "topic": read_name}
    with of_file(arguments.data):
        for number, row in chosen_rows(arguments.data, arguments.split, arguments.limit, arguments.quotes):
            for name, column in columns.items():
                read = readers.get(name, read_number)
                table[name].append(read(read_column(row, column, number), column, number))
            for name in numbers:
                table[f"column {name}"].append(read_number(read_column(row, name, number), name, number))
    return table


def _confounders(arguments: argparse.Namespace, table: dict[str, list[Any]]) -> Confounders:
    topics: Any = table.get("topic")
    if arguments.embedder:
        encoder, tokenizer = load_model("embedder", arguments.embedder, arguments.device, "float32", "encoder")
        embeddings = embed(encoder, tokenizer, table["text"], progress=not arguments.quiet)
        topics = find_topics(
            table["text"], embeddings, clusters=_cluster_counts(arguments.clusters), seed=arguments.seed
        )
    names = [name for name in table if name.startswith("column ")]
    columns = torch.tensor([table[name] for name in names], dtype=torch.float64).t() if names else None
    column_names = [name.removeprefix("column ") for name in names]
    return Confounders.of(topics, columns, column_names=column_names)


def _scorer(arguments: argparse.Namespace) -> tuple[Any, Any]:
    return load_model("scorer", arguments.scorer, arguments.device, "float32")


def _outcome(
    arguments: argparse.Namespace, table: dict[str, list[Any]], recording: Recording, scorer: Any, scorer_tokenizer: Any
) -> torch.Tensor:
    if scorer is None:
        return torch.tensor(table["outcome"], dtype=torch.float64)
    assert recording.continuations is not None  # generate was at least 1
    return score_texts(
        scorer,
        list(recording.continuations),
        label=arguments.scorer_label,
        tokenizer=scorer_tokenizer,
        batch_size=arguments.batch_size,
        progress=not arguments.quiet,
    )


def _print_effects(effects: Effects, title: str, path: str | None) -> None:
    topics = [[*map(str, topic.values())] for topic in effects.info["topics"]]
    if topics and effects.level == "mlp":
        print(grid([["topic", "prompts", "treated"], *topics]))
        print()
    print(effects)
    if path:
        print(f"{title}: {path}")
    print()


def _mask_leading(
    arguments: argparse.Namespace,
    effects: Effects,
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    treatment: torch.Tensor,
    scorer: Any,
    scorer_tokenizer: Any,
) -> list[dict[str, Any]]:
    """What the model says to the treated prompts without the leading neurons; positive effects only."""
    neurons = effects.neurons(arguments.mask, sign="positive")
    masking = mask(
        model,
        tokenizer,
        [prompt for prompt, own in zip(prompts, treatment.tolist(), strict=True) if own],
        scorer,
        neurons,
        draws=arguments.draws,
        generate=arguments.generate,
        label=arguments.scorer_label,
        scorer_tokenizer=scorer_tokenizer,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        seed=arguments.seed,
        progress=not arguments.quiet,
    )
    print(masking)
    if arguments.edit:
        edit = NeuronEdit.build(
            model, neurons, 0.0, {"method": "Mediation", "labels": "none", "mediation": effects.info}
        )
        edit.save(arguments.edit)
        print(f"{edit}: {arguments.edit}")
    return masking.rows()
