"""What the papers claim, and the numbers by which the experiments' results say whether it holds."""

from experiments.claims import fcr, macu, mediation, neurontune

CLAIMS = (*macu.CLAIMS, *fcr.CLAIMS, *neurontune.CLAIMS, *mediation.CLAIMS)
