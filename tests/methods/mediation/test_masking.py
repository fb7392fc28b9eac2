from __future__ import annotations

import pytest
import torch

from helpers.tiny_models import HEADS, HIDDEN, WIDTH, tiny, tiny_tokenizer
from spurge.engine.models.handle import Handle
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.sites import find_sites
from spurge.engine.recordings.generation import continuations
from spurge.methods.mediation.masking import likelihood, mask
from spurge.report.results import Results

PROMPTS = ["the film was", "a great story and", "this plot is dull", "we like the music"]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request):
    return tiny(request.param, language=True)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(decoder=True)


def length(texts):
    """An outcome that depends on every character."""
    return [sum(map(ord, text)) / 1000 for text in texts]


def some(model, count=20):
    return NeuronSet({site.name: range(count) for site in find_sites(model)[:2]})


def run(model, tokenizer, neurons, **settings):
    return mask(model, tokenizer, PROMPTS, length, neurons, **{"draws": 3, "generate": 4, "progress": False} | settings)


def test_outcomes_are_those_of_the_masked_model(model, tokenizer):
    neurons = some(model)
    found = run(model, tokenizer, neurons)
    plain = continuations(Handle(model, tokenizer), PROMPTS, 4)
    assert found.none.tolist() == pytest.approx(length(plain))
    handles = []
    for site in find_sites(model):
        keep = torch.ones(WIDTH)
        keep[neurons.indices(site.name)] = 0
        handles.append(site.down.register_forward_pre_hook(lambda _, args, keep=keep: (args[0] * keep,)))
    try:
        masked = continuations(Handle(model, tokenizer), PROMPTS, 4)
        loss = likelihood(Handle(model, tokenizer), PROMPTS)
    finally:
        for handle in handles:
            handle.remove()
    assert found.masked.tolist() == pytest.approx(length(masked))
    assert masked != plain
    assert float(found.losses[1]) == pytest.approx(loss, rel=1e-5)
    assert found.drop == pytest.approx(float((found.none - found.masked).mean()))


def test_heads_are_masked_where_they_are_meant(model, tokenizer):
    site = find_sites(model, units="heads")[1]
    found = run(model, tokenizer, NeuronSet({site.name: [1, 2]}), units="heads", draws=1)
    keep = torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat_interleave(HIDDEN // HEADS)
    handle = site.down.register_forward_pre_hook(lambda _, args: (args[0] * keep,))
    masked = continuations(Handle(model, tokenizer), PROMPTS, 4)
    handle.remove()
    assert found.masked.tolist() == pytest.approx(length(masked))
    with pytest.raises(ValueError, match="is the output projection of an attention; say whether its heads"):
        run(model, tokenizer, NeuronSet({site.name: [1, 2]}))


def test_random_neurons_are_others_of_the_same_sites(model, tokenizer):
    found = run(model, tokenizer, some(model), draws=5)
    assert found.random.shape == (5, 4)
    assert found.losses.shape == (7,)
    assert len({tuple(row) for row in found.random.tolist()}) > 1
    again, other = run(model, tokenizer, some(model), draws=5), run(model, tokenizer, some(model), draws=5, seed=1)
    assert torch.equal(found.random, again.random)
    assert not torch.equal(found.random, other.random)
    assert found.p == (1 + int((found.random_drops >= found.drop).sum())) / 6


def test_a_gate_of_one_changes_nothing(model, tokenizer):
    found = run(model, tokenizer, some(model), gate=1.0, draws=0)
    assert torch.equal(found.none, found.masked)
    assert found.drop == 0
    assert found.interval == (0, 0)
    assert found.p == 1


def test_the_model_comes_back_also_when_the_scorer_fails(model, tokenizer):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = []

    def fails(texts):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return length(texts)

    with pytest.raises(KeyboardInterrupt):
        mask(model, tokenizer, PROMPTS, fails, some(model), generate=2, progress=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_likelihood_is_that_of_each_text_alone(model, tokenizer):
    total = tokens = 0
    for text in PROMPTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert likelihood(Handle(model, tokenizer), PROMPTS) == pytest.approx(total / tokens, rel=1e-5)
    assert likelihood(Handle(model, tokenizer), PROMPTS, batch_size=1) == pytest.approx(total / tokens, rel=1e-5)


def test_prints_and_exports(model, tokenizer):
    found = run(model, tokenizer, some(model))
    assert "40 neurons masked, 4 prompts" in str(found)
    assert "3 random" in str(found)
    results = Results("mask", {})
    results.extend(found.rows())
    assert {row["metric"] for row in found.rows()} >= {"outcome", "drop", "drop_low", "loss", "p against random"}
    assert repr(found).startswith("Masking(40 neurons, 4 prompts: drop")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"neurons": NeuronSet()}, ValueError, "neurons: need at least 1, got none"),
        ({"neurons": [1]}, TypeError, "neurons: expected a NeuronSet, got list"),
        ({"neurons": NeuronSet({"nowhere": [0]})}, ValueError, "nowhere"),
        ({"draws": -1}, ValueError, "draws: need at least 0"),
        ({"generate": 0}, ValueError, "generate: need at least 1"),
        ({"gate": float("nan")}, ValueError, "gate: must be finite"),
    ],
)
def test_says_what_is_wrong(model, tokenizer, change, error, message):
    arguments = {"neurons": some(model)} | change
    with pytest.raises(error, match=message):
        run(model, tokenizer, **arguments)
