"""The settings of MacU: what the paper says, and a named option with a default for all it leaves open."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from spurge.engine.base.budgets import parse_bytes
from spurge.engine.base.checks import choice, integer, share_of
from spurge.engine.cascade.cascade import Path
from spurge.engine.cascade.gradient_path import AUDIT
from spurge.engine.data.words import CorrelationSet, CorrelationTokens
from spurge.engine.models.probes import Score
from spurge.engine.models.sites import Units
from spurge.methods.macu.objectives import KindWeights
from spurge.methods.macu.proximity import Form
from spurge.methods.macu.search import Climb
from spurge.methods.macu.swarm import Swarm
from spurge.methods.macu.trained import Which
from spurge.methods.macu.training import Repair

Objective = Literal["proximity", "counterfactual"]
Search = Literal["pso", "gradient", "weights"]
Scope = Literal["located", "all"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of MacU, checked at birth; frozen. Section and equation numbers are the paper's.

    Attributes:
        objective: ``"proximity"``: Eq. 6 and 7, the paper's. ``"counterfactual"``: the answers to texts whose causal
            words are swapped and whose telling phrases are exchanged (`spurge.methods.macu.counterfactual`); not in the
            paper.
        search: how gates are found. ``"pso"``: Eq. 8 and 9; neurons of the spurious set alone are erased and the swarm
            moves the overlap. ``"gradient"``: Adam on the gates of the whole spurious set, from 1; not in the paper.
            ``"weights"``: a repair, weights instead of gates (`spurge.methods.macu.training`); not in the paper.
        which: of a repair, the weights that are trained: ``"all"`` but the embeddings; low-rank deltas of all linear
            layers (``"lora"``); or what the located spurious ``"neurons"`` read and write.
        neurons: ``"located"``, or ``"all"``: the search moves every gate, and nothing is erased beforehand.
        units: what has gates: ``"neurons"`` of the feed-forward layers, the paper's; attention ``"heads"``; ``"both"``.
        path: how Eq. 5 is read, see `spurge.Cascade`. ``"gradient"``, literally: each neuron alone, estimated by one
            gradient; ``"neuron"``, the same, measured for every neuron; ``"layer"`` and ``"joint"``: those of a layer,
            or all, moved together, as knowledge neurons and DEPN do.
        exact: of the gradient path, neurons that are measured for each text of a batch on average, those at stake most.
            With 0 a score is a sum over texts, whatever the batches.
        audit: of the gradient path, neurons that are drawn and measured on the certificate's texts: how well scores
            agree with Eq. 5. So few are quick and give wide intervals, which are good from about 256 on; without a
            certificate nothing is audited.
        nodes, tolerance: quadrature of Eq. 5, see `spurge.Cascade`; the paper does not give its steps.
            Proximity bends more than a logit: on MiniLM and 8 texts of SST-2 the scores of 2, 4 and 8 nodes are 17, 8
            and 5 % off, and correlate 0.99, 0.998 and 0.999 with those of 48.
        top_k: correlation tokens per text, K of section 3.1.2; not given in the paper.
        token_score: what ranks tokens in section 3.1.2: ``"attention"``, the paper's. How gates move the other scores
            of `spurge.engine.models.probes.token_scores` is not known here, and they are refused.
        proximity: Eq. 6 as it is located with. ``"hard"``: as written; its gradient knows the second term alone.
            ``"soft"``: with a differentiable membership.
        fitness: Eq. 6 as Eq. 7 reads it during the search.
        merge: attention of a word's sub-words, ``"sum"`` or ``"max"``; not given in the paper.
        keep_punctuation: runs of punctuation can be correlation tokens too.
        correlation_set: what C of Eq. 6 is a set of. ``"words"``: a word that stands twice in a text is one element
            (the paper's), its attention merged over all its places. ``"occurrences"``: it is two.
        sharpness: temperature of the soft membership, in standard deviations of a text's scores.
        fraction: a batch selects the neurons with at least this share of its greatest score (knowledge neurons: 0.2).
        share: a neuron is located if at least this share of the batches selects it (knowledge neurons: refining, 0.5).
        cap: at most so many neurons in each set, those of highest score (DEPN: 10 to 200).
        sign: ``"positive"``: scores that raise proximity; ``"absolute"``: scores of either sign.
        texts: training texts the scores are summed over; None: all of them.
        edit_texts: training texts the search uses, at most.
        held_out: share of them that only decides which gates of the gradient search are kept.
        batch_size: texts in a batch.
        max_length: tokens a text is cut to; None: the tokenizer's own limit.
        swarm: settings of the particle swarm; by default the paper's.
        climb: settings of the gradient search.
        repair: settings of a repair. Of these here it reads ``max_length``, ``memory``, ``seed``, ``progress``, and
            ``held_out`` where there is no dev set; it draws from all training texts.
        controls: also repair as many random neurons, and without swaps, and put beside the result what that gives:
            each takes as long as the repair itself.
        kind_weights: of the three kinds of counterfactual texts.
        guard: percentage points of accuracy on the search's texts that a particle may lose; None: any.
        certify: so many neurons of highest score of each side are also ablated exactly; 0: none.
        certify_texts: on so many texts.
        memory: budget of the cascade, ``"256MiB"`` or bytes; None: a share of what is free.
        seed: of samples and counterfactual texts; the searches have one of their own, which the presets set to this.
        progress: show progress bars; of several ranks the first does.

    Raises:
        ValueError, TypeError: a setting out of range or of the wrong type, or two that do not go together.
    """

    objective: Objective = "proximity"
    search: Search = "pso"
    which: Which = "all"
    neurons: Scope = "located"
    units: Units = "neurons"
    path: Path = "gradient"
    exact: int = 0
    audit: int = 32
    nodes: int = 4
    tolerance: float | None = None
    top_k: int = 5
    token_score: Score = "attention"
    proximity: Form = "soft"
    fitness: Form = "hard"
    merge: Literal["sum", "max"] = "sum"
    keep_punctuation: bool = False
    correlation_set: CorrelationSet = "occurrences"
    sharpness: float = 0.25
    fraction: float = 0.2
    share: float = 0.5
    cap: int = 200
    sign: Literal["positive", "absolute"] = "positive"
    texts: int | None = 256
    edit_texts: int = 128
    held_out: float = 0.25
    batch_size: int = 32
    max_length: int | None = None
    swarm: Swarm = field(default_factory=Swarm.paper)
    climb: Climb = field(default_factory=Climb)
    repair: Repair = field(default_factory=Repair)
    controls: bool = False
    kind_weights: KindWeights = field(default_factory=KindWeights)
    guard: float | None = None
    certify: int = 16
    certify_texts: int = 16
    memory: str | int | None = None
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            choice(name, getattr(self, name), get_args(kind))
        for name, least in _LEAST.items():
            integer(name, getattr(self, name), least)
        for name in ("texts", "max_length"):
            if getattr(self, name) is not None:
                integer(name, getattr(self, name), 1)
        if self.token_score != "attention":
            raise ValueError(
                f"token_score: how gates move {self.token_score!r} is not followed, only 'attention' is; "
                "spurge.engine.models.probes.token_scores gives the others of a model as it is"
            )
        _ = self.correlation_tokens  # checked where it is made
        for name in ("fraction", "share", "held_out"):
            share_of(name, getattr(self, name))
        if self.held_out == 1:
            raise ValueError("held_out: must leave texts to learn from, got 1")
        if not 0 < self.sharpness < float("inf"):
            raise ValueError(f"sharpness: must be above 0 and finite, got {self.sharpness}")
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance: expected a number between 0 and 1, got {self.tolerance!r}")
        if self.guard is not None and not 0 <= self.guard <= 100:
            raise ValueError(f"guard: expected percentage points from 0 to 100, got {self.guard}")
        for name, type_ in (("swarm", Swarm), ("climb", Climb), ("repair", Repair), ("kind_weights", KindWeights)):
            if not isinstance(getattr(self, name), type_):
                raise TypeError(f"{name}: expected {type_.__name__}, got {type(getattr(self, name)).__name__}")
        if self.memory is not None:
            parse_bytes(self.memory)
        if self.search == "gradient" and self.objective == "proximity" and self.fitness == "hard":
            raise ValueError(
                "fitness: hard proximity is a step function of the gates, which a gradient cannot climb; use "
                "fitness='soft' or search='pso'"
            )
        if self.search == "weights" and (self.objective, self.units) != ("counterfactual", "neurons"):
            raise ValueError(
                "search: 'weights' needs objective='counterfactual' and units='neurons', got "
                f"{self.objective!r} and {self.units!r}"
            )
        if self.search != "pso" and self.guard is not None:
            raise ValueError(
                "guard: only the particle swarm refuses settings; use search='pso', or weigh kept texts higher in "
                "kind_weights or repair"
            )

    def reading(self, audit: int = 0) -> dict[str, Any]:
        """How Eq. 5 is read: settings of `spurge.Cascade`.

        Args:
            audit: neurons of the gradient path that are drawn and measured.
        """
        how: dict[str, Any] = {"path": self.path, "units": self.units, "tolerance": self.tolerance}
        if self.path != "gradient":
            return how | {"nodes": self.nodes}
        if self.tolerance is not None:
            audit = max(audit, AUDIT)
        return how | {"exact": self.exact, "audit": audit, "seed": self.seed}

    @property
    def correlation_tokens(self) -> CorrelationTokens:
        """Which tokens of a text are C of Eq. 6."""
        return CorrelationTokens(
            top_k=self.top_k,
            merge=self.merge,
            keep_punctuation=self.keep_punctuation,
            correlation_set=self.correlation_set,
        )


