"""The proposed role of a candidate, causal or spurious, as a sum of evidence that can be read.

Data and model alone cannot tell a cause from a shortcut: both go with the label, and the model leans on both. What is
weighed here is what a reader would look at: whether words of its kind go with labels too (`Peers`), how strong a word
it is, whether it is a name or a function word, whether it is about form or subject instead of meaning, whether it alone
would do for most texts of a label, and what a lexicon says. The weights were set on SST-2, with words that AFINN or
VADER rate as strong in the place of causes; that of a word which would do alone was not fitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from spurge.engine.data.words import as_phrase, word_spans
from spurge.methods.find.peers import Witnesses
from spurge.methods.golden.corpus_words import FUNCTION_WORDS
from spurge.methods.golden.golden import GoldenTokens

Role = Literal["causal", "spurious", "undecided"]
ROLES: tuple[Role, ...] = ("causal", "spurious", "undecided")
CAUSAL_FROM, SPURIOUS_UP_TO = 0.6, 0.4  # causal score
_PEERS, _STRENGTH, _SHIFT = 2.0, 0.6, -0.4
_FUNCTION, _NAME, _FORM = -2.0, -1.5, -2.5
_DOMINANT, _DOMINANT_FROM, _DOMINANT_AT = -4.0, 0.3, 0.6
_LISTED, _LIKE_LISTED, _PEERS_BESIDE_LISTS = 2.5, 2.0, 1.0
_RIDGE, _FOLDS, _LEAST_LISTED = 3.0, 5, 20
_FORMS = {
    "length": "is about length, not meaning",
    "punctuation": "is a mark, not a word",
    "column": "stands beside the text, not in it",
    "overlap": "is about shared words, not meaning",
    "topic": "is a subject, and each label has texts of every subject",
}


@dataclass(frozen=True)
class Evidence:
    """One reason for or against a cause.

    Attributes:
        weight: what it adds to the log-odds of a cause.
        clause: the reason; "" for what needs none.
    """

    weight: float
    clause: str


class Lexicon:
    """Words of a lexicon, and how much other words are like them.

    Likeness is a ridge regression on word embeddings: listed words against those of the texts that are not listed,
    both sides weighing the same; of each word by a fit that has not seen it.

    Args:
        golden: words of labels, in the order of the model's outputs.
        words: words of the texts.
        vectors: embeddings of ``words`` at unit length, ``[W, H]``.
        listed: embeddings of the lexicon's single words, ``[L, H]``, in the order of :meth:`single`.
    """

    def __init__(self, golden: GoldenTokens, words: Sequence[str], vectors: np.ndarray, listed: np.ndarray) -> None:
        self._label = {word: y for y, name in enumerate(golden.labels) for word in golden.causal[name]}
        self._irrelevant = frozenset(golden.irrelevant)
        self._like = self._likeness(words, vectors, self.single(golden), listed)

    @staticmethod
    def single(golden: GoldenTokens) -> list[str]:
        """The causal words of a lexicon that are one word."""
        return [word for words in golden.causal.values() for word in words if " " not in word]

    def evidence(self, name: str, label: int, label_names: Sequence[str]) -> list[Evidence]:
        """What the lexicon says of a word or phrase that goes with a label."""
        parts = name.split()
        own = self._label.get(name)
        if own is None:
            inside = [self._label[part] for part in parts if part in self._label]
            own = inside[0] if inside and len(set(inside)) == 1 else None
        like = max((self._like.get(part, 0.0) for part in parts), default=0.0)
        found = [Evidence(_LIKE_LISTED * like, "is like words of the lexicon" if like > 0 else "is unlike its words")]
        if own is not None:
            sign, other = (1.0, "") if own == label else (-0.5, f", but goes with {label_names[label]}")
            found.append(Evidence(sign * _LISTED, f"the lexicon has it for {label_names[own]}{other}"))
        elif name in self._irrelevant:
            found.append(Evidence(-_LISTED, "the lexicon has it as irrelevant"))
        else:
            found.append(Evidence(-0.5, "is not in the lexicon"))
        return found

    def _likeness(
        self, words: Sequence[str], vectors: np.ndarray, single: Sequence[str], listed: np.ndarray
    ) -> dict[str, float]:
        rest = [number for number, word in enumerate(words) if word not in self._label]
        if min(len(single), len(rest)) < _LEAST_LISTED:
            return {}
        names = [*single, *(words[number] for number in rest)]
        values = np.concatenate([listed, vectors[rest]]).astype(np.float64)
        values = np.concatenate([values, np.ones((len(values), 1))], 1)
        target = np.where(np.arange(len(names)) < len(single), 1.0, -1.0)
        weight = np.where(target > 0, 0.5 / len(single), 0.5 / len(rest)) * len(names)
        fold = np.arange(len(names)) % _FOLDS
        penalty = _RIDGE * np.diag([*np.ones(values.shape[1] - 1), 0.0])
        found = np.zeros(len(names))
        for number in range(_FOLDS):
            inside = fold != number
            weighted = values[inside] * weight[inside, None]
            fit = np.linalg.solve(weighted.T @ values[inside] + penalty, weighted.T @ target[inside])
            found[~inside] = values[~inside] @ fit
        return dict(zip(names, np.clip(2 * found, -2, 2).tolist(), strict=True))


def weigh(
    kind: str,
    name: str,
    label: int,
    log_odds: float,
    peers: Witnesses,
    *,
    named: float = 0.0,
    covers: float = 0.0,
    lexicon: Lexicon | None = None,
    label_names: Sequence[str] = (),
) -> list[Evidence]:
    """The evidence on a candidate that goes with ``label``.

    Args:
        kind, name: of the candidate.
        log_odds: of its label.
        peers: as `Peers.of` gives it.
        named: share of its places inside sentences where it is written as a name.
        covers: share of the label's texts that have it, less that of all others.
        lexicon: None for none.
        label_names: for the clauses.
    """
    if kind in _FORMS:
        return [Evidence(_FORM, _FORMS[kind])]
    if kind == "negation":
        return [Evidence(0.0, "turns what other words say")]
    found = [Evidence(_SHIFT, ""), Evidence(_STRENGTH * float(np.log(np.clip(abs(log_odds), 0.1, 10.0))), "")]
    if not np.isnan(peers.ratio):
        weight = (_PEERS if lexicon is None else _PEERS_BESIDE_LISTS) * float(np.clip(peers.ratio, -2, 2))
        goes = "go with labels, too" if weight > 0 else "go with no label"
        found.append(Evidence(weight, f"words like it ({', '.join(peers.nearest)}) {goes}"))
    words = as_phrase(name) or ()
    if words and all(word in _FUNCTION_SET for word in words):
        found.append(Evidence(_FUNCTION, "is a function word" if len(words) == 1 else "is made of function words"))
    if named > 0.5:
        found.append(Evidence(_NAME * named, "is written as a name"))
    if covers > _DOMINANT_FROM:
        share = min(1.0, (covers - _DOMINANT_FROM) / (_DOMINANT_AT - _DOMINANT_FROM))
        found.append(Evidence(_DOMINANT * share, "would do for most texts of its label, where causes are many words"))
    if lexicon is not None:
        found += lexicon.evidence(name, label, label_names)
    return found


_FUNCTION_SET = frozenset(FUNCTION_WORDS)


def causal_score(evidence: Sequence[Evidence]) -> float:
    """The probability of a cause that the evidence adds up to, in (0, 1)."""
    return float(1 / (1 + np.exp(-sum(one.weight for one in evidence))))


def propose(
    evidence: Sequence[Evidence], q: float, level: float, lean: Mapping[str, float], *, measured: bool = True
) -> tuple[Role, str]:
    """A role and, in one clause, the reason.

    Spurious is only what is like no cause and both bound to its label in the data and, as changed texts prove, leaned
    on by the model.

    Args:
        evidence: of :func:`weigh`.
        q: false discovery rate of being bound to the label and leaned on.
        level: of ``q``.
        measured: whether it was measured by changed texts.
        lean: ``"mean"`` rise of the label's log-odds, and the ``"least"`` that counts.
    """
    score = causal_score(evidence)
    sign = 1 if score >= CAUSAL_FROM else -1
    telling = max((one for one in evidence if one.clause), key=lambda one: sign * one.weight, default=None)
    reason = telling.clause if telling is not None else "nothing is known of it"
    if score >= CAUSAL_FROM:
        return "causal", reason
    if score > SPURIOUS_UP_TO:
        return "undecided", f"{reason}, which is too little to tell"
    if not q < level:
        return "undecided", "may go with the label, or move the model, by chance"
    if not measured:
        return "undecided", f"{reason}; no text can be changed to prove that the model leans on it"
    if not lean["mean"] >= lean["least"]:
        return "undecided", f"the model leans on it by less than {lean['least']:g}"
    return "spurious", reason


def written_as_names(texts: Sequence[str]) -> dict[str, tuple[int, int]]:
    """For each word inside sentences: how often it begins with a capital, and how often it stands there at all."""
    found: dict[str, list[int]] = {}
    for text in texts:
        behind = 0
        for start, end, word in word_spans(text, {}):
            if behind and not set(text[behind:start]) & set(".!?:;\"“”'()\n") and end - start > 1:
                counts = found.setdefault(word, [0, 0])
                counts[0] += text[start].isupper() and not text[start:end].isupper()
                counts[1] += 1
            behind = end
    return {word: (capital, places) for word, (capital, places) in found.items()}
