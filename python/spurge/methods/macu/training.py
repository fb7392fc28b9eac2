r"""How a repair is trained: on training texts and swaps of them, with a guard of the answers to the texts.

.. math:: L = \frac1B \sum_{b} \bigl(\gamma\,\mathrm{KL}(p^0_b \| p_b) + \kappa\,\mathrm{CE}(y_b, p_b)\bigr)
          + \frac{\sigma}{B} \sum_{s} \mathrm{CE}(\tilde y_s, p_s)

over B training texts b and B swaps s (`spurge.methods.macu.swaps`), :math:`p^0` the unedited model and
:math:`\tilde y` the smoothed label. Not in the paper.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from spurge.engine.base.checks import integer, number, shaped
from spurge.engine.base.files import PathLike
from spurge.engine.base.gradients import grad_mode
from spurge.engine.base.tensor_files import flat, of_group, reading, write_tensors
from spurge.engine.cascade.meter import Meter
from spurge.engine.data.examples import Example, Examples
from spurge.engine.models.handle import Handle
from spurge.methods.macu.objectives import answers, length_of
from spurge.methods.macu.swaps import SwapMaker, SwapShares
from spurge.methods.macu.trained import Student

_POOL = 8  # steps whose rows are sorted by length together
RATES = {"all": 3e-5, "lora": 3e-4, "neurons": 3e-4}
"""Adam's highest step size where none is given: few weights have farther to go."""


@dataclass(frozen=True, kw_only=True)
class Repair:
    """Settings of a repair.

    AdamW without decay; its rate rises over ``warm_up`` steps and then falls to 0 in a straight line. No dropout.

    Attributes:
        steps: minibatches, of ``batch_size`` training texts and as many swaps each.
        rate: Adam's highest step size; None: `RATES`.
        warm_up: steps until it is reached.
        batch_size: B.
        guard, own, swapped: gamma, kappa and sigma, the weights of the three terms.
        smoothing: share of a swap's label that all labels share.
        clip: longest gradient (2-norm).
        alphas: candidates of alpha, above 0.
        loss: points of accuracy on dev that a candidate may lose; of those that do not lose more, the one with the
            highest accuracy on swaps of dev is taken, the smallest of equal ones.
        dev_texts: of dev, at most so many are read.
        last_layer: refit the classifier's last layer in the end, on the texts and swaps that were trained on, where
            dev finds it better by the same rule.
        rank: of the deltas of ``which="lora"``.
        shares: of the kinds of swaps; None: no swaps, which is a control.
        max_length: tokens that a text is cut to while training and choosing; a lower ``max_length`` of MacU counts.
        keep: steps between two writings of the resume file.

    Raises:
        ValueError, TypeError: a setting out of range or of the wrong type.
    """

    steps: int = 100
    rate: float | None = None
    warm_up: int = 10
    batch_size: int = 16
    guard: float = 2.0
    own: float = 0.5
    swapped: float = 0.5
    smoothing: float = 0.05
    clip: float = 1.0
    alphas: tuple[float, ...] = (0.5, 1.0, 1.25, 1.5)
    loss: float = 0.3
    dev_texts: int = 1000
    last_layer: bool = False
    rank: int = 8
    shares: SwapShares | None = field(default_factory=SwapShares)
    max_length: int = 128
    keep: int = 20

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "dev_texts", "rank", "max_length", "keep"):
            integer(name, getattr(self, name), 1)
        integer("warm_up", self.warm_up, 0)
        for name in ("guard", "own", "swapped", "smoothing", "loss"):
            number(name, getattr(self, name), 0)
        if not self.guard + self.own:
            raise ValueError("guard, own: one of the two weights must be above 0")
        for name, value in (("rate", self.rate), ("clip", self.clip)):
            if value is not None and not (number(name, value, 0) > 0 and isfinite(value)):
                raise ValueError(f"{name}: must be above 0 and finite, got {value}")
        if self.smoothing >= 1:
            raise ValueError(f"smoothing: must be below 1, got {self.smoothing}")
        object.__setattr__(self, "alphas", tuple(self.alphas))
        if not self.alphas or not all(0 < number("alphas", alpha, 0) <= 1.5 for alpha in self.alphas):
            raise ValueError(f"alphas: need numbers above 0, at most 1.5, got {self.alphas}")
        if self.shares is not None and not isinstance(self.shares, SwapShares):
            raise TypeError(f"shares: expected SwapShares, got {type(self.shares).__name__}")


