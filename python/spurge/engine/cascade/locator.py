"""A model prepared for one question at a time: the lowest latency from a prompt to the scores of all neurons."""

from __future__ import annotations

import copy
import sys
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from spurge.engine.base.checks import choice, integer, warn
from spurge.engine.base.device_checks import Check, deferred, settle
from spurge.engine.cascade.attribution import Attribution
from spurge.engine.cascade.cascade import Cascade, Prompt, Rule, Target, predicted_logit
from spurge.engine.cascade.cuda_graph import CudaGraph
from spurge.engine.cascade.gradient_path import AUDIT
from spurge.engine.cascade.paths import settled
from spurge.engine.data.examples import checked_texts
from spurge.engine.models.call_arguments import main_input
from spurge.engine.models.handle import Handle
from spurge.engine.models.sites import NeuronRef, Site, Units

MOST_GRAPHS = 8  # each keeps its own memory
FASTER = 1.2  # bfloat16 has to be so many times faster to be chosen
_ROWS = 512  # of the products that decide it

Asked = tuple[Attribution, list[Check]]
Asking = Mapping[str, Any] | str | list[str] | tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Answer:
    """Attributions that a device may still be working on."""

    _found: Attribution
    _checks: list[Check]

    def result(self) -> Attribution:
        """The attributions; waits for the device.

        Raises:
            ValueError: a target that is not finite, or an example without a real token.
        """
        settle(self._checks)
        return self._found

    def top(self, n: int = 10, *, target: int = 0, example: int | None = None) -> list[tuple[NeuronRef, float]]:
        """As `Attribution.top`; ranked on the device, which alone is waited for."""
        return self.result().top(n, target=target, example=example)


