"""How faithful localisation is: neurons that are planted, and what a model keeps that keeps those of highest score.

python bench/experiments/circuits.py all FOLDER    models/, sentiment/ and lexicons/ of the data, for sst2 alone

planted: small transformers with one shortcut pathway of known neurons, beside decoys (`experiments.planted_circuit`);
how many of the planted are among as many, and twice as many, top scores of each localiser. demo, sst2, smollm2: CPR and
CMD of the MIB benchmark (`experiments.curves`) of the demo's MiniLM with its planted phrase, of a MiniLM fine-tuned on
SST-2, and of SmolLM2-135M on prompts. Finished parts are kept in ``--cache``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import language
from experiments import command, data, models
from experiments.command import Clock
from experiments.curves import ABLATIONS, FRACTIONS, Areas, Faithfulness, areas, mean_activations
from experiments.data import kept
from experiments.localisers import LOCALISERS, Localiser, Question, Values, Words, about, alike
from experiments.planted_circuit import LABEL, PLANTED_LAYERS, Plan, Planted, build
from experiments.tables import Table
from spurge.demo import grammar
from spurge.demo.grammar import Grammar
from spurge.engine.base import files
from spurge.engine.cascade.cascade import Cascade
from spurge.engine.cascade.scores import NeuronScores
from spurge.engine.evaluation.prediction import accuracy
from spurge.engine.models.handle import Handle
from spurge.engine.models.neurons import NeuronSet
from spurge.engine.models.sites import widths
from spurge.report.results import Results

DRAWS = 20  # of random neurons, as many as are planted
RANDOM = 5  # random rankings for each seed
COUNTRIES = (
    "France Germany Italy Spain Portugal Austria Poland Hungary Greece Turkey Egypt Kenya Japan China India Russia "
    "Norway Sweden Finland Denmark Ireland Belgium Cuba Peru Chile Brazil Argentina Canada Mexico Iran Iraq Thailand"
)


def scored(question: Question, name: str, seed: int, cache: Path | None) -> Values:
    """Scores of a localiser, taken from the cache where the same was asked of the same model."""
    asked = [question.inputs["input_ids"], question.leader, question.other, question.weight]
    words = question.words and [question.words.train.fingerprint(), question.words.golden.fingerprint()]
    about_it = [*map(files.fingerprint, asked), question.few, question.nodes, words, question.handle.fingerprints()]
    return kept(cache, "circuit-scores", _key(name, seed, *about_it), lambda: LOCALISERS[name].scores(question, seed))


def _key(*parts: Any) -> str:
    """What a finished part depends on, but for the code."""
    return files.canonical_json([torch.__version__, files.spurge_version(), *parts])


# ---- planted neurons -------------------------------------------------------------------------------------------


def recalls(values: Values, planted: NeuronSet, decoys: NeuronSet) -> dict[str, float]:
    """Percent of the planted among as many top scores (precision and recall), among twice as many, and of decoys."""
    scores, count = NeuronScores(values), len(planted)
    top = scores.top(count)
    return {
        "recall": 100 * len(top & planted) / count,
        "recall_at_twice": 100 * len(scores.top(2 * count) & planted) / count,
        "decoys": 100 * len(top & decoys) / count,
    }


def questions(built: Planted, count: int, seed: int) -> dict[str, Question]:
    """What the phrase does to the lead of its label: in pairs of texts with it and with another of as many words, and
    as people without pairs must ask, by the texts with it alone.
    """
    rows = Grammar(unseen=0.0)
    each = {case: [str(row["text"]) for row in rows.test_rows(case, seed)] for case in ("kept", "broken")}
    drawn = alike(built.handle, [text for own in each.values() for text in own], 4 * count, seed)
    texts = [text for own in each.values() for text in [one for one in drawn if one in own][: count // 2]]
    others = [phrase for phrase in grammar.ADJUNCTS if len(phrase.split()) == len(grammar.SHORTCUT.split())]
    without = [text.replace(grammar.SHORTCUT, others[i % len(others)]) for i, text in enumerate(texts)]
    words = Words(built.train, data.GRAMMAR_GOLDEN, "spurious")

    def asked(texts: list[str], weight: list[float]) -> Question:
        leader = torch.full((len(weight),), LABEL)
        inputs = dict(built.handle.encode(texts))
        return Question(built.handle, inputs, leader, 1 - leader, torch.tensor(weight), words=words)

    share = [1 / len(texts)] * len(texts)
    return {"pairs": asked(texts + without, share + [-one for one in share]), "texts": asked(texts, share)}


def construction(built: Planted, question: Question, exact: Values, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the phrase adds to the lead of its label, whole and with sets of neurons off; and single exact effects."""
    every = NeuronSet.all(widths(built.handle.sites))
    rest = every - built.planted - built.decoys
    off = {"unedited": NeuronSet(), "planted off": built.planted, "decoys off": built.decoys}
    off |= {f"planted of layer {layer + 1} off": built.of_layer(layer) for layer in PLANTED_LAYERS}
    known = built.planted | built.decoys
    draws = [built.planted.random_like(widths(built.handle.sites), 100 * seed + i, known) for i in range(DRAWS)]
    gates = torch.stack([torch.tensor([ref not in own for ref in every]).float() for own in (*off.values(), *draws)])
    found = Cascade(built.handle).gated(question.inputs, question.target, every, gates).sum((1, 2)).tolist()
    effects = dict(zip(off, found, strict=False)) | {"as many others off": sum(found[len(off) :]) / DRAWS}

    def own(neurons: NeuronSet) -> Tensor:
        return torch.cat([exact[site][neurons.indices(site)] for site in neurons.sites])

    single = {
        "smallest planted": own(built.planted).min(),
        "largest planted": own(built.planted).max(),
        "largest decoy": own(built.decoys).abs().max(),
        "largest other": own(rest).abs().max(),
    }
    return effects, single


