"""What this project wants of its repairs, for which no paper stands."""

from __future__ import annotations

from experiments.claims.claim import Claim, Number, above, interval

RECIPES = ("none", "repair", "gates", "last-layer", "random", "no-swaps", "wise-ft")


def _best_by_dev(*values: float) -> bool | None:
    """Whether the repair is what dev takes, by accuracies at home and on swaps, and gains outside."""
    count = len(RECIPES)
    home, swapped, (_, low, high) = values[:count], values[count : 2 * count], values[2 * count :]
    allowed = [on_swaps for at_home, on_swaps in zip(home, swapped, strict=True) if at_home >= home[0] - 0.3]
    return above(0, low, high) if swapped[RECIPES.index("repair")] == max(allowed) else False


CLAIMS = (
    Claim(
        "repair",
        "1.2 points more outside SST-2, surely more than 0",
        "an aim of this project",
        "repair-sst2",
        interval("gain", "repair", "mean-ood"),
        lambda gain, low, high: above(0, low, high) if round(gain, 1) >= 1.2 else False,
        "mean of IMDB, CAD, Yelp and CR; paired bootstrap over texts; to the digit that the aim has",
    ),
    Claim(
        "repair",
        "4 points more on human counterfactuals, at most 0.3 lost at home",
        "an aim of this project",
        "repair-sst2",
        (*interval("CAD", "repair", "cad"), *interval("SST-2", "repair", "sst2")),
        lambda gain, low, high, home, *ends: gain >= 4 and home >= -0.3,
        "the gains themselves decide",
    ),
    Claim(
        "repair",
        "of all recipes here the best by dev, and better outside",
        "an aim of this project",
        "repair-sst2",
        (
            *(Number(f"{name}, dev", "all", name, "home") for name in RECIPES),
            *(Number(f"{name}, swaps of dev", "all", name, "swapped") for name in RECIPES),
            *interval("gain outside", "repair", "mean-ood"),
        ),
        _best_by_dev,
        "the most swaps of dev right, where at most 0.3 points are lost on dev itself",
    ),
    Claim(
        "repair",
        "it is the swaps that help: the same training without them does not",
        "an aim of this project",
        "repair-sst2",
        (
            *interval("all weights", "repair", "mean-ood"),
            *interval("random neurons", "random", "mean-ood"),
            *interval("no swaps", "no-swaps", "mean-ood"),
            *interval("gates on located neurons", "gates", "mean-ood"),
        ),
        lambda gain, low, high, random, random_low, random_high, alone, alone_low, alone_high, *gates: low > alone_high,
        "gains outside SST-2; intervals apart decide. Random neurons, trained on swaps, gain a third",
    ),
    Claim(
        "repair",
        "the same recipe mends a model trained on reviews",
        "an aim of this project",
        "repair-imdb",
        (
            *interval("CAD", "repair", "imdb-model:cad"),
            *interval("mean of the four", "repair", "imdb-model:mean-ood"),
        ),
        lambda cad, low, high, mean, mean_low, mean_high: above(0, mean_low, mean_high),
        "MiniLM fine-tuned on IMDB, the recipe untouched; the mean decides",
    ),
)
