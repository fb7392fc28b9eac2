"""What NeuronTune returns: a new last layer, the mask it was trained behind, and how it came about."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from spurge.engine.base.checks import choice, instance, integer, shaped
from spurge.engine.base.files import canonical_json
from spurge.engine.base.saved_results import Saved
from spurge.engine.base.tables import Table, page
from spurge.engine.base.tensor_files import Contents
from spurge.engine.data.rows import check_names
from spurge.engine.edits.weight_edits import WeightEdit
from spurge.engine.features.features import Features
from spurge.engine.models.heads import Head
from spurge.methods.neurontune.dimensions import Scores, Signs, encode


@dataclass(frozen=True, eq=False, repr=False)
class Tuned(Saved, kind="neurontune", what="a result of NeuronTune"):
    """A retrained last layer; call it with features to get logits.

    Attributes:
        head: the new layer, on encoded features ``[N, D]``; suppressed weights are 0, or small where some was kept.
        base: the model's own layer.
        mask: which dimensions are suppressed, bool ``[D]``, or ``[O, D]`` where every output has its own.
        scores: what the mask was chosen by.
        signed: whether the features it was made from have negative values.
        info: method, settings, labels used (``"class"``), data, and ``candidates`` with the criteria of each.
    """

    head: Head
    base: Head
    mask: Tensor
    scores: Scores
    signed: bool
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "info", json.loads(canonical_json(self.info)))

    @property
    def signs(self) -> Signs:
        """What the new layer reads, see `spurge.methods.neurontune.dimensions.encode`."""
        return self.scores.signs

    @property
    def labels(self) -> str:
        """Labels that were used: class."""
        return str(self.info["labels"])

    @property
    def suppressed(self) -> float:
        """Share of dimensions that are suppressed."""
        return float(self.mask.double().mean())

    def __call__(self, features: Features) -> Tensor:
        """Logits ``[N, O]``, so that it can stand in `spurge.compare`."""
        return self.logits(features.values)

    def logits(self, values: Tensor) -> Tensor:
        """Logits ``[N, O]`` of the model's own features ``[N, M]``."""
        return self.head.logits(encode(values, self.signs))

    def predictions(self, values: Tensor) -> Tensor:
        """The class with the largest logit, int64 ``[N]``."""
        return self.head.predictions(encode(values, self.signs))

    def plain(self) -> Head:
        """The new layer on the model's own features, where it can be one.

        Raises:
            ValueError: the features are signed, and the layer reads their positive parts.
        """
        if self.signs in ("magnitude", "raw"):
            return self.head
        if self.signed:
            raise ValueError(
                f"signs: with {self.signs!r} the new layer reads positive parts of features, and these have negative "
                "values: no linear layer of the model does that; call the result itself, or use signs='magnitude'"
            )
        return self.base.with_(weight=self.head.weight[:, : self.base.width], bias=self.head.bias)

    def edit(self) -> WeightEdit:
        """The new layer as an edit of the model's weights.

        Raises:
            ValueError: as :meth:`plain`, or features that belong to no model.
        """
        plain = self.plain()
        return WeightEdit.for_head(self.base, plain.weight, plain.bias, self.info)

    def _to_parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        scores = self.scores
        (tensors, _), (base, place) = self.head.to_parts(), self.base.to_parts("base.")
        tensors |= base | {"mask": self.mask}
        tensors |= {"deltas": scores.deltas, "wrong": scores.wrong, "right": scores.right}
        rest = {
            "place": place,
            "scores": {"signs": scores.signs, "names": scores.names, "skipped": scores.skipped},
            "signed": self.signed,
        }
        return tensors, {"tuned": rest, "info": self.info}

    @classmethod
    def _of_parts(cls, file: Contents) -> Tuned:
        tensors, rest = file.tensors, file.value("tuned", dict)
        own = rest["scores"]
        base = Head.of_parts(tensors, rest["place"], "base.")
        signs = choice("signs", own["signs"], get_args(Signs))
        deltas, wrong, right = (tensors[name] for name in ("deltas", "wrong", "right"))
        names = check_names(own["names"])
        skipped = tuple(integer("skipped", label, 0) for label in own["skipped"])
        head = Head(tensors["weight"], tensors.get("bias"))
        shaped("deltas", deltas, torch.float64, len(names), head.width)
        for name in ("wrong", "right"):
            shaped(name, tensors[name], torch.int64, len(names))
        mask = tensors["mask"]
        shaped("mask", mask, torch.bool, *((head.width,) if mask.dim() == 1 else (head.outputs, head.width)))
        info = file.value("info", dict)
        instance("info: labels", info["labels"], str)
        scores = Scores(deltas, wrong, right, skipped, signs, names)
        if head.weight.shape == base.weight.shape:
            head = base.with_(weight=head.weight, bias=head.bias)
        return cls(head, base, mask, scores, instance("signed", rest["signed"], bool), info)

    def _repr_html_(self) -> str:
        scores = self.scores
        lines = [["class", "right", "wrong", "dimensions above 0"]]
        above = (scores.deltas > 0).sum(1).tolist()
        for name, *numbers in zip(scores.names, scores.right.tolist(), scores.wrong.tolist(), above, strict=True):
            lines.append([name, *map(str, numbers)])
        return page([Table(repr(self), lines)], [repr(scores)])

    def __repr__(self) -> str:
        rows = f"{self.mask.shape[0]} masks" if self.mask.dim() == 2 else f"{int(self.mask.sum())}"
        return (
            f"Tuned({self.info.get('method', 'NeuronTune')}, {rows} of {self.mask.shape[-1]} dimensions suppressed "
            f"({100 * self.suppressed:.1f} %), labels used: {self.labels})"
        )