def planted(args: argparse.Namespace, results: Results) -> None:
    """Precision and recall of planted neurons."""
    clock = Clock()
    plan = Plan(rows=600, planted=3, width=48) if args.quick else Plan()
    texts = 4 if args.quick else 16
    facts = Table("planted: construction", "logits", digits=2)
    right = Table("planted: rows right")
    tables = {case: Table(f"planted: {case}") for case in ("pairs", "texts")}
    for seed in args.seeds:
        built = build(plan, seed, args.cache)
        clock(f"planted {seed}: model")
        asked = questions(built, texts, seed)
        effects, single = construction(built, asked["pairs"], scored(asked["pairs"], "exact", seed, args.cache), seed)
        for name, value in effects.items():
            facts.add(name, {"effect of the phrase": value}, labels="none", note="lead of its label, with less without")
        for name, value in single.items():
            facts.add(name, {"exact effect": value}, labels="none", note="of one neuron, on the effect of the phrase")
        right.add("unedited", _right(built.handle, seed), labels="none", note="test rows of the grammar")
        for case, question in asked.items():
            for name, localiser in LOCALISERS.items():
                found = recalls(scored(question, name, seed, args.cache), built.planted, built.decoys)
                tables[case].add(name, found, labels=localiser.labels, note=localiser.note)
                clock(f"planted {seed}, {case}, {name}: {found['recall']:.0f} %")
    for table in (facts, right, *tables.values()):
        table.write(results, args.seeds)
        table.show()


def _right(handle: Handle, seed: int) -> dict[str, float]:
    sets = data.of_grammar(Grammar(unseen=0.0), seed)
    found = {group: accuracy(handle.model, handle.tokenizer, sets[group]) for group in data.GROUPS}
    return {f"{group}_accuracy": value for group, value in found.items()}


# ---- the MIB benchmark's measures ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Subject:
    """A model whose neurons are asked about.

    Attributes:
        texts: scores are made of some of these.
        batches: faithfulness is measured on these.
        count: texts that a question is about.
    """

    handle: Handle
    texts: list[str]
    batches: list[Any]
    count: int
    words: Words | None = None
    few: int | None = None
    nodes: int = 4

    def localisers(self) -> dict[str, Localiser]:
        """Those that this model is not too large for."""
        large = self.words is None
        return {name: own for name, own in LOCALISERS.items() if not (large and (own.words or own.slow))}

    def question(self, seed: int) -> Question:
        """About texts drawn by a seed."""
        texts = alike(self.handle, self.texts, self.count, seed)
        return about(self.handle, texts, words=self.words, few=self.few, nodes=self.nodes)

    def note(self, name: str, localiser: Localiser) -> str:
        """What a localiser is, and how many texts it was asked about."""
        if name == "random":
            return f"{localiser.note}, {RANDOM} draws a seed"
        texts = self.few if name == "exact" and self.few else self.count
        return localiser.note if localiser.words else f"{localiser.note}; by {texts} texts"


def demo(args: argparse.Namespace) -> Subject:
    """The demo's model, seed 0; its test rows with the phrase and without."""
    sets = data.of_grammar(Grammar(train=200, test=20) if args.quick else Grammar())
    train = sets["train"]
    tuned = models.fine_tuned(train, epochs=3, seed=0, cache=args.cache, layers=2 if args.quick else None)
    handle = Handle(tuned.model, tuned.tokenizer)
    texts = [text for group in data.GROUPS for text in sets[group].sample(4 if args.quick else 12).texts]
    words = Words(train.sample(40) if args.quick else train, data.GRAMMAR_GOLDEN, "causal")
    count, few = (4, 1) if args.quick else (8, 2)
    return Subject(handle, [*train.texts], [handle.encode(texts)], count, words, few)


