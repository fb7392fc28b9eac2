"""Texts inside a prompt's template: tokenized jointly, and only the texts' own tokens are words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from spurge.engine.data.examples import Inputs

_PLACE = re.compile(r"\{(text|pair)\}")
Span = tuple[int, int]


def split_template(template: str) -> list[str]:
    """A template's pieces: what stands around its places, and at odd indices the places ``"text"`` and ``"pair"``.

    Other braces stand for themselves.

    Raises:
        TypeError: no str.
        ValueError: not one place ``{text}``, or more than one ``{pair}``.

    >>> split_template("Review: {text} It was")
    ['Review: ', 'text', ' It was']
    """
    if not isinstance(template, str):
        raise TypeError(f"template: expected str, got {type(template).__name__}")
    pieces = _PLACE.split(template)
    if pieces[1::2].count("text") != 1 or pieces[1::2].count("pair") > 1:
        raise ValueError(f"template: expected one {{text}} and at most one {{pair}}, got {template!r}")
    return pieces


@dataclass(frozen=True, eq=False)
class Record:
    """What is known of one prompt's T tokens, as fast tokenizers tell it.

    Attributes:
        ids: of the tokens.
        sequence_ids: 0 for a token of the text, 1 for one of the pair; None for the template, special tokens, padding.
        offsets: which characters of its text a token covers; (0, 0) for tokens of no text.
    """

    ids: list[int]
    sequence_ids: list[int | None]
    offsets: list[Span]

    def padded(self, width: int, token: int | None, side: str) -> Record:
        """With so many tokens, new ones on ``side``."""
        extra = width - len(self.ids)
        if not extra:
            return self
        if token is None:
            raise ValueError("tokenizer: has no padding token, so texts of different length cannot share a batch")
        padding: tuple[list[int], list[int | None], list[Span]] = [token] * extra, [None] * extra, [(0, 0)] * extra
        own = self.ids, self.sequence_ids, self.offsets
        first, second = (padding, own) if side == "left" else (own, padding)
        return Record(first[0] + second[0], first[1] + second[1], first[2] + second[2])


class Prompted:
    """A tokenizer that sets every text into a template; takes the place of the plain one wherever Spurge asks for it.

    Args:
        tokenizer: a fast tokenizer of ``transformers``. What is not told here is its own: special tokens, the side of
            padding, decoding.
        template: with ``{text}``, and with ``{pair}`` where texts come in pairs.

    Raises:
        TypeError: a template that is no str.
        ValueError: a slow tokenizer, a tokenizer that has a template already, or a template without its places.
    """

    is_fast = True

    def __init__(self, tokenizer: Any, template: str = "{text}") -> None:
        self.template, self.pieces = template, split_template(template)
        if isinstance(tokenizer, Prompted):
            raise ValueError("tokenizer: has a template already, expected a plain one")
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"tokenizer: {type(tokenizer).__name__} does not tell which characters a token covers; "
                "load a fast one, AutoTokenizer.from_pretrained(..., use_fast=True)"
            )
        self.tokenizer = tokenizer

    def __call__(
        self,
        text: Sequence[str],
        text_pair: Sequence[str] | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | Literal["longest", "max_length"] = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: Literal["pt"] | None = None,
    ) -> Any:
        """Tokenizes B prompts: ``input_ids`` and ``attention_mask``, ``[B, T]``, and the records as ``encodings``.

        Special tokens that the tokenizer would put behind the prompt are left out: the answer follows there.

        Args:
            text, text_pair: what goes into the template's places.
            add_special_tokens: False: words by themselves, as the plain tokenizer has them, without the template.
            padding: to the longest prompt, or to ``max_length``; on the tokenizer's side.
            truncation: prompts of more than ``max_length`` tokens lose tokens from the end of the text; with a pair,
                from the end of whichever has more.
            max_length: by default the tokenizer's own limit.
            return_tensors: ``"pt"``; lists by default.

        Raises:
            TypeError: one text instead of several.
            ValueError: pairs for a template without ``{pair}`` or the other way round, a template that leaves no room
                for a text, or no padding token where one is needed.
        """
        if not add_special_tokens:
            return self.tokenizer(text, text_pair, add_special_tokens=False)
        if isinstance(text, str):
            raise TypeError("text: expected a list of texts, got one str")
        paired = "pair" in self.pieces[1::2]
        if paired != (text_pair is not None):
            what = "has {pair}, got single texts" if paired else "has no {pair}, got pairs of texts"
            raise ValueError(f"template: {what}")
        filled = [self._fill(row) for row in (zip(text) if text_pair is None else zip(text, text_pair, strict=True))]
        made = self.tokenizer([prompt for prompt, _ in filled], verbose=False)
        limit = self.tokenizer.model_max_length if max_length is None else max_length
        records = [
            _record(encoding, spans, limit if truncation else None)
            for encoding, (_, spans) in zip(made.encodings, filled, strict=True)
        ]
        width = limit if padding == "max_length" else max(len(record.ids) for record in records)
        mask = [[1] * len(record.ids) for record in records]
        if padding:
            side = self.padding_side
            records = [record.padded(width, self.tokenizer.pad_token_id, side) for record in records]
            blank = [[0] * (width - len(row)) for row in mask]
            mask = [zeros + row if side == "left" else row + zeros for zeros, row in zip(blank, mask, strict=True)]
        columns: dict[str, Any] = {"input_ids": [record.ids for record in records], "attention_mask": mask}
        if return_tensors == "pt":
            columns = {name: torch.tensor(rows) for name, rows in columns.items()}
        inputs = Inputs(columns)
        inputs.encodings = records
        return inputs

    def _fill(self, texts: tuple[str, ...]) -> tuple[str, list[Span]]:
        """The prompt of one text or pair, and where in it they stand."""
        prompt, spans = "", [(0, 0)] * len(texts)
        for i, piece in enumerate(self.pieces):
            if i % 2:
                sequence = 0 if piece == "text" else 1
                piece = texts[sequence]
                spans[sequence] = len(prompt), len(prompt) + len(piece)
            prompt += piece
        return prompt, spans

    @property
    def padding_side(self) -> str:
        """The tokenizer's own; may be set."""
        return self.tokenizer.padding_side

    @padding_side.setter
    def padding_side(self, side: str) -> None:
        self.tokenizer.padding_side = side

    @property
    def pad_token(self) -> str | None:
        """The tokenizer's own; may be set."""
        return self.tokenizer.pad_token

    @pad_token.setter
    def pad_token(self, token: str | None) -> None:
        self.tokenizer.pad_token = token

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "tokenizer":  # asked while a copy is being made, which has nothing yet
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def __repr__(self) -> str:
        return f"Prompted({type(self.tokenizer).__name__}, {self.template!r})"


