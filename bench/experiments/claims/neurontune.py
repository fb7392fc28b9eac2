"""What is claimed of NeuronTune."""

from __future__ import annotations

from experiments.claims.claim import Claim, Number, worst

CLAIMS = (
    Claim(
        "NeuronTune",
        "without group labels, within a point of DFR on Waterbirds",
        "ERM 72.6, NeuronTune† 92.5, DFR† 92.4",
        "neurontune-waterbirds",
        (
            worst("ERM", "ERM"),
            worst("NeuronTune†", "NeuronTune†"),
            worst("without a mask", "NeuronTune†: no mask"),
            worst("DFR", "DFR (oracle)"),
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
            worst("NeuronTune", "NeuronTune"),
            worst("without a mask", "NeuronTune: no mask"),
            worst("random masks", "NeuronTune: random mask"),
        ),
        lambda tuned, plain, random: tuned > max(plain, random) + 5,
        "as measured; the level stays far below DFR's",
    ),
    Claim(
        "NeuronTune",
        "without group labels, within a point of DFR on Waterbirds, on a fine-tuned backbone",
        "ERM 72.6, NeuronTune† 92.5, AFR 90.4, JTT 86.7, DFR† 92.4",
        "neurontune-waterbirds-tuned",
        tuple(
            worst(name, method, "waterbirds, fine-tuned")
            for name, method in (
                ("ERM", "ERM"),
                ("NeuronTune†", "NeuronTune†"),
                ("without a mask", "NeuronTune†: no mask"),
                ("random masks", "NeuronTune†: random mask"),
                ("by worst class", "NeuronTune†, by worst class"),
                ("NeuronTune", "NeuronTune"),
                ("AFR", "AFR"),
                ("AFR on half of validation", "AFR on half of validation"),
                ("SELF", "SELF"),
                ("JTT on features", "JTT on features"),
                ("EVaLS", "EVaLS"),
                ("class-balanced ERM", "class-balanced ERM"),
                ("DFR", "DFR (oracle)"),
            )
        ),
        lambda erm, tuned, plain, *others: tuned > others[-1] - 1 and tuned > plain,
        "EfficientNet-Lite0 at 96 pixels; the validation set is balanced by groups already",
    ),
    Claim(
        "NeuronTune",
        "the same on Civil Comments, chosen without group labels (SFit)",
        "ERM 57.4, NeuronTune† 82.7, DFR† 81.8",
        "neurontune-civilcomments",
        tuple(
            worst(name, method, "civilcomments, correlated training, validation like test")
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
)
