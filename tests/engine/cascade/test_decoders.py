"""Decoders of every family, raw and as classifiers, padded on either side, against the plain layer-by-layer loop.

The loop reads what it needs from the model's plain full output, so it knows nothing of where Spurge reads the head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.tiny_models import DECODERS, LANGUAGE, tiny, tiny_language
from spurge.engine.cascade.cascade import Cascade, Rows, predicted_logit
from spurge.engine.cascade.quadrature import gauss_legendre
from spurge.engine.models.handle import Handle
from spurge.engine.models.hooks import hook_before
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.probes import probed_token, token_scores
from spurge.engine.models.sites import find_sites
from spurge.engine.models.verbalizers import Verbalized

PADDING, END = 0, 3  # what the tiny models' configurations call so
TOKENS = {"negative": [60, 61], "positive": [50, 51, 52], "none": [70]}
LENGTHS = (9, 1, 6, 8)
CLASSIFIERS = (*DECODERS, "gemma2", "mistral-window", "qwen2-window", "llama-one-key")
Read = Callable[[Any, dict[str, Tensor]], Tensor]  # model, inputs -> the logits that a target sees


def batch(model: Any, side: str, lengths: tuple[int, ...] = LENGTHS, odd: bool = True) -> dict[str, Tensor]:
    """Texts of these lengths; positions count from their first tokens wherever the padding stands.

    Inside some texts (``odd``) stand the padding token and the end token.
    """
    generator = torch.Generator().manual_seed(1)
    width = max(lengths)
    ids, mask = torch.full((len(lengths), width), PADDING), torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        text = torch.randint(5, 60, (length,), generator=generator)
        if odd and length > 4:
            text[2], text[3] = PADDING, END
        place = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = text, 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if side == "left" and "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    return inputs


def after_text(model: Any, inputs: dict[str, Tensor], back: int = 0) -> Tensor:
    """``[R, V]`` after each row's last real token, or after the one ``back`` tokens before it."""
    logits = model(**inputs).logits
    last = [int(row.nonzero().max()) for row in inputs["attention_mask"]]
    return torch.stack([logits[r, max(0, t - back)] for r, t in enumerate(last)])


