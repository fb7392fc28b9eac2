"""The search for what a model leans on: candidates from the data, a short list, exact passes, roles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from spurge.engine.base.checks import instance, integer, number, share_of
from spurge.engine.base.files import PathLike, spurge_version
from spurge.engine.base.statistics import benjamini_hochberg
from spurge.engine.data.bound import Association, associate
from spurge.engine.data.examples import Examples
from spurge.engine.data.repeats import repeats
from spurge.engine.models.handle import Handle
from spurge.engine.recordings.embedding import word_vectors
from spurge.methods.find.candidates import (
    PLACES,
    WORDED,
    Candidate,
    columns_of,
    topics_of,
    traits,
    word_pairs,
)
from spurge.methods.find.changes import Changes, Neutral, Pair
from spurge.methods.find.distinct import adds_to_words, distinct
from spurge.methods.find.found import Found, Row
from spurge.methods.find.judge import Judge
from spurge.methods.find.leaning import leaning, margins_of
from spurge.methods.find.passes import Passes
from spurge.methods.find.reliance import Reliance, observed, of_pairs
from spurge.methods.find.roles import causal_score, propose
from spurge.methods.golden.golden import GoldenTokens

_BOUND = 0.75  # share of the measured candidates that are chosen by the labels, the rest by the model's answers
_PASSES_EACH = 6  # texts for each of the ``texts`` of a candidate: out, swapped, put in and its stand-in


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the numbers of a search; see :func:`find`."""

    candidates: int = 60
    texts: int = 32
    least_count: int | None = None
    least_lean: float = 0.1
    level: float = 0.05
    passes: int | None = None
    topics: int = 0
    max_length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("candidates", 1), ("texts", 2), ("topics", 0), ("seed", 0)):
            integer(name, getattr(self, name), least)
        for name, least in (("least_count", 2), ("passes", 1)):
            if getattr(self, name) is not None:
                integer(name, getattr(self, name), least)
        number("least_lean", self.least_lean, 0)
        share_of("level", self.level)

    def fewest(self, total: int) -> int:
        """Texts that a candidate needs."""
        fewest = self.least_count if self.least_count is not None else max(8, round(total / 200))
        if 2 * fewest > total:
            raise ValueError(f"least_count: {total} examples are too few for candidates of {fewest} texts each")
        return fewest

    def texts_each(self, candidates: int) -> int:
        """Texts of a candidate that are changed in each way, within the budget of passes."""
        if self.passes is None:
            return self.texts
        return max(2, min(self.texts, self.passes // (_PASSES_EACH * max(1, candidates))))


def find(
    model: nn.Module,
    tokenizer: Any,
    examples: Examples,
    *,
    columns: Mapping[str, Sequence[Any]] | None = None,
    lexicon: GoldenTokens | None = None,
    candidates: int = 60,
    texts: int = 32,
    least_count: int | None = None,
    least_lean: float = 0.1,
    level: float = 0.05,
    passes: int | None = None,
    topics: int = 0,
    batch_size: int = 64,
    max_length: int | None = None,
    memory: str | int | None = None,
    resume: PathLike | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Found:
    """Ranks what a classifier leans on, without any list of words, and proposes which of it is a shortcut.

    Words, phrases of any length, word pairs across two texts, their overlap, negation, length, punctuation, columns and
    topics are candidates. All are held against the labels and against the model's answers to the texts as they are;
    the strongest that say something of their own are then measured by exact forward passes: taken out of texts that
    have them, exchanged for neutral units of the same length and frequency, and put into texts that lack them beside
    such a neutral unit. Roles are proposals (`spurge.methods.find.roles`), for a person to review in the table.

    Args:
        model, tokenizer: a sequence classifier of ``transformers``; it comes back as it was.
        examples: labelled texts, those of training or like them.
        columns: of the data, by name, a value for each text: names, or numbers.
        lexicon: words that ought to decide labels; raises the score of these words and of words like them, and lowers
            that of others.
        candidates: how many are measured, at most.
        texts: of each candidate, changed in each way, at most.
        least_count: texts that have a candidate, at least; by default 8, and one of 200.
        least_lean: rise of a label's log-odds, in nats, below which no candidate is called spurious.
        level: false discovery rate of candidates that are called spurious.
        passes: budget of changed texts; fewer are changed for each candidate where it is short.
        topics: clusters of texts that are candidates, too, 0 for none; needs scikit-learn.
        batch_size: texts that run at once; texts of like length run together.
        max_length: tokens a text is cut to; by default the tokenizer's own limit.
        memory: bytes that a batch's activations may take, such as ``"256MiB"``.
        resume: folder of finished blocks of forward passes; a second run goes on from them.
        seed: of all choices; the same seed gives the same table.
        progress: show bars.

    Raises:
        TypeError: ``examples`` is no :class:`Examples`, or a setting of another type.
        ValueError: a setting out of range, texts of one label alone, columns of another length, a lexicon of other
            labels, or a model that gives no single label.
        ModuleNotFoundError: topics without scikit-learn.
    """
    settings = Settings(
        candidates=candidates,
        texts=texts,
        least_count=least_count,
        least_lean=least_lean,
        level=level,
        passes=passes,
        topics=topics,
        max_length=max_length,
        seed=seed,
    )
    handle = Handle.of(model, tokenizer)
    handle.check_single_label("model")
    instance("examples", examples, Examples)
    handle.check_labels("examples", examples.labels)
    if len(set(examples.targets.tolist())) < 2:
        raise ValueError("examples: need texts of at least 2 labels, got 1")
    for name, values in (columns or {}).items():
        if len(values) != len(examples):
            raise ValueError(f"columns: {name!r} needs a value for each of {len(examples)} texts, got {len(values)}")
    words = None if lexicon is None else lexicon.for_labels(examples.labels)
    runner = Passes(
        handle,
        examples.labels,
        batch_size=batch_size,
        max_length=max_length,
        memory=memory,
        resume=resume,
        progress=progress,
    )
    return _Search(handle, examples, dict(columns or {}), words, settings, runner).run()


class _Search:
    """One run of :func:`find`."""

    def __init__(
        self,
        handle: Handle,
        examples: Examples,
        columns: Mapping[str, Sequence[Any]],
        lexicon: GoldenTokens | None,
        settings: Settings,
        passes: Passes,
    ) -> None:
        self.handle, self.examples, self.columns, self.golden = handle, examples, columns, lexicon
        self.settings, self.passes = settings, passes
        self.targets = examples.targets.numpy()
        self.classes = len(examples.labels)
        self.least = settings.fewest(len(examples))
        self.words: dict[str, list[Candidate]] = {}

    def run(self) -> Found:
        units = self._units()
        self.margins = margins_of(self.passes.logits("texts", list(self.examples)))
        if self.margins.shape[1] != self.classes:
            raise ValueError(f"examples: have {self.classes} labels, the model {self.margins.shape[1]} outputs")
        self.answers = self.margins.argmax(1)
        self.associated = associate([one.rows for one in units], self.targets, self.classes)
        chosen = self._short_list(units)
        pairs, reliances = self._measured(units, chosen)
        rows = self._rows(units, chosen, reliances)
        info = {
            "method": "find",
            "settings": asdict(self.settings),
            "data": self.examples.fingerprint(),
            "examples": len(self.examples),
            "units": len(units),
            "least_count": self.least,
            "passes": self.passes.texts,
            "pairs": pairs,
            "accuracy": 100 * float((self.answers == self.targets).mean()),
            "lexicon": None if self.golden is None else self.golden.fingerprint(),
            "spurge": spurge_version(),
        }
        rows.sort(key=lambda row: (-row.weight, row.kind, row.word))
        return Found(tuple(rows), self.examples.labels, info)

    # Candidates

    def _units(self) -> list[Candidate]:
        """All candidates; `words` keeps the single words of each place."""
        parts = [row.segments for row in self.examples]
        paired = len(parts[0]) == 2
        units: list[Candidate] = []
        for index, place in enumerate(PLACES if paired else ("",)):
            self.words[place] = []
            for found in repeats([[own[index]] for own in parts], least=self.least):
                one = Candidate(WORDED[len(found.words) > 1], found.text, place, found.rows)
                if one.kind == "word":
                    self.words[place].append(one)
                if len(found.rows) <= len(parts) - self.least:
                    units.append(one)
        if paired:
            first, second = (self.words[place] for place in PLACES)
            made = word_pairs(first, second, self.targets, self.classes, self.least)
            units += adds_to_words(made, self.words, self.targets, self.classes)
        units += traits(self.examples, self.least) + columns_of(self.columns, self.least)
        if self.settings.topics:
            units += self._topics(parts)
        if not units:
            raise ValueError(
                f"examples: nothing stands in at least {self.least} of {len(parts)} texts; lower least_count"
            )
        return units

    def _topics(self, parts: Sequence[Sequence[str]]) -> list[Candidate]:
        """Clusters of the texts by their words: the model's own states would cluster by its answers."""
        from spurge.engine.causal.topics import find_topics

        vectors = np.zeros((len(parts), 0))
        for place, words in self.words.items():
            embedded = word_vectors(self.handle, [one.name for one in words]).numpy()
            summed = np.zeros((len(parts), embedded.shape[1]))
            for one, vector in zip(words, embedded, strict=True):
                summed[one.rows] += np.log(len(parts) / len(one.rows)) * vector
            vectors = summed if not place else np.concatenate([vectors, summed], 1)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        vectors += 1e-6 * np.random.default_rng(self.settings.seed).standard_normal(vectors.shape)
        texts = [" ".join(own) for own in parts]
        topics = find_topics(texts, vectors, clusters=[self.settings.topics], seed=self.settings.seed)
        return topics_of(topics.labels.numpy(), topics.names, self.least)

    def _short_list(self, units: Sequence[Candidate]) -> list[int]:
        """The candidates to measure: those bound to labels, then those that the model's answers go with."""
        most = self.settings.candidates
        bound = distinct(
            units,
            np.abs(self.associated.z),
            self.targets,
            self.classes,
            least=self.least,
            most=max(1, round(_BOUND * most)),
        )
        lean = leaning([one.rows for one in units], self.margins)
        return distinct(units, lean, self.answers, self.classes, least=self.least, most=most, taken=bound)

    # Exact passes

    def _measured(self, units: Sequence[Candidate], chosen: Sequence[int]) -> tuple[int, list[Reliance]]:
        """Number of pairs of texts, and the reliance on each chosen candidate."""
        pools = {}
        for place in self.words:
            worded = [i for i, one in enumerate(units) if one.kind in WORDED and one.place == place]
            pools[place] = Neutral([units[i] for i in worded], self.associated.log_odds[worded])
        each = self.settings.texts_each(len(chosen))
        pairs: list[list[Pair]] = []
        for index in chosen:
            one = units[index]
            pool = pools[one.place if one.place in pools else PLACES[1]]
            label = int(self.associated.label[index])
            pairs.append(Changes(self.examples, pool, texts=each, seed=self.settings.seed).of(one, label))
        every = [pair for own in pairs for pair in own]
        reliances = []
        margins = np.zeros((0, self.classes))
        if every:
            logits = self.passes.logits(
                "changed texts", [row for pair in every for row in (pair.with_it, pair.without)]
            )
            margins = margins_of(logits)
        at = 0
        for index, own in zip(chosen, pairs, strict=True):
            label = int(self.associated.label[index])
            if own:
                part = margins[2 * at : 2 * (at + len(own))]
                reliances.append(of_pairs(own, part[::2], part[1::2], label))
            else:
                reliances.append(observed(units[index].rows, self.margins, self.targets, label))
            at += len(own)
        return len(every), reliances

    # Roles

    def _rows(self, units: Sequence[Candidate], chosen: Sequence[int], reliances: Sequence[Reliance]) -> list[Row]:
        judge = Judge(self.handle, self.examples, self.words, self.targets, self.golden)
        found = self.associated
        evidence = [judge.evidence(units[i], int(found.label[i]), float(found.log_odds[i])) for i in chosen]
        scores = [causal_score(own) for own in evidence]
        q_data = _q(found.p[list(chosen)], len(units))
        p_data, p_lean = found.p[list(chosen)], np.array([one.lean.p for one in reliances])
        q = np.zeros(len(chosen))
        causes = np.array(scores) >= 0.5
        for side in (causes, ~causes):
            q[side] = np.maximum(_q(p_data[side], len(units)), _q(p_lean[side], int(side.sum())))
        rows = []
        for at, (index, reliance) in enumerate(zip(chosen, reliances, strict=True)):
            lean = {"mean": reliance.lean.mean, "least": self.settings.least_lean}
            role, reason = propose(evidence[at], float(q[at]), self.settings.level, lean, measured=reliance.measured)
            rows.append(
                Row(
                    role=role,
                    reason=reason,
                    causal=scores[at],
                    q=float(q[at]),
                    q_data=float(q_data[at]),
                    **self._numbers(units[index], index, found, reliance),
                )
            )
        return rows

    def _numbers(self, one: Candidate, index: int, found: Association, reliance: Reliance) -> dict[str, Any]:
        label = int(found.label[index])
        against = one.rows[self.targets[one.rows] != label]
        right = self.answers[against] == self.targets[against]
        low, high = reliance.lean.interval
        shown = [" / ".join(self.examples[int(row)].segments) for row in (*against[:1], *one.rows[:2])]
        effects: dict[str, float] = {change: effect.mean for change, effect in reliance.effects.items()}
        return {
            "word": one.name,
            "kind": one.kind,
            "place": one.place,
            "label": self.examples.labels[label],
            "count": len(one.rows),
            "share": 100 * float(found.share[index]),
            "log_odds": float(found.log_odds[index]),
            "lean": reliance.lean.mean,
            "low": low,
            "high": high,
            "flips": reliance.flips,
            "measured": reliance.measured,
            "against": 100 * float(right.mean()) if len(against) else float("nan"),
            "against_count": len(against),
            "examples": tuple(dict.fromkeys(text[:200].replace(" | ", " ") for text in shown)),
            **effects,
        }


def _q(p: np.ndarray, tests: int) -> np.ndarray:
    """Benjamini and Hochberg's q of the smallest of ``tests`` p; the others count as 1."""
    padded = np.concatenate([p, np.ones(max(0, tests - len(p)))])
    return benjamini_hochberg(torch.from_numpy(padded)).numpy()[: len(p)]
