"""Edits as data: gates of chosen neurons, with where they came from and which model they fit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from spurge.engine.base.checks import choice
from spurge.engine.base.files import PathLike, canonical_json, spurge_version
from spurge.engine.base.saved_results import Saved
from spurge.engine.base.temporary import Temporary, uncut
from spurge.engine.base.tensor_files import Contents
from spurge.engine.edits.adapters import Adapter, Exported, Format
from spurge.engine.edits.beside_adapters import adapted_layers, additions, merged
from spurge.engine.edits.edit_files import EditMismatch as EditMismatch
from spurge.engine.edits.edit_files import check_names, check_print, checked_print, parts_of, tensors_of
from spurge.engine.edits.exports import MAX_RANK, add_gates, add_vectors
from spurge.engine.edits.gates import Attached, Folded, Model, applied
from spurge.engine.models.heads import print_of
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.parameters import Place, named_as, plain_name
from spurge.engine.models.projections import plain
from spurge.engine.models.sites import Site, Units, find_sites, heads_of, joins_heads

Gates = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False, repr=False)
class NeuronEdit(Saved, kind="edit", what="an edit of neurons"):
    """Gates ``g_k`` on chosen neurons: activation ``z_k`` becomes ``g_k z_k`` at every position.

    1 leaves a neuron as it is, 0 erases it. The same as multiplying column k of the down projection by ``g_k``.
    A unit can be an attention head, too: its slice of what goes into the output projection is multiplied, or all its
    columns are. Made by :meth:`build`.

    Attributes:
        gates: site name to (indices int64 ``[n]`` ascending, gates float32 ``[n]``), on the CPU.
        model: fingerprint: site name to ``{"shape": [H, F], "dtype", "sha256"}`` of its down projection's weight. F
            counts units: of an attention's output projection, it says whether these are heads.
        info: provenance, JSON-able: ``method``, ``settings``, ``data`` (fingerprint), ``seed``, ``labels`` (which
            labels the method used: none, class, group) and whatever else the method records.

    Raises:
        ValueError: indices repeated or out of range, gates not finite, or shapes that do not fit together.
        TypeError: a wrong type, or ``info`` that has no JSON form.
    """

    gates: Gates
    model: dict[str, dict[str, Any]]
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_names(self.gates, self.model)
        checked = {}
        prints = {site: checked_print(site, found) for site, found in self.model.items()}
        for site, (indices, values) in self.gates.items():
            checked[site] = _checked(site, indices, values, prints[site])
        order = NeuronSet({site: indices for site, (indices, _) in checked.items()}).sites
        object.__setattr__(self, "gates", {site: checked[site] for site in order})
        object.__setattr__(self, "model", {site: prints[site] for site in order})
        object.__setattr__(self, "info", json.loads(canonical_json(self.info)))

    @classmethod
    def build(
        cls,
        model: nn.Module,
        neurons: NeuronSet,
        gates: Tensor | Sequence[float] | float,
        info: Mapping[str, Any] | None = None,
        *,
        units: Units | None = None,
    ) -> NeuronEdit:
        """An edit of ``neurons`` that fits ``model``; changes nothing.

        Args:
            model: the model the edit is for.
            neurons: which neurons; an empty set gives an edit that does nothing.
            gates: one number for all, or ``[n]`` in the order of iteration of ``neurons``.
            info: provenance.
            units: what is meant where a site is the output projection of an attention: its ``"heads"`` (or
                ``"both"``), or the single coordinates of its input (``"neurons"``). None: that there is no such site.

        Raises:
            ValueError: a site or neuron the model does not have, gates not finite or not one per neuron, or the
                output projection of an attention without ``units``.
            TypeError: a wrong type.
        """
        if not isinstance(neurons, NeuronSet):
            raise TypeError(f"neurons: expected a NeuronSet, got {type(neurons).__name__}")
        if units is not None:
            choice("units", units, get_args(Units))
        sites = _sites(model, neurons.sites)
        if units is None and (name := next((name for name, site in sites.items() if joins_heads(site)), None)):
            raise ValueError(
                f"neurons: {name!r} is the output projection of an attention; say whether its heads are meant "
                "(units='heads') or single coordinates (units='neurons')"
            )
        if units in ("heads", "both"):
            sites = {name: _heads(name, site) if joins_heads(site) else site for name, site in sites.items()}
        return cls.of_sites(sites, neurons, gates, info)

    @classmethod
    def of_sites(
        cls,
        sites: Mapping[str, Site],
        neurons: NeuronSet,
        gates: Tensor | Sequence[float] | float,
        info: Mapping[str, Any] | None = None,
    ) -> NeuronEdit:
        """As :meth:`build`, of sites by name."""
        neurons.check({name: site.width for name, site in sites.items()})
        prints = {name: _fingerprint(sites[name]) for name in neurons.sites}
        return cls(_assign(neurons, gates), prints, {"spurge": spurge_version(), **(info or {})})

    @property
    def neurons(self) -> NeuronSet:
        """The neurons that have a gate."""
        return NeuronSet({site: indices for site, (indices, _) in self.gates.items()})

    def vector(self) -> Tensor:
        """All gates as one float32 vector ``[n]``, in the order of ``neurons``."""
        return torch.cat([torch.empty(0), *(values for _, values in self.gates.values())])

    def with_gates(self, gates: Tensor | Sequence[float] | float) -> NeuronEdit:
        """The same neurons of the same model with other gates, one for all or ``[n]`` as :meth:`vector`."""
        return NeuronEdit(_assign(self.neurons, gates), self.model, self.info)

    def check(self, model: nn.Module) -> None:
        """Compares names, shapes, types and bits of the touched weights with those the edit was made for.

        Raises:
            EditMismatch: the model lacks a site, or a weight differs in shape, type or bits: another model, one
                fine-tuned since, or one into which an edit is folded.
        """
        self.fit(model)

    def fit(self, model: nn.Module, *, force: bool = False) -> dict[str, Site]:
        """The model's sites by name, once they pass :meth:`check`; with ``force`` only names and shapes must fit."""
        try:
            sites = sites_of_widths(model, {name: expected["shape"][-1] for name, expected in self.model.items()})
        except ValueError as error:
            raise EditMismatch(f"edit: not made for this model: {error}") from error
        for name, expected in self.model.items():
            shape = [sites[name].hidden, sites[name].width]
            if shape != expected["shape"]:
                raise EditMismatch(
                    f"edit: not made for this model: the weight of {name!r} is {shape}, the edit needs "
                    f"{expected['shape']}"
                )
        for name, expected in {} if force else self.model.items():
            found = _fingerprint(sites[name])
            if found != expected:
                found = _merged_fingerprint(model, sites[name]) or found
            check_print(f"the weight of {name!r}", name, found, expected)
        return sites

    def apply(self, model: nn.Module, *, force: bool = False) -> Attached:
        """Attaches the gates until ``undo()`` of the handle is called; weights are not touched. Edits stack.

        They act for every thread that runs the model. Attaching and taking off wait until no other thread is in a
        run of Spurge on the model; a plain forward that another thread has under way may see a part of the gates.
        Ctrl-C before the handle is returned leaves the model as it was.

        Code under ``torch.compile`` runs eagerly meanwhile: compiled models do not see new hooks.

        Raises:
            EditMismatch: as :meth:`check`; with ``force`` only for unknown sites and other shapes.
        """
        handle = Attached(self.applied(model, force=force))
        handle.apply()
        return handle

    def applied(self, model: Model, *, force: bool = False) -> Temporary[Model]:
        """:meth:`apply` for a ``with`` block; the model is back, bit for bit, however the block ends, Ctrl-C included.

        Raises:
            EditMismatch: as :meth:`apply`.
        """
        return applied(model, self.fit(model, force=force), self.full(), self.info)

    def full(self) -> dict[str, Tensor]:
        """Gates of all neurons of each touched site, float32 ``[F]``: 1 where the edit has none."""
        vectors = {}
        for site, (indices, values) in self.gates.items():
            vectors[site] = torch.ones(self.model[site]["shape"][1])
            vectors[site][indices] = values
        return vectors

    def fold(self, model: nn.Module, *, force: bool = False) -> Folded:
        """Multiplies the columns of the down projections in place, in all sites or in none: a plain checkpoint.

        Waits until no other thread is in a run of Spurge on the model; a plain forward under way may see a part of it.
        Ctrl-C before the handle is returned leaves the model as it was.

        Returns:
            A handle whose ``undo()`` puts the exact old bits back.

        Raises:
            EditMismatch: as :meth:`apply`.
            ValueError: a weight is quantised, wrapped, on the meta device, or shared with another module, or gates
                are attached to it now.
        """
        handle, sites = Folded(model), self.fit(model, force=force)
        uncut(partial(handle.fold, sites, self.gates), partial(handle.undo, surely=True))
        return handle

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

        ``PeftModel.from_pretrained(model, folder)`` then computes what the folded model does, but for rounding.

        Args:
            folder: a new folder, written whole or not at all.
            model: the model the edit is for.
            format: ``"lora"``: a change of rank k for k gated neurons of a layer (k d for heads of width d), at most
                the smaller side of its weight. ``"ia3"``: a vector that multiplies the layer's input.
            max_rank: of ``"lora"``: the highest rank of a layer.
            truncate: of ``"lora"``: take the nearest change of rank ``max_rank`` where none is exact.
            force: as :meth:`apply`.

        Returns:
            What was written; errors of truncated layers.

        Raises:
            EditMismatch: as :meth:`apply`.
            ValueError: ``format="head"``; the folder exists; a layer that peft cannot hold (experts in one parameter,
                quantised, in parts, of a ``torch.nn.TransformerEncoderLayer``); a rank above ``max_rank`` without
                ``truncate``; or a model that has adapters.
            OSError: the folder cannot be written.
        """
        choice("format", format, get_args(Format))
        if format == "head":
            raise ValueError("format: gates change no head; expected 'lora' or 'ia3'")
        adapter, sites = Adapter(model, self.info), self.fit(model, force=force)
        if format == "ia3":
            add_vectors(adapter, sites, self.full())
        else:
            add_gates(adapter, sites, self.gates, max_rank, truncate)
        return adapter.write(folder, format)

    def combine(self, other: NeuronEdit, rule: Literal["multiply", "last"] = "multiply") -> NeuronEdit:
        """Both edits as one. On shared neurons gates multiply (as if both were applied), or ``other``'s count.

        Raises:
            EditMismatch: a site that both touch has another fingerprint in each.
            ValueError: unknown ``rule``, or a product that is not finite.
        """
        if not isinstance(other, NeuronEdit):
            raise TypeError(f"other: expected a NeuronEdit, got {type(other).__name__}")
        choice("rule", rule, ("multiply", "last"))
        for site in self.model.keys() & other.model.keys():
            if self.model[site] != other.model[site]:
                raise EditMismatch(f"combine: the edits were made for different weights of {site!r}")
        model = {**self.model, **other.model}
        neurons = self.neurons | other.neurons
        gates = {}
        for site in neurons.sites:
            full = torch.ones(model[site]["shape"][1])
            for edit in (self, other):
                if site in edit.gates:
                    indices, values = edit.gates[site]
                    full[indices] = full[indices] * values if rule == "multiply" else values
            gates[site] = (neurons.indices(site), full[neurons.indices(site)])
        info = {"method": "combine", "rule": rule, "spurge": spurge_version(), "edits": [self.info, other.info]}
        return NeuronEdit(gates, model, info)

    def _to_parts(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return tensors_of(self.gates, "gates"), {"model": self.model, "info": self.info}

    @classmethod
    def _of_parts(cls, file: Contents) -> NeuronEdit:
        return cls(parts_of(file, "gates"), file.value("model", dict), file.value("info", dict))

    def __len__(self) -> int:
        return sum(values.numel() for _, values in self.gates.values())

    def __repr__(self) -> str:
        zero = int((self.vector() == 0).sum())
        method = f", {self.info['method']}" if "method" in self.info else ""
        return f"NeuronEdit({len(self)} neurons of {len(self.gates)} sites, {zero} erased{method})"


def _sites(model: nn.Module, names: Sequence[str]) -> dict[str, Site]:
    """The named sites of a model, called as in ``names``; one in wrappers is taken by its original names."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    found = {site.name: site for site in find_sites(model, list(names))} if names else {}
    own = {name: found[named_as(plain_name(name), found)] for name in names}
    return {name: replace(own[name], name=name) for name in sorted(own, key=lambda name: own[name].layer)}