def after_texts(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """``[R, 2, V]`` after each row's last two real tokens."""
    return torch.stack([after_text(model, inputs, back=1), after_text(model, inputs)], 1)


def of_labels(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """``[R, Y]``: the probability mass of each label's tokens, as a logit."""
    spoken = after_text(model, inputs)
    return torch.stack([spoken[:, ids].exp().sum(1).log() for ids in TOKENS.values()], 1)


def of_head(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


def next_token(rows: Rows) -> Tensor:
    """The predicted next token's logit, and by how much one token is preferred to another."""
    return torch.stack([predicted_logit(rows), rows.logits[:, 50] - rows.logits[:, 60]], 1)


def continuation(rows: Rows) -> Tensor:
    """Log-probability of two tokens, of which the text ends with the first."""
    said = rows.logits.log_softmax(2)
    return said[:, 0, 50] + said[:, 1, 60]


def two_targets(rows: Rows) -> Tensor:
    return torch.stack([predicted_logit(rows), rows.logits.softmax(1)[:, 0]], 1)


def plain_rows(logits: Tensor, times: int, predicted: Tensor) -> Rows:
    return Rows(logits, None, torch.arange(len(predicted)).repeat(times), predicted.repeat(times))


@torch.no_grad()
def predictions(model: Any, inputs: dict[str, Tensor], read: Read) -> Tensor:
    """The class, or the token after the whole text, ``[B]``."""
    logits = read(model, inputs)
    return (logits if logits.dim() == 2 else logits[:, -1]).argmax(1)


def plain_loop(
    model: Any, inputs: dict[str, Tensor], read: Read, target: Callable[[Rows], Tensor], nodes: int
) -> dict[str, Tensor]:
    """Integrated gradients one layer at a time, each a full forward and backward of the model: ``[Q, B, F]``."""
    alphas, weights = (x.float() for x in gauss_legendre(nodes))
    predicted = predictions(model, inputs, read)
    size, mask = len(predicted), inputs["attention_mask"][None, :, :, None]
    many = {key: value.repeat(nodes, 1) for key, value in inputs.items()}
    result = {}
    for site in find_sites(model):
        seen: list[Tensor] = []
        with torch.no_grad(), hook_before(site.down, lambda m, a, k, seen=seen: seen.append(a[0])):
            model(**inputs)
        z = seen[0].view(*inputs["input_ids"].shape, -1)
        scaled = (alphas.view(-1, 1, 1, 1) * z).flatten(0, 1).requires_grad_()
        with hook_before(site.down, lambda m, a, k, scaled=scaled: ((scaled, *a[1:]), k)):
            value = target(plain_rows(read(model, many), nodes, predicted))
        value = value[:, None] if value.dim() == 1 else value
        grads = [torch.autograd.grad(value[:, q].sum(), scaled, retain_graph=True)[0] for q in range(value.shape[1])]
        whole = torch.stack([torch.tensordot(weights, grad.unflatten(0, (nodes, size)), 1) for grad in grads])
        result[site.name] = (whole * z * mask).sum(2)
    return result


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(got) == list(want)
    for name, value in want.items():
        assert got[name].shape == value.shape
        assert float((got[name] - value).norm() / value.norm()) < 1e-5, name


def erased(model: Any, inputs: dict[str, Tensor], read: Read, columns: dict[str, tuple[list[int], Tensor]]) -> Tensor:
    """What ``read`` sees while neurons are multiplied by gates in hooks on the plain model."""
    with ExitStack() as stack, torch.no_grad():
        for site in find_sites(model):
            if site.name in columns:
                indices, gates = columns[site.name]

                def scale(module: Any, args: tuple, kwargs: dict, c: list[int] = indices, g: Tensor = gates) -> tuple:
                    z = args[0].clone()
                    z[..., c] *= g
                    return (z, *args[1:]), kwargs

                stack.enter_context(hook_before(site.down, scale))
        return read(model, inputs)


# ---- attributions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", LANGUAGE)
def test_next_token_targets_equal_the_plain_loop(name: str, side: str) -> None:
    model = tiny_language(name)
    inputs = batch(model, side)
    got = Cascade(model, nodes=3, path="layer").attribute(inputs, next_token)
    assert_same(got.values, plain_loop(model, inputs, after_text, next_token, 3))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", LANGUAGE)
def test_a_continuation_of_two_tokens_equals_the_plain_loop(name: str, side: str) -> None:
    model = tiny_language(name)
    inputs = batch(model, side, lengths=(9, 2, 6))
    got = Cascade(model, nodes=2, read=2, path="layer").attribute(inputs, continuation)
    assert_same(got.values, plain_loop(model, inputs, after_texts, continuation, 2))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", LANGUAGE)
def test_label_words_equal_the_plain_loop(name: str, side: str) -> None:
    """The classifier gets no positions, the plain language model gets them counted."""
    model = tiny_language(name)
    inputs = batch(model, side)
    given = {key: value for key, value in inputs.items() if key != "position_ids"}
    got = Cascade(Verbalized(model, TOKENS), nodes=3, path="layer").attribute(given, two_targets)
    assert_same(got.values, plain_loop(model, inputs, of_labels, two_targets, 3))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classification_heads_equal_the_plain_loop(name: str, side: str) -> None:
    family, settings = LANGUAGE[name]
    model = tiny(family, labels=3, **settings)
    inputs = batch(model, side)
    got = Cascade(model, nodes=3, path="layer").attribute(inputs, two_targets)
    assert_same(got.values, plain_loop(model, inputs, of_head, two_targets, 3))


@pytest.mark.parametrize("lengths", [(6,), (1,), (1, 1, 1)])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "glm4"])
def test_batches_of_one_and_texts_of_one_token(name: str, lengths: tuple[int, ...]) -> None:
    model = tiny_language(name)
    inputs = batch(model, "right", lengths)
    got = Cascade(model, nodes=2, path="layer").attribute(inputs, next_token)
    assert_same(got.values, plain_loop(model, inputs, after_text, next_token, 2))
    got = Cascade(Verbalized(model, TOKENS), nodes=2, path="layer").attribute(inputs, two_targets)
    assert_same(got.values, plain_loop(model, inputs, of_labels, two_targets, 2))


@pytest.mark.parametrize("name", LANGUAGE)
def test_the_side_of_the_padding_changes_nothing(name: str) -> None:
    model = Verbalized(tiny_language(name), TOKENS)
    left, right = ({k: v for k, v in batch(model, side).items() if k != "position_ids"} for side in ("left", "right"))
    torch.testing.assert_close(model(**left).logits, model(**right).logits, rtol=1e-4, atol=1e-5)
    one, other = (Cascade(model, nodes=2, path="layer").attribute(inputs, two_targets) for inputs in (left, right))
    for site, value in one.values.items():
        torch.testing.assert_close(value, other.values[site], rtol=1e-3, atol=1e-5 * float(value.abs().max()))


# ---- exact effects -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", LANGUAGE)
@pytest.mark.parametrize("classifier", [False, True], ids=["raw", "label-words"])
def test_ablations_and_gates_equal_hooks_on_the_plain_model(name: str, side: str, classifier: bool) -> None:
    model = tiny_language(name)
    inputs = batch(model, side)
    read, target = (of_labels, two_targets) if classifier else (after_text, next_token)
    cascade = Cascade(Verbalized(model, TOKENS) if classifier else model, path="layer")
    sites = find_sites(model)
    predicted = predictions(model, inputs, read)

    def value(columns: dict[str, tuple[list[int], Tensor]]) -> Tensor:
        return target(plain_rows(erased(model, inputs, read, columns), 1, predicted))

    full = value({})
    size = {"rtol": 1e-4, "atol": 4e-6 * float(full.abs().max())}
    neurons = NeuronSet({site.name: [0, 2 * i + 1, site.width - 1] for i, site in enumerate(sites)})
    effects = cascade.ablate(inputs, target, neurons)
    for j, ref in enumerate(neurons):
        want = full - value({ref.site: ([ref.index], torch.zeros(1))})
        torch.testing.assert_close(effects[:, :, j].t(), want, **size)

    neurons = NeuronSet({sites[0].name: [3], sites[1].name: [4, 5], sites[2].name: [0]})
    gates = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.5, 0.0, -1.0, 1.0], [1.0, 2.0, 0.0, 0.25]])
    for setting, got in zip(gates, cascade.gated(inputs, target, neurons, gates), strict=True):
        columns = {sites[0].name: ([3], setting[:1]), sites[1].name: ([4, 5], setting[1:3])}
        torch.testing.assert_close(got, value(columns | {sites[2].name: ([0], setting[3:])}), **size)


