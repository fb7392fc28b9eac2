"""Every context and long call of the engine and of the methods, on tiny models, to be cut off anywhere."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import spurge
from campaigns.strikes import Mark
from helpers import planted_features, planted_texts
from helpers.tiny_models import tiny, tiny_inputs, tiny_language, tiny_tokenizer
from spurge.engine.base.device_checks import deferred
from spurge.engine.base.gradients import grad_mode
from spurge.engine.edits.gates import attached, suspended
from spurge.engine.edits.overwrites import lifted
from spurge.engine.last_layer.capture import captured
from spurge.engine.models.attention import AttentionRow
from spurge.engine.models.handle import Handle
from spurge.engine.models.hooks import alone, frozen, hook, hook_before, replaced_forward
from spurge.engine.passes.partial_forward import PartialForward
from spurge.engine.planning.plan import plan
from spurge.engine.recordings.generation import continuations
from spurge.engine.recordings.padding import padded

ENTERING, RUNNING, LEAVING = "entering", "running", "leaving"
QUICK: dict[str, Any] = {"texts": 16, "batch_size": 8, "certify": 2, "certify_texts": 4, "progress": False}
PROMPTS = ["the film was", "a great story and", "this plot is dull", "we like the music"]


@dataclass(frozen=True)
class Case:
    """Something to cut off: ``call`` says where its phases begin and returns what it found.

    What it leaves in ``left`` is undone after it, perhaps for a second time.
    """

    name: str
    models: tuple[nn.Module, ...]
    call: Callable[[Mark], Any]
    left: list[Any] = field(default_factory=list)

    def undo(self) -> None:
        """Undoes what is left, the last first."""
        while self.left:
            self.left.pop().undo()


def block(make: Callable[[], AbstractContextManager[Any]], inside: Callable[[Any], Any]) -> Callable[[Mark], Any]:
    """A ``with`` block as a call."""

    def call(mark: Mark) -> Any:
        mark(ENTERING)
        with make() as value:
            mark(RUNNING)
            answer = inside(value)
            mark(LEAVING)
        return answer

    return call


def handled(make: Callable[[], Any], inside: Callable[[], Any], left: list[Any]) -> Callable[[Mark], Any]:
    """A change that lasts until ``undo`` of its handle, which also goes into ``left``."""

    def call(mark: Mark) -> Any:
        mark(ENTERING)
        left.append(make())
        mark(RUNNING)
        answer = inside()
        mark(LEAVING)
        left[-1].undo()
        return answer

    return call


def whole(function: Callable[[], Any]) -> Callable[[Mark], Any]:
    """A long call: one phase."""

    def call(mark: Mark) -> Any:
        mark(RUNNING)
        return function()

    return call


def cases() -> Iterator[Case]:
    """All of them; each has models of its own."""
    yield from _hooks()
    yield from _edits()
    yield from _cascades()
    yield from _methods()
    yield from _last_layers()
    yield from _language()


def _logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with grad_mode(False):
        return model(**inputs).logits


def _hooks() -> Iterator[Case]:
    for family in ("bert", "deberta_v2", "llama"):
        model, inputs = tiny(family), tiny_inputs(family)
        attention = spurge.find_sites(model)[-1].attention
        assert attention is not None
        rows = partial(AttentionRow, attention, lambda rows: torch.zeros(rows, dtype=torch.int64), keep_values=True)

        def row(found: Any, model: Any = model, inputs: Any = inputs) -> Any:
            return _logits(model, inputs), found.row()

        yield Case(f"AttentionRow ({family})", (model,), block(rows, row))
    model, inputs = tiny("bert").train(), tiny_inputs("bert")
    model.bert.embeddings.requires_grad_(False)
    model.classifier.eval()
    run = partial(_logits, model, inputs)
    for gradients in (True, False):
        yield Case(
            f"frozen, gradients={gradients}",
            (model,),
            block(partial(frozen, model, gradients=gradients), lambda _: run()),
        )
    model = tiny("bert")
    run = partial(_logits, model, inputs)
    layer = model.bert.encoder.layer[1]
    silent: dict[str, Callable[[], Any]] = {
        "alone": lambda: alone(model),
        "hook": lambda: hook(layer.output, lambda module, args, output: output * 2),
        "hook_before": lambda: hook_before(layer.output, lambda module, args, kwargs: ((args[0] * 2, args[1]), kwargs)),
        "replaced_forward": lambda: replaced_forward(layer.output, lambda hidden, rest: rest),
        "grad_mode": lambda: grad_mode(False),
        "deferred": deferred,
        "captured": lambda: captured(model.classifier),
    }
    for name, make in silent.items():
        yield Case(name, (model,), block(make, lambda _, run=run: run()))
    tokenizer = tiny_tokenizer(decoder=True)
    yield Case("padded", (), block(lambda: padded(tokenizer, "left"), lambda _: tokenizer(PROMPTS, padding=True)))


def _neurons(model: nn.Module, each: int = 6, seed: int = 0) -> spurge.NeuronSet:
    widths = {site.name: site.width for site in spurge.find_sites(model)}
    return spurge.NeuronSet({name: range(each) for name in widths}).random_like(widths, seed)


def _neuron_edit(model: nn.Module, seed: int = 0) -> spurge.NeuronEdit:
    neurons = _neurons(model, seed=seed)
    gates = torch.rand(len(neurons), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return spurge.NeuronEdit.build(model, neurons, gates)


def _weight_edit(model: nn.Module, names: tuple[str, ...], value: float = 0.5) -> spurge.WeightEdit:
    return spurge.WeightEdit.build(model, {name: (range(0, 30, 3), [value] * 10) for name in names})


def _edits() -> Iterator[Case]:
    names = ("classifier.weight", "bert.pooler.dense.weight", "bert.encoder.layer.0.output.dense.bias")
    model, inputs = tiny("bert"), tiny_inputs("bert")
    run = partial(_logits, model, inputs)
    edits = {"NeuronEdit": _neuron_edit(model), "WeightEdit": _weight_edit(model, names)}
    for name, edit in edits.items():
        yield Case(f"{name}.applied", (model,), block(partial(edit.applied, model), lambda _: run()))
        for use in ("apply", "fold"):
            left: list[Any] = []
            call = handled(lambda e=edit, u=use: _made(e, u, model), run, left)
            yield Case(f"{name}.{use}, undo", (model,), call, left)
    sites = {site.name: site for site in spurge.find_sites(model)}
    gates = edits["NeuronEdit"].full()
    yield Case("attached", (model,), block(lambda: attached(sites, gates), lambda _: run()))
    yield Case("attached (eager stance alone)", (model,), block(lambda: attached({}, {}), lambda _: run()))

    def off(context: Callable[[nn.Module], Any], edit: Any) -> Callable[[Mark], Any]:
        def call(mark: Mark) -> Any:
            with edit.applied(model):
                return block(lambda: context(model), lambda _: run())(mark)

        return call

    yield Case("suspended", (model,), off(suspended, edits["NeuronEdit"]))
    yield Case("lifted", (model,), off(lifted, edits["WeightEdit"]))
    other = _weight_edit(model, names, -1.0)

    def stacked(mark: Mark) -> Any:
        mark(ENTERING)
        both.append(edits["WeightEdit"].apply(model))
        both.append(other.apply(model))
        mark(RUNNING)
        answer = run()
        mark(LEAVING)
        both[-2].undo()
        both[-1].undo()
        return answer

    both: list[Any] = []
    yield Case("two WeightEdits, undone in any order", (model,), stacked, both)


def _made(edit: Any, use: str, model: nn.Module) -> Any:
    """The handle of ``edit.apply`` or ``edit.fold``: Python calls Python, so no signal comes between."""
    return edit.apply(model) if use == "apply" else edit.fold(model)


def _cascades() -> Iterator[Case]:
    for family in ("bert", "gpt2"):
        model, inputs = tiny(family), tiny_inputs(family)
        target = spurge.predicted_logit
        for path, settings in (
            ("layer", {}),
            ("joint", {}),
            ("layer", {"rule": "radau"}),
            ("layer", {"tolerance": 1e-2, "attention": True}),
        ):
            cascade = spurge.Cascade(model, path=path, **settings)  # type: ignore[arg-type]
            name = f"Cascade.attribute ({family}, {path} {' '.join(map(str, settings))})"
            yield Case(name, (model,), whole(partial(cascade.attribute, inputs, target)))
        cascade = spurge.Cascade(model)
        few = _neurons(model, 2)
        yield Case(f"Cascade.ablate ({family})", (model,), whole(partial(cascade.ablate, inputs, target, few)))
        gates = torch.linspace(-1, 1, 3)[:, None].expand(3, len(few)).contiguous()
        yield Case(f"Cascade.gated ({family})", (model,), whole(partial(cascade.gated, inputs, target, few, gates)))

        def anew(model: Any = model, inputs: Any = inputs) -> Any:
            """With the anatomy and the footprint, which are worked out at the first call."""
            locator = spurge.Locator(model)
            prompt = locator.read(inputs)
            return locator(inputs), locator(prompt, lambda rows: rows.logits[:, 0])

        yield Case(f"Locator ({family})", (model,), whole(anew))

        def traced(model: Any = model, inputs: Any = inputs) -> Any:
            forward = PartialForward(Handle.of(model), attention=True)
            trace = forward.trace(inputs)
            with grad_mode(False):
                rows = forward.run(trace, {1: trace.sites[1].anchor * 0.5})
                scaled = forward.scaled(trace, torch.tensor([0.5]))[0]
            return rows.logits, rows.attention, scaled.logits

        yield Case(f"PartialForward ({family})", (model,), whole(traced))
        yield Case(f"plan ({family})", (model,), whole(lambda c=cascade, i=inputs: (plan(c, i, 100).flops,)))


def _methods() -> Iterator[Case]:
    model, tokenizer, rows = planted_texts.model(), tiny_tokenizer(), planted_texts.train()
    golden = planted_texts.GOLDEN
    swarm = spurge.Swarm(particles=3, iterations=2)
    makers = {
        "paper": spurge.MacU(**QUICK, edit_texts=16, swarm=swarm),
        "best": spurge.MacU.best(**QUICK, edit_texts=16, cap=10),
    }
    for name, macu in makers.items():
        found = macu.locate(model, tokenizer, rows, golden)
        locate = partial(macu.locate, model, tokenizer, rows, golden)
        yield Case(f"MacU.locate ({name})", (model,), whole(lambda f=locate: f().causal.values))
        edit = partial(macu.edit, model, tokenizer, rows, found, golden)
        yield Case(f"MacU.edit ({name})", (model,), whole(lambda f=edit: f().gates))
    tests = planted_texts.broken(12)
    for name, made in (("neurons", _neuron_edit(model)), ("weights", _weight_edit(model, ("classifier.weight",)))):
        settings: dict[str, Any] = {"edit": made, "draws": 2, "bootstrap": 20, "progress": False, "golden": golden}
        measure = partial(spurge.evaluate, model, tokenizer, tests, **settings)
        yield Case(f"evaluate ({name})", (model,), whole(lambda f=measure: f().rows()))

    def under() -> Any:
        with _neuron_edit(model).applied(model):
            return spurge.evaluate(model, tokenizer, tests, draws=2, bootstrap=0, progress=False).rows()

    yield Case("evaluate (applied)", (model,), whole(under))
    examples = planted_texts.broken(12)
    take = partial(spurge.extract, model, examples, tokenizer=tokenizer, progress=False, batch_size=4)
    yield Case("extract", (model,), whole(lambda: take().values))
    half = partial(take, dtype=torch.bfloat16)
    yield Case("extract (mixed precision)", (model,), whole(lambda: half().values))


def _last_layers() -> Iterator[Case]:
    features, shortcut = planted_features.unit_features(200, 0.9, 0)
    head = nn.Linear(8, 2)
    fcr = spurge.FCR.best()
    yield Case("FCR.remove_class", (head,), whole(lambda: fcr.remove_class(features, 1).head.weight))
    removed = partial(fcr.remove_feature, features, shortcut, select=features, criterion="gap")
    yield Case("FCR.remove_feature", (head,), whole(lambda: removed().head.weight))
    made = planted_features.dimension_features(600, 0.9, 0)
    tune = spurge.NeuronTune(l2=1e-3)
    yield Case("NeuronTune.halves", (head,), whole(lambda: tune.halves(made).head.weight))
    yield Case("dfr", (head,), whole(lambda: spurge.dfr(made).weight))


def _language() -> Iterator[Case]:
    model, tokenizer = tiny_language("llama"), tiny_tokenizer(decoder=True)

    def length(texts: list[str]) -> list[float]:
        return [sum(map(ord, text)) / 1000 for text in texts]

    masked = partial(spurge.mask, model, tokenizer, PROMPTS, length, _neurons(model), draws=1, generate=3, bootstrap=0)
    yield Case("mask", (model,), whole(lambda: masked(progress=False).losses))
    written = partial(continuations, Handle(model, tokenizer), PROMPTS, 4)
    yield Case("continuations", (model,), whole(written))

    def recorded() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            made = spurge.record(model, tokenizer, PROMPTS, folder, generate=3, batch_size=2, block=2, progress=False)
            return [made.outputs(site) for site in made.widths], made.continuations

    yield Case("record", (model,), whole(recorded))
    classifier = tiny("bert")
    scored = partial(spurge.score_texts, classifier, PROMPTS, tokenizer=tiny_tokenizer(), progress=False)
    yield Case("score_texts", (classifier,), whole(scored))
    read = partial(spurge.embed, classifier.bert, tiny_tokenizer(), PROMPTS, progress=False)
    yield Case("embed", (classifier,), whole(read))


def same(a: Any, b: Any) -> bool:
    """Whether two answers are the same to the bit."""
    if isinstance(a, Tensor):
        return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, np.ndarray):
        return same(torch.from_numpy(a), torch.from_numpy(b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, spurge.engine.cascade.attribution.Attribution):
        return same((a.values, a.full, a.erased), (b.values, b.full, b.erased))
    return bool(a == b) or (a != a and b != b)
