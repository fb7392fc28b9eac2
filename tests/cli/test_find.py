"""``spurge find`` from the search to golden words, groups and locate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers import planted_texts
from helpers.planted_slices import planted_slices
from helpers.planted_texts import PHRASE
from helpers.tiny_models import tiny_tokenizer
from spurge import Examples, Features, Found, GoldenTokens
from spurge.cli import main
from spurge.report.results import Results


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the planted model, its rows and a lexicon."""
    folder = tmp_path_factory.mktemp("desk")
    model = planted_texts.model()
    names = dict(enumerate(planted_texts.LABELS))
    before = model.config.id2label, model.config.label2id
    model.config.id2label, model.config.label2id = names, {name: number for number, name in names.items()}
    model.save_pretrained(folder / "model")
    model.config.id2label, model.config.label2id = before
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [
        {"text": row.text, "label": planted_texts.LABELS[row.label], "part": "a" if PHRASE in row.text else "b"}
        for row in planted_texts.train()
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"{word},negative\n" for word in planted_texts.BAD] + [f"{word},positive\n" for word in planted_texts.GOOD]
    (folder / "words.csv").write_text("word,label\n" + "".join(words))
    return folder


def spurge(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def common(desk: Path) -> tuple[Any, ...]:
    return ("--model", desk / "model", "--data", desk / "rows.jsonl", "--quiet")


def test_from_find_to_golden_words_groups_and_locate(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ("--candidates", 20, "--texts", 8, "--columns", "part", "--lexicon", desk / "words.csv")
    code, out, err = spurge(capsys, "find", *common(desk), *small, "--out", "found.tsv", "--json", "found.json")
    assert (code, err) == (0, "")
    assert PHRASE in out
    assert max(map(len, out.splitlines())) <= 80
    found = Found.load("found.tsv", planted_texts.LABELS)
    assert any(row.word == "part = a" for row in found.rows)
    assert Results.load("found.json").select(case=PHRASE, metric="lean")[0]["value"] > 0

    made = (
        "--reviewed",
        "found.tsv",
        "--columns",
        "part",
        "--golden-out",
        "golden.json",
        "--groups-out",
        "grouped.jsonl",
    )
    text = Path("found.tsv").read_text().replace("\tundecided\t", "\tcausal\t")
    lines = text.splitlines()
    kept = [line for line in lines if line.split("\t")[0] != PHRASE]
    phrase = next(line for line in lines if line.split("\t")[0] == PHRASE)
    for role in ("causal", "undecided"):
        phrase = phrase.replace(f"\t{role}\t", "\tspurious\t")
    Path("found.tsv").write_text("\n".join([kept[0], phrase, *kept[1:]]) + "\n")
    code, out, err = spurge(capsys, "find", *common(desk), *made)
    assert (code, err) == (0, "")
    golden = GoldenTokens.load("golden.json")
    assert PHRASE in golden.irrelevant
    grouped = Examples.load("grouped.jsonl", group="group")
    assert f"negative, {PHRASE}" in grouped.groups

    locate = ("--golden", "found.tsv", "--texts", 24, "--certify", 0, "--cap", 20, "--out", "located.safetensors")
    code, out, err = spurge(capsys, "locate", *common(desk), *locate)
    assert (code, err) == (0, "")


def test_a_review_on_the_command_line(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "word\tkind\tlabel\trole\tkeep\nmovie\tword\tpositive\tcausal\tyes\nplot\tword\tnegative\tcausal\tyes\n"
    Path("found.tsv").write_text(text)
    words = ("--spurious", "movie", "--causal", "positive=fine, very good", "--causal", "negative=plot")
    outputs = ("--out", "found.tsv", "--golden-out", "golden.json")
    code, out, err = spurge(capsys, "find", *common(desk), "--reviewed", "found.tsv", *words, *outputs)
    assert (code, err) == (0, "")
    assert "4 candidates, as reviewed: found.tsv" in out
    golden = GoldenTokens.load("golden.json")
    assert golden == GoldenTokens.load("found.tsv").for_labels(golden.labels)
    assert (golden.irrelevant, golden.causal["positive"]) == (("movie",), ("fine", "very good"))
    reasons = {row.word: row.reason for row in Found.load("found.tsv").rows}
    assert reasons == {
        "movie": "reviewed; proposed: causal",
        "plot": "",
        "fine": "reviewed; added",
        "very good": "reviewed; added",
    }
    code, _, err = spurge(capsys, "find", *common(desk), "--reviewed", "found.tsv", "--causal", "fine")
    assert (code, err) == (2, "spurge: error: --causal: expected LABEL=A,B, got 'fine'\n")


def test_locate_says_what_the_golden_words_lack(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lacking = {"causal": {"negative": ["bad"], "positive": ["good"]}, "irrelevant": ["the"]}
    (tmp_path / "golden.json").write_text(json.dumps(lacking))
    out = tmp_path / "located.safetensors"
    locate = ("--golden", tmp_path / "golden.json", "--texts", 40, "--certify", 0, "--cap", 20, "--out", out)
    code, said, err = spurge(capsys, "locate", *common(desk), *locate)
    assert (code, err) == (0, "")
    said = " ".join(said.split())
    assert f"note: bound to a label, but not golden: {PHRASE!r} (positive" in said
    assert "have a causal word of their label; would reach more" in said
    assert "neutral texts of 40" in said


def test_slices_of_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planted_slices().save(tmp_path / "features.safetensors")
    groups = tmp_path / "grouped.safetensors"
    given = ("--features", tmp_path / "features.safetensors", "--groups-out", groups, "--json", tmp_path / "s.json")
    code, out, err = spurge(capsys, "find", *given)
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith("slice")
    grouped = Features.load(groups)
    assert Results.load(tmp_path / "s.json").rows[0]["case"] == grouped.group_names[0]
    code, out, err = spurge(capsys, "find", *given, "--data", tmp_path / "rows.jsonl")
    assert (code, out) == (2, "")
    assert "--data: features have no texts" in err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "--out: give a file for the table"),
        (("--out", "found.txt"), "ends in .tsv"),
        (("--out", "found.tsv", "--columns", "nothing"), "no column 'nothing'"),
        (("--out", "found.tsv", "--candidates", "0"), "--candidates: need at least 1"),
        (("--out", "found.tsv", "--reviewed", "a.tsv"), "--reviewed: its table is not written again"),
        (("--out", "found.tsv", "--spurious", "a"), "--spurious: says what a person thinks of a table"),
    ],
)
def test_mistakes_are_one_line(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, given, message
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = spurge(capsys, "find", *common(desk), *given)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
