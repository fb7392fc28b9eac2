"""Four threads on one model, two Locators, a plain forward and an edit: every answer is of a state the model was in."""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import spurge
from helpers.states import differences, model_state, process_state
from helpers.tiny_models import tiny, tiny_inputs
from spurge.engine.base.gradients import grad_mode

FAMILIES = ("bert", "deberta_v2", "gpt2", "llama")
USES = ("applied", "apply", "fold")
LONGEST = 0.02  # seconds that a thread waits before it begins, and that an edit stays


def margin(rows: Any) -> Tensor:
    """A target that gradients and rows reach by other ways than the default one."""
    return rows.logits[:, 0] - rows.logits[:, 1]


class Subject:
    """A model, what is done with it, and what each thread may find in which state.

    Args:
        kind: ``"gates"``; ``"weight"``, one entry, which a forward reads whole or not at all; ``"weights"``, many.
    """

    def __init__(self, family: str, kind: str, use: str) -> None:
        self.name, self.kind, self.use = f"{family}, {kind}, {use}", kind, use
        self.model, self.inputs = tiny(family), tiny_inputs(family)
        self.locators = [spurge.Locator(self.model), spurge.Locator(self.model, margin, attention=True, nodes=3)]
        for locator in self.locators:
            locator(self.inputs)  # works its anatomy out
        self.edit = self._edit()
        self.plain = [self.forward()]
        self.located = [[self.locate(which)] for which in (0, 1)]
        with _Used(self.edit, self.use, self.model):
            self.plain.append(self.forward())
            for which in (0, 1):
                self.located[which].append(self.locate(which))
        self.edited = self.plain[-1]
        if kind == "gates":
            self.plain += self._with_parts()
        self.before = model_state(self.model), process_state()

    def _edit(self) -> Any:
        sites = spurge.find_sites(self.model)
        if self.kind == "gates":
            return spurge.NeuronEdit.build(self.model, spurge.NeuronSet({site.name: range(24) for site in sites}), -1.0)
        weight = f"{sites[0].name}.weight"
        count = 1 if self.kind == "weight" else 200
        return spurge.WeightEdit.build(self.model, {weight: (range(count), [9.0] * count)})

    def _with_parts(self) -> list[Tensor]:
        """What a plain forward gives under the gates of some sites alone: it may be under way as they come and go."""
        found = []
        for count in range(1, len(self.edit.gates)):
            for some in itertools.combinations(self.edit.gates, count):
                gates = {name: self.edit.gates[name] for name in some}
                part = spurge.NeuronEdit(gates, {name: self.edit.model[name] for name in some})
                with _Used(part, self.use, self.model):
                    found.append(self.forward())
        return found

    def forward(self) -> Tensor:
        with grad_mode(False):
            return self.model(**self.inputs).logits

    def locate(self, which: int) -> Tensor:
        found = self.locators[which](self.inputs)
        return torch.cat([found.full.flatten(), *(value.flatten() for value in found.values.values())])

    def edit_and_look(self, stay: float) -> Tensor:
        with _Used(self.edit, self.use, self.model):
            time.sleep(stay)
            return self.forward()


class _Used:
    """An edit in use, in any of its ways."""

    def __init__(self, edit: Any, use: str, model: nn.Module) -> None:
        self.edit, self.use, self.model = edit, use, model

    def __enter__(self) -> None:
        self.handle = getattr(self.edit, self.use)(self.model)
        if self.use == "applied":
            self.handle.__enter__()

    def __exit__(self, *error: object) -> None:
        if self.use == "applied":
            self.handle.__exit__()
        else:
            self.handle.undo()


def play(subject: Subject, delays: list[float]) -> tuple[list[Any], list[Exception]]:
    """The answers of the four threads, None where one raised, and what they raised.

    Args:
        delays: seconds that each waits, and that the edit stays.
    """
    jobs: list[Callable[[], Any]] = [
        partial(subject.locate, 0),
        partial(subject.locate, 1),
        subject.forward,
        partial(subject.edit_and_look, delays[-1]),
    ]
    answers: list[Any] = [None] * len(jobs)
    errors: list[Exception] = []
    start = threading.Barrier(len(jobs))

    def work(number: int) -> None:
        start.wait()
        time.sleep(delays[number])
        try:
            answers[number] = jobs[number]()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers, errors


def check(subject: Subject, answers: list[Any], errors: list[Exception], counts: Counter[str]) -> list[str]:
    """What is wrong; ``counts`` says what was seen."""
    wrong = [f"{type(error).__name__}: {error}" for error in errors]
    may = {
        "first": subject.located[0],
        "second": subject.located[1],
        "plain": subject.plain,
        "editor": [subject.edited],
    }
    for (who, allowed), answer in zip(may.items(), answers, strict=True):
        if answer is None:
            continue
        state = next((i for i, value in enumerate(allowed) if torch.equal(answer, value)), None)
        if state is None and who == "plain" and (subject.kind == "weights" or subject.use == "fold"):
            counts["plain, half-written"] += 1  # as documented; nothing says what it should be
        elif state is None:
            far = min(float((answer - value).abs().max()) for value in allowed)
            wrong.append(f"the answer of {who} is {far:g} from the nearest of {len(allowed)}")
        else:
            states = ("unedited", "edited", "some gates") if len(allowed) > 1 else ("edited",)
            counts[f"{who}, {states[min(state, 2)]}"] += 1
    wrong += differences(subject.before[0], model_state(subject.model))
    wrong += differences(subject.before[1], process_state())
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="rounds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    draw = random.Random(options.seed)
    kinds = [("gates", use) for use in USES] + [(kind, use) for kind in ("weight", "weights") for use in USES]
    subjects = [Subject(family, kind, use) for family in FAMILIES for kind, use in kinds]
    counts: Counter[str] = Counter()
    bad = 0
    for number in range(options.count):
        subject = draw.choice(subjects)
        sys.setswitchinterval(10 ** draw.uniform(-6, -3))
        delays = [draw.random() * LONGEST * draw.randrange(2) for _ in range(5)]
        wrong = check(subject, *play(subject, delays), counts)
        for line in wrong:
            print(f"round {number}, {subject.name}: {line}", flush=True)
        bad += bool(wrong)
        if wrong and differences(subject.before[0], model_state(subject.model)):
            break  # what comes after would be measured against another model
    for name, count in sorted(counts.items()):
        print(f"{name}: {count}")
    print(f"threads: {options.count} rounds, seed {options.seed}: {bad} with a wrong value or an error")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
