"""What a model writes with the found neurons switched off, beside random neurons: the step that the paper left open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from spurge.engine.base.checks import integer, number
from spurge.engine.base.statistics import resampled_sums
from spurge.engine.data.examples import checked_texts
from spurge.engine.edits.gates import attached
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.models.handle import Handle
from spurge.engine.models.hooks import alone, frozen
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.sites import Units, find_sites, widths
from spurge.engine.recordings.generation import continuations
from spurge.engine.recordings.outcomes import score_texts
from spurge.engine.recordings.padding import padded


@dataclass(frozen=True, eq=False, repr=False)
class Masking:
    """Outcomes of N prompts without a mask, with it, and with random ones. Made by :func:`mask`.

    Attributes:
        none, masked: outcome of each prompt, float64 ``[N]``.
        random: the same behind as many random neurons of each site, ``[D, N]``.
        losses: mean negative log-likelihood per token of the prompts, in nats: without a mask, with it, and behind the
            random ones, float64 ``[2 + D]``. A mask that lowers the outcome by making the model babble shows here.
        neurons: that were masked.
        drop_draws: bootstrap resamples of the drop, ``[R]``.
        info: settings.
    """

    none: Tensor
    masked: Tensor
    random: Tensor
    losses: Tensor
    neurons: NeuronSet
    drop_draws: Tensor
    info: dict[str, Any]

    @property
    def drop(self) -> float:
        """Mean outcome without the mask less that with it."""
        return float((self.none - self.masked).mean())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the drop over prompts; NaN without resamples."""
        if not len(self.drop_draws):
            return float("nan"), float("nan")
        low, high = self.drop_draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return low, high

    @property
    def random_drops(self) -> Tensor:
        """Mean drop of each random draw, ``[D]``."""
        return (self.none - self.random).mean(1)

    @property
    def p(self) -> float:
        """Chance of a drop at least as large by neurons drawn at random: ``(1 + as large) / (1 + D)``."""
        return (1 + int((self.random_drops >= self.drop).sum())) / (1 + len(self.random))

    def rows(self, case: str = "mask") -> list[dict[str, Any]]:
        """Flat result rows ``{"case", "method", "metric", "value", "spread", "n", "unit"}``."""
        n = len(self.none)
        low, high = self.interval
        out: list[tuple[str, str, float, float | None, int]] = []
        for method, values in (("none", self.none), ("masked", self.masked)):
            out.append((method, "outcome", float(values.mean()), float(values.std(unbiased=False)), n))
        out += [("masked", "drop", self.drop, None, n), ("masked", "drop_low", low, None, n)]
        out += [("masked", "drop_high", high, None, n), ("masked", "p against random", self.p, None, n)]
        out += [(name, "loss", float(self.losses[index]), None, n) for index, name in enumerate(("none", "masked"))]
        if len(self.random):
            draws = len(self.random)
            for metric, values in (
                ("outcome", self.random.mean(1)),
                ("drop", self.random_drops),
                ("loss", self.losses[2:]),
            ):
                out.append(("random", metric, float(values.mean()), float(values.std(unbiased=False)), draws))
        return [
            {"case": case, "method": method, "metric": metric, "value": value, "spread": spread, "n": count, "unit": ""}
            for method, metric, value, spread, count in out
        ]

    def __repr__(self) -> str:
        return f"Masking({len(self.neurons)} neurons, {len(self.none)} prompts: drop {self.drop:+.4f}, p {self.p:.2g})"

    def __str__(self) -> str:
        """The three means, the drop with its interval, and what random neurons do."""
        low, high = self.interval
        lines = [
            f"{len(self.neurons)} neurons masked, {len(self.none)} prompts",
            f"  no mask       outcome {float(self.none.mean()):.4f}   loss {float(self.losses[0]):.3f}",
            f"  masked        outcome {float(self.masked.mean()):.4f}   loss {float(self.losses[1]):.3f}   "
            f"drop {self.drop:+.4f} [{low:+.4f}, {high:+.4f}]",
        ]
        if len(self.random):
            drops, losses = self.random_drops, self.losses[2:]
            lines.append(
                f"  {len(self.random):3d} random    outcome {float(self.random.mean()):.4f}   "
                f"loss {float(losses.mean()):.3f}   drop {float(drops.mean()):+.4f} ± "
                f"{float(drops.std(unbiased=False)):.4f}   p {self.p:.2g}"
            )
        return "\n".join(lines)


