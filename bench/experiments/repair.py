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
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import provenance
from spurge.demo import grammar
from spurge.demo.grammar import Grammar
from spurge.demo.run import CASES
from spurge.demo.train import base_folder, fine_tune, load_base
from spurge.engine.base import files
from spurge.engine.base.statistics import resampled_sums
from spurge.engine.base.tensor_files import read_tensors, write_tensors
from spurge.engine.data.examples import Example, Examples
from spurge.engine.data.table_files import read_records
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.edits.parameter_edits import ParameterEdit
from spurge.engine.edits.weight_deltas import Dense, WeightDeltas
from spurge.engine.models.handle import Handle
from spurge.engine.models.hooks import frozen
from spurge.engine.models.sites import widths
from spurge.methods.golden.corpus_words import FUNCTION_WORDS
from spurge.methods.golden.golden import GoldenTokens
from spurge.methods.macu.macu import MacU
from spurge.methods.macu.repair import Repairer, spread_neurons
from spurge.methods.macu.swaps import SwapShares
from spurge.methods.macu.training import Repair
from spurge.report.results import Results

LABELS = ("negative", "positive")
OUTSIDE = ("imdb", "cad", "yelp", "cr")
METHODS = ("none", "repair", "no-swaps", "random", "last-layer", "gates", "wise-ft")
AGAIN = "two-threads"  # the first seed's repair, to be timed alone and held beside that on other threads
RESAMPLES = 2000
CHARACTERS = 4096  # of a batch: its activations then fit the caches, and long texts run twice as fast
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
            self.handle, self.train, self.dev, self.golden, settings, 0.25, settings.max_length, None, seed, False
        )

    def right(self, edit: Edit | None) -> dict[str, Tensor]:
        """Of each test set, which texts the model gets right with the edit, uint8 ``[N]``."""
        found = {}
        with nullcontext() if edit is None else edit.applied(self.model), frozen(self.model, gradients=False):
            for case, rows in self.tests.items():
                found[case] = torch.zeros(len(rows), dtype=torch.uint8)
                order = sorted(range(len(rows)), key=lambda i, rows=rows: len(rows[i].text))
                while order:
                    rows_at_once = max(1, min(32, CHARACTERS // max(1, len(rows[order[-1]].text))))
                    order, at = order[:-rows_at_once], order[-rows_at_once:]
                    logits = self.handle.logits(self.handle.encode([rows[i] for i in at]))
                    wanted = torch.tensor([rows[i].label for i in at])
                    found[case][torch.tensor(at)] = (logits.argmax(1) == wanted).to(torch.uint8)
        return found


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
    from transformers import AutoModel

    base = dict(
        AutoModel.from_pretrained(base_folder(), local_files_only=True, trust_remote_code=False).named_parameters()
    )
    own = {f"bert.{name}": weight for name, weight in base.items() if not name.startswith("pooler")}
    deltas = {
        name: Dense(own[name].detach() - weight.detach())
        for name, weight in subject.model.named_parameters()
        if name in own
    }
    edit = WeightDeltas.build(subject.model, deltas, {"method": "WiSE-FT"})
    return subject.repairer(seed).strength(edit, (0.05, 0.1, 0.2, 0.3, 0.4, 0.5))


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
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    place = folder / "models" / "minilm-l6-sst2"
    model = AutoModelForSequenceClassification.from_pretrained(place, trust_remote_code=False).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    train, dev = (_rows(folder, "sst2_sentences", split) for split in ("train", "dev"))
    return Subject("", model, tokenizer, train, dev, tests, golden, cache)


def imdb(folder: Path, tests: dict[str, Examples], golden: GoldenTokens, cache: Path, quick: bool) -> Subject:
    """MiniLM fine-tuned here on the beginnings of reviews; its home is IMDB, and SST-2 lies outside."""
    rows = _rows(folder, "imdb_small", "train").sample(200 if quick else 2500)
    rows = Examples([replace(row, text=_beginning(row.text, 100)) for row in rows], LABELS)
    dev, train = rows[: len(rows) // 5], rows[len(rows) // 5 :]
    model, tokenizer = _tuned(train, 1, cache / "imdb")
    return Subject("imdb-model:", model, tokenizer, train, dev, tests, golden, cache)


def demo(cache: Path, quick: bool) -> Subject:
    """The demo's model with its planted shortcut, to be repaired by swaps of neutral phrases alone."""
    rows = Grammar(train=200, test=40) if quick else Grammar()
    sets = {"train": rows.training_rows(0)} | {case: rows.test_rows(case, 0) for case in CASES}
    tests = {name: Examples.load(part, labels=grammar.LABELS) for name, part in sets.items()}
    train = tests.pop("train")
    model, tokenizer = _tuned(train, 3, cache / "demo")
    golden = GoldenTokens(grammar.LABELS, grammar.CAUSAL, grammar.IRRELEVANT)
    # Its dev texts hold the shortcut, too: whoever does not lean on it must lose accuracy there.
    neutral = SwapShares(flip=0, random=0, same=0, negation=0, template=0)
    settings = Repair(shares=neutral, steps=40, rate=1e-4, loss=10.0)
    cut = len(train) // 5
    return Subject("demo:", model, tokenizer, train[cut:], train[:cut], tests, golden, cache, settings)


def _tuned(train: Examples, epochs: int, path: Path) -> tuple[Any, Any]:
    """MiniLM fine-tuned on texts, or what was kept of that."""
    mark = files.fingerprint(files.canonical_json([train.fingerprint(), epochs, torch.__version__]))[:16]
    path = path.with_name(f"{path.name}-{mark}.safetensors")
    if not path.exists():
        write_tensors(path, fine_tune(train, epochs=epochs)[0].state_dict(), {"kind": "network"})
    model, tokenizer = load_base(train.labels)
    model.load_state_dict(read_tensors(path, "network").tensors)
    return model.eval(), tokenizer


def _beginning(text: str, words: int) -> str:
    return " ".join(text.split()[:words])


def _rows(folder: Path, name: str, split: str | None = None) -> Examples:
    rows = read_records(folder / "sentiment" / f"{name}.jsonl.xz")
    kept = [row for row in rows if row["text"].strip() and split in (None, row["split"])]
    return Examples([Example(row["text"], int(row["label"])) for row in kept], LABELS)


def read_tests(folder: Path, quick: bool) -> dict[str, Examples]:
    """The five test sets by case; of the two large ones, 1,000 texts drawn once."""
    tests = {
        "sst2": _rows(folder, "sst2_sentences", "test"),
        "imdb": _rows(folder, "imdb_cad_original", "test"),
        "cad": _rows(folder, "imdb_cad_revised", "test"),
        "yelp": _rows(folder, "yelp_small", "test").sample(1000),
        "cr": _rows(folder, "cr_customer_reviews").sample(1000),
    }
    return {case: rows.sample(min(len(rows), 40)) for case, rows in tests.items()} if quick else tests


def read_golden(folder: Path) -> GoldenTokens:
    """The opinion lexicon of Hu and Liu, words of both labels left out, and Spurge's function words."""
    lexicon = GoldenTokens.from_table(folder / "lexicons" / "opinion_lexicon_hu_liu.jsonl.xz", labels=LABELS)
    return lexicon.with_irrelevant(FUNCTION_WORDS)


class Record:
    """Which test texts each method gets right, kept in a folder, and the rows of results that follow."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.found: dict[tuple[str, str], dict[int, dict[str, Tensor]]] = {}
        self.facts: dict[tuple[str, str, int], dict[str, Any]] = {}

    def measure(self, subject: Subject, method: str, seed: int, key: str) -> None:
        """Takes a part from the folder, or measures and keeps it."""
        name = files.fingerprint(files.canonical_json([subject.prefix, method, seed, key]))[:16]
        path = self.cache / f"{subject.prefix.strip(':')}{method}-{seed}-{name}.safetensors"
        if path.exists():
            tensors, texts = read_tensors(path, "repair outcomes")
            right, facts = dict(tensors), files.parse_json(texts["facts"])
        else:
            start, alone = time.process_time(), time.perf_counter()
            edit = None if method == "none" else MAKERS[method](subject, seed)
            facts = {"cpu_seconds": time.process_time() - start}
            facts |= {"seconds": time.perf_counter() - alone} if method == AGAIN else {}
            if edit is not None:
                facts |= {name: edit.info[name] for name in ("alpha", "home", "swapped") if name in edit.info}
                facts |= {"l2": edit.info["last_layer"]["l2"]} if "last_layer" in edit.info else {}
            right = subject.right(edit)
            write_tensors(path, right, {"kind": "repair outcomes", "facts": files.canonical_json(facts)})
        self.found.setdefault((subject.prefix, method), {})[seed] = right
        self.facts[subject.prefix, method, seed] = facts
        outside = {case: 100 * float(part.double().mean()) for case, part in right.items()}
        print(
            f"{subject.prefix}{method} {seed}",
            *(f"{case} {value:.1f}" for case, value in outside.items()),
            facts,
            flush=True,
        )

    def write(self, head: Results, path: Path | None) -> None:
        """All rows so far: accuracies by seed, and gains over the unedited model with paired intervals."""
        head.rows.clear()
        for (prefix, method), seeds in self.found.items():
            for seed, right in seeds.items():
                for case, value in _accuracies(right).items():
                    head.add(f"{prefix}{case}", method, "accuracy", value, unit="percent", seed=seed, labels="class")
                for name, value in self.facts[prefix, method, seed].items():
                    unit = "s" if name.endswith("seconds") else ""
                    head.add(f"{prefix}all", method, name, value, seed=seed, unit=unit)
                if method == AGAIN and (other := self.found.get((prefix, "repair"), {}).get(seed)):
                    same = 100 * float(torch.cat([right[case] == other[case] for case in right]).double().mean())
                    note = "test texts on which it answers as the repair on the other number of threads does"
                    head.add(f"{prefix}all", method, "agreement", same, seed=seed, unit="percent", note=note)
            if method != "none" and (prefix, "none") in self.found:
                for case, (gain, low, high, texts) in _gains(seeds, self.found[prefix, "none"][0]).items():
                    note = f"paired bootstrap over texts, seeds {', '.join(map(str, seeds))} averaged"
                    for name, value in (("gain", gain), ("gain_low", low), ("gain_high", high)):
                        head.add(f"{prefix}{case}", method, name, value, n=texts, unit="points", note=note)
        if path is not None:
            head.write(path)


def _accuracies(right: dict[str, Tensor]) -> dict[str, float]:
    found = {case: 100 * float(part.double().mean()) for case, part in right.items()}
    return found | ({"mean-ood": fmean(found[case] for case in OUTSIDE)} if {*OUTSIDE} <= found.keys() else {})


def _gains(
    seeds: dict[int, dict[str, Tensor]], before: dict[str, Tensor]
) -> dict[str, tuple[float, float, float, int]]:
    """Mean over seeds minus the unedited model: gain, ends of the 95 % interval over texts, texts."""
    draws, generator = {}, np.random.default_rng(0)
    for case, plain in before.items():
        each = torch.stack([right[case].double() for right in seeds.values()]).mean(0) - plain.double()
        sums = resampled_sums(100 * each.numpy()[:, None], RESAMPLES, generator)[:, 0]
        draws[case] = (sums / len(each), len(each))
    if {*OUTSIDE} <= before.keys():
        mean = np.mean([draws[case][0] for case in OUTSIDE], axis=0)
        draws["mean-ood"] = (mean, sum(draws[case][1] for case in OUTSIDE))
    return {
        case: (float(values[0]), *map(float, np.quantile(values[1:], (0.025, 0.975))), count)
        for case, (values, count) in draws.items()
    }


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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the experiment; 2 for a wrong argument or file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the data sets")
    parser.add_argument("--json", type=Path, help="write the results here, again after each part")
    parser.add_argument("--cache", type=Path, required=True, help="folder for what is finished")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="%(default)s")
    parser.add_argument("--methods", default=",".join(METHODS), help="%(default)s")
    parser.add_argument("--models", default="sst2,demo,imdb", help="%(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
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
    tests, golden, record = read_tests(args.data, args.quick), read_golden(args.data), Record(args.cache)
    for name in args.models.split(","):
        if name == "sst2":
            subject = sst2(args.data, tests, golden, args.cache)
        elif name == "imdb":
            subject = imdb(args.data, tests, golden, args.cache, args.quick)
        else:
            subject = demo(args.cache, args.quick)
        if args.quick:
            subject = replace(subject, train=subject.train.sample(min(300, len(subject.train))), dev=subject.dev[:60])
        for method, seed in schedule(args.methods.split(","), [int(seed) for seed in args.seeds.split(",")]):
            record.measure(subject, method, seed, f"{files.spurge_version()} {args.quick}")
            record.write(results, args.json)


if __name__ == "__main__":
    sys.exit(main())