# ---- what is read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_language_model_is_read_at_its_last_real_token(name: str) -> None:
    model = tiny_language(name)
    assert Handle(model).decoder
    assert probed_token(model, batch(model, "right")).tolist() == [length - 1 for length in LENGTHS]
    assert probed_token(model, batch(model, "left")).tolist() == [max(LENGTHS) - 1] * len(LENGTHS)


def test_a_language_model_whose_attention_says_nothing_is_a_decoder() -> None:
    assert Handle(tiny("bloom", language=True)).decoder
    assert not Handle(tiny("bert")).decoder


@pytest.mark.parametrize("kind", ["attention", "attention_norm", "gradient_x_input", "ablation"])
@pytest.mark.parametrize("name", ["gpt2", "llama-one-key", "mistral-window", "gemma2"])
def test_token_scores_do_not_depend_on_the_side_of_the_padding(name: str, kind: Any) -> None:
    model = Verbalized(tiny_language(name), TOKENS)
    left, right = ({k: v for k, v in batch(model, side).items() if k != "position_ids"} for side in ("left", "right"))
    found = [token_scores(model, inputs, kind=kind)[inputs["attention_mask"] == 1] for inputs in (left, right)]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5 * float(found[1].abs().max()))
    raw = token_scores(model.language_model, right, kind="attention")
    if kind == "attention":
        torch.testing.assert_close(raw, token_scores(model, right, kind=kind), rtol=1e-4, atol=1e-6)
