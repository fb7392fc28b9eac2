"""What is claimed of MacU."""

from __future__ import annotations

from experiments.claims.claim import Claim, Number, above, interval


def gains(name: str, case: str) -> tuple[Number, ...]:
    """Accuracy of fine-tuning on a case, and what MacU's two settings gain over it."""
    return (
        Number(f"fine-tuning, {name}", case, "fine-tuning", "accuracy"),
        *interval("paper's setting", "macu-paper", case),
        *interval("best setting", "macu-best", case),
    )


def facts(method: str, **names: str) -> tuple[Number, ...]:
    """Numbers of a method of MacU's experiment that are no accuracies: what the page calls them, and their metrics."""
    return tuple(Number(name.replace("_", " "), "all", method, metric, 3) for name, metric in names.items())


def decoder_gains() -> tuple[Number, ...]:
    """The same of the fine-tuned decoder by label words, outside, with MacU's small settings."""
    case = "fine-tuned: mean-ood"
    return (
        Number("fine-tuning, outside", case, "no edit", "accuracy"),
        *interval("paper's setting, small swarm", "macu-paper-small", case),
        *interval("best setting, few steps", "macu-best-small", case),
    )


DECODER = "SmolLM2-135M by label words; points outside of the paper's setting with 5 particles and 5 iterations decide"
RIVALS = ("nfl-co", "nfl-cp", "poe", "c2l", "swaps")
CHEAP = ("wise-ft", "svd-tail", "last-layer", "repair", "deleted")
JOINED = ("poe", "nfl-co", "nfl-cp", "swaps")
CLAIMS = (
    Claim(
        "MacU",
        "more accurate than fine-tuning on average (table 6)",
        "mean of five sets 81.2 → 84.3",
        "macu-sa",
        gains("outside", "mean-ood"),
        lambda plain, gain, low, high, *best: above(0, low, high),
        "points gained outside SST-2 by the paper's setting decide",
    ),
    Claim(
        "MacU",
        "nothing is lost at home (table 6)",
        "SST-2 90.3 → 90.5",
        "macu-sa",
        gains("SST-2", "sst2"),
        lambda plain, gain, low, high, *best: above(-1, low, high),
        "by the paper's setting, within a point",
    ),
    Claim(
        "MacU",
        "attention leans less on spurious words (eta, table 8)",
        "0.91 → 0.87",
        "macu-sa",
        (*facts("fine-tuning", before="eta"), *facts("macu-paper", after="eta")),
        lambda before, after: after < before,
        "on test sentences of SST-2; the paper normalises, these are plain means of Eq. 10",
    ),
    Claim(
        "MacU",
        "erasing spurious neurons lowers eta, amplifying them raises it (table 11)",
        "1.01; erased 0.95, amplified 1.03",
        "macu-sa",
        (
            *facts("fine-tuning", before="eta"),
            *facts("macu-paper:zero", erased="eta"),
            *facts("macu-paper:amplified", doubled="eta"),
            *facts("macu-paper:random", gates_on_random_neurons="eta"),
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
            *interval("swarm over erased, SST-2", "macu-paper", "sst2", "gain_over_macu-paper:zero"),
            *interval("outside", "macu-paper", "mean-ood", "gain_over_macu-paper:zero"),
        ),
        lambda home, low, high, *outside: above(0, low, high),
        "points that the swarm's gates gain over all located neurons at 0; those at home decide, as in the paper",
    ),
    Claim(
        "MacU",
        "where the model is wrong, spurious neurons are the more active (table 12)",
        "four sentences",
        "macu-sa",
        facts(
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
        "macu-sa",
        tuple(Number(name, "mean-ood", name, "gain") for name in ("macu-paper", "macu-best", *RIVALS, *CHEAP)),
        lambda paper, best, *others: paper > max(others),
        "points outside SST-2 over fine-tuning with the same seeds; the paper's setting decides",
    ),
    Claim(
        "MacU",
        "its attention leans less on spurious words than that of rivals (eta, table 8)",
        "0.87; AutoCAD 1.05, Sentiment-CAD 1.02, NFL 0.97",
        "macu-sa",
        tuple(Number(name, "all", name, "eta", 3) for name in ("macu-paper", *RIVALS)),
        lambda own, *others: own < min(others),
        "on test sentences of SST-2",
    ),
    Claim(
        "MacU",
        "it improves what rivals have trained (table 6)",
        "AutoCAD +3.2, Sentiment-CAD +1.8, NFL +1.2",
        "macu-sa",
        tuple(Number(f"{name}+macu-best", "mean-ood", f"{name}+macu-best", f"gain_over_{name}") for name in JOINED),
        lambda *found: min(found) > 0,
        "points over the rival alone, outside SST-2, by the best setting; the paper's was not tried on them",
    ),
    Claim(
        "MacU",
        "quicker than NFL, C2L and counterfactual texts (table 17)",
        "1.9 h; NFL 2.5, C2L 2.7, AutoCAD 7.1, PoE 1.1",
        "macu-sa",
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
        gains("outside", "mean-ood"),
        lambda plain, gain, low, high, *best: above(0, low, high),
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
    Claim(
        "MacU",
        "more accurate than fine-tuning for decoders, too (table 9)",
        "mean of five sets: GPT-2 72.0 → 74.1, LLaMA-2-7B 94.3 → 94.9, Qwen-2-1.5B 94.2 → 95.1, GLM-4-9B 96.1 → 96.8",
        "macu-decoders",
        decoder_gains(),
        lambda plain, gain, low, high, *best: above(0, low, high),
        DECODER,
    ),
    Claim(
        "MacU",
        "and in inference (table 10)",
        "mean of six sets: GPT-2 49.8 → 52.1, LLaMA-2-7B 81.8 → 82.8, Qwen-2-1.5B 78.1 → 79.6, GLM-4-9B 82.1 → 83.3",
        "macu-decoders-nli",
        decoder_gains(),
        lambda plain, gain, low, high, *best: above(0, low, high),
        DECODER,
    ),
)
