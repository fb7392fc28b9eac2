"""From tokens to words: sub-words are merged to words, and words to the phrases a golden set names ("not fail").

Words are cut from the text itself, and each token goes to the word that its characters lie in. So the same text has
the same words under WordPiece, byte-level BPE and SentencePiece, whatever their own idea of a word is. A word is a run
of letters, digits and their marks, with inner apostrophes ("don't"); a possessive "'s" and the parts of a hyphenated
word are words of their own; a Chinese or Japanese character is a word.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from spurge.engine.base.checks import choice, integer

Phrase = tuple[str, ...]
Text = str | tuple[str, str]

# What may stand between the words of one phrase: "well-made", "devil's advocate", but not "not. Fail".
GAP = re.compile(r"[\s'’\-‐‑]*")
_IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"


@lru_cache(maxsize=1)
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Patterns of a word and of a run of punctuation.

    Python's ``\\w`` leaves out combining marks, which would cut Hindi or Thai words in pieces; they are collected here.
    """
    marks = "".join(chr(c) for c in range(0x300, 0x10000) if unicodedata.category(chr(c)) in ("Mn", "Mc"))
    letter = rf"(?:[^\W_{_IDEOGRAPH}]|[{marks}])"
    word = rf"[{_IDEOGRAPH}]|{letter}+(?:['’](?![sS](?!{letter})){letter}+)*"
    return re.compile(word), re.compile(rf"(?:(?![{marks}])[^\w\s]|_)+")


def fold(text: str) -> str:
    """``text`` as the vocabulary keeps it: compatibility forms resolved, case folded, apostrophes straight."""
    if text.isascii():
        return text.casefold()
    for _ in range(2):  # folding can undo the normal form and the other way round; the second round settles it
        text = unicodedata.normalize("NFKC", text).casefold()
    return unicodedata.normalize("NFKC", text).replace("’", "'")


def split_words(text: str) -> Phrase:
    """The words of ``text``, folded, without punctuation.

    >>> split_words("Don't fail: a well-made film's plot")
    ("don't", 'fail', 'a', 'well', 'made', 'film', 's', 'plot')
    """
    return tuple(fold(match.group()) for match in _patterns()[0].finditer(text))


def as_phrase(entry: str) -> Phrase | None:
    """The words of one entry of a word list, or None where it is no word or phrase ("a+", ":-)", "").

    >>> as_phrase("Well-made"), as_phrase("a+")
    (('well', 'made'), None)
    """
    pattern = _patterns()[0]
    if any(GAP.fullmatch(rest) is None for rest in pattern.split(entry)):
        return None
    return split_words(entry) or None


class Vocabulary:
    """Words and phrases with their numbers, in the order in which they were first met. Folds every word it is given.

    >>> vocabulary = Vocabulary(["Good"])
    >>> vocabulary.id("GOOD"), vocabulary.id("bad"), vocabulary.find("ugly"), vocabulary.word(1)
    (0, 1, None, 'bad')
    """

    def __init__(self, words: Iterable[str] = ()) -> None:
        self._ids: dict[str, int] = {}
        self._words: list[str] = []
        for word in words:
            self.id(word)

    def id(self, word: str) -> int:
        """Number of ``word``; a new word gets the next free one."""
        key = fold(word)
        number = self._ids.setdefault(key, len(self._words))
        if number == len(self._words):
            self._words.append(key)
        return number

    def find(self, word: str) -> int | None:
        """Number of ``word``, or None where it has none."""
        return self._ids.get(fold(word))

    def word(self, number: int) -> str:
        """The word, folded, with this number.

        Raises:
            ValueError: no word has it.
        """
        if not 0 <= number < len(self._words):
            raise ValueError(f"number: the vocabulary has 0 to {len(self._words) - 1}, got {number}")
        return self._words[number]

    def __len__(self) -> int:
        return len(self._words)

    def __iter__(self) -> Iterator[str]:
        return iter(self._words)

    def __contains__(self, word: object) -> bool:
        return isinstance(word, str) and fold(word) in self._ids

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} words)"


