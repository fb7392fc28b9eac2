"""What passes through a model leave behind, and what can be asked of one, however the model is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from spurge.engine.models.call_arguments import main_input
from spurge.engine.models.handle import Handle
from spurge.engine.models.projections import RowGates
from spurge.engine.models.readout import Readout
from spurge.engine.models.sites import Site
from spurge.engine.passes.activation_gradients import ActivationGradients
from spurge.engine.passes.norm_placement import Anatomy


@dataclass(frozen=True, eq=False)
class Owners:
    """Which of a batch's examples each of some rows belongs to.

    Attributes:
        batch: B.
        rows: R.
        each: int64 ``[R]``; None: row r belongs to example ``r % B``.
    """

    batch: int
    rows: int
    each: Tensor | None = None

    def take(self, values: Tensor, rows: slice | None = None) -> Tensor:
        """``values`` ``[B, ...]`` for each of these rows, by default for all."""
        rows = slice(0, self.rows) if rows is None else rows
        if self.each is None:
            return values.repeat((rows.stop - rows.start) // self.batch, *[1] * (values.dim() - 1))
        return values[self.each[rows].to(values.device)]

    def inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A batch of model inputs for all rows."""
        return {
            name: self.take(value) if torch.is_tensor(value) and value.dim() and len(value) == self.batch else value
            for name, value in inputs.items()
        }


@dataclass(frozen=True)
class Rows:
    """What a target sees of R rows of one forward pass.

    Attributes:
        logits: ``[R, Y]``, float32; of a language model over its vocabulary, after the probed token; ``[R, K, V]``
            after the last K real tokens where more than one is read.
        attention: head-mean attention of the probed token over the positions, ``[R, T]`` float32, where asked for.
        example: which example of the batch each row belongs to, ``[R]``.
        predicted: the class (the next token) the unedited model predicts for that example, ``[R]``.
        in_turn: the rows belong to the batch's examples in turn, again and again.
    """

    logits: Tensor
    attention: Tensor | None
    example: Tensor
    predicted: Tensor
    in_turn: bool = True

    def detached(self) -> Rows:
        """The same without their graph."""
        attention = None if self.attention is None else self.attention.detach()
        return replace(self, logits=self.logits.detach(), attention=attention)

    def of(self, owners: Owners, logits: Tensor, attention: Tensor | None) -> Rows:
        """Rows of these B examples with other logits and attention."""
        example, predicted = owners.take(self.example), owners.take(self.predicted)
        return Rows(logits.float(), attention, example, predicted, in_turn=owners.each is None)


Target = Callable[[Rows], Tensor]
"""Rows -> ``[R]`` or ``[R, Q]``. One with an attribute ``reads = "logits"`` reads nothing else, and few of them: on the
gradient path it is estimated through each, with a backward pass a logit."""


def predicted_logit(rows: Rows) -> Tensor:
    """The logit of the class that the unedited model predicts, ``[R]``: the usual target of integrated gradients."""
    logits = rows.logits if rows.logits.dim() == 2 else rows.logits[:, -1]
    return logits.gather(1, rows.predicted[:, None])[:, 0]


def unedited_rows(logits: Tensor, attention: Tensor | None, example: Tensor | None) -> Rows:
    """The rows of the unedited model.

    Args:
        example: how targets number the examples, ``[B]``; 0 to B - 1 by default.
    """
    example = torch.arange(len(logits)) if example is None else example
    predicted = (logits if logits.dim() == 2 else logits[:, -1]).argmax(1)
    return Rows(logits.float(), attention, example.to(logits.device), predicted)


@dataclass
class SiteTrace:
    """What the unedited pass left at one site. T is 1 in a last layer that computes only the probed token.

    ``anchor`` is where rows open: the layer's output (residual), the sum before its closing norm (post_norm), or the
    down projection's output itself (sandwich, replay).
    """

    z: Tensor  # [B, T, F] activations, the input of the down projection
    u: Tensor  # [B, T, H] its output without the bias
    anchor: Tensor  # [B, T, H]
    rest: Tensor | None = None  # [B, T, H] sandwich: layer output minus the normed branch


@dataclass(frozen=True)
class Call:
    """What a block was called with: the leading dimensions of its arguments, and its hidden states for a replay."""

    args: Any
    kwargs: Any
    hidden: Tensor | None


