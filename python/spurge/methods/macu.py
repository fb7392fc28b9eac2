"""MacU: neurons located by the gradient responses of proximity, and edited so that shortcuts go and reasons stay.

Sun, Tan, Han, Yan, Li, Li, Zhang: "Unlearning the Spurious Correlations for Improving Generalization of Language
Models". Section and equation numbers are that paper's; what it leaves open is a named option here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Literal, get_args

import torch
from torch import nn

from spurge.engine.cascade import Cascade, Path
from spurge.engine.checks import integer, share_of
from spurge.engine.data import Examples
from spurge.engine.edits import NeuronEdit
from spurge.engine.files import PathLike, canonical_json, fingerprint
from spurge.engine.memory import parse_bytes
from spurge.engine.neurons import NeuronSet, frequent
from spurge.engine.patches import frozen
from spurge.engine.probes import Score
from spurge.engine.scores import NeuronScores
from spurge.engine.sites import Site, find_sites, widths
from spurge.engine.swarm import Swarm
from spurge.methods import screening
from spurge.methods.golden import GoldenTokens
from spurge.methods.located import Located
from spurge.methods.objectives import (
    CounterfactualSet,
    Form,
    Job,
    Weights,
    counterfactual_set,
    proximity_jobs,
)
from spurge.methods.questions import Ask, counterfactual_questions, proximity_questions
from spurge.methods.search import Climb, Found, swarm_search

Objective = Literal["proximity", "counterfactual"]
Search = Literal["pso", "gradient"]
Scope = Literal["located", "all"]


@dataclass(frozen=True, kw_only=True)
class MacU:
    """Settings of MacU; :meth:`locate` and :meth:`edit` are its two steps.

    Attributes:
        objective: ``"proximity"``: Eq. 6 and 7, the paper's. ``"counterfactual"``: the answers to texts whose causal
            words are swapped and whose telling phrases are exchanged (`spurge.methods.counterfactual`); not in the
            paper.
        search: how gates are found. ``"pso"``: Eq. 8 and 9; neurons of the spurious set alone are erased and the swarm
            moves the overlap. ``"gradient"``: Adam on the gates of the whole spurious set, from 1; not in the paper.
        neurons: ``"located"``, or ``"all"``: the search moves every gate, and nothing is erased beforehand.
        path: path of Eq. 5. ``"layer"`` as knowledge neurons and DEPN; ``"neuron"`` is the literal reading, exact and
            dear.
        nodes, tolerance: quadrature of Eq. 5, see `spurge.engine.cascade.Cascade`; the paper does not give its steps.
            Proximity bends more than a logit: on MiniLM the scores of 2, 4 and 8 nodes miss 40, 25 and 10 % of it,
            text by text; `Located.summary` tells.
        top_k: correlation tokens per text, K of section 3.1.2; not given in the paper.
        token_score: what ranks tokens in section 3.1.2, see `spurge.engine.probes.token_scores`; the paper's is
            ``"attention"``. Others are followed as attention times what they add to it in the unedited model.
        proximity: Eq. 6 as it is located with. ``"hard"``: as written; its gradient knows the second term alone.
            ``"soft"``: with a differentiable membership.
        fitness: Eq. 6 as Eq. 7 reads it during the search.
        merge: attention of a word's sub-words, ``"sum"`` or ``"max"``; not given in the paper.
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
        swarm: settings of the particle swarm.
        climb: settings of the gradient search.
        weights: of the three kinds of counterfactual texts.
        guard: percentage points of accuracy on the search's texts that a particle may lose; None: any.
        certify: so many neurons of highest score of each side are also ablated exactly; 0: none.
        certify_texts: on so many texts.
        memory: budget of the cascade, ``"256MiB"`` or bytes; None: a share of what is free.
        seed: of samples, counterfactual texts and searches.
        progress: show progress bars.

    Raises:
        ValueError, TypeError: a setting out of range or of the wrong type, or two that do not go together.
    """

    objective: Objective = "proximity"
    search: Search = "pso"
    neurons: Scope = "located"
    path: Path = "layer"
    nodes: int = 4
    tolerance: float | None = None
    top_k: int = 5
    token_score: Score = "attention"
    proximity: Form = "soft"
    fitness: Form = "hard"
    merge: Literal["sum", "max"] = "sum"
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
    swarm: Swarm = field(default_factory=Swarm)
    climb: Climb = field(default_factory=Climb)
    weights: Weights = field(default_factory=Weights)
    guard: float | None = None
    certify: int = 16
    certify_texts: int = 16
    memory: str | int | None = None
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}: expected one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")
        for name, least in _LEAST.items():
            integer(name, getattr(self, name), least)
        for name in ("texts", "max_length"):
            if getattr(self, name) is not None:
                integer(name, getattr(self, name), 1)
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
        for name, type_ in (("swarm", Swarm), ("climb", Climb), ("weights", Weights)):
            if not isinstance(getattr(self, name), type_):
                raise TypeError(f"{name}: expected {type_.__name__}, got {type(getattr(self, name)).__name__}")
        if self.memory is not None:
            parse_bytes(self.memory)
        if self.search == "gradient" and self.objective == "proximity" and self.fitness == "hard":
            raise ValueError(
                "fitness: hard proximity is a step function of the gates, which a gradient cannot climb; use "
                "fitness='soft' or search='pso'"
            )
        if self.search == "gradient" and self.guard is not None:
            raise ValueError(
                "guard: only the particle swarm refuses settings; weigh kept texts higher in weights instead"
            )

    @classmethod
    def paper(cls, **changes: Any) -> MacU:
        """The paper's procedure: proximity, spurious-only neurons erased, a swarm on the overlap (Eq. 5 to 9).

        40 iterations in [-1, 1] with c1 = c2 = 1.5 and w = 0.5. Located with the soft Eq. 6, since the gradient of the
        hard one knows only its second term; ``proximity="hard"`` is that literal reading. The fitness is measured on
        64 texts: the paper does not say how many it uses, and each costs 800 forward passes.
        """
        return cls(**{"swarm": Swarm.paper(), "edit_texts": 64, **changes})

    @classmethod
    def best(cls, **changes: Any) -> MacU:
        """The setting that removed shortcuts best where it was measured: counterfactual texts, gates by gradient.

        The threshold is low and the cap decides: a shortcut is spread over more neurons than 0.2 of the maximum shows.
        """
        settings = {"objective": "counterfactual", "search": "gradient", "nodes": 2, "fraction": 0.02, "share": 0.3}
        return cls(**{**settings, "texts": 128, **changes})

    def locate(
        self, model: nn.Module, tokenizer: Any, train: Any, golden: GoldenTokens, *, resume: PathLike | None = None
    ) -> Located:
        r"""Score every neuron and select those that carry causal and spurious correlations (section 3.1).

        .. math:: \mathrm{Attr}(w) = \int_0^1 \frac{\partial F(w = \alpha \hat w)}{\partial w} d\alpha

        Eq. 5, w the gate of the neuron. F is proximity to the causal and to the spurious golden sets of the label the
        unedited model predicts; with ``objective="counterfactual"``, agreement with the wanted answers on kept texts
        (causal) and disagreement with them on swapped and neutral texts (spurious).

        Args:
            model: a ``transformers`` classifier; comes back as it was.
            tokenizer: its fast tokenizer.
            train: `Examples`, or whatever `Examples.load` takes.
            golden: golden words of the labels of ``train``.
            resume: a folder for finished batches; a second call with the same arguments goes on where the first
                stopped.

        Raises:
            ValueError: labels that do not fit, a text without an answer, ``resume`` of another job.
        """
        train, golden = _matched(model, train, golden)
        sites = find_sites(model)
        chosen = self._sample(train, self.texts)
        cascade = Cascade(
            model,
            path=self.path,
            nodes=self.nodes,
            tolerance=self.tolerance,
            memory=self.memory,
            attention=self.objective == "proximity",
        )
        with frozen(model):
            questions, facts = self._questions(model, tokenizer, train, golden, chosen)
        job = {name: getattr(self, name) for name in _LOCATING}
        prints = {site.name: fingerprint(site.weight()) for site in sites}
        mark = fingerprint(canonical_json([job, train.fingerprint(), golden.fingerprint(), prints]))
        blocks = screening.screen(cascade, questions, resume=resume, fingerprint=mark, progress=self.progress)
        info = {
            "method": "MacU",
            "objective": self.objective,
            "settings": job,
            "data": train.fingerprint(),
            "golden": golden.fingerprint(),
            "model": prints,
            "texts": len(chosen),
            "batches": len(blocks),
            "labels": "none" if self.objective == "proximity" else "class",
            "seed": self.seed,
            **facts,
        }
        scores = {side: screening.total(blocks, side, info | {"side": side}) for side in screening.SIDES}
        sets = {side: self._select([block.scores[side] for block in blocks], scores[side]) for side in screening.SIDES}
        info |= {"nodes": max(block.nodes for block in blocks), "completeness": screening.completeness(blocks)}
        certificate: dict[str, Any] = {}
        if self.certify:
            short = scores["causal"].top(self.certify) | scores["spurious"].top(self.certify)
            few = self._sample(chosen, self.certify_texts)
            with frozen(model):
                asked, _ = self._questions(model, tokenizer, train, golden, few)
            certificate = screening.certify(cascade, [ask() for ask in asked], scores, short)
        return Located(scores["causal"], scores["spurious"], sets["causal"], sets["spurious"], certificate, info)

    def edit(self, model: nn.Module, tokenizer: Any, train: Any, located: Located, golden: GoldenTokens) -> NeuronEdit:
        """Find gates for the located neurons (section 3.2); the model comes back as it was.

        With ``search="pso"`` and an empty overlap the spurious neurons are erased and there is nothing to search. The
        edit's ``info`` has the settings, the history of the search and the number of erased neurons.

        Args:
            model, tokenizer, train, golden: as for :meth:`locate`.
            located: what it found.

        Raises:
            ValueError: no spurious neuron was located, labels that do not fit, or a target that is not finite.
        """
        train, golden = _matched(model, train, golden)
        sites = find_sites(model)
        if located.causal.widths != widths(sites):
            raise ValueError("located: its sites are not those of this model")
        free, erased = self._split(located, sites)
        if len(free) or self.search == "gradient":
            found = self._search(model, tokenizer, train, golden, sites, free, erased)
            neurons, gates = free | erased, found.gates
        else:
            found = Found(torch.zeros(len(erased)), 0.0, {}, {"evaluations": 0})
            neurons, gates = erased, found.gates
        keep = [abs(gate - 1) > (self.climb.drop if self.search == "gradient" else 0) for gate in gates.tolist()]
        moved = NeuronSet.from_refs(ref for ref, far in zip(neurons, keep, strict=True) if far)
        info = {
            "method": "MacU",
            "objective": self.objective,
            "search": self.search,
            "settings": _plain(asdict(self)),
            "data": train.fingerprint(),
            "golden": golden.fingerprint(),
            "labels": "none" if self.objective == "proximity" and self.guard is None else "class",
            "seed": self.seed,
            "erased": len(erased),
            "searched": len(free),
            "value": found.value,
            "history": found.history,
            **found.info,
        }
        return NeuronEdit.build(model, moved, gates[torch.tensor(keep, dtype=torch.bool)], info)

    # ---- inside ------------------------------------------------------------------------------------------------

    def _sample(self, examples: Examples, count: int | None) -> Examples:
        return examples if count is None or count >= len(examples) else examples.sample(count, self.seed)

    def _select(self, batches: Sequence[NeuronScores], whole: NeuronScores) -> NeuronSet:
        """Neurons that enough batches select; of too many, those of highest score."""
        often = frequent([scores.select(self.fraction, sign=self.sign) for scores in batches], self.share)
        if len(often) <= self.cap:
            return often
        if self.sign == "absolute":
            whole = NeuronScores({site: v.abs() for site, v in whole.values.items()})
        members = set(often)
        return NeuronSet.from_refs(islice((ref for ref, _ in whole.ranking() if ref in members), self.cap))

    def _split(self, located: Located, sites: Sequence[Site]) -> tuple[NeuronSet, NeuronSet]:
        """Neurons that the search moves, and neurons that are erased."""
        if self.neurons == "all":
            return NeuronSet.all(widths(sites)), NeuronSet()
        if not len(located.spurious_set):
            raise ValueError(
                "located: no spurious neuron was found; locate with a smaller fraction or share, or use neurons='all'"
            )
        if self.search == "gradient":
            return located.spurious_set, NeuronSet()
        return located.overlap, located.spurious_only

    def _search(
        self,
        model: nn.Module,
        tokenizer: Any,
        train: Examples,
        golden: GoldenTokens,
        sites: Sequence[Site],
        free: NeuronSet,
        erased: NeuronSet,
    ) -> Found:
        proximity = self.objective == "proximity"
        chosen = self._sample(train, self.edit_texts)
        with frozen(model):
            if self.search == "pso":
                jobs = self._jobs(model, tokenizer, train, golden, chosen)
                cascade = Cascade(model, memory=self.memory, attention=proximity)
                return swarm_search(cascade, jobs, free, erased, self.swarm, guard=self.guard, progress=self.progress)
            if len(chosen) < 2:
                raise ValueError(f"train: the gradient search needs at least 2 texts, got {len(chosen)}")
            kept = max(1, min(len(chosen) - 1, round(self.held_out * len(chosen))))
            held = self._jobs(model, tokenizer, train, golden, chosen[:kept])
            jobs = self._jobs(model, tokenizer, train, golden, chosen[kept:])
            return self.climb.maximise(model, sites, free, jobs, held, attention=proximity, progress=self.progress)

    def _questions(
        self, model: nn.Module, tokenizer: Any, train: Examples, golden: GoldenTokens, chosen: Examples
    ) -> tuple[list[Ask], dict[str, Any]]:
        """What to ask of each batch of ``chosen``, and what there is to say about how that came about."""
        size = self._size(model)
        if self.objective == "proximity":
            return proximity_questions(
                model,
                tokenizer,
                chosen,
                golden,
                token_score=self.token_score,
                form=self.proximity,
                top_k=self.top_k,
                merge=self.merge,
                sharpness=self.sharpness,
                **size,
            ), {}
        made = self._counterfactuals(model, tokenizer, train, golden, chosen)
        phrases = [asdict(phrase) | {"label": golden.labels[phrase.label]} for phrase in made.phrases]
        questions = counterfactual_questions(made, tokenizer, weights=self.weights, **size)
        return questions, {"counterfactual": made.counts(), "phrases": phrases}

    def _jobs(
        self, model: nn.Module, tokenizer: Any, train: Examples, golden: GoldenTokens, chosen: Examples
    ) -> list[Job]:
        """Batches of ``chosen`` with the number that the search maximises."""
        size = self._size(model)
        if self.objective == "counterfactual":
            made = self._counterfactuals(model, tokenizer, train, golden, chosen)
            return made.jobs(tokenizer, weights=self.weights, **size)
        settings: dict[str, Any] = {
            "top_k": self.top_k,
            "form": self.fitness,
            "merge": self.merge,
            "sharpness": self.sharpness,
        }
        return proximity_jobs(model, tokenizer, chosen, golden, token_score=self.token_score, **size, **settings)

    def _counterfactuals(
        self, model: nn.Module, tokenizer: Any, train: Examples, golden: GoldenTokens, chosen: Examples
    ) -> CounterfactualSet:
        return counterfactual_set(
            model,
            tokenizer,
            train,
            golden,
            chosen,
            batch_size=self.batch_size,
            max_length=self.max_length,
            seed=self.seed,
        )

    def _size(self, model: nn.Module) -> dict[str, Any]:
        device = next(model.parameters()).device
        return {"batch_size": self.batch_size, "max_length": self.max_length, "device": device}


_CHOICES: dict[str, Any] = {
    "objective": Objective,
    "search": Search,
    "neurons": Scope,
    "path": Path,
    "token_score": Score,
    "proximity": Form,
    "fitness": Form,
    "merge": Literal["sum", "max"],
    "sign": Literal["positive", "absolute"],
}
_LEAST = dict.fromkeys(("nodes", "top_k", "cap", "edit_texts", "batch_size", "certify_texts"), 1)
_LEAST |= {"certify": 0, "seed": 0}
_LOCATING: tuple[str, ...] = (
    "objective",
    "path",
    "nodes",
    "tolerance",
    "top_k",
    "token_score",
    "proximity",
    "merge",
    "sharpness",
    "fraction",
    "share",
)
_LOCATING += ("cap", "sign", "texts", "batch_size", "max_length", "seed")


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "progress"}


def _matched(model: nn.Module, train: Any, golden: GoldenTokens) -> tuple[Examples, GoldenTokens]:
    """Training texts and golden sets under the same labels, as many as the model has."""
    if not isinstance(golden, GoldenTokens):
        raise TypeError(f"golden: expected GoldenTokens, got {type(golden).__name__}")
    examples = train if isinstance(train, Examples) else Examples.load(train)
    golden = golden.for_labels(examples.labels)
    outputs = getattr(getattr(model, "config", None), "num_labels", None)
    if outputs is not None and outputs != len(golden.labels):
        raise ValueError(f"golden: has {len(golden.labels)} labels {golden.labels}, the model predicts {outputs}")
    return examples, golden
