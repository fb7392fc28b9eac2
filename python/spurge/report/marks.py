"""What all figures show alike: which methods are controls, and where one value would hide the rest."""

from __future__ import annotations

from spurge.engine.evaluation.report import CONTROLS

SPIKE = 20  # times the median beyond which one value hides the rest
_CONTROLS = (*CONTROLS, "no mask", "random mask")
_OF_METHODS = (" random", ": threshold")  # behind the name of the method that they are controls of


def is_control(method: str) -> bool:
    """Whether a method of a report is a control of others.

    >>> [is_control(name) for name in ("random", "NeuronTune: threshold", "MacU")]
    [True, True, False]
    """
    return method in _CONTROLS or method.endswith(_OF_METHODS)
