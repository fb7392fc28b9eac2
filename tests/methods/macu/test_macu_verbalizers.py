"""MacU on a causal language model that classifies by label words."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import planted_texts
from helpers.tiny_models import tiny_language, tiny_tokenizer
from spurge.engine.cascade.cascade import Cascade, Rows
from spurge.engine.data.examples import Examples, encode
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.evaluation.evaluation import accuracy, evaluate
from spurge.engine.models.probes import probed_token, token_scores
from spurge.engine.models.prompt_template import Prompted
from spurge.engine.models.verbalizers import Verbalized, Verbalizer
from spurge.methods.macu.macu import MacU
from spurge.methods.macu.search import Climb
from spurge.methods.macu.swaps import SwapShares
from spurge.methods.macu.swarm import Swarm
from spurge.methods.macu.training import Repair

VERBALIZER = Verbalizer({"negative": ["never", "hate"], "positive": ["love", "always"]}, "i; {text}. so i")
QUICK: dict[str, Any] = {"texts": 32, "batch_size": 16, "certify": 4, "certify_texts": 8, "progress": False}
SWARM = Swarm(particles=4, iterations=3)


@cache
def speaker() -> tuple[Verbalized, Prompted]:
    """A LLaMA fitted to say the label words of the planted texts; callers leave it as it is."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        tokenizer = tiny_tokenizer(decoder=True, padding_side="left")
        model, prompted = VERBALIZER.wrap(tiny_language("llama").train(), tokenizer)
        adam = torch.optim.Adam(model.parameters(), 3e-3)
        draw, rows = random.Random(0), planted_texts.train()
        for _ in range(80):
            batch = rows.subset(draw.sample(range(len(rows)), 32))
            loss = torch.nn.functional.cross_entropy(model(**encode(prompted, batch)).logits, batch.targets)
            loss.backward()
            adam.step()
            adam.zero_grad()
    finally:
        torch.set_rng_state(state)
    return model.eval(), prompted


def right(tests: Examples) -> float:
    return accuracy(*speaker(), tests)


def test_the_best_setting_cuts_the_planted_shortcut() -> None:
    model, tokenizer = speaker()
    before = {name: value.clone() for name, value in model.language_model.state_dict().items()}
    was = right(planted_texts.broken()), right(planted_texts.kept())
    assert was[0] < 60  # the shortcut is there
    macu = MacU.best(texts=96, edit_texts=128, progress=False, cap=60)
    found = macu.locate(model, tokenizer, planted_texts.train(), planted_texts.GOLDEN)
    edit = macu.edit(model, tokenizer, planted_texts.train(), found, planted_texts.GOLDEN)
    assert all(torch.equal(value, before[name]) for name, value in model.language_model.state_dict().items())
    with edit.applied(model.language_model):
        now = right(planted_texts.broken()), right(planted_texts.kept())
    assert now[0] >= was[0] + 20
    assert now[1] >= was[1] - 10
    random = NeuronEdit.build(
        model, edit.neurons.random_like(found.causal.widths, 0, exclude=edit.neurons), edit.vector()
    )
    with random.applied(model):
        assert right(planted_texts.broken()) < now[0] - 10
    assert any("tuesday" in phrase["text"] and phrase["label"] == "positive" for phrase in found.info["phrases"])


def test_the_papers_procedure_runs_to_the_report() -> None:
    model, tokenizer = speaker()
    macu = MacU.paper(**QUICK, swarm=SWARM, fraction=0.05, share=0.1, edit_texts=16)
    found = macu.locate(model, tokenizer, planted_texts.train(), planted_texts.GOLDEN)
    assert len(found.spurious_set)
    assert found.certificate["texts"] == 8
    edit = macu.edit(model, tokenizer, planted_texts.train(), found, planted_texts.GOLDEN)
    assert edit.neurons <= found.spurious_set | found.overlap
    report = evaluate(
        model,
        tokenizer,
        {"broken": planted_texts.broken(16), "kept": planted_texts.kept(16)},
        edit=edit,
        golden=planted_texts.GOLDEN,
        draws=3,
        bootstrap=10,
        progress=False,
    )
    assert {row["method"] for row in report.rows()} == {"none", "edit", "threshold", "zero-all", "random"}
    assert {"accuracy", "eta"} <= {row["metric"] for row in report.rows()}


def test_gates_of_soft_proximity_are_climbed() -> None:
    model, tokenizer = speaker()
    macu = MacU(**QUICK, search="gradient", fitness="soft", climb=Climb(steps=4, look=2), neurons="all", edit_texts=16)
    found = macu.locate(model, tokenizer, planted_texts.train(), planted_texts.GOLDEN)
    edit = macu.edit(model, tokenizer, planted_texts.train(), found, planted_texts.GOLDEN)
    assert edit.info["value"] >= edit.info["start"]


