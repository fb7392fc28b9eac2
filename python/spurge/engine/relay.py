"""Run a model again from any of its layers, with rows of one's own.

A transformer is entered behind a layer instead of at its input: layers below the entry do not run, rows may join the
batch behind any later layer, and the model's own code does everything else (masks, rotary tables, final norm, head).
Rows are ordered so that row ``r`` belongs to example ``r % B``; what the model computes once per example, such as a
padding mask, is therefore right for any number of leading rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from spurge.engine.calls import at, cut, first, leading, like, logits_of, main_input, repeat_rows, same, split_call
from spurge.engine.patches import hook, hook_before, replaced_forward
from spurge.engine.probes import AttentionRow, probed_token
from spurge.engine.sites import Site, find_sites
from torch import Tensor, nn

Junction = Literal["residual", "post_norm", "sandwich", "replay"]


@dataclass(frozen=True)
class Rows:
    """What a target sees of R rows of one forward pass.

    Attributes:
        logits: ``[R, Y]``, float32.
        attention: head-mean attention of the probed token over the positions, ``[R, T]`` float32, where it was asked for.
        example: which example of the batch each row belongs to, ``[R]``.
        predicted: the class the unedited model predicts for that example, ``[R]``.
    """

    logits: Tensor
    attention: Tensor | None
    example: Tensor
    predicted: Tensor


Target = Callable[[Rows], Tensor]


def predicted_logit(rows: Rows) -> Tensor:
    """The logit of the class that the unedited model predicts, ``[R]``: the usual target of integrated gradients."""
    return rows.logits.gather(1, rows.predicted[:, None])[:, 0]


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


@dataclass
class Trace:
    """The unedited pass over a batch: computed once, entered many times."""

    inputs: dict[str, Any]
    batch: int
    position: Tensor  # [B] the probed token
    rows: Rows
    sites: list[SiteTrace]
    calls: list[Call]  # one per block


class Relay:
    """A model prepared to be entered behind any layer.

    Args:
        model: a ``transformers`` model whose output has ``logits``.
        attention: capture the attention row of the probed token in the last layer.
        sites: where rows may open; all sites of the model by default. Every block runs whether it has one or not.
    """

    def __init__(self, model: nn.Module, *, attention: bool = False, sites: Sequence[Site] | None = None):
        self.model = model
        every = find_sites(model)
        self.sites = list(sites) if sites is not None else every
        self.blocks = list({id(site.block): site.block for site in every}.values())
        order = {id(block): i for i, block in enumerate(self.blocks)}
        self.place = [order[id(site.block)] for site in self.sites]  # block of each site
        self.attention = attention
        self.pruned = False
        self._last = every[-1]
        self._junctions: list[tuple[Junction, nn.Module | None]] = []
        self._tuples: list[bool] = []

    # ---- the unedited pass -------------------------------------------------------------------------------------

    def trace(self, inputs: Mapping[str, Any], example: Tensor | None = None) -> Trace:
        """Run the unedited model once and keep what is needed to enter it again.

        Args:
            inputs: keyword arguments of the model; tensors lead with the batch dimension B.
            example: how targets number these examples, ``[B]``; 0 to B - 1 by default.
        """
        inputs = dict(inputs)
        batch = len(main_input(inputs))
        position = probed_token(self.model, inputs)
        if not self._junctions:
            self._find_junctions(inputs)
        seen: dict[int, dict[str, Tensor]] = {i: {} for i in range(len(self.sites))}
        calls: list[Call] = []
        replays = {self.place[i] for i, (kind, _) in enumerate(self._junctions) if kind == "replay"}

        with ExitStack() as stack, torch.no_grad():
            row = self._last_layer(stack, lambda rows: position)
            for i, (site, (kind, norm)) in enumerate(zip(self.sites, self._junctions, strict=True)):
                keep = seen[i]
                stack.enter_context(hook(site.down, lambda m, a, o, k=keep: k.update(z=a[0], o=o)))
                stack.enter_context(hook(site.block, lambda m, a, o, k=keep: k.update(out=first(o))))
                if kind == "post_norm":
                    stack.enter_context(hook(norm, lambda m, a, o, k=keep: k.update(s=a[0])))
            for index, block in enumerate(self.blocks):

                def remember(module: nn.Module, args: tuple, kwargs: dict, keep: bool = index in replays) -> None:
                    hidden, args, kwargs = split_call(args, kwargs)
                    calls.append(Call(leading(args), leading(kwargs), hidden if keep else None))

                stack.enter_context(hook_before(block, remember))
            logits = logits_of(self.model(**inputs))
            attention = row.row() if row is not None else None

        if example is None:
            example = torch.arange(batch, device=logits.device)
        rows = Rows(logits.float(), attention, example, logits.argmax(1))
        sites = [self._site_trace(i, seen[i], position) for i in range(len(self.sites))]
        return Trace(inputs, batch, position, rows, sites, calls)

    def _site_trace(self, i: int, seen: dict[str, Tensor], position: Tensor) -> SiteTrace:
        site, (kind, norm) = self.sites[i], self._junctions[i]
        bias = site.bias()
        o, out = seen["o"], seen["out"]
        u = o - bias if bias is not None else o
        pruned = self.pruned and site.block is self.blocks[-1]
        pick = (lambda x: at(x, position) if x.shape[1] > 1 else x) if pruned else (lambda x: x)
        if kind == "residual":
            return SiteTrace(seen["z"], u, pick(out))
        if kind == "post_norm":
            return SiteTrace(seen["z"], u, pick(seen["s"]))
        rest = None
        if kind == "sandwich":
            with torch.no_grad():
                rest = pick(out) - norm(o)
        return SiteTrace(seen["z"], u, o, rest)

    # ---- entering it again -------------------------------------------------------------------------------------

    def run(
        self,
        trace: Trace,
        openings: Mapping[int, Tensor],
        *,
        inside: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
    ) -> Rows:
        """Run the model from the first opening on.

        Args:
            trace: the unedited pass over the same batch.
            openings: site index -> rows that open there, ``[m * B, T, H]``, in the place of the site's anchor.
            inside: site index -> what happens to that site's activations ``[R, T, F]`` in rows opened below it.

        Returns:
            All rows after the head, those of earlier sites first; gradients flow back to ``openings``.
        """
        batch = trace.batch
        total = sum(rows.shape[0] for rows in openings.values())
        times = total // batch
        opened: dict[int, list[int]] = {}
        for i in sorted(openings):
            opened.setdefault(self.place[i], []).append(i)
        entry, end = min(opened), len(self.blocks) - 1
        live: list[Tensor] = []  # the rows on their way, at most one tensor

        def relayed(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def behind(*args: Any, **kwargs: Any) -> Any:
                hidden, args, kwargs = split_call(args, kwargs)
                if index < entry:
                    return self._wrap(index, hidden)
                call = trace.calls[index]

                def step(rows: Tensor) -> Tensor:
                    n = rows.shape[0]
                    output = first(
                        forward(
                            rows,
                            *cut(args, call.args, batch, total, n),
                            **cut(kwargs, call.kwargs, batch, total, n),
                        )
                    )
                    return at(output, trace.position.repeat(n // batch)) if self.pruned and index == end else output

                parts = [step(live.pop())] if live else []
                parts += [self._emerge(i, openings[i], trace, call, step) for i in opened.get(index, ())]
                rows = torch.cat(parts) if len(parts) > 1 else parts[0]
                if index < end:
                    live.append(rows)
                    return self._wrap(index, hidden)
                return self._wrap(index, rows.expand(-1, hidden.shape[1], -1))

            return behind

        with ExitStack() as stack:
            row = self._last_layer(stack, lambda rows: trace.position.repeat(rows // batch))
            for i, change in (inside or {}).items():
                stack.enter_context(
                    hook_before(self.sites[i].down, lambda m, args, kwargs, f=change: ((f(args[0]), *args[1:]), kwargs))
                )
            for index, block in enumerate(self.blocks):
                stack.enter_context(replaced_forward(block, relayed(index, block.forward)))
            logits = logits_of(self.model(**{k: repeat_rows(v, batch, times) for k, v in trace.inputs.items()}))
            attention = row.row() if row is not None else None
        return self._rows(trace, times, logits, attention)

    def scaled(self, trace: Trace, alphas: Tensor) -> tuple[Rows, list[Tensor], list[Tensor]]:
        """Run the whole model with every site's activations scaled together, one row per node and example.

        Args:
            alphas: ``[S]``.

        Returns:
            The rows (node-major), each site's activations ``[S * B, T, F]`` before scaling, and each down projection's
            output after it, ``[S * B, T, H]``: differentiable, the first one a leaf.
        """
        times = len(alphas)
        shift = (alphas - 1).repeat_interleave(trace.batch)[:, None, None]
        z: list[Tensor] = []
        outputs: list[Tensor] = []

        def scale(module: nn.Module, args: tuple, o: Tensor, bias: Tensor | None) -> Tensor:
            z.append(args[0].detach())
            u = o - bias if bias is not None else o
            o = torch.addcmul(o, u, shift.to(o))
            outputs.append(o if o.requires_grad or not torch.is_grad_enabled() else o.requires_grad_())
            return outputs[-1]

        with ExitStack() as stack:
            row = self._last_layer(stack, lambda rows: trace.position.repeat(rows // trace.batch))
            for site in self.sites:
                stack.enter_context(hook(site.down, lambda m, args, o, b=site.bias(): scale(m, args, o, b)))
            many = {key: repeat_rows(value, trace.batch, times) for key, value in trace.inputs.items()}
            logits = logits_of(self.model(**many))
            attention = row.row() if row is not None else None
        return self._rows(trace, times, logits, attention), z, outputs

    def _rows(self, trace: Trace, times: int, logits: Tensor, attention: Tensor | None) -> Rows:
        return Rows(logits.float(), attention, trace.rows.example.repeat(times), trace.rows.predicted.repeat(times))

    def _emerge(self, i: int, rows: Tensor, trace: Trace, call: Call, step: Callable[[Tensor], Tensor]) -> Tensor:
        """Carry rows from their site's anchor to the output of its block."""
        kind, norm = self._junctions[i]
        if kind == "residual":
            return rows
        if kind == "post_norm":
            return norm(rows)
        if kind == "sandwich":
            return norm(rows) + trace.sites[i].rest.repeat(rows.shape[0] // trace.batch, 1, 1)
        with hook(self.sites[i].down, lambda module, args, output: rows):
            return step(call.hidden.repeat(rows.shape[0] // trace.batch, 1, 1))

    def _wrap(self, index: int, hidden: Tensor) -> Any:
        return (hidden,) if self._tuples[index] else hidden

    def _last_layer(self, stack: ExitStack, position: Callable[[int], Tensor]) -> AttentionRow | None:
        """Capture the probed attention row; where the head reads nothing else, compute only the probed token."""
        site = self._last
        row = None
        if site.attention is not None and (self.attention or self.pruned):
            row = stack.enter_context(AttentionRow(site.attention, position, prune=self.pruned))
        if self.pruned:

            def only_probed(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
                return (at(args[0], position(args[0].shape[0])), *args[1:]), kwargs

            if site.query is not None:
                length: list[int] = []
                stack.enter_context(hook_before(site.query, lambda m, a, k: length.append(a[0].shape[1])))
                stack.enter_context(hook_before(site.query, only_probed))
                stack.enter_context(hook(site.query, lambda m, a, o: o.expand(-1, length.pop(), -1)))
            for module in (site.attention_output, site.ffn):
                if module is not None:
                    stack.enter_context(hook_before(module, only_probed))
        return row if self.attention else None

    # ---- what kind of model this is ----------------------------------------------------------------------------

    def prune_for(self, inputs: Mapping[str, Any], target: Target) -> bool:
        """Let the last layer compute only the probed token if ``target`` reads nothing else of its output.

        Decided by the gradient of the target with respect to the last layer's output on one batch.
        """
        self.pruned = False
        position = probed_token(self.model, inputs)
        if not self._junctions:
            self._find_junctions(inputs)
        leaf: list[Tensor] = []

        def watch(module: nn.Module, args: tuple, output: Any) -> Any:
            leaf.append(first(output).detach().requires_grad_())
            return like(output, leaf[0])

        with ExitStack() as stack:
            row = self._last_layer(stack, lambda rows: position)
            stack.enter_context(hook(self.blocks[-1], watch))
            logits = logits_of(self.model(**inputs)).float()
            attention = row.row() if row is not None else None
        example = torch.arange(len(logits), device=logits.device)
        value = target(Rows(logits, attention, example, logits.argmax(1))).reshape(len(logits), -1)
        mix = torch.linspace(1, 2, value.shape[1], device=value.device)  # no two targets cancel
        (grad,) = torch.autograd.grad((value * mix).sum(), leaf, allow_unused=True)
        if grad is not None:
            grad = grad.clone()
            grad[torch.arange(len(grad)), position] = 0
        kind = self._junctions[-1][0] if self.sites[-1].block is self.blocks[-1] else "residual"
        self.pruned = (grad is None or not grad.any()) and kind != "replay"
        return self.pruned

    def _find_junctions(self, inputs: Mapping[str, Any]) -> None:
        """Learn on one example how each layer joins its down projection to its output, and check it by erasing it."""
        batch = len(main_input(inputs))
        one = {key: value[:1] if repeat_rows(value, batch, 2) is not value else value for key, value in inputs.items()}
        outputs: list[Any] = []
        starts: list[tuple[tuple, dict]] = []
        seen: dict[int, dict[str, Any]] = {i: {"leaves": []} for i in range(len(self.sites))}
        with ExitStack() as stack, torch.no_grad():
            for block in self.blocks:
                stack.enter_context(hook_before(block, lambda m, args, kwargs: starts.append((args, kwargs))))
                stack.enter_context(hook(block, lambda m, args, output: outputs.append(output)))
            for i, site in enumerate(self.sites):
                stack.enter_context(hook(site.down, lambda m, args, output, k=seen[i]: k.update(o=output)))
                for module in site.block.modules():
                    if not any(module.children()) and module is not site.down:
                        keep = seen[i]["leaves"]
                        stack.enter_context(hook(module, lambda m, args, output, k=keep: k.append((m, args[:1], output))))
            self.model(**one)

            self._tuples = [isinstance(output, tuple) for output in outputs]
            for index in range(1, len(self.blocks)):
                hidden, _, _ = split_call(*starts[index])
                if hidden.data_ptr() != first(outputs[index - 1]).data_ptr():
                    raise ValueError(
                        f"model: {type(self.model).__name__} changes the hidden states between layers {index - 1} and "
                        f"{index}; it cannot be entered in the middle"
                    )
            self._junctions = []
            for i, site in enumerate(self.sites):
                start, output = starts[self.place[i]], first(outputs[self.place[i]])
                self._junctions.append(_junction(site, start, output, seen[i]["o"], seen[i]["leaves"]))


def _junction(
    site: Site, start: tuple[tuple, dict], out: Tensor, o: Tensor, leaves: list[tuple[nn.Module, tuple, Tensor]]
) -> tuple[Junction, nn.Module | None]:
    """How a layer joins ``o``, the output of its down projection, to its own output ``out``."""
    bias = site.bias()
    erased = torch.zeros_like(o) if bias is None else bias.expand_as(o)
    with hook(site.down, lambda module, args, output: erased):
        truth = first(site.block(*start[0], **start[1]))

    guesses: list[tuple[Junction, nn.Module | None, Tensor]] = []
    for module, args, made in leaves:
        if not args or not torch.is_tensor(args[0]) or not torch.is_tensor(made) or args[0].shape != made.shape:
            continue
        if same(made, out) and not same(args[0], out):
            guesses.append(("post_norm", module, module(args[0] - o + erased)))
        elif same(args[0], o) and not same(made, o):
            guesses.append(("sandwich", module, out - made + module(erased)))
    guesses.append(("residual", None, out - o + erased))
    slack = 64 * torch.finfo(out.dtype).eps * out.abs().max()
    for kind, norm, guess in guesses:
        if (guess - truth).abs().max() <= slack:
            return kind, norm
    return "replay", None
