"""Edits of every kind fit the model whatever is around it, and do beside LoRA what they do to the merged model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.tiny_models import tiny, tiny_inputs, tiny_tokenizer
from spurge.engine.data.examples import Example, Examples
from spurge.engine.edits.neuron_edits import EditMismatch, NeuronEdit
from spurge.engine.edits.weight_deltas import Dense, LowRank, Slices, WeightDeltas
from spurge.engine.edits.weight_edits import WeightEdit, load_edit
from spurge.engine.evaluation.evaluation import evaluate
from spurge.engine.models.handle import Handle
from spurge.engine.models.heads import Head
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.parameters import bare_name, find_places, named_as, unwrapped
from spurge.engine.models.sites import find_sites

peft = pytest.importorskip("peft")

Edit = NeuronEdit | WeightEdit | WeightDeltas
LORA = {"bert": ["query", "intermediate.dense", "output.dense"], "gpt2": ["c_attn", "c_fc", "c_proj"]}
LORA["llama"] = ["q_proj", "o_proj", "up_proj", "down_proj"]


class Wrapper(nn.Module):
    """As people put a model into a class of their own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, **inputs: Any) -> Any:
        return self.net(**inputs)


def adapted(model: nn.Module, family: str = "bert", **own: Any) -> Any:
    config = {"r": 4, "lora_alpha": 8, "target_modules": LORA[family], "task_type": "SEQ_CLS"} | own
    model = peft.get_peft_model(model, peft.LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.2, generator=generator)
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "net": Wrapper,
    "module": lambda model: nn.DataParallel(Wrapper(model)),
    "_orig_mod": lambda model: torch.compile(model, backend="eager"),  # type: ignore[dict-item, return-value]
    "base_model.model": lambda model: peft.get_peft_model(model, peft.LoraConfig(target_modules=["key"])).eval(),
    "base_model.model and modules_to_save": lambda model: adapted(model, target_modules=["key"], lora_alpha=0),
}


def edits(model: nn.Module) -> dict[str, Edit]:
    """One of each kind, on the layers of which LoRA may be, and on the head."""
    sites, head = find_sites(model, units="both"), Head.of(model)
    chosen = NeuronSet({site.name: [0, 2] for site in sites})
    gates = torch.rand(len(chosen), generator=torch.Generator().manual_seed(2)) * 3 - 1
    name, other = (f"{site.name}.weight" for site in find_sites(model)[:2])
    weight = find_sites(model)[0].parameter
    some = torch.tensor([1, 40, 77])
    return {
        "gates": NeuronEdit.build(model, chosen, gates, units="both"),
        "head": WeightEdit.for_head(head, -head.weight, head.bias),
        "weights": WeightEdit.build(model, {name: (some, torch.tensor([3.0, -3.0, 0.0]))}),
        "deltas": WeightDeltas.build(
            model,
            {
                name: LowRank(torch.full((len(weight), 1), 0.3), torch.full((1, weight.shape[1]), 0.5)),
                other: Slices(1, torch.tensor([3, 5]), torch.full((len(weight), 2), 0.7)),
                f"{head.name}.weight": Dense(torch.ones_like(head.weight)),
            },
        ),
    }


KINDS = ("gates", "head", "weights", "deltas")


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_of_the_model_fits_the_wrapped_one_and_the_other_way_round(
    wrapper: str, kind: str, tmp_path: Path
) -> None:
    plain, inputs = tiny("bert"), tiny_inputs("bert")
    wrapped = WRAPPERS[wrapper](tiny("bert"))
    edits(plain)[kind].save(tmp_path / "edit.safetensors")
    edit, before = load_edit(tmp_path / "edit.safetensors"), bits(wrapped)
    with edit.applied(plain):
        want = logits(plain, inputs)
    edit.check(wrapped)
    with edit.applied(wrapped):
        got = logits(wrapped, inputs)
    assert (got - want).abs().max() < 1e-5 < (want - logits(plain, inputs)).abs().max()
    assert_same(wrapped, before)
    done = edit.fold(wrapped)
    assert (logits(wrapped, inputs) - want).abs().max() < 1e-5
    done.undo()
    assert_same(wrapped, before)
    if not wrapper.startswith("base"):
        back = edits(wrapped)[kind]
        back.check(plain)
        with back.applied(plain):
            assert (logits(plain, inputs) - want).abs().max() < 1e-5
        written = back.export(tmp_path / "adapter", wrapped)
        assert not [name for name in (*written.ranks, *written.whole) if bare_name(name) != name]
        loaded = peft.PeftModel.from_pretrained(tiny("bert"), tmp_path / "adapter").eval()
        assert (logits(loaded, inputs) - want).abs().max() < 1e-5


@pytest.mark.parametrize("family", LORA)
@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_of_the_merged_model_does_the_same_beside_lora(family: str, kind: str) -> None:
    model, inputs = adapted(tiny(family, labels=3), family), tiny_inputs(family)
    plain = copy.deepcopy(model).merge_and_unload().eval()
    edit, before = edits(plain)[kind], bits(model)
    with edit.applied(plain):
        want = logits(plain, inputs)
    assert (want - logits(plain, inputs)).abs().max() > 1e-2
    with edit.applied(model):
        got = logits(model, inputs)
    assert (got - want).abs().max() < 2e-5
    assert_same(model, before)