class Locator:
    """Effects of all neurons, prompt by prompt: one gradient of the unedited model, or the layer path's integral.

    Sites, where norms stand and memory are worked out at the first call and kept. On a GPU the whole computation is
    recorded as a CUDA graph for each shape, texts padded to a multiple of ``bucket`` tokens, and replayed on the
    caller's stream; nothing waits for the device until :meth:`Answer.result`. Several threads may each have a Locator
    of one model: on the model itself they take turns, replayed graphs do not touch it.

    Args:
        model: as `Cascade` takes it. Weights edited in place are seen; applied gates, too, but for recorded graphs and
            copies (``dtype``): make a new Locator then.
        target: what is attributed, unless a call names another one.
        tokenizer: with it, texts are taken where inputs are.
        path: ``"gradient"``: one forward and one backward pass; or ``"layer"``. None as in `Cascade`.
        exact, audit, seed, nodes, rule, tolerance, completeness, attention, units, read, memory, sites: as `Cascade`
            takes them; on the gradient path nothing is measured unless it is asked for.
        dtype: compute in this type, on a copy of the model; ``"fastest"``: bfloat16 where a short measurement on the
            model's own matrices finds it faster by a fifth. None: the model as it is.
        graphs: record CUDA graphs. Calls with a target of their own, a tolerance, or a :class:`Prompt` run without, and
            so does a model on several devices.
        bucket: tokens; shorter texts with an attention mask are padded on the right to a multiple of it.

    Raises:
        ValueError: a setting out of range, a model without sites.
    """

    def __init__(
        self,
        model: nn.Module,
        target: Target = predicted_logit,
        *,
        tokenizer: Any = None,
        path: Literal["gradient", "layer"] | None = None,
        exact: int | None = None,
        audit: int | None = None,
        seed: int = 0,
        nodes: int | None = None,
        rule: Rule | None = None,
        tolerance: float | None = None,
        completeness: bool = False,
        attention: bool = False,
        units: Units = "neurons",
        read: int = 1,
        memory: str | int | None = None,
        sites: Sequence[Site] | None = None,
        dtype: torch.dtype | Literal["fastest"] | None = None,
        graphs: bool = True,
        bucket: int = 16,
    ):
        self.target, self.bucket = target, integer("bucket", bucket, 1)
        handle, self.tokenizer = _as_type(Handle.of(model), dtype), tokenizer
        parameters = list(handle.model.parameters())
        divided = handle.mesh is not None or len({parameter.device for parameter in parameters}) > 1
        way, _, _ = settled(path, nodes, rule)
        choice("path", way, ("gradient", "layer"))
        if way == "gradient":
            exact = 0 if exact is None else exact
            audit = (0 if tolerance is None else AUDIT) if audit is None else audit
        self.cascade = Cascade(
            handle,
            path=way,
            exact=exact,
            audit=audit,
            seed=seed,
            nodes=nodes,
            rule=rule,
            tolerance=tolerance,
            completeness=completeness or (way == "layer" and tolerance is not None),
            attention=attention,
            units=units,
            read=read,
            memory=memory,
            sites=sites,
        )
        self.dtype, self.device = parameters[0].dtype, parameters[0].device
        fixed = tolerance is None and not (way == "gradient" and self.cascade.effort.measures)
        self._records = graphs and self.device.type == "cuda" and fixed and not divided
        self._filler = None if attention else _filler(handle)  # a target that reads attention knows the text's length
        self._graphs: OrderedDict[tuple[Any, ...], CudaGraph[Asked] | None] = OrderedDict()

    def __call__(self, inputs: Asking | Prompt, target: Target | None = None) -> Attribution:
        """Attribution of every neuron, the device waited for.

        Args:
            inputs: keyword arguments of the model, tensors ``[B, ...]``, a prompt that was read, or texts.
            target: another than the Locator's.

        Raises:
            ValueError: as `Cascade.attribute`.
        """
        return self.ask(inputs, target).result()

    def ask(self, inputs: Asking | Prompt, target: Target | None = None) -> Answer:
        """As a call, but on a GPU without waiting for it.

        Raises:
            ValueError: empty batch, a target of the wrong shape, a budget too small for one example.
        """
        if not isinstance(inputs, Prompt):
            inputs = self._encoded(inputs)
            main_input(inputs)
        if target is None and self._records and not isinstance(inputs, Prompt):
            tensors = {name: value for name, value in inputs.items() if torch.is_tensor(value)}
            if len(tensors) == len(inputs) and all(value.device == self.device for value in tensors.values()):
                answer = self._replayed(self._padded(tensors))
                if answer is not None:
                    return answer
        if self.device.type != "cuda" or self.cascade.tolerance is not None:
            return Answer(self.cascade.attribute(inputs, target or self.target), [])
        return Answer(*self._attribute(inputs, target or self.target))

    def read(self, inputs: Asking) -> Prompt:
        """The unedited pass over a batch, to ask several targets about (`Cascade.read`)."""
        return self.cascade.read(self._encoded(inputs))

    def _encoded(self, inputs: Asking) -> Mapping[str, Any]:
        """What the model is called with, of texts where they were given."""
        if not isinstance(inputs, (str, list, tuple)):
            return inputs
        if self.tokenizer is None:
            raise TypeError(
                f"inputs: expected keyword arguments of the model, tensors [B, ...], got {type(inputs).__name__}; "
                "tokenize it: tokenizer(text, return_tensors='pt'), or give Locator a tokenizer"
            )
        texts = checked_texts("inputs", [inputs] if isinstance(inputs, str) else list(inputs))
        encoded = self.tokenizer(texts, padding=len(texts) > 1, return_tensors="pt")
        return {name: value.to(self.device) for name, value in encoded.items()}

    def _attribute(self, inputs: Mapping[str, Any] | Prompt, target: Target) -> Asked:
        with deferred() as checks:
            return self.cascade.attribute(inputs, target), checks

    def _replayed(self, inputs: dict[str, Tensor]) -> Answer | None:
        """The answer of a graph; None where this computation cannot be one."""
        key = tuple((name, *value.shape, value.dtype) for name, value in sorted(inputs.items()))
        if key not in self._graphs:
            while len(self._graphs) >= MOST_GRAPHS:
                self._graphs.popitem(last=False)
            self._graphs[key] = self._captured(inputs)
        self._graphs.move_to_end(key)
        graph = self._graphs[key]
        if graph is None:
            return None
        found, checks = graph(inputs)
        return Answer(_copied(found), [(holds.clone(), complaint) for holds, complaint in checks])

    def _captured(self, inputs: dict[str, Tensor]) -> CudaGraph[Asked] | None:
        self.cascade.attribute(inputs, self.target)  # whatever is wrong with these inputs is said here
        try:
            return CudaGraph(lambda fixed: self._attribute(fixed, self.target), inputs)
        except RuntimeError as error:
            first = str(error).strip().splitlines()[0]
            warn(f"no CUDA graph of {type(self.cascade.model).__name__}: {first}")
            return None

    def _padded(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        main = main_input(inputs)
        if self._filler is None or "attention_mask" not in inputs or main.dim() != 2:
            return inputs
        longest = self.cascade.handle.limits.positions
        more = (0, min(-main.shape[1] % self.bucket, max(0, (longest or sys.maxsize) - main.shape[1])))
        filled = {name: pad(value, more) for name, value in inputs.items() if value.shape == main.shape}
        return inputs | filled | {"input_ids": pad(main, more, value=self._filler)}


def _copied(found: Attribution) -> Attribution:
    """The same numbers in memory of their own."""
    parts: dict[str, Any] = {
        name: {key: value.clone() for key, value in getattr(found, name).items()} for name in _TENSORS
    }
    return replace(found, full=found.full.clone(), **parts)


_TENSORS = ("values", "erased", "residual")


def _filler(handle: Handle) -> int | None:
    """The token that texts are padded with; None where the model's head would take any token for a real one."""
    padding = getattr(getattr(handle.model, "config", None), "pad_token_id", None)
    if padding is None and handle.head is not None:
        return 0
    return padding


def _as_type(handle: Handle, dtype: torch.dtype | Literal["fastest"] | None) -> Handle:
    """The model, or a copy of it in another type."""
    if dtype is None:
        return handle
    if dtype != "fastest" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype: expected a floating-point type, 'fastest' or None, got {dtype!r}")
    if handle.mesh is not None:
        raise ValueError(f"dtype: several ranks hold this model, expected None, got {dtype!r}; load it in that type")
    model = handle.model
    wanted = _fastest(model) if dtype == "fastest" else dtype
    return handle if wanted == next(model.parameters()).dtype else Handle(copy.deepcopy(model).to(wanted))


def _fastest(model: nn.Module) -> torch.dtype:
    """The model's own type, or bfloat16 where its largest matrix multiplies so much faster."""
    weight = max((p for p in model.parameters() if p.dim() == 2), key=lambda p: p.numel()).detach()[:4096]
    own, half = (_seconds(weight.to(dtype)) for dtype in (weight.dtype, torch.bfloat16))
    return torch.bfloat16 if half * FASTER < own else weight.dtype


def _seconds(weight: Tensor) -> float:
    rows = torch.ones(_ROWS, weight.shape[1], dtype=weight.dtype, device=weight.device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (rows @ weight.t())[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return best
