"""Attention heads as units: gates in front of the output projection, beside the feed-forward neurons."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.tiny_models import HEADS, HIDDEN, LAYERS, WIDTH, drawn, tiny, tiny_inputs
from helpers.tolerance import assert_near
from spurge.engine.cascade.ablation import ablated, gated
from spurge.engine.cascade.cascade import Cascade
from spurge.engine.cascade.quadrature import gauss_legendre
from spurge.engine.models.attention import head_width
from spurge.engine.models.handle import Handle
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.sites import find_sites, widths
from spurge.engine.passes.whole_pass import WholePass

D = HIDDEN // HEADS
TERMS = 4096  # products and sums on the way through a tiny model; as many roundings
MODELS = ("bert", "gpt2", "llama", "vit", "gpt_neox", "glm4")  # llama: shared keys; gpt_neox: attention beside the MLP


def albert():
    """A model whose layers are one module that runs again and again: each question runs it whole."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": 2}
    sizes |= {"vocab_size": 200, "embedding_size": 16, "max_position_embeddings": 64}
    return drawn("Albert", "ForSequenceClassification", sizes, 0)


def logits_of(rows):
    return rows.logits


def by_hand(model, inputs, scales):
    """Logits with slices of output projections' inputs multiplied: (module, head, factor) each."""

    def scaled(module, args, head, factor):
        z = args[0].clone()
        z[..., head * D : (head + 1) * D] *= factor
        return (z, *args[1:])

    handles = [
        module.register_forward_pre_hook(lambda m, args, head=head, factor=factor: scaled(m, args, head, factor))
        for module, head, factor in scales
    ]
    with torch.no_grad():
        logits = model(**inputs).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("family", MODELS)
def test_switching_a_head_off_is_patching_its_output_by_hand(family):
    model, inputs = tiny(family), tiny_inputs(family)
    cascade = Cascade(model, units="heads")
    sites = find_sites(model, units="heads")
    assert [site.down for site in sites] == [site.attention_output for site in find_sites(model)]
    effects = cascade.ablate(inputs, logits_of, NeuronSet.all(widths(sites)))
    full = by_hand(model, inputs, [])
    offs = [by_hand(model, inputs, [(site.down, head, 0)]) for site in sites for head in range(HEADS)]
    want = torch.stack([full - off for off in offs], 2).transpose(0, 1)
    assert_near(effects, want, terms=TERMS, size=full.abs().max())
    assert want.abs().amax((0, 1)).min() > 1e-3


def test_a_model_that_runs_whole_has_heads_too():
    model, inputs = albert(), tiny_inputs("bert")
    (site,) = find_sites(model, units="heads")
    with pytest.warns(UserWarning, match="run whole"):
        effects = Cascade(model, units="heads").ablate(inputs, logits_of, NeuronSet({site.name: [2]}))
    want = by_hand(model, inputs, []) - by_hand(model, inputs, [(site.down, 2, 0)])
    assert_near(effects[..., 0].t(), want, terms=TERMS, size=want.abs().max() + 1)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize("attention", [False, True])
def test_heads_and_neurons_together_are_the_same_however_the_model_is_run(family, attention):
    model, inputs = tiny(family), tiny_inputs(family)
    cascade = Cascade(model, units="both", attention=attention)

    def target(rows):
        read = rows.logits if rows.attention is None else torch.cat([rows.logits, rows.attention], 1)
        return read.float()

    names = [site.name for site in cascade.sites]
    heads, down = find_sites(model, units="heads"), find_sites(model)
    assert names == [site.name for pair in zip(heads, down, strict=True) for site in pair]
    neurons = NeuronSet({name: [0, 3] for name in names})
    gates = torch.rand(3, len(neurons), generator=torch.Generator().manual_seed(1)) * 2
    found = [cascade.ablate(inputs, target, neurons), cascade.gated(inputs, target, neurons, gates)]
    with torch.no_grad():
        trace = WholePass(cascade.handle, attention=attention, sites=cascade.sites).trace(inputs)
        units, batch = cascade.units(neurons), trace.batch
        every, owners = torch.tensor(units).repeat_interleave(batch, 0), torch.arange(batch).repeat(len(units))
        off = ablated(trace, target, every, owners, 7).unflatten(1, (len(units), batch)).transpose(1, 2)
        want = [off, gated(trace, target, units, gates, 4)]
    for own, whole in zip(found, want, strict=True):
        assert_near(own, whole, terms=TERMS, size=want[1].abs().max())


@pytest.mark.parametrize("name", ["Llama", "Granite"])  # Granite scales what it adds: for neurons layers run again, too
def test_sites_of_a_layer_in_any_order_are_gated_as_they_run(name):
    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": 2}
    sizes |= {"vocab_size": 200, "num_key_value_heads": 2}
    model, inputs = drawn(name, "ForCausalLM", sizes | {"residual_multiplier": 0.5}, 0), tiny_inputs("llama")
    both = find_sites(model, units="both")
    neurons = NeuronSet.all(widths(both[:2]))
    gates = torch.rand(1, len(neurons), generator=torch.Generator().manual_seed(2)) * 2
    cascades = [Cascade(model, sites=sites) for sites in (both, [both[i] for i in (1, 0, 3, 2)])]
    first, second = (cascade.gated(inputs, logits_of, neurons, gates) for cascade in cascades)
    assert_near(second, first, terms=TERMS, size=first.abs().max())
    whole = WholePass(Handle(model), sites=both)
    with torch.no_grad():
        third = gated(whole.trace(inputs), logits_of, cascades[0].units(neurons), gates, 1)
    assert_near(third, first, terms=TERMS, size=first.abs().max())


