"""Repairs of a sentiment classifier, measured at home and on four sets that it has not seen, beside their controls.

python bench/experiments/repair.py FOLDER --json FILE --cache FOLDER

FOLDER holds `sentiment`, `lexicons` and `models/minilm-l6-sst2`. Every setting is chosen on the dev sentences of SST-2
and on swaps of them. A seed draws the texts, the swaps and the neurons; what is finished is kept in the cache, and the
results are written after each part, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import provenance
from experiments import command, data
from experiments.models import fine_tuned, sst2_classifier
from experiments.outcomes import Part, Record, chosen, logits, right
from experiments.rivals import wise_ft
from spurge.demo.grammar import Grammar
from spurge.engine.base import files
from spurge.engine.data.examples import Examples
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.edits.parameter_edits import ParameterEdit
from spurge.engine.models.handle import Handle
from spurge.engine.models.sites import widths
from spurge.methods.golden.golden import GoldenTokens
from spurge.methods.macu.macu import MacU
from spurge.methods.macu.repair import Repairer, spread_neurons
from spurge.methods.macu.swaps import SwapShares
from spurge.methods.macu.training import Repair
from spurge.report.results import Results

MODELS = ("sst2", "demo", "imdb")
METHODS = ("none", "repair", "no-swaps", "random", "last-layer", "gates", "wise-ft")
AGAIN = "two-threads"  # the first seed's repair, to be timed alone and held beside that on other threads
NEURONS = 512
Edit = NeuronEdit | ParameterEdit


@dataclass(frozen=True, eq=False)
class Subject:
    """A model with its home: training, dev and test texts."""

    prefix: str
    model: Any
    tokenizer: Any
    train: Examples
    dev: Examples
    tests: dict[str, Examples]
    golden: GoldenTokens
    cache: Path
    settings: Repair = field(default_factory=lambda: Repair(last_layer=True))

    def macu(self, seed: int, **settings: Any) -> MacU:
        """A repair with the settings of all of them."""
        how: dict[str, Any] = {"objective": "counterfactual", "search": "weights", "seed": seed, "progress": False}
        return MacU(**how | settings)

    def trained(self, seed: int, **settings: Any) -> Edit:
        """What a repair gives."""
        macu = self.macu(seed, **settings)
        name = files.fingerprint(files.canonical_json([self.prefix, seed, asdict(macu)]))[:16]
        state = self.cache / f"state-{name}.safetensors"
        edit = macu.edit(self.model, self.tokenizer, self.train, None, self.golden, dev=self.dev, resume=state)
        state.unlink()
        return edit

    @cached_property
    def handle(self) -> Handle:
        return Handle(self.model, self.tokenizer)

    def repairer(self, seed: int) -> Repairer:
        """What a repair of this seed chooses by."""
        settings = self.settings
        return Repairer(
            self.handle,
            self.train,
            self.dev,
            self.golden,
            settings,
            held_out=0.25,
            max_length=settings.max_length,
            memory=None,
            seed=seed,
            progress=False,
        )

    def right(self, edit: Edit | None) -> dict[str, Tensor]:
        """Of each test set, which texts the model gets right with the edit, uint8 ``[N]``."""
        with nullcontext() if edit is None else edit.applied(self.model):
            return {case: right(rows, logits(self.handle, rows)) for case, rows in self.tests.items()}

    def part(self, method: str, seed: int) -> Part:
        """What a method gives, and what it took."""
        start, alone = time.process_time(), time.perf_counter()
        edit = None if method == "none" else MAKERS[method](self, seed)
        facts: dict[str, Any] = {"cpu_seconds": time.process_time() - start}
        facts |= {"seconds": time.perf_counter() - alone} if method == AGAIN else {}
        if edit is None or "swapped" not in edit.info:
            with nullcontext() if edit is None else edit.applied(self.model):
                tried = self.repairer(seed).judged()
            facts |= {"home": tried.home, "swapped": tried.swapped}
        if edit is not None:
            facts |= chosen(edit.info)
            facts |= {"l2": edit.info["last_layer"]["l2"]} if "last_layer" in edit.info else {}
        return Part(self.right(edit), facts)


def repair(subject: Subject, seed: int) -> Edit:
    """The recipe: all weights but the embeddings, and a refitted last layer where dev prefers it."""
    return subject.trained(seed, repair=subject.settings)


def on_two_threads(subject: Subject, seed: int) -> Edit:
    """The repair on two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        return repair(subject, seed)
    finally:
        torch.set_num_threads(threads)


def without_swaps(subject: Subject, seed: int) -> Edit:
    """The same training on its texts alone."""
    return subject.trained(seed, repair=replace(subject.settings, shares=None))


def random_neurons(subject: Subject, seed: int) -> Edit:
    """The same training of what random neurons read and write."""
    neurons = spread_neurons(widths(subject.handle.sites), NEURONS, seed)
    return subject.repairer(seed).edit("neurons", neurons, None, {"method": "random"})


def last_layer(subject: Subject, seed: int) -> Edit:
    """The last layer alone, refitted on the texts and swaps of the repair."""
    return subject.repairer(seed).last_layer()


def gates(subject: Subject, seed: int) -> Edit:
    """Located neurons, gates by gradient: `MacU.best`."""
    macu = MacU.best(seed=seed, certify=0, progress=False)
    located = macu.locate(subject.model, subject.tokenizer, subject.train, subject.golden)
    return macu.edit(subject.model, subject.tokenizer, subject.train, located, subject.golden)


def interpolation(subject: Subject, seed: int) -> Edit:
    """The encoder's weights part of the way back to those before fine-tuning (WiSE-FT), by the rule of the repair."""
    return subject.repairer(seed).strength(wise_ft.to_base(subject.model), wise_ft.SHARES)


