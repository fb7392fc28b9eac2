"""Sites are found in every family, from the module tree alone."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from helpers.tiny_models import FAMILIES, HIDDEN, LAYERS, WIDTH, tiny, tiny_inputs
from spurge.engine.models.sites import NeuronRef, find_sites, widths

# what each family calls its parts, relative to a block: down projection, FFN, attention, query, output of attention
PARTS = {
    "bert": ("output.dense", "intermediate", "attention.self", "attention.self.query", "attention.output.dense"),
    "distilbert": ("ffn.lin2", "ffn", "attention", "attention.q_lin", "attention.out_lin"),
    "roberta": ("output.dense", "intermediate", "attention.self", "attention.self.query", "attention.output.dense"),
    "electra": ("output.dense", "intermediate", "attention.self", "attention.self.query", "attention.output.dense"),
    "deberta_v2": (
        "output.dense",
        "intermediate",
        "attention.self",
        "attention.self.query_proj",
        "attention.output.dense",
    ),
    "gpt2": ("mlp.c_proj", "mlp", "attn", None, "attn.c_proj"),
    "gpt_neox": ("mlp.dense_4h_to_h", "mlp", "attention", None, "attention.dense"),
    "llama": ("mlp.down_proj", "mlp", "self_attn", "self_attn.q_proj", "self_attn.o_proj"),
    "mistral": ("mlp.down_proj", "mlp", "self_attn", "self_attn.q_proj", "self_attn.o_proj"),
    "qwen2": ("mlp.down_proj", "mlp", "self_attn", "self_attn.q_proj", "self_attn.o_proj"),
    "gemma": ("mlp.down_proj", "mlp", "self_attn", "self_attn.q_proj", "self_attn.o_proj"),
    "phi": ("mlp.fc2", "mlp", "self_attn", "self_attn.q_proj", "self_attn.dense"),
    "glm4": ("mlp.down_proj", "mlp", "self_attn", "self_attn.q_proj", "self_attn.o_proj"),
    "vit": ("mlp.fc2", "mlp", "attention", "attention.q_proj", "attention.o_proj"),
}
OLD_VIT = ("output.dense", "intermediate", "attention.attention", "attention.attention.query", "attention.output.dense")


def parts(family):
    return OLD_VIT if family == "vit" and transformers.__version__ < "5" else PARTS[family]


def square(family):
    """Settings that make F = H, where shapes do not tell the up projection from the down projection."""
    return {{"gpt2": "n_inner", "distilbert": "hidden_dim"}.get(family, "intermediate_size"): HIDDEN}


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_every_layer(family):
    model = tiny(family)
    sites = find_sites(model)
    modules = dict(model.named_modules())
    assert [site.layer for site in sites] == list(range(LAYERS))
    assert widths(sites) == {site.name: WIDTH for site in sites}
    for site in sites:
        down, ffn, attention, query, output = (name and f"{site.block_name}.{name}" for name in parts(family))
        assert site.name == down
        assert site.down is modules[down]
        assert site.block is modules[site.block_name]
        assert site.ffn is modules[ffn]
        assert site.attention is modules[attention]
        assert site.query is (query and modules[query])
        assert site.attention_output is modules[output]
        assert (site.width, site.hidden) == (WIDTH, HIDDEN)
        assert site.weight().shape == (HIDDEN, WIDTH)
        assert site.weight().data_ptr() == site.down.weight.data_ptr()
        assert site.bias() is site.down.bias


@pytest.mark.parametrize("family", FAMILIES)
def test_names_decide_where_shapes_do_not(family):
    names = [site.name for site in find_sites(tiny(family))]
    assert [site.name for site in find_sites(tiny(family, **square(family)))] == names


@pytest.mark.parametrize("family", FAMILIES)
def test_scaling_a_neuron_is_scaling_its_column(family):
    model, inputs = tiny(family, dtype=torch.float64), tiny_inputs(family)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    site, neuron, gate = find_sites(model)[1], 5, -0.75

    def scale(module, args):
        z = args[0].clone()
        z[..., neuron] *= gate
        return (z,)

    with torch.no_grad():
        before = model(**inputs).logits
        handle = site.down.register_forward_pre_hook(scale)
        scaled = model(**inputs).logits
        handle.remove()
        site.weight()[:, neuron] *= gate
        folded = model(**inputs).logits
    assert not torch.allclose(scaled, before)
    torch.testing.assert_close(folded, scaled, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_ffn_takes_hidden_states_first(family):
    model, seen = tiny(family), []
    site = find_sites(model)[1]
    handle = site.ffn.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    model(**tiny_inputs(family, rows=2, tokens=7))
    handle.remove()
    assert len(seen) == 1
    assert seen[0][0] == 2
    assert seen[0][2] == HIDDEN


def test_gated_neurons_are_counted_after_the_product():
    model, seen = tiny("llama"), []
    site = find_sites(model)[0]
    handles = [
        site.ffn.register_forward_pre_hook(lambda module, args: seen.append(args[0])),
        site.down.register_forward_pre_hook(lambda module, args: seen.append(args[0])),
    ]
    model(**tiny_inputs("llama"))
    for handle in handles:
        handle.remove()
    x, z = seen
    torch.testing.assert_close(z, nn.functional.silu(site.ffn.gate_proj(x)) * site.ffn.up_proj(x))


def test_conv1d_weight_is_transposed():
    site = find_sites(tiny("gpt2"))[0]
    assert isinstance(site.down, Conv1D)
    assert torch.equal(site.weight()[:, 3], site.down.weight[3])


@pytest.mark.parametrize("cut", ["bert", "transformer", "model"])
def test_bare_models(cut):
    family = {"bert": "bert", "transformer": "gpt2", "model": "llama"}[cut]
    whole = tiny(family)
    bare = find_sites(getattr(whole, cut))
    assert [f"{cut}.{site.name}" for site in bare] == [site.name for site in find_sites(whole)]


def test_other_heads():
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 50,
    }
    language = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    masked = transformers.BertForMaskedLM(transformers.BertConfig(**sizes))
    for model in (language, masked):
        assert list(widths(find_sites(model)).values()) == [WIDTH, WIDTH]


def test_encoder_decoder_counts_on():
    config = transformers.T5Config(
        vocab_size=50, d_model=HIDDEN, d_ff=WIDTH, num_layers=2, num_decoder_layers=2, d_kv=8, num_heads=4
    )
    sites = find_sites(transformers.T5ForConditionalGeneration(config))
    assert [site.layer for site in sites] == [0, 1, 2, 3]
    assert sites[3].name == "decoder.block.1.layer.2.DenseReluDense.wo"
    assert sites[3].attention is sites[3].block.layer[0].SelfAttention  # not the cross-attention


def test_plain_torch_encoder():
    layer = nn.TransformerEncoderLayer(HIDDEN, 4, WIDTH, batch_first=True)
    site = find_sites(nn.TransformerEncoder(layer, 2))[1]
    assert (site.name, site.width, site.query) == ("layers.1.linear2", WIDTH, None)
    assert site.ffn is site.block.linear1
    assert site.attention is site.block.self_attn


class OldBlock(nn.Module):
    """The layout of ViT in transformers 4."""

    def __init__(self):
        super().__init__()
        head = nn.ModuleDict({name: nn.Linear(HIDDEN, HIDDEN) for name in ("query", "key", "value")})
        out = nn.ModuleDict({"dense": nn.Linear(HIDDEN, HIDDEN)})
        self.attention = nn.ModuleDict({"attention": head, "output": out})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(HIDDEN, WIDTH)})
        self.output = nn.ModuleDict({"dense": nn.Linear(WIDTH, HIDDEN)})
        self.post_attention_norm = nn.LayerNorm(HIDDEN)


def test_vit_of_transformers_4():
    model = nn.Module()
    model.layer = nn.ModuleList(OldBlock() for _ in range(3))
    site = find_sites(model)[2]
    wanted = [site.block.get_submodule(name) for name in OLD_VIT]
    assert [site.down, site.ffn, site.attention, site.query, site.attention_output] == wanted


def test_by_hand():
    model = tiny("bert")
    found = find_sites(model)
    named = find_sites(model, [found[2].name, found[0].name])
    assert [(site.name, site.layer) for site in named] == [(found[0].name, 0), (found[2].name, 2)]
    assert named[0].ffn is found[0].ffn
    head = find_sites(model, ["classifier"])[0]
    assert (head.layer, head.width, head.block, head.attention) == (LAYERS, HIDDEN, model.classifier, None)


@given(st.permutations(range(LAYERS)), st.integers(1, LAYERS))
def test_named_sites_come_back_in_layer_order(order, count):
    model = tiny("distilbert")
    names = [site.name for site in find_sites(model)]
    picked = order[:count]
    assert [site.name for site in find_sites(model, [names[i] for i in picked])] == [names[i] for i in sorted(picked)]


@pytest.mark.parametrize(
    ("names", "error", "text"),
    [
        (["bert.encoder.layer.1.output.dens"], ValueError, "did you mean 'bert.encoder.layer.1.output.dense'"),
        (["bert.encoder.layer.1.output"], ValueError, "linear projection, got BertOutput.*layer.1.output.dense"),
        (["zzz"], ValueError, "the model has no module 'zzz'$"),
        (["classifier", "classifier"], ValueError, "named once"),
        ([], ValueError, "need at least 1"),
        ("classifier", TypeError, "sequence of module paths"),
        ([3], TypeError, "sequence of module paths"),
    ],
)
def test_refuses_names(names, error, text):
    with pytest.raises(error, match=f"names: .*{text}"):
        find_sites(tiny("bert"), names)


@pytest.mark.parametrize("model", [nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), nn.Conv2d(1, 1, 3)])
def test_no_sites(model):
    with pytest.raises(ValueError, match=r"model: found no feed-forward layers .*names="):
        find_sites(model)


def test_refuses_what_is_no_model():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got str"):
        find_sites("bert")


@given(st.text(min_size=1), st.integers(0, 10**6))
def test_neuron_ref(site, index):
    ref = NeuronRef(site, index)
    assert ref == NeuronRef(site, torch.tensor(index))
    assert hash(ref) == hash(NeuronRef(site, index))
    assert str(ref) == f"{site}[{index}]"


@pytest.mark.parametrize(
    ("site", "index", "error"),
    [("a", -1, ValueError), ("a", 1.0, TypeError), ("a", True, TypeError), ("a", "1", TypeError), (1, 1, TypeError)],
)
def test_neuron_ref_refuses(site, index, error):
    with pytest.raises(error, match=r"index|site"):
        NeuronRef(site, index)