@dataclass(frozen=True, eq=False)
class Units:
    """Words and phrases of a batch of B texts of T tokens, U the most units of one text.

    ``ids`` int32 ``[B, U]``: vocabulary numbers in the order of the text, -1 is padding.
    ``token_unit`` int64 ``[B, T]``: column of ``ids`` a token belongs to, -1 for special tokens, padding, punctuation.
    """

    ids: Tensor
    token_unit: Tensor

    def __post_init__(self) -> None:
        if self.ids.dim() != 2 or self.token_unit.dim() != 2 or len(self.ids) != len(self.token_unit):
            shapes = f"{tuple(self.ids.shape)} and {tuple(self.token_unit.shape)}"
            raise ValueError(f"ids and token_unit: must be [B, U] and [B, T], got {shapes}")
        if self.token_unit.numel() and not -1 <= self.token_unit.min() <= self.token_unit.max() < self.ids.shape[1]:
            raise ValueError(f"token_unit: columns must lie in -1 to {self.ids.shape[1] - 1}")

    @property
    def counts(self) -> Tensor:
        """Units per text, int64 ``[B]``."""
        return (self.ids >= 0).sum(1)

    def to(self, device: torch.device | str) -> Units:
        """The same units on another device."""
        return Units(self.ids.to(device), self.token_unit.to(device))

    @cached_property
    def positions(self) -> Tensor:
        """Tokens of each unit, int64 ``[B, U, K]``, K the most tokens of one unit; T stands for none."""
        batch, tokens = self.token_unit.shape
        column = torch.where(self.token_unit < 0, self.ids.shape[1], self.token_unit)
        order = column.argsort(dim=1, stable=True)
        column = column.gather(1, order)
        counts = torch.zeros(batch, self.ids.shape[1] + 1, dtype=torch.int64, device=column.device)
        counts.scatter_add_(1, column, torch.ones_like(column))
        rank = torch.arange(tokens, device=column.device) - (counts.cumsum(1) - counts).gather(1, column)
        most = int(counts[:, :-1].max()) if counts[:, :-1].numel() else 0
        real = column < self.ids.shape[1]
        text = torch.arange(batch, device=column.device)[:, None].expand_as(column)
        out = torch.full((*self.ids.shape, most), tokens, device=column.device)
        out[text[real], column[real], rank[real]] = order[real]
        return out


