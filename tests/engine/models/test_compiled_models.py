"""Models under ``torch.compile``, as a whole or in parts, and in wrappers: one name for each place, and hooks act."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.tiny_models import tiny, tiny_inputs, tiny_tokenizer
from helpers.tolerance import assert_near
from spurge.engine.cascade.cascade import Cascade, predicted_logit
from spurge.engine.data.examples import Examples
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.edits.weight_edits import WeightEdit
from spurge.engine.evaluation.evaluation import evaluate
from spurge.engine.models.heads import Head
from spurge.engine.models.hooks import hook
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.probes import token_scores
from spurge.engine.models.sites import find_sites
from spurge.engine.passes.partial_forward import PartialForward


def whole(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def regions(model: Any) -> Any:
    layers = model.bert.encoder.layer
    for number, layer in enumerate(layers):
        layers[number] = torch.compile(layer, backend="eager")
    return model


def projections(model: Any) -> Any:
    for layer in model.bert.encoder.layer:
        layer.output.dense = torch.compile(layer.output.dense, backend="eager")
        layer.attention.self.query = torch.compile(layer.attention.self.query, backend="eager")
    model.classifier = torch.compile(model.classifier, backend="eager")
    return model


def in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


WAYS: list[Callable[[Any], Any]] = [whole, regions, projections, in_place]


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def compiled(request: pytest.FixtureRequest) -> Any:
    torch._dynamo.reset()
    model = request.param(tiny("bert", labels=3, layers=2))
    with torch.no_grad():
        model(**tiny_inputs("bert"))  # compiled before any hook is there
    return model


def test_places_have_one_name(compiled: Any) -> None:
    plain = tiny("bert", labels=3, layers=2)
    names = [site.name for site in find_sites(plain)]
    sites = find_sites(compiled)
    assert [site.name for site in sites] == names
    assert [site.block_name for site in sites] == [site.block_name for site in find_sites(plain)]
    assert all(site.query is not None and type(site.ffn).__name__ == "BertIntermediate" for site in sites)
    assert [site.name for site in find_sites(compiled, names)] == names
    assert Head.of(compiled).name == "classifier"
    assert set(Head.of(compiled).prints) == set(Head.of(plain).prints)
    edit = WeightEdit.build(compiled, {"classifier.weight": (torch.tensor([1]), torch.tensor([0.5]))})
    with edit.applied(compiled), edit.applied(plain):
        assert float(plain.classifier.weight.flatten()[1]) == 0.5


def test_hooks_act(compiled: Any) -> None:
    plain, inputs = tiny("bert", labels=3, layers=2), tiny_inputs("bert")
    want = Cascade(plain, path="layer").attribute(inputs, predicted_logit)
    cascade = Cascade(compiled, path="layer")
    got = cascade.attribute(inputs, predicted_logit)
    assert isinstance(cascade.forward, PartialForward)
    for site, value in want.values.items():
        assert_near(got.values[site], value, terms=100, size=value.abs().max())
    neurons = NeuronSet({next(iter(got.values)): [1, 2, 3]})
    with torch.no_grad(), NeuronEdit.build(compiled, neurons, 0.0).applied(compiled):
        gated = compiled(**inputs).logits
    with torch.no_grad(), NeuronEdit.build(plain, neurons, 0.0).applied(plain):
        assert_near(gated, plain(**inputs).logits, terms=100)
    for kind in ("attention", "gradient_x_input"):
        assert_near(token_scores(compiled, inputs, kind=kind), token_scores(plain, inputs, kind=kind), terms=100)


def test_evaluation_names_what_is_applied(compiled: Any) -> None:
    tests = Examples.load([("the movie was great", "good"), ("the plot was bad", "bad"), ("it is very long", "so")])
    neurons = NeuronSet({find_sites(compiled)[0].name: [1, 2, 3]})
    settings: dict[str, Any] = {"bootstrap": 0, "draws": 2, "progress": False}
    with NeuronEdit.build(compiled, neurons, 0.0).applied(compiled):
        got = evaluate(compiled, tiny_tokenizer(), tests, **settings)
    plain = tiny("bert", labels=3, layers=2)
    want = evaluate(plain, tiny_tokenizer(), tests, edit=NeuronEdit.build(plain, neurons, 0.0), **settings)
    assert str(got) == str(want)


class Net(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, **inputs: Tensor) -> Any:
        return self.net(**inputs)


@pytest.mark.parametrize("wrap", [Net, nn.DataParallel])
def test_a_wrapped_model_is_located_and_edited_under_the_same_names(wrap: Any) -> None:
    plain, inputs = tiny("bert", labels=3, layers=2), tiny_inputs("bert")
    model = wrap(tiny("bert", labels=3, layers=2)).eval()
    want, got = (Cascade(m, path="layer").attribute(inputs, predicted_logit) for m in (plain, model))
    for value, right in zip(got.values.values(), want.values.values(), strict=True):
        assert_near(value, right, terms=100, size=right.abs().max())
    site = list(got.values)[1]
    edit = NeuronEdit.build(model, NeuronSet({site: [4]}), 0.0)
    same = NeuronEdit.build(plain, NeuronSet({list(want.values)[1]: [4]}), 0.0)
    with torch.no_grad(), edit.applied(model), same.applied(plain):
        assert_near(model(**inputs).logits, plain(**inputs).logits, terms=100)


def test_compilation_goes_on_afterwards() -> None:
    torch._dynamo.reset()
    ran: list[int] = []

    def counting(graph: Any, examples: Any) -> Any:
        def run(*args: Any) -> Any:
            ran.append(1)
            return graph.forward(*args)

        return run

    model, inputs = torch.compile(tiny("bert", layers=1), backend=counting), tiny_inputs("bert")
    Cascade(model, path="layer").attribute(inputs, predicted_logit)
    assert not ran
    with torch.no_grad():
        model(**inputs)
    assert ran


def test_one_hook_of_spurge_at_a_time_is_enough_to_run_eagerly() -> None:
    from spurge.engine.models.hooks import frozen

    torch._dynamo.reset()
    model, inputs, seen = torch.compile(tiny("bert", layers=1), backend="eager"), tiny_inputs("bert"), []
    with torch.no_grad():
        model(**inputs)
    down = find_sites(model)[0].down
    with frozen(model), frozen(model), hook(down, lambda *_: seen.append(1)):
        model(**inputs)
    assert seen
