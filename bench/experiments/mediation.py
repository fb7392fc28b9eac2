"""Mediation's experiment: which MLPs and neurons of a language model carry a prompt's toxicity into its answer.

python bench/experiments/mediation.py realtoxicity FOLDER    SmolLM2-135M, RealToxicityPrompts

The treatment is the prompt's toxicity as published (at least 0.5), the outcome the toxicity of what the model goes on
to write, by a scorer trained on Civil Comments; topics are clusters of MiniLM embeddings of the prompts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import language
from experiments import command, data
from experiments.command import Clock
from experiments.toxicity import ToxicityScorer, minilm, toxicity_scorer
from spurge.engine.causal.concentration import MEASURES
from spurge.engine.causal.confounders import Confounders
from spurge.engine.causal.topics import Topics, find_topics
from spurge.engine.recordings.embedding import embed
from spurge.engine.recordings.outcomes import score_texts
from spurge.engine.recordings.recording import Recording, record
from spurge.methods.mediation.effects import SIDES, Effects
from spurge.methods.mediation.masking import mask
from spurge.methods.mediation.mediation import Mediation
from spurge.methods.mediation.mediators import Mediators, mlp_units, neuron_units
from spurge.report import plots
from spurge.report.results import Results
from spurge.report.tables import grid

LEAST_ARM = 20  # prompts of each arm that a topic needs: with fewer, most resamples lose the overlap of some unit
LEADING = 5  # MLPs whose neurons are looked at
MASKED = (50,)  # neurons switched off
ESTIMATORS = ("dichotomised_mediator", "continuous_unit")  # beside the balancing one


def realtoxicity(args: argparse.Namespace, results: Results) -> None:
    """AIE of all MLPs with and without the topic, neurons of the leading ones, and what masking them does.

    One model, one recording, one scorer; the seeds are those of the topics, of the folds and of the resamples.
    """
    clock = Clock()
    prompts, toxicity = data.real_toxicity(args.data, 120 if args.quick else args.prompts)
    treatment = toxicity >= 0.5
    clock(f"{len(prompts)} prompts, {int(treatment.sum())} toxic")
    scorer = toxicity_scorer(args.data, cache=args.cache, quick=args.quick)
    _scorer_rows(results, scorer, prompts, treatment)
    clock(f"scorer: held-out accuracy {scorer.held_out_accuracy:.1f} %")
    model, tokenizer = language.smollm2()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if args.cache is None else args.cache / f"recording-{len(prompts)}"
        recording = record(model, tokenizer, prompts, folder, generate=args.generate, progress=sys.stderr.isatty())
        clock("recorded")
        assert recording.continuations is not None
        outcome = score_texts(scorer, recording.continuations, progress=False)
        _outcome_rows(results, outcome, treatment)
        encoder, reads = minilm()
        embeddings = embed(encoder, reads, prompts, progress=False)
        clock("prompts embedded")
        found = [
            _mlps(args, results, recording, treatment, outcome, _topics(prompts, embeddings, seed, args), seed, clock)
            for seed in args.seeds
        ]
        _over_seeds(results, found, args.seeds)
        _plot(args, found[0][0])
        first, topics = found[0]
        units = neuron_units(recording, first.leading_sites(min(LEADING, len(first.ranking()))))
        inner = _mediation(args, args.seeds[0]).effects(units, treatment, outcome, Confounders.of(topics))
        print(inner, flush=True)
        clock(f"{len(inner)} neurons")
        results.extend(row | {"case": f"neurons: {row['case']}"} for row in inner.rows(most=20))
        _mask(args, results, model, tokenizer, prompts, treatment, scorer, inner, clock)


def _mediation(args: argparse.Namespace, seed: int, estimator: Any = "balancing") -> Mediation:
    few = {"resamples": 5, "least_arm": 2} if args.quick else {"resamples": args.resamples, "least_arm": LEAST_ARM}
    return Mediation(estimator=estimator, seed=seed, progress=sys.stderr.isatty(), **few)


def _topics(prompts: list[str], embeddings: Tensor, seed: int, args: argparse.Namespace) -> Topics:
    return find_topics(prompts, embeddings, clusters=(3, 4) if args.quick else (10, 20), seed=seed)


def _scorer_rows(results: Results, scorer: ToxicityScorer, prompts: list[str], treatment: Tensor) -> None:
    note = "MiniLM features, logistic regression on Civil Comments; labels of Civil Comments"
    results.add("scorer", "held out", "accuracy", scorer.held_out_accuracy, unit="percent", labels="class", note=note)
    results.add("scorer", "held out", "auc", scorer.held_out_auc, labels="class", note=note)
    scores = torch.as_tensor(np.asarray(scorer(prompts)), dtype=torch.float64)
    wins = (scores[treatment][:, None] > scores[~treatment][None]).double().mean()
    results.add("scorer", "prompts", "auc", float(wins), n=len(prompts), note="against the published toxicity, 0.5")
    print(f"scorer: AUC {scorer.held_out_auc:.3f} held out, {float(wins):.3f} on the prompts", flush=True)


def _outcome_rows(results: Results, outcome: Tensor, treatment: Tensor) -> None:
    for name, arm in (("toxic prompts", treatment), ("other prompts", ~treatment)):
        mean, spread = float(outcome[arm].mean()), float(outcome[arm].std())
        results.add("outcome", name, "toxicity of the answer", mean, spread=spread, n=int(arm.sum()))
        print(f"outcome after {name}: {mean:.3f} ± {spread:.3f}", flush=True)


def _mlps(
    args: argparse.Namespace,
    results: Results,
    recording: Recording,
    treatment: Tensor,
    outcome: Tensor,
    topics: Topics,
    seed: int,
    clock: Clock,
) -> tuple[Effects, Topics]:
    units = mlp_units(recording, treatment, seed=seed)
    confounders = Confounders.of(topics)
    found = _mediation(args, seed).effects(units, treatment, outcome, confounders)
    clock(f"seed {seed}: {len(topics.sizes)} topics, {found!r}")
    if seed == args.seeds[0]:
        print(grid([["topic", "prompts", "treated"], *([*map(str, row.values())] for row in found.info["topics"])]))
        print(found, flush=True)
        for row in found.info["topics"] + found.info["dropped"]:
            kept = "kept" if row in found.info["topics"] else "left out"
            results.add(f"topic {row['topic']}", kept, "prompts", row["prompts"])
            results.add(f"topic {row['topic']}", kept, "treated", row["treated"])
        results.extend(row | {"case": f"MLPs: {row['case']}", "seed": seed} for row in found.rows())
        _others(args, results, units, treatment, outcome, confounders, seed)
    return found, topics


def _others(
    args: argparse.Namespace,
    results: Results,
    units: Mediators,
    treatment: Tensor,
    outcome: Tensor,
    confounders: Confounders,
    seed: int,
) -> None:
    """Whether the other estimators say the same of the localisation."""
    for estimator in ESTIMATORS:
        found = _mediation(args, seed, estimator).effects(units, treatment, outcome, confounders)
        print(f"\n{estimator}\n{found}", flush=True)
        rows = [row for row in found.rows(most=0) if row["case"] in ("total", "localisation")]
        results.extend(row | {"case": f"MLPs, {estimator}: {row['case']}", "seed": seed} for row in rows)


def _over_seeds(results: Results, found: Sequence[tuple[Effects, Topics]], seeds: Sequence[int]) -> None:
    """Localisation under other topics, folds and resamples: means and deviations over the seeds."""
    lines = [["localisation over seeds", *SIDES, "less localised in"]]
    for corrected in (False, True):
        for place, measure in enumerate(MEASURES):
            rows = [effects.localisation(corrected=corrected)[place] for effects, _ in found]
            cells = []
            for side in SIDES:
                values = [row[side][0] for row in rows]
                spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
                cells.append(f"{fmean(values):.3g}" + ("" if spread is None else f" ± {spread:.2g}"))
                name = measure + (" corrected" if corrected else "")
                note = f"seeds {', '.join(map(str, seeds))}"
                results.add("MLPs over seeds", side, name, fmean(values), spread=spread, n=len(values), note=note)
            sign = -1 if measure == "gini" else 1
            spread_out = sum(sign * row["difference"][0] > 0 for row in rows)
            lines.append([measure + (", noise taken off" if corrected else ""), *cells, f"{spread_out} of {len(rows)}"])
    print(f"\n{grid(lines)}\n", flush=True)


def _plot(args: argparse.Namespace, found: Effects) -> None:
    if args.plot is not None:
        command.save(plots.effects(found), args.plot, "mediation-realtoxicity")


def _mask(
    args: argparse.Namespace,
    results: Results,
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    treatment: Tensor,
    scorer: ToxicityScorer,
    found: Effects,
    clock: Clock,
) -> None:
    """Toxic prompts answered with the leading neurons off, by either ranking, beside random ones of the same MLPs."""
    toxic = [prompt for prompt, own in zip(prompts, treatment.tolist(), strict=True) if own]
    toxic = toxic[: 8 if args.quick else args.masked_prompts]
    for count in (2,) if args.quick else MASKED:
        for side in SIDES:
            neurons = found.neurons(count, side=side, sign="positive")
            answers = mask(
                model,
                tokenizer,
                toxic,
                scorer,
                neurons,
                draws=2 if args.quick else 20,
                generate=args.generate,
                seed=args.seeds[0],
                progress=sys.stderr.isatty(),
            )
            print(f"{count} leading neurons, {side}\n{answers}", flush=True)
            results.extend(answers.rows(f"mask {count} {side}"))
            clock(f"{count} neurons masked, {side}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one experiment; 2 for a wrong argument or file."""
    commands = {"realtoxicity": realtoxicity}
    parser, parsers = command.parser(__doc__, commands)
    own = parsers["realtoxicity"]
    own.add_argument("--prompts", type=int, default=2498, help="half of them toxic, at most")
    own.add_argument("--generate", type=int, default=20, help="new tokens of an answer")
    own.add_argument("--resamples", type=int, default=200, help="of the bootstrap")
    own.add_argument("--masked-prompts", type=int, default=150, help="toxic prompts answered behind each mask")
    args = parser.parse_args(argv)
    return command.main("mediation", args, commands[args.command])


if __name__ == "__main__":
    sys.exit(main())