@pytest.mark.parametrize("kind", ["gates", "head", "deltas"])
def test_an_edit_made_beside_lora_does_the_same_to_the_merged_model(kind: str) -> None:
    """Its fingerprints are of the parts, so that the merged model takes it by force alone."""
    model, inputs = adapted(tiny("bert", labels=3)), tiny_inputs("bert")
    plain = copy.deepcopy(model).merge_and_unload().eval()
    head = Head.of(model)
    if kind == "gates":
        chosen = NeuronSet({site.name: [0, 2] for site in find_sites(model)})
        edit: Edit = NeuronEdit.build(model, chosen, 3.0)
    elif kind == "head":
        edit = WeightEdit.for_head(head, -head.weight)
    else:
        name = f"{find_sites(model)[0].name}.base_layer.weight"
        edit = WeightDeltas.build(model, {name: Dense(torch.linspace(0, 1, 32 * 48).view(32, 48))})
    if kind != "head":
        with pytest.raises(EditMismatch):
            edit.check(plain)
    with edit.applied(model), edit.applied(plain, force=True):
        got, want = logits(model, inputs), logits(plain, inputs)
    assert (got - want).abs().max() < 2e-5 < (want - logits(plain, inputs)).abs().max()


def test_an_edit_of_the_base_stays_one_of_the_base_beside_lora() -> None:
    base, inputs = tiny("bert"), tiny_inputs("bert")
    edit = edits(base)["weights"]
    folded = copy.deepcopy(base)
    edit.fold(folded)
    model = adapted(base)
    want = logits(adapted(folded).merge_and_unload(), inputs)
    with edit.applied(model):
        assert (logits(model, inputs) - want).abs().max() < 2e-5


def test_what_another_adapter_makes_of_a_weight_is_refused() -> None:
    base = tiny("bert")
    edit = edits(tiny("bert", seed=1))["weights"]
    with pytest.raises(ValueError, match=r"is adapted in another way than by adding to it .LoRA.; merge the adapter"):
        edit.apply(adapted(base, use_dora=True), force=True)


def test_an_adapter_that_is_switched_off_is_not_there() -> None:
    model, inputs = adapted(tiny("bert", labels=3)), tiny_inputs("bert")
    plain = tiny("bert", labels=3)
    edit = edits(plain)["weights"]
    with model.disable_adapter(), edit.applied(model), edit.applied(plain):
        assert torch.equal(logits(model, inputs), logits(plain, inputs))
    head = edits(plain)["head"]
    with model.disable_adapter(), head.applied(model), head.applied(plain):
        assert torch.equal(logits(model, inputs), logits(plain, inputs))


def test_what_was_located_in_the_model_is_evaluated_in_the_wrapped_one() -> None:
    plain = tiny("bert")
    located = SimpleNamespace(
        spurious_set=NeuronSet({find_sites(plain)[1].name: [4, 9]}),
        info={"model": Handle(plain, tiny_tokenizer()).fingerprints("both"), "settings": {"units": "both"}},
    )
    wrapped = peft.get_peft_model(tiny("bert"), peft.LoraConfig(target_modules=["key"])).eval()
    rows = Examples([Example("the film was good", 0), Example("a bad plot today", 1)] * 3, labels=("a", "b"))
    edit = edits(plain)["gates"]
    reports = [
        evaluate(model, tiny_tokenizer(), rows, edit=edit, located=located, draws=2, bootstrap=0, progress=False)
        for model in (plain, wrapped)
    ]
    assert str(reports[0]) == str(reports[1])


@pytest.mark.parametrize(
    ("path", "bare"),
    [
        ("classifier.weight", "classifier.weight"),
        ("module.net._orig_mod.bert.encoder", "bert.encoder"),
        ("base_model.model.layers.0.mlp.base_layer.weight", "layers.0.mlp.weight"),
        ("base_model.model.net.0.weight", "0.weight"),
        ("base_model.layers.0", "base_model.layers.0"),
        ("bert.module.net.weight", "bert.module.net.weight"),
        ("classifier.modules_to_save.default.out_proj.bias", "classifier.out_proj.bias"),
        ("classifier.original_module.bias", "classifier.original_module.bias"),
    ],
)
def test_bare_names(path: str, bare: str) -> None:
    assert bare_name(path) == bare


@settings(max_examples=50, deadline=None)
@given(
    wrappers=st.lists(st.sampled_from(["net", "module", "_orig_mod", "base_model.model"]), max_size=5),
    name=st.lists(st.sampled_from(["bert", "layer", "0", "output", "weight", "score"]), min_size=1).map(".".join),
)
def test_wrappers_of_any_depth_are_taken_off_once(wrappers: list[str], name: str) -> None:
    wrapped = ".".join([*wrappers, name])
    assert bare_name(wrapped) == name == bare_name(bare_name(wrapped))
    assert named_as(name, ["other.weight", wrapped]) == wrapped
    assert named_as(wrapped, ["other.weight", name]) == name
    assert named_as(f"{name}.bias", ["other.weight", wrapped]) == f"{name}.bias"


def test_an_own_network_called_net_is_no_wrapper() -> None:
    own = Wrapper(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    assert unwrapped(own) is own
    assert unwrapped(nn.DataParallel(own)) is own
    inner = tiny("bert")
    assert unwrapped(torch.compile(nn.DataParallel(Wrapper(inner)), backend="eager")) is inner  # type: ignore[arg-type]
    places = find_places(own, ["0.weight", "net.1.bias"])
    assert [place.name for place in places.values()] == ["net.0.weight", "net.1.bias"]
    with pytest.raises(ValueError, match=r"has no parameter '2\.weight'"):
        find_places(own, ["2.weight"])