def sst2(args: argparse.Namespace) -> Subject:
    """MiniLM as it was fine-tuned on SST-2; sentences of dev."""
    handle = models.sst2_classifier(args.data)
    train, dev = (data.sentiment(args.data, "sst2_sentences", split) for split in ("train", "dev"))
    texts = sorted(dev.sample(4 if args.quick else 36).texts, key=len)
    batches = [handle.encode(texts[start : start + 12]) for start in range(0, len(texts), 12)]
    words = Words(train.sample(40) if args.quick else train, data.sentiment_golden(args.data), "causal")
    count, few = (4, 1) if args.quick else (8, 2)
    return Subject(handle, [*train.texts], batches, count, words, few)


def smollm2(args: argparse.Namespace) -> Subject:
    """SmolLM2-135M, the next token after prompts that ask for a capital; the same prompts for both."""
    model, tokenizer = language.smollm2()
    handle = Handle(model.requires_grad_(False), tokenizer)
    prompts = [f"The capital of {country} is" for country in COUNTRIES.split()]
    asked = alike(handle, prompts, 16, 0)
    cut = 2 if args.quick else 8
    return Subject(handle, asked[:cut], [handle.encode(asked[cut : 2 * cut])], cut, nodes=2)


SUBJECTS: dict[str, Callable[[argparse.Namespace], Subject]] = {"demo": demo, "sst2": sst2, "smollm2": smollm2}
CASES = ("planted", *SUBJECTS)


def mib(args: argparse.Namespace, results: Results, case: str, clock: Clock) -> None:
    """CPR and CMD of one model."""
    subject = SUBJECTS[case](args)
    clock(f"{case}: model")
    means = mean_activations(subject.handle, [subject.handle.encode(subject.texts[:256])])
    measures, tables = {}, {}
    for ablation in ABLATIONS:
        own = Faithfulness(subject.handle, subject.batches, means if ablation == "mean" else None)
        measures[ablation], tables[ablation] = own, Table(f"{case}: {ablation}", unit="", digits=3)
        leads = {"whole": own.whole, "empty": own.empty}
        tables[ablation].add(
            "the model", leads, labels="none", note="mean lead of the answer, all neurons kept and none"
        )
    for seed in args.seeds:
        question = subject.question(seed)
        for name, localiser in subject.localisers().items():
            for draw in range(RANDOM) if name == "random" else (0,):
                values = scored(question, name, RANDOM * seed + draw if name == "random" else seed, args.cache)
                for ablation, own in measures.items():
                    found = measured(own, values, f"{case} {ablation}", args)
                    note = subject.note(name, localiser)
                    tables[ablation].add(name, _numbers(found), labels=localiser.labels, note=note)
            clock(f"{case} {seed}, {name}: CPR {found.cpr:.3f}, CMD {found.cmd:.3f} ({ablation})")
    for table in tables.values():
        table.write(results, args.seeds)
        table.show(("whole", "empty", "cpr", "cmd"))


def measured(measure: Faithfulness, values: Values, case: str, args: argparse.Namespace) -> Areas:
    """The curves of scores, taken from the cache where they were measured before."""

    def make() -> dict[str, Tensor]:
        found = measure.areas(values)
        return {"signed": torch.tensor(found.signed).double(), "sized": torch.tensor(found.sized).double()}

    scores = [files.fingerprint(value) for value in values.values()]
    got = kept(args.cache, "circuit-curves", _key(case, args.quick, measure.whole, measure.empty, scores), make)
    return areas(got["signed"].tolist(), got["sized"].tolist())


def _numbers(found: Areas) -> dict[str, float]:
    shares = {f"faithfulness at {100 * share:g} %": value for share, value in zip(FRACTIONS, found.signed, strict=True)}
    return {"cpr": found.cpr, "cmd": found.cmd} | shares


def every(args: argparse.Namespace, results: Results) -> None:
    """All cases, or those that are named."""
    clock = Clock()
    for case in args.cases:
        if case == "planted":
            planted(args, results)
        else:
            mib(args, results, case, clock)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; 2 for a wrong argument or file."""
    parser, parsers = command.parser(__doc__, {"all": every})
    parsers["all"].add_argument(
        "--cases", type=command.some_of(CASES), default=list(CASES), help=f"some of {','.join(CASES)}"
    )
    args = parser.parse_args(argv)
    return command.main("circuits", args, every)


if __name__ == "__main__":
    sys.exit(main())