MAKERS: dict[str, Callable[[Subject, int], Edit]] = {
    "repair": repair,
    AGAIN: on_two_threads,
    "last-layer": last_layer,
    "no-swaps": without_swaps,
    "wise-ft": interpolation,
    "random": random_neurons,
    "gates": gates,
}
FIRST = ("none", "repair")
ONCE = ("none", AGAIN, "wise-ft")  # "none" and "wise-ft": the same for every seed but the swaps of dev that choose


def sst2(folder: Path, tests: dict[str, Examples], golden: GoldenTokens, cache: Path) -> Subject:
    """MiniLM as it was fine-tuned on SST-2."""
    handle = sst2_classifier(folder)
    train, dev = (data.sentiment(folder, "sst2_sentences", split) for split in ("train", "dev"))
    return Subject("", handle.model, handle.tokenizer, train, dev, tests, golden, cache)


def imdb(folder: Path, tests: dict[str, Examples], golden: GoldenTokens, cache: Path, quick: bool) -> Subject:
    """MiniLM fine-tuned here on the beginnings of reviews; its home is IMDB, and SST-2 lies outside."""
    rows = data.beginnings(data.sentiment(folder, "imdb_small", "train").sample(200 if quick else 2500), 100)
    dev, train = rows[: len(rows) // 5], rows[len(rows) // 5 :]
    model, tokenizer, _ = fine_tuned(train, epochs=1, seed=0, cache=cache)
    return Subject("imdb-model:", model, tokenizer, train, dev, tests, golden, cache)


def demo(cache: Path, quick: bool) -> Subject:
    """The demo's model with its planted shortcut, to be repaired by swaps of neutral phrases alone."""
    tests = data.of_grammar(Grammar(train=200, test=40) if quick else Grammar())
    train = tests.pop("train")
    model, tokenizer, _ = fine_tuned(train, epochs=3, seed=0, cache=cache)
    # Its dev texts hold the shortcut, too: whoever does not lean on it must lose accuracy there.
    neutral = SwapShares(flip=0, random=0, same=0, negation=0, template=0)
    settings = Repair(shares=neutral, steps=40, rate=1e-4, loss=10.0)
    cut = len(train) // 5
    golden = data.GRAMMAR_GOLDEN
    return Subject("demo:", model, tokenizer, train[cut:], train[:cut], tests, golden, cache, settings)


def schedule(methods: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
    """Methods and seeds in the order in which they matter.

    Two seeds of the repair, one of each control, the other seeds of the repair, then seed by seed of the controls.
    """
    pairs = [(method, seed) for method in methods for seed in (seeds[:1] if method in ONCE else seeds)]

    def place(pair: tuple[str, int]) -> tuple[int, int]:
        method, seed = pair[0], seeds.index(pair[1])
        if method in FIRST:
            return (0 if seed < 2 else 2), seed
        return (1 if seed == 0 else 3), seed

    return sorted(pairs, key=place)


def add_agreement(results: Results, record: Record) -> None:
    """On how many test texts a repair on two threads answers as that on the other number of threads."""
    for (prefix, method), seeds in record.parts.items():
        repairs = record.parts.get((prefix, "repair"), {}) if method == AGAIN else {}
        for seed in repairs.keys() & seeds.keys():
            one, other = seeds[seed].right, repairs[seed].right
            same = 100 * float(torch.cat([one[case] == other[case] for case in one]).double().mean())
            note = "test texts on which it answers as the repair on the other number of threads does"
            results.add(f"{prefix}all", method, "agreement", same, seed=seed, unit="percent", note=note)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment; 2 for a wrong argument or file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the data sets")
    parser.add_argument("--json", type=Path, help="write the results here, again after each part")
    parser.add_argument("--cache", type=Path, required=True, help="folder for what is finished")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="%(default)s")
    parser.add_argument(
        "--methods", type=command.some_of(("none", *MAKERS)), default=",".join(METHODS), help="%(default)s"
    )
    parser.add_argument("--models", type=command.some_of(MODELS), default=",".join(MODELS), help="%(default)s")
    parser.add_argument("--threads", type=command.positive, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="a few texts and steps: to see that it runs")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    asked = {key: value for key, value in vars(args).items() if key not in ("data", "json", "cache")}
    results = Results("repair", asked)
    if args.json is not None and (warning := provenance.warning(results.head["commit"])):
        print(f"repair: {warning}", file=sys.stderr)
    try:
        args.cache.mkdir(parents=True, exist_ok=True)
        _run(args, results)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"repair: {error}", file=sys.stderr)
        return 2
    return 0


def _run(args: argparse.Namespace, results: Results) -> None:
    tests = data.sentiment_tests(args.data, 40 if args.quick else None)
    golden = data.sentiment_golden(args.data)
    record = Record(args.cache, "repair outcomes", data.SENTIMENT_OUTSIDE)
    for name in args.models:
        if name == "sst2":
            subject = sst2(args.data, tests, golden, args.cache)
        elif name == "imdb":
            subject = imdb(args.data, tests, golden, args.cache, args.quick)
        else:
            subject = demo(args.cache, args.quick)
        if args.quick:
            subject = replace(subject, train=subject.train.sample(min(300, len(subject.train))), dev=subject.dev[:60])
        for method, seed in schedule(args.methods, [int(seed) for seed in args.seeds.split(",")]):
            key = f"{files.spurge_version()} {args.quick}"
            record.measure(subject.prefix, method, seed, key, partial(subject.part, method, seed))
            record.write(results, "none", lambda method: "class", base_once=True)
            add_agreement(results, record)
            if args.json is not None:
                results.write(args.json)


if __name__ == "__main__":
    sys.exit(main())
