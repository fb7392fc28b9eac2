"""MacU on a decoder: label words, training of the last layers, and the whole command on a tiny made model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from common import language
from experiments import decoders, macu, tasks
from spurge.demo.grammar import Grammar
from spurge.engine.models.handle import Handle
from spurge.report.results import Results


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of SmolLM2 a random model of two layers that knows the words of the grammar."""
    texts = [str(row["text"]) for row in Grammar(train=240, share=0.0).training_rows(0)]
    split = pre_tokenizers.Whitespace()
    prompts = [prompt.template + " ".join(word for own in prompt.words.values() for word in own) for prompt in PROMPTS]
    words = sorted({word for text in (*texts, *prompts, "They said so.") for word, _ in split.pre_tokenize_str(text)})
    table = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", "<pad>", *words])}, "<unk>"))
    table.pre_tokenizer = split
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=table, pad_token="<pad>", unk_token="<unk>")

    def made() -> tuple[torch.nn.Module, object]:
        sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
        config = transformers.LlamaConfig(vocab_size=len(tokenizer), pad_token_id=1, tie_word_embeddings=True, **sizes)
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval(), tokenizer

    monkeypatch.setattr(language, "smollm2", made)
    monkeypatch.setattr(decoders, "LAYERS", 1)


PROMPTS = tuple(decoders.PROMPTS.values())


def _subject(folder: Path, place: Path, trained: bool) -> decoders.Decoder:
    task = tasks.sentiment(folder).cut(16, 1, 8)
    return decoders.Decoder(task, 0, place, True, {}, trained)


def test_a_label_is_the_logit_of_its_word_after_the_prompt(tiny: None, folder: Path, tmp_path: Path) -> None:
    subject = _subject(folder, tmp_path, False)
    handle, row = subject.handle(decoders.PLAIN), subject.task.dev[0]
    bare, tokenizer = language.smollm2()
    prompt = tokenizer([f"Review: {row.text}\nSentiment:"], return_tensors="pt")
    after = bare(prompt["input_ids"]).logits[0, -1]
    wanted = after[tokenizer.convert_tokens_to_ids(["negative", "positive"])]
    torch.testing.assert_close(handle.logits(handle.encode([row], 64))[0], wanted)


def test_training_moves_the_last_layers_alone_and_is_kept(tiny: None, folder: Path, tmp_path: Path) -> None:
    tuned, before = (_subject(folder, tmp_path, trained).tuned("any").model for trained in (True, False))
    moved = {
        name.partition(".mlp")[0].partition(".self_attn")[0]
        for name, one in tuned.named_parameters()
        if not torch.equal(one, before.state_dict()[name])
    }
    assert {name for name in moved if "layernorm" not in name} == {Handle(before).sites[-1].name.partition(".mlp")[0]}
    again = _subject(folder, tmp_path, True).tuned("any").model
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in tuned.state_dict().items())


@pytest.mark.filterwarnings("ignore:(located|dev)")
@pytest.mark.parametrize(("task", "edit"), [("sa", "macu-best-small"), ("nli", "macu-paper-small")])
def test_the_command_runs_on_made_texts(tiny: None, folder: Path, tmp_path: Path, task: str, edit: str) -> None:
    path = tmp_path / "results.json"
    methods = [decoders.PLAIN, edit, f"{edit}:random", f"{edit}:threshold", "deleted"]
    asked = ["decoders", str(folder), "--quick", "--threads", "1", "--seeds", "0", "--task", task, "--json", str(path)]
    assert macu.main([*asked, "--methods", ",".join(methods)]) == 0
    results = Results.load(path)
    for model in decoders.MODELS:
        assert {row["method"] for row in results.select(case=f"{model}: mean-ood", metric="accuracy")} == {*methods}
        assert {row["method"] for row in results.select(case=f"{model}: mean-ood", metric="gain")} == {*methods[1:]}
    labels = {row["method"]: row["labels"] for row in results.select(metric="accuracy")}
    assert (labels[edit], labels["deleted"]) == ("class" if task == "sa" else "none", "none")