def _encodings(tokenizer: Any, encoding: Any, texts: Sequence[Text]) -> Sequence[Any]:
    """The fast tokenizer's own records of a batch: what it kept, or what a second call gives."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer: {type(tokenizer).__name__} does not tell which characters a token covers; "
            "load a fast one, AutoTokenizer.from_pretrained(..., use_fast=True)"
        )
    if not isinstance(encoding, Mapping) or "input_ids" not in encoding:
        raise TypeError(f"encoding: expected the tokenizer's output with 'input_ids', got {type(encoding).__name__}")
    ids = encoding["input_ids"]
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise ValueError("encoding: 'input_ids' must be a tensor [B, T]; call the tokenizer with return_tensors='pt'")
    if len(ids) != len(texts):
        raise ValueError(f"texts: need one per row of the encoding, got {len(texts)} for {len(ids)} rows")
    kept = getattr(encoding, "encodings", None)
    if kept is None:
        first = [text if isinstance(text, str) else text[0] for text in texts]
        second = None if not texts or isinstance(texts[0], str) else [text[1] for text in texts]
        again = tokenizer(first, second, truncation=True, max_length=ids.shape[1], padding="max_length")
        kept = again.encodings
        if [record.ids for record in kept] != ids.tolist():
            raise ValueError("encoding: its 'input_ids' are not what the tokenizer makes of these texts")
    if len(kept) != len(texts) or any(len(record.ids) != ids.shape[1] for record in kept):
        raise ValueError("encoding: was cut or padded after the tokenizer made it; encode the texts again")
    return kept


def word_spans(text: str, phrases: Mapping[str, list[Phrase]], punctuation: bool = False) -> list[tuple[int, int, str]]:
    """Start, end and folded form of the units of one text, in its order.

    Args:
        text: any text.
        phrases: the multi-word units, longest first, under their first word.
        punctuation: runs of punctuation are units too.
    """
    word, other = _patterns()
    found = [(match.start(), match.end(), fold(match.group())) for match in word.finditer(text)]
    units: list[tuple[int, int, str]] = []
    i = 0
    while i < len(found):
        size = 1
        for phrase in phrases.get(found[i][2], ()):  # longest first
            run = found[i : i + len(phrase)]
            if tuple(form for _, _, form in run) == phrase and all(
                GAP.fullmatch(text, left[1], right[0]) for left, right in pairwise(run)
            ):
                size = len(phrase)
                break
        run = found[i : i + size]
        units.append((run[0][0], run[-1][1], " ".join(form for _, _, form in run)))
        i += size
    if punctuation:
        taken = [(start, end) for start, end, _ in units]
        for match in other.finditer(text):
            if not any(start <= match.start() < end for start, end in taken):
                units.append((match.start(), match.end(), fold(match.group())))
        units.sort()
    return units


CorrelationSet = Literal["occurrences", "words"]


@dataclass(frozen=True, kw_only=True)
class CorrelationTokens:
    """Which units of a text are its correlation tokens C (MacU section 3.1.2): the ``top_k`` of highest score.

    Attributes:
        top_k: K.
        merge: the score of a unit of several tokens, see :func:`unit_scores`.
        keep_punctuation, correlation_set: what is a unit, see :func:`split_units`.
    """

    top_k: int = 5
    merge: Literal["sum", "max"] = "sum"
    keep_punctuation: bool = False
    correlation_set: CorrelationSet = "occurrences"

    def __post_init__(self) -> None:
        integer("top_k", self.top_k, 1)
        choice("merge", self.merge, ("sum", "max"))
        if not isinstance(self.keep_punctuation, bool):
            raise TypeError(f"keep_punctuation: expected True or False, got {self.keep_punctuation!r}")
        choice("correlation_set", self.correlation_set, get_args(CorrelationSet))

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> CorrelationTokens:
        """As the settings of a localisation have it, for example those of a file; what they do not name is default.

        Raises:
            ValueError: tokens were not ranked by attention.
        """
        if settings.get("token_score", "attention") != "attention":
            raise ValueError(
                f"token_score: neurons were located by tokens that {settings['token_score']!r} ranks, which only "
                "attention does now; locate again"
            )
        return cls(**{f.name: settings[f.name] for f in fields(cls) if f.name in settings})

    def units(
        self,
        tokenizer: Any,
        encoding: Mapping[str, Tensor],
        texts: Sequence[Text],
        vocabulary: Vocabulary,
        phrases: Collection[Phrase] = (),
    ) -> Units:
        """The units of a tokenized batch, as :func:`split_units`."""
        return split_units(
            tokenizer,
            encoding,
            texts,
            vocabulary,
            phrases,
            keep_punctuation=self.keep_punctuation,
            correlation_set=self.correlation_set,
        )


def split_units(
    tokenizer: Any,
    encoding: Mapping[str, Tensor],
    texts: Sequence[Text],
    vocabulary: Vocabulary,
    phrases: Collection[Phrase] = (),
    *,
    keep_punctuation: bool = False,
    correlation_set: CorrelationSet = "occurrences",
) -> Units:
    """Words and phrases of a tokenized batch.

    Consecutive words that make up one of ``phrases`` become one unit, the longest phrase first; a phrase never crosses
    a comma, a full stop, or the border between the two sentences of a pair. A word cut off by truncation is a unit
    without the tokens cut off, and is left out when none remain.

    Args:
        tokenizer: a fast `transformers` tokenizer.
        encoding: what it made of ``texts`` (`spurge.engine.data.examples.encode`), ``input_ids`` ``[B, T]``.
        texts: B texts, or B pairs of texts.
        vocabulary: numbers of the words; new words are added.
        phrases: folded words of each multi-word unit; single words need not be named.
        keep_punctuation: runs of punctuation are units too.
        correlation_set: of a text; each occurrence of a word is a unit of its own, or (``"words"``) all of them are one
            unit, in the place of the first.

    Raises:
        ValueError: a slow tokenizer, or texts that do not belong to the encoding.
        TypeError: texts that are neither str nor pairs of str.
    """
    if isinstance(texts, str):
        raise TypeError("texts: expected a list of texts, got one str")
    for text in texts:
        pair = isinstance(text, (tuple, list)) and len(text) == 2 and all(isinstance(part, str) for part in text)
        if not isinstance(text, str) and not pair:
            raise TypeError(f"texts: expected str or a pair of str, got {type(text).__name__}")
    if len({isinstance(text, str) for text in texts}) > 1:
        raise ValueError("texts: either all are pairs or none is")
    starts: dict[str, list[Phrase]] = {}
    for phrase in sorted(phrases, key=len, reverse=True):
        if len(phrase) > 1:
            starts.setdefault(phrase[0], []).append(tuple(phrase))

    rows: list[list[int]] = []  # vocabulary numbers
    columns: list[list[int]] = []  # unit of each token
    for text, record in zip(texts, _encodings(tokenizer, encoding, texts), strict=True):
        parts = (text,) if isinstance(text, str) else text
        spans = [word_spans(part, starts, keep_punctuation) for part in parts]
        row: list[int] = []
        column = [-1] * len(record.ids)
        last: tuple[int, int] | None = None  # sentence and index of the unit that was opened last
        at, first = -1, dict[int, int]()  # its column, and that of each word's first occurrence
        cursor = [0] * len(parts)
        for t, (sentence, (start, end)) in enumerate(zip(record.sequence_ids, record.offsets, strict=True)):
            if sentence is None or start == end:
                continue
            units, i = spans[sentence], cursor[sentence]
            while i < len(units) and units[i][1] <= start:
                i += 1
            cursor[sentence] = i
            if i == len(units) or units[i][0] >= end:
                continue  # punctuation or blanks
            if last != (sentence, i):
                last = (sentence, i)
                number, at = vocabulary.id(units[i][2]), len(row)
                if correlation_set == "words":
                    at = first.setdefault(number, at)
                if at == len(row):
                    row.append(number)
            column[t] = at
        rows.append(row)
        columns.append(column)

    device = encoding["input_ids"].device
    width = max(map(len, rows), default=0)
    ids = torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int32, device=device)
    token_unit = torch.tensor(columns, dtype=torch.int64, device=device)
    return Units(ids.reshape(len(rows), width), token_unit.reshape(len(rows), encoding["input_ids"].shape[1]))


def unit_scores(row: Tensor, units: Units, how: Literal["sum", "max"] = "sum") -> Tensor:
    r"""Token scores to unit scores, without special tokens and padding, scaled to sum 1.

    .. math:: s_u = \sum_{t \in u} a_t \;\; (\text{or} \max_{t \in u} a_t), \qquad
              \hat s_u = s_u / \sum_v |s_v|

    Differentiable in ``row``. Bitwise equal from run to run on any device: tokens are gathered, nothing is added up
    by atomics. A row whose units all score 0 stays 0; NaN stays NaN.

    Args:
        row: scores of the tokens, ``[R, T]``, R = m·B; row r belongs to text r mod B.
        units: of the B texts.
        how: what the tokens of one unit make together.

    Returns:
        ``[R, U]``, 0 at padding.

    Raises:
        ValueError: shapes that do not fit, or another ``how``.
        TypeError: ``row`` is not a floating-point tensor.
    """
    if not isinstance(row, Tensor) or not row.is_floating_point():
        what = str(row.dtype) if isinstance(row, Tensor) else type(row).__name__
        raise TypeError(f"row: expected a floating-point tensor, got {what}")
    choice("how", how, ("sum", "max"))
    batch, tokens = units.token_unit.shape
    if row.dim() != 2 or row.shape[1] != tokens or (row.shape[0] % batch if batch else row.shape[0]):
        raise ValueError(f"row: expected [m*{batch}, {tokens}], got {tuple(row.shape)}")
    width, most = units.positions.shape[1:]
    if batch == 0 or most == 0:
        return row[:, :0].sum(1, keepdim=True).expand(-1, width)  # zeros that autograd still knows
    copies = row.shape[0] // batch
    positions = units.positions.reshape(batch, width * most).repeat(copies, 1)
    real = (positions < tokens).reshape(-1, width, most)
    picked = row.gather(1, positions.clamp(max=tokens - 1)).reshape(-1, width, most)
    if how == "sum":
        score = torch.where(real, picked, 0).sum(2)
    else:
        score = torch.where(real, picked, -torch.inf).amax(2)
        score = torch.where(real.any(2), score, 0)
    total = score.abs().sum(1, keepdim=True)
    return torch.where(total == 0, score, score / torch.where(total == 0, 1, total))