_CHOICES: dict[str, Any] = {
    "objective": Objective,
    "search": Search,
    "which": Which,
    "neurons": Scope,
    "units": Units,
    "path": Path,
    "token_score": Score,
    "proximity": Form,
    "fitness": Form,
    "sign": Literal["positive", "absolute"],
}
_LEAST = dict.fromkeys(("nodes", "cap", "edit_texts", "batch_size", "certify_texts"), 1)
_LEAST |= {"certify": 0, "seed": 0, "exact": 0, "audit": 0}

#: The settings that the result of localisation depends on.
LOCATING = frozenset(
    (
        *(
            "objective",
            "units",
            "path",
            "exact",
            "nodes",
            "tolerance",
            "top_k",
            "token_score",
            "proximity",
            "merge",
            "sharpness",
        ),
        *("keep_punctuation", "correlation_set", "fraction", "share", "cap", "sign", "texts", "batch_size"),
        *("max_length", "kind_weights", "seed"),
    )
)


def as_first_written(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as resume files have been told apart by them since the first: by their names, without later ones."""
    later = {"keep_punctuation": False, "correlation_set": "occurrences", "units": "neurons"}
    names = {"kind_weights": "weights"}
    unread = {"which", "repair", "controls"} | ({"exact", "audit"} if settings.get("path") != "gradient" else set())
    settings = {k: v for k, v in settings.items() if k not in unread}
    return {names.get(k, k): value for k, value in settings.items() if k not in later or value != later[k]}
