"""``spurge plan``: what a localisation will take, before it is started."""

from __future__ import annotations

import argparse
from dataclasses import replace
from statistics import median_low
from typing import Any

import torch
from torch import nn

from spurge.cli.arguments import given
from spurge.cli.arguments_macu import CASCADE_SETTINGS
from spurge.cli.inputs import prepare, read_data, read_model, write_results
from spurge.engine.base.checks import integer
from spurge.engine.cascade.cascade import Cascade
from spurge.engine.data.examples import Examples, encode
from spurge.engine.models.handle import input_device
from spurge.engine.planning.plan import Plan, peak_bytes, plan
from spurge.methods.macu.macu import MacU
from spurge.report.results import Results

LENGTH_SAMPLE = 1024  # texts whose lengths are counted
COUNTERFACTUAL_ROWS = 3  # a text as it is, with its causal words swapped, and with its telling phrases exchanged


def run(arguments: argparse.Namespace) -> int:
    """Prints the plan."""
    prepare(arguments)
    integer("tokens", arguments.tokens, 1)
    integer("batch_size", arguments.batch_size, 1)
    if arguments.examples is not None:
        integer("examples", arguments.examples, 1)
    model, tokenizer = read_model(arguments)
    cascade = Cascade(model, **given(arguments, CASCADE_SETTINGS))
    if arguments.data is None:
        count = arguments.examples or 1
        planned = plan(cascade, _random_inputs(model, min(count, arguments.batch_size), arguments.tokens), count)
    else:
        train = read_data(arguments, arguments.data, model)
        planned = plan_texts(
            cascade,
            tokenizer,
            train,
            arguments.examples or len(train),
            size=arguments.batch_size,
            max_length=arguments.max_length,
        )
    print(planned)
    results = Results("plan", given(arguments, ("data", "model", *CASCADE_SETTINGS)))
    results.extend(planned.rows())
    write_results(arguments, results)
    return 0


def plan_texts(
    cascade: Cascade,
    tokenizer: Any,
    texts: Examples,
    count: int,
    *,
    size: int,
    targets: int = 1,
    max_length: int | None = None,
) -> Plan:
    """What ``count`` texts like these will take in batches of ``size``.

    Time is that of batches of middle length, memory that of the longest.
    """
    device = cascade.handle.device
    batches = [
        encode(tokenizer, part, max_length=max_length) for part in texts[: min(count, LENGTH_SAMPLE)].batches(size)
    ]
    lengths = [batch["input_ids"].shape[1] for batch in batches]
    typical, longest = (batches[lengths.index(length)] for length in (median_low(lengths), max(lengths)))
    found = plan(cascade, _to_device(typical, device), count, targets=targets)
    return replace(found, bytes_peak=max(found.bytes_peak, peak_bytes(cascade, _to_device(longest, device))))


def plan_locating(macu: MacU, model: nn.Module, tokenizer: Any, train: Examples) -> Plan:
    """What `MacU.locate` will take at most, the certificate left out."""
    proximity = macu.objective == "proximity"
    cascade = Cascade(model, **macu.reading(), memory=macu.memory, attention=proximity)
    texts = len(train) if macu.texts is None else min(macu.texts, len(train))
    rows, targets = (texts, 2) if proximity else (COUNTERFACTUAL_ROWS * texts, 1)
    return plan_texts(
        cascade, tokenizer, train, rows, size=macu.batch_size, targets=targets, max_length=macu.max_length
    )


def _random_inputs(model: nn.Module, examples: int, tokens: int) -> dict[str, torch.Tensor]:
    """Texts of random words, all of one length."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if isinstance(limit, int) and tokens > limit:
        raise ValueError(f"tokens: expected at most the model's {limit} positions, got {tokens}")
    words = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    ids = torch.randint(words, (examples, tokens), generator=torch.Generator().manual_seed(0))
    return _to_device({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, input_device(model))


def _to_device(inputs: Any, device: torch.device) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in inputs.items()}
