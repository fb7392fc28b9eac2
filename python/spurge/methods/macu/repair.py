r"""A repair: an edit by training on swapped texts, as strong as texts that training did not see allow.

W becomes :math:`W + \alpha D`: D is what training added (`spurge.methods.macu.training`), and of the candidates of
:math:`\alpha` that keep the accuracy on unseen texts, the one that gets most of their swaps right is taken. Not in the
paper; interpolation of weights: Wortsman et al. 2022 (WiSE-FT).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from spurge.engine.base.checks import warn
from spurge.engine.base.distributed import Message, Ranks
from spurge.engine.base.files import PathLike, canonical_json, fingerprint
from spurge.engine.base.gradients import without_gradients
from spurge.engine.data.examples import Examples
from spurge.engine.edits.gates import is_gated
from spurge.engine.edits.overwrites import is_overwritten
from spurge.engine.edits.weight_deltas import Dense, WeightDeltas
from spurge.engine.features.extraction import extract
from spurge.engine.last_layer.fitting import fit_head
from spurge.engine.models.handle import Handle
from spurge.engine.models.heads import Head, print_of
from spurge.engine.models.hooks import frozen
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.parameters import find_places
from spurge.engine.models.sites import widths
from spurge.methods.golden.golden import GoldenTokens
from spurge.methods.macu.located import Located
from spurge.methods.macu.objectives import length_of
from spurge.methods.macu.settings import Settings
from spurge.methods.macu.swaps import SwapMaker, SwapShares
from spurge.methods.macu.trained import Free, Student, Which, copied, free_weights, write_edited
from spurge.methods.macu.training import RATES, Course, Repair, Training, plan_course

_L2 = (1e-4, 1e-3, 1e-2)  # penalties of a refitted last layer; dev chooses
_SWAPPED = 256  # swaps of dev, at most
_FITTED = 2048  # rows of training that a last layer is refitted on, at most
_CONTROL_NEURONS = 512  # random ones of the control, where the repair itself is of none


@dataclass(frozen=True)
class Tried:
    """A candidate and its accuracies, in percent, on dev and on swaps of it."""

    value: float
    home: float
    swapped: float


def best_of(before: Tried, candidates: Sequence[Tried], loss: float) -> Tried | None:
    """Of those that lose at most ``loss`` points at home, the best on swaps (the first of equals); None: all lose."""
    allowed = [tried for tried in candidates if tried.home >= before.home - loss - 1e-9]
    return max(allowed, key=lambda tried: tried.swapped, default=None)


@dataclass(frozen=True, eq=False)
class Dev:
    """Texts that training does not see, and swaps of them (None: none can be made, and the texts alone decide)."""

    texts: Examples
    swaps: Examples | None
    max_length: int

    @without_gradients
    def measure(self, value: float, handle: Handle) -> Tried:
        """A model's accuracies; ``value`` is the candidate's name."""
        home = self._right(handle, self.texts)
        return Tried(value, home, home if self.swaps is None else self._right(handle, self.swaps))

    def _right(self, handle: Handle, rows: Examples) -> float:
        right, ordered = 0, sorted(rows, key=lambda row: (length_of(row), row.text))
        for batch in Examples(ordered, rows.labels).batches(64):
            logits = handle.logits(handle.encode(batch, self.max_length))
            right += int((logits.argmax(1).cpu() == batch.targets).sum())
        return 100 * right / len(rows)


@dataclass(frozen=True, eq=False)
class Repairer:
    """Repairs of one model with the same texts; the model is only read.

    Attributes:
        handle: of the model.
        train: training texts, under the model's labels.
        dev: others, by which alpha is chosen; None: ``held_out`` of ``train``, which training then does not see.
        golden: words of these labels.
        settings: of the repair.
        held_out: share of ``train``.
        max_length: tokens a text is cut to.
        memory: bytes beyond the model's own, or a text such as ``"2 GiB"``.
        seed: of all choices.
        progress: show a progress bar.
    """

    handle: Handle
    train: Examples
    dev: Examples | None
    golden: GoldenTokens
    settings: Repair
    held_out: float
    max_length: int
    memory: str | int | None
    seed: int
    progress: bool

    def edit(
        self, which: Which, neurons: NeuronSet | None, resume: PathLike | None, info: dict[str, Any]
    ) -> WeightDeltas:
        """Trains, and chooses how much of what was learned is taken.

        Args:
            which, neurons: what is trained (`spurge.methods.macu.trained.free_weights`).
            resume: a file for the state of training; a second call with the same arguments goes on from it.
            info: provenance of the edit, beside what this adds.

        Warns:
            UserWarning: every candidate of alpha loses too much; the edit then changes nothing.

        Raises:
            ValueError: an edit is applied to the model, nothing can be swapped, too little memory, or a resume file
                of another job.
        """
        model, settings = self.handle.model, self.settings
        with frozen(self._plain()):
            dev, course = self._prepared()
            free = free_weights(self.handle, which, neurons=neurons, rank=settings.rank)
            rate = RATES[which] if settings.rate is None else settings.rate
            student = Student(self.handle, free, self.seed)
            how: dict[str, Any] = {"rate": rate, "max_length": self.max_length}
            training = Training(student, course, settings, memory=self.handle.budget(self.memory), **how)
            training.run(resume, "" if resume is None else self._origin(which, neurons, free), self.progress)
            facts = {"which": which, "rate": rate, "swaps": course.swaps, "losses": training.losses}
            edit = WeightDeltas.build(model, student.deltas(), {**info, **facts})
            del training, student  # the copy, its gradients and Adam's state
            edit = self._preferred(sorted(settings.alphas), edit.scaled, dev)
            return self._with_last_layer(edit, dev, course) if settings.last_layer and edit.info["alpha"] else edit

    def strength(self, edit: WeightDeltas, alphas: Sequence[float]) -> WeightDeltas:
        """Another edit of the model as strong as dev has it, by the rule of the repair; warns as :meth:`edit`."""
        return self.choose(sorted(alphas), edit.scaled)

    def choose(self, values: Sequence[float], edit: Callable[[float], WeightDeltas]) -> WeightDeltas:
        """Of several edits of the same parameters the one that dev prefers; rule and warning are those of :meth:`edit`.

        Args:
            values: what tells the edits apart, in the order in which equal ones are preferred; ``info["alpha"]`` is
                that of the edit taken, 0 for none.
            edit: the edit of a value.
        """
        with frozen(self._plain()):
            dev, _, _ = self._parted()
            return self._preferred(values, edit, dev)

    def judged(self) -> Tried:
        """Accuracies of the model as it is now, with what is applied to it, on dev and on swaps of it."""
        with frozen(self.handle.model):
            return self._parted()[0].measure(0.0, self.handle)

    def last_layer(self) -> WeightDeltas:
        """The last layer alone, refitted on what the repair is trained on; no change where dev finds none better."""
        with frozen(self._plain()):
            dev, course = self._prepared()
            before = dev.measure(0.0, self.handle)
            facts = {
                "method": "last layer",
                "home": before.home,
                "swapped": before.swapped,
                "selection": [asdict(before)],
            }
            return self._with_last_layer(WeightDeltas.build(self.handle.model, {}, facts), dev, course)

    def controls(self, which: Which, neurons: NeuronSet | None) -> dict[str, dict[str, float]]:
        """What a repair of random neurons, and one without swaps, give on dev; each takes as long as a repair."""
        sites = widths(self.handle.sites)
        if neurons is None:
            drawn = spread_neurons(sites, _CONTROL_NEURONS, self.seed)
        else:
            few = [site for site, count in neurons.counts().items() if 2 * count <= sites[site]]
            drawn = neurons.random_like(sites, self.seed, NeuronSet({site: neurons.indices(site) for site in few}))
        alone = replace(self, settings=replace(self.settings, shares=None))
        edits = {"random": self.edit("neurons", drawn, None, {}), "no-swaps": alone.edit(which, neurons, None, {})}
        return {name: {key: edit.info[key] for key in ("alpha", "home", "swapped")} for name, edit in edits.items()}

    def _plain(self) -> nn.Module:
        """The model, once no edit is applied to it."""
        if is_gated(self.handle.model) or is_overwritten(self.handle.model):
            raise ValueError("model: an edit is applied to it now; leave its `with` block, or fold it in")
        return self.handle.model

    def _prepared(self) -> tuple[Dev, Course]:
        dev, train, maker = self._parted()
        shown = None if self.settings.shares is None else maker
        return dev, plan_course(self.handle, train, shown, self.settings, self.max_length, self.seed)

    def _parted(self) -> tuple[Dev, Examples, SwapMaker]:
        """Texts that training does not see, with swaps of them; those that it sees; and what makes swaps."""
        settings, train, dev = self.settings, self.train, self.dev
        if dev is None:
            if len(train) < 2:
                raise ValueError("train: a repair needs at least 2 texts, or others as dev, got 1")
            held = max(1, min(len(train) - 1, round(self.held_out * len(train))))
            mixed = train.sample(len(train), self.seed)
            dev, train = mixed[:held], mixed[held:]
        if len(dev) > settings.dev_texts:
            dev = dev.sample(settings.dev_texts, self.seed)
        maker = SwapMaker(self.handle, train, self.golden, settings.shares or SwapShares(), seed=self.seed)
        try:
            swaps = Examples([s.example for s in maker.make(dev, min(_SWAPPED, len(dev)), self.seed + 1)], dev.labels)
        except ValueError:
            swaps = None
        return Dev(dev, swaps, self.max_length), train, maker

    def _origin(self, which: Which, neurons: NeuronSet | None, free: Free) -> str:
        """Of all that decides the steps: settings of the choice of alpha do not."""
        later = ("alphas", "loss", "dev_texts", "last_layer", "keep")
        settings = {name: value for name, value in asdict(self.settings).items() if name not in later}
        prints = [print_of(name, place.parameter) for name, place in find_places(self.handle.model, free).items()]
        texts = [rows.fingerprint() for rows in (self.train, self.dev) if rows is not None]
        parts = [texts, self.golden.fingerprint(), prints, which, None if neurons is None else neurons.to_dict()]
        verbalizer = self.handle.verbalizer
        return fingerprint(canonical_json([*parts, settings, self.held_out, self.max_length, self.seed, verbalizer]))

    def _preferred(self, values: Sequence[float], edit: Callable[[float], WeightDeltas], dev: Dev) -> WeightDeltas:
        """The edit that dev prefers."""
        before, first = dev.measure(0.0, self.handle), edit(values[0])
        copy = Handle(copied(self.handle.model, first.deltas), self.handle.tokenizer)
        tried = []
        for value in values:
            write_edited(self.handle.model, copy.model, edit(value))
            tried.append(dev.measure(value, copy))
        best = best_of(before, tried, self.settings.loss)
        selection = [asdict(candidate) for candidate in (before, *tried)]
        if best is None:
            warn(f"dev: the edit loses more than {self.settings.loss} points at every alpha; none of it is taken")
            facts = {"alpha": 0.0, "home": before.home, "swapped": before.swapped, "selection": selection}
            return first.scaled(0.0, facts)
        facts = {"alpha": best.value, "home": best.home, "swapped": best.swapped, "selection": selection}
        return edit(best.value).scaled(1.0, facts)

    def _with_last_layer(self, edit: WeightDeltas, dev: Dev, course: Course) -> WeightDeltas:
        """The edit with a last layer refitted on the edited model's features, where dev finds one that is better."""
        model = self.handle.model
        copy = copied(model, edit.deltas)
        write_edited(model, copy, edit)
        head = Head.of(copy)
        how: dict[str, Any] = {"tokenizer": self.handle.tokenizer, "max_length": self.max_length, "progress": False}
        fitted = extract(copy, Examples(course.examples[:_FITTED], dev.texts.labels), **how)
        judged = [extract(copy, part, **how) for part in (dev.texts, dev.swaps) if part is not None]
        tried, heads = [], {}
        for l2 in _L2:
            heads[l2] = fit_head(fitted.values, fitted.labels, head.outputs, weights=None, l2=l2, start=head)
            right = [
                100 * float((heads[l2].predictions(part.values) == part.labels).double().mean()) for part in judged
            ]
            tried.append(Tried(l2, right[0], right[-1]))
        before = Tried(**edit.info["selection"][0])
        chosen = best_of(before, tried, self.settings.loss)
        facts: dict[str, Any] = {"l2": None, "candidates": [asdict(candidate) for candidate in tried]}
        if chosen is None or chosen.swapped <= edit.info["swapped"]:
            return edit.scaled(1.0, {"last_layer": facts})
        deltas, new = dict(edit.deltas), heads[chosen.value]
        for key, value in (("weight", new.weight), ("bias", new.bias)):
            if value is not None:
                name = f"{head.name}.{key}"
                old = find_places(model, [name])[name].parameter.detach().cpu()
                deltas[name] = Dense(value - old.float())
        facts["l2"] = chosen.value
        info = {**edit.info, "last_layer": facts, "home": chosen.home, "swapped": chosen.swapped}
        return WeightDeltas.build(model, deltas, info)


