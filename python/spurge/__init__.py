"""Spurge: find the neurons behind a model's shortcuts, cut them, and show what the cut did.

Names are imported on first use, so that ``import spurge`` and ``spurge --help`` need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "Accuracies": "spurge.engine.groups",
    "Association": "spurge.engine.association",
    "Cascade": "spurge.engine.cascade",
    "EditMismatch": "spurge.engine.edits",
    "Example": "spurge.engine.data",
    "Examples": "spurge.engine.data",
    "FCR": "spurge.methods.fcr",
    "Features": "spurge.engine.features",
    "GoldenTokens": "spurge.methods.golden",
    "Head": "spurge.engine.heads",
    "Located": "spurge.methods.located",
    "MacU": "spurge.methods.macu",
    "NeuronEdit": "spurge.engine.edits",
    "NeuronRef": "spurge.engine.sites",
    "NeuronScores": "spurge.engine.scores",
    "NeuronSet": "spurge.engine.neurons",
    "NeuronTune": "spurge.methods.neurontune",
    "Removal": "spurge.methods.removal",
    "Report": "spurge.engine.measures",
    "Sgd": "spurge.engine.fitting",
    "Site": "spurge.engine.sites",
    "Swarm": "spurge.engine.swarm",
    "Tuned": "spurge.methods.tuned",
    "WeightEdit": "spurge.engine.weight_edits",
    "accuracies": "spurge.engine.groups",
    "association": "spurge.engine.association",
    "captured": "spurge.engine.capture",
    "compare": "spurge.engine.groups",
    "dfr": "spurge.methods.controls",
    "evaluate": "spurge.engine.evaluation",
    "extract": "spurge.engine.extraction",
    "find_head": "spurge.engine.heads",
    "find_sites": "spurge.engine.sites",
    "fit_head": "spurge.engine.fitting",
    "load_edit": "spurge.engine.weight_edits",
    "predicted_logit": "spurge.engine.cascade",
}
__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from spurge.engine.association import Association as Association
    from spurge.engine.association import association as association
    from spurge.engine.capture import captured as captured
    from spurge.engine.cascade import Cascade as Cascade
    from spurge.engine.cascade import predicted_logit as predicted_logit
    from spurge.engine.data import Example as Example
    from spurge.engine.data import Examples as Examples
    from spurge.engine.edits import EditMismatch as EditMismatch
    from spurge.engine.edits import NeuronEdit as NeuronEdit
    from spurge.engine.evaluation import evaluate as evaluate
    from spurge.engine.extraction import extract as extract
    from spurge.engine.features import Features as Features
    from spurge.engine.fitting import Sgd as Sgd
    from spurge.engine.fitting import fit_head as fit_head
    from spurge.engine.groups import Accuracies as Accuracies
    from spurge.engine.groups import accuracies as accuracies
    from spurge.engine.groups import compare as compare
    from spurge.engine.heads import Head as Head
    from spurge.engine.heads import find_head as find_head
    from spurge.engine.measures import Report as Report
    from spurge.engine.neurons import NeuronSet as NeuronSet
    from spurge.engine.scores import NeuronScores as NeuronScores
    from spurge.engine.sites import NeuronRef as NeuronRef
    from spurge.engine.sites import Site as Site
    from spurge.engine.sites import find_sites as find_sites
    from spurge.engine.swarm import Swarm as Swarm
    from spurge.engine.weight_edits import WeightEdit as WeightEdit
    from spurge.engine.weight_edits import load_edit as load_edit
    from spurge.methods.controls import dfr as dfr
    from spurge.methods.fcr import FCR as FCR
    from spurge.methods.golden import GoldenTokens as GoldenTokens
    from spurge.methods.located import Located as Located
    from spurge.methods.macu import MacU as MacU
    from spurge.methods.neurontune import NeuronTune as NeuronTune
    from spurge.methods.removal import Removal as Removal
    from spurge.methods.tuned import Tuned as Tuned


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from spurge.engine.files import spurge_version

        return spurge_version()
    if name not in _HOME:
        raise AttributeError(f"module 'spurge' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
