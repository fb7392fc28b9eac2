"""Texts whose answer an edit changes, and which of their words spoke for it, before and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from spurge.engine.data.examples import Example, Examples
from spurge.engine.data.words import word_spans
from spurge.engine.evaluation.numbers import Answers
from spurge.engine.evaluation.prediction import Prepared
from spurge.engine.models.handle import Handle

_MOST_WORDS = 64  # of a text whose words are deleted one by one

Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Changed:
    """One text with another answer than before.

    Attributes:
        set: the test set.
        text, pair, groups: of the example.
        label: the right answer.
        before, after: the answers without and with the edit.
        before_share, after_share: probability of each of them, as it was given.
        words: ``(start, end, before, after)`` of the first words of ``text``, in characters: how much the log-odds of
            the answer before fall where that word alone is deleted, in nats, without and with the edit.
    """

    set: str
    text: str
    pair: str | None
    groups: tuple[str, ...]
    label: str
    before: str
    after: str
    before_share: float
    after_share: float
    words: tuple[tuple[int, int, float, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without what is missing."""
        return {name: value for name, value in asdict(self).items() if value not in (None, ())}


def changed_rows(plain: Answers, edited: Answers, count: int, seed: int) -> np.ndarray:
    """At most ``count`` random rows with another answer, in order."""
    rows = np.flatnonzero(plain.predicted != edited.predicted)
    return np.sort(np.random.default_rng(seed).permutation(rows)[:count])


def changed_texts(
    handle: Handle,
    case: str,
    examples: Examples,
    rows: Sequence[int],
    plain: Answers,
    edited: Answers,
    contexts: tuple[Context, Context],
    reading: dict[str, Any],
) -> list[Changed]:
    """The rows with what their words do: one exact pass for each word, without and with the edit.

    Args:
        handle: of the model.
        case: name of the set.
        examples: of which ``rows`` are read.
        plain, edited: answers of all examples.
        contexts: the unedited and the edited model.
        reading: arguments of `Prepared`.
    """
    if not len(rows):
        return []
    variants, spans = [], []
    for row in rows:
        found = [(start, end) for start, end, _ in word_spans(examples[row].text, {})][:_MOST_WORDS]
        spans.append(found)
        variants += [_without(examples[row], start, end) for start, end in found]
    moves = [np.zeros(0), np.zeros(0)]
    if variants:
        item = Prepared(case, handle, Examples(variants, examples.labels), **reading)
        answers = np.repeat(plain.predicted[list(rows)], [len(found) for found in spans])
        for number, (context, full) in enumerate(zip(contexts, (plain, edited), strict=True)):
            with context():
                logits = item.run().logits.numpy()
            assert full.logits is not None
            whole = np.repeat(full.logits[list(rows)], [len(found) for found in spans], 0)
            moves[number] = _log_odds(whole, answers) - _log_odds(logits, answers)
    out, start = [], 0
    for row, found in zip(rows, spans, strict=True):
        part = slice(start, start + len(found))
        words = zip(found, moves[0][part].tolist(), moves[1][part].tolist(), strict=True)
        out.append(_changed(case, examples, row, plain, edited, tuple((*span, *own) for span, *own in words)))
        start = part.stop
    return out


def _changed(case: str, examples: Examples, row: int, plain: Answers, edited: Answers, words: Any) -> Changed:
    example, names = examples[row], examples.labels
    label, before, after = (
        names[number] if number < len(names) else str(number)
        for number in (example.label, int(plain.predicted[row]), int(edited.predicted[row]))
    )
    shares = _share(plain, row), _share(edited, row)
    return Changed(case, example.text, example.pair, example.groups, label, before, after, *shares, words)


def _share(answers: Answers, row: int) -> float:
    """Probability of the answer that was given."""
    assert answers.logits is not None
    logits = answers.logits[row].astype(np.float64)
    return float(1 / np.exp(logits - logits.max()).sum())


def _without(example: Example, start: int, end: int) -> Example:
    """The example without one word; a text of that word alone stays."""
    left = f"{example.text[:start].rstrip()} {example.text[end:].lstrip()}".strip()
    return replace(example, text=left or example.text)


def _log_odds(logits: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Of each row's answer against all others, ``[N]``."""
    logits = logits.astype(np.float64)
    own = np.take_along_axis(logits, answers[:, None], 1)[:, 0]
    others = logits.copy()
    np.put_along_axis(others, answers[:, None], -np.inf, 1)
    most = others.max(1)
    return own - most - np.log(np.exp(others - most[:, None]).sum(1))