def test_the_side_of_the_padding_changes_no_score() -> None:
    model, tokenizer = speaker()
    other = Prompted(tiny_tokenizer(decoder=True), VERBALIZER.template)
    macu = MacU(**{**QUICK, "certify": 0})
    left, right = (macu.locate(model, t, planted_texts.train(), planted_texts.GOLDEN) for t in (tokenizer, other))
    for side in ("causal", "spurious"):
        for site, values in getattr(left, side).values.items():
            want = getattr(right, side).values[site]
            torch.testing.assert_close(values, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


def test_attention_is_that_of_the_prompts_last_token() -> None:
    """Against full attention maps of an eager copy, on the side where a plain call would count positions wrongly."""
    model, tokenizer = VERBALIZER.wrap(
        tiny_language("llama", attn_implementation="eager"), tiny_tokenizer(decoder=True, padding_side="left")
    )
    inputs = encode(tokenizer, planted_texts.train()[:6])
    assert not inputs["attention_mask"].all()
    position = probed_token(model, inputs)
    with torch.no_grad():
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
        maps = model.language_model(**inputs, position_ids=positions, output_attentions=True).attentions[-1]
    want = maps.mean(1)[torch.arange(6), position]
    seen: list[Tensor] = []

    def look(rows: Rows) -> Tensor:
        assert rows.attention is not None
        seen.append(rows.attention)
        return rows.logits[:, 0]

    Cascade(model, attention=True, nodes=1, path="layer").attribute(inputs, look)
    torch.testing.assert_close(seen[0][:6], want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(token_scores(model, inputs), want * inputs["attention_mask"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preset", [MacU.paper, MacU.best])
def test_a_language_model_without_label_words_is_refused(preset: Any) -> None:
    language, tokenizer = tiny_language("llama"), tiny_tokenizer(decoder=True)
    advice = "see spurge.Verbalizer"
    with pytest.raises(ValueError, match=advice):
        preset(**QUICK).locate(language, tokenizer, planted_texts.train(), planted_texts.GOLDEN)
    model, prompted = VERBALIZER.wrap(language, tokenizer)
    macu = preset(**{**QUICK, "fraction": 0.05, "share": 0.1})
    found = macu.locate(model, prompted, planted_texts.train(), planted_texts.GOLDEN)
    with pytest.raises(ValueError, match=advice):
        preset(**QUICK, neurons="all").edit(language, tokenizer, planted_texts.train(), found, planted_texts.GOLDEN)
    with pytest.raises(ValueError, match=advice):
        evaluate(language, tokenizer, planted_texts.broken(8), golden=planted_texts.GOLDEN, progress=False)


def test_blocks_of_other_label_words_are_not_taken(tmp_path: Any) -> None:
    model, tokenizer = speaker()
    other = Verbalizer({"negative": ["hate"], "positive": ["love"]}, VERBALIZER.template)
    macu = MacU.best(**{**QUICK, "certify": 0})
    macu.locate(model, tokenizer, planted_texts.train(), planted_texts.GOLDEN, resume=tmp_path)
    with pytest.raises(ValueError, match="was made with other settings, data or model"):
        macu.locate(
            *other.wrap(model.language_model, tokenizer.tokenizer),
            planted_texts.train(),
            planted_texts.GOLDEN,
            resume=tmp_path,
        )


@pytest.mark.parametrize("which", ["all", "lora"])
def test_a_repair_cuts_the_planted_shortcut(which: Any) -> None:
    model, tokenizer = speaker()
    before = {name: value.clone() for name, value in model.language_model.state_dict().items()}
    was = right(planted_texts.broken()), right(planted_texts.kept())
    rate = {"all": 1e-3, "lora": 1e-2}[which]
    settings = Repair(steps=40, rate=rate, dev_texts=100, alphas=(0.5, 1.0), loss=5.0, shares=SwapShares(template=0))
    how: dict[str, Any] = {"objective": "counterfactual", "search": "weights", "progress": False}
    macu = MacU(**how, which=which, repair=settings)
    edit = macu.edit(model, tokenizer, planted_texts.train(), None, planted_texts.GOLDEN)
    assert all(torch.equal(value, before[name]) for name, value in model.language_model.state_dict().items())
    with edit.applied(model):
        now = right(planted_texts.broken()), right(planted_texts.kept())
    assert now[0] >= was[0] + 15
    assert now[1] >= was[1] - 5
