"""The model as everything behind the door holds it: what is to be known of it, found once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spurge.engine.base.budgets import budget
from spurge.engine.base.tensor_parallel import agreed, mesh_of
from spurge.engine.data.examples import Example, Inputs, encode
from spurge.engine.data.rows import renumbered
from spurge.engine.models.call_arguments import Limits, logits_of
from spurge.engine.models.readout import first_token, is_decoder, language_head, last_real_token
from spurge.engine.models.sites import Site, Units, find_sites
from spurge.engine.models.verbalizers import Verbalized

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_NUMBERED = re.compile(r"label_\d+", re.IGNORECASE)  # the names that transformers gives outputs that have none


@dataclass(frozen=True, eq=False)
class Handle:
    """A model, its tokenizer, and what follows from them; each thing is found when it is first asked for, and kept.

    Attributes:
        model: as the user gave it; what a handle says of it holds as long as its modules stay where they are.
        tokenizer: None where no text is read.
    """

    model: nn.Module
    tokenizer: Any = None

    @classmethod
    def of(cls, model: nn.Module | Handle, tokenizer: Any = None) -> Handle:
        """``model`` itself where it is a handle already."""
        return model if isinstance(model, Handle) else cls(model, tokenizer)

    @cached_property
    def sites(self) -> list[Site]:
        """Where its feed-forward neurons live, by layer.

        Raises:
            TypeError, ValueError: as :func:`spurge.engine.models.sites.find_sites`.
        """
        return find_sites(self.model)

    def sites_of(self, units: Units) -> list[Site]:
        """Where its neurons, its attention heads, or both, live.

        Raises:
            TypeError, ValueError: as :func:`spurge.engine.models.sites.find_sites`.
        """
        return self.sites if units == "neurons" else find_sites(self.model, units=units)

    @cached_property
    def device(self) -> torch.device:
        """Where its inputs go."""
        return input_device(self.model)

    @cached_property
    def mesh(self) -> DeviceMesh | None:
        """The ranks that hold its weights together; None where each has all of them."""
        return mesh_of(self.model)

    @cached_property
    def head(self) -> nn.Module | None:
        """A language model's projection to the vocabulary; None for other models."""
        return language_head(self.model)

    @cached_property
    def limits(self) -> Limits:
        """What its inputs may be."""
        return Limits.of(self.model)

    @cached_property
    def decoder(self) -> bool:
        """Whether its tokens see only what came before them."""
        try:
            sites = self.sites
        except ValueError:
            sites = []
        return is_decoder(self.model, sites)

    @property
    def verbalizer(self) -> dict[str, Any] | None:
        """How a language model is asked for a label, JSON-able; None for other models."""
        if not isinstance(self.model, Verbalized):
            return None
        template = getattr(self.tokenizer, "template", None)
        return {"tokens": self.model.tokens, "pool": self.model.pool, "template": template}

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Names of its outputs in order; None where it has none, or they only count."""
        if isinstance(self.model, Verbalized):
            return tuple(self.model.tokens)
        names = getattr(getattr(self.model, "config", None), "id2label", None) or {}
        ordered = tuple(str(names[index]) for index in sorted(names))
        return None if not ordered or any(_NUMBERED.fullmatch(name) for name in ordered) else ordered

    def check_labels(self, argument: str, labels: Sequence[str]) -> None:
        """Refuses labels that have the names of the model's outputs in another order: numbers would mean another one.

        Raises:
            ValueError: so they are.
        """
        own = self.labels
        if own is None or len(own) != len(labels):
            return
        places = renumbered(labels, own)
        if None not in places and places != sorted(places):  # type: ignore[type-var]
            raise ValueError(
                f"{argument}: labels {', '.join(labels)} are in another order than the model's outputs, "
                f"{', '.join(own)}; load them with labels={list(own)}"
            )

    def check_single_label(self, argument: str) -> None:
        """Refuses a model that gives no label for each text: numbers (regression), or several labels at once.

        Raises:
            ValueError: so it is.
        """
        config = getattr(self.model, "config", None)
        outputs, problem = getattr(config, "num_labels", None), getattr(config, "problem_type", None)
        if isinstance(self.model, Verbalized) or self.head is not None:
            return
        if outputs == 1 or problem in ("regression", "multi_label_classification"):
            raise ValueError(
                f"{argument}: expected a model that gives each text one label, {type(self.model).__name__} has "
                f"num_labels={outputs} and problem_type={problem!r}; attribution to a target of your own works "
                "(spurge.Cascade)"
            )

    def probed(self, inputs: Mapping[str, Any]) -> Tensor:
        """The token whose state the head reads, ``[B]`` int64 (`spurge.engine.models.probes.probed_token`)."""
        if not self.decoder:
            return first_token(inputs)
        padding = getattr(getattr(self.model, "config", None), "pad_token_id", None)
        return last_real_token(inputs, padding if self.head is None else None)

    def encode(
        self, examples: Sequence[Example] | Sequence[str] | Sequence[tuple[str, str]], max_length: int | None = None
    ) -> Inputs:
        """Texts as the model takes them, where it takes them (`spurge.engine.data.examples.encode`).

        Raises:
            TypeError, ValueError: as `encode`, and for tokens or positions that the model lacks.
        """
        inputs = encode(self.tokenizer, examples, max_length=max_length)
        self.limits.check(inputs)
        return inputs.to(self.device)

    def logits(self, inputs: Mapping[str, Any]) -> Tensor:
        """A classifier's logits, ``[B, Y]``.

        Raises:
            ValueError: an output without such logits.
        """
        return logits_of(self.model(**inputs))

    def fingerprints(self, units: Units = "neurons") -> dict[str, str]:
        """Of the weights behind its neurons (heads), by site."""
        return {site.name: site.projection.fingerprint() for site in self.sites_of(units)}

    def budget(self, memory: str | int | None) -> int:
        """The bytes that a job on the model may take: what was asked for, else a share of what is free.

        Of several devices, what the fullest of them offers; of ranks that hold the model together, the same on all.

        Raises:
            ValueError: ``memory`` is no size, or the model has no parameters.
        """
        devices = {p.device for p in self.model.parameters() if not p.is_meta} or {self.device}
        fits = min(budget(memory, device) for device in devices)
        if self.mesh is None:
            return fits
        if memory is None and self.mesh.device_type == "cpu":
            fits //= self.mesh.size()
        return agreed([fits], self.mesh, largest=False)[0]


def input_device(model: nn.Module) -> torch.device:
    """The device of the input embeddings, of the first parameter where a model has none.

    Parts that accelerate keeps elsewhere and brings when they are used (their weights are on "meta" meanwhile) say
    themselves where they run.

    Raises:
        ValueError: the model has no parameters.
    """
    for part in (_embeddings(model), model):
        parameter = next(part.parameters(), None)
        if parameter is not None and parameter.device.type != "meta":
            return parameter.device
        runs_on = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if runs_on is not None:
            return torch.device(runs_on)
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise ValueError("model: has no parameters, expected a model with weights")
    return parameter.device


def _embeddings(model: nn.Module) -> nn.Module:
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # not of transformers, or of its models without any
        return model
    return found if isinstance(found, nn.Module) else model
