"""Words that a model should not lean on: which texts hold them, and the texts without them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from spurge.engine.data.examples import Example, Examples
from spurge.engine.data.words import Phrase, as_phrase, word_spans

_BLANKS = re.compile(r"[ \t]{2,}")


class Cue:
    """Words, or phrases of several words, in whatever case they are written.

    Args:
        words: at least one.

    Raises:
        TypeError: one text instead of several, or an entry that is no text.
        ValueError: none, or an entry that is no word ("a+").
    """

    def __init__(self, words: Iterable[str]) -> None:
        if isinstance(words, (str, bytes)):
            raise TypeError(f"cue: expected a sequence of words, got {type(words).__name__}")
        self.words = tuple(words)
        if not self.words:
            raise ValueError("cue: need at least 1 word, got 0")
        split: set[Phrase] = set()
        for word in self.words:
            if not isinstance(word, str):
                raise TypeError(f"cue: expected words, got {type(word).__name__}")
            phrase = as_phrase(word)
            if phrase is None:
                raise ValueError(f"cue: expected words or phrases, got {word!r:.60}")
            split.add(phrase)
        self._units = {" ".join(phrase) for phrase in split}
        self._phrases: dict[str, list[Phrase]] = {}
        for phrase in sorted(split, key=len, reverse=True):
            if len(phrase) > 1:
                self._phrases.setdefault(phrase[0], []).append(phrase)

    def without(self, text: str) -> str:
        """The text without the words; one that would have nothing left stays as it is.

        >>> Cue(["so", "of course"]).without("So good, of course, it is")
        'good, , it is'
        """
        kept, start = [], 0
        for first, end, unit in word_spans(text, self._phrases):
            if unit in self._units:
                kept.append(text[start:first])
                start = end
        left = _BLANKS.sub(" ", "".join([*kept, text[start:]])).strip()
        return left or text

    def hold(self, examples: Examples) -> np.ndarray:
        """Which rows hold a word of the cue, bool ``[N]``."""
        return np.array([any(self._holds(text) for text in row.segments) for row in examples])

    def _holds(self, text: str) -> bool:
        return any(unit in self._units for _, _, unit in word_spans(text, self._phrases))

    def deleted(self, examples: Examples) -> Examples:
        """The rows without the words."""
        return Examples([self._deleted(row) for row in examples], examples.labels)

    def _deleted(self, row: Example) -> Example:
        return replace(row, text=self.without(row.text), pair=None if row.pair is None else self.without(row.pair))
