"""Exported edits, loaded by plain `peft`, compute what the folded model does; what cannot is refused, and why."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from helpers.tiny_mixtures import batch, mixture
from helpers.tiny_models import FAMILIES, tiny, tiny_inputs, tiny_language
from spurge.engine.edits import adapters
from spurge.engine.edits.neuron_edits import EditMismatch, NeuronEdit
from spurge.engine.edits.weight_deltas import Delta, Dense, LowRank, Slices, WeightDeltas
from spurge.engine.edits.weight_edits import WeightEdit
from spurge.engine.models.heads import Head
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.sites import find_sites
from spurge.engine.models.verbalizers import Verbalized

peft = pytest.importorskip("peft")

Edit = NeuronEdit | WeightEdit | WeightDeltas
EXACT = 1e-5  # of logits, float32
SOME = ("bert", "gpt2", "llama", "qwen2")


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def loaded(model: nn.Module, folder: Path) -> Any:
    """A copy of the model with the adapter, by peft alone, which finds nothing to say about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


def folded(model: nn.Module, edit: Edit) -> nn.Module:
    model = copy.deepcopy(model)
    edit.fold(model)
    return model


def assert_exact(model: Any, edit: Edit, folder: Path, inputs: dict[str, Tensor]) -> None:
    """Beside the model and merged into it; and that it does something."""
    want, plain = logits(folded(model, edit), inputs), logits(model, inputs)
    assert (want - plain).abs().max() > 100 * EXACT
    adapted = loaded(model, folder)
    assert (logits(adapted, inputs) - want).abs().max() < EXACT
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, inputs), plain)
    assert (logits(adapted.merge_and_unload(), inputs) - want).abs().max() < EXACT


def gates_of(model: nn.Module, kind: str) -> NeuronEdit:
    """Gates on both sides of 0 and 1: of a few neurons, another count in each layer; of all; or of heads as well."""
    sites = find_sites(model, units="both" if kind == "heads" else "neurons")
    if kind == "whole":
        chosen = NeuronSet.all({site.name: site.width for site in sites})
    else:
        chosen = NeuronSet({site.name: range(layer % 3 + 1) for layer, site in enumerate(sites)})
    values = torch.rand(len(chosen), generator=torch.Generator().manual_seed(5)) * 3 - 1
    return NeuronEdit.build(model, chosen, values, {"method": "test"}, units="both" if kind == "heads" else None)


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["sparse", "whole", "heads"])
@pytest.mark.parametrize("format_", ["lora", "ia3"])
def test_gates(family: str, kind: str, format_: Any, tmp_path: Path) -> None:
    model = tiny(family)
    edit = gates_of(model, kind)
    written = edit.export(tmp_path / "adapter", model, format_)
    assert_exact(model, edit, tmp_path / "adapter", tiny_inputs(family))
    names = [site.name for site in find_sites(model, list(edit.gates))]
    assert sorted(config(tmp_path / "adapter")["target_modules"]) == sorted(names)
    assert (written.format, written.errors, written.whole) == (format_, {}, ())
    if format_ == "ia3":
        assert written.ranks == {}
        assert sorted(written.gates) == sorted(names)
    elif kind == "sparse":
        assert [written.ranks[name] for name in names] == [1, 2, 3]
        assert config(tmp_path / "adapter")["rank_pattern"] == dict(zip(names[:2], (1, 2), strict=True))


def test_whole_layers_need_no_more_than_the_models_width(tmp_path: Path) -> None:
    model = tiny("bert")
    site = find_sites(model)[0]
    written = gates_of(model, "whole").export(tmp_path / "adapter", model)
    assert set(written.ranks.values()) == {site.hidden}
    assert str(written) == f"lora, 3 modules of rank {site.hidden}: {tmp_path / 'adapter'}"


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("format_", ["lora", "ia3"])
def test_gates_of_a_language_model_and_its_continuation(name: str, format_: Any, tmp_path: Path) -> None:
    model = tiny_language(name)
    edit = gates_of(model, "sparse")
    edit.export(tmp_path / "adapter", Verbalized(model, {"no": [7], "yes": [8]}), format_)
    inputs = tiny_inputs("llama", pad=False)
    assert_exact(model, edit, tmp_path / "adapter", inputs)
    assert config(tmp_path / "adapter")["task_type"] == "CAUSAL_LM"
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    want = folded(model, edit).generate(**inputs, **settings)  # type: ignore[operator]
    assert torch.equal(loaded(model, tmp_path / "adapter").generate(**inputs, **settings), want)


