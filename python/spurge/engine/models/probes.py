"""Probes: which token a model's head reads, and how much each token of a text matters to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spurge.engine.base.device_checks import require
from spurge.engine.base.tensor_parallel import mesh_of
from spurge.engine.models.arguments import main_input
from spurge.engine.models.attention import AttentionRow
from spurge.engine.models.hooks import frozen, hook, hook_before
from spurge.engine.models.placement import input_device, model_budget
from spurge.engine.models.readout import Readout, language_head
from spurge.engine.models.sites import Site, find_sites

__all__ = ["AttentionRow", "Score", "is_decoder", "probed_token", "token_scores"]

Score = Literal["attention", "attention_norm", "gradient_x_input", "ablation"]

_MOST_ROWS = 128  # a taller batch is no faster, and on a CPU it leaves the cache


def is_decoder(model: nn.Module) -> bool:
    """Whether tokens of ``model`` see only what came before them (GPT-2, LLaMA).

    Its last layer's attention says so, or the configuration, or that it generates without an encoder (Bloom).
    """
    try:
        attention = find_sites(model)[-1].attention
    except ValueError:
        attention = None
    config = getattr(model, "config", None)
    if any(bool(getattr(part, flag, False)) for part in (attention, config) for flag in ("is_causal", "is_decoder")):
        return True
    generates: Callable[[], bool] = getattr(model, "can_generate", lambda: False)
    return generates() and not getattr(config, "is_encoder_decoder", False)


def probed_token(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The token whose state the head reads, ``[B]`` int64: an encoder's first, a decoder's last real one.

    Real is what ``attention_mask`` keeps (either padding side) and, for a classifier, what is not the configuration's
    padding token, which is what transformers' classification heads look for. A language model's end token often serves
    as padding too, and a text may well hold it.

    Raises:
        ValueError: no main input, a mask that is not ``[B, T]``, or a decoder's example without a real token.
    """
    return last_real_token(model, inputs) if is_decoder(model) else first_token(inputs)


def first_token(inputs: Mapping[str, Any]) -> Tensor:
    """Zeros, ``[B]`` int64."""
    main = main_input(inputs)
    return torch.zeros(len(main), dtype=torch.int64, device=main.device)


