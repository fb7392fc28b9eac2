"""The demo from end to end: a shortcut is learned, located, cut and measured, with every control beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from spurge.demo import grammar
from spurge.demo.grammar import Grammar
from spurge.demo.train import base_folder, fine_tune
from spurge.engine.base import files
from spurge.engine.base.tables import wrapped
from spurge.engine.data.examples import Examples
from spurge.engine.edits.neuron_edits import NeuronEdit
from spurge.engine.evaluation.evaluation import evaluate
from spurge.engine.models.neurons import NeuronSet
from spurge.methods.golden.golden import GoldenTokens
from spurge.methods.macu.macu import MacU
from spurge.report import tables
from spurge.report.results import Results

CASES = ("broken", "kept", "neutral")
_CONTROLS = ("threshold", "zero-all", "random")
METHODS = ("none", "paper", *(f"paper {name}" for name in _CONTROLS), "best", *_CONTROLS)
#: The aim, in points of accuracy of broken rows, of kept rows, and of either with the gates on random neurons.
LEAST_BROKEN_GAIN, MOST_KEPT_LOSS, MOST_RANDOM_CHANGE = 15.0, 2.0, 3.0


@dataclass(frozen=True, kw_only=True)
class Demo:
    """The settings of a demo run.

    Attributes:
        grammar: the rows.
        epochs: of fine-tuning.
        draws: of random neurons for each edit.
        seed: of the rows, the training, both edits and the evaluation.
        progress: show progress bars.
    """

    grammar: Grammar = field(default_factory=Grammar)
    epochs: int = 3
    draws: int = 20
    seed: int = 0
    progress: bool = True

    def settings(self) -> dict[str, MacU]:
        """What is compared: the paper's literal procedure and the best setting."""
        common: dict[str, Any] = {"texts": 128, "certify": 0, "seed": self.seed, "progress": self.progress}
        return {
            "paper": MacU.paper(edit_texts=24, **common),
            # Half of the usual neurons: the model is small, and random ones must not move it much, or the comparison
            # with them says little.
            "best": MacU.best(cap=100, **common),
        }

    def run(self, out: Path, *, keep_model: bool = False) -> DemoResult:
        """Runs all of it and writes the data, the golden words, scores, edits and ``report.json`` to `out`.

        Raises:
            FileNotFoundError: the embedded model is not installed.
            OSError: `out` cannot be written.
        """
        base_folder()
        out.mkdir(parents=True, exist_ok=True)
        times: dict[str, float] = {}
        sets = self._sets()
        golden = GoldenTokens(grammar.LABELS, grammar.CAUSAL, grammar.IRRELEVANT, {"source": "the demo's grammar"})
        golden.save(out / "golden.json")
        for name, examples in sets.items():
            _write_rows(out / f"{name}.jsonl", examples)
        train = sets.pop("train")
        with _timed(times, "fine-tune"):
            model, tokenizer = fine_tune(train, epochs=self.epochs, seed=self.seed, progress=self.progress)
        if keep_model:
            _write_model(out / "model", model, tokenizer)
        edits, located_sets = {}, {}
        for name, macu in self.settings().items():
            with _timed(times, f"locate, {name}"):
                located = macu.locate(model, tokenizer, train, golden)
            located.save(out / f"{name}-located.safetensors")
            located_sets[name] = located.spurious_set
            with _timed(times, f"edit, {name}"):
                edit = macu.edit(model, tokenizer, train, located, golden)
            assert isinstance(edit, NeuronEdit)
            edits[name] = edit
            edits[name].save(out / f"{name}-edit.safetensors")
        with _timed(times, "evaluate"):
            rows = self._measure(model, tokenizer, sets, edits, located_sets)
        results = Results("demo", self._description(edits))
        results.extend(rows)
        for step, elapsed in times.items():
            results.add(step, "demo", "seconds", elapsed, unit="s", n=1, seed=self.seed)
        results.write(out / "report.json")
        return DemoResult(results, times, out)

    def _sets(self) -> dict[str, Examples]:
        rows = {"train": self.grammar.training_rows(self.seed)}
        rows |= {case: self.grammar.test_rows(case, self.seed) for case in CASES}
        return {name: Examples.load(part, labels=grammar.LABELS) for name, part in rows.items()}

    def _measure(
        self,
        model: nn.Module,
        tokenizer: Any,
        sets: dict[str, Examples],
        edits: dict[str, NeuronEdit],
        located: dict[str, NeuronSet],
    ) -> list[dict[str, Any]]:
        """Flat rows of both edits and their controls; those of the paper's edit are called ``paper zero-all``, ..."""
        measured: dict[tuple[str, str, str], dict[str, Any]] = {}
        for name, edit in edits.items():
            report = evaluate(
                model,
                tokenizer,
                sets,
                edit=edit,
                located=located[name],
                name=name,
                draws=self.draws,
                seed=self.seed,
                progress=self.progress,
            )
            for row in report.rows():
                if row["case"] in CASES:
                    method = row["method"]
                    if name == "paper" and method in _CONTROLS:
                        method = f"paper {method}"
                    measured[row["case"], method, row["metric"]] = {**row, "method": method}
        order = sorted(measured, key=lambda key: (CASES.index(key[0]), METHODS.index(key[1])))
        return [measured[key] for key in order]

    def _description(self, edits: dict[str, NeuronEdit]) -> dict[str, Any]:
        return {
            "shortcut": grammar.SHORTCUT,
            "shortcut_label": grammar.SHORTCUT_LABEL,
            "grammar": asdict(self.grammar),
            "epochs": self.epochs,
            "draws": self.draws,
            "seed": self.seed,
            "aim": {"broken_rise": LEAST_BROKEN_GAIN, "kept_loss": MOST_KEPT_LOSS, "random_move": MOST_RANDOM_CHANGE},
            "edits": {name: {"neurons": len(edit), **edit.info} for name, edit in edits.items()},
        }


