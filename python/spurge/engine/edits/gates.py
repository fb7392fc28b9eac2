"""Gates on a running model: hooks that multiply neurons, and the same numbers folded into the weights.

With gates ``g`` ``[F]`` a site computes ``u = W2 (g * z) + b`` instead of ``u = W2 z + b``. A hook multiplies
``z`` (`spurge.engine.models.projections`); folding multiplies the columns of ``W2``. Both can be undone exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from threading import get_ident
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from spurge.engine.base.gradients import grad_mode
from spurge.engine.base.temporary import Temporaries, Temporary, temporary, uncut
from spurge.engine.models.hooks import EAGER, alone
from spurge.engine.models.parameters import oddity, plain_name, same_bits, sharer
from spurge.engine.models.projections import Composite, RowGates, hooked
from spurge.engine.models.sites import Site

Model = TypeVar("Model", bound=nn.Module)


class _Gate:
    """Gates ``[F]`` of one site, the same at all positions.

    Args:
        thread: the only one that they act for; None: all.

    Attributes:
        blind: threads that they do not act for now.
    """

    def __init__(self, gates: Tensor, info: Mapping[str, Any], thread: int | None) -> None:
        self.gates, self.info = gates, info
        columns = (gates != 1).nonzero()[:, 0]
        self._rows, self._thread = RowGates(columns, gates[columns][None]), thread
        self.blind: set[int] = set()

    @property
    def acts(self) -> bool:
        """Whether they act for this thread."""
        here = get_ident()
        return self._thread in (None, here) and here not in self.blind

    def __call__(self) -> RowGates | None:
        return self._rows if self.acts else None


@temporary
def attached(
    sites: Mapping[str, Site],
    gates: Mapping[str, Tensor],
    info: Mapping[str, Any] | None = None,
    *,
    everywhere: bool = False,
) -> Iterator[None]:
    """Gates ``[F]`` by site name, attached inside the ``with`` block and always taken off after it.

    Args:
        info: where they come from.
        everywhere: they act for all threads, not only for this one.
    """
    thread = None if everywhere else get_ident()
    with Temporaries() as changes:
        changes.enter_context(EAGER.held())
        for name, vector in gates.items():
            projection = sites[name].projection
            weight = projection.parameter
            place = "cpu" if weight.is_meta else weight.device  # meta: offloaded, the hook moves the gates
            gate = _Gate(vector.to(place, torch.float32), info if info is not None else {}, thread)
            changes.enter_context(projection.gate(gate))
        yield


@temporary
def applied(
    model: Model, sites: Mapping[str, Site], gates: Mapping[str, Tensor], info: Mapping[str, Any]
) -> Iterator[Model]:
    """Gates ``[F]`` by site name for all threads, attached and taken off between two runs of Spurge on the model."""
    change = attached(sites, gates, info, everywhere=True)
    with alone(model):
        change.__enter__()
    yield model
    with alone(model, surely=True):
        change.__exit__()


class Attached:
    """Gates that are attached to a model from :meth:`apply` to :meth:`undo`; nothing else of the model is changed."""

    def __init__(self, change: Temporary[Any]) -> None:
        self._change, self._entered = change, False

    def apply(self) -> None:
        """Attaches the gates."""
        uncut(self._enter, self.undo)

    def _enter(self) -> None:
        self._change.__enter__()
        self._entered = True

    def undo(self) -> None:
        """Takes the gates off, between two runs of Spurge on the model; a second call does nothing."""
        uncut(self._leave)

    def _leave(self) -> None:
        if self._entered:
            self._entered = False
            self._change.__exit__()


def _gates(module: nn.Module) -> list[_Gate]:
    return [hook.gates for hook in hooked(module) if isinstance(hook.gates, _Gate)]


def is_gated(model: nn.Module) -> bool:
    """Whether gates on ``model`` act for this thread now."""
    return any(gate.acts for module in model.modules() for gate in _gates(module))


def gates_on(model: nn.Module) -> tuple[dict[str, Tensor], list[Mapping[str, Any]]]:
    """The gates ``[F]`` on ``model`` that act for this thread now, by module path, and where they come from.

    Stacked gates are multiplied, as they act; those of heads on top of single coordinates are of coordinates, too.
    """
    product: dict[str, Tensor] = {}
    infos: dict[int, Mapping[str, Any]] = {}
    for name, module in model.named_modules():
        if found := [gate for gate in _gates(module) if gate.acts]:
            most = max(len(gate.gates) for gate in found)
            each = [gate.gates.cpu().repeat_interleave(most // len(gate.gates)) for gate in found]
            product[plain_name(name)] = torch.stack(each).prod(0)
            infos |= {id(gate.info): gate.info for gate in found}
    return product, list(infos.values())


@temporary
def suspended(model: nn.Module) -> Iterator[None]:
    """The model as if no gates were attached, for this thread, inside the ``with`` block."""
    here = get_ident()
    found = [gate for module in model.modules() for gate in _gates(module) if gate.acts]
    for gate in found:
        gate.blind.add(here)
    yield
    for gate in found:
        gate.blind.discard(here)


class Folded:
    """Columns of down projections that were multiplied by gates, and their old bits."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._columns: list[tuple[Site, Tensor, Tensor, Tensor]] = []  # site, indices, old columns, new columns

    def fold(self, sites: Mapping[str, Site], gates: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """``W2[:, k] *= g_k`` in place for all sites, or for none, between two runs of Spurge on the model.

        Raises:
            ValueError: a weight is on the meta device, quantised, wrapped, or shared with another module, or gates
                are attached to it, which would then act twice.
        """
        with alone(self._model), grad_mode(False):
            for name in gates:
                _foldable(self._model, sites[name])
                if _gates(sites[name].down):
                    raise ValueError(f"fold: gates are attached to {name!r} now; take them off first")
            columns = []
            for name, (indices, values) in gates.items():
                projection = sites[name].projection
                device = projection.parameter.device
                indices, values = indices.to(device), values.to(device).repeat_interleave(projection.size)
                old = projection.columns(indices)
                columns.append((sites[name], indices, old, (old * values).to(old.dtype)))
            self._columns = list(columns)

            def write() -> None:
                for site, indices, _, new in columns:
                    site.projection.write(indices, new)
                _forget_casts()

            uncut(write, self._write_back)

    def undo(self, *, surely: bool = False) -> None:
        """Puts the exact old columns back, between two runs of Spurge; a second call does nothing.

        Args:
            surely: Ctrl-C does not end the waiting for a run of Spurge in another thread.

        Raises:
            ValueError: the folded columns have changed since (another fold, training, a cast); nothing is written.
        """
        with alone(self._model, surely=surely), grad_mode(False):
            for site, indices, _, new in self._columns:
                projection = site.projection
                weight = projection.parameter
                if weight.dtype != new.dtype or not same_bits(projection.columns(indices.to(weight.device)), new):
                    raise ValueError(
                        f"undo: the folded columns of {site.name!r} have changed since the fold "
                        "(another fold, training, a cast); undo that first"
                    )
            uncut(self._write_back)

    def _write_back(self) -> None:
        """Writes the old columns, and knows after each site which are still to be written."""
        while self._columns:
            site, indices, old, _ = self._columns[-1]
            device = site.parameter.device
            site.projection.write(indices.to(device), old.to(device))
            self._columns.pop()
        _forget_casts()


def _forget_casts() -> None:
    torch.clear_autocast_cache()  # which keeps the old weights in half precision until the outermost autocast ends


def _foldable(model: nn.Module, site: Site) -> None:
    """Raises ValueError unless the site's weight is a plain float tensor that nothing else uses."""
    key = site.projection.key
    weight = site.down._parameters.get(key)
    odd = oddity(weight)
    if odd is None and isinstance(site.projection, Composite):
        odd = f"a {type(site.down).__name__} that computes with more than its weight"
    if odd:
        raise ValueError(
            f"fold: the weight of {site.name!r} must be a plain float parameter, got {odd} "
            "(quantised, adapted or wrapped); use applied() instead, or merge adapters into the model first"
        )
    assert weight is not None
    if weight.is_meta:
        raise ValueError(f"fold: the weight of {site.name!r} is on the meta device (offloaded or not loaded)")
    if other := sharer(model, site.down, key):
        raise ValueError(
            f"fold: the weight of {site.name!r} is shared with {other!r}, "
            "which folding would change too; use applied() instead"
        )