@dataclass(frozen=True, eq=False)
class Graded:
    """The rows of an unedited pass, in their graph, and the gradients that lead from them to the activations."""

    rows: Rows
    gradients: ActivationGradients


@dataclass
class Trace:
    """The unedited pass over a batch: computed once, entered many times."""

    inputs: dict[str, Any]
    batch: int
    position: Tensor  # [B] the probed token
    rows: Rows
    forward: Forward  # what made it and answers what is asked of it
    padding_acts: bool = False  # what stands at padding changes the logits
    graded: Graded | None = None  # the same pass with its graph, where gradients at activations are read
    # of a model that is entered in the middle:
    sites: Sequence[SiteTrace] = ()
    calls: Sequence[Call] = ()  # one per block
    anatomy: Anatomy | None = None
    outputs: Sequence[Tensor] = ()  # of each down projection, [B, T, H], in the rows' graph; empty without gradients
    pruned: bool = False  # rows compute only the probed token in the last layer
    narrow: bool = False  # and what follows it takes that token alone

    @property
    def tokens(self) -> int:
        """T, positions of an example."""
        return self.sites[0].z.shape[1] if self.sites else main_input(self.inputs).shape[1]

    def mask(self, z: Tensor) -> Tensor | None:
        """Which tokens of ``z`` ``[B, T, F]`` count, ``[B, T]``; None where all do."""
        mask = self.inputs.get("attention_mask")
        return mask.to(z.device, torch.uint8) if torch.is_tensor(mask) and mask.shape[1:] == z.shape[1:2] else None


@dataclass(frozen=True)
class Share:
    """What the rows of one interval weigh in its integral.

    Attributes:
        weights: of its nodes, ``[S]``.
        end: of the unedited model's own gradient, ``last`` ``[B, T, H]``.
    """

    weights: Tensor
    end: float = 0.0
    last: Tensor | None = None


class Opened(Protocol):
    """The way back from rows with scaled activations to the activations' attributions.

    Attributes:
        leaves: what gradients are taken by.
    """

    @property
    def leaves(self) -> list[Tensor]: ...

    def scores(
        self, grads: Sequence[Tensor | None], shares: Mapping[int, Sequence[Share]]
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """Per site and interval, what its rows add to the integral, ``[B, F]`` float32.

        Args:
            grads: by ``leaves``.
            shares: site -> its intervals, of as many nodes each, in the order in which they were opened.
        """


@dataclass(frozen=True, eq=False)
class Off:
    """Units of one site that are switched off, each in a row of its own.

    Attributes:
        units: int64 ``[n]``.
        owners: the example of each row, int64 ``[n]``.
    """

    units: Tensor
    owners: Tensor


class Forward(Protocol):
    """A way to run a model on rows of one's own; unless they say so, row ``r`` belongs to example ``r % B``.

    Attributes:
        handle, model: what is run.
        readout: how its logits are read.
        attention: whether rows have the attention row of the probed token.
        sites: where rows may open.
        blocks: L, its layers.
        block_of: of each site, the layer behind which its rows begin; -1: before the first.
    """

    handle: Handle
    model: nn.Module
    readout: Readout
    attention: bool
    sites: list[Site]
    blocks: list[nn.Module]
    block_of: list[int]

    def trace(
        self, inputs: Mapping[str, Any], example: Tensor | None = None, *, differentiable: bool = False
    ) -> Trace: ...

    def opened(self, trace: Trace, alphas: Mapping[int, Tensor]) -> tuple[Rows, Opened]:
        """For each site, rows with all its activations times each of some numbers ``[m]``; those of earlier first."""

    def without(self, trace: Trace, off: Mapping[int, Off]) -> Rows:
        """For each site, rows with single units switched off; those of earlier sites first."""

    def gated(self, trace: Trace, gates: Mapping[int, RowGates]) -> Rows:
        """Rows under P settings of gates, each of all these sites."""

    def scaled(self, trace: Trace, alphas: Tensor) -> tuple[Rows, Opened]:
        """Rows with the activations of all sites scaled together, by each of ``alphas`` ``[S]``."""


def padding_complaint(model: nn.Module) -> str:
    """Why a batch with padding has no attributions."""
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    return (
        f"inputs: padding changes what {type(model).__name__} answers (layers that mix neighbouring tokens, or a head "
        f"that reads a padding token: the configuration's pad_token_id is {padding}, is it the tokenizer's?), expected "
        "texts of one length; ask about one at a time"
    )
