"""Probes: which token a model's head reads, and how much each token of a text matters to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from spurge.engine.base.checks import choice
from spurge.engine.base.gradients import grad_mode
from spurge.engine.base.tensor_parallel import mesh_of
from spurge.engine.models.attention import AttentionRow
from spurge.engine.models.call_arguments import main_input
from spurge.engine.models.handle import Handle
from spurge.engine.models.hooks import frozen, hook, hook_before
from spurge.engine.models.projections import Projection
from spurge.engine.models.readout import Readout, first_token, last_real_token, token_mask
from spurge.engine.models.sites import Site, projection_of

__all__ = ["AttentionRow", "Score", "probed_token", "token_scores"]

Score = Literal["attention", "attention_norm", "gradient_x_input", "ablation"]

_MOST_ROWS = 128  # a taller batch is no faster, and on a CPU it leaves the cache


def probed_token(model: nn.Module | Handle, inputs: Mapping[str, Any]) -> Tensor:
    """The token whose state the head reads, ``[B]`` int64: an encoder's first, a decoder's last real one.

    Real is what ``attention_mask`` keeps (either padding side) and, for a classifier, what is not the configuration's
    padding token, which is what transformers' classification heads look for. A language model's end token often serves
    as padding too, and a text may well hold it.

    Raises:
        ValueError: no main input, a mask that is not ``[B, T]``, or a decoder's example without a real token.
    """
    return Handle.of(model).probed(inputs)


def token_scores(
    model: nn.Module | Handle,
    inputs: Mapping[str, Any],
    *,
    kind: Score = "attention",
    target: Callable[[Any], Tensor] | None = None,
    replace: int | None = None,
    memory: str | int | None = None,
) -> Tensor:
    r"""How much each token matters, ``[B, T]`` float32 without gradient; padding scores 0, special tokens stay in.

    ``attention``: :math:`\alpha_j`, the last layer's attention from the probed token to token j, mean over heads.

    ``attention_norm``: :math:`\lVert\sum_h \alpha_{h,j}\, v_{h,j} W^O_h\rVert`, the length of what token j sends
    to the probed token through the last layer's attention (Kobayashi et al. 2020, Eq. 7; the output projection's bias
    and norms behind it are left out).

    ``gradient_x_input``: :math:`\lvert e_j \cdot \partial F / \partial e_j\rvert`, e the input embedding.

    ``ablation``: :math:`F - F(e_j \to e')`, signed: what the target loses when token j's input embedding becomes
    zero, or that of vocabulary entry ``replace`` (position embeddings stay). One forward row per real token.

    Models without a token embedding (ViT) take e from the input of the first layer. The model runs in evaluation mode
    and comes back as it was.

    Args:
        model: a ``transformers`` model; the last two kinds need ``logits [B, Y]`` in its output.
        inputs: its keyword arguments; tensors lead with B.
        kind: which score.
        target: F for the last two kinds, rows to ``[R]``: ``rows.logits`` is ``[R, Y]`` float32 (a language model's are
            those of the probed token, ``[R, V]``), ``rows.example``
            ``[R]`` the example of each row, ``rows.predicted`` ``[R]`` the class the model predicts for that example.
            By default the logit of the predicted class.
        replace: vocabulary id for ``ablation``, for example that of the mask token.
        memory: bytes (``"256 MiB"``) that decide how many rows run at once; by default half of what is free. The split
            changes the result by rounding only.

    Raises:
        TypeError: ``target`` cannot be called.
        ValueError: an unknown ``kind``, no main input, a ``replace`` outside the vocabulary, a model without the parts
            that ``kind`` needs, or a target of another shape.
    """
    choice("kind", kind, get_args(Score))
    if target is not None and not callable(target):
        raise TypeError(f"target: expected a function of rows, got {type(target).__name__}")
    handle = Handle.of(model)
    rows = _rows_at_once(handle, inputs, kind, memory)
    with frozen(handle.model):
        if kind in ("attention", "attention_norm"):
            scores = _by_attention(handle, inputs, kind == "attention_norm", rows)
        elif kind == "gradient_x_input":
            scores = _by_gradient(handle, inputs, target or _predicted_logit, rows)
        else:
            scores = _by_ablation(handle, inputs, target or _predicted_logit, replace, rows)
    mask, scores = token_mask(inputs), scores.to(main_input(inputs).device)
    return scores if mask is None else scores * mask


def _by_attention(handle: Handle, inputs: Mapping[str, Any], norm: bool, rows: int) -> Tensor:
    site = handle.sites[-1]
    if site.attention is None or (norm and site.attention_output is None):
        raise ValueError(f"kind: the attention of {site.block_name} was not found; choose gradient_x_input or ablation")
    if norm and mesh_of(site.attention) is not None:
        raise ValueError("kind: several ranks hold the attention of this model; choose attention")
    if norm and _heads_out(site).parameter.is_meta:
        raise ValueError(
            f"model: the weights of the attention of {site.block_name} are not in memory (offloaded or not loaded); "
            "choose kind='attention'"
        )
    position, scores = handle.probed(inputs), []
    for index in _batches(main_input(inputs), rows):
        with AttentionRow(site.attention, _always(position[index]), keep_values=norm) as row, grad_mode(False):
            handle.model(**_pick(inputs, index))
        scores.append(_sent_length(row, site) if norm else row.row())
    return torch.cat(scores)


def _always(position: Tensor) -> Callable[[int], Tensor]:
    return lambda rows: position


def _sent_length(row: AttentionRow, site: Site) -> Tensor:
    """Length of each token's contribution to the probed token, heads summed, ``[R, T]``."""
    if row.probabilities is None or row.values is None:
        raise ValueError(f"kind: {type(site.attention).__name__} does not show its value vectors; choose attention")
    weight = _heads_out(site).weight().detach()
    alpha = row.probabilities  # [R, heads, T]
    value = row.values.repeat_interleave(alpha.shape[1] // row.values.shape[1], 1)  # [R, heads, T, D]
    sent = (alpha[..., None] * value).transpose(1, 2).flatten(2)  # [R, T, heads * D]
    return (sent @ weight.to(sent.dtype).t()).norm(dim=-1).float()


def _heads_out(site: Site) -> Projection:
    projection = None if site.attention_output is None else projection_of(site.attention_output)
    assert projection is not None
    return projection


def _by_gradient(handle: Handle, inputs: Mapping[str, Any], target: Callable[[Any], Tensor], rows: int) -> Tensor:
    scores = []
    for index in _batches(main_input(inputs), rows):
        leaf: list[Tensor] = []

        def watch(embedding: Tensor, keep: list[Tensor] = leaf) -> Tensor:
            keep.append(embedding.detach().requires_grad_())
            return keep[0]

        with grad_mode(True):
            logits = _run(handle, _pick(inputs, index), watch)
            value = _measure(target, logits, index, logits.detach().argmax(1))
            if not value.requires_grad:
                raise ValueError("target: has no gradient with respect to the logits; choose kind='ablation'")
            (grad,) = torch.autograd.grad(value.sum(), leaf)
        scores.append((leaf[0].detach().float() * grad.float()).sum(-1).abs())
    return torch.cat(scores)


def _by_ablation(
    handle: Handle,
    inputs: Mapping[str, Any],
    target: Callable[[Any], Tensor],
    replace: int | None,
    rows: int,
) -> Tensor:
    other = _replacement(handle, replace)
    main, shape, whole, predicted = main_input(inputs), [0, 0], [], []
    with grad_mode(False):
        for index in _batches(main, rows):

            def look(embedding: Tensor) -> Tensor:
                shape[1] = embedding.shape[1]
                return embedding

            logits = _run(handle, _pick(inputs, index), look)
            predicted.append(logits.argmax(1))
            whole.append(_measure(target, logits, index, predicted[-1]))
        shape[0], full, classes = len(main), torch.cat(whole), torch.cat(predicted)
        mask = token_mask(inputs)
        real = torch.ones(shape, dtype=torch.bool, device=main.device) if mask is None else mask
        scores = torch.zeros(shape, device=main.device)
        for part in real.nonzero().split(rows):
            example, token = part.unbind(1)

            def erase(embedding: Tensor, token: Tensor = token) -> Tensor:
                embedding = embedding.clone()
                embedding[torch.arange(len(token), device=token.device), token] = other
                return embedding

            logits = _run(handle, _pick(inputs, example), erase)
            scores[example, token] = full[example] - _measure(target, logits, example, classes[example])
    return scores


def _replacement(handle: Handle, replace: int | None) -> Tensor | float:
    if replace is None:
        return 0.0
    table = _token_embedding(handle.model)
    if table is None or isinstance(replace, bool) or not isinstance(replace, int):
        raise ValueError(f"replace: expected the id of an entry of the model's token embedding, got {replace!r}")
    if not 0 <= replace < table.num_embeddings:
        raise ValueError(f"replace: expected an id from 0 to {table.num_embeddings - 1}, got {replace}")
    with grad_mode(False):
        return table(torch.tensor([replace], device=handle.device))[0]  # a call, since Gemma's table scales


def _predicted_logit(rows: Any) -> Tensor:
    return rows.logits.gather(1, rows.predicted[:, None])[:, 0]


def _measure(target: Callable[[Any], Tensor], logits: Tensor, example: Tensor, predicted: Tensor) -> Tensor:
    value = target(SimpleNamespace(logits=logits, attention=None, example=example, predicted=predicted))
    if not torch.is_tensor(value) or value.shape != (len(logits),):
        found = tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
        raise ValueError(f"target: expected one number for each of {len(logits)} rows, got {found}")
    return value


def _token_embedding(model: nn.Module) -> nn.Embedding | None:
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
    return table if isinstance(table, nn.Embedding) else None


def _run(handle: Handle, inputs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits ``[R, Y]`` in float32 of the model with its input embeddings ``[R, T, H]`` changed."""
    model, readout = handle.model, Readout(handle.head)
    position = first_token(inputs) if readout.head is None else last_real_token(inputs)
    if torch.is_tensor(inputs.get("inputs_embeds")):
        changed_inputs = inputs | {"inputs_embeds": change(inputs["inputs_embeds"])}
        return readout.logits(lambda: model(**changed_inputs), position).float()
    changed: list[bool] = []

    def behind(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if changed:  # GPT-2 looks up token types in the same table
            return None
        changed.append(True)
        return change(output)

    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    table = _token_embedding(model)
    with hook_before(handle.sites[0].block, before) if table is None else hook(table, behind):
        return readout.logits(lambda: model(**inputs), position).float()


def _pick(inputs: Mapping[str, Any], index: Tensor) -> dict[str, Any]:
    """The inputs of some examples; what does not lead with B stays."""
    examples = len(main_input(inputs))

    def of(value: Any) -> Any:
        return value[index] if torch.is_tensor(value) and value.dim() and len(value) == examples else value

    return {name: of(value) for name, value in inputs.items()}


def _batches(main: Tensor, rows: int) -> Iterator[Tensor]:
    yield from torch.arange(len(main), device=main.device).split(rows)


def _rows_at_once(handle: Handle, inputs: Mapping[str, Any], kind: Score, memory: str | int | None) -> int:
    """How many rows of a forward (and backward) fit into the budget, by a generous count of a layer's tensors."""
    main, config = main_input(inputs), getattr(handle.model, "config", None)
    tokens = main.shape[1]
    if main.dim() == 4:  # an image [B, C, height, width]
        tokens = main[0, 0].numel() // int(getattr(config, "patch_size", 16)) ** 2 + 1
    site = max(handle.sites, key=lambda site: site.width)
    heads = int(getattr(config, "num_attention_heads", 1))
    numbers = tokens * (12 * site.hidden + 4 * site.width + 3 * heads * tokens)
    layers = 2 * len(handle.sites) if kind == "gradient_x_input" else 1
    fits = handle.budget(memory) // (numbers * layers * site.parameter.element_size())
    return max(1, min(int(fits), _MOST_ROWS))
