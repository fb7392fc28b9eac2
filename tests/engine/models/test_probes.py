"""The captured row is the eager attention map's row, whatever the model; token scores are what they say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.tiny_models import DECODERS, ENCODERS, FAMILIES, tiny, tiny_inputs
from spurge.engine.models.handle import Handle
from spurge.engine.models.probes import AttentionRow, probed_token, token_scores
from spurge.engine.models.sites import find_sites

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
KINDS = ("attention", "attention_norm", "gradient_x_input", "ablation")
IDS = torch.ones(2, 3, dtype=torch.long)
PADDING = ("right", "left", "none")


def build(family, implementation="eager", **settings):
    """A tiny model, or a skip where the family has no such implementation (None: its default).

    Mistral gets a window that cuts.
    """
    if family == "mistral":
        settings["sliding_window"] = 4
    try:
        return tiny(family, attn_implementation=implementation, **settings)
    except ValueError as error:
        pytest.skip(str(error)[:80])


def padded(family, side, **sizes):
    inputs = tiny_inputs(family, pad=side != "none", **sizes)
    if family == "vit":
        return inputs
    if side == "left":
        inputs = {name: value.flip(1) for name, value in inputs.items()}
    if side == "none":
        del inputs["attention_mask"]
    return inputs


def last_attention(model):
    return find_sites(model)[-1].attention


def eager_row(family, inputs, position, **settings):
    """``[B, heads, T]`` of an eager copy: same seed, same weights."""
    model = build(family, **settings)
    full = model(**inputs, output_attentions=True).attentions[-1]
    return full[torch.arange(len(position)), :, position]


def fingerprint(model):
    """All that a probe may touch: hooks, replaced forwards, configurations, modes and gradient flags."""
    return [
        (
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            "forward" in module.__dict__,
            id(getattr(module, "config", None)),
            getattr(getattr(module, "config", None), "_attn_implementation", None),
            module.training,
            tuple(parameter.requires_grad for parameter in module.parameters(recurse=False)),
        )
        for module in model.modules()
    ]


# ---- the probed token --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_is_decoder(family):
    assert Handle(tiny(family)).decoder == (family in DECODERS)


def test_is_decoder_without_layers():
    assert not Handle(nn.Linear(2, 2)).decoder


@pytest.mark.parametrize(
    ("side", "positions"), [("right", [8, 7, 6, 5]), ("left", [8, 8, 8, 8]), ("none", [8, 8, 8, 8])]
)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_probed_token(family, side, positions):
    found = probed_token(tiny(family), padded(family, side))
    assert found.dtype == torch.int64
    assert found.tolist() == (positions if family in DECODERS else [0] * 4)


def test_padding_without_a_mask():
    inputs = padded("llama", "right")
    del inputs["attention_mask"]
    assert probed_token(tiny("llama"), inputs).tolist() == [8, 7, 6, 5]


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_probed_token_is_the_last_real_one(rows, tokens, seed):
    mask = torch.rand(rows, tokens, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[:, 0] = True
    inputs = {"inputs_embeds": torch.zeros(rows, tokens, 4), "attention_mask": mask.long()}
    found = probed_token(tiny("gpt2"), inputs)
    assert found.tolist() == [max(t for t in range(tokens) if mask[r, t]) for r in range(rows)]


def test_probed_token_is_what_the_head_reads():
    model = tiny("qwen2")
    inputs = padded("qwen2", "right")
    position, seen = probed_token(model, inputs), []
    handle = model.score.register_forward_hook(lambda module, args, output: seen.append(output))
    logits = model(**inputs).logits
    handle.remove()
    assert torch.equal(logits, seen[0][torch.arange(4), position])


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ({}, "inputs: expected input_ids"),
        ({"input_ids": IDS, "attention_mask": torch.zeros(2, 3)}, "example 0 has no real token"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 4)}, "attention_mask: expected shape"),
        ({"input_ids": IDS, "attention_mask": [[1] * 3] * 2}, r"attention_mask.*got list"),
    ],
)
def test_probed_token_refuses(inputs, text):
    with pytest.raises(ValueError, match=text):
        probed_token(tiny("gpt2"), inputs)


# ---- the attention row -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", PADDING)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_row_is_the_eager_row(family, implementation, side):
    model, inputs = build(family, implementation), padded(family, side)
    before = fingerprint(model)
    position = probed_token(model, inputs)
    with torch.no_grad():
        logits = model(**inputs).logits
        wanted = eager_row(family, inputs, position)
        for prune in (False, True):
            with AttentionRow(last_attention(model), lambda rows: position, prune=prune) as row:
                probed = model(**inputs).logits
            torch.testing.assert_close(row.probabilities, wanted, **CLOSE)
            torch.testing.assert_close(row.row(), wanted.mean(1), **CLOSE)
            if prune:
                torch.testing.assert_close(probed, logits, **CLOSE)
            else:
                assert torch.equal(probed, logits)
            assert fingerprint(model) == before


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("family", ["bert", "deberta_v2", "gpt2", "mistral", "vit"])
def test_gradient_is_the_eager_gradient(family, prune):
    inputs = padded(family, "right")
    weights = torch.linspace(-1, 1, 17)

    def gradients(model, measure):
        leaf = []

        def watch(module, args, output):
            leaf.append((output[0] if isinstance(output, tuple) else output).detach().requires_grad_())
            return (leaf[0], *output[1:]) if isinstance(output, tuple) else leaf[0]

        handle = find_sites(model)[1].block.register_forward_hook(watch)
        try:
            return torch.autograd.grad(measure(model), leaf)[0]
        finally:
            handle.remove()

    def from_row(model):
        with AttentionRow(last_attention(model), lambda rows: position, prune=prune) as row:
            logits = model(**inputs).logits
        return (row.row() * weights[: row.row().shape[1]]).sum() + logits[:, 0].sum()

    def from_map(model):
        output = model(**inputs, output_attentions=True)
        row = output.attentions[-1][torch.arange(4), :, position].mean(1)
        return (row * weights[: row.shape[1]]).sum() + output.logits[:, 0].sum()

    model = build(family, "eager" if family == "deberta_v2" else "sdpa")
    position = probed_token(model, inputs)
    torch.testing.assert_close(gradients(model, from_row), gradients(build(family), from_map), **CLOSE)


def test_rows_of_several_copies():
    """More rows than examples, each with its own position."""
    model, inputs = build("llama", "sdpa"), padded("llama", "right")
    many = {name: value.repeat(3, 1) for name, value in inputs.items()}
    position = torch.tensor([8, 7, 6, 5, 0, 1, 2, 3, 4, 4, 4, 4])
    with torch.no_grad(), AttentionRow(last_attention(model), lambda rows: position[:rows]) as row:
        model(**many)
        torch.testing.assert_close(row.probabilities, eager_row("llama", many, position), **CLOSE)
        model(**inputs)
        torch.testing.assert_close(row.probabilities, eager_row("llama", inputs, position[:4]), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precision(dtype):
    model, inputs = build("qwen2", "sdpa", dtype=dtype), padded("qwen2", "right")
    position = probed_token(model, inputs)
    with torch.no_grad(), AttentionRow(last_attention(model), lambda rows: position, prune=True) as row:
        assert model(**inputs).logits.dtype == dtype
    assert row.probabilities.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(row.probabilities.sum(2), torch.ones_like(row.probabilities.sum(2)))


def test_pruned_output_has_no_copies():
    seen = []
    model, inputs = build("llama", "sdpa"), padded("llama", "none")
    name = "o_proj"
    with AttentionRow(last_attention(model), lambda rows: torch.full((rows,), 8), prune=True):
        handle = getattr(last_attention(model), name).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        model(**inputs)
        handle.remove()
    assert torch.equal(seen[0][:, 0], seen[0][:, 5])


def plain_row(query, key, mask, position, scale=None):
    """Softmax of one query row by the book: shared heads repeated, disallowed keys at minus infinity."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query @ key.transpose(2, 3) * (scale or query.shape[3] ** -0.5)
    full = logits.masked_fill(~mask, float("-inf")).softmax(-1)
    return full[torch.arange(len(position)), :, position]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 4),
    shared=st.integers(1, 3),
    group=st.integers(1, 3),
    tokens=st.integers(1, 7),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 4),
    form=st.sampled_from(["bool", "additive", "keys", "none"]),
    seed=st.integers(0, 99),
)
def test_every_form_of_mask(rows, shared, group, tokens, causal, window, form, seed):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(rows, shared * group, tokens, 5, generator=generator, dtype=torch.float64)
    key = torch.randn(rows, shared, tokens, 5, generator=generator, dtype=torch.float64)
    position = torch.randint(tokens, (rows,), generator=generator)
    keys = torch.rand(rows, tokens, generator=generator) < 0.5
    keys[torch.arange(rows), position] = True
    if form == "none":
        keys[:] = True
    step = torch.arange(tokens)
    order = step[:, None] - step
    seen = keys[:, None, None] & torch.ones(tokens, tokens, dtype=torch.bool)
    if causal:
        seen = seen & (order >= 0)
    if window is not None:
        seen = seen & (order < window)
    additive = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)
    mask = {"bool": seen, "additive": additive, "keys": keys, "none": None}[form]
    row = AttentionRow(nn.Identity(), lambda rows: position, prune=True)
    output = row.take(query, key, key, mask, scale=None, causal=causal, window=window)
    wanted = plain_row(query, key, seen, position)
    torch.testing.assert_close(row.probabilities, wanted)
    torch.testing.assert_close(
        output, (wanted[:, :, None] @ key.repeat_interleave(group, 1))[:, :, 0], rtol=1e-9, atol=1e-9
    )


