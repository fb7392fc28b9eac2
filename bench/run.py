"""Measure Spurge beside what users pick today. See README.md in this folder for how to read the numbers.

python bench/run.py locate  --json FILE     scores of all neurons: Spurge, captum, knowledge neurons, hand-written loops
python bench/run.py latency --json FILE     language models: seconds, errors and memory, prompt by prompt
python bench/run.py faithfulness --json FILE  estimates of switching each neuron off, beside the exact effects
python bench/run.py audit   --json FILE     do the intervals of those estimates' audit hold the truth
python bench/run.py macu-scores --json FILE  MacU's scores and sets beside those of exact ablation
python bench/run.py savings --json FILE     what each saving should give, and what it gives
python bench/run.py kernels --json FILE     each kernel beside eager torch and torch.compile; the swarm beside pyswarms
python bench/run.py last-layer --json FILE  scores of a last layer's edges, medians, accuracy at every rate
python bench/run.py balance --json FILE     entropy-balancing weights: one problem, ten thousand, impossible ones
python bench/run.py coverage --json FILE    do mediation's intervals hold effects that are known
python bench/run.py memory  --json FILE     does the memory budget hold, and are the scores the same
python bench/run.py plan    --json FILE     what a plan says a run will take, and what it takes
python bench/run.py limits  --json FILE     what the machine can do: copies and matrix products
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also when this file is run as a module or from elsewhere

MODULES = {  # of each command: it has ``run`` and, where methods run in processes of their own, ``child``
    "locate": "localisation.locate",
    "latency": "localisation.latency",
    "savings": "localisation.savings",
    "faithfulness": "localisation.faithfulness",
    "audit": "localisation.audit",
    "macu-scores": "localisation.macu_scores",
    "memory": "localisation.memory",
    "plan": "localisation.plan",
    "kernels": "kernel_rates.kernels",
    "last-layer": "last_layers.last_layer",
    "balance": "causal.balancing",
    "coverage": "causal.coverage",
    "limits": "common.limits",
    "swarm": "kernel_rates.swarms",  # of kernels
}
PARTS = ("accuracy", "time", "tolerance", "peak")  # of faithfulness
Add = Callable[..., argparse.ArgumentParser]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected at least 0, got {value}")
    return value


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _parts(text: str) -> list[str]:
    names = _names(text)
    if strange := [name for name in names if name not in PARTS]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(PARTS)}, got {strange[0]!r}")
    return names


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", type=Path, help="write the results here")
    common.add_argument("--device", default="cpu", help="cpu or cuda")
    common.add_argument("--quick", action="store_true", help="smaller and fewer: to see that it runs, not to quote")
    add = partial(commands.add_parser, parents=[common])
    _add_localisation(add)
    _add_faithfulness(add)
    _add_kernels_and_last_layers(add)
    _add_causal(add)
    limits = add("limits", help="what the machine can do")
    limits.add_argument("--threads", type=_positive, default=1)

    child = commands.add_parser("child", help="used by the others: one method in a process of its own")
    child.add_argument("what", choices=[*MODULES])
    child.add_argument("rest", nargs=argparse.REMAINDER)
    return top


def _add_localisation(add: Add) -> None:
    locate = add("locate", help="localisation against its peers")
    locate.add_argument("--threads", type=_positive, default=1)
    locate.add_argument(
        "--shapes", type=_names, default=["minilm-32x8", "bert-32x8"], help="MODEL-TOKENSxSENTENCES,..."
    )
    locate.add_argument("--methods", type=_names, default=["*"], help="patterns of method names, comma-separated")
    locate.add_argument("--repeats", type=_positive, default=5)
    locate.add_argument("--budget", type=float, default=40.0, help="seconds for the repeats of one method")
    locate.add_argument("--full", action="store_true", help="run the slow peers on all layers of a deep model too")
    locate.add_argument("--reference", type=Path, help="folder to keep the 48-node reference scores in")
    locate.add_argument("--reference-threads", type=_positive, default=2)
    locate.add_argument("--no-peak", dest="peak", action="store_false", help="leave the peak memory out")

    latency = add("latency", help="language models, prompt by prompt")
    latency.add_argument("--threads", type=_positive, default=2)
    latency.add_argument("--shapes", type=_names, default=["smollm2-32x1"], help="MODEL-TOKENSxSENTENCES,...")
    latency.add_argument("--methods", type=_names, default=["*"], help="patterns of method names, comma-separated")
    latency.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the model")
    latency.add_argument("--prompts", type=_positive, default=20, help="different prompts, each asked about once")
    latency.add_argument("--budget", type=float, default=120.0, help="seconds for the prompts of one method")
    latency.add_argument("--batch", type=_positive, default=8, help="prompts a call for the throughput")
    latency.add_argument("--full", action="store_true", help="run the slow peers on all layers for every prompt")
    latency.add_argument("--exact", type=_count, default=1, help="prompts with a converged reference; 0: no errors")
    latency.add_argument("--exact-tolerance", type=float, default=2e-3, help="of the reference")
    latency.add_argument("--reference", type=Path, help="folder to keep the reference scores in")
    latency.add_argument("--no-peak", dest="peak", action="store_false", help="leave the peak memory out")

    savings = add("savings", help="each saving of the engine, counted and measured")
    savings.add_argument("--threads", type=_positive, default=2)
    savings.add_argument("--shapes", type=_names, default=["smollm2-32x1"], help="MODEL-TOKENSxSENTENCES,...")
    savings.add_argument(
        "--only",
        type=_names,
        default=["*"],
        help="patterns of projection, last-layer, head, prompt, swarm, adaptive, tokens",
    )
    savings.add_argument("--long", type=_positive, default=2048, help="tokens of the text for token scores")
    savings.add_argument("--budget", type=float, default=60.0, help="seconds for the repeats of one side")
    savings.add_argument("--exact-tolerance", type=float, default=2e-3, help="of the reference")
    savings.add_argument("--reference", type=Path, help="folder to keep the reference scores in")
    savings.add_argument("--no-peak", dest="peak", action="store_false", help="leave the peak memory out")

    memory = add("memory", help="does the memory budget hold")
    memory.add_argument("--threads", type=_positive, default=1)
    memory.add_argument("--shapes", type=_names, default=["bert-32x8"])
    memory.add_argument("--budgets", type=_names, default=["256 MiB", "512 MiB", "1 GiB"])

    plans = add("plan", help="are plans right")
    plans.add_argument("--threads", type=_positive, default=1)
    plans.add_argument("--shapes", type=_names, default=["minilm-32x8", "smollm2-32x1"])


def _add_faithfulness(add: Add) -> None:
    faithfulness = add("faithfulness", help="estimates against exact ablation")
    faithfulness.add_argument("--threads", type=_positive, default=1)
    faithfulness.add_argument("--minilm", type=Path, help="folder of a MiniLM classifier with its tokenizer")
    faithfulness.add_argument("--texts", type=Path, help="labelled texts for it, JSONL or CSV")
    faithfulness.add_argument("--smollm2", action="store_true", help="ask SmolLM2-135M, too")
    faithfulness.add_argument("--only", type=_parts, default=[*PARTS], help=f"of {', '.join(PARTS)}")
    faithfulness.add_argument("--methods", type=_names, default=["*"], help="patterns of method names, comma-separated")
    faithfulness.add_argument("--repeats", type=_positive, default=5)
    faithfulness.add_argument("--budget", type=float, default=40.0, help="seconds for the repeats of one method")
    faithfulness.add_argument("--cache", type=Path, help="folder to keep the exact effects in")

    audit = add("audit", help="coverage of the audit's intervals")
    audit.add_argument("--threads", type=_positive, default=1)
    audit.add_argument("--minilm", type=Path, required=True, help="folder of a MiniLM classifier with its tokenizer")
    audit.add_argument("--texts", type=Path, required=True, help="labelled texts for it, JSONL or CSV")
    audit.add_argument("--batches", type=_names, default=["0x8", "1x2", "2x2"], help="SEEDxSENTENCES,...")
    audit.add_argument("--repetitions", type=_positive, default=200)
    audit.add_argument("--cache", type=Path, help="folder to keep the exact effects in")

    scores = add("macu-scores", help="MacU's scores against exact ablation")
    scores.add_argument("--threads", type=_positive, default=1)
    scores.add_argument("--minilm", type=Path, required=True, help="folder of a MiniLM classifier with its tokenizer")
    scores.add_argument("--texts", type=Path, required=True, help="labelled texts for it, JSONL or CSV")
    scores.add_argument("--sentences", type=_positive, default=3, help="texts that scores are summed over")


def _add_kernels_and_last_layers(add: Add) -> None:
    kernels = add("kernels", help="kernels against eager torch and torch.compile")
    kernels.add_argument("--threads", type=lambda text: [_positive(n) for n in text.split(",")], default=[1, 2])
    kernels.add_argument("--only", type=_names, default=["*"], help="patterns of kernel names, comma-separated")
    kernels.add_argument("--sizes", type=_names, default=["cache", "middle", "memory"], help="of the arrays")
    kernels.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")

    last = add("last-layer", help="the last-layer methods' kernels against their peers")
    last.add_argument("--threads", type=_positive, default=1)
    last.add_argument("--only", type=_names, default=["*"], help="patterns of association, medians, sweeps")


def _add_causal(add: Add) -> None:
    balance = add("balance", help="entropy balancing against its peers")
    balance.add_argument("--threads", type=_positive, default=1)
    balance.add_argument(
        "--only",
        type=_names,
        default=["*"],
        help="patterns of att, correlated, hard, scaled, infeasible, beyond, batch",
    )

    coverage = add("coverage", help="do mediation's intervals hold the true effects")
    coverage.add_argument("--threads", type=_positive, default=1)
    coverage.add_argument("--repetitions", type=_positive, default=200)
    coverage.add_argument("--rows", type=_positive, default=4000, help="prompts of a repetition")


def main(argv: list[str] | None = None) -> int:
    """Run one command; 2 for a wrong argument, with one line that says what was expected."""
    args = parser().parse_args(argv)
    if args.command == "child":
        print(json.dumps(importlib.import_module(MODULES[args.what]).child(args.rest)))
        return 0
    from common import provenance
    from spurge.report.results import Results

    asked = {key: value for key, value in vars(args).items() if key not in ("json", "cache", "reference")}
    settings = {key: value.name if isinstance(value, Path) else value for key, value in asked.items()}
    results = Results(args.command, settings)
    if args.json is not None and (warning := provenance.warning(results.head["commit"])):
        print(f"run.py {args.command}: {warning}", file=sys.stderr)

    def save() -> None:  # after every case: a run that is stopped keeps what it has
        if args.json is not None:
            results.write(args.json)

    try:
        importlib.import_module(MODULES[args.command]).run(args, results, save)
    except (ValueError, OSError) as error:
        print(f"run.py {args.command}: {error}", file=sys.stderr)
        return 2
    save()
    if args.json is not None:
        print(f"written: {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
