"""Counterfactual texts to train on: every causal word by one of another label, the label with it.

The idea of Sentiment-CAD (Yang et al. 2021, ACL) and AutoCAD (Wen et al. 2022, Findings of EMNLP), which edit training
texts by machine and train on both; here words are swapped as a repair does (`spurge.methods.macu.swaps`, kind flip),
one swap for two texts.
"""

from __future__ import annotations

from spurge.engine.data.examples import Examples
from spurge.engine.models.handle import Handle
from spurge.methods.golden.golden import GoldenTokens
from spurge.methods.macu.swaps import SwapMaker, SwapShares

PER_TEXT = 0.5
FLIPS = SwapShares(flip=1, random=0, same=0, negation=0, template=0, neutral=0)


def augmented(handle: Handle, rows: Examples, golden: GoldenTokens, seed: int) -> Examples:
    """The rows and swaps of them; `handle` has the word embeddings that say which words are near.

    Raises:
        ValueError: not one swap can be made.
    """
    maker = SwapMaker(handle, rows, golden, FLIPS, seed=seed)
    swaps = maker.make(rows, round(PER_TEXT * len(rows)), seed)
    return Examples([*rows, *(swap.example for swap in swaps)], rows.labels)
