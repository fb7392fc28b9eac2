"""What is claimed of mediation."""

from __future__ import annotations

from experiments.claims.claim import Claim, Number

CLAIMS = (
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