def _record(encoding: Any, spans: Sequence[Span], limit: int | None) -> Record:
    """The record of one prompt whose texts stand at ``spans``, cut to ``limit`` tokens."""
    end = len(encoding.ids)
    while end and encoding.special_tokens_mask[end - 1]:
        end -= 1
    owners: list[int | None] = []
    offsets: list[Span] = []
    inner: list[list[int]] = [[] for _ in spans]  # tokens of each text that hold nothing of the template
    for t, (start, stop) in enumerate(encoding.offsets[:end]):
        touched = [s for s, (a, b) in enumerate(spans) if start < b and stop > a and start < stop]
        owner = touched[0] if touched else None
        owners.append(owner)
        if owner is None:
            offsets.append((0, 0))
            continue
        a, b = spans[owner]
        offsets.append((max(start, a) - a, min(stop, b) - a))
        if a <= start and stop <= b:
            inner[owner].append(t)
    cut = _cut([len(tokens) for tokens in inner], end, limit)
    gone = {t for tokens, kept in zip(inner, cut, strict=True) for t in tokens[kept:]}
    kept = [t for t in range(end) if t not in gone]
    return Record([encoding.ids[t] for t in kept], [owners[t] for t in kept], [offsets[t] for t in kept])


def _cut(counts: list[int], length: int, limit: int | None) -> list[int]:
    """How many tokens each text keeps, of ``counts`` that may go from a prompt of ``length`` tokens."""
    if limit is None or length <= limit:
        return counts
    fixed = length - sum(counts)
    if fixed >= limit:
        raise ValueError(
            f"max_length: the template and special tokens take {fixed} tokens, which leaves no room for a text; "
            f"expected more than {fixed}, got {limit}"
        )
    left = list(counts)
    for _ in range(length - limit):
        left[0 if len(left) == 1 or left[0] > left[1] else 1] -= 1
    return left
