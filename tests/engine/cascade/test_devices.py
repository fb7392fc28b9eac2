"""Models whose layers lie on several devices: nothing is mixed, and the results are those of one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.pretended_devices import HOST, Mixed, pretended
from helpers.tiny_models import tiny, tiny_inputs, tokenizer_for
from spurge.engine.cascade.cascade import Cascade, Rows, predicted_logit
from spurge.engine.cascade.locator import Locator
from spurge.engine.data.examples import Examples
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.evaluation.prediction import predict
from spurge.engine.models.handle import Handle
from spurge.engine.models.hooks import frozen
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.probes import token_scores
from spurge.engine.models.sites import find_sites
from spurge.methods.macu.gated_model import gated_pass
from spurge.methods.macu.objectives import Job

accelerate = pytest.importorskip("accelerate")

NEAR, FAR = torch.device("cpu", 0), torch.device("cpu", 1)
MODELS: dict[str, dict[str, Any]] = {
    "bert": {},
    "gpt2": {},
    "llama": {"language": True},
    "glm4": {"language": True},
    "gpt_neox": {},
}


def both(rows: Rows) -> Tensor:
    """Two targets that read logits and attention."""
    assert rows.attention is not None
    spread = rows.attention.square().sum(1)
    return torch.stack([predicted_logit(rows) + spread, rows.logits.softmax(1)[:, 0]], 1)


def some(model: Any) -> NeuronSet:
    sites = find_sites(model)
    return NeuronSet({sites[i].name: torch.tensor([1, 7 + i]) for i in (0, 1, -1)})


def answers(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """All that is asked of a model, by name."""
    found: dict[str, Tensor] = {}
    settings: dict[str, dict[str, Any]] = {
        "layer": {},
        "joint": {"path": "joint"},
        "radau": {"rule": "radau"},
        "tolerance": {"tolerance": 0.2},
        "neuron": {"path": "neuron", "sites": find_sites(model)[1:2]},
    }
    if model.config.model_type == "glm4":
        del settings["tolerance"]  # its paths are steps
    for name, setting in settings.items():
        asked = Cascade(
            model,
            attention=True,
            memory="1 GiB",
            **({"path": "layer"} | setting),
        ).attribute(inputs, both)
        for part in ("values", "erased", "residual"):
            found |= {f"{name} {part} {site}": value for site, value in getattr(asked, part).items()}
    cascade, neurons = Cascade(model, attention=True, path="layer"), some(model)
    gates = torch.linspace(-1, 2, 3 * len(neurons)).view(3, -1)
    found["ablate"] = cascade.ablate(inputs, both, neurons)
    found["gated"] = cascade.gated(inputs, both, neurons, gates)
    found["kept"] = cascade.ablate(cascade.read(inputs), both, neurons)
    found["late"] = cascade.gated(
        inputs, both, NeuronSet({find_sites(model)[-1].name: torch.tensor([3])}), gates[:, :1]
    )
    for kind in ("attention", "attention_norm", "gradient_x_input", "ablation"):
        found[kind] = token_scores(model, inputs, kind=kind)  # type: ignore[arg-type]
    with frozen(model), NeuronEdit.build(model, neurons, 0.5).applied(model), torch.no_grad():
        found["edited"] = model(**inputs).logits
    return found


def slope(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Gradient of the targets by the gates of :func:`some`, ``[n]``."""
    count = len(inputs["input_ids"])
    labels = inputs["input_ids"].new_zeros(count)
    gates = torch.full((len(some(model)),), 0.7).to(labels.device).requires_grad_()
    job = Job(inputs, lambda rows: both(rows).sum(1), labels, labels.float() + 1)
    with frozen(model), gated_pass(Handle(model), some(model), attention=True) as run:
        (gradient,) = torch.autograd.grad(run.value(job, gates).sum(), gates)
    return gradient


