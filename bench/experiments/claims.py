"""What the papers claim, and the numbers by which the experiments' results say whether it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Number:
    """One number of a results file.

    Attributes:
        name: what the page calls it.
        case, method, metric: of its row; the mean is taken where rows differ by seed alone.
        digits: behind the point.
    """

    name: str
    case: str
    method: str
    metric: str
    digits: int = 1

    def of(self, rows: Rows) -> float:
        """Its value.

        Raises:
            ValueError: no such row.
        """
        wanted = (self.case, self.method, self.metric)
        values = [row["value"] for row in rows if (row["case"], row["method"], row["metric"]) == wanted]
        if not values:
            raise ValueError(f"no row of case {self.case!r}, method {self.method!r}, metric {self.metric!r}")
        return float(sum(values) / len(values))


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper, or an aim of this project, with what decides.

    Attributes:
        method: whose.
        text: what is claimed.
        published: the paper's own numbers; empty for an aim of this project.
        file: of `bench/results`, without its ending.
        numbers: what was measured here.
        holds: whether it does, by the values of ``numbers`` in their order.
        reason: why it comes out so, as far as that was tested.
    """

    method: str
    text: str
    published: str
    file: str
    numbers: tuple[Number, ...]
    holds: Callable[..., bool]
    reason: str


def _worst(name: str, method: str, case: str = "waterbirds") -> Number:
    return Number(name, case, method, "worst_group_accuracy")


CLAIMS = (
    Claim(
        "FCR",
        "one edited weight removes a class, the others stay or gain (figure 6, CIFAR-10)",
        "removed class near 0",
        "fcr-cifar10",
        (
            Number("before", "cifar10", "before", "removed_accuracy"),
            Number("one weight", "cifar10", "SCA", "removed_accuracy"),
            Number("three", "cifar10", "SCA, 3 weights", "removed_accuracy"),
            Number("random weight", "cifar10", "random weight of the row", "removed_accuracy"),
            Number("change of the others", "cifar10", "SCA", "change_of_others"),
        ),
        lambda before, one, three, random, others: one < 10 and others >= 0 and random > one + 10,
        "near 0 needs two or three weights; the others gain what the removed class no longer takes, as they do when "
        "its output is simply switched off",
    ),
    Claim(
        "FCR",
        "SCA removes a digit inside a parity better than activation x gradient alone (figure 8, MNIST)",
        "figure only",
        "fcr-mnist-parity",
        tuple(
            Number(name, "mnist-parity, r by digit", f"{method}; within 2 points", "removed_accuracy")
            for name, method in (
                ("SCA", "SCA"),
                ("activation x gradient", "activation x gradient"),
                ("best of all weights", "best weight (tries all)"),
            )
        ),
        lambda sca, product, best: sca < product,
        "accuracy of the removed digit where the others may lose 2 points; removed further, those of its parity suffer",
    ),
    Claim(
        "FCR",
        "two edited weights lift the worst group of Waterbirds to that of DFR (table 1)",
        "ERM 75.3, FCR 93.2, DFR 92.9",
        "fcr-waterbirds",
        (
            _worst("ERM", "ERM"),
            _worst("FCR, one r", "SCA, by gap"),
            _worst("FCR, an r each", "SCA, r for each weight, by gap"),
            _worst("random weights", "random weights, r for each, by gap"),
            _worst("DFR", "DFR (oracle)"),
        ),
        lambda erm, one, each, random, dfr: one > dfr - 1,
        "frozen ImageNet features at 64 pixels, not a fine-tuned backbone: one shared r helps no class there",
    ),
    Claim(
        "NeuronTune",
        "without group labels, within a point of DFR on Waterbirds",
        "ERM 72.6, NeuronTune† 92.5, DFR† 92.4",
        "neurontune-waterbirds",
        (
            _worst("ERM", "ERM"),
            _worst("NeuronTune†", "NeuronTune†"),
            _worst("without a mask", "NeuronTune†: no mask"),
            _worst("DFR", "DFR (oracle)"),
        ),
        lambda erm, tuned, plain, dfr: tuned > dfr - 1 and tuned > plain,
        "the validation set is balanced by groups already, so retraining on it does the work; frozen features",
    ),
    Claim(
        "NeuronTune",
        "the mask is what helps where the layer is retrained on the biased training set",
        "NeuronTune 92.2",
        "neurontune-waterbirds",
        (
            _worst("NeuronTune", "NeuronTune"),
            _worst("without a mask", "NeuronTune: no mask"),
            _worst("random masks", "NeuronTune: random mask"),
        ),
        lambda tuned, plain, random: tuned > max(plain, random) + 5,
        "as measured; the level stays far below DFR's",
    ),
    Claim(
        "NeuronTune",
        "the same on Civil Comments, chosen without group labels (SFit)",
        "ERM 57.4, NeuronTune† 82.7, DFR† 81.8",
        "neurontune-civilcomments",
        tuple(
            _worst(name, method, "civilcomments, correlated training, validation like test")
            for name, method in (
                ("ERM", "ERM"),
                ("NeuronTune† by SFit", "NeuronTune†"),
                ("by worst class", "NeuronTune†, by worst class"),
                ("by worst class, no mask", "NeuronTune†, by worst class: no mask"),
                ("DFR", "DFR (oracle)"),
            )
        ),
        lambda erm, fit, by_class, plain, dfr: fit > dfr - 1 and by_class > plain + 1,
        "SFit chooses a penalty at which nothing moves; the worst class chooses better, and then no mask does as well",
    ),
    Claim(
        "mediation",
        "adjusted for the topic, indirect effects are less localised",
        "in words only",
        "mediation-realtoxicity",
        (
            Number("units, adjusted", "MLPs: localisation", "adjusted", "participation"),
            Number("unadjusted", "MLPs: localisation", "unadjusted", "participation"),
            Number("difference, low", "MLPs: localisation", "difference", "participation_low"),
            Number("high", "MLPs: localisation", "difference", "participation_high"),
        ),
        lambda adjusted, plain, low, high: low > 0,
        "SmolLM2-135M; effects are spread out before adjustment already",
    ),
    Claim(
        "mediation",
        "the topic confounds the total effect",
        "in words only",
        "mediation-realtoxicity",
        (
            Number("adjusted", "MLPs: total", "adjusted", "total effect", 3),
            Number("unadjusted", "MLPs: total", "unadjusted", "total effect", 3),
        ),
        lambda adjusted, plain: adjusted < plain,
        "by about a sixth",
    ),
)
