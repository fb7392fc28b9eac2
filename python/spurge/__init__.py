"""Spurge: find the neurons behind a model's shortcuts, cut them, and show what the cut did.

The names, by what they are for; ``help(spurge.MacU)`` and so on tell more, and so does the documentation (``docs``)::

    texts and words  Examples GoldenTokens
    the search       find Found find_slices
    models           Verbalizer Head find_sites NeuronSet
    attribution      Cascade Locator predicted_logit
    MacU             MacU Swarm Located
    edits            NeuronEdit WeightEdit load_edit EditMismatch
    evaluation       evaluate compare
    the last layer   extract Features FCR Removal NeuronTune Tuned dfr
    mediation        record Recording embed score_texts mlp_units neuron_units
                     Mediation Effects mask
    confounders      find_topics Confounders balance confounder_weights
    long runs        plan Ranks

Figures are in `spurge.report.plots`, files of numbers in `spurge.report.results`, the kernels as torch ops in
`spurge.ops`. On the command line: ``spurge --help``.

Names are imported on first use, so that ``import spurge`` and ``spurge --help`` need no torch. Which names there are,
and from which modules, stands in ``__init__.pyi`` alone.
"""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from typing import Any


def _read_table(stub: Path) -> dict[str, str]:
    """Names that a stub exports to the modules that define them."""
    statements = ast.parse(stub.read_text(encoding="utf-8")).body
    imports = (statement for statement in statements if isinstance(statement, ast.ImportFrom))
    return {alias.name: str(statement.module) for statement in imports for alias in statement.names}


_MODULES = _read_table(Path(__file__).with_suffix(".pyi"))
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from spurge.engine.base.files import spurge_version

        return spurge_version()
    if name not in _MODULES:
        raise AttributeError(f"module 'spurge' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
