"""Every source gives the same examples, and every bad row is named."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import lzma
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.tiny_models import tiny_tokenizer
from spurge.engine.base.files import FileError
from spurge.engine.data.examples import Example, Examples, encode
from spurge.engine.data.table_files import read_records
from spurge.engine.data.words import Vocabulary, split_units

ROWS = [
    {"text": "a good film", "label": 1, "pair": "it is good", "group": "g1", "split": "train"},
    {"text": 'bad, "very" bad\nfilm', "label": 0, "pair": "ugly", "group": "g0", "split": "train"},
    {"text": "naïve 👍", "label": 1, "pair": "nice", "group": "g1", "split": "test"},
]
COLUMNS = {"pair": "pair", "group": "group"}
EXAMPLES = Examples([Example(r["text"], r["label"], r["pair"], r["group"]) for r in ROWS], ("0", "1"))  # type: ignore[arg-type]


def table(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode("utf-8-sig")


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "\n\n".join(map(json.dumps, rows)).encode()


def file(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def test_every_source_gives_the_same_examples(tmp_path: Path) -> None:
    sources: list[Any] = [
        ROWS,
        iter(ROWS),
        list(EXAMPLES),
        EXAMPLES,
        pandas.DataFrame(ROWS),
        datasets.Dataset.from_list(ROWS),
        file(tmp_path, "a.csv", table(ROWS, ",")),
        file(tmp_path, "a.jsonl", jsonl(ROWS)),
        file(tmp_path, "a.jsonl.xz", lzma.compress(jsonl(ROWS))),
        file(tmp_path, "A.CSV.GZ", gzip.compress(table(ROWS, ","))),
    ]
    for source in sources:
        examples = Examples.load(source, **COLUMNS)
        assert examples == EXAMPLES
        assert hash(examples) == hash(EXAMPLES)
        assert examples.fingerprint() == EXAMPLES.fingerprint()
    tabs = str(file(tmp_path, "a.tsv", table(ROWS, "\t")))
    assert Examples.load(tabs, **COLUMNS, quoting=True) == EXAMPLES
    for source in (ROWS, pandas.DataFrame(ROWS), tmp_path / "a.csv", datasets.Dataset.from_list(ROWS)):
        train = Examples.load(source, split="train", **COLUMNS)
        assert list(train) == list(EXAMPLES[:2])
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    assert Examples.load(splits, split="train", limit=2, **COLUMNS) == EXAMPLES[:2]
    assert Examples.load([("a", "b", 0), ("c", "d", 1)])[1] == Example("c", 1, "d")
    assert Examples.load([("a", 0), ("c", 1)]).targets.tolist() == [0, 1]


def test_optional_packages_are_not_imported() -> None:
    code = "import sys, spurge.engine.data.examples; assert not {'pandas', 'datasets'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def load_labels(values: list[Any], labels: Any = None) -> Examples:
    return Examples.load([{"text": "x", "label": value} for value in values], labels=labels)


def test_labels_are_numbers_or_names() -> None:
    assert load_labels([0, 2]).labels == ("0", "1", "2")
    assert load_labels([np.int64(1), 1.0, True, "1", "1.0", np.float32(1)]).targets.tolist() == [1] * 6
    assert load_labels(["pos", "neg"]).labels == ("neg", "pos")
    assert load_labels(["pos", "NEG"], ("pos", "neg")).targets.tolist() == [0, 1]
    assert load_labels([1, 0], ("pos", "neg")).targets.tolist() == [1, 0]
    assert load_labels(["1", 5], tuple("12345")).targets.tolist() == [0, 4]  # stars: names come first
    assert load_labels([0], ("neg", "pos")).labels == ("neg", "pos")
    names = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    source = datasets.Dataset.from_dict({"text": ["a"], "label": [1]}, features=names)
    assert Examples.load(source).labels == ("no", "yes")
    assert Examples.load(datasets.DatasetDict({"t": source}), split="t").labels == ("no", "yes")
    assert Examples.load(source, labels=["Yes", "no"])[0].label == 0
    again = Examples.load(Examples([Example("x", 1)], ("1", "2")))
    assert again.labels == ("1", "2")
    assert again[0].label == 1


def named(names: list[str], labels: list[int], groups: list[int] | None = None) -> datasets.Dataset:
    """A data set whose labels, and groups, are numbers that it names."""
    columns: dict[str, list[Any]] = {"text": ["x"] * len(labels), "label": labels, "group": groups or labels}
    kind = datasets.ClassLabel(names=names)
    features = {"text": datasets.Value("string"), "label": kind, "group": kind}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


NLI = ["entailment", "neutral", "contradiction"]


@pytest.mark.parametrize(
    ("names", "wanted", "numbers"),
    [
        (NLI, ["CONTRADICTION", "NEUTRAL", "ENTAILMENT"], [2, 1, 0]),
        (NLI, ["neutral", "cont", "ent"], [2, 0, 1]),
        (NLI, ["LABEL_0", "LABEL_1", "LABEL_2"], [0, 1, 2]),
        (NLI, None, [0, 1, 2]),
        (["1", "2", "3"], None, [0, 1, 2]),  # a number counts the names, also where these are numbers
        (["1", "2", "3"], ["3", "2", "1"], [2, 1, 0]),
        (["0", "1", "2"], NLI, [0, 1, 2]),
    ],
)
def test_numbers_that_the_data_name_are_labels_by_name(names: Any, wanted: Any, numbers: list[int]) -> None:
    source = named(names, [0, 1, 2])
    for examples in (
        Examples.load(source, labels=wanted),
        Examples.load(datasets.DatasetDict({"t": source}), split="t", labels=wanted),
        Examples.load(Examples([Example("x", label) for label in (0, 1, 2)], names), labels=wanted),
    ):
        assert examples.targets.tolist() == numbers
        assert examples.labels == tuple(wanted or names)
    assert Examples.load(source, group="group").groups == tuple(sorted(names))


def test_numbers_whose_names_are_no_labels_are_refused_by_row() -> None:
    assert Examples.load(named(NLI, [2, 0]), labels=["entailment", "contradiction"]).targets.tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"row 2: label 'neutral' is none of \('contradiction', 'entailment'\)"):
        Examples.load(named(NLI, [0, 1]), labels=["contradiction", "entailment"])
    with pytest.raises(ValueError, match=r"row 1: label 'neg' is none of \('negative', 'negated'\)"):
        Examples.load(named(["neg", "pos"], [0]), labels=["negative", "negated"])
    with pytest.raises(ValueError, match="row 2: -1 is out of range"):
        Examples.load(named(NLI, [0, -1]))


@pytest.mark.parametrize(
    ("values", "labels", "message"),
    [
        ([0, -1], None, "row 2: label -1 is out of range"),
        ([0, 2], ("a", "b"), r"row 2: label 2 is out of range, the 2 labels are \('a', 'b'\)"),
        (["a", "c"], ("a", "b"), "row 2: label 'c' is none of"),
        ([0, None], None, "row 2: its label is missing"),
        ([0, float("nan")], None, "row 2: its label is missing"),
        ([0, pandas.NA], None, "row 2: its label is missing"),
        (["a", " "], None, "row 2: its label is missing"),
        ([0, 0.5], None, "row 2: a label is a whole number or a name, got float 0.5"),
        ([0, [1]], None, "row 2: a label is a whole number or a name, got list"),
        ([0, float("inf")], None, "row 2: a label is a whole number"),
        ([0, 10**12], None, "is this column the label"),
        ([0], ("a", "a"), "names must differ"),
        ([0], (), "need at least 1 name"),
        (["A", "a"], ("a", "A", "á"), None),
        (["Á"], ("á", "Á "), None),
        (["Ab"], ("ab", "aB"), "is none of"),
    ],
)
def test_bad_labels_are_named(values: list[Any], labels: Any, message: str | None) -> None:
    if message is None:
        load_labels(values, labels)
        return
    with pytest.raises(ValueError, match=message):
        load_labels(values, labels)


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ([], {}, ValueError, "source: no rows"),
        ([{"text": "a"}], {}, ValueError, r"row 1: no column 'label', the columns are \['text'\]"),
        ([{"label": 1}], {}, ValueError, r"row 1: no column 'text', .*\(text= or --text-column names another\)$"),
        ([{"text": None, "label": 1}], {}, ValueError, "row 1: its text is missing"),
        ([("a", 1), (float("nan"), 1)], {}, ValueError, "row 2: its text is missing"),
        ([(3, 1)], {}, ValueError, "row 1: its text must be text, got int 3"),
        ([(" \n", 1)], {}, ValueError, "row 1: its text is empty"),
        (
            [{"text": "a", "label": 1, "group": None}],
            {"group": "group"},
            ValueError,
            "row 1: its group is missing",
        ),
        ([{"text": "a", "label": 1}], {"pair": "hypothesis"}, ValueError, "row 1: no column 'hypothesis'"),
        ([("a", 1), ("a", "b", 1)], {}, ValueError, "row 2: either all rows are pairs"),
        ([("a", 1)], {"split": "train"}, ValueError, "row 1: has no column 'split', being a tuple"),
        (
            [{"text": "a", "label": 1, "split": "dev"}],
            {"split": "train"},
            ValueError,
            r"the splits are \['dev'\]",
        ),
        ([("a",)], {}, TypeError, "row 1: expected dict, Example or"),
        (["a"], {}, TypeError, "row 1: expected dict, Example or .* got str"),
        ({"text": ["a"]}, {}, TypeError, "source: expected a path"),
        (3, {}, TypeError, "source: expected a path, .* got int"),
        ([("a", 1)], {"labels": "ab"}, TypeError, "labels: expected a sequence of names"),
        ([("a", 1)], {"labels": (0, 1)}, TypeError, "labels: expected a sequence of names"),
        ([("a", 1)], {"limit": 0}, ValueError, "limit: need at least 1 row, got 0"),
        (
            datasets.DatasetDict({"a": datasets.Dataset.from_list(ROWS)}),
            {},
            ValueError,
            "split: expected one of a, got",
        ),
    ],
)
def test_bad_rows_are_named(source: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Examples.load(source, **options)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "format not known, expected .csv"),
        ("a", b"", "format not known"),
        ("a.xz", b"", "format not known"),
        ("a.csv", b"", "is empty"),
        ("a.csv", b"text,label\n", "no rows"),
        ("a.csv", b"text,label\na,1,2\n", "line 2: 3 fields, but 2 columns"),
        ("a.csv", b"text,text\na,1\n", "two columns have the same name"),
        ("a.csv", b'text,label\n"a,1\nb,2', "line 3: .*a quote inside a quoted field is written twice"),
        ("a.tsv", b"text\tlabel\n\xff\t1\n", "not UTF-8"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text"', "line 2 is not JSON"),
        ("a.jsonl", b"[1]", "line 1: expected a JSON object, got list"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl.xz", b"nonsense", "truncated or damaged"),
        ("a.jsonl.gz", gzip.compress(jsonl(ROWS))[:-9], "truncated or damaged"),
        ("a.jsonl.xz", lzma.compress(jsonl(ROWS))[:-9], "truncated or damaged"),
        ("a.csv.gz", b"nonsense", "truncated or damaged"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Examples.load(file(tmp_path, name, data))


def test_absent_files_and_folders_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Examples.load(tmp_path / "a.csv")
    (tmp_path / "b.csv").mkdir()
    with pytest.raises(FileError, match="is a folder, expected a file"):
        Examples.load(tmp_path / "b.csv")


def test_long_fields_are_read_and_the_limit_of_csv_comes_back(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    path = file(tmp_path, "a.csv", table([{"text": "word " * 100_000, "label": 1}], ","))
    assert len(Examples.load(path)[0].text) == 500_000
    next(read_records(path))
    assert csv.field_size_limit() == before


@settings(max_examples=60, deadline=None)
@given(
    data=st.binary(max_size=80),
    name=st.sampled_from(["a.csv", "a.tsv", "a.jsonl", "a.jsonl.gz", "a.jsonl.xz"]),
)
def test_any_bytes_give_examples_or_a_value_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str
) -> None:
    with contextlib.suppress(ValueError):
        Examples.load(file(tmp_path_factory.mktemp("any"), name, data))


visible = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip)
rows_of_text = st.lists(st.tuples(visible, st.integers(0, 3)), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(rows=rows_of_text, delimiter=st.sampled_from([",", "\t"]))
def test_any_text_survives_a_table(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int]], delimiter: str
) -> None:
    data = table([{"text": text, "label": label} for text, label in rows], delimiter)
    path = file(tmp_path_factory.mktemp("t"), "a.csv" if delimiter == "," else "a.tsv", data)
    assert Examples.load(path) == Examples.load(rows)


@settings(max_examples=60)
@given(rows=rows_of_text, seed=st.integers(0, 9), size=st.integers(1, 4))
def test_batches_and_samples_keep_the_rows(rows: list[tuple[str, int]], seed: int, size: int) -> None:
    examples = Examples.load(rows)
    assert [row for batch in examples.batches(size) for row in batch] == list(examples)
    assert max(map(len, examples.batches(size))) <= size
    shuffled = examples.sample(len(examples), seed)
    assert sorted(shuffled, key=hash) == sorted(examples, key=hash)
    assert shuffled == examples.sample(len(examples), seed)
    assert examples.subset(examples.draw(1, seed)) == examples.sample(1, seed)
    assert examples[0] == examples.subset([0])[0]
    assert examples.labels == shuffled.labels
    assert (shuffled.fingerprint() == examples.fingerprint()) == (list(shuffled) == list(examples))
    assert examples.targets.tolist() == [label for _, label in rows]


def test_groups_and_texts() -> None:
    assert EXAMPLES.groups == ("g0", "g1")
    assert len(EXAMPLES.in_group("g1")) == 2
    assert EXAMPLES.texts[0] == ("a good film", "it is good")
    assert Examples.load([("a", 0)]).groups == ()
    assert Examples.load([("a", 0)]).texts == ["a"]
    numbered = Examples.load([{"text": "a", "label": 0, "group": np.int64(3)}], group="group")
    assert numbered.groups == ("3",)
    assert repr(EXAMPLES) == "Examples(3 rows, labels 0, 1)"
    prints = {
        Examples(rows, labels).fingerprint()
        for rows, labels in (
            ([Example("a", 0)], "01"),
            ([Example("a", 1)], "01"),
            ([Example("a", 0)], "02"),
            ([Example("a", 0, "b")], "01"),
            ([Example("a", 0, None, "b")], "01"),
        )
        for labels in [tuple(labels)]
    }
    assert len(prints) == 5


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: EXAMPLES.in_group("x"), ValueError, "no row is in 'x', the groups are"),
        (lambda: EXAMPLES.subset([3]), ValueError, "indices: must lie in 0 to 2, got 3"),
        (lambda: EXAMPLES.subset([-1]), ValueError, "indices: must lie in 0 to 2, got -1"),
        (lambda: EXAMPLES.subset([]), ValueError, "indices: need at least 1"),
        (lambda: EXAMPLES.sample(4), ValueError, "n: must lie in 1 to 3, got 4"),
        (lambda: EXAMPLES.sample(0), ValueError, "n: must lie in 1 to 3, got 0"),
        (lambda: EXAMPLES.batches(0), ValueError, "size: need at least 1, got 0"),
        (lambda: Examples([], ("a",)), ValueError, "rows: need at least 1"),
        (lambda: Examples([("a", 1)], ("a",)), TypeError, "row 1: expected an Example"),  # type: ignore[list-item]
        (lambda: Examples([Example("a", 1)], ("a",)), ValueError, "row 1: label 1, but only 1 labels"),
        (lambda: Example("", 1), ValueError, "text: is empty"),
        (lambda: Example("a", -1), ValueError, "label: counts from 0, got -1"),
        (lambda: Example("a", True), TypeError, "label: expected int, got bool"),
        (lambda: Example("a", 1.0), TypeError, "label: expected int, got float"),  # type: ignore[arg-type]
        (lambda: Example(None, 1), TypeError, "text: expected str, got NoneType"),  # type: ignore[arg-type]
        (lambda: Example("a", 1, 3), TypeError, "pair: expected str, got int"),  # type: ignore[arg-type]
    ],
)
def test_calls_refuse(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_damage_is_a_file_error(tmp_path: Path) -> None:
    with pytest.raises(FileError):
        list(read_records(file(tmp_path, "a.jsonl", b"{")))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "good": 2, "film": 3}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]")


def test_encode_pads_cuts_and_keeps_the_words(tokenizer: PreTrainedTokenizerFast) -> None:
    examples = Examples.load([("good film good", 0), ("film", 1)])
    inputs = encode(tokenizer, examples, device="cpu")
    assert isinstance(inputs, dict)
    assert inputs["input_ids"].tolist() == [[2, 3, 2], [3, 0, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert inputs["input_ids"].dtype == torch.int64
    units = split_units(tokenizer, inputs, examples.texts, Vocabulary())
    assert units.ids.tolist() == [[0, 1, 0], [1, -1, -1]]
    assert encode(tokenizer, examples, max_length=2)["input_ids"].tolist() == [[2, 3], [3, 0]]
    assert encode(tokenizer, ["film"])["input_ids"].tolist() == [[3]]
    assert encode(tokenizer, [("film", "good")])["input_ids"].tolist() == [[3, 2]]


def test_encode_refuses(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="examples: need at least 1"):
        encode(tokenizer, [])
    with pytest.raises(TypeError, match="examples: expected Example, str or a pair of str, got int"):
        encode(tokenizer, [1])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="max_length: need at least 1, got 0"):
        encode(tokenizer, ["a"], max_length=0)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, unk_token="[UNK]")
    with pytest.raises(ValueError, match=r"no padding token.*tokenizer.pad_token = tokenizer.eos_token"):
        encode(bare, ["a", "b c"])
    assert encode(bare, ["film"])["input_ids"].tolist() == [[3]]


@pytest.mark.parametrize(
    ("length", "texts", "message"),
    [
        (1, ["a good long film"], "need at least 3, got 1; 2 special tokens around a text leave no room for it"),
        (2, ["a good long film"], "need at least 3, got 2"),
        (2, [("a good film", "very sad")], "need at least 4, got 2; 3 special tokens around a pair leave no room"),
        (0, ["a"], "got 0"),
    ],
)
def test_a_limit_without_room_for_a_text_is_refused(length: int, texts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"max_length: .*{message}"):
        encode(tiny_tokenizer(), texts, max_length=length)
    assert encode(tiny_tokenizer(), texts, max_length=4)["input_ids"].shape == (1, min(4, len(texts[0]) + 2))


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        (["a", "b\ud800"], ValueError, r"text 1 \(from 0\) is not valid Unicode: '.ud800' at character 1"),
        ([("a", "\udfff")], ValueError, "is not valid Unicode"),
        ([("a", None)], TypeError, "expected Example, str or a pair of str, got NoneType"),
        (["a", ("b", "c")], ValueError, r"either all rows are pairs or none is, row 1 \(from 0\) differs"),
    ],
)
def test_encode_refuses_what_is_no_text(texts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        encode(tiny_tokenizer(), texts)


def test_text_that_is_not_unicode_is_named_by_row_and_file(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", b'{"text": "a", "label": 1}\n{"text": "b\\ud83d", "label": 1}\n')
    with pytest.raises(ValueError, match=r"a.jsonl: row 2: its text is not valid Unicode: '.ud83d' at character 1"):
        Examples.load(path)
    with pytest.raises(ValueError, match="text: is not valid Unicode"):
        Example("\ud800", 1)


def test_a_misspelt_column_is_named_with_its_file_and_the_column_it_may_be(tmp_path: Path) -> None:
    path = file(tmp_path, "a.csv", b"Text,label,notes\na,1,x\n")
    with pytest.raises(ValueError, match=r"a.csv: row 1: no column 'text', .*; did you mean 'Text'\?"):
        Examples.load(path)
    with pytest.raises(ValueError, match=r"no column 'lable', .*; did you mean 'label'\?"):
        Examples.load(path, text="Text", label="lable")
    with pytest.raises(ValueError, match=r"no column 'premise', the columns are \['Text', 'label', 'notes'\]$"):
        Examples.load(path, text="premise")
