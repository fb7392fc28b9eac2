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
        holds: whether it does, by the values of ``numbers`` in their order; None where they are too uncertain to say.
        reason: why it comes out so, as far as that was tested.
    """

    method: str
    text: str
    published: str
    file: str
    numbers: tuple[Number, ...]
    holds: Callable[..., bool | None]
    reason: str


def _worst(name: str, method: str, case: str = "waterbirds") -> Number:
    return Number(name, case, method, "worst_group_accuracy")


def _interval(name: str, method: str, case: str, metric: str = "gain") -> tuple[Number, Number, Number]:
    ends = (Number(end, case, method, f"{metric}_{end}") for end in ("low", "high"))
    return (Number(name, case, method, metric), *ends)


def _gains(name: str, case: str) -> tuple[Number, ...]:
    """Accuracy of fine-tuning on a case, and what MacU's two settings gain over it."""
    return (
        Number(f"fine-tuning, {name}", case, "fine-tuning", "accuracy"),
        *_interval("paper's setting", "macu-paper", case),
        *_interval("best setting", "macu-best", case),
    )


def _above(least: float, low: float, high: float) -> bool | None:
    """Whether a number with this interval is above another one; None where it may be either."""
    return True if low > least else False if high < least else None


def _facts(method: str, **names: str) -> tuple[Number, ...]:
    """Numbers of a method of MacU's experiment that are no accuracies: what the page calls them, and their metrics."""
    return tuple(Number(name.replace("_", " "), "all", method, metric, 3) for name, metric in names.items())


RIVALS = ("nfl-co", "nfl-cp", "poe", "c2l", "swaps")
CHEAP = ("wise-ft", "svd-tail", "last-layer", "repair", "deleted")
JOINED = ("poe", "nfl-co", "nfl-cp", "swaps")
MACU = (
    Claim(
        "MacU",
        "more accurate than fine-tuning on average (table 6)",
        "mean of five sets 81.2 → 84.3",
        "macu-sa",
        _gains("outside", "mean-ood"),
        lambda plain, gain, low, high, *best: _above(0, low, high),
        "points gained outside SST-2 by the paper's setting decide",
    ),
    Claim(
        "MacU",
        "nothing is lost at home (table 6)",
        "SST-2 90.3 → 90.5",
        "macu-sa",
        _gains("SST-2", "sst2"),
        lambda plain, gain, low, high, *best: _above(-1, low, high),
        "by the paper's setting, within a point",
    ),
    Claim(
        "MacU",
        "attention leans less on spurious words (eta, table 8)",
        "0.91 → 0.87",
        "macu-sa",
        (*_facts("fine-tuning", before="eta"), *_facts("macu-paper", after="eta")),
        lambda before, after: after < before,
        "on test sentences of SST-2; the paper normalises, these are plain means of Eq. 10",
    ),
    Claim(
        "MacU",
        "erasing spurious neurons lowers eta, amplifying them raises it (table 11)",
        "1.01; erased 0.95, amplified 1.03",
        "macu-sa",
        (
            *_facts("fine-tuning", before="eta"),
            *_facts("macu-paper:zero", erased="eta"),
            *_facts("macu-paper:amplified", doubled="eta"),
            *_facts("macu-paper:random", gates_on_random_neurons="eta"),
        ),
        lambda before, erased, doubled, random: erased < before < doubled and erased < random,
        "all located spurious neurons, at gates 0 and 2",
    ),
    Claim(
        "MacU",
        "causal and spurious neurons overlap (figure 4)",
        "figure only",
        "macu-sa",
        tuple(
            Number(name, "all", "macu-paper", metric)
            for name, metric in (("causal", "causal_neurons"), ("spurious", "spurious_neurons"), ("both", "overlap"))
        ),
        lambda causal, spurious, both: both >= 1,
        "of 9,216 neurons",
    ),
    Claim(
        "MacU",
        "spurious neurons lie in shallower layers than causal ones (figure 3)",
        "figure only; most of either in the last third",
        "macu-sa",
        tuple(
            Number(name, "all", "macu-paper", metric, 2)
            for name, metric in (("causal, mean layer", "causal_layer"), ("spurious", "spurious_layer"))
        ),
        lambda causal, spurious: spurious < causal,
        "layers 1 to 6",
    ),
    Claim(
        "MacU",
        "the swarm does better than erasing (table 14)",
        "SST-2 erased 89.5, swarm 90.5",
        "macu-sa",
        (
            *_interval("swarm over erased, SST-2", "macu-paper", "sst2", "gain_over_macu-paper:zero"),
            *_interval("outside", "macu-paper", "mean-ood", "gain_over_macu-paper:zero"),
        ),
        lambda home, low, high, *outside: _above(0, low, high),
        "points that the swarm's gates gain over all located neurons at 0; those at home decide, as in the paper",
    ),
    Claim(
        "MacU",
        "where the model is wrong, spurious neurons are the more active (table 12)",
        "four sentences",
        "macu-sa",
        _facts(
            "macu-paper",
            spurious_where_wrong="spurious_activation_wrong",
            causal_where_wrong="causal_activation_wrong",
            spurious_where_right="spurious_activation_right",
            causal_where_right="causal_activation_right",
        ),
        lambda spurious, causal, *right: spurious - causal > max(0, right[0] - right[1]),
        "it has to be more so than where the model is right, else activation says nothing of errors",
    ),
    Claim(
        "MacU",
        "more accurate than its rivals on average (table 6)",
        "84.3; AutoCAD 81.9, Sentiment-CAD 81.7, NFL 83.0",
        "macu-sa-rivals",
        tuple(Number(name, "mean-ood", name, "accuracy") for name in ("macu-paper", "macu-best", *RIVALS, *CHEAP)),
        lambda paper, best, *others: paper > max(others),
        "mean outside SST-2; the paper's setting decides",
    ),
    Claim(
        "MacU",
        "its attention leans less on spurious words than that of rivals (eta, table 8)",
        "0.87; AutoCAD 1.05, Sentiment-CAD 1.02, NFL 0.97",
        "macu-sa-rivals",
        tuple(Number(name, "all", name, "eta", 3) for name in ("macu-paper", *RIVALS)),
        lambda own, *others: own < min(others),
        "on test sentences of SST-2",
    ),
    Claim(
        "MacU",
        "it improves what rivals have trained (table 6)",
        "AutoCAD +3.2, Sentiment-CAD +1.8, NFL +1.2",
        "macu-sa-rivals",
        tuple(
            Number(f"{name}+{preset}", "mean-ood", f"{name}+{preset}", f"gain_over_{name}")
            for preset in ("macu-paper", "macu-best")
            for name in JOINED
        ),
        lambda *gains: min(gains[: len(JOINED)]) > 0,
        "points over the rival alone, outside SST-2; the paper's setting decides",
    ),
    Claim(
        "MacU",
        "quicker than NFL, C2L and counterfactual texts (table 17)",
        "1.9 h; NFL 2.5, C2L 2.7, AutoCAD 7.1, PoE 1.1",
        "macu-sa-rivals",
        tuple(Number(name, "all", name, "cpu_seconds", 0) for name in ("macu-paper", "macu-best", *RIVALS)),
        lambda paper, best, co, cp, poe, c2l, swaps: paper < min(co, cp, c2l, swaps),
        "processor seconds; of MacU on top of fine-tuning, of the others the whole training; swaps are made by rule, "
        "not by a language model",
    ),
    Claim(
        "MacU",
        "neurons located by proximity do better than by answers to counterfactual texts (table 13)",
        "SST-2 90.5 and 88.6",
        "macu-sa-ablations",
        tuple(
            Number(name, "sst2", method, "accuracy")
            for name, method in (
                ("proximity", "macu-paper"),
                ("layer path", "macu-paper@layer-path"),
                ("measured", "macu-paper@exact"),
                ("counterfactual texts", "macu-paper@counterfactual"),
                ("random neurons", "macu-paper:random"),
            )
        ),
        lambda own, layer, exact, counterfactual, random: own > max(counterfactual, random),
        "at home, as in the paper, with its editor",
    ),
    Claim(
        "MacU",
        "fitness is highest at w = 0.5 and c = 1.5 (figure 5)",
        "figure only",
        "macu-sweep",
        tuple(
            Number(name, "sweep, 40 iterations", name, "fitness", 3)
            for name in ("paper", "w = 0.1", "w = 0.3", "w = 0.7", "w = 0.9", "c = 0.5", "c = 1.0", "c = 2.0")
        ),
        lambda own, *others: own >= max(others),
        "8 texts, 20 particles",
    ),
    Claim(
        "MacU",
        "more accurate than fine-tuning in inference, too (table 7)",
        "mean of six sets 61.9 → 64.0",
        "macu-nli",
        _gains("outside", "mean-ood"),
        lambda plain, gain, low, high, *best: _above(0, low, high),
        "MultiNLI, counterfactuals of SNLI, Breaking NLI; the paper's setting decides",
    ),
    Claim(
        "MacU",
        "less misled by the hypothesis alone (table 16)",
        "52.2 → 59.0, PoE 69.5",
        "macu-nli",
        tuple(
            Number(name, "cad, wrong by hypothesis", name, "accuracy")
            for name in ("fine-tuning", "macu-paper", "macu-best", "poe")
        ),
        lambda plain, paper, best, poe: paper > plain,
        "on the counterfactuals that fine-tuning gets wrong by the hypothesis alone",
    ),
)

