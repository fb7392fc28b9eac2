"""Spurge: find the neurons behind a model's shortcuts, cut them, and show what the cut did.

Names are imported on first use, so that ``import spurge`` and ``spurge --help`` need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "Accuracies": "spurge.engine.evaluation.groups",
    "Association": "spurge.engine.last_layer.association",
    "Balance": "spurge.engine.causal.balancing",
    "Balances": "spurge.engine.causal.balancing",
    "Cascade": "spurge.engine.cascade.cascade",
    "Confounders": "spurge.engine.causal.confounders",
    "EditMismatch": "spurge.engine.edits.neuron_edits",
    "Effects": "spurge.methods.mediation.effects",
    "Example": "spurge.engine.data.examples",
    "Examples": "spurge.engine.data.examples",
    "FCR": "spurge.methods.fcr.fcr",
    "Features": "spurge.engine.features.features",
    "GoldenTokens": "spurge.methods.golden.golden",
    "Head": "spurge.engine.models.heads",
    "Located": "spurge.methods.macu.located",
    "Locator": "spurge.engine.cascade.locator",
    "MacU": "spurge.methods.macu.macu",
    "Masking": "spurge.methods.mediation.masking",
    "Mediation": "spurge.methods.mediation.mediation",
    "Mediators": "spurge.methods.mediation.mediators",
    "NeuronEdit": "spurge.engine.edits.neuron_edits",
    "NeuronRef": "spurge.engine.models.sites",
    "NeuronScores": "spurge.engine.cascade.scores",
    "NeuronSet": "spurge.engine.models.neurons",
    "NeuronTune": "spurge.methods.neurontune.neurontune",
    "Plan": "spurge.engine.planning.plan",
    "RankError": "spurge.engine.base.ranks",
    "RankFailed": "spurge.engine.base.ranks",
    "RankLost": "spurge.engine.base.ranks",
    "Ranks": "spurge.engine.base.distributed",
    "Recording": "spurge.engine.recordings.recording",
    "Removal": "spurge.methods.fcr.removal",
    "Report": "spurge.engine.evaluation.report",
    "Sgd": "spurge.engine.last_layer.fitting",
    "Site": "spurge.engine.models.sites",
    "Swarm": "spurge.methods.macu.swarm",
    "Topics": "spurge.engine.causal.topics",
    "Tuned": "spurge.methods.neurontune.tuned",
    "Unbalanced": "spurge.engine.causal.balancing",
    "Verbalizer": "spurge.engine.models.verbalizers",
    "WeightEdit": "spurge.engine.edits.weight_edits",
    "accuracies": "spurge.engine.evaluation.groups",
    "association": "spurge.engine.last_layer.association",
    "balance": "spurge.engine.causal.balancing",
    "balance_batch": "spurge.engine.causal.balancing",
    "captured": "spurge.engine.last_layer.capture",
    "compare": "spurge.engine.evaluation.groups",
    "confounder_weights": "spurge.engine.causal.adjustment",
    "dfr": "spurge.methods.neurontune.controls",
    "embed": "spurge.engine.recordings.embedding",
    "evaluate": "spurge.engine.evaluation.evaluation",
    "extract": "spurge.engine.features.extraction",
    "find_head": "spurge.engine.models.heads",
    "find_sites": "spurge.engine.models.sites",
    "find_topics": "spurge.engine.causal.topics",
    "fit_head": "spurge.engine.last_layer.fitting",
    "load_edit": "spurge.engine.edits.weight_edits",
    "localisation": "spurge.engine.causal.concentration",
    "mask": "spurge.methods.mediation.masking",
    "mlp_units": "spurge.methods.mediation.mediators",
    "neuron_units": "spurge.methods.mediation.mediators",
    "plan": "spurge.engine.planning.plan",
    "plan_swarm": "spurge.engine.planning.plan",
    "predicted_logit": "spurge.engine.cascade.cascade",
    "record": "spurge.engine.recordings.recording",
    "score_texts": "spurge.engine.recordings.outcomes",
    "units_of": "spurge.methods.mediation.mediators",
}
__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from spurge.engine.base.distributed import Ranks as Ranks
    from spurge.engine.base.ranks import RankError as RankError
    from spurge.engine.base.ranks import RankFailed as RankFailed
    from spurge.engine.base.ranks import RankLost as RankLost
    from spurge.engine.cascade.cascade import Cascade as Cascade
    from spurge.engine.cascade.cascade import predicted_logit as predicted_logit
    from spurge.engine.cascade.locator import Locator as Locator
    from spurge.engine.cascade.scores import NeuronScores as NeuronScores
    from spurge.engine.causal.adjustment import confounder_weights as confounder_weights
    from spurge.engine.causal.balancing import Balance as Balance
    from spurge.engine.causal.balancing import Balances as Balances
    from spurge.engine.causal.balancing import Unbalanced as Unbalanced
    from spurge.engine.causal.balancing import balance as balance
    from spurge.engine.causal.balancing import balance_batch as balance_batch
    from spurge.engine.causal.concentration import localisation as localisation
    from spurge.engine.causal.confounders import Confounders as Confounders
    from spurge.engine.causal.topics import Topics as Topics
    from spurge.engine.causal.topics import find_topics as find_topics
    from spurge.engine.data.examples import Example as Example
    from spurge.engine.data.examples import Examples as Examples
    from spurge.engine.edits.neuron_edits import EditMismatch as EditMismatch
    from spurge.engine.edits.neuron_edits import NeuronEdit as NeuronEdit
    from spurge.engine.edits.weight_edits import WeightEdit as WeightEdit
    from spurge.engine.edits.weight_edits import load_edit as load_edit
    from spurge.engine.evaluation.evaluation import evaluate as evaluate
    from spurge.engine.evaluation.groups import Accuracies as Accuracies
    from spurge.engine.evaluation.groups import accuracies as accuracies
    from spurge.engine.evaluation.groups import compare as compare
    from spurge.engine.evaluation.report import Report as Report
    from spurge.engine.features.extraction import extract as extract
    from spurge.engine.features.features import Features as Features
    from spurge.engine.last_layer.association import Association as Association
    from spurge.engine.last_layer.association import association as association
    from spurge.engine.last_layer.capture import captured as captured
    from spurge.engine.last_layer.fitting import Sgd as Sgd
    from spurge.engine.last_layer.fitting import fit_head as fit_head
    from spurge.engine.models.heads import Head as Head
    from spurge.engine.models.heads import find_head as find_head
    from spurge.engine.models.neurons import NeuronSet as NeuronSet
    from spurge.engine.models.sites import NeuronRef as NeuronRef
    from spurge.engine.models.sites import Site as Site
    from spurge.engine.models.sites import find_sites as find_sites
    from spurge.engine.models.verbalizers import Verbalizer as Verbalizer
    from spurge.engine.planning.plan import Plan as Plan
    from spurge.engine.planning.plan import plan as plan
    from spurge.engine.planning.plan import plan_swarm as plan_swarm
    from spurge.engine.recordings.embedding import embed as embed
    from spurge.engine.recordings.outcomes import score_texts as score_texts
    from spurge.engine.recordings.recording import Recording as Recording
    from spurge.engine.recordings.recording import record as record
    from spurge.methods.fcr.fcr import FCR as FCR
    from spurge.methods.fcr.removal import Removal as Removal
    from spurge.methods.golden.golden import GoldenTokens as GoldenTokens
    from spurge.methods.macu.located import Located as Located
    from spurge.methods.macu.macu import MacU as MacU
    from spurge.methods.macu.swarm import Swarm as Swarm
    from spurge.methods.mediation.effects import Effects as Effects
    from spurge.methods.mediation.masking import Masking as Masking
    from spurge.methods.mediation.masking import mask as mask
    from spurge.methods.mediation.mediation import Mediation as Mediation
    from spurge.methods.mediation.mediators import Mediators as Mediators
    from spurge.methods.mediation.mediators import mlp_units as mlp_units
    from spurge.methods.mediation.mediators import neuron_units as neuron_units
    from spurge.methods.mediation.mediators import units_of as units_of
    from spurge.methods.neurontune.controls import dfr as dfr
    from spurge.methods.neurontune.neurontune import NeuronTune as NeuronTune
    from spurge.methods.neurontune.tuned import Tuned as Tuned


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from spurge.engine.base.files import spurge_version

        return spurge_version()
    if name not in _HOME:
        raise AttributeError(f"module 'spurge' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
