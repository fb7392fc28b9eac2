"""Words that go with a label in a corpus, and the file in which a person decides which of them are causes."""

from __future__ import annotations

import csv
import io
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spurge.engine.base import files
from spurge.engine.base.checks import integer
from spurge.engine.data.examples import Examples
from spurge.engine.data.rows import is_missing, of_file, read_column, read_name, read_text
from spurge.engine.data.table_files import read_records
from spurge.engine.data.words import split_words

COLUMNS = ("word", "label", "count", "log_odds", "z", "role", "keep")
ROLES = ("causal", "irrelevant", "none")
_ROLES_OF_FIND = {"spurious": "irrelevant", "undecided": "none"}  # what a table of `spurge.find` calls them
_KINDS = ("word", "phrase")  # of rows of such a table that are words
_KEEP = {
    "yes": True,
    "y": True,
    "1": True,
    "true": True,
    "x": True,
    "no": False,
    "n": False,
    "0": False,
    "false": False,
}

# Closed-class words of English. Negations are left out on purpose: "not" decides labels.
_FUNCTION_WORDS = """
    a an the this that these those such
    i me my mine myself you your yours yourself yourselves he him his himself she her hers herself it its itself
    we us our ours ourselves they them their theirs themselves one oneself somebody someone something anybody anyone
    anything everybody everyone everything each other another
    what when where which who whom whose why how whatever whenever wherever whoever whether
    is am are was were be been being do does did doing done have has had having
    can could may might must shall should will would ought
    of in on at by for with from to into onto upon about above across after against along among around as before behind
    below beneath beside besides between beyond during inside near off out outside over past per since through
    throughout toward towards under until up via within down
    and or but if because while although though than then so once again further here there also too
    s t d ll m re ve i'm i've i'd i'll you're you've you'd you'll he'd he'll she'd she'll it'll it'd we're we've we'd
    we'll they're they've they'd they'll that'll there'd who'd who'll
"""
FUNCTION_WORDS: tuple[str, ...] = tuple(_FUNCTION_WORDS.split())


def statistics(examples: Examples, *, least_count: int = 5, least_z: float = 3.0) -> list[dict[str, Any]]:
    r"""How strongly each word goes with a label, over texts that have the word and texts that do not.

    .. math:: \delta = \log\frac{a + .5}{b + .5} - \log\frac{c + .5}{d + .5}, \qquad
              z = \delta \Big/ \sqrt{\tfrac{1}{a+.5} + \tfrac{1}{b+.5} + \tfrac{1}{c+.5} + \tfrac{1}{d+.5}}

    a of the label's texts have the word and b do not; c of the other texts have it and d do not. The halves keep the
    log-odds finite (Haldane 1956, Anscombe 1956).

    Each word gets the label of its largest z and a proposed role: ``irrelevant`` for function words, and for words in
    at least one of 200 texts whose z stays within ±1 for every label; ``causal`` from ``least_z`` on; ``none``
    otherwise.

    Args:
        examples: at least one text of each of two labels.
        least_count: leave out words that fewer texts have.
        least_z: smallest z of a causal word.

    Returns:
        One dict of :data:`COLUMNS` per word, causal ones first, strongest first.

    Raises:
        ValueError: a setting out of range, or texts of fewer than 2 labels.
    """
    least_count = integer("least_count", least_count, 1)
    if not least_z > 0:
        raise ValueError(f"least_z: need a number above 0, got {least_z!r}")
    texts = Counter(row.label for row in examples)
    if len(texts) < 2:
        raise ValueError(f"examples: need texts of at least 2 labels, got {len(texts)}")
    having: dict[str, Counter[int]] = {}
    for row in examples:
        for word in set(split_words(row.text)) | set(split_words(row.pair or "")):
            having.setdefault(word, Counter())[row.label] += 1
    function = set(FUNCTION_WORDS)
    rows = []
    for word, counts in having.items():
        count = sum(counts.values())
        if count < least_count:
            continue
        scores = {label: _log_odds(counts[label], texts[label], count, len(examples)) for label in texts}
        label = max(scores, key=lambda name: (scores[name][1], -name))
        log_odds, z = scores[label]
        role = "none"
        if word in function or (count * 200 >= len(examples) and max(abs(s[1]) for s in scores.values()) <= 1):
            role = "irrelevant"
        elif z >= least_z:
            role = "causal"
        rows.append(
            {
                "word": word,
                "label": examples.labels[label],
                "count": count,
                "log_odds": round(log_odds, 4),
                "z": round(z, 3),
                "role": role,
                "keep": "no" if role == "none" else "yes",
            }
        )
    return sorted(rows, key=lambda row: (ROLES.index(str(row["role"])), row["label"], -float(row["z"]), row["word"]))