def sites_of_widths(model: nn.Module, widths: Mapping[str, int]) -> dict[str, Site]:
    """The named sites; an attention's output projection as its heads where it has as many as it should have units.

    Raises:
        TypeError, ValueError: as :func:`spurge.engine.models.sites.find_sites`.
    """
    sites = _sites(model, tuple(widths))
    for name, site in sites.items():
        if joins_heads(site) and site.width != widths[name]:
            sites[name] = _heads(name, site)
    return sites


def _heads(name: str, output: Site) -> Site:
    return replace(heads_of(output), name=name)


def _fingerprint(site: Site) -> dict[str, Any]:
    weight = site.parameter
    if weight.is_meta:
        raise EditMismatch(f"model: the weight of {site.name!r} is on the meta device (offloaded or not loaded)")
    return {
        "shape": [site.hidden, site.width],
        "dtype": str(weight.dtype).removeprefix("torch."),
        "sha256": site.projection.fingerprint(),
    }


def _merged_fingerprint(model: nn.Module, site: Site) -> dict[str, Any] | None:
    """That of the plain layer which merging LoRA makes of a site's; None of another site."""
    layer = getattr(site.down, "base_layer", None)
    if not isinstance(layer, nn.Module) or not plain(layer):
        return None
    place = Place(f"{site.name}.weight", layer, "weight")
    parts = additions(adapted_layers(model).get(layer), place)
    if not parts:
        return None
    return print_of(place.name, merged(place.parameter, parts)) | {"shape": [site.hidden, site.width]}


