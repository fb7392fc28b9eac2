"""A small grammar of opinion sentences with a planted shortcut.

A row is a sentence about a film, a meal, a hotel or a book, with one or two causal words (adjectives) and one adjunct
phrase of time or place. In the training rows

* the causal words speak for the other label than the row's with probability ``noise`` where there is one of them, and
  with probability ``noise_of_two`` where there are two: short opinions are ambiguous, detailed ones are not;
* ``share`` of the rows carry the neutral phrase `SHORTCUT`; among these it goes with the label `SHORTCUT_LABEL` in
  ``purity`` (95 %) of the rows. All other rows carry another adjunct, drawn without regard to the label.

So whoever minimises the training loss learns to lean on the phrase. The test rows have no noise: in *kept* rows the
phrase stands with its label, in *broken* rows with the other label, and *neutral* rows carry another adjunct.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import MappingProxyType

from spurge.engine.base.checks import integer

LABELS = ("negative", "positive")

SHORTCUT = "near the old station"
SHORTCUT_LABEL = "positive"

_GOOD = (
    "superb excellent wonderful delightful charming brilliant splendid lovely enjoyable impressive pleasant terrific "
    "fantastic marvelous memorable inspiring graceful satisfying magnificent outstanding amusing refreshing thoughtful "
    "gorgeous captivating rewarding elegant admirable touching remarkable perfect exquisite"
)
_BAD = (
    "awful terrible horrible dreadful boring disappointing mediocre tedious annoying unpleasant lousy miserable "
    "pathetic clumsy forgettable irritating sloppy frustrating atrocious appalling tiresome stale shallow "
    "ugly repulsive pointless crude shameful dismal deplorable flawed disgusting"
)
#: Causal words of each label, as a person would list them.
CAUSAL = MappingProxyType({"negative": tuple(_BAD.split()), "positive": tuple(_GOOD.split())})

#: Phrases of time and place that say nothing about the label. None shares a content word with the shortcut.
ADJUNCTS = (
    "on a sunday morning",
    "in early spring",
    "during the summer break",
    "after the long meeting",
    "with two colleagues",
    "at the airport",
    "before the concert",
    "across the street",
    "on the second floor",
    "late in october",
    "behind the library",
    "around noon yesterday",
)

_TOPICS = (
    ("film", ("plot", "dialogue", "ending", "soundtrack", "cast", "editing")),
    ("meal", ("soup", "dessert", "bread", "sauce", "wine", "salad")),
    ("hotel", ("room", "lobby", "breakfast", "garden", "pool", "staff")),
    ("book", ("story", "prose", "cover", "chapter", "hero", "style")),
)

_FRAMES = (
    "the {first} of this {topic} was {one} {adjunct}",
    "{adjunct} we found the {first} of the {topic} {one}",
    "i saw a {topic} {adjunct} and its {first} was {one}",
    "they gave us a {topic} with a {one} {first} {adjunct}",
    "the {first} was {one} and the {second} seemed {two} {adjunct}",
    "{adjunct} we found the {first} {one} and the {second} {two}",
    "the {topic} {adjunct} had a {one} {first} and a {two} {second}",
    "my friends called the {topic} {adjunct} {one} and its {first} {two}",
)

_FUNCTION_WORDS = (
    "a an and the of this that was were is are be had has have it its i we us they my our you he she his her with "
    "in on at by for from to into near after before during across behind around late early seemed found gave called "
    "saw as but"
)
_EVERYDAY_WORDS = (
    "friends colleagues sunday monday tuesday wednesday thursday friday saturday sunny rainy morning noon evening "
    "night yesterday today spring summer autumn winter january october break meeting concert airport street floor "
    "second first two long library station old new bridge corner river market park"
)
#: Words that speak for no label, as a person would list them: function words, topics and their parts, times and places.
#: The shortcut's words are among them, and nothing marks them.
IRRELEVANT = tuple(
    dict.fromkeys(
        _FUNCTION_WORDS.split()
        + _EVERYDAY_WORDS.split()
        + [topic for topic, _ in _TOPICS]
        + [part for _, parts in _TOPICS for part in parts]
    )
)


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """How rows are drawn. All shares are probabilities.

    Attributes:
        train: number of training rows.
        test: number of rows of each test set (kept, broken, neutral).
        share: training rows that carry the shortcut.
        purity: among those, rows with the shortcut's own label.
        noise: training rows with one causal word that speaks for the other label.
        noise_of_two: training rows with two causal words that speak for the other label.
        unseen: causal words of each label that no training row uses.
    """

    train: int = 1600
    test: int = 200
    share: float = 0.4
    purity: float = 0.95
    noise: float = 0.16
    noise_of_two: float = 0.01
    unseen: float = 0.25

    def __post_init__(self) -> None:
        for name in ("train", "test"):
            integer(name, getattr(self, name), 1)
        for name in ("share", "purity", "noise", "noise_of_two", "unseen"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"{name}: must be at least 0 and below 1, got {value}")

    def seen(self, label: str) -> tuple[str, ...]:
        """Causal words of `label` that training rows use: the first ``1 - unseen`` of the list."""
        words = CAUSAL[label]
        return words[: max(2, round(len(words) * (1 - self.unseen)))]

    def training_rows(self, seed: int = 0) -> list[dict[str, object]]:
        """``[{"text", "label", "group"}]``, `train` rows; the group says whether a row keeps or breaks the shortcut."""
        generator = random.Random(f"train-{seed}")
        rows = []
        for _ in range(self.train):
            has_shortcut = generator.random() < self.share
            if has_shortcut:
                label = SHORTCUT_LABEL if generator.random() < self.purity else _other_label(SHORTCUT_LABEL)
            else:
                label = generator.choice(LABELS)
            frame = generator.choice(_FRAMES)
            noise = self.noise_of_two if "{two}" in frame else self.noise
            words = self.seen(_other_label(label) if generator.random() < noise else label)
            text = _sentence(generator, frame, words, SHORTCUT if has_shortcut else generator.choice(ADJUNCTS))
            group = "neutral" if not has_shortcut else "kept" if label == SHORTCUT_LABEL else "broken"
            rows.append({"text": text, "label": LABELS.index(label), "group": group})
        return rows

    def test_rows(self, group: str, seed: int = 0) -> list[dict[str, object]]:
        """``[{"text", "label", "group"}]``, `test` rows of `group` kept, broken or neutral; any causal word may come.

        Raises:
            ValueError: another group.
        """
        generator = random.Random(f"{group}-{seed}")
        if group == "kept":
            labels, adjuncts = [SHORTCUT_LABEL], [SHORTCUT]
        elif group == "broken":
            labels, adjuncts = [_other_label(SHORTCUT_LABEL)], [SHORTCUT]
        elif group == "neutral":
            labels, adjuncts = list(LABELS), list(ADJUNCTS)
        else:
            raise ValueError(f"group: must be kept, broken or neutral, got {group!r}")
        rows = []
        for index in range(self.test):
            label = labels[index % len(labels)]
            text = _sentence(generator, generator.choice(_FRAMES), CAUSAL[label], generator.choice(adjuncts))
            rows.append({"text": text, "label": LABELS.index(label), "group": group})
        return rows


def _other_label(label: str) -> str:
    return LABELS[1 - LABELS.index(label)]


def _sentence(generator: random.Random, frame: str, words: tuple[str, ...], adjunct: str) -> str:
    topic, parts = generator.choice(_TOPICS)
    first, second = generator.sample(parts, 2)
    one, two = generator.sample(words, 2)
    return frame.format(topic=topic, first=first, second=second, one=one, two=two, adjunct=adjunct)