def placement(model: Any, head: torch.device) -> dict[str, torch.device]:
    """The first layer with the inputs, the others elsewhere, what comes behind them (norm, head) on ``head``."""
    blocks = [site.block_name for site in find_sites(model)]
    placed = {"": NEAR, blocks[0]: NEAR} | dict.fromkeys(blocks[1:], FAR)
    for name, module in model.named_modules():
        outside = not any(f"{name}.".startswith(f"{block}.") for block in blocks)
        if outside and not any(module.children()):
            placed[name] = NEAR if "emb" in name or name.endswith(("wte", "wpe")) else head
    return placed


@pytest.mark.parametrize(
    ("family", "head"), [("bert", NEAR), ("gpt2", FAR), ("llama", FAR), ("glm4", NEAR), ("gpt_neox", FAR)]
)
def test_layers_on_two_devices(family: str, head: torch.device) -> None:
    model, inputs = tiny(family, **MODELS[family]), tiny_inputs(family)
    classes = not MODELS[family]
    wanted = answers(model, inputs) | ({"slope": slope(model, inputs)} if classes else {})
    with pretended(model, placement(model, head)):
        inputs = {name: value.to(NEAR) for name, value in inputs.items()}
        got = answers(model, inputs) | ({"slope": slope(model, inputs)} if classes else {})
        got = {name: value.to(HOST) for name, value in got.items()}
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.allclose(got[name], value, rtol=1e-5, atol=1e-6), name


def test_pretended_devices_do_not_mix() -> None:
    model = tiny("bert")
    with pretended(model, placement(model, NEAR)):
        near, far = torch.ones(2).to(NEAR), torch.ones(2, device=FAR)
        assert (near.device, far.device, (far * 2).device) == (NEAR, FAR, FAR)
        with pytest.raises(Mixed):
            near + far
        with pytest.raises(Mixed):
            far[torch.tensor([0]).to(NEAR)]
        assert torch.equal((near.to(far.device) + far).to(HOST), torch.full((2,), 2.0))
    assert near.device == HOST


def test_accelerates_hooks_change_nothing() -> None:
    model, hooked, inputs = tiny("bert"), tiny("bert"), tiny_inputs("bert")
    accelerate.dispatch_model(hooked, {"": "cpu"}, force_hooks=True)
    assert hasattr(find_sites(hooked)[0].down, "_hf_hook")
    wanted = answers(model, inputs)
    for name, value in answers(hooked, inputs).items():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_offloaded_weights_are_named(family: str) -> None:
    model, inputs = tiny(family), tiny_inputs(family)
    site = find_sites(model)[0].name
    wanted = {kind: token_scores(model, inputs, kind=kind) for kind in ("attention", "gradient_x_input")}  # type: ignore[arg-type]
    replaced = token_scores(model, inputs, kind="ablation", replace=7)
    texts = Examples.load([("a good film", "1"), ("bad", "0")])
    logits = predict(model, tokenizer_for(family), texts)
    accelerate.cpu_offload(model, torch.device("cpu"))
    message = f"model: the weights of {site!r} are not in memory \\(offloaded or not loaded\\)"
    with pytest.raises(ValueError, match=message):
        Cascade(model, path="layer")
    with pytest.raises(ValueError, match=message):
        Locator(model, path="layer")
    with pytest.raises(ValueError, match=r"model: the weights of the attention of .* are not in memory"):
        token_scores(model, inputs, kind="attention_norm")
    for kind, scores in wanted.items():  # what only runs the model goes on working
        assert torch.equal(token_scores(model, inputs, kind=kind), scores)  # type: ignore[arg-type]
    assert torch.equal(token_scores(model, inputs, kind="ablation", replace=7), replaced)
    assert torch.equal(
        predict(model, tokenizer_for(family), Examples.load([("a good film", "1"), ("bad", "0")])), logits
    )


def test_the_fullest_device_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("bert")
    monkeypatch.setattr("spurge.engine.base.budgets.free_bytes", lambda device: {NEAR: 4000, FAR: 1000}[device])
    with pretended(model, placement(model, NEAR)):
        assert Handle(model).budget(None) == 500
        assert Handle(model).budget("3 kB") == 3000
