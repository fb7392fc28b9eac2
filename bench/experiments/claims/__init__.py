"""What is claimed, and the numbers by which the experiments' results say whether it holds."""

from experiments.claims import circuits, fcr, macu, mediation, neurontune, repair

CLAIMS = (
    *macu.CLAIMS,
    *repair.CLAIMS,
    *circuits.CLAIMS,
    *fcr.CLAIMS,
    *neurontune.CLAIMS,
    *mediation.CLAIMS,
)
