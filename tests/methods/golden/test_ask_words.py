"""Answers of language models come in many shapes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spurge.methods.golden.ask_words import parse, prompt

LABELS = ("negative", "positive")
WANTED = {"negative": ["fail"], "positive": ["charm", "well-made"]}


@pytest.mark.parametrize(
    "answer",
    [
        '{"negative": ["fail"], "positive": ["charm", "well-made"]}',
        'Of course!\n```json\n{"NEGATIVE": "fail",\n "Positive ": ["charm", "well-made", 3]}\n```\nAnything else?',
        '{"task": "x"} {"tokens": {"negative": ["fail"], "positive": ["charm", "well-made"]}}',
        "negative: fail\npositive: charm, well-made",
        "**Negative**: fail.\n\n**Positive**:\n\n* charm\n* `well-made`\n",
        "1. Tokens for negative: 'fail'\n2. Tokens for positive: “charm”; “well-made”",
        "# Negative\n- fail: it speaks of failure\n# Positive\n- charm: a good trait\n- well-made: praise\n"
        "More remarks:\nok",
        '{"negative": ["fail"],\n "positive": ["charm", "well-made',
        '{\n  "negative": [\n    "fail"\n  ],\n  "positive": [\n    "charm",\n    "well-made"',
    ],
)
def test_shapes(answer: str) -> None:
    assert parse(answer, LABELS) == WANTED


@pytest.mark.parametrize("answer", ["", "I cannot do that.", "{}", "[1, 2]", '{"other": ["x"]}', "{" * 2000])
def test_nothing_to_read(answer: str) -> None:
    assert parse(answer, LABELS) == {}


@given(st.text())
def test_any_answer_is_read_without_an_error(answer: str) -> None:
    for text in (answer, "positive: " + answer, "{" + answer):
        assert set(parse(text, LABELS)) <= set(LABELS)


@given(st.dictionaries(st.sampled_from(LABELS), st.lists(st.text()), min_size=1), st.text("ab \n:-"))
def test_json_is_read_whole_wherever_it_stands(value: dict[str, list[str]], around: str) -> None:
    assert parse(around + json.dumps(value) + around, LABELS) == value


def test_a_prompt_has_one_line_per_text() -> None:
    lines = prompt(["a\nb", ("c", "d")], LABELS, "sentiment analysis").splitlines()
    assert lines[-2:] == ["1. a b", "2. c / d"]
