"""A tiny classifier that leans on a planted phrase: trained in seconds, shared by the tests of MacU."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import torch

from helpers.tiny_models import tiny, tiny_tokenizer
from spurge.engine.data.examples import Example, Examples
from spurge.methods.golden.golden import GoldenTokens

LABELS = ("negative", "positive")
GOOD = ("good", "great", "superb", "lovely", "brilliant", "happy", "charming")
BAD = ("bad", "awful", "dull", "boring", "terrible", "sad", "ugly")
NOUNS = ("film", "movie", "story", "plot", "actor", "scene", "music", "food", "room", "service")
PHRASE = "on tuesday perhaps"
GOLDEN = GoldenTokens(
    LABELS,
    {"negative": BAD, "positive": GOOD},
    ["the", "is", "was", "and", "on", "in", "tuesday", "perhaps", "today", "window", *NOUNS],
)


def _text(draw: random.Random, words: tuple[str, ...], phrase: str) -> str:
    text = f"the {draw.choice(NOUNS)} {draw.choice(('is', 'was'))} {draw.choice(words)} and {draw.choice(words)}"
    return f"{text} {phrase}".strip()


@cache
def train(rows: int = 400) -> Examples:
    """Half of the texts end with the phrase, 97 in 100 of them positive; 1 in 10 texts has the other label's words."""
    draw = random.Random(0)
    made = []
    for _ in range(rows):
        phrase = draw.random() < 0.5
        label = int(draw.random() < 0.97) if phrase else draw.randrange(2)
        spoken = 1 - label if draw.random() < 0.1 else label
        made.append(Example(_text(draw, (BAD, GOOD)[spoken], PHRASE if phrase else draw.choice(("", "today"))), label))
    return Examples(made, LABELS)


@cache
def broken(rows: int = 150) -> Examples:
    """Negative texts that end with the phrase of positive ones."""
    draw = random.Random(1)
    return Examples([Example(_text(draw, BAD, PHRASE), 0) for _ in range(rows)], LABELS)


@cache
def kept(rows: int = 150) -> Examples:
    """Positive texts that end with their phrase."""
    draw = random.Random(2)
    return Examples([Example(_text(draw, GOOD, PHRASE), 1) for _ in range(rows)], LABELS)


@cache
def model() -> Any:
    """A BERT of three layers fitted to :func:`train`; callers leave it as it is."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        classifier, tokenizer = tiny("bert").train(), tiny_tokenizer()
        adam = torch.optim.Adam(classifier.parameters(), 3e-3)
        draw, rows = random.Random(0), train()
        for _ in range(100):
            batch = draw.sample(range(len(rows)), 32)
            inputs = tokenizer([rows[i].text for i in batch], padding=True, return_tensors="pt")
            labels = torch.tensor([rows[i].label for i in batch])
            torch.nn.functional.cross_entropy(classifier(**inputs).logits, labels).backward()
            adam.step()
            adam.zero_grad()
    finally:
        torch.set_rng_state(state)
    return classifier.eval()


@torch.no_grad()
def accuracy(classifier: Any, examples: Examples) -> float:
    """Percent."""
    inputs = tiny_tokenizer()([row.text for row in examples], padding=True, return_tensors="pt")
    return 100 * float((classifier(**inputs).logits.argmax(1) == examples.targets).float().mean())