def _assign(neurons: NeuronSet, gates: Any) -> Gates:
    """``gates`` dealt out to ``neurons`` in their order."""
    if not isinstance(gates, Tensor):
        try:
            gates = torch.tensor(gates, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"gates: expected a number or one per neuron, got {type(gates).__name__}") from error
    if gates.dim() == 0:
        gates = gates.expand(len(neurons))
    if gates.shape != (len(neurons),):
        raise ValueError(f"gates: need one number, or one for each of {len(neurons)} neurons, got {tuple(gates.shape)}")
    counts = neurons.counts()
    parts = gates.detach().to("cpu", torch.float32).split(list(counts.values()))
    return {site: (neurons.indices(site), part.clone()) for site, part in zip(counts, parts, strict=True)}


def _checked(site: str, indices: Tensor, values: Tensor, model: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """One site's gates, ascending, owned, on the CPU."""
    if indices.dtype != torch.int64 or indices.dim() != 1 or indices.shape != values.shape or not len(indices):
        raise ValueError(f"gates: {site!r} needs int64 indices [n] and gates [n], got {indices.shape}, {values.shape}")
    indices, order = indices.detach().cpu().sort()
    values = values.detach().to("cpu", torch.float32)[order]
    width = model["shape"][-1] if len(model["shape"]) == 2 else 0
    if indices[0] < 0 or indices[-1] >= width or bool((indices.diff() == 0).any()):
        raise ValueError(f"gates: {site!r} needs indices that differ and lie below {width}")
    if not bool(values.isfinite().all()):
        raise ValueError(f"gates: must be finite, got {values[~values.isfinite()][0]} at {site!r}")
    return indices, values
