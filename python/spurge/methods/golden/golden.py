"""Golden tokens: which words ought to decide a label, and which ought not (MacU, section 3.1.1)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spurge.engine.base import files
from spurge.engine.base.checks import choice
from spurge.engine.data.examples import Examples
from spurge.engine.data.rows import check_names, counted, same_name
from spurge.engine.data.table_files import read_records
from spurge.engine.data.words import Phrase, Vocabulary, as_phrase, split_words
from spurge.methods.golden import ask_words, corpus_words, lexicons

KIND = "golden tokens"
SCHEMA = 1
_KEYS = {"kind", "schema", "labels", "causal", "irrelevant", "info"}


@dataclass(frozen=True)
class GoldenTokens:
    r"""Golden words and phrases of Y labels.

    .. math:: G_{spu}^y = \Big(\bigcup_{y' \ne y} G_{cau}^{y'} \cup G_{irr}\Big) \setminus G_{cau}^y
              \qquad \text{(MacU Eq. 1-3)}

    Entries are single words or phrases ("not fail"); case and the hyphens of "well-made" do not matter. A word may be
    causal for one label only: what decides for two labels decides for none, so an overlap is refused here, and the
    sources that collect words (``from_*``) leave such words out, warn, and count them in ``info``. A causal word that
    is also listed as irrelevant is causal.

    Args:
        labels: the names, in the order of the model's outputs; at least 2.
        causal: the causal words of each label, at least one each.
        irrelevant: words that say nothing about any label.
        info: where the words come from; JSON-able.

    Raises:
        ValueError: a label without words, an unknown label, a word of two labels, or an entry that is no word.
        TypeError: one text where a list of words is expected.
    """

    labels: tuple[str, ...]
    causal: Mapping[str, tuple[str, ...]]
    irrelevant: tuple[str, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __init__(
        self,
        labels: Sequence[str],
        causal: Mapping[str, Iterable[str]],
        irrelevant: Iterable[str] = (),
        info: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(causal, Mapping):
            raise TypeError(f"causal: expected a mapping from label to words, got {type(causal).__name__}")
        labels = check_names(labels)
        if len(labels) < 2:
            raise ValueError(f"labels: need at least 2, got {len(labels)}")
        strange = sorted(str(name) for name in causal if name not in labels)
        if strange:
            raise ValueError(f"causal: {strange[0]!r} is none of the labels {labels}")
        chosen = {name: _words(causal.get(name, ()), f"causal[{name!r}]") for name in labels}
        for name, words in chosen.items():
            if not words:
                raise ValueError(f"causal[{name!r}]: need at least 1 word, got 0")
        owner: dict[str, str] = {}
        for name, words in chosen.items():
            for word in words:
                if owner.setdefault(word, name) != name:
                    raise ValueError(f"causal: {word!r} is listed for both {owner[word]!r} and {name!r}")
        rest = tuple(word for word in _words(irrelevant, "irrelevant") if word not in owner)
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "causal", chosen)
        object.__setattr__(self, "irrelevant", rest)
        object.__setattr__(self, "info", dict(info or {}))

    # What it holds

    def spurious(self, label: str) -> frozenset[str]:
        """Words that ought not to decide for ``label``: the other labels' causal words and the irrelevant ones (Eq. 3).

        Raises:
            ValueError: no such label.
        """
        choice("label", label, self.labels)
        others = (word for name in self.labels if name != label for word in self.causal[name])
        return frozenset(others) | frozenset(self.irrelevant)

    def phrases(self) -> set[Phrase]:
        """The entries of more than one word, as `spurge.engine.data.words.split_units` takes them."""
        every = (word for words in (*self.causal.values(), self.irrelevant) for word in words)
        return {tuple(word.split(" ")) for word in every if " " in word}

    def bitmap(self, vocabulary: Vocabulary) -> Tensor:
        """Membership of every vocabulary word, one bit each: int32 ``[2, Y, ceil(V/32)]``, 0 causal and 1 spurious.

        Bit ``v % 32`` of word ``v // 32`` belongs to vocabulary number v. Golden words that the vocabulary lacks have
        no bit: they occur in none of the texts (see :meth:`summary`).
        """
        count = (len(vocabulary) + 31) // 32
        bits = np.zeros((2, len(self.labels), count * 32), dtype=bool)
        for y, label in enumerate(self.labels):
            for g, words in enumerate((self.causal[label], self.spurious(label))):
                bits[g, y, [number for word in words if (number := vocabulary.find(word)) is not None]] = True
        packed = np.packbits(bits, axis=-1, bitorder="little").view("<i4")
        return torch.from_numpy(packed.astype(np.int32))

    def summary(self, vocabulary: Vocabulary) -> dict[str, Any]:
        """How many golden words there are, and how many of them the vocabulary has.

        ``{"causal": {label: {"words", "found"}}, "irrelevant": {"words", "found"}, "phrases": n}``
        """

        def count(words: Iterable[str]) -> dict[str, int]:
            known = [word in vocabulary for word in words]
            return {"words": len(known), "found": sum(known)}

        causal = {label: count(words) for label, words in self.causal.items()}
        return {"causal": causal, "irrelevant": count(self.irrelevant), "phrases": len(self.phrases())}

    def for_labels(self, labels: Sequence[str]) -> GoldenTokens:
        """The same words under the names, and in the order, of a model's or a data set's labels.

        Names are matched whatever their case, and abbreviations of 3 letters or more count ("neg"). Names that only
        count ("0", "LABEL_1") are taken in the order of ``self.labels``.

        Raises:
            ValueError: another number of labels, or names that do not match.
        """
        labels = check_names(labels)
        if len(labels) != len(self.labels):
            raise ValueError(f"labels: the golden tokens have {len(self.labels)} {self.labels}, got {labels}")
        matches = [[own for own in self.labels if same_name(name, own)] for name in labels]
        if all(len(own) == 1 for own in matches) and len({own[0] for own in matches}) == len(labels):
            source = [own[0] for own in matches]
        elif counted(labels):
            source = list(self.labels)
        else:
            raise ValueError(f"labels: {labels} do not match those of the golden tokens, {self.labels}; rename them")
        causal = {name: self.causal[old] for name, old in zip(labels, source, strict=True)}
        return GoldenTokens(labels, causal, self.irrelevant, self.info)

    def with_irrelevant(self, words: Iterable[str]) -> GoldenTokens:
        """The same, with more irrelevant words; `corpus_words.FUNCTION_WORDS` is a ready list."""
        return GoldenTokens(self.labels, self.causal, (*self.irrelevant, *words), self.info)

    def __repr__(self) -> str:
        causal = ", ".join(f"{label}: {len(words)}" for label, words in self.causal.items())
        return f"GoldenTokens({causal}, irrelevant: {len(self.irrelevant)})"

    def __hash__(self) -> int:
        return hash((self.labels, tuple(self.causal.values()), self.irrelevant))

    # Files

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON-able values."""
        return {
            "kind": KIND,
            "schema": SCHEMA,
            "labels": list(self.labels),
            "causal": {label: list(words) for label, words in self.causal.items()},
            "irrelevant": list(self.irrelevant),
            "info": dict(self.info),
        }

    def fingerprint(self) -> str:
        """SHA-256 of labels and words, in hexadecimal; where they come from does not count."""
        content = {name: value for name, value in self.to_json().items() if name != "info"}
        return files.fingerprint(files.canonical_json(content))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a JSON file that people can read and change."""
        files.write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GoldenTokens:
        """Reads golden tokens from a file.

        ``.json``: as :meth:`save` writes it; by hand, ``{"causal": {"negative": ["bad"], "positive": ["good"]},
        "irrelevant": ["the"]}`` is enough. A table (``.csv``, ``.tsv``, ``.jsonl``, also compressed): a reviewed file
        of :meth:`from_corpus` where it has a column ``keep``, else as :meth:`from_table`.

        Raises:
            ValueError: what is in it cannot be used; the message says where. `files.FileError` for a damaged file.
            OSError: the file cannot be read.
        """
        if Path(path).suffix.lower() != ".json":
            first: dict[str, Any] = next(read_records(path), {})
            return cls.from_review(path) if "keep" in first else cls.from_table(path)
        frame = files.reading_json(path, "golden tokens", keys=_KEYS, kind=KIND, schema=SCHEMA, by_hand=True)
        with frame as value:
            labels = value.get("labels", list(value["causal"]))
            return cls(labels, value["causal"], value.get("irrelevant", ()), value.get("info"))

    # Sources

    @classmethod
    def from_words(cls, irrelevant: Iterable[str] = (), **causal: Iterable[str]) -> GoldenTokens:
        """Golden tokens from lists, labels in the order given.

        >>> GoldenTokens.from_words(negative=["fail", "not good"], positive=["charm"], irrelevant=["the"])
        GoldenTokens(negative: 2, positive: 1, irrelevant: 1)
        """
        return cls(tuple(causal), causal, irrelevant)

    @classmethod
    def from_table(
        cls,
        path: str | os.PathLike[str],
        *,
        word: str = "word",
        label: str = "label",
        labels: Sequence[str] | Mapping[str, str] | None = None,
        irrelevant: Sequence[str] = ("irrelevant",),
    ) -> GoldenTokens:
        """Golden tokens from a table with a word and its label in each row (an opinion lexicon, for one).

        Args:
            path: CSV, TSV or JSONL, also compressed.
            word, label: names of the columns.
            labels: the labels to keep, in order, or a mapping from the table's names to new ones; default all of
                them, in alphabetical order.
            irrelevant: names in the column ``label`` that mark irrelevant words.

        Raises:
            ValueError: a missing column, no rows, or a label without words.
        """
        causal, rest, info = lexicons.from_table(path, word, label, labels, irrelevant)
        return cls._collected(list(causal), causal, rest, {"source": "table", **info})

    @classmethod
    def from_lexicon(
        cls,
        name: str,
        *,
        labels: Sequence[str] = ("negative", "positive"),
        strength: float = 0.0,
        irrelevant: Iterable[str] = corpus_words.FUNCTION_WORDS,
    ) -> GoldenTokens:
        """Golden tokens from an installed sentiment lexicon: ``"vader"`` (MIT) or ``"afinn"`` (ODbL).

        The packages are not part of Spurge: ``pip install vaderSentiment`` or ``pip install afinn``. Only their word
        lists are read, no code of theirs runs.

        Args:
            name: the lexicon.
            labels: name of the label of low scores, then of high ones.
            strength: keep words with a score beyond ±``strength`` (VADER: -4 to 4, AFINN: -5 to 5).
            irrelevant: words without a label; default a list of function words.

        Raises:
            ValueError: an unknown lexicon, or a negative strength.
            ModuleNotFoundError: it is not installed; the message has the pip name.
        """
        labels = check_names(labels)
        if len(labels) != 2:
            raise ValueError(f"labels: need 2, the one of low scores first, got {len(labels)}")
        causal, info = lexicons.from_package(name, labels, strength)
        return cls._collected(labels, causal, irrelevant, {"source": "lexicon", **info})

    @classmethod
    def from_corpus(
        cls,
        examples: Examples,
        *,
        review: str | os.PathLike[str] | None = None,
        least_count: int = 5,
        least_z: float = 3.0,
    ) -> GoldenTokens:
        """Proposes golden tokens from the corpus alone; statistics: `corpus_words.statistics`.

        Statistics cannot tell a cause from a shortcut: both go with the label. So a person should read the review
        file, correct the columns ``role``, ``label`` and ``keep``, and load it with :meth:`from_review`.

        Args:
            examples: labelled texts.
            review: where to write the review file, ``.tsv`` or ``.csv``; written even where the proposal is refused.
            least_count: leave out words that fewer texts have.
            least_z: propose as causal from this z-score on.

        Raises:
            ValueError: a setting out of range, or a label for which no word is proposed.
        """
        rows = corpus_words.statistics(examples, least_count=least_count, least_z=least_z)
        if review is not None:
            corpus_words.write_review(review, rows)
        causal, rest = corpus_words.kept(rows)
        info = {
            "source": "corpus",
            "data": examples.fingerprint(),
            "least_count": least_count,
            "least_z": least_z,
            "reviewed": False,
        }
        return cls._collected(examples.labels, causal, rest, info)

    @classmethod
    def from_review(cls, path: str | os.PathLike[str], *, labels: Sequence[str] | None = None) -> GoldenTokens:
        """Reads a review file back: rows with ``keep`` yes, each ``causal`` for its label or ``irrelevant``.

        Args:
            path: the file.
            labels: the labels in order; default those of the file in alphabetical order.

        Raises:
            ValueError: a missing column, an unknown role or ``keep``; the message has the row.
        """
        causal, rest = corpus_words.kept(corpus_words.read_review(path))
        names = check_names(labels) if labels is not None else tuple(sorted(causal))
        info = {"source": "review", "file": Path(path).name, "reviewed": True}
        return cls._collected(names, causal, rest, info)

    @classmethod
    def from_ask(
        cls,
        ask: Callable[[str], str],
        examples: Examples,
        labels: Sequence[str] | None = None,
        *,
        task: str = "text classification",
        batch_size: int = 20,
        irrelevant: Iterable[str] = corpus_words.FUNCTION_WORDS,
        review: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> GoldenTokens:
        """The paper's route: a language model reads the texts and names causal words; a person may review them.

        Words that do not occur in the texts they were asked about are left out; one named for two labels goes to the
        label it was named for more often. ``info`` keeps the prompts' form and every answer.

        Args:
            ask: any function from a prompt to an answer.
            examples: labelled texts; their labels are not shown.
            labels: names that a reader understands, in order; default those of ``examples``.
            task: what the labels are about, for the prompt ("sentiment analysis").
            batch_size: texts in one prompt.
            irrelevant: words without a label; default a list of function words.
            review: where to write a review file for :meth:`from_review`, ``.tsv`` or ``.csv``.
            progress: show a bar.

        Raises:
            ValueError: no answer could be read, or a label for which no word was named.
            TypeError: an answer that is not text.
        """
        names = check_names(labels) if labels is not None else examples.labels
        rows, info = ask_words.collect(ask, examples, names, task, batch_size, progress)
        rest = [word for word in irrelevant if word not in {row["word"] for row in rows}]
        if review is not None:
            corpus_words.write_review(review, rows + corpus_words.irrelevant_rows(rest))
        causal, _ = corpus_words.kept(rows)
        return cls._collected(names, causal, rest, {"source": "ask", **info})

    @classmethod
    def _collected(
        cls,
        labels: Sequence[str],
        causal: Mapping[str, Iterable[str]],
        irrelevant: Iterable[str],
        info: Mapping[str, Any],
    ) -> GoldenTokens:
        """Golden tokens from words that nobody has checked one by one: those of two labels are left out."""
        clear, counts = lexicons.without_conflicts(causal)
        rest = [word for word in irrelevant if as_phrase(word)]
        return cls(labels, clear, rest, {**info, **counts})


def _words(entries: Iterable[str], name: str) -> tuple[str, ...]:
    """Entries folded, sorted, each once; phrases as their words with one blank between."""
    if isinstance(entries, str) or not isinstance(entries, Iterable):
        raise TypeError(f"{name}: expected a list of words, got {type(entries).__name__}")
    out = set()
    for entry in entries:
        if not isinstance(entry, str):
            raise TypeError(f"{name}: expected words, got {type(entry).__name__} {entry!r:.40}")
        phrase = as_phrase(entry)
        if phrase is None:
            raise ValueError(f"{name}: {entry!r:.60} is no word or phrase, its words are {split_words(entry)}")
        out.add(" ".join(phrase))
    return tuple(sorted(out))