@pytest.mark.parametrize("family", MODELS)
def test_estimates_are_gradient_times_activation_over_tokens_and_coordinates(family):
    model, inputs = tiny(family), tiny_inputs(family)
    sites, kept = find_sites(model, units="heads"), []

    def keep(module, args):
        args[0].retain_grad()
        kept.append(args[0])

    handles = [site.down.register_forward_pre_hook(keep) for site in sites]
    model(**inputs).logits[:, 1].sum().backward()
    for handle in handles:
        handle.remove()
    found = Cascade(model, units="heads", exact=0, audit=0).attribute(inputs, lambda rows: rows.logits[:, 1])
    for site, z in zip(sites, kept, strict=True):
        terms = (z * z.grad).detach().unflatten(-1, (HEADS, D))
        assert_near(found.values[site.name][0], terms.sum((1, 3)), terms=TERMS, size=terms.abs().sum((1, 3)).max())


def test_measured_heads_are_those_at_stake_and_exact():
    model, inputs = tiny("bert"), tiny_inputs("bert")
    cascade = Cascade(model, units="both", exact=9, audit=16)
    found = cascade.attribute(inputs, lambda rows: rows.logits[:, 1])
    examples = len(found.full[0])
    assert found.exact == 9 * examples
    assert found.agreement[0].drawn == 16
    every = Cascade(model, units="both", path="neuron").attribute(inputs, lambda rows: rows.logits[:, 1])
    same = [(found.values[name] - value).abs() <= 1e-5 for name, value in every.values.items()]
    assert sum(int(part.sum()) for part in same) >= 9 * examples


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_integrals_of_heads_are_those_of_hooks_by_hand(family):
    model, inputs = tiny(family, layers=2), tiny_inputs(family)
    alphas, weights = gauss_legendre(3)
    found = Cascade(model, units="heads", path="layer", nodes=3).attribute(inputs, lambda rows: rows.logits[:, 0])
    for site in find_sites(model, units="heads"):
        want, leaf = torch.zeros(4, HEADS), {}

        def scale(module, args, leaf=leaf):
            leaf["z"] = args[0].detach()
            leaf["scaled"] = (leaf["z"] * leaf["alpha"]).requires_grad_()
            return (leaf["scaled"],)

        handle = site.down.register_forward_pre_hook(scale)
        for leaf["alpha"], weight in zip(alphas.tolist(), weights.tolist(), strict=True):
            (grad,) = torch.autograd.grad(model(**inputs).logits[:, 0].sum(), leaf["scaled"])
            want += weight * (leaf["z"] * grad).unflatten(-1, (HEADS, D)).sum((1, 3))
        handle.remove()
        assert_near(found.values[site.name][0], want, terms=TERMS, size=want.abs().max() + 1)


def test_heads_and_neurons_of_one_model_are_told_apart_by_units():
    model = tiny("gpt2")
    assert len(find_sites(model, units="both")) == 2 * LAYERS
    name = "transformer.h.1.attn.c_proj"
    (coordinates,), (heads,) = find_sites(model, [name]), find_sites(model, [name], units="heads")
    assert (coordinates.width, heads.width) == (HIDDEN, HEADS)
    assert torch.equal(heads.projection.columns(torch.tensor([2])), coordinates.weight()[:, 2 * D : 3 * D])
    with pytest.raises(ValueError, match=r"names: 'transformer.h.0.mlp.c_proj' must be the output projection"):
        find_sites(model, ["transformer.h.0.mlp.c_proj"], units="heads")
    with pytest.raises(ValueError, match="units: expected one of"):
        find_sites(model, units="layers")
    with pytest.raises(ValueError, match="units: sites say which units"):
        Cascade(model, units="heads", sites=find_sites(model))


def test_heads_that_cannot_be_told_apart_are_refused():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(HIDDEN, HEADS, WIDTH, batch_first=True), 2)
    with pytest.raises(ValueError, match=r"heads of 'layers.0' cannot be told apart: MultiheadAttention multiplies"):
        find_sites(encoder, units="heads")
    model = tiny("bert")
    model.bert.encoder.layer[1].attention.self.num_attention_heads = 3
    model.bert.encoder.layer[1].attention.self.attention_head_size = 11
    with pytest.raises(ValueError, match=r"told apart: BertSelfAttention speaks of 3 or 4 heads, 11"):
        find_sites(model, units="both")
    assert len(find_sites(model)) == LAYERS
    assert "neither how many heads" in head_width(nn.Linear(2, 2), HIDDEN)
    assert "no attention module" in head_width(None, HIDDEN)
