"""``run.py macu-scores``: MacU's own scores, sums over texts, beside those that exact ablation of every neuron gives.

The truth of the counterfactual objective is computed in float64: on texts whose answer is saturated its effects are
differences that float32 holds too coarsely.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from common.harness import threads
from localisation.faithfulness import accuracy

SIDES = ("causal", "spurious")
PATHS: dict[str, dict[str, Any]] = {
    "gradient": {"path": "gradient"},
    "gradient+32": {"path": "gradient", "exact": 32},
    "layer-4": {"path": "layer", "nodes": 4},
}
TOP = 50


def run(args: argparse.Namespace, results: Any, save: Callable[[], None]) -> None:
    """One objective after the other; saved after each."""
    from spurge.engine.data.examples import Examples
    from spurge.methods.golden.golden import GoldenTokens

    model = AutoModelForSequenceClassification.from_pretrained(args.minilm, trust_remote_code=False).float().eval()
    tokenizer, texts = AutoTokenizer.from_pretrained(args.minilm, trust_remote_code=False), Examples.load(args.texts)
    golden = GoldenTokens.from_corpus(texts)
    with threads(args.threads):
        for objective in ("proximity", "counterfactual"):
            asked = {"objective": objective, "texts": args.sentences, "certify": 0, "progress": False}
            precise = copy.deepcopy(model).double() if objective == "counterfactual" else model
            exact = _located(precise, tokenizer, texts, golden, asked | {"path": "neuron"})
            for name, settings in PATHS.items():
                found = _located(model, tokenizer, texts, golden, asked | settings)
                for side in SIDES:
                    _add(results, f"minilm {objective} {side}", name, getattr(found, side), getattr(exact, side))
                    chosen, wanted = (set(getattr(one, f"{side}_set")) for one in (found, exact))
                    share = 100 * len(chosen & wanted) / max(1, len(wanted))
                    results.add(f"minilm {objective} {side}", name, "set found", share, unit="percent", n=len(wanted))
            save()


def _located(model: nn.Module, tokenizer: Any, texts: Any, golden: Any, settings: dict[str, Any]) -> Any:
    from spurge.methods.macu.macu import MacU

    return MacU(**settings).locate(model, tokenizer, texts, golden)


def _add(results: Any, case: str, method: str, found: Any, exact: Any) -> None:
    values, wanted = (_flat(scores.values) for scores in (found, exact))
    numbers = accuracy(values[None], wanted[None])
    mine, theirs = (set(one.topk(TOP).indices.tolist()) for one in (values, wanted))
    numbers[f"top{TOP}_overlap"] = (100 * len(mine & theirs) / TOP, "percent")
    for metric, (value, unit) in numbers.items():
        results.add(case, method, metric, value, unit=unit, n=len(wanted))
    print(
        f"{case:32} {method:12} {'   '.join(f'{name} {value:.3f}' for name, (value, _) in numbers.items())}", flush=True
    )


def _flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.double() for value in values.values()])
