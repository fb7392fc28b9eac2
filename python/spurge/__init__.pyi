# The names of ``import spurge``, each with its module: type checkers read this table, and so does __init__.py.

from spurge.engine.base.distributed import Ranks as Ranks
from spurge.engine.cascade.cascade import Cascade as Cascade
from spurge.engine.cascade.locator import Locator as Locator
from spurge.engine.causal.adjustment import confounder_weights as confounder_weights
from spurge.engine.causal.balancing import balance as balance
from spurge.engine.causal.confounders import Confounders as Confounders
from spurge.engine.causal.topics import find_topics as find_topics
from spurge.engine.data.examples import Examples as Examples
from spurge.engine.edits.edit_files import EditMismatch as EditMismatch
from spurge.engine.edits.neuron_edits import NeuronEdit as NeuronEdit
from spurge.engine.edits.weight_edits import WeightEdit as WeightEdit
from spurge.engine.edits.weight_edits import load_edit as load_edit
from spurge.engine.evaluation.evaluation import evaluate as evaluate
from spurge.engine.evaluation.groups import compare as compare
from spurge.engine.features.extraction import extract as extract
from spurge.engine.features.features import Features as Features
from spurge.engine.models.heads import Head as Head
from spurge.engine.models.neurons import NeuronSet as NeuronSet
from spurge.engine.models.sites import find_sites as find_sites
from spurge.engine.models.verbalizers import Verbalizer as Verbalizer
from spurge.engine.passes.trace import predicted_logit as predicted_logit
from spurge.engine.planning.plan import plan as plan
from spurge.engine.recordings.embedding import embed as embed
from spurge.engine.recordings.outcomes import score_texts as score_texts
from spurge.engine.recordings.recording import Recording as Recording
from spurge.engine.recordings.recording import record as record
from spurge.methods.fcr.fcr import FCR as FCR
from spurge.methods.fcr.removal import Removal as Removal
from spurge.methods.find.find import find as find
from spurge.methods.find.found import Found as Found
from spurge.methods.find.slices import find_slices as find_slices
from spurge.methods.golden.golden import GoldenTokens as GoldenTokens
from spurge.methods.macu.located import Located as Located
from spurge.methods.macu.macu import MacU as MacU
from spurge.methods.macu.swarm import Swarm as Swarm
from spurge.methods.mediation.effects import Effects as Effects
from spurge.methods.mediation.masking import mask as mask
from spurge.methods.mediation.mediation import Mediation as Mediation
from spurge.methods.mediation.mediators import mlp_units as mlp_units
from spurge.methods.mediation.mediators import neuron_units as neuron_units
from spurge.methods.neurontune.controls import dfr as dfr
from spurge.methods.neurontune.neurontune import NeuronTune as NeuronTune
from spurge.methods.neurontune.tuned import Tuned as Tuned

__version__: str