def _log_odds(with_word: int, of_label: int, count: int, total: int) -> tuple[float, float]:
    """Smoothed log-odds ratio and its z-score from a 2x2 table."""
    a, b = with_word + 0.5, of_label - with_word + 0.5
    c, d = count - with_word + 0.5, total - of_label - count + with_word + 0.5
    delta = math.log(a / b) - math.log(c / d)
    return delta, delta / math.sqrt(1 / a + 1 / b + 1 / c + 1 / d)


def irrelevant_rows(words: Iterable[str]) -> list[dict[str, Any]]:
    """Rows of a review file for irrelevant words that have no statistic."""
    rest = dict.fromkeys(("label", "count", "log_odds", "z"), "")
    return [{"word": word, **rest, "role": "irrelevant", "keep": "yes"} for word in words]


def write_review(path: str | os.PathLike[str], rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows of :data:`COLUMNS` as a table that opens in any spreadsheet, ``.tsv`` or ``.csv``.

    Raises:
        ValueError: another format.
        OSError: as `files.write_bytes`.
    """
    delimiters = {".tsv": "\t", ".csv": ","}
    suffix = Path(path).suffix.lower()
    if suffix not in delimiters:
        raise ValueError(f"review: expected a .tsv or .csv file, got {str(path)!r}")
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, delimiter=delimiters[suffix], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_bytes(path, stream.getvalue().encode("utf-8"))


def read_review(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Rows of a review file, checked; only ``word``, ``label``, ``role`` and ``keep`` are needed.

    Of a table of `spurge.find` the words and phrases count, and spurious ones are irrelevant.

    Raises:
        ValueError: a missing column, an unknown role or ``keep``, or a causal word without label; with its row.
    """
    with of_file(path):
        rows = [
            _review_row(raw, number)
            for number, raw in enumerate(read_records(path), 1)
            if raw.get("kind", _KINDS[0]) in _KINDS
        ]
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def _review_row(raw: Mapping[str, Any], number: int) -> dict[str, Any]:
    row = {"word": read_text(read_column(raw, "word", number), "word", number).strip()}
    for name in ("label", "role", "keep"):
        value = read_column(raw, name, number)
        blank = is_missing(value) or (isinstance(value, str) and not value.strip())
        row[name] = "" if blank else read_name(value, name, number).strip()
    role = row["role"].lower()
    role = _ROLES_OF_FIND.get(role, role)
    if role not in ROLES:
        raise ValueError(f"row {number}: role is one of {ROLES}, got {row['role']!r:.40}")
    try:
        keep = is_kept(row["keep"])
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from error
    if role == "causal" and keep and not row["label"]:
        raise ValueError(f"row {number}: the causal word {row['word']!r:.40} needs a label")
    return {**row, "role": role, "keep": "yes" if keep else "no"}


def is_kept(text: str) -> bool:
    """What a person's ``keep`` means, whatever its case.

    Raises:
        ValueError: neither yes nor no.
    """
    found = _KEEP.get(text.lower())
    if found is None:
        raise ValueError(f"keep is yes or no, got {text!r:.40}")
    return found


def kept(rows: Iterable[dict[str, Any]]) -> tuple[dict[str, list[str]], list[str]]:
    """Causal words per label and irrelevant words among the rows to keep."""
    causal: dict[str, list[str]] = {}
    irrelevant: list[str] = []
    for row in rows:
        if row["keep"] == "yes" and row["role"] == "causal":
            causal.setdefault(row["label"], []).append(row["word"])
        elif row["keep"] == "yes" and row["role"] == "irrelevant":
            irrelevant.append(row["word"])
    return causal, irrelevant
