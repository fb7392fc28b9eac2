"""Gates on a running model: hooks that multiply neurons, and the same numbers folded into the weights.

With gates ``g`` ``[F]`` a site computes ``u = W2 (g * z) + b`` instead of ``u = W2 z + b``. A hook multiplies
``z`` (`spurge.engine.models.projections`); folding multiplies the columns of ``W2``. Both can be undone exactly.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spurge.engine.models.parameters import oddity, same_bits, sharer
from spurge.engine.models.projections import RowGates, hooked
from spurge.engine.models.sites import Site


class _Gate:
    """Gates ``[F]`` of one site, the same at all positions, while they are active."""

    def __init__(self, gates: Tensor, info: Mapping[str, Any]) -> None:
        self.gates, self.info, self.active = gates, info, True
        columns = (gates != 1).nonzero()[:, 0]
        self._rows = RowGates(columns, gates[columns][None])

    def __call__(self) -> RowGates | None:
        return self._rows if self.active else None


class _Eager:
    """Makes code under ``torch.compile`` run eagerly while any gate is attached anywhere.

    A compiled model does not look for hooks that came after it was compiled, and keeps those it was compiled
    with: gates would be ignored, or stay after they were taken off, unnoticed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._stance: Any = None

    def hold(self) -> None:
        with self._lock:
            if self._holders == 0:
                self._stance = torch.compiler.set_stance("force_eager")
            self._holders += 1

    def release(self) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders == 0:
                self._stance.__exit__(None, None, None)


_EAGER = _Eager()


class Attached:
    """Gates that are attached to a model until :meth:`undo`; nothing else of the model is changed."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._holding = False

    def attach(
        self, sites: Mapping[str, Site], gates: Mapping[str, Tensor], info: Mapping[str, Any] | None = None
    ) -> None:
        """Attaches gates ``[F]`` to each site, all or none; ``info`` is where they come from."""
        try:
            _EAGER.hold()
            self._holding = True
            for name, vector in gates.items():
                projection = sites[name].projection
                weight = projection.parameter
                device = "cpu" if weight.is_meta else weight.device  # meta: offloaded, the hook moves the gates
                gate = _Gate(vector.to(device, torch.float32), info if info is not None else {})
                self._handles.append(projection.gate(gate))
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Takes the gates off; a second call does nothing."""
        while self._handles:
            self._handles.pop().remove()
        if self._holding:
            self._holding = False
            _EAGER.release()


@contextmanager
def attached(
    sites: Mapping[str, Site], gates: Mapping[str, Tensor], info: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Gates ``[F]`` by site name, attached inside the ``with`` block and always taken off after it."""
    handle = Attached()
    try:
        handle.attach(sites, gates, info)
        yield
    finally:
        handle.undo()


def _gates(module: nn.Module) -> list[_Gate]:
    return [hook.gates for hook in hooked(module) if isinstance(hook.gates, _Gate)]


def is_gated(model: nn.Module) -> bool:
    """Whether gates are attached to ``model`` now."""
    return any(_gates(module) for module in model.modules())


def gates_on(model: nn.Module) -> tuple[dict[str, Tensor], list[Mapping[str, Any]]]:
    """The gates ``[F]`` attached to ``model`` now, by module path, and where they come from.

    Stacked gates are multiplied, as they act.
    """
    product: dict[str, Tensor] = {}
    infos: dict[int, Mapping[str, Any]] = {}
    for name, module in model.named_modules():
        if found := _gates(module):
            product[name] = torch.stack([gate.gates.cpu() for gate in found]).prod(0)
            infos |= {id(gate.info): gate.info for gate in found}
    return product, list(infos.values())


@contextmanager
def suspended(model: nn.Module) -> Iterator[None]:
    """The model as if no gates were attached, inside the ``with`` block."""
    found = [gate for module in model.modules() for gate in _gates(module) if gate.active]
    try:
        for gate in found:
            gate.active = False
        yield
    finally:
        for gate in found:
            gate.active = True


class Folded:
    """Columns of down projections that were multiplied by gates, and their old bits."""

    def __init__(self) -> None:
        self._columns: list[tuple[Site, Tensor, Tensor, Tensor]] = []  # site, indices, old columns, new columns

    def fold(self, model: nn.Module, sites: Mapping[str, Site], gates: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """``W2[:, k] *= g_k`` in place for all sites, or for none.

        Raises:
            ValueError: a weight is on the meta device, quantised, wrapped, or shared with another module, or gates
                are attached to it, which would then act twice.
        """
        for name in gates:
            _foldable(model, sites[name])
            if _gates(sites[name].down):
                raise ValueError(f"fold: gates are attached to {name!r} now; take them off first")
        columns = []
        with torch.no_grad():
            for name, (indices, values) in gates.items():
                projection = sites[name].projection
                device = projection.parameter.device
                indices, values = indices.to(device), values.to(device)
                old = projection.columns(indices)
                columns.append((sites[name], indices, old, (old * values).to(old.dtype)))
            try:
                for site, indices, _, new in columns:
                    site.projection.write(indices, new)
            except BaseException:
                for site, indices, old, _ in columns:
                    site.projection.write(indices, old)
                raise
        self._columns = columns
        torch.clear_autocast_cache()  # which keeps the old weights in half precision until the outermost autocast ends

    def undo(self) -> None:
        """Puts the exact old columns back; a second call does nothing.

        Raises:
            ValueError: the folded columns have changed since (another fold, training, a cast); nothing is written.
        """
        with torch.no_grad():
            for site, indices, _, new in self._columns:
                projection = site.projection
                weight = projection.parameter
                if weight.dtype != new.dtype or not same_bits(projection.columns(indices.to(weight.device)), new):
                    raise ValueError(
                        f"undo: the folded columns of {site.name!r} have changed since the fold "
                        "(another fold, training, a cast); undo that first"
                    )
            for site, indices, old, _ in self._columns:
                device = site.parameter.device
                site.projection.write(indices.to(device), old.to(device))
        self._columns = []
        torch.clear_autocast_cache()


def _foldable(model: nn.Module, site: Site) -> None:
    """Raises ValueError unless the site's weight is a plain float tensor that nothing else uses."""
    key = site.projection.key
    weight = site.down._parameters.get(key)
    if odd := oddity(weight):
        raise ValueError(
            f"fold: the weight of {site.name!r} must be a plain float parameter, got {odd} "
            "(quantised or wrapped); use applied() instead"
        )
    assert weight is not None
    if weight.is_meta:
        raise ValueError(f"fold: the weight of {site.name!r} is on the meta device (offloaded or not loaded)")
    if other := sharer(model, site.down, key):
        raise ValueError(
            f"fold: the weight of {site.name!r} is shared with {other!r}, "
            "which folding would change too; use applied() instead"
        )