@dataclass(frozen=True)
class DemoResult:
    """What a demo run ends with; prints as its table.

    Attributes:
        results: all numbers.
        times: seconds of each step.
        folder: where the files are.
    """

    results: Results
    times: dict[str, float]
    folder: Path

    def __str__(self) -> str:
        settings = self.results.head["settings"]
        rows, share, purity = (settings["grammar"][name] for name in ("test", "share", "purity"))
        paper, best = (settings["edits"][name] for name in ("paper", "best"))
        steps = ", ".join(f"{step} {tables.seconds(elapsed)}" for step, elapsed in self.times.items())
        text = f"""
The shortcut: {100 * share:.0f} % of the training rows hold {settings["shortcut"]!r}; \
{100 * purity:.0f} % of these are {settings["shortcut_label"]}.
Test sets of {rows} rows: broken (the phrase with the other label), kept (with its own), neutral (without it).

{tables.pivot(self.results.rows, methods=METHODS, cases=CASES)}

Second number: change against none. [...]: 95 % interval over rows. zero-all: all located spurious neurons erased.
threshold: no edit, but a constant added to the logits that answers each label as often as the edit.
random: {settings["draws"]} draws of other neurons with the edit's gates, as many in each layer; mean ± sd.

paper: {paper["erased"]} neurons erased, {paper["searched"]} given to the swarm. \
best: {best["neurons"]} neurons weakened by gradient.
{verdict(self.results.rows, "paper")}
{verdict(self.results.rows, "best")}

Time: {steps}; in all {tables.seconds(sum(self.times.values()))}.
Files: {self.folder}"""
        return wrapped(text, "")


def verdict(rows: Sequence[dict[str, Any]], name: str) -> str:
    """Whether the edit `name` meets the aim, in one sentence that says where it does not."""
    accuracy = {(row["case"], row["method"]): row["value"] for row in rows if row["metric"] == "accuracy"}
    before, after, random = "none", name, "random" if name == "best" else f"{name} random"
    broken_gain = accuracy["broken", after] - accuracy["broken", before]
    kept_gain = accuracy["kept", after] - accuracy["kept", before]
    random_change = max(abs(accuracy[case, random] - accuracy[case, before]) for case in ("broken", "kept"))
    shortfalls = []
    if broken_gain < LEAST_BROKEN_GAIN:
        shortfalls.append(
            f"broken rows change by {broken_gain:+.1f} points, the aim is +{LEAST_BROKEN_GAIN:.0f} or more"
        )
    if -kept_gain > MOST_KEPT_LOSS:
        shortfalls.append(f"kept rows lose {-kept_gain:.1f} points, the aim is at most {MOST_KEPT_LOSS:.0f}")
    if random_change >= MOST_RANDOM_CHANGE:
        shortfalls.append(
            f"random neurons move accuracy by {random_change:.1f} points, the aim is below {MOST_RANDOM_CHANGE:.0f}"
        )
    title = {"paper": "paper (the literal procedure)", "best": "best (counterfactual texts, gradient)"}[name]
    if shortfalls:
        return f"{title}: MISSES the aim: {'; '.join(shortfalls)}."
    changes = f"broken {broken_gain:+.1f}, kept {kept_gain:+.1f}, random neurons at most {random_change:.1f} points"
    return f"{title}: meets the aim: {changes}."


@contextmanager
def _timed(times: dict[str, float], step: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    times[step] = time.perf_counter() - start


def _write_model(folder: Path, model: Any, tokenizer: Any) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_rows(path: Path, examples: Examples) -> None:
    lines = [json.dumps({"text": row.text, "label": examples.labels[row.label]}) for row in examples]
    files.write_bytes(path, ("\n".join(lines) + "\n").encode())