def mask(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    scorer: nn.Module | Callable[[list[str]], Any],
    neurons: NeuronSet,
    *,
    gate: float = 0.0,
    draws: int = 20,
    generate: int = 20,
    label: int = 1,
    units: Units | None = None,
    scorer_tokenizer: Any = None,
    batch_size: int = 32,
    max_length: int | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Masking:
    """Generates with ``neurons`` at ``gate``, and scores what is written, beside no mask and random neurons.

    Random neurons come from the same sites, as many of each, none of them among ``neurons``. The model comes back bit
    for bit.

    Args:
        model, tokenizer: a causal language model.
        prompts: N texts.
        scorer: of the continuations, see `spurge.score_texts`.
        neurons: such as ``effects.neurons(50)``.
        gate: their factor: 0 switches them off.
        draws: of random neurons.
        generate: new tokens, chosen greedily.
        label: output of a classifier that is the outcome.
        units: of an attention's output projection, as `spurge.NeuronEdit.build` takes them.
        scorer_tokenizer: of a classifier.
        batch_size: prompts at once.
        max_length: tokens a prompt is cut to.
        bootstrap: resamples of the prompts, for the interval.
        seed: of draws and resamples.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: an argument of another type or out of range, no neurons, or neurons the model lacks.
    """
    if not isinstance(neurons, NeuronSet):
        raise TypeError(f"neurons: expected a NeuronSet, got {type(neurons).__name__}")
    if not len(neurons):
        raise ValueError("neurons: need at least 1, got none")
    prompts = checked_texts("prompts", prompts)
    gate, draws, seed = number("gate", gate), integer("draws", draws, 0), integer("seed", seed, 0)
    handle = Handle(model, tokenizer)
    sizes = widths(find_sites(model, list(neurons.sites), units=units or "neurons"))
    sets = [neurons, *(neurons.random_like(sizes, seed + draw, exclude=neurons) for draw in range(draws))]
    how: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length}

    def measure(bar: Any) -> tuple[Tensor, float]:
        texts = continuations(handle, prompts, generate, **how)
        bar.update()
        found = score_texts(scorer, texts, label=label, tokenizer=scorer_tokenizer, progress=False)
        return found, likelihood(handle, prompts, **how)

    with alone(model), tqdm(total=1 + len(sets), desc="mask", disable=not progress) as bar:
        found = [measure(bar)]
        for own in sets:
            edit = NeuronEdit.build(model, own, gate, units=units)
            with attached(edit.fit(model), edit.full()):
                found.append(measure(bar))
    outcomes = torch.stack([outcome for outcome, _ in found])
    drops = (outcomes[0] - outcomes[1])[:, None].numpy()
    sums = resampled_sums(drops, integer("bootstrap", bootstrap, 0), np.random.default_rng(seed))
    info = {"gate": gate, "draws": draws, "generate": generate, "seed": seed}
    return Masking(
        outcomes[0],
        outcomes[1],
        outcomes[2:],
        torch.tensor([loss for _, loss in found], dtype=torch.float64),
        neurons,
        torch.from_numpy(sums[1:, 0] / len(prompts)),
        info,
    )


def likelihood(handle: Handle, texts: Sequence[str], *, batch_size: int = 32, max_length: int | None = None) -> float:
    """Mean negative log-likelihood per token of texts, in nats; first tokens, which nothing predicts, left out."""
    total, count = 0.0, 0
    with frozen(handle.model, gradients=False), padded(handle.tokenizer):
        for start in range(0, len(texts), batch_size):
            inputs = handle.encode(texts[start : start + batch_size], max_length)
            logits = handle.model(**inputs).logits[:, :-1].float()
            tokens, kept = (
                inputs["input_ids"][:, 1:],
                inputs["attention_mask"][:, 1:] * inputs["attention_mask"][:, :-1],
            )
            losses = nn.functional.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
            total += float((losses * kept).sum(dtype=torch.float64))
            count += int(kept.sum())
    return total / max(1, count)
