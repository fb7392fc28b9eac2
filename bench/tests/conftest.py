"""Made texts that several tests of experiments read."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from experiments import tasks
from spurge.demo import grammar
from spurge.demo.grammar import Grammar


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(lzma.compress("\n".join(map(json.dumps, rows)).encode()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sentences of the demo's grammar in the form of the real files."""
    rows = Grammar(train=240, share=0.0).training_rows(0)
    split = [{**row, "split": ("train", "dev", "test")[i % 3]} for i, row in enumerate(rows)]
    for name in ("sst2_sentences", "imdb_cad_original", "imdb_cad_revised"):
        _write(tmp_path / "sentiment" / f"{name}.jsonl.xz", split)
    for name in ("yelp_small", "cr_customer_reviews"):
        _write(tmp_path / "sentiment" / f"{name}.jsonl.xz", [{**row, "split": "test"} for row in rows * 5])
    words = [{"word": word, "label": label} for label, own in grammar.CAUSAL.items() for word in own]
    _write(tmp_path / "lexicons" / "opinion_lexicon_hu_liu.jsonl.xz", words)
    pairs = [
        {"premise": "They said so.", "hypothesis": row["text"], "label": tasks.data.INFERENCE[i % 3], "split": part}
        for i, row in enumerate(rows)
        for part in ("train", "validation", "test")
    ]
    for name in ("snli_subset", "mnli_subset", "breaking_nli"):
        _write(tmp_path / "nli" / f"{name}.jsonl.xz", pairs)
    _write(tmp_path / "nli" / "snli_cad.jsonl.xz", [{**row, "part": "revised_premise"} for row in pairs])
    labels = ("entailment", "neutral", "contradiction")
    cues = [{"word": word, "label": labels[i % 3]} for i, word in enumerate(row["word"] for row in words)]
    _write(tmp_path / "lexicons" / "snli_hypothesis_cues_pmi.jsonl.xz", cues)
    return tmp_path
