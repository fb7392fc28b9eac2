"""Estimates are held against exact effects, and the audit's intervals against what the effects say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import run
from localisation import audit, error_picture, faithfulness
from localisation.exact import Asked, LogProbability, Question, exact_effects, logit
from spurge.report.results import Results

PLACE = "bert.encoder.layer.{}.output.dense"
FLOORS = {"forward", "forward-backward"}


def tiny_classifier(words: int) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=words, **sizes)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def question() -> Question:
    model = tiny_classifier(60)
    ids = torch.randint(3, 60, (2, 8))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    targets = {"logit": Asked.of(logit), "logprob": Asked.of(LogProbability())}
    return Question("tiny-8x2", model, inputs, targets, {PLACE.format(i): torch.arange(64) for i in range(3)}, False)


def logits_without(model: nn.Module, ids: torch.Tensor, layer: int, neuron: int) -> torch.Tensor:
    def off(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (args[0].index_fill(2, torch.tensor([neuron]), 0.0),)

    handle = model.get_submodule(PLACE.format(layer)).register_forward_pre_hook(off)
    with torch.no_grad():
        answer = model(input_ids=ids).logits
    handle.remove()
    return answer


def test_exact_effects_are_those_of_the_whole_model(question, tmp_path):
    found = exact_effects(question, tmp_path)
    full = question.model(input_ids=question.ids).logits
    chosen = full.argmax(1, keepdim=True)
    for layer, neuron in ((0, 3), (1, 60), (2, 17)):
        off = logits_without(question.model, question.ids, layer, neuron)
        column = 64 * layer + neuron
        want = (full - off).gather(1, chosen)[:, 0].double()
        torch.testing.assert_close(found["logit"][:, column], want, rtol=1e-3, atol=1e-7)
        want = (full.log_softmax(1) - off.log_softmax(1)).gather(1, chosen)[:, 0].double()
        torch.testing.assert_close(found["logprob"][:, column], want, rtol=1e-3, atol=1e-7)


def test_exact_effects_are_kept_and_found_again(question, tmp_path, monkeypatch):
    first = exact_effects(question, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    monkeypatch.setattr("spurge.engine.cascade.cascade.Cascade.ablate", None)
    assert torch.equal(exact_effects(question, tmp_path)["logit"], first["logit"])


def test_metrics_know_what_they_are_told():
    exact_values = torch.arange(200.0, dtype=torch.float64).reshape(2, 100)
    found = faithfulness.accuracy(exact_values, exact_values)
    assert [found[name][0] for name in ("spearman", "pearson", "relative_error", "top1_overlap")] == pytest.approx(
        [1, 1, 0, 100]
    )
    found = faithfulness.accuracy(-exact_values, exact_values)
    assert [found[name][0] for name in ("spearman", "pearson", "relative_error", "top1_overlap")] == pytest.approx(
        [-1, -1, 2, 0]
    )
    assert faithfulness.rank_correlation(exact_values**3, exact_values) == pytest.approx(1)


def test_every_method_is_measured(question, tmp_path):
    results = Results("faithfulness", {})
    args = run.parser().parse_args(["faithfulness", "--only", "accuracy,time", "--repeats", "1"])
    faithfulness.measure(question, args, results, lambda: None)
    names = {method.name for method in faithfulness.methods_of(question, "logit", ["*"])}
    assert {row["method"] for row in results.select(case="tiny-8x2 logit", metric="seconds")} == names
    errors = {row["method"]: row["value"] for row in results.select(case="tiny-8x2 logit", metric="relative_error")}
    assert errors.keys() == names - FLOORS
    assert errors["gradient+512"] < 1e-5  # all 192 neurons
    assert errors["gradient"] < errors["joint-4"]
    assert not results.select(case="tiny-8x2 logprob", method="knowledge-neurons")


def test_a_tolerance_is_checked_by_draws_of_another_seed(question):
    results = Results("faithfulness", {})
    args = run.parser().parse_args(["faithfulness", "--only", "tolerance", "--repeats", "1"])
    faithfulness.measure(question, args, results, lambda: None)
    rows = results.select(case="tiny-8x2 logit", method="tolerance-0.1")
    found = {row["metric"]: row["value"] for row in rows}
    assert found["error_bound own"] <= 0.1
    assert 0 < found["relative_error fresh"] <= 0.1
    assert found["relative_error fresh"] != found["relative_error own"]
    assert found["seconds"] > 0
    timed = {row["method"] for row in results.select(case="tiny-8x2 logit", metric="seconds")}
    assert {"tolerance-0.1", "tolerance-0.1 without audit", "layer-4"} <= timed


def test_the_picture_has_what_has_an_error_and_a_time(tmp_path: Path):
    results = Results("faithfulness", {})
    for method, metric in (
        ("a", "seconds"),
        ("a", "relative_error"),
        ("b", "seconds"),
        ("forward-backward", "seconds"),
    ):
        results.add("one", method, metric, 0.5, unit="s")
    results.add("two", "a", "seconds", 0.5, unit="s")
    results.write(tmp_path / "f.json")
    (axis,) = error_picture.drawn(error_picture.read([tmp_path / "f.json"])).axes
    assert axis.get_title() == "one"
    assert [text.get_text() for text in axis.texts] == ["a"]
    with pytest.raises(ValueError, match="no case has errors and times"):
        error_picture.drawn({})


def test_forward_backward_reaches_the_embeddings(question):
    seen: list[torch.Tensor] = []
    handle = question.model.get_input_embeddings().register_forward_hook(lambda *call: seen.append(call[2]))
    faithfulness._forward_backward(question, question.targets["logit"])()
    handle.remove()
    assert seen[0].grad is not None
    assert seen[0].grad.abs().sum() > 0
    assert not question.model.get_input_embeddings()._forward_hooks


def test_coverage_counts_what_holds_the_truth(question):
    found = audit.coverage(question, question.targets["logit"], exact_effects(question, None)["logit"], 3)
    assert found.keys() == {"spearman", "pearson", "error", "missed"}
    for truth, held, sizes in found.values():
        assert len(held) == len(sizes) == 3
        assert abs(truth) <= 1
    truth, held, sizes = found["error"]
    assert held == [truth <= bound for bound in sizes]


@pytest.mark.parametrize(
    ("arguments", "expected"), [([], "--minilm FOLDER"), (["--minilm", "nowhere"], "labelled texts")]
)
def test_a_model_and_its_texts_are_needed(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]):
    assert run.main(["faithfulness", *arguments]) == 2
    assert expected in capsys.readouterr().err


@pytest.fixture
def classifier(tmp_path: Path) -> tuple[Path, Path]:
    """Folder of a tiny classifier with its tokenizer, and a file of texts of ten words."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", *(f"w{i}" for i in range(20))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token")}
    folder = tmp_path / "model"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    tiny_classifier(len(words)).save_pretrained(folder)
    texts = tmp_path / "texts.jsonl"
    rows = [
        {"text": " ".join([("bad", "good")[i % 2], *(f"w{(7 * i + j) % 20}" for j in range(9))]), "label": i % 2}
        for i in range(60)
    ]
    texts.write_text("\n".join(map(json.dumps, rows)))
    return folder, texts


def test_commands_ask_about_proximity_and_write_rows(classifier: tuple[Path, Path], tmp_path: Path):
    given = [
        "--quick",
        "--minilm",
        str(classifier[0]),
        "--texts",
        str(classifier[1]),
        "--cache",
        str(tmp_path / "kept"),
    ]
    only = ["--only", "accuracy", "--methods", "gradient,gradient-own,spurge"]
    assert run.main(["faithfulness", *given, *only, "--json", str(tmp_path / "f.json")]) == 0
    results = Results.load(tmp_path / "f.json")
    cases = {f"minilm-8x2 {target}" for target in ("logit", "logprob", "soft", "hard")}
    assert {row["case"] for row in results.select(method="spurge")} == cases
    assert {row["case"] for row in results.select(method="gradient-own")} == {"minilm-8x2 hard"}
    assert run.main(["audit", *given, "--batches", "0x2", "--json", str(tmp_path / "a.json")]) == 0
    shares = Results.load(tmp_path / "a.json").select(case="all", metric="error coverage")
    assert 0 <= shares[0]["value"] <= 100
