"""MacU: neurons located by the gradient responses of proximity, and edited so that shortcuts go and reasons stay.

Sun, Tan, Han, Yan, Li, Li, Zhang: "Unlearning the Spurious Correlations for Improving Generalization of Language
Models". Section and equation numbers are that paper's; what it leaves open is a named option here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from spurge.engine.base.budgets import budget
from spurge.engine.base.checks import warn
from spurge.engine.base.distributed import Message, Ranks
from spurge.engine.base.files import PathLike, canonical_json, fingerprint
from spurge.engine.cascade.cascade import Cascade
from spurge.engine.cascade.scores import NeuronScores
from spurge.engine.data.examples import Examples
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.edits.weight_deltas import WeightDeltas
from spurge.engine.models.handle import Handle
from spurge.engine.models.hooks import frozen
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.sites import widths
from spurge.methods.golden.golden import GoldenTokens
from spurge.methods.macu import screening
from spurge.methods.macu.located import Located
from spurge.methods.macu.objectives import Job, counterfactual_set
from spurge.methods.macu.proximity import proximity_jobs
from spurge.methods.macu.questions import Questions
from spurge.methods.macu.repair import repaired
from spurge.methods.macu.search import Climb, Found, swarm_search
from spurge.methods.macu.settings import LOCATING, Settings, as_first_written
from spurge.methods.macu.swarm import Swarm
from spurge.methods.macu.weighted_examples import WeightedExamples

_ORIGINS = {"data": "other texts", "golden": "other golden words", "model": "other weights of the model"}


class MacU(Settings):
    """Locate and edit: :meth:`locate` scores and selects neurons, :meth:`edit` finds gates for them.

    Under torchrun both share their work between the ranks of `spurge.Ranks`: every rank calls them with the same
    arguments and gets the same result, whatever the number of ranks. Ranks that hold the model together (tensor
    parallelism) do the same work side by side instead.

    The settings are those of `spurge.methods.macu.settings`, by name; :meth:`paper` and :meth:`best` are presets.
    """

    @classmethod
    def paper(cls, **changes: Any) -> MacU:
        """The paper's procedure: proximity, spurious-only neurons erased, a swarm on the overlap (Eq. 5 to 9).

        40 iterations in [-1, 1] with c1 = c2 = 1.5 and w = 0.5. Located with the soft Eq. 6, since the gradient of the
        hard one knows only its second term; ``proximity="hard"`` is that literal reading. The fitness is measured on
        64 texts: the paper does not say how many it uses, and each costs 800 forward passes.
        """
        swarm = Swarm.paper(seed=changes.get("seed", 0))
        return cls._preset({"swarm": swarm, "edit_texts": 64, "correlation_set": "words"}, changes)

    @classmethod
    def best(cls, **changes: Any) -> MacU:
        """The setting that removed shortcuts best where it was measured: counterfactual texts, gates by gradient.

        The threshold is low and the cap decides: a shortcut is spread over more neurons than 0.2 of the maximum shows.
        """
        settings = {"objective": "counterfactual", "search": "gradient", "nodes": 2, "fraction": 0.02, "share": 0.3}
        return cls._preset({**settings, "texts": 128, "climb": Climb(seed=changes.get("seed", 0))}, changes)

    @classmethod
    def _preset(cls, settings: dict[str, Any], changes: dict[str, Any]) -> MacU:
        """A preset with changes; where these bring a gradient to proximity, the search climbs the soft one."""
        settings = settings | changes
        if settings.get("search") == "gradient" and settings.get("objective", "proximity") == "proximity":
            settings.setdefault("fitness", "soft")
        return cls(**settings)

    def locate(
        self,
        model: nn.Module,
        tokenizer: Any,
        train: Any,
        golden: GoldenTokens,
        *,
        weights: Tensor | Sequence[float] | None = None,
        resume: PathLike | None = None,
    ) -> Located:
        r"""Score every neuron and select those that carry causal and spurious correlations (section 3.1).

        .. math:: \mathrm{Attr}(w) = \int_0^1 \frac{\partial F(w = \alpha \hat w)}{\partial w} d\alpha

        Eq. 5, w the gate of the neuron. F is proximity to the causal and to the spurious golden sets of the label the
        unedited model predicts; with ``objective="counterfactual"``, agreement with the wanted answers on kept texts
        (causal) and disagreement with them on swapped and neutral texts (spurious).

        Scores, completeness and certificate sum :math:`w_b F_b` over the texts b; with ``weights`` None, w = 1. A text
        made from another takes its weight. In the choice of neurons (``share``) every batch has one vote, whatever its
        texts weigh; phrases that go with a label are looked for without weights.

        Args:
            model: a ``transformers`` classifier; comes back as it was.
            tokenizer: its fast tokenizer.
            train: `Examples`, or whatever `Examples.load` takes.
            golden: golden words of the labels of ``train``.
            weights: how much each text of ``train`` counts, ``[N]``, at least 0. Only their ratios matter: those of the
                texts used are scaled to mean 1. A text of weight 0 is left out before anything is drawn or counted.
            resume: a folder for finished batches; a second call with the same arguments goes on where the first
                stopped, with as many ranks as it likes. All ranks must see the folder.

        Raises:
            TypeError: weights that are no numbers.
            ValueError: labels that do not fit, a text without an answer, ``resume`` of another job or with a model
                that ranks hold together, weights of another length, negative, not finite or all 0, or ranks with
                different jobs.
            RankError: another rank was lost or raised an error.
        """
        with _with_ranks(model, tokenizer, resume) as (handle, ranks):
            return self._locate(ranks, handle, train, golden, weights, resume)

    def _locate(
        self,
        ranks: Ranks,
        handle: Handle,
        train: Any,
        golden: GoldenTokens,
        weights: Tensor | Sequence[float] | None,
        resume: PathLike | None,
    ) -> Located:
        train, golden = _matched(train, golden)
        _check_labels(handle, golden.labels)
        counting = WeightedExamples.of(train, weights)
        chosen = counting.sample(self.texts, self.seed)
        cascade = self._cascade(handle, ranks, audit=0)
        with frozen(handle.model):
            questions = Questions(handle, counting.examples, chosen, golden, self)
        job = {name: value for name, value in asdict(self).items() if name in LOCATING}
        prints, weighting = handle.fingerprints(self.units), _weighting(train, counting, chosen)
        parts = [as_first_written(job), train.fingerprint(), golden.fingerprint(), prints, *_verbalizer(handle)]
        mark = fingerprint(canonical_json(parts if weighting is None else [*parts, weighting["fingerprint"]]))
        found = screening.screen(
            cascade,
            questions,
            partial(NeuronScores.select, fraction=self.fraction, sign=self.sign),
            ranks=ranks,
            resume=resume,
            fingerprint=mark,
            progress=self.progress,
        )
        info = {
            "method": "MacU",
            "objective": self.objective,
            "settings": job,
            "data": train.fingerprint(),
            "weights": weighting,
            "golden": golden.fingerprint(),
            "model": prints,
            "texts": len(chosen),
            "batches": found.blocks,
            "labels": "class" if self.objective == "counterfactual" else "none" if weighting is None else None,
            "seed": self.seed,
            **questions.facts,
        }
        scores = {side: found.total(side, info | {"side": side}) for side in screening.SIDES}
        sets = {side: self._select(found.frequent(side, self.share), scores[side]) for side in screening.SIDES}
        info |= {"nodes": found.nodes, "completeness": found.gaps()}
        certificate: dict[str, Any] = {}
        if self.certify:
            ranked = [self._ranked(own) for own in scores.values()]
            short = ranked[0].top(self.certify) | ranked[1].top(self.certify)
            few = chosen.sample(self.certify_texts, self.seed)
            with frozen(handle.model):
                questions = Questions(handle, counting.examples, few, golden, self)
            # Short: every rank computes it, so that none waits, and all take that of rank 0.
            certificate = screening.certify(cascade, questions, scores, short)
            if self.path == "gradient" and self.audit:
                certificate["audit"] = screening.audited(self._cascade(handle, ranks, audit=self.audit), questions)
            certificate = ranks.broadcast(Message(certificate)).facts
        return Located(scores["causal"], scores["spurious"], sets["causal"], sets["spurious"], certificate, info)

    def edit(
        self,
        model: nn.Module,
        tokenizer: Any,
        train: Any,
        located: Located | None,
        golden: GoldenTokens,
        *,
        dev: Any = None,
        resume: PathLike | None = None,
    ) -> NeuronEdit | WeightDeltas:
        """Find gates for the located neurons (section 3.2), or train weights; the model comes back as it was.

        With ``search="pso"`` and an empty overlap the spurious neurons are erased and there is nothing to search: it
        warns, and the edit's ``info`` has the search ``"none"``. There are the settings, the history of the search and
        the number of erased neurons, too.

        Args:
            model, tokenizer, train, golden: as for :meth:`locate`.
            located: what it found; a warning says where it was found with other texts, golden words or weights. A
                repair needs it for ``which="neurons"`` alone, else None will do.
            dev: of a repair, texts by which its strength is chosen; None: ``held_out`` of ``train``.
            resume: a file for the swarm after each iteration, or for the state of a repair's training; a second call
                with the same arguments goes on from it. All ranks must see it, the first writes it. The gradient
                search is short and begins anew.

        Returns:
            Gates of neurons; of a repair, deltas of weights.

        Raises:
            ValueError: no spurious neuron was located, labels that do not fit, a target that is not finite, ``resume``
                with a model that ranks hold together, too little memory for a repair, or ranks with different jobs.
            RankError: another rank was lost or raised an error.
        """
        with _with_ranks(model, tokenizer, resume) as (handle, ranks):
            if located is not None:
                located = located.called_as_in(widths(handle.sites_of(self.units)))
            if self.search == "weights":
                train, golden = _matched(train, golden)
                _check_labels(handle, golden.labels)
                return repaired(ranks, handle, train, dev, located, golden, self, resume)
            if located is None or dev is not None:
                raise ValueError("located, dev: gates need located neurons, and only search='weights' reads a dev set")
            return self._edit(ranks, handle, train, located, golden, resume)

    def _edit(
        self,
        ranks: Ranks,
        handle: Handle,
        train: Any,
        located: Located,
        golden: GoldenTokens,
        resume: PathLike | None,
    ) -> NeuronEdit:
        train, golden = _matched(train, golden)
        _check_labels(handle, golden.labels)
        if (units := located.info.get("settings", {}).get("units", "neurons")) != self.units:
            raise ValueError(
                f"located: was found with units={units!r}, expected {self.units!r} as the settings have it"
            )
        if located.causal.widths != widths(handle.sites_of(self.units)):
            raise ValueError("located: its sites are not those of this model")
        _warn_of_other_origin(
            located, data=train.fingerprint(), golden=golden.fingerprint(), model=handle.fingerprints(self.units)
        )
        free, erased = self._split(located)
        searched = len(free) > 0
        if searched:
            found = self._search(ranks, handle, train, golden, free, erased, resume)
            neurons, gates = free | erased, found.gates
        else:
            warn(
                f"located: no neuron is in both sets, the swarm has nothing to search: all {len(erased)} spurious "
                "neurons are erased"
            )
            found = Found(torch.zeros(len(erased)), 0.0, {}, {"evaluations": 0})
            neurons, gates = erased, found.gates
        keep = [abs(gate - 1) > (self.climb.drop if self.search == "gradient" else 0) for gate in gates.tolist()]
        moved = NeuronSet.from_refs(ref for ref, far in zip(neurons, keep, strict=True) if far)
        info = {
            "method": "MacU",
            "objective": self.objective,
            "search": self.search if searched else "none",
            "settings": {name: value for name, value in asdict(self).items() if name != "progress"},
            "data": train.fingerprint(),
            "golden": golden.fingerprint(),
            "labels": located.info.get("labels", "none")
            if self.objective == "proximity" and self.guard is None
            else "class",
            "seed": self.seed,
            "erased": len(erased),
            "searched": len(free),
            "value": found.value,
            "history": found.history,
            **found.info,
        }
        gates = gates[torch.tensor(keep, dtype=torch.bool)]
        return NeuronEdit.build(handle.model, moved, gates, info, units=self.units)

    # ---- inside ------------------------------------------------------------------------------------------------

    def _cascade(self, handle: Handle, ranks: Ranks, *, audit: int) -> Cascade:
        memory, proximity = self._memory(handle.device, ranks), self.objective == "proximity"
        return Cascade(handle, **self.reading(audit), memory=memory, attention=proximity)

    def _select(self, often: NeuronSet, whole: NeuronScores) -> NeuronSet:
        """Neurons that enough batches select; of too many, those of highest score."""
        if len(often) <= self.cap:
            return often
        members = set(often)
        ranking = self._ranked(whole).ranking()
        return NeuronSet.from_refs(islice((ref for ref, _ in ranking if ref in members), self.cap))

    def _ranked(self, scores: NeuronScores) -> NeuronScores:
        """Scores as neurons are ranked by them."""
        return scores.magnitudes() if self.sign == "absolute" else scores

    def _split(self, located: Located) -> tuple[NeuronSet, NeuronSet]:
        """Neurons that the search moves, and neurons that are erased."""
        if self.neurons == "all":
            return NeuronSet.all(located.causal.widths), NeuronSet()
        if not len(located.spurious_set):
            raise ValueError(
                "located: no spurious neuron was found; locate with a smaller fraction or share, or use neurons='all'"
            )
        if self.search == "gradient":
            return located.spurious_set, NeuronSet()
        return located.overlap, located.spurious_only

    def _search(
        self,
        ranks: Ranks,
        handle: Handle,
        train: Examples,
        golden: GoldenTokens,
        free: NeuronSet,
        erased: NeuronSet,
        resume: PathLike | None,
    ) -> Found:
        proximity = self.objective == "proximity"
        chosen = WeightedExamples.of(train).sample(self.edit_texts, self.seed).examples
        with frozen(handle.model):
            if self.search == "pso":
                jobs = self._jobs(handle, train, golden, chosen)
                memory = self._memory(handle.device, ranks)
                cascade = Cascade(handle, memory=memory, attention=proximity, units=self.units)
                prints = handle.fingerprints(self.units) if resume is not None else {}
                job = [
                    as_first_written(asdict(self)),
                    train.fingerprint(),
                    golden.fingerprint(),
                    prints,
                    free.to_dict(),
                    erased.to_dict(),
                    *_verbalizer(handle),
                ]
                return swarm_search(
                    cascade,
                    jobs,
                    free,
                    erased,
                    self.swarm,
                    ranks=ranks,
                    guard=self.guard,
                    checkpoint=resume,
                    fingerprint=fingerprint(canonical_json(job)),
                    progress=self.progress,
                )
            if len(chosen) < 2:
                raise ValueError(f"train: the gradient search needs at least 2 texts, got {len(chosen)}")
            kept = max(1, min(len(chosen) - 1, round(self.held_out * len(chosen))))
            held = self._jobs(handle, train, golden, chosen[:kept])
            jobs = self._jobs(handle, train, golden, chosen[kept:])
            ranks.doing = "gates were searched"
            # Short and one step after the other: every rank takes them all, and the gates of rank 0 count.
            shown = self.progress and ranks.rank == 0
            how: dict[str, Any] = {"attention": proximity, "units": self.units, "progress": shown}
            climbed = self.climb.maximise(handle, free, jobs, held, **how)
            return Found.of_message(ranks.broadcast(climbed.message()))

    def _jobs(self, handle: Handle, train: Examples, golden: GoldenTokens, chosen: Examples) -> list[Job]:
        """Batches of ``chosen`` with the number that the search maximises."""
        size: dict[str, Any] = {"batch_size": self.batch_size, "max_length": self.max_length}
        if self.objective == "counterfactual":
            made = counterfactual_set(handle, train, golden, chosen, seed=self.seed, **size)
            return made.jobs(handle, weights=self.kind_weights, **size)
        form: dict[str, Any] = {"form": self.fitness, "sharpness": self.sharpness}
        return proximity_jobs(handle, chosen, golden, correlation_tokens=self.correlation_tokens, **size, **form)

    def _memory(self, device: torch.device, ranks: Ranks) -> str | int | None:
        """The budget of a cascade: ranks on one machine's CPUs share what is free there."""
        if self.memory is not None or ranks.local_size == 1 or device.type != "cpu":
            return self.memory
        return budget(None, device) // ranks.local_size


