"""What edits of a model's parameters have in common: they are applied, undone and folded by overwriting entries."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Any, get_args

from torch import Tensor, nn

from spurge.engine.base.checks import choice
from spurge.engine.base.files import PathLike
from spurge.engine.base.saved_results import Saved
from spurge.engine.base.temporary import Temporary, uncut
from spurge.engine.edits.adapters import Adapter, Exported, Format
from spurge.engine.edits.beside_adapters import adapted_layers, additions, merged
from spurge.engine.edits.edit_files import EditMismatch, check_print
from spurge.engine.edits.exports import MAX_RANK, add_weights
from spurge.engine.edits.overwrites import Changes, Model, Overwritten, original, overwritten
from spurge.engine.models.heads import print_of
from spurge.engine.models.parameters import FLOATS, Place, check_writable, find_places, replaced

TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
"""Types of parameters that can be edited, by name."""


class ParameterEdit(Saved):
    """An edit that gives entries of a model's parameters new values; all others stay.

    Attributes:
        model: fingerprint: parameter name to ``{"shape", "dtype", "sha256"}`` of the unedited parameter.
        info: provenance, JSON-able, as :attr:`NeuronEdit.info <spurge.NeuronEdit>`.
    """

    model: dict[str, dict[str, Any]]
    info: dict[str, Any]

    @abstractmethod
    def _names(self) -> Collection[str]:
        """Of the edited parameters."""

    @abstractmethod
    def _changes(self, places: dict[str, Place]) -> Changes:
        """The new values, by parameter name, of a model's parameters that fit."""

    def check(self, model: nn.Module) -> None:
        """Compares names, shapes, types and bits of the touched parameters with those the edit was made for.

        Weight edits that are applied now are looked through; those folded in are not.

        Raises:
            EditMismatch: the model lacks a parameter, or one differs in shape, type or bits: another model, one
                trained since, or one into which an edit is folded.
            ValueError: a parameter is tied to another, quantised or on the meta device.
        """
        self.fit(model)

    def fit(self, model: nn.Module, *, force: bool = False) -> dict[str, Place]:
        """The edited parameters by name, once they pass :meth:`check`; with ``force`` other types and bits do too.

        Beside a parameter's LoRA an edit fits that was made for it alone, or for what merging makes of it.
        """
        try:
            places = find_places(model, self._names())
        except ValueError as error:
            raise EditMismatch(f"edit: not made for this model: {error}") from error
        for name, expected in self.model.items():
            if (shape := list(places[name].parameter.shape)) != expected["shape"]:
                needs = f"{name!r} is {shape}, the edit needs {expected['shape']}"
                raise EditMismatch(f"edit: not made for this model: {needs}")
            check_writable(model, places[name])
        adapted = adapted_layers(model)
        for name, expected in self.model.items():
            place = places[name]
            around = adapted.get(place.module)
            if force and around is None:
                continue
            found = print_of(name, own := original(place))
            if found != expected and (parts := additions(around, place)):
                places[name], found = replace(place, added=tuple(parts)), print_of(name, merged(own, parts))
            if not force:
                check_print(f"parameter {name!r}", name, found, expected)
        return places

    def apply(self, model: nn.Module, *, force: bool = False) -> Overwritten:
        """Writes the new values in place until ``undo()`` of the handle is called, all or none; the old bits come back.

        Edits stack: where two meet, the one applied last counts, and they come off in any order. A copy or checkpoint
        made meanwhile holds the edited weights. Compiled models see them too, and so does every thread. Writing waits
        until no other thread is in a run of Spurge on the model; a plain forward that another thread has under way may
        read a part of the new values. Ctrl-C before the handle is returned leaves the model as it was.

        Raises:
            EditMismatch: as :meth:`check`; with ``force`` only for unknown names and other shapes.
            ValueError: a parameter is tied, quantised or on the meta device; values that its type cannot hold.
        """
        return self._written(Overwritten(model), self.fit(model, force=force))

    def applied(self, model: Model, *, force: bool = False) -> Temporary[Model]:
        """:meth:`apply` for a ``with`` block; the model is back, bit for bit, however the block ends, Ctrl-C included.

        Raises:
            EditMismatch, ValueError: as :meth:`apply`.
            ValueError: at the end of the block, if the edited weights have changed in it (training, a cast); they are
                then left as they are.
        """
        places = self.fit(model, force=force)
        return overwritten(model, places, self._changes(places), self.info)

    def fold(self, model: nn.Module, *, force: bool = False) -> Overwritten:
        """Writes the new values in place for good, all or none: a plain checkpoint.

        Ctrl-C before the handle is returned leaves the model as it was.

        Returns:
            A handle whose ``undo()`` puts the exact old bits back.

        Raises:
            EditMismatch, ValueError: as :meth:`apply`, or an edit is applied to one of the parameters now.
        """
        return self._written(Overwritten(model, lasting=True), self.fit(model, force=force))

    def export(
        self,
        folder: PathLike,
        model: nn.Module,
        format: Format = "lora",  # noqa: A002 - the word of file formats
        *,
        max_rank: int = MAX_RANK,
        truncate: bool = False,
        force: bool = False,
    ) -> Exported:
        """Writes the edit as an adapter that ``peft`` loads; the model is not changed, and peft not needed.

        ``PeftModel.from_pretrained(model, folder)`` then computes what the folded model does, but for rounding. A
        change of all entries needs the full rank, and more room than the model's own weights: fold such an edit, or
        truncate it.

        Args:
            folder: a new folder, written whole or not at all.
            model: the model the edit is for.
            format: ``"lora"``: changes of linear layers as products of low rank; the classifier's head, norms and
                embeddings as they are (``modules_to_save``). ``"head"``: of an edit of the head alone, beside an
                adapter that does nothing.
            max_rank: the highest rank of a layer.
            truncate: take the nearest change of rank ``max_rank`` where none is exact.
            force: as :meth:`apply`.

        Returns:
            What was written; errors of truncated layers.

        Raises:
            EditMismatch: as :meth:`apply`.
            ValueError: ``format="ia3"``; ``format="head"`` for an edit of other parameters too; the folder exists; a
                parameter that peft cannot hold; a rank above ``max_rank`` without ``truncate``; or a model that has
                adapters.
            OSError: the folder cannot be written.
        """
        choice("format", format, get_args(Format))
        if format == "ia3":
            raise ValueError("format: changes of single weights multiply no input; expected 'lora' or 'head'")
        adapter, places = Adapter(model, self.info), self.fit(model, force=force)
        head = adapter.head()
        others = [name for name, place in places.items() if adapter.path(place.module) != head]
        if format == "head" and others:
            what = f"the edit changes {others[0]!r} beside the head" if head else "there is no classifier's head"
            raise ValueError(f"format: {what}; expected 'lora'")
        old = {name: original(place).cpu() for name, place in places.items()}
        new = {name: replaced(old[name], *pair) for name, pair in self._changes(places).items()}
        add_weights(adapter, places, old, new, self._products(), max_rank, truncate)
        return adapter.write(folder, format)

    def _products(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Of parameters ``[O, I]`` whose change is known as a product: its factors ``[O, r]`` and ``[r, I]``."""
        return {}

    def _written(self, handle: Overwritten, places: dict[str, Place]) -> Overwritten:
        uncut(partial(handle.apply, places, self._changes(places), self.info), partial(handle.undo, surely=True))
        return handle
