"""Arguments of ``mediate``: effects that units carry."""

from __future__ import annotations

import argparse

from spurge.cli.arguments import add_quotes, positive

#: Options of ``mediate`` that `Mediation` takes.
MEDIATION_SETTINGS = ("estimator", "resamples", "least_arm", "memory", "seed")


def add_mediate(parser: argparse.ArgumentParser) -> None:
    """``spurge mediate``: which MLPs and neurons carry the effect of the prompt on the answer."""
    parser.description = (
        "Average indirect effects of every MLP of a language model, adjusted for the topic of the prompt and not, and "
        "how localised they are (topic-adjusted causal mediation); on request those of the leading MLPs' neurons, "
        "and what the model says with the leading neurons switched off."
    )
    parser.add_argument("--model", metavar="FOLDER", required=True, help="transformers folder of a causal LM")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights (float32)"
    )
    data = parser.add_argument_group("data", "CSV, TSV or JSONL, plain or .gz, .xz, .bz2")
    data.add_argument("--data", metavar="FILE", required=True, help="prompts, one a row")
    data.add_argument("--text-column", default="prompt", metavar="NAME", help="column of the prompts (%(default)s)")
    data.add_argument("--treatment-column", metavar="NAME", required=True, help="0 and 1, or scores (toxicity)")
    data.add_argument("--threshold", type=float, default=0.5, metavar="X", help="scores from X on are 1 (%(default)s)")
    data.add_argument("--split", metavar="NAME", help="only rows whose column 'split' has this value")
    data.add_argument("--limit", type=positive, metavar="N", help="only the first N rows")
    add_quotes(data)
    outcome = parser.add_argument_group("outcome").add_mutually_exclusive_group(required=True)
    outcome.add_argument("--outcome-column", metavar="NAME", help="recorded scores of the answers")
    outcome.add_argument("--scorer", metavar="FOLDER", help="transformers classifier of what the model generates")
    scoring = parser.add_argument_group("generation and scoring")
    scoring.add_argument("--generate", type=int, default=20, metavar="N", help="new tokens (%(default)s)")
    scoring.add_argument("--scorer-label", type=int, default=1, metavar="N", help="output that counts (%(default)s)")
    topics = parser.add_argument_group("confounders", "at least one; a column is balanced with its mean")
    topics.add_argument("--topic-column", metavar="NAME", help="topic of each prompt")
    topics.add_argument("--embedder", metavar="FOLDER", help="transformers encoder; topics are clusters of prompts")
    topics.add_argument("--clusters", default="10,20,50", metavar="K,K", help="numbers of topics to try (%(default)s)")
    topics.add_argument("--columns", metavar="A,B", help="columns of numbers")
    parser.add_argument("--recording", metavar="FOLDER", required=True, help="what the model did; made, or resumed")
    parser.add_argument("--out", metavar="FILE", required=True, help="effects of the MLPs, e.g. effects.safetensors")
    parser.add_argument("--plot", metavar="FILE", help="figure of the effects by layer, e.g. effects.png")
    recording = parser.add_argument_group("recording")
    recording.add_argument("--position", choices=("last", "mean"), default="last", help="of the prompt's tokens (last)")
    recording.add_argument("--batch-size", type=int, default=32, metavar="N", help="prompts in a batch (%(default)s)")
    recording.add_argument("--max-length", type=int, metavar="N", help="tokens a prompt is cut to")
    settings = parser.add_argument_group("settings")
    settings.add_argument(
        "--estimator",
        choices=("balancing", "dichotomised_mediator", "continuous_unit", "binary_mediator"),
        help="of the effects (balancing); binary_mediator is the earlier name of dichotomised_mediator",
    )
    settings.add_argument(
        "--reduction",
        choices=("difference", "norm", "components"),
        default="difference",
        help="an MLP's output as numbers (%(default)s)",
    )
    settings.add_argument("--resamples", type=int, metavar="N", help="bootstrap resamples (200)")
    settings.add_argument("--least-arm", type=int, metavar="N", help="prompts of each arm that a topic needs (10)")
    settings.add_argument("--memory", metavar="SIZE", help="budget, e.g. 2GiB")
    neurons = parser.add_argument_group("neurons")
    neurons.add_argument("--leading", type=int, metavar="N", help="also effects of the neurons of the N leading MLPs")
    neurons.add_argument("--neurons-out", metavar="FILE", help="where to write these")
    neurons.add_argument("--mask", type=int, metavar="N", help="switch the N leading neurons off and score (--scorer)")
    neurons.add_argument("--draws", type=int, default=20, metavar="N", help="random masks beside it (%(default)s)")
    neurons.add_argument("--edit", metavar="FILE", help="write the mask as an edit, for spurge apply")
