"""Spurge: find the neurons behind a model's shortcuts, cut them, and show what the cut did.

Names are imported on first use, so that ``import spurge`` and ``spurge --help`` need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "Accuracies": "spurge.engine.groups",
    "Association": "spurge.engine.association",
    "Balance": "spurge.engine.balancing",
    "Balances": "spurge.engine.balancing",
    "Cascade": "spurge.engine.cascade",
    "Confounders": "spurge.engine.confounders",
    "EditMismatch": "spurge.engine.edits",
    "Effects": "spurge.methods.effects",
    "Example": "spurge.engine.data",
    "Examples": "spurge.engine.data",
    "FCR": "spurge.methods.fcr",
    "Features": "spurge.engine.features",
    "GoldenTokens": "spurge.methods.golden",
    "Head": "spurge.engine.heads",
    "Located": "spurge.methods.located",
    "Locator": "spurge.engine.locator",
    "MacU": "spurge.methods.macu",
    "Masking": "spurge.methods.masking",
    "Mediation": "spurge.methods.mediation",
    "Mediators": "spurge.engine.mediators",
    "NeuronEdit": "spurge.engine.edits",
    "NeuronRef": "spurge.engine.sites",
    "NeuronScores": "spurge.engine.scores",
    "NeuronSet": "spurge.engine.neurons",
    "NeuronTune": "spurge.methods.neurontune",
    "Plan": "spurge.engine.plan",
    "RankError": "spurge.engine.ranks",
    "RankFailed": "spurge.engine.ranks",
    "RankLost": "spurge.engine.ranks",
    "Ranks": "spurge.engine.distributed",
    "Recording": "spurge.engine.recording",
    "Removal": "spurge.methods.removal",
    "Report": "spurge.engine.measures",
    "Sgd": "spurge.engine.fitting",
    "Site": "spurge.engine.sites",
    "Swarm": "spurge.engine.swarm",
    "Topics": "spurge.engine.topics",
    "Tuned": "spurge.methods.tuned",
    "Unbalanced": "spurge.engine.balancing",
    "Verbalizer": "spurge.engine.verbalizers",
    "WeightEdit": "spurge.engine.weight_edits",
    "accuracies": "spurge.engine.groups",
    "association": "spurge.engine.association",
    "balance": "spurge.engine.balancing",
    "balance_batch": "spurge.engine.balancing",
    "captured": "spurge.engine.capture",
    "compare": "spurge.engine.groups",
    "confounder_weights": "spurge.engine.adjustment",
    "dfr": "spurge.methods.controls",
    "embed": "spurge.engine.embedding",
    "evaluate": "spurge.engine.evaluation",
    "extract": "spurge.engine.extraction",
    "find_head": "spurge.engine.heads",
    "find_sites": "spurge.engine.sites",
    "find_topics": "spurge.engine.topics",
    "fit_head": "spurge.engine.fitting",
    "load_edit": "spurge.engine.weight_edits",
    "localisation": "spurge.engine.localisation",
    "mask": "spurge.methods.masking",
    "mlp_units": "spurge.engine.mediators",
    "neuron_units": "spurge.engine.mediators",
    "plan": "spurge.engine.plan",
    "plan_swarm": "spurge.engine.plan",
    "predicted_logit": "spurge.engine.cascade",
    "record": "spurge.engine.recording",
    "score_texts": "spurge.engine.outcomes",
    "units_of": "spurge.engine.mediators",
}
__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from spurge.engine.adjustment import confounder_weights as confounder_weights
    from spurge.engine.association import Association as Association
    from spurge.engine.association import association as association
    from spurge.engine.balancing import Balance as Balance
    from spurge.engine.balancing import Balances as Balances
    from spurge.engine.balancing import Unbalanced as Unbalanced
    from spurge.engine.balancing import balance as balance
    from spurge.engine.balancing import balance_batch as balance_batch
    from spurge.engine.capture import captured as captured
    from spurge.engine.cascade import Cascade as Cascade
    from spurge.engine.cascade import predicted_logit as predicted_logit
    from spurge.engine.confounders import Confounders as Confounders
    from spurge.engine.data import Example as Example
    from spurge.engine.data import Examples as Examples
    from spurge.engine.distributed import Ranks as Ranks
    from spurge.engine.edits import EditMismatch as EditMismatch
    from spurge.engine.edits import NeuronEdit as NeuronEdit
    from spurge.engine.embedding import embed as embed
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
    from spurge.engine.localisation import localisation as localisation
    from spurge.engine.locator import Locator as Locator
    from spurge.engine.measures import Report as Report
    from spurge.engine.mediators import Mediators as Mediators
    from spurge.engine.mediators import mlp_units as mlp_units
    from spurge.engine.mediators import neuron_units as neuron_units
    from spurge.engine.mediators import units_of as units_of
    from spurge.engine.neurons import NeuronSet as NeuronSet
    from spurge.engine.outcomes import score_texts as score_texts
    from spurge.engine.plan import Plan as Plan
    from spurge.engine.plan import plan as plan
    from spurge.engine.plan import plan_swarm as plan_swarm
    from spurge.engine.ranks import RankError as RankError
    from spurge.engine.ranks import RankFailed as RankFailed
    from spurge.engine.ranks import RankLost as RankLost
    from spurge.engine.recording import Recording as Recording
    from spurge.engine.recording import record as record
    from spurge.engine.scores import NeuronScores as NeuronScores
    from spurge.engine.sites import NeuronRef as NeuronRef
    from spurge.engine.sites import Site as Site
    from spurge.engine.sites import find_sites as find_sites
    from spurge.engine.swarm import Swarm as Swarm
    from spurge.engine.topics import Topics as Topics
    from spurge.engine.topics import find_topics as find_topics
    from spurge.engine.verbalizers import Verbalizer as Verbalizer
    from spurge.engine.weight_edits import WeightEdit as WeightEdit
    from spurge.engine.weight_edits import load_edit as load_edit
    from spurge.methods.controls import dfr as dfr
    from spurge.methods.effects import Effects as Effects
    from spurge.methods.fcr import FCR as FCR
    from spurge.methods.golden import GoldenTokens as GoldenTokens
    from spurge.methods.located import Located as Located
    from spurge.methods.macu import MacU as MacU
    from spurge.methods.masking import Masking as Masking
    from spurge.methods.masking import mask as mask
    from spurge.methods.mediation import Mediation as Mediation
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
