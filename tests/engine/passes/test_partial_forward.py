"""Entering a model in the middle: where norms stand, the probed token, and what a call's arguments are cut to."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from helpers.tiny_models import FAMILIES, tiny
from spurge.engine.models.call_arguments import cut, first, leading, like, take
from spurge.engine.models.handle import Handle
from spurge.engine.models.hooks import WideAttention, frozen, hook, hook_before, replaced_forward
from spurge.engine.models.sites import find_sites
from spurge.engine.passes.norm_placement import layer_anatomy
from spurge.engine.passes.partial_forward import PartialForward
from spurge.engine.passes.trace import Owners


def inputs_for(family: str, examples: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    if family == "vit":
        return {"pixel_values": torch.randn(examples, 3, 16, 16, generator=generator)}
    ids = torch.randint(5, 60, (examples, 7), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


POST_NORM = {"bert", "distilbert", "roberta", "electra", "deberta_v2"}


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_stand_where_the_family_puts_them(family: str) -> None:
    forward = PartialForward(Handle(tiny(family)))
    trace = forward.trace(inputs_for(family))
    want = "post_norm" if family in POST_NORM else "sandwich" if family == "glm4" else "residual"
    assert {joint.kind for joint in trace.anatomy.placements} == {want}
    assert forward.pruned  # every one of these heads reads a single token


@pytest.mark.parametrize("family", FAMILIES)
def test_unchanged_rows_give_the_unedited_logits(family: str) -> None:
    model, inputs = tiny(family, labels=3), inputs_for(family)
    forward = PartialForward(Handle(model))
    trace = forward.trace(inputs)
    with torch.no_grad():
        want = model(**inputs).logits
        torch.testing.assert_close(trace.rows.logits, want, rtol=1e-5, atol=1e-5)
        seen = trace.sites
        rows = forward.run(trace, {i: seen[i].anchor.repeat(2, 1, 1) for i in range(len(seen))})
    assert rows.logits.shape == (2 * len(seen) * 3, 3)
    torch.testing.assert_close(rows.logits, want.repeat(2 * len(seen), 1), rtol=1e-4, atol=1e-5)
    assert rows.example.tolist() == [0, 1, 2] * 2 * len(seen)


class OddLayer(nn.Module):
    """A layer whose output is no sum with its down projection: it has to be run again."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.layer(*args, **kwargs)
        hidden = first(output)  # GPT-2 of transformers 4 gives a tuple
        return like(output, torch.tanh(hidden) * hidden)


def test_unknown_layers_are_replayed() -> None:
    from spurge.engine.cascade.cascade import Cascade, predicted_logit
    from spurge.engine.models.neurons import NeuronSet

    model, inputs = tiny("gpt2", labels=3), inputs_for("gpt2")
    model.transformer.h = nn.ModuleList(OddLayer(layer) for layer in model.transformer.h)
    site = find_sites(model)[0]
    forward = PartialForward(Handle(model))
    assert forward.trace(inputs).anatomy.placements[0].kind == "replay"
    assert not forward.pruned
    got = Cascade(model, path="layer").ablate(inputs, predicted_logit, NeuronSet({site.name: [3]}))[0, :, 0]

    def erase(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        z = args[0].clone()
        z[..., 3] = 0
        return (z,), kwargs

    with torch.no_grad():
        full = model(**inputs).logits
        with hook_before(site.down, erase):
            off = model(**inputs).logits
    predicted = full.argmax(1, keepdim=True)
    torch.testing.assert_close(got, (full - off).gather(1, predicted)[:, 0], rtol=1e-4, atol=1e-6)


def test_a_head_that_reads_every_token_is_not_pruned() -> None:
    model, inputs = tiny("bert"), inputs_for("bert")

    class MeanPooler(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden.mean(1)

    model.bert.pooler = MeanPooler()
    forward = PartialForward(Handle(model))
    trace = forward.trace(inputs)
    assert not forward.pruned
    with torch.no_grad():
        torch.testing.assert_close(trace.rows.logits, model(**inputs).logits)


def test_work_between_layers_is_refused() -> None:
    model, inputs = tiny("bert"), inputs_for("bert")
    layers = model.bert.encoder.layer
    with hook_before(layers[1], lambda m, args, kwargs: ((args[0] * 2, *args[1:]), kwargs)):
        sites = find_sites(model)
        with pytest.raises(ValueError, match="changes the hidden states between layers 0 and 1"):
            layer_anatomy(model, [site.block for site in sites], sites, inputs)


def test_arguments_are_cut_by_their_batch_dimension_only() -> None:
    mask, table = torch.zeros(6, 4), torch.zeros(4, 8)
    small = {"mask": torch.zeros(2, 4), "table": table, "pair": (torch.zeros(2, 1), None), "n": 3}
    large = {"mask": mask, "table": table, "pair": (torch.zeros(6, 1), None), "n": 3}
    mask[2:] = 1
    got = cut(large, leading(small), batch=2, total=6, rows=slice(2, 6))
    assert torch.equal(got["mask"], torch.ones(4, 4))
    assert got["table"] is table
    assert got["pair"][0].shape == (4, 1)
    assert got["pair"][1] is None
    assert got["n"] == 3


def test_take_and_repeat() -> None:
    inputs = {"input_ids": torch.arange(6).view(3, 2), "flag": True, "scale": torch.tensor(2.0)}
    assert take(inputs, slice(1, 2))["input_ids"].tolist() == [[2, 3]]
    assert take(inputs, slice(1, 2))["flag"] is True
    for owners, want in ((Owners(3, 6), [0, 1, 2, 0, 1, 2]), (Owners(3, 4, torch.tensor([2, 0, 0, 1])), [2, 0, 0, 1])):
        rows = owners.inputs(inputs)
        assert torch.equal(rows["input_ids"], inputs["input_ids"][want])
        assert rows["scale"].dim() == 0
        assert rows["flag"] is True


def test_patches_are_undone_by_exceptions() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[0].weight.requires_grad_(False)
    own = model[0].forward

    def interrupted() -> None:
        with ExitStack() as stack:
            stack.enter_context(frozen(model))
            stack.enter_context(hook(model[0], lambda *a: None))
            stack.enter_context(hook_before(model[0], lambda *a: None))
            stack.enter_context(replaced_forward(model[0], lambda x: x))
            assert not model.training
            assert not model[0].bias.requires_grad
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert model.training
    assert model[0].bias.requires_grad
    assert not model[0].weight.requires_grad
    assert model[0].forward == own
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks


def test_half_precision_attention_is_computed_wide() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 5, 8, generator=generator) for _ in range(3))
    mask = torch.zeros(2, 1, 5, 5).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
    half = [x.bfloat16() for x in (q, k, v)]
    with WideAttention():
        got = scaled_dot_product_attention(*half, attn_mask=mask.bfloat16(), scale=0.5)
        same = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.5)
    assert got.dtype == torch.bfloat16
    want = scaled_dot_product_attention(*[x.float() for x in half], attn_mask=mask, scale=0.5)
    assert torch.equal(got, want.bfloat16())
    assert torch.equal(same, scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.5))