@dataclass(frozen=True, eq=False)
class Course:
    """What is trained on: step by step, rows with the distribution wanted of each and how much it counts.

    Attributes:
        steps: of each step the rows of one forward pass or more: examples, q ``[R, Y]`` float32, weights ``[R]``.
        swaps: how many swaps of each kind.
    """

    steps: list[list[tuple[list[Example], Tensor, Tensor]]]
    swaps: dict[str, int]

    @property
    def examples(self) -> list[Example]:
        """All rows, each with its label."""
        return [example for step in self.steps for rows, _, _ in step for example in rows]


def plan_course(
    handle: Handle, texts: Examples, maker: SwapMaker | None, settings: Repair, max_length: int, seed: int
) -> Course:
    """Draws texts and makes swaps of them; the unedited model answers the texts.

    Raises:
        ValueError: nothing can be swapped.
    """
    count, labels, size = settings.steps * settings.batch_size, len(texts.labels), settings.batch_size
    draw = random.Random(f"{seed}-course")
    drawn = [texts[i] for _ in range(-(-count // len(texts))) for i in draw.sample(range(len(texts)), len(texts))][
        :count
    ]
    swaps = [] if maker is None else maker.make(texts, count, seed)
    replies = torch.stack(answers(handle, drawn, 64, max_length))
    if replies.shape[1] != labels:
        raise ValueError(f"golden: has {labels} labels, the model predicts {replies.shape[1]}")
    total = settings.guard + settings.own
    kept = (settings.guard * replies + settings.own * _one_hot(drawn, labels)) / total
    asked = _one_hot([swap.example for swap in swaps], labels)
    asked = asked * (1 - settings.smoothing) + settings.smoothing / labels
    sides = [(drawn, kept, total), ([swap.example for swap in swaps], asked, settings.swapped)]
    steps: list[list[tuple[list[Example], Tensor, Tensor]]] = [[] for _ in range(settings.steps)]
    pools = [list(range(start, min(start + _POOL, settings.steps))) for start in range(0, settings.steps, _POOL)]
    for pool in pools:
        order = draw.sample(pool, len(pool))
        for rows, wanted, weight in sides:
            if not rows:
                continue
            mine = [i % len(rows) for i in range(pool[0] * size, (pool[-1] + 1) * size)]
            mine.sort(key=lambda i: (length_of(rows[i]), i))
            for place, step in enumerate(order):
                chosen = mine[place * size : (place + 1) * size]
                weights = torch.full((len(chosen),), weight / size)
                steps[step].append(([rows[i] for i in chosen], wanted[chosen].float(), weights))
    return Course(steps, {} if maker is None else maker.facts(swaps))


class Training:
    """The training of a student, step by step; its state goes to a file and comes back from it.

    Args:
        student: what is trained.
        course: what on.
        settings: of the repair.
        rate: Adam's highest step size.
        max_length: tokens a text is cut to.
        memory: bytes that weights, gradients, Adam's state and activations may take beyond the model itself.

    Raises:
        ValueError: the memory does not hold one row.
    """

    def __init__(
        self, student: Student, course: Course, settings: Repair, *, rate: float, max_length: int, memory: int
    ) -> None:
        self.student, self.course, self.settings = student, course, settings
        self.rate, self.max_length = rate, max_length
        self.weights = list(student.parameters.values())
        self.adam = torch.optim.AdamW(self.weights, lr=rate, weight_decay=0.0)
        self.losses: list[float] = []
        held = 4 * sum(weight.numel() * weight.element_size() for weight in self.weights)  # gradient, two of Adam's
        self.rows = self._fitting_rows(memory - held, memory)

    def run(self, file: PathLike | None, origin: str, progress: bool) -> None:
        """All steps that are left; every few of them, and the last, go to ``file``.

        Raises:
            ValueError: the file is of another job, or the loss is not finite.
            FileError: it is damaged.
            OSError: it cannot be read or written.
        """
        path = None if file is None else Path(file)
        if path is not None and path.exists():
            self._load(path, origin)
        steps, done = self.settings.steps, len(self.losses)
        with tqdm(total=steps, initial=done, desc="repair", unit="step", disable=not progress) as bar:
            for step in range(done, steps):
                self._take(step)
                if path is not None and ((step + 1) % self.settings.keep == 0 or step + 1 == steps):
                    self._save(path, origin)
                bar.set_postfix(loss=f"{self.losses[-1]:.3f}", refresh=False)
                bar.update()

    def _take(self, step: int) -> None:
        warm, steps = self.settings.warm_up, self.settings.steps
        share = (step + 1) / warm if step < warm else 1 - (step - warm) / max(1, steps - warm)
        for group in self.adam.param_groups:
            group["lr"] = self.rate * share
        self.adam.zero_grad(set_to_none=True)
        total = 0.0
        for examples, wanted, weights in self.course.steps[step]:
            for start in range(0, len(examples), self.rows):
                part = slice(start, start + self.rows)
                total += self._backward(examples[part], wanted[part], weights[part])
        if not isfinite(total):
            raise ValueError(f"repair: the loss is not finite at step {step}; try a lower rate than {self.rate}")
        nn.utils.clip_grad_norm_(self.weights, self.settings.clip)
        self.adam.step()
        self.losses.append(total)

    def _backward(self, examples: Sequence[Example], wanted: Tensor, weights: Tensor) -> float:
        """Adds the gradient of some rows' loss to the weights' and gives that loss."""
        with grad_mode(True):
            logits = self.student.handle.logits(self.student.handle.encode(examples, self.max_length))
            loss = -(wanted.to(logits.device) * logits.float().log_softmax(1)).sum(1) @ weights.to(logits.device)
            loss.backward()
        return float(loss.detach())

    def _fitting_rows(self, left: int, memory: int) -> int:
        """Rows of a pass whose activations the memory holds, by those of the longest row."""
        longest = max(self.course.examples, key=lambda row: (length_of(row), row.text))
        wanted = torch.ones(1, 1)
        meter = Meter()
        with meter:
            self._backward([longest], wanted, torch.ones(1))
        self.adam.zero_grad(set_to_none=True)
        gradients = sum(weight.numel() * weight.element_size() for weight in self.weights)
        row = max(1, meter.peak - gradients)
        if row > left:
            raise ValueError(
                f"memory: {memory} bytes do not hold the training of {gradients // 4} weights, which needs "
                f"{memory - left + row}; use which='lora' or 'neurons', or a smaller max_length"
            )
        return max(1, left // row)

    # ---- the file --------------------------------------------------------------------------------

    def _save(self, path: Path, origin: str) -> None:
        groups: dict[str, dict[str, Tensor]] = {"weight": {}, "first": {}, "second": {}}
        for name, weight in self.student.parameters.items():
            state = self.adam.state[weight]
            groups["weight"][name] = weight.detach()
            groups["first"][name], groups["second"][name] = state["exp_avg"], state["exp_avg_sq"]
        tensors = {**flat(groups), "losses": torch.tensor(self.losses, dtype=torch.float64)}
        write_tensors(path, tensors, {"kind": "repair", "origin": origin})

    def _load(self, path: Path, origin: str) -> None:
        with reading(path, "repair", "the state of a repair") as file:
            if file.texts["origin"] != origin:
                raise ValueError(f"resume: {path} was made with other settings, data or model; choose another file")
            losses = file.tensors["losses"].tolist()
            groups = [of_group(group, file.tensors) for group in ("weight", "first", "second")]
            for name, weight in self.student.parameters.items():
                for group in groups:
                    shaped(name, group[name], weight.dtype, *weight.shape)
        with grad_mode(False):
            for name, weight in self.student.parameters.items():
                kept, first, second = (group[name].to(weight.device) for group in groups)
                weight.copy_(kept)
                step = torch.tensor(float(len(losses)))
                self.adam.state[weight] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
        self.losses = losses


def _one_hot(examples: Sequence[Example], labels: int) -> Tensor:
    """Float64 ``[N, Y]``."""
    targets = torch.tensor([example.label for example in examples], dtype=torch.long)
    return nn.functional.one_hot(targets, labels).double()