CLAIMS = (
    *MACU,
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
        "FCR",
        "units that fire for fewer classes decide more (theorem 1a)",
        "a theorem",
        "theory",
        (Number("rank correlation of classes and loss", "FCR 1", "linear model", "classes that fire", 2),),
        lambda firing: firing < -0.8,
        "units that fire alike often, for 1 to 7 of 8 classes; loss where one is switched off",
    ),
    Claim(
        "FCR",
        "edges with gradients from more classes decide more (theorem 1b)",
        "a theorem",
        "theory",
        (Number("rank correlation of entropy and loss", "FCR 1", "linear model", "entropy of gradients", 2),),
        lambda entropy: entropy > 0.2,
        "the same units: what their edges' gradients say, mean over outputs, is not what they are worth here",
    ),
    Claim(
        "FCR",
        "the edit of one weight turns the hyperplane's normal by a right angle (theorem 2)",
        "a theorem",
        "theory",
        (
            Number("cosine", "FCR 2", "linear model", "cosine", 15),
            Number("weights moved", "FCR 2", "linear model", "weights moved", 0),
        ),
        lambda cosine, moved: cosine < 1e-12 and moved == 1,
        "by rounding",
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
        "NeuronTune",
        "scores follow the pull of the spurious part: delta is -2 mu gamma' w (theorem 4.2)",
        "a theorem",
        "theory",
        tuple(
            Number(name, "NeuronTune 4.2", "linear model", metric, 2)
            for name, metric in (("correlation", "correlation"), ("slope", "slope"), ("same sign", "same_sign_rate"))
        ),
        lambda correlation, slope, sign: correlation > 0.9 and abs(slope - 1) < 0.1,
        "on its linear model, spurious in 95 % of rows; theorem 4.3 was not checked",
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