def spread_neurons(sites: dict[str, int], count: int, seed: int) -> NeuronSet:
    """About ``count`` random neurons of ``sites`` (name to width): of each its share, at least one."""
    total, generator = sum(sites.values()), torch.Generator().manual_seed(seed)
    parts = {site: max(1, min(width, round(count * width / total))) for site, width in sites.items()}
    return NeuronSet({s: torch.randperm(sites[s], generator=generator)[:n] for s, n in parts.items()})


def repaired(
    ranks: Ranks,
    handle: Handle,
    train: Examples,
    dev: Any,
    located: Located | None,
    golden: GoldenTokens,
    macu: Settings,
    resume: PathLike | None,
) -> WeightDeltas:
    """The repair that `spurge.MacU.edit` is asked for; every rank makes it, and that of rank 0 counts.

    Raises:
        ValueError: as `spurge.MacU.edit`.
    """
    if handle.mesh is not None:
        raise ValueError("model: ranks hold its weights together; a repair trains a whole copy, expected a plain model")
    neurons = None
    if macu.which == "neurons":
        if located is None or not len(located.spurious_set):
            raise ValueError("located: which='neurons' needs located spurious neurons, got none")
        neurons = located.spurious_set
    length = macu.repair.max_length if macu.max_length is None else min(macu.max_length, macu.repair.max_length)
    others = None if dev is None else Examples.load(dev, labels=train.labels)
    shown = macu.progress and ranks.rank == 0
    repairer = Repairer(
        handle, train, others, golden, macu.repair, macu.held_out, length, macu.memory, macu.seed, shown
    )
    info = {
        "method": "MacU",
        "objective": macu.objective,
        "search": macu.search,
        "settings": {name: value for name, value in asdict(macu).items() if name != "progress"},
        "data": train.fingerprint(),
        "dev": None if others is None else others.fingerprint(),
        "golden": golden.fingerprint(),
        "labels": "class",
        "seed": macu.seed,
    }
    ranks.doing = "weights were trained"
    edit = repairer.edit(macu.which, neurons, resume if ranks.rank == 0 else None, info)
    if macu.controls:
        edit = edit.scaled(1.0, {"controls": repairer.controls(macu.which, neurons)})
    tensors, facts = edit.to_parts()
    message = ranks.broadcast(Message(facts, tensors))
    return WeightDeltas.of_parts(message.tensors, message.facts)
