"""What localisation is to find where the truth is known."""

from __future__ import annotations

from experiments.claims.claim import Claim, Number

_LOCALISERS = ("default", "layer", "joint", "exact", "macu counterfactual", "macu proximity", "activation", "random")

CLAIMS = tuple(
    Claim(
        "localisation",
        f"90 % of planted neurons are among as many top scores, asked by {question}",
        "an aim of this project",
        "circuits",
        tuple(Number(name, f"planted: {case}", name, "recall") for name in _LOCALISERS),
        lambda default, *others: default >= 90,
        f"decoys of the same activations and norms; every method that takes an effect finds {share} of this circuit, "
        "so it tells them apart from sizes only",
    )
    for case, question, share in (
        ("pairs", "texts with and without the phrase", "all"),
        ("texts", "texts with the phrase alone", "nearly all"),
    )
)