@contextmanager
def _with_ranks(model: nn.Module, tokenizer: Any, resume: PathLike | None) -> Iterator[tuple[Handle, Ranks]]:
    """The handle of a model, and the ranks that share the work on it.

    Raises:
        ValueError: ranks that must go on in step would each find another state of the same file.
    """
    handle = Handle(model, tokenizer)
    if resume is not None and handle.mesh is not None:
        raise ValueError(f"resume: several ranks hold this model together, expected None, got {str(resume)!r}")
    with Ranks.current(handle.mesh) as ranks:
        yield handle, ranks


def _verbalizer(handle: Handle) -> list[Any]:
    """How a language model is asked for a label, where it is one."""
    return [] if handle.verbalizer is None else [handle.verbalizer]


def _weighting(train: Examples, counting: WeightedExamples, chosen: WeightedExamples) -> dict[str, Any] | None:
    """What there is to say about the weights; None where all texts count alike."""
    if len(counting) == len(train) and counting.even:
        return None
    return {
        "fingerprint": counting.fingerprint(),
        "left_out": len(train) - len(counting),
        "effective_texts": chosen.effective,
    }


def _matched(train: Any, golden: GoldenTokens) -> tuple[Examples, GoldenTokens]:
    """Training texts and golden sets under the same labels."""
    if not isinstance(golden, GoldenTokens):
        raise TypeError(f"golden: expected GoldenTokens, got {type(golden).__name__}")
    examples = train if isinstance(train, Examples) else Examples.load(train)
    golden = golden.for_labels(examples.labels)
    return examples, golden


def _check_labels(handle: Handle, labels: Sequence[str]) -> None:
    """Raises ValueError where the model does not give a number for each label."""
    if handle.head is not None and handle.verbalizer is None:
        raise ValueError(
            f"model: {type(handle.model).__name__} gives the next token, not a label; classify by label words: "
            "see spurge.Verbalizer"
        )
    handle.check_single_label("model")
    outputs = getattr(getattr(handle.model, "config", None), "num_labels", None)
    if outputs is not None and outputs != len(labels):
        raise ValueError(f"golden: has {len(labels)} labels {tuple(labels)}, the model predicts {outputs}")
    handle.check_labels("train", labels)


def _warn_of_other_origin(located: Located, **given: Any) -> None:
    """Warns where neurons were located with something else than what is given now."""
    for name, value in given.items():
        before = located.info.get(name)
        if before is not None and before != value:
            warn(f"located: was found with {_ORIGINS[name]} than given now")
