"""Golden sets by their definition, the bitmap bit by bit, and every source of words with its refusals."""

from __future__ import annotations

import json
import lzma
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spurge.engine.base.files import FileError
from spurge.engine.data.examples import Examples
from spurge.engine.data.words import Vocabulary
from spurge.methods.golden.corpus_words import FUNCTION_WORDS
from spurge.methods.golden.golden import GoldenTokens

GOLDEN = GoldenTokens(
    ("negative", "neutral", "positive"),
    {"positive": ["Charm", "well-made", "charm"], "negative": ["fail", "not good"], "neutral": ["balance"]},
    ["the", "Where", "balance"],
)


def test_sets_are_those_of_the_definition() -> None:
    assert GOLDEN.causal["positive"] == ("charm", "well made")
    assert GOLDEN.irrelevant == ("the", "where")  # a causal word is not irrelevant
    assert GOLDEN.spurious("positive") == {"fail", "not good", "balance", "the", "where"}
    assert GOLDEN.spurious("neutral") == {"fail", "not good", "charm", "well made", "the", "where"}
    assert GOLDEN.phrases() == {("well", "made"), ("not", "good")}
    assert repr(GOLDEN) == "GoldenTokens(negative: 2, neutral: 1, positive: 2, irrelevant: 2)"
    with pytest.raises(ValueError, match=r"label: expected one of .* got 'bad'"):
        GOLDEN.spurious("bad")


word = st.text("abcdef", min_size=1, max_size=3)


@st.composite
def golden_tokens(draw: st.DrawFn) -> GoldenTokens:
    labels = tuple(draw(st.lists(st.sampled_from(["x", "y", "z", "0", "Ü"]), min_size=2, max_size=4, unique=True)))
    words = draw(st.lists(word, min_size=len(labels), max_size=30, unique=True))
    causal: dict[str, list[str]] = {label: [words[i]] for i, label in enumerate(labels)}
    for entry in words[len(labels) :]:
        causal[draw(st.sampled_from(labels))].append(entry)
    return GoldenTokens(labels, causal, draw(st.lists(word, max_size=10)))


