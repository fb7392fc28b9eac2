"""The search on a tiny classifier that leans on a planted phrase, and what becomes of its table."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers import planted_texts
from helpers.planted_texts import PHRASE
from helpers.tiny_models import tiny, tiny_language, tiny_tokenizer
from spurge import Examples, Found, GoldenTokens, Verbalizer, find
from spurge.engine.data.examples import Example
from spurge.methods.find.found import Row

SMALL = {"candidates": 12, "texts": 12, "progress": False}


@pytest.fixture(scope="module")
def found() -> Found:
    return find(planted_texts.model(), tiny_tokenizer(), planted_texts.train(), **SMALL)


def phrase_of(found: Found) -> Row:
    return next(row for row in found.rows if row.word == PHRASE)


def test_the_planted_phrase_leads_as_one_candidate(found):
    leading = found.rows[0]
    assert (leading.word, leading.kind, leading.label) == (PHRASE, "phrase", "positive")
    assert not any(row.word in ("on", "tuesday", "perhaps") for row in found.rows)
    assert leading.q < 0.001
    assert leading.measured
    assert 0 < leading.low <= leading.lean <= leading.high
    assert leading.swap > 0.1
    assert leading.insert > 0.1


def test_what_is_leaned_on_most_leads_whatever_its_role(found):
    assert [row.weight for row in found.rows] == sorted((row.weight for row in found.rows), reverse=True)


def test_its_numbers_are_those_of_the_texts(found):
    examples, row = planted_texts.train(), phrase_of(found)
    having = [one for one in examples if PHRASE in one.text]
    assert row.count == len(having)
    assert row.share == pytest.approx(100 * sum(one.label for one in having) / len(having))
    against = Examples([one for one in having if one.label == 0], examples.labels)
    assert row.against_count == len(against)
    assert row.against == pytest.approx(planted_texts.accuracy(planted_texts.model(), against))
    assert all(PHRASE in text for text in row.examples)


def test_it_is_the_same_for_a_seed_and_in_any_batches(found):
    again = find(planted_texts.model(), tiny_tokenizer(), planted_texts.train(), batch_size=17, memory="1MB", **SMALL)
    assert [row.word for row in again.rows] == [row.word for row in found.rows]
    for old, new in zip(found.rows, again.rows, strict=True):
        assert new.lean == pytest.approx(old.lean, abs=1e-4, nan_ok=True)
    other = find(planted_texts.model(), tiny_tokenizer(), planted_texts.train(), seed=1, **SMALL)
    assert phrase_of(other).lean != phrase_of(found).lean


def test_the_model_comes_back_as_it_was(found):
    model = copy.deepcopy(planted_texts.model()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find(model, tiny_tokenizer(), planted_texts.train(), **{**SMALL, "candidates": 2, "texts": 2})
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_goes_on_from_finished_blocks(found, tmp_path, monkeypatch):
    args = planted_texts.model(), tiny_tokenizer(), planted_texts.train()
    find(*args, resume=tmp_path, **SMALL)
    assert list(tmp_path.glob("*.safetensors"))
    monkeypatch.setattr("spurge.methods.find.passes.Passes._run", lambda *_: pytest.fail("ran again"))
    assert [row.lean for row in find(*args, resume=tmp_path, **SMALL).rows] == pytest.approx(
        [row.lean for row in found.rows], nan_ok=True
    )
    with pytest.raises(ValueError, match="other settings, data or model"):
        find(*args, resume=tmp_path, max_length=9, **SMALL)


def test_passes_are_a_budget(found):
    args = planted_texts.model(), tiny_tokenizer(), planted_texts.train()
    short = find(*args, passes=300, **SMALL)
    assert short.info["passes"] - len(planted_texts.train()) <= 300
    assert short.info["passes"] < found.info["passes"]


def test_columns_and_topics_are_candidates():
    examples = planted_texts.train()
    columns = {"source": ["tuesday" if PHRASE in row.text else "other" for row in examples]}
    args = planted_texts.model(), tiny_tokenizer(), examples
    found = find(*args, columns=columns, topics=3, **{**SMALL, "candidates": 30, "texts": 2})
    column = next(row for row in found.rows if row.word == "source = tuesday")
    assert not column.measured
    assert column.lean > 0
    assert any(row.kind == "topic" for row in found.rows)
    having = found.feature("source = tuesday", examples, columns)
    assert having.tolist() == found.feature(PHRASE, examples).tolist()


def test_pairs_of_texts_have_pairs_of_words_and_overlap():
    draw = random.Random(0)
    rows = []
    for _ in range(400):
        first, second = draw.choice(("film", "food")), draw.choice(("good", "bad"))
        spoken = draw.choice(("today", "clearly", "perhaps"))
        label = int((first, second) == ("film", "good"))
        noun = first if draw.random() < 0.5 else {"film": "food", "food": "film"}[first]
        pair = f"the {noun} was {second}"
        rows.append(Example(f"this is a {first} {spoken}", label, pair))
    found = find(
        tiny("bert"), tiny_tokenizer(), Examples(rows, ("no", "yes")), **{**SMALL, "candidates": 30, "texts": 4}
    )
    by_kind = {kind: [row for row in found.rows if row.kind == kind] for kind in ("pair", "overlap", "word")}
    assert "film → good" in [row.word for row in by_kind["pair"]]
    assert by_kind["overlap"]
    assert {row.place for row in by_kind["word"]} == {"text", "second text"}
    pair = next(row for row in by_kind["pair"] if row.word == "film → good")
    assert (pair.label, pair.share) == ("yes", 100.0)
    examples = Examples(rows, ("no", "yes"))
    assert found.feature("film → good", examples).tolist() == [bool(row.label) for row in rows]


def test_a_lexicon_moves_the_roles(found):
    args = planted_texts.model(), tiny_tokenizer(), planted_texts.train()
    listed = find(*args, lexicon=planted_texts.GOLDEN, **SMALL)
    before = {row.word: row.causal for row in found.rows}
    for row in listed.rows:
        if row.word in planted_texts.GOOD and row.label == "positive" and row.word in before:
            assert row.causal > before[row.word]
    assert any(row.role == "causal" for row in listed.rows)


def test_mistakes_are_named():
    model, tokenizer, examples = planted_texts.model(), tiny_tokenizer(), planted_texts.train()
    with pytest.raises(ValueError, match="columns: 'a' needs a value for each of 400 texts, got 1"):
        find(model, tokenizer, examples, columns={"a": [1]})
    with pytest.raises(ValueError, match="candidates: need at least 1"):
        find(model, tokenizer, examples, candidates=0)
    with pytest.raises(ValueError, match="least_count: 400 examples are too few"):
        find(model, tokenizer, examples, least_count=300)
    with pytest.raises(ValueError, match="at least 2 labels"):
        find(model, tokenizer, Examples([row for row in examples if row.label], examples.labels))
    with pytest.raises(TypeError, match="examples: expected Examples"):
        find(model, tokenizer, ["text"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="labels"):
        find(model, tokenizer, examples, lexicon=GoldenTokens.from_words(a=["x"], b=["y"], c=["z"]))


# The table


def test_a_reviewed_table_becomes_golden_words(found, tmp_path):
    path = tmp_path / "found.tsv"
    found.save(path)
    lines = path.read_text().splitlines()
    names = lines[0].split("\t")
    rows = [dict(zip(names, line.split("\t"), strict=True)) for line in lines[1:]]
    for row in rows:  # as a person would
        if row["word"] in planted_texts.GOOD + planted_texts.BAD:
            row["role"] = "causal"
        elif row["word"] == PHRASE:
            row["role"] = "spurious"
        else:
            row["keep"] = "no"
    path.write_text("\n".join(["\t".join(names), *("\t".join(row.values()) for row in rows)]) + "\n")
    reviewed = Found.load(path, planted_texts.LABELS)
    golden = reviewed.golden()
    assert golden == GoldenTokens.load(path).for_labels(planted_texts.LABELS)
    assert golden.irrelevant == (PHRASE,)
    assert set(golden.causal["positive"]) <= set(planted_texts.GOOD)
    grouped = reviewed.groups(planted_texts.train())
    assert grouped.groups == (
        "negative, none",
        f"negative, {PHRASE}",
        "positive, none",
        f"positive, {PHRASE}",
    )
    assert all((row.group or "").endswith(PHRASE) == (PHRASE in row.text) for row in grouped)


def test_a_review_by_words(found):
    good, bad = list(planted_texts.GOOD), [*planted_texts.BAD, "not a candidate"]
    reviewed = found.reviewed(spurious=[PHRASE], causal={"positive": good, "negative": bad})
    golden = reviewed.golden()
    assert golden.irrelevant == (PHRASE,)
    assert {name: set(words) for name, words in golden.causal.items()} == {"positive": {*good}, "negative": {*bad}}
    assert [row.word for row in reviewed.rows[: len(found)]] == [row.word for row in found.rows]
    alone = found.reviewed(spurious=[found.of_role("causal")[0].word])
    assert len(alone.of_role("causal")) == len(found.of_role("causal")) - 1
    for change, message in (
        ({"spurious": ["unheard"]}, "spurious: 'unheard' is no candidate"),
        ({"causal": {"fair": ["good"]}}, "causal: expected one of"),
        ({"causal": {"positive": ["good"], "negative": ["good"]}}, "causal: 'good' is named twice"),
    ):
        with pytest.raises(ValueError, match=message):
            found.reviewed(**change)
    with pytest.raises(ValueError, match="spurious: 'fine' is no candidate: there are none"):
        replace(found, rows=()).reviewed(spurious=["fine"])


def test_a_table_comes_back_as_it_was(found, tmp_path):
    found.save(tmp_path / "found.tsv")
    again = Found.load(tmp_path / "found.tsv", found.labels)
    for old, new in zip(found.rows, again.rows, strict=True):
        assert (new.word, new.role, new.count, new.measured, new.examples) == (
            old.word,
            old.role,
            old.count,
            old.measured,
            old.examples,
        )
        assert new.lean == pytest.approx(old.lean, rel=1e-4, nan_ok=True)
    with pytest.raises(ValueError, match=r"ends in \.tsv"):
        found.save(tmp_path / "found.txt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("film\tword\tpositive\tcause\tyes", "role is one of"),
        ("film\tthing\tpositive\tcausal\tyes", "kind is one of"),
        ("film\tword\tpositive\tcausal\tmaybe", "keep is yes or no"),
        ("film\tword\tother\tcausal\tyes", "label 'other' is none of"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, line: str, message: str):
    path = tmp_path / "found.tsv"
    path.write_text(f"word\tkind\tlabel\trole\tkeep\n{line}\n")
    with pytest.raises(ValueError, match=f"row 1: {message}"):
        Found.load(path, planted_texts.LABELS)


def test_tables_are_narrow_and_notebooks_show_one(found):
    long = replace(found.rows[0], word="a very long phrase " * 6, label="a label with a long name")
    wide = replace(found, rows=(long, *found.rows))
    assert max(map(len, str(wide).splitlines())) <= 80
    shown = replace(found, rows=(replace(found.rows[0], word="<b>"),))._repr_html_()
    assert "&lt;b&gt;" in shown
    assert "<b>" not in shown
    assert len(found.top(3)) == 3
    assert repr(found).startswith(f"Found({len(found)} candidates: ")


def test_what_is_no_candidate_is_refused(found):
    with pytest.raises(ValueError, match="'nothing' is no candidate"):
        found.feature("nothing", planted_texts.train())
    none = replace(found, rows=tuple(replace(row, role="undecided") for row in found.rows))
    with pytest.raises(ValueError, match="no candidate is spurious"):
        none.groups(planted_texts.train())


def test_a_language_model_that_classifies_by_label_words_is_searched_too():
    language, tokenizer = tiny_language("llama"), tiny_tokenizer(decoder=True)
    words = {"negative": ["bad"], "positive": ["good"]}
    model, prompted = Verbalizer(words, "{text} it was").wrap(language, tokenizer)
    found = find(model, prompted, planted_texts.train(), **{**SMALL, "candidates": 4, "texts": 2})
    assert PHRASE in [row.word for row in found.rows]