def last_real_token(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """As :func:`probed_token`, of a decoder."""
    main = main_input(inputs)
    real = torch.ones(main.shape[:2], dtype=torch.bool, device=main.device)
    mask, padding = _mask(inputs), getattr(getattr(model, "config", None), "pad_token_id", None)
    if mask is not None:
        real &= mask
    if padding is not None and torch.is_tensor(inputs.get("input_ids")) and language_head(model) is None:
        real &= inputs["input_ids"] != padding
    some = real.any(1)
    require(some.all(), lambda: _tokenless(some))
    return (real * torch.arange(real.shape[1], device=real.device)).argmax(1)


def _tokenless(some: Tensor) -> str:
    without = (~some).nonzero()  # none, where the check is looked at late and its memory was used again
    return f"inputs: {f'example {int(without[0])}' if len(without) else 'an example'} has no real token"


def token_scores(
    model: nn.Module,
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
    if kind not in get_args(Score):
        raise ValueError(f"kind: expected one of {', '.join(get_args(Score))}, got {kind!r}")
    if target is not None and not callable(target):
        raise TypeError(f"target: expected a function of rows, got {type(target).__name__}")
    sites = find_sites(model)
    rows = _rows_at_once(model, inputs, sites, kind, memory)
    with frozen(model):
        if kind in ("attention", "attention_norm"):
            scores = _by_attention(model, inputs, sites[-1], kind == "attention_norm", rows)
        elif kind == "gradient_x_input":
            scores = _by_gradient(model, inputs, sites, target or _predicted_logit, rows)
        else:
            scores = _by_ablation(model, inputs, sites, target or _predicted_logit, replace, rows)
    mask, scores = _mask(inputs), scores.to(main_input(inputs).device)
    return scores if mask is None else scores * mask


def _by_attention(model: nn.Module, inputs: Mapping[str, Any], site: Site, norm: bool, rows: int) -> Tensor:
    if site.attention is None or (norm and site.attention_output is None):
        raise ValueError(f"kind: the attention of {site.block_name} was not found; choose gradient_x_input or ablation")
    if norm and mesh_of(site.attention) is not None:
        raise ValueError("kind: several ranks hold the attention of this model; choose attention")
    if norm and site.attention_output.weight.is_meta:  # type: ignore[union-attr, operator]
        raise ValueError(
            f"model: the weights of the attention of {site.block_name} are not in memory (offloaded or not loaded); "
            "choose kind='attention'"
        )
    position, scores = probed_token(model, inputs), []
    for index in _batches(main_input(inputs), rows):
        with AttentionRow(site.attention, _always(position[index]), keep_values=norm) as row, torch.no_grad():
            model(**_pick(inputs, index))
        scores.append(_sent_length(row, site) if norm else row.row())
    return torch.cat(scores)


def _always(position: Tensor) -> Callable[[int], Tensor]:
    return lambda rows: position


def _sent_length(row: AttentionRow, site: Site) -> Tensor:
    """Length of each token's contribution to the probed token, heads summed, ``[R, T]``."""
    if row.probabilities is None or row.values is None:
        raise ValueError(f"kind: {type(site.attention).__name__} does not show its value vectors; choose attention")
    weight: Tensor = site.attention_output.weight.detach()  # type: ignore[union-attr, assignment, operator]
    if isinstance(site.attention_output, Conv1D):
        weight = weight.t()
    alpha = row.probabilities  # [R, heads, T]
    value = row.values.repeat_interleave(alpha.shape[1] // row.values.shape[1], 1)  # [R, heads, T, D]
    sent = (alpha[..., None] * value).transpose(1, 2).flatten(2)  # [R, T, heads * D]
    return (sent @ weight.to(sent.dtype).t()).norm(dim=-1).float()


def _by_gradient(
    model: nn.Module, inputs: Mapping[str, Any], sites: Sequence[Site], target: Callable[[Any], Tensor], rows: int
) -> Tensor:
    scores = []
    for index in _batches(main_input(inputs), rows):
        leaf: list[Tensor] = []

        def watch(embedding: Tensor, keep: list[Tensor] = leaf) -> Tensor:
            keep.append(embedding.detach().requires_grad_())
            return keep[0]

        with torch.enable_grad():
            logits = _run(model, _pick(inputs, index), sites, watch)
            value = _measure(target, logits, index, logits.detach().argmax(1))
            if not value.requires_grad:
                raise ValueError("target: has no gradient with respect to the logits; choose kind='ablation'")
            (grad,) = torch.autograd.grad(value.sum(), leaf)
        scores.append((leaf[0].detach().float() * grad.float()).sum(-1).abs())
    return torch.cat(scores)


def _by_ablation(
    model: nn.Module,
    inputs: Mapping[str, Any],
    sites: Sequence[Site],
    target: Callable[[Any], Tensor],
    replace: int | None,
    rows: int,
) -> Tensor:
    other = _replacement(model, replace)
    main, shape, whole, predicted = main_input(inputs), [0, 0], [], []
    with torch.no_grad():
        for index in _batches(main, rows):

            def look(embedding: Tensor) -> Tensor:
                shape[1] = embedding.shape[1]
                return embedding

            logits = _run(model, _pick(inputs, index), sites, look)
            predicted.append(logits.argmax(1))
            whole.append(_measure(target, logits, index, predicted[-1]))
        shape[0], full, classes = len(main), torch.cat(whole), torch.cat(predicted)
        mask = _mask(inputs)
        real = torch.ones(shape, dtype=torch.bool, device=main.device) if mask is None else mask
        scores = torch.zeros(shape, device=main.device)
        for part in real.nonzero().split(rows):
            example, token = part.unbind(1)

            def erase(embedding: Tensor, token: Tensor = token) -> Tensor:
                embedding = embedding.clone()
                embedding[torch.arange(len(token), device=token.device), token] = other
                return embedding

            logits = _run(model, _pick(inputs, example), sites, erase)
            scores[example, token] = full[example] - _measure(target, logits, example, classes[example])
    return scores


def _replacement(model: nn.Module, replace: int | None) -> Tensor | float:
    if replace is None:
        return 0.0
    table = _token_embedding(model)
    if table is None or isinstance(replace, bool) or not isinstance(replace, int):
        raise ValueError(f"replace: expected the id of an entry of the model's token embedding, got {replace!r}")
    if not 0 <= replace < table.num_embeddings:
        raise ValueError(f"replace: expected an id from 0 to {table.num_embeddings - 1}, got {replace}")
    with torch.no_grad():
        return table(torch.tensor([replace], device=input_device(model)))[0]  # a call, since Gemma's table scales


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


def _run(model: nn.Module, inputs: dict[str, Any], sites: Sequence[Site], change: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits ``[R, Y]`` in float32 of the model with its input embeddings ``[R, T, H]`` changed."""
    readout = Readout(model)
    position = first_token(inputs) if readout.head is None else last_real_token(model, inputs)
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
    with hook_before(sites[0].block, before) if table is None else hook(table, behind):
        return readout.logits(lambda: model(**inputs), position).float()


def _mask(inputs: Mapping[str, Any]) -> Tensor | None:
    """Real positions ``[B, T]`` by ``attention_mask``, or None without one."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return None
    main = main_input(inputs)
    if not torch.is_tensor(mask) or mask.shape != main.shape[:2]:
        found = tuple(mask.shape) if torch.is_tensor(mask) else type(mask).__name__
        raise ValueError(f"inputs: attention_mask: expected shape {tuple(main.shape[:2])}, got {found}")
    return mask != 0


def _pick(inputs: Mapping[str, Any], index: Tensor) -> dict[str, Any]:
    """The inputs of some examples; what does not lead with B stays."""
    examples = len(main_input(inputs))

    def of(value: Any) -> Any:
        return value[index] if torch.is_tensor(value) and value.dim() and len(value) == examples else value

    return {name: of(value) for name, value in inputs.items()}


def _batches(main: Tensor, rows: int) -> Iterator[Tensor]:
    yield from torch.arange(len(main), device=main.device).split(rows)


def _rows_at_once(
    model: nn.Module, inputs: Mapping[str, Any], sites: Sequence[Site], kind: Score, memory: str | int | None
) -> int:
    """How many rows of a forward (and backward) fit into the budget, by a generous count of a layer's tensors."""
    main, config = main_input(inputs), getattr(model, "config", None)
    tokens = main.shape[1]
    if main.dim() == 4:  # an image [B, C, height, width]
        tokens = main[0, 0].numel() // int(getattr(config, "patch_size", 16)) ** 2 + 1
    site = max(sites, key=lambda site: site.width)
    heads = int(getattr(config, "num_attention_heads", 1))
    numbers = tokens * (12 * site.hidden + 4 * site.width + 3 * heads * tokens)
    layers = 2 * len(sites) if kind == "gradient_x_input" else 1
    fits = model_budget(model, memory) // (numbers * layers * site.parameter.element_size())
    return max(1, min(int(fits), _MOST_ROWS))