@settings(max_examples=60, deadline=None)
@given(golden=golden_tokens(), seen=st.lists(word, max_size=80))
def test_bitmap_is_membership(golden: GoldenTokens, seen: list[str]) -> None:
    vocabulary = Vocabulary(seen)
    before = len(vocabulary)
    bitmap = golden.bitmap(vocabulary)
    assert len(vocabulary) == before
    assert bitmap.dtype == torch.int32
    assert bitmap.shape == (2, len(golden.labels), -(-before // 32))
    for y, label in enumerate(golden.labels):
        for g, words in enumerate((set(golden.causal[label]), golden.spurious(label))):
            bits = [bool(bitmap[g, y, v // 32].item() >> (v % 32) & 1) for v in range(bitmap.shape[2] * 32)]
            assert bits[:before] == [entry in words for entry in vocabulary]
            assert not any(bits[before:])
    assert not (bitmap[0] & bitmap[1]).any()
    summary = golden.summary(vocabulary)
    for label, counts in summary["causal"].items():
        assert counts == {
            "words": len(golden.causal[label]),
            "found": len(set(golden.causal[label]) & set(vocabulary)),
        }
    assert summary["irrelevant"]["words"] == len(golden.irrelevant)


@settings(max_examples=40, deadline=None)
@given(golden=golden_tokens())
def test_golden_tokens_come_back_from_their_file(
    tmp_path_factory: pytest.TempPathFactory, golden: GoldenTokens
) -> None:
    path = tmp_path_factory.mktemp("g") / "golden.json"
    golden.save(path)
    again = GoldenTokens.load(path)
    assert again == golden
    assert hash(again) == hash(golden)
    assert again.fingerprint() == golden.fingerprint()


def test_a_file_by_hand_is_enough_and_mistakes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "golden.json"
    path.write_text('{"causal": {"no": ["bad"], "yes": ["Good"]}, "irrelevant": ["the"]}')
    golden = GoldenTokens.load(path)
    assert golden.labels == ("no", "yes")
    assert golden.irrelevant == ("the",)
    for value, message in (
        ([1], "not golden tokens: expected an object, got list"),
        ({"irrelevant": [1]}, "not golden tokens: 'causal' is missing"),
        ({"causal": [1]}, "causal: expected a mapping from label to words"),
        ({"causal": {"a": ["x"], "b": ["y"]}, "irelevant": []}, "'irelevant' is not known"),
        ({"causal": {"a": ["x"], "b": ["y"]}, "kind": "edit"}, "holds 'edit', expected 'golden tokens'"),
        ({"causal": {"a": ["x"], "b": ["y"]}, "schema": 2}, "schema 2 is newer"),
        ({"causal": {"a": ["x"], "b": []}}, "need at least 1 word"),
        ({"causal": {"a": ["x"], "b": "y"}}, "expected a list of words, got str"),
        ({"causal": {"a": ["x"], "b": [3]}}, "expected words, got int"),
        ({"causal": {"a": ["x"], "b": ["y"]}, "labels": "ab"}, "labels: expected a sequence of names"),
    ):
        path.write_text(json.dumps(value))
        with pytest.raises(FileError, match=f"golden.json.*{message}"):
            GoldenTokens.load(path)
    path.write_text("{")
    with pytest.raises(FileError, match="not a JSON file"):
        GoldenTokens.load(path)
    with pytest.raises(FileNotFoundError):
        GoldenTokens.load(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("labels", "causal", "irrelevant", "error", "message"),
    [
        (("a", "b"), {"a": ["x"]}, (), ValueError, r"causal\['b'\]: need at least 1 word, got 0"),
        (("a",), {"a": ["x"]}, (), ValueError, "labels: need at least 2, got 1"),
        (("a", "a"), {"a": ["x"]}, (), ValueError, "names must differ"),
        (("a", "b"), {"a": ["x"], "b": ["X"]}, (), ValueError, "'x' is listed for both 'a' and 'b'"),
        (("a", "b"), {"a": ["x"], "b": ["y"], "c": ["z"]}, (), ValueError, "'c' is none of the labels"),
        (("a", "b"), {"a": ["x"], "b": ["a+"]}, (), ValueError, r"causal\['b'\]: 'a\+' is no word or phrase"),
        (("a", "b"), {"a": ["x"], "b": [""]}, (), ValueError, "'' is no word"),
        (("a", "b"), {"a": ["x"], "b": "y"}, (), TypeError, r"causal\['b'\]: expected a list of words, got str"),
        (("a", "b"), {"a": ["x"], "b": [None]}, (), TypeError, "expected words, got NoneType"),
        (("a", "b"), [["x"], ["y"]], (), TypeError, "causal: expected a mapping"),
        (("a", "b"), {"a": ["x"], "b": ["y"]}, "the", TypeError, "irrelevant: expected a list of words"),
    ],
)
def test_nonsense_is_refused(labels: Any, causal: Any, irrelevant: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GoldenTokens(labels, causal, irrelevant)


def test_words_follow_the_labels_of_the_model() -> None:
    golden = GoldenTokens.from_words(negative=["bad"], positive=["good"], irrelevant=["the"])
    turned = golden.for_labels(("Positive", "NEGATIVE"))
    assert turned.causal == {"Positive": ("good",), "NEGATIVE": ("bad",)}
    assert turned.labels == ("Positive", "NEGATIVE")
    for names in (("0", "1"), ("LABEL_0", "LABEL_1")):
        assert golden.for_labels(names).causal[names[1]] == ("good",)
    assert golden.for_labels(("pos", "Neg")).causal == {"pos": ("good",), "Neg": ("bad",)}
    assert golden.for_labels(golden.labels) == golden
    numbered = GoldenTokens.from_words(**{"1": ["bad"], "0": ["good"]})
    assert numbered.for_labels(("0", "1")).causal["0"] == ("good",)
    assert numbered.for_labels(("LABEL_0", "LABEL_1")).causal["LABEL_0"] == ("bad",)
    with pytest.raises(ValueError, match=r"have 2 .* got"):
        golden.for_labels(("0", "1", "2"))
    with pytest.raises(ValueError, match="do not match"):
        golden.for_labels(("no", "yes"))
    assert golden.with_irrelevant(["of", "good"]).irrelevant == ("of", "the")


def test_a_table_of_words(tmp_path: Path) -> None:
    rows = [("Bad", "neg"), ("a+", "pos"), ("good", "pos"), ("odd", "pos"), ("odd", "neg"), ("the", "irrelevant")]
    data = "\n".join(json.dumps({"word": word, "label": label}) for word, label in rows).encode()
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(data))
    (tmp_path / "a.csv").write_text("term,class\n" + "\n".join(",".join(row) for row in rows))
    with pytest.warns(UserWarning, match="1 words of two labels are left out: odd"):
        golden = GoldenTokens.load(tmp_path / "a.jsonl.xz")
    assert golden.causal == {"neg": ("bad",), "pos": ("good",)}
    assert golden.irrelevant == ("the",)
    assert golden.info["not_words"] == golden.info["of_two_labels"] == 1
    with pytest.warns(UserWarning, match="two labels"):
        mapped = GoldenTokens.from_table(
            tmp_path / "a.csv", word="term", label="class", labels={"pos": "positive", "neg": "negative"}
        )
    assert mapped.labels == ("positive", "negative")
    assert mapped.causal["negative"] == ("bad",)
    with pytest.raises(ValueError, match="row 1: no column 'word', the columns are"):
        GoldenTokens.from_table(tmp_path / "a.csv")
    with pytest.raises(ValueError, match=r"labels: 'yes' is not in the table, it has \['neg', 'pos'\]"):
        GoldenTokens.from_table(tmp_path / "a.jsonl.xz", labels=("yes", "no"))
    with pytest.raises(TypeError, match="irrelevant: expected a list"):
        GoldenTokens.from_table(tmp_path / "a.jsonl.xz", irrelevant="stop")
    (tmp_path / "b.csv").write_text("word,label\n")
    with pytest.raises(ValueError, match="no rows"):
        GoldenTokens.load(tmp_path / "b.csv")
    (tmp_path / "c.jsonl").write_text('{"word": 3, "label": "a"}')
    with pytest.raises(ValueError, match="row 1: its word must be text, got int"):
        GoldenTokens.load(tmp_path / "c.jsonl")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for the lexicon packages, with a few words each; importing one of them would fail."""
    for module, name in (("vaderSentiment", "vader_lexicon.txt"), ("afinn", "data/AFINN-en-165.txt")):
        path = tmp_path / module / name
        path.parent.mkdir(parents=True)
        path.write_text("good\t1.9\t0.3\t[2]\nbad\t-2.5\nokay\t0.4\nmeh\t-0.3\n:)\t2.0\n\nnot good\t-2\n")
        (tmp_path / module / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", ["vader", "afinn", "VADER"])
def test_an_installed_lexicon(packages: Path, name: str) -> None:
    golden = GoldenTokens.from_lexicon(name, strength=1)
    assert golden.causal == {"negative": ("bad", "not good"), "positive": ("good",)}
    assert "the" in golden.irrelevant
    assert golden.info["not_words"] == 1
    named = GoldenTokens.from_lexicon(name, labels=("0", "1"), irrelevant=["the"])
    assert named.causal["1"] == ("good", "okay")
    assert named.irrelevant == ("the",)


def test_a_lexicon_refuses(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="name: expected one of afinn, vader, got 'x'"):
        GoldenTokens.from_lexicon("x")
    with pytest.raises(ValueError, match="strength: need at least 0"):
        GoldenTokens.from_lexicon("vader", strength=-1)
    with pytest.raises(ValueError, match="labels: need 2"):
        GoldenTokens.from_lexicon("vader", labels=("a", "b", "c"))
    (packages / "afinn/data/AFINN-en-165.txt").write_text("good 2\n")
    with pytest.raises(FileError, match="line 1: expected a word, a tab and a score"):
        GoldenTokens.from_lexicon("afinn")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match="'vader' is not installed: pip install vaderSentiment"):
        GoldenTokens.from_lexicon("vader")


@pytest.mark.parametrize(("name", "module"), [("vader", "vaderSentiment"), ("afinn", "afinn")])
def test_the_real_lexicon_where_it_is_installed(name: str, module: str) -> None:
    pytest.importorskip(module, exc_type=ImportError)
    golden = GoldenTokens.from_lexicon(name, strength=1)
    assert {"terrible", "awful"} <= set(golden.causal["negative"])
    assert {"wonderful", "great"} <= set(golden.causal["positive"])


CORPUS = Examples.load(
    [("the film is great", 1), ("the film is really great fun", 1), ("a great story by the sea", 1)] * 8
    + [("the film is bad", 0), ("the story is really bad", 0), ("a bad film by the sea", 0)] * 8,
    labels=("negative", "positive"),
)


@pytest.mark.parametrize("name", ["review.tsv", "review.csv"])
def test_corpus_words_go_through_a_review(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    golden = GoldenTokens.from_corpus(CORPUS, review=path)
    assert golden.causal == {"negative": ("bad",), "positive": ("great",)}
    assert {"the", "is", "a", "by", "really", "sea"} <= set(golden.irrelevant)
    assert golden.info["reviewed"] is False
    again = GoldenTokens.load(path)
    assert again == golden
    assert again.info["reviewed"] is True
    delimiter = "\t" if name.endswith("tsv") else ","
    lines = path.read_text().splitlines()
    assert lines[0].split(delimiter) == ["word", "label", "count", "log_odds", "z", "role", "keep"]
    fields = next(line for line in lines if line.startswith("bad")).split(delimiter)
    path.write_text("\n".join([*lines, *[delimiter.join([w, "negative", *fields[2:]]) for w in ("not great", "fun")]]))
    edited = GoldenTokens.from_review(path, labels=("positive", "negative"))
    assert edited.causal["negative"] == ("bad", "fun", "not great")
    assert edited.labels == ("positive", "negative")


def test_statistics_by_hand(tmp_path: Path) -> None:
    GoldenTokens.from_corpus(CORPUS, review=tmp_path / "r.tsv", least_count=1)
    row = next(line.split("\t") for line in (tmp_path / "r.tsv").read_text().splitlines() if line.startswith("bad"))
    # 24 of 24 negative texts have it, 0 of 24 positive ones: 2·log(24.5/0.5) = 7.7836, its variance 2(1/24.5 + 1/0.5).
    assert row[2:5] == ["24", "7.7836", "3.853"]


def test_corpus_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="least_count: need at least 1, got 0"):
        GoldenTokens.from_corpus(CORPUS, least_count=0)
    with pytest.raises(ValueError, match="least_z: need a number above 0"):
        GoldenTokens.from_corpus(CORPUS, least_z=float("nan"))
    with pytest.raises(ValueError, match="at least 2 labels, got 1"):
        GoldenTokens.from_corpus(CORPUS[:3])
    with pytest.raises(ValueError, match=r"review: expected a \.tsv or \.csv file"):
        GoldenTokens.from_corpus(CORPUS, review=tmp_path / "r.json")
    with pytest.raises(ValueError, match="need at least 1 word, got 0"):
        GoldenTokens.from_corpus(CORPUS, review=tmp_path / "r.tsv", least_z=99)
    assert (tmp_path / "r.tsv").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bad,negative,cause,yes", "row 1: role is one of .* got 'cause'"),
        ("bad,negative,causal,maybe", "row 1: keep is yes or no, got 'maybe'"),
        ("bad,,causal,yes", "row 1: the causal word 'bad' needs a label"),
        ("bad,negative,causal", "3 fields, but 4 columns"),
    ],
)
def test_a_review_with_mistakes_is_refused(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "r.csv").write_text(f"word,label,role,keep\n{line}\n")
    with pytest.raises(ValueError, match=message):
        GoldenTokens.from_review(tmp_path / "r.csv")
    (tmp_path / "r.csv").write_text("word,label,role,keep\n")
    with pytest.raises(ValueError, match="no rows"):
        GoldenTokens.from_review(tmp_path / "r.csv")


def test_asking_keeps_what_stands_in_the_texts(tmp_path: Path) -> None:
    asked: list[str] = []

    def ask(prompt: str) -> str:
        asked.append(prompt)
        if len(asked) == 1:
            return 'Here:\n```json\n{"Positive": ["great", "superb"], "negative": ["bad", "film"]}\n```'
        return "Positive: film, great fun\nNegative:\n- BAD\n- sea"

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        golden = GoldenTokens.from_ask(
            ask, CORPUS, task="sentiment", batch_size=24, review=tmp_path / "r.tsv", progress=False
        )
    assert golden.causal == {"negative": ("bad", "sea"), "positive": ("great",)}
    assert golden.info["tied_between_labels"] == 1  # film
    assert golden.info["not_in_the_texts"] == 3  # superb and bad; great fun, which stands in the other half
    assert golden.info["answers"][1].startswith("Positive: film")
    assert set(golden.irrelevant) == set(FUNCTION_WORDS)
    assert len(asked) == 2
    assert "This is a sentiment task with the labels of negative, positive. Extract tokens that are" in asked[0]
    assert '{"negative": ["..."], "positive": ["..."]}' in asked[0]
    assert "\n24. " in asked[0]
    assert GoldenTokens.load(tmp_path / "r.tsv") == golden


def test_asking_refuses() -> None:
    with pytest.raises(TypeError, match="ask: expected a function"):
        GoldenTokens.from_ask("gpt", CORPUS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="ask: expected text as answer, got NoneType"):
        GoldenTokens.from_ask(lambda _: None, CORPUS, progress=False)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=r"no answer could be read.*I cannot"):
        GoldenTokens.from_ask(lambda _: "I cannot help.", CORPUS, progress=False)
    with pytest.raises(ValueError, match="batch_size: need at least 1"):
        GoldenTokens.from_ask(lambda _: "", CORPUS, batch_size=0)
    with pytest.raises(ValueError, match="names must differ in more than case"):
        GoldenTokens.from_ask(lambda _: "", CORPUS, ("a", "A"))
    with pytest.raises(ValueError, match=r"causal\['positive'\]: need at least 1 word"):
        GoldenTokens.from_ask(lambda _: "negative: bad", CORPUS, progress=False)

    def broken(_: str) -> str:
        raise ConnectionError("offline")

    with pytest.raises(ConnectionError):
        GoldenTokens.from_ask(broken, CORPUS, progress=False)


def test_a_review_keeps_labels_that_are_numbers_and_refuses_what_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    row = {"word": "bad", "label": 0, "role": "causal", "keep": True}
    path.write_text(
        "".join(json.dumps(row | {"word": word, "label": i}) + "\n" for i, word in enumerate(("bad", "good")))
    )
    assert GoldenTokens.from_review(path).causal == {"0": ("bad",), "1": ("good",)}
    for word, message in (({"a": 1}, "its word must be text, got dict"), (None, "its word is missing")):
        path.write_text(json.dumps(row | {"word": word}))
        with pytest.raises(ValueError, match=f"r.jsonl: row 1: {message}"):
            GoldenTokens.from_review(path)
        with pytest.raises(ValueError, match=f"r.jsonl: row 1: {message}"):
            GoldenTokens.from_table(path)
