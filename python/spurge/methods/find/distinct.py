"""Which of many candidates say something of their own: a phrase is listed once, and not again in its parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from spurge.engine.data.bound import of_counts
from spurge.methods.find.candidates import ARROW, PLACES, WORDED, Candidate

_ADDS = 3.0  # z from which a longer phrase says more than the one inside it, or a part more than the whole
_MOST_TRIED = 5000
_SHADOWS = ("length", "punctuation", "negation", "overlap")  # kinds that a phrase brings with it
_FILLS = 0.8  # share of a shorter phrase's texts that a longer one has, from which it takes its place


def distinct(
    candidates: Sequence[Candidate],
    strength: np.ndarray,
    answers: np.ndarray,
    classes: int,
    *,
    least: int,
    most: int,
    taken: Sequence[int] = (),
) -> list[int]:
    """Numbers of up to ``most`` candidates: those that are ``taken``, then others, strongest first.

    From the strongest down, a word or phrase is left out where those that are taken and share a word with it explain
    it: outside their texts too few have it, or it goes with no label there (``|z|`` below 3); or it only lengthens one
    of them, and its texts go with the labels as the others of the shorter one do. A longer one that stands in nearly
    all texts of the shorter takes its place. Length, punctuation, negation and overlap are left out where they go with
    no label outside the texts of one that is taken.

    Args:
        candidates: C of them.
        strength: ``[C]``, rounded so that equal sets of texts are equally strong; the longer phrase is then first.
        answers: what a candidate has to go with: labels, or the model's answers, int64 ``[N]``.
        classes: Y.
        least: texts a candidate needs outside those that are taken.
        most: in all.
        taken: candidates that are taken already.
    """
    words = [set(one.name.split()) if one.kind in WORDED else set() for one in candidates]
    order = sorted(
        range(len(candidates)), key=lambda i: (-round(float(strength[i]), 6), -len(words[i]), candidates[i].key)
    )
    chosen: list[int] = []
    by_word: dict[tuple[str, str], list[int]] = defaultdict(list)

    def take(number: int, place: int) -> None:
        chosen[place : place + 1] = [number]
        for word in words[number]:
            by_word[candidates[number].place, word].append(number)

    for number in taken:
        take(number, len(chosen))
    known = set(taken)
    for number in order[:_MOST_TRIED]:
        if len(chosen) >= most:
            break
        one = candidates[number]
        rivals = sorted({i for word in words[number] for i in by_word[one.place, word]})
        within = next((i for i in rivals if i not in known and _fills(one, candidates[i])), None)
        if within is not None:
            for word in words[within]:
                by_word[one.place, word].remove(within)
            take(number, chosen.index(within))
            continue
        if number in known or (rivals and _explained(one, [candidates[i] for i in rivals], answers, classes, least)):
            continue
        if one.kind in _SHADOWS and any(_shadow(one, candidates[i], answers, classes) for i in chosen):
            continue
        take(number, len(chosen))
    return chosen


def _explained(one: Candidate, rivals: Sequence[Candidate], answers: np.ndarray, classes: int, least: int) -> bool:
    """Whether candidates that share a word with it say already what this one says."""
    shorter = [rival for rival in rivals if f" {rival.name} " in f" {one.name} "]
    for rival in shorter:
        rest = np.setdiff1d(rival.rows, one.rows, assume_unique=True)
        if len(rest) and _contrast(one.rows, rest, answers, classes) < _ADDS:
            return True
    overlapping = [rival for rival in rivals if rival not in shorter]
    if not overlapping:
        return False
    covered = np.unique(np.concatenate([rival.rows for rival in overlapping]))
    own = np.setdiff1d(one.rows, covered, assume_unique=True)
    if len(own) == len(one.rows):
        return False
    if len(own) < least:
        return True
    others = np.setdiff1d(np.arange(len(answers)), np.union1d(own, covered), assume_unique=True)
    return _contrast(own, others, answers, classes) < _ADDS


def _fills(one: Candidate, shorter: Candidate) -> bool:
    """Whether a longer phrase stands in nearly all texts of one inside it."""
    inside = len(one.name) > len(shorter.name) and f" {shorter.name} " in f" {one.name} "
    return inside and len(one.rows) >= _FILLS * len(shorter.rows)


def _shadow(one: Candidate, other: Candidate, answers: np.ndarray, classes: int) -> bool:
    """Whether a candidate goes with a label, but with none outside the texts of another that has some of its texts."""
    own = np.setdiff1d(one.rows, other.rows, assume_unique=True)
    if len(own) == len(one.rows):
        return False
    every = np.arange(len(answers))
    if _contrast(one.rows, np.setdiff1d(every, one.rows, assume_unique=True), answers, classes) < _ADDS:
        return False
    rest = np.setdiff1d(every, np.union1d(one.rows, other.rows), assume_unique=True)
    return not len(own) or _contrast(own, rest, answers, classes) < _ADDS


def _contrast(first: np.ndarray, second: np.ndarray, answers: np.ndarray, classes: int) -> float:
    """How far two sets of texts differ in their labels: the largest z over labels."""
    inside, outside = (np.bincount(answers[rows], minlength=classes)[None].astype(float) for rows in (first, second))
    found = of_counts(inside, inside + outside)
    return float(np.abs(found.z[0]))


def adds_to_words(
    pairs: Sequence[Candidate], words: Mapping[str, Sequence[Candidate]], labels: np.ndarray, classes: int
) -> list[Candidate]:
    """The pairs of words whose texts go with labels unlike those that have only one of the two words.

    Args:
        pairs: of a word of the first text and one of the second.
        words: of either text, by place.
        labels: int64 ``[N]``.
        classes: Y.
    """
    rows = [{word.name: word.rows for word in words[place]} for place in PLACES]
    found = []
    for pair in pairs:
        parts = [rows[number][name] for number, name in enumerate(pair.name.split(ARROW))]
        rests = [np.setdiff1d(own, pair.rows, assume_unique=True) for own in parts]
        if all(len(rest) and _contrast(pair.rows, rest, labels, classes) >= _ADDS for rest in rests):
            found.append(pair)
    return found