def test_softcap_bias_and_a_longer_cache():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 3, 4, 5, generator=generator), torch.randn(2, 3, 4, 5, generator=generator)
    bias, mask = torch.randn(1, 3, 4, 4, generator=generator), torch.ones(2, 1, 1, 6, dtype=torch.bool)
    row = AttentionRow(nn.Identity(), lambda rows: torch.tensor([1, 3]))
    assert row.take(query, key, key, mask, scale=0.5, causal=False, softcap=2.0, bias=bias) is None
    full = (2 * torch.tanh(query @ key.transpose(2, 3) * 0.5 / 2) + bias).softmax(-1)
    torch.testing.assert_close(row.probabilities, full[torch.arange(2), :, torch.tensor([1, 3])])


class OwnCode(nn.Module):
    """Attention as models wrote it before transformers had a table, ``BertSdpaSelfAttention`` for example."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(12, 12) for _ in range(3))

    def forward(self, hidden, mask):
        q, k, v = (layer(hidden).unflatten(2, (3, 4)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        output = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
        return output.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("prune", [False, True])
def test_modules_that_call_the_kernel_themselves(prune):
    torch.manual_seed(0)
    module, hidden, mask = OwnCode(), torch.randn(2, 5, 12), torch.ones(5, 5, dtype=torch.bool).tril()
    position = torch.tensor([4, 2])
    wanted = module(hidden, mask)
    with AttentionRow(module, lambda rows: position, prune=prune, keep_values=True) as row:
        output = module(hidden, mask)
    picked = (torch.arange(2), position)
    torch.testing.assert_close(output[picked], wanted[picked], **CLOSE)
    assert torch.equal(output, wanted) == (not prune)
    torch.testing.assert_close(row.values, module.value(hidden).unflatten(2, (3, 4)).transpose(1, 2))
    query, key = (layer(hidden).unflatten(2, (3, 4)).transpose(1, 2) for layer in (module.query, module.key))
    torch.testing.assert_close(row.probabilities, plain_row(query, key, mask, position, scale=0.3), **CLOSE)


def test_scaling_of_gpt2_by_layer():
    inputs = padded("gpt2", "right")
    model = build("gpt2", scale_attn_by_inverse_layer_idx=True)
    position = probed_token(model, inputs)
    with torch.no_grad(), AttentionRow(last_attention(model), lambda rows: position) as row:
        model(**inputs)
        wanted = eager_row("gpt2", inputs, position, scale_attn_by_inverse_layer_idx=True)
    torch.testing.assert_close(row.probabilities, wanted, **CLOSE)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("family", ["bert", "deberta_v2", "gpt2"])
def test_nothing_stays_behind_an_exception(family, error):
    model, inputs = tiny(family), padded(family, "right")
    before, logits = fingerprint(model), model(**inputs).logits

    def fail(rows):
        raise error("stop")

    with pytest.raises(error, match="stop"), AttentionRow(last_attention(model), fail):
        model(**inputs)
    assert fingerprint(model) == before
    assert torch.equal(model(**inputs).logits, logits)


def test_opens_once_at_a_time():
    attention = last_attention(tiny("bert"))
    row = AttentionRow(attention, lambda rows: torch.zeros(rows, dtype=torch.long))
    with row, pytest.raises(RuntimeError, match="already being captured"), row:
        pass
    with row:
        pass


def test_only_one_module_gets_another_configuration():
    model = tiny("llama")
    config = last_attention(model).config
    with AttentionRow(last_attention(model), lambda rows: torch.zeros(rows, dtype=torch.long)):
        assert last_attention(model).config._attn_implementation != "sdpa"
        assert model.config._attn_implementation == "sdpa"
        assert find_sites(model)[0].attention.config is config
    assert last_attention(model).config is config


def test_needs_a_forward():
    with pytest.raises(RuntimeError, match="no attention row yet"):
        AttentionRow(nn.Identity(), lambda rows: None).row()


@pytest.mark.parametrize(
    "position", [torch.zeros(3, dtype=torch.long), torch.zeros(4), torch.zeros(4, 1, dtype=torch.long), [0] * 4]
)
@pytest.mark.parametrize("family", ["bert", "deberta_v2"])
def test_refuses_positions(family, position):
    model = tiny(family)
    with (
        pytest.raises(ValueError, match="position: expected 4 integers for 4 rows"),
        AttentionRow(last_attention(model), lambda rows: position),
    ):
        model(**padded(family, "right"))


@pytest.mark.parametrize(("attention", "position"), [(None, len), ("bert", len), (nn.Identity(), torch.zeros(2))])
def test_refuses_types(attention, position):
    with pytest.raises(TypeError, match=r"attention|position"):
        AttentionRow(attention, position)


def test_refuses_a_module_that_hides_its_attention():
    hidden = nn.Linear(3, 3)
    with (
        pytest.raises(ValueError, match=r"Linear does not show its attention probabilities.*eager"),
        AttentionRow(hidden, lambda rows: torch.zeros(rows, dtype=torch.long)),
    ):
        hidden(torch.zeros(2, 3))


# ---- token scores ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_every_family(family, kind):
    model, inputs = build(family, None), padded(family, "right")
    before = fingerprint(model)
    scores = token_scores(model, inputs, kind=kind)
    assert scores.dtype == torch.float32
    assert scores.shape == ((4, 17) if family == "vit" else (4, 9))
    assert torch.isfinite(scores).all()
    assert not scores.requires_grad
    assert fingerprint(model) == before
    if family != "vit":
        assert not scores[inputs["attention_mask"] == 0].any()
    if kind == "attention":
        torch.testing.assert_close(scores.sum(1), torch.ones(4), **CLOSE)
        torch.testing.assert_close(scores, eager_row(family, inputs, probed_token(model, inputs)).mean(1), **CLOSE)


@pytest.mark.parametrize("family", ["bert", "deberta_v2", "gpt2", "llama"])
def test_attention_norm_adds_up_to_the_attention_output(family):
    """The vectors whose lengths are reported sum to the output projection's output at the probed token."""
    model, inputs = tiny(family), padded(family, "right")
    site, seen = find_sites(model)[-1], []
    position = probed_token(model, inputs)
    handle = site.attention_output.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad(), AttentionRow(site.attention, lambda rows: position, keep_values=True) as row:
        model(**inputs)
    handle.remove()
    heads = row.probabilities.shape[1]
    weight = site.attention_output.weight
    weight = weight.t() if family == "gpt2" else weight
    sent = sum(
        row.probabilities[:, h, :, None]
        * (row.values[:, h * row.values.shape[1] // heads] @ weight.unflatten(1, (heads, -1))[:, h].t())
        for h in range(heads)
    )
    bias = 0 if site.attention_output.bias is None else site.attention_output.bias
    torch.testing.assert_close(sent.sum(1) + bias, seen[0][torch.arange(4), position], **CLOSE)
    torch.testing.assert_close(token_scores(model, inputs, kind="attention_norm"), sent.norm(dim=2), **CLOSE)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_gradient_x_input_is_autograd(family):
    model, inputs = tiny(family), padded(family, "none")
    embedding = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    table, model_inputs = model.get_input_embeddings(), dict(inputs)
    handle = table.register_forward_hook(lambda module, args, output: embedding)
    logits = model(**model_inputs).logits
    handle.remove()
    (grad,) = torch.autograd.grad(logits.max(1).values.sum(), embedding)
    scores = token_scores(model, inputs, kind="gradient_x_input")
    torch.testing.assert_close(scores, (embedding * grad).sum(-1).abs(), **CLOSE)


@pytest.mark.parametrize("replace", [None, 4])
@pytest.mark.parametrize("family", ["bert", "gpt2", "gemma"])
def test_ablation_is_a_loop(family, replace):
    model, inputs = tiny(family), padded(family, "right", tokens=6)
    table = model.get_input_embeddings()
    with torch.no_grad():
        other = torch.zeros(32) if replace is None else table(torch.tensor([replace]))[0]
        logits = model(**inputs).logits
        classes = logits.argmax(1)
        wanted = torch.zeros(4, 6)
        for example, token in inputs["attention_mask"].nonzero().tolist():

            def erase(module, args, output, at=(example, token)):
                output[at] = other
                return output

            handle = table.register_forward_hook(erase)
            lost = logits - model(**inputs).logits
            handle.remove()
            wanted[example, token] = lost[example, classes[example]]
    torch.testing.assert_close(token_scores(model, inputs, kind="ablation", replace=replace), wanted, **CLOSE)


@pytest.mark.parametrize("kind", ["gradient_x_input", "ablation"])
def test_scores_of_embedded_inputs(kind):
    model, inputs = tiny("bert"), padded("bert", "right")
    embedded = {
        "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach(),
        "attention_mask": inputs["attention_mask"],
    }
    torch.testing.assert_close(
        token_scores(model, embedded, kind=kind), token_scores(model, inputs, kind=kind), **CLOSE
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_budget_does_not_change_scores(family, kind):
    model, inputs = tiny(family), padded(family, "right")
    whole = token_scores(model, inputs, kind=kind)
    torch.testing.assert_close(token_scores(model, inputs, kind=kind, memory=1), whole, **CLOSE)
    torch.testing.assert_close(token_scores(model, inputs, kind=kind, memory="300 KiB"), whole, **CLOSE)


@pytest.mark.parametrize("kind", ["gradient_x_input", "ablation"])
def test_targets(kind):
    """A target sees which example each row belongs to and the unedited model's class."""
    model, inputs = tiny("distilbert", labels=3), padded("distilbert", "right")
    labels = torch.tensor([2, 0, 1, 1])
    logits = model(**inputs).logits

    def margin(rows):
        assert torch.equal(rows.predicted, logits.argmax(1)[rows.example])
        assert rows.attention is None
        return rows.logits.gather(1, labels[rows.example][:, None])[:, 0] * 2

    def own(rows):
        return rows.logits[torch.arange(len(rows.logits)), labels[rows.example]]

    scores = token_scores(model, inputs, kind=kind, target=margin, memory=1)
    torch.testing.assert_close(scores, 2 * token_scores(model, inputs, kind=kind, target=own), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_leave_no_trace_of_an_exception(kind):
    model, inputs = tiny("bert").train(), padded("bert", "right")
    before = fingerprint(model)

    def stop(module, args):
        raise KeyboardInterrupt

    handle = model.classifier.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        token_scores(model, inputs, kind=kind)
    handle.remove()
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"kind": "rollout"}, ValueError, "kind: expected one of attention, attention_norm"),
        ({"kind": "ablation", "target": 3}, TypeError, "target: expected a function"),
        ({"kind": "ablation", "target": lambda rows: rows.logits}, ValueError, "target: expected one number for each"),
        ({"kind": "ablation", "target": lambda rows: 0.5}, ValueError, "target: .*got float"),
        ({"kind": "gradient_x_input", "target": lambda rows: rows.logits.detach()[:, 0]}, ValueError, "target: has no"),
        ({"kind": "ablation", "replace": 10**6}, ValueError, "replace: expected an id from 0 to"),
        ({"kind": "ablation", "replace": -1}, ValueError, "replace: expected an id from 0 to"),
        ({"kind": "ablation", "replace": "[MASK]"}, ValueError, "replace: expected the id"),
        ({"memory": "much"}, ValueError, "memory"),
        ({"memory": 0}, ValueError, "memory"),
    ],
)
def test_scores_refuse(arguments, error, text):
    with pytest.raises(error, match=text):
        token_scores(tiny("bert"), padded("bert", "right"), **arguments)


def test_scores_refuse_models_and_inputs():
    with pytest.raises(ValueError, match="model: found no feed-forward layers"):
        token_scores(nn.Linear(2, 2), {"input_ids": torch.zeros(1, 2)})
    with pytest.raises(ValueError, match="inputs: expected input_ids"):
        token_scores(tiny("bert"), {})
    with pytest.raises(ValueError, match="model: expected logits"):
        token_scores(tiny("bert").bert, padded("bert", "right"), kind="ablation")
    assert token_scores(tiny("bert").bert, padded("bert", "right")).shape == (4, 9)


def test_families_are_covered():
    assert set(ENCODERS) | set(DECODERS) | {"vit"} == set(FAMILIES)