@settings(max_examples=12, deadline=None)
@given(
    family=st.sampled_from(["bert", "gpt2", "llama"]),
    format_=st.sampled_from(["lora", "ia3"]),
    gates=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 31), st.floats(-2, 3, width=32)), min_size=1, max_size=9
    ),
)
def test_any_gates(family: str, format_: Any, gates: list[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    model = tiny(family)
    sites = find_sites(model)
    values = {(sites[layer].name, index): gate for layer, index, gate in gates}
    chosen = NeuronSet({site.name: [index for name, index in values if name == site.name] for site in sites})
    edit = NeuronEdit.build(model, chosen, [values[ref.site, ref.index] for ref in chosen])
    folder = tmp_path_factory.mktemp("any") / "adapter"
    edit.export(folder, model, format_)
    want, got = (logits(m, tiny_inputs(family)) for m in (folded(model, edit), loaded(model, folder)))
    assert (got - want).abs().max() < EXACT


# ---- weights ---------------------------------------------------------------------------------------------------------


def redrawn(parameter: Tensor, seed: int) -> Tensor:
    return torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format_", ["lora", "head"])
def test_a_head_alone(family: str, format_: Any, tmp_path: Path) -> None:
    """As NeuronTune retrains it, bias and all; DistilBERT has a `pre_classifier` beside its `classifier`."""
    model = tiny(family, labels=3)
    head = Head.of(model)
    bias = None if head.bias is None else redrawn(head.bias, 2)
    edit = WeightEdit.for_head(head, redrawn(head.weight, 1), bias)
    written = edit.export(tmp_path / "adapter", model, format_)
    assert_exact(model, edit, tmp_path / "adapter", tiny_inputs(family))
    assert (written.whole, written.ranks) == ((head.name,), {})
    assert config(tmp_path / "adapter")["modules_to_save"] == [head.name]


def test_a_single_weight_of_a_head(tmp_path: Path) -> None:
    """As FCR cuts it."""
    model = tiny("bert", labels=3)
    edit = WeightEdit.build(model, {"classifier.weight": (torch.tensor([40]), torch.tensor([4.0]))})
    edit.export(tmp_path / "adapter", model, "head")
    assert_exact(model, edit, tmp_path / "adapter", tiny_inputs("bert"))
    assert set(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) >= {
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }


UPS = {
    "bert": ["intermediate.dense"],
    "gpt2": ["mlp.c_fc"],
    "llama": ["mlp.gate_proj", "mlp.up_proj"],
    "qwen2": ["mlp.gate_proj", "mlp.up_proj"],
}


def repaired_neurons(model: nn.Module, family: str) -> dict[str, Tensor]:
    """Neurons 3 and 5 of every layer: their rows of the up projections, with biases, and their columns of the down."""
    own, new = dict(model.named_parameters()), {}
    for site in find_sites(model):
        ups = [f"{site.block_name}.{up}" for up in UPS[family]]
        for path in (*ups, site.name):
            weight = own[f"{path}.weight"].detach().clone()
            by_inputs = weight if family == "gpt2" else weight.t()  # [I, O], a view
            part = by_inputs[[3, 5]] if path == site.name else by_inputs[:, [3, 5]]
            changed = part + redrawn(part, len(path))
            if path == site.name:
                by_inputs[[3, 5]] = changed
            else:
                by_inputs[:, [3, 5]] = changed
            new[f"{path}.weight"] = weight
            if f"{path}.bias" in own and path != site.name:
                bias = own[f"{path}.bias"].detach().clone()
                bias[[3, 5]] += 0.5
                new[f"{path}.bias"] = bias
    return new


def dense(model: nn.Module, family: str, rank: int = 3) -> dict[str, Tensor]:
    """A change of low rank of every linear layer of the blocks, biases and norms as they are."""
    blocks = find_sites(model)[0].block_name.rpartition(".")[0]
    new = {}
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        if name.startswith(f"{blocks}.") and parameter.dim() == 2:
            left = redrawn(parameter[:, :rank], 2 * seed)
            new[name] = parameter.detach() + left @ redrawn(parameter[:rank], 2 * seed + 1)
    return new


def everything(model: nn.Module, family: str) -> dict[str, Tensor]:
    """A dense change of all weights but embeddings, with biases, norms and the head."""
    return {
        name: parameter.detach() + 0.2 * redrawn(parameter, seed)
        for seed, (name, parameter) in enumerate(model.named_parameters())
        if not any(word in name for word in ("embed", "wte", "wpe"))
    }


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("kind", [repaired_neurons, dense, everything])
def test_changed_weights(family: str, kind: Callable[[nn.Module, str], dict[str, Tensor]], tmp_path: Path) -> None:
    model = tiny(family)
    edit = WeightEdit.build(model, kind(model, family))
    written = edit.export(tmp_path / "adapter", model)
    assert_exact(model, edit, tmp_path / "adapter", tiny_inputs(family))
    assert written.errors == {}
    if kind is not everything:
        assert set(written.ranks.values()) == {2 if kind is repaired_neurons else 3}
        assert written.whole == ()
    with pytest.raises(ValueError, match=r"^format: the edit changes '.*' beside the head; expected 'lora'"):
        edit.export(tmp_path / "other", model, "head")


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("kind", ["neurons", "lora", "all"])
def test_repairs(family: str, kind: str, tmp_path: Path) -> None:
    """Deltas of rows and columns of neurons, of low rank, and of all weights; the head goes with them."""
    model = tiny(family)
    own = dict(model.named_parameters())
    head = f"{Head.of(model).name}.weight"
    deltas: dict[str, Delta] = {head: Dense(redrawn(own[head], 9))}
    if kind == "all":
        deltas |= {name: Dense(new - own[name].detach()) for name, new in everything(model, family).items()}
    for seed, (name, new) in enumerate(dense(model, family).items() if kind == "lora" else ()):
        deltas[name] = LowRank(redrawn(new[:, :5], seed), redrawn(new[:5], seed + 99))
    for name, new in repaired_neurons(model, family).items() if kind == "neurons" else ():
        delta, both = new - own[name].detach(), torch.tensor([3, 5])
        dim = int(delta.dim() == 2 and not delta[:, 0].any())
        deltas[name] = Slices(dim, both, delta.index_select(dim, both))
    edit = WeightDeltas.build(model, deltas)
    written = edit.export(tmp_path / "adapter", model)
    assert_exact(model, edit, tmp_path / "adapter", tiny_inputs(family))
    if kind != "all":
        assert set(written.ranks.values()) == {5 if kind == "lora" else 2}
        assert written.whole == (head.removesuffix(".weight"),)
    if kind == "lora":
        with pytest.raises(ValueError, match=r"^max_rank: .* needs rank 5 to be exact, 4 is allowed, .* truncate=True"):
            edit.export(tmp_path / "other", model, max_rank=4)


def test_weights_where_some_layers_have_biases_and_some_have_none(tmp_path: Path) -> None:
    """peft has biases for all layers of an adapter or for none; Qwen2's attention has them, its MLP not."""
    model = tiny("qwen2")
    own = dict(model.named_parameters())
    names = ("model.layers.0.self_attn.q_proj.bias", "model.layers.1.mlp.up_proj.weight")
    edit = WeightEdit.build(model, {name: own[name].detach() + redrawn(own[name], 3) for name in names})
    written = edit.export(tmp_path / "adapter", model)
    assert_exact(model, edit, tmp_path / "adapter", tiny_inputs("qwen2"))
    assert written.whole == ("model.layers.0.self_attn.q_proj",)
    alone = WeightEdit.build(model, {names[0]: own[names[0]].detach() + 1})
    assert alone.export(tmp_path / "alone", model).ranks == {"model.layers.0.self_attn.q_proj": 1}
    assert_exact(model, alone, tmp_path / "alone", tiny_inputs("qwen2"))


def test_a_rank_above_the_limit_is_refused_or_truncated_with_its_error(tmp_path: Path) -> None:
    model = tiny("bert")
    edit = gates_of(model, "whole")
    with pytest.raises(ValueError, match=r"^max_rank: the change of 'bert.*' needs rank 32 to be exact, 20 is allowed"):
        edit.export(tmp_path / "adapter", model, max_rank=20)
    assert list(tmp_path.iterdir()) == []
    written = edit.export(tmp_path / "adapter", model, max_rank=20, truncate=True)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for site in find_sites(model):
        change = folded(model, edit).get_submodule(site.name).weight.detach() - site.weight().detach()  # type: ignore[operator]
        got = (
            tensors[f"base_model.model.{site.name}.lora_B.weight"]
            @ tensors[f"base_model.model.{site.name}.lora_A.weight"]
        )
        assert written.errors[site.name] == pytest.approx(float((change - got).norm() / change.norm()), rel=1e-3)
        assert written.ranks[site.name] == 20
    assert "3 modules truncated, relative error up to 0." in str(written)
    off = logits(loaded(model, tmp_path / "adapter"), tiny_inputs("bert")) - logits(
        folded(model, edit), tiny_inputs("bert")
    )
    assert EXACT < off.abs().max() < 2


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_experts_are_refused(family: str, tmp_path: Path) -> None:
    model = mixture(family)
    sites = find_sites(model)
    edit = NeuronEdit.build(model, NeuronSet({site.name: [1] for site in sites}), 0.0)
    for format_ in ("lora", "ia3"):
        with pytest.raises(ValueError, match=r"^model: '.*experts' is a .*Experts, and adapters are for linear layers"):
            edit.export(tmp_path / "adapter", model, format_)  # type: ignore[arg-type]
    weights = WeightEdit.build(model, {f"{sites[0].name}.down_proj": (torch.tensor([0]), torch.tensor([1.0]))})
    with pytest.raises(
        ValueError, match=r"^model: '.*experts' is a .*Experts, of which peft cannot hold 'gate_up_proj"
    ):
        weights.export(tmp_path / "adapter", model)
    assert list(tmp_path.iterdir()) == []


def test_a_shared_expert_is_a_layer(tmp_path: Path) -> None:
    model = mixture("qwen2_moe")
    shared = next(site for site in find_sites(model) if "shared_expert" in site.name)
    edit = NeuronEdit.build(model, NeuronSet({shared.name: [0, 1, 2]}), 4.0)
    edit.export(tmp_path / "adapter", model)
    assert_exact(model, edit, tmp_path / "adapter", batch())


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = tiny("bert")
    gates, folder = gates_of(model, "sparse"), tmp_path / "adapter"
    weights = WeightEdit.build(model, {"classifier.weight": (torch.tensor([0]), torch.tensor([9.0]))})
    with pytest.raises(ValueError, match=r"^format: gates change no head; expected 'lora' or 'ia3'"):
        gates.export(folder, model, "head")
    with pytest.raises(ValueError, match=r"^format: changes of single weights multiply no input; expected"):
        weights.export(folder, model, "ia3")
    with pytest.raises(ValueError, match=r"^format: expected one of"):
        gates.export(folder, model, "dora")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^max_rank: "):
        gates.export(folder, model, max_rank=0)
    with pytest.raises(EditMismatch):
        gates.export(folder, tiny("bert", seed=1))
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"^model: has adapters of its own.*merge them first"):
        gates.export(folder, adapted, force=True)
    language = tiny_language("llama")
    name = "lm_head.weight"
    with pytest.raises(ValueError, match=r"^format: there is no classifier's head; expected 'lora'"):
        WeightEdit.build(language, {name: (torch.tensor([0]), torch.tensor([9.0]))}).export(folder, language, "head")
    folder.mkdir()
    for edit in (gates, weights):
        with pytest.raises(ValueError, match=r"^folder: '.*' exists already; give a new folder"):
            edit.export(folder, model)
    assert list(tmp_path.rglob("*")) == [folder]


def test_layers_with_a_fast_path_are_refused(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    edit = NeuronEdit.build(model, NeuronSet({find_sites(model)[0].name: [1]}), 0.0)
    with pytest.raises(ValueError, match=r"^model: 'layers.0.linear2' lies in a torch.nn.TransformerEncoderLayer"):
        edit.export(tmp_path / "adapter", model)


def test_modules_whose_names_end_alike(tmp_path: Path) -> None:
    """peft finds modules that it holds whole by the ends of their names."""

    class Net(nn.Module):
        def __init__(self, first: nn.Module) -> None:
            super().__init__()
            self.my_fc, self.middle, self.fc = first, nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.middle(self.my_fc(x).relu()))

    torch.manual_seed(0)
    model, x = Net(nn.Linear(4, 6)), torch.randn(5, 4)
    one = (torch.tensor([0]), torch.tensor([5.0]))
    edit = WeightEdit.build(model, {"my_fc.weight": one, "fc.weight": one, "middle.bias": one})
    written = edit.export(tmp_path / "adapter", model)
    assert (sorted(written.whole), written.ranks) == (["fc", "my_fc"], {"middle": 1})
    with torch.no_grad():
        assert (loaded(model, tmp_path / "adapter")(x) - folded(model, edit)(x)).abs().max() < EXACT
    model = Net(nn.Sequential(nn.Linear(4, 6)))
    with pytest.raises(ValueError, match=r"^model: peft cannot hold 'fc' beside an adapter, for it would take 'my_fc'"):
        WeightEdit.build(model, {"fc.weight": one}).export(tmp_path / "other", model)
    model = nn.Sequential(nn.Linear(4, 6))
    with pytest.raises(ValueError, match=r"^model: peft needs a linear or convolutional layer beside those held whole"):
        WeightEdit.build(model, {"0.weight": one}).export(tmp_path / "other", model)
    model = nn.Linear(4, 6)
    with pytest.raises(ValueError, match=r"^model: is one layer, beside which peft holds no adapter"):
        WeightEdit.build(model, {"weight": one}).export(tmp_path / "other", model)


def test_the_head_of_a_network_of_convolutions(tmp_path: Path) -> None:
    """peft needs a layer for an adapter that does nothing, and there is no linear one but the head."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(1, 4, 3))
    model.add_module("pool", nn.Flatten())
    model.add_module("head", nn.Linear(16, 3))
    images = torch.randn(5, 1, 4, 4)
    edit = WeightEdit.for_head(Head.of(model), redrawn(model.head.weight, 1), redrawn(model.head.bias, 2))  # type: ignore
    edit.export(tmp_path / "adapter", model, "head")
    with torch.no_grad():
        assert torch.equal(loaded(model, tmp_path / "adapter")(images), folded(model, edit)(images))


# ---- the folder ------------------------------------------------------------------------------------------------------


def test_it_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("bert")
    edit = gates_of(model, "sparse")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapters, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        edit.export(tmp_path / "adapter", model)
    assert list(tmp_path.iterdir()) == []


def test_equal_edits_are_equal_bytes_and_peft_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gates_of(model, "sparse").export(tmp_path / "a" / "adapter", model)
    monkeypatch.setitem(sys.modules, "peft", None)
    gates_of(model, "sparse").export(tmp_path / "b" / "adapter", model)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / "adapter" / name).read_bytes() == (tmp_path / "b" / "adapter" / name).read_bytes()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_adapter_alone_finds_its_model(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "model")
    model = type(tiny("bert")).from_pretrained(tmp_path / "model").eval()
    edit = gates_of(model, "sparse")
    edit.export(tmp_path / "adapter", model)
    found = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    want = logits(folded(model, edit), tiny_inputs("bert"))
    assert (logits(found, tiny_inputs("bert")) - want).abs().max() < EXACT


def test_half_precision(tmp_path: Path) -> None:
    """The change is held in float32; the folded weights are rounded, those beside an adapter are not."""
    model = tiny("bert", dtype=torch.bfloat16)
    edit = gates_of(model, "sparse")
    edit.export(tmp_path / "adapter", model)
    wide = tiny("bert", dtype=torch.bfloat16).float()
    site = find_sites(wide)[0]
    by_gates = NeuronEdit.build(wide, edit.neurons, edit.vector())
    assert site.name in by_gates.gates
    want = logits(folded(wide, by_gates), tiny_inputs("bert"))
    assert (logits(loaded(wide, tmp_path / "adapter"), tiny_inputs("bert")) - want).abs().max() < EXACT
