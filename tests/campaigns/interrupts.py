"""Ctrl-C at random moments of every context and long call: model and process are as before, and the next call works."""

from __future__ import annotations

import argparse
import random
import signal
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from campaigns.contexts import Case, cases, same
from campaigns.strikes import Outcome, Striker
from helpers.states import differences, model_state, process_state
from helpers.tiny_models import tiny_tokenizer

TWICE = 0.2  # share of calls that are struck twice
MOST_MISSES = 50  # strikes in a row that come after the end


class Campaign:
    """Strikes at one case after another, and what was found wrong."""

    def __init__(self, seed: int) -> None:
        self.draw, self.striker = random.Random(seed), Striker()
        self.tokenizers = [tiny_tokenizer(), tiny_tokenizer(decoder=True)]
        self.wrong: list[str] = []

    def run(self, case: Case, count: int) -> Counter[str]:
        """Until ``count`` strikes have hit one case; how many hit, by phase."""
        wanted = case.call(lambda phase: None)
        spans = self.striker.durations(case.call)
        case.undo()
        before = [model_state(model) for model in case.models], process_state(self.tokenizers)
        found: Counter[str] = Counter()
        misses = 0
        while sum(found.values()) < count and misses < MOST_MISSES and not self.wrong:
            phase = self.draw.choice(list(spans))
            moment = max(1e-6, self.draw.random() * spans[phase] * 1.1)
            twice = self.draw.random() * 2e-4 + 1e-6 if self.draw.random() < TWICE else None
            said = f"{case.name}, {phase} at {moment * 1e6:.0f} us" + ("" if twice is None else ", twice")
            outcome = self._strike(case, phase, moment, twice, said)
            case.undo()
            misses = 0 if outcome.strikes else misses + 1
            found[phase] += bool(outcome.strikes)
            if outcome.ended and not same(wanted, outcome.answer):
                self.wrong.append(f"{said}: ended with another answer")
            self._compare(case, before, said)
            if self.wrong:
                break
            answer = case.call(lambda phase: None)
            case.undo()
            if not same(wanted, answer):
                self.wrong.append(f"{said}: the next call has another answer")
            self._compare(case, before, f"{said}, after the next call")
        return found

    def _strike(self, case: Case, phase: str, moment: float, twice: float | None, said: str) -> Outcome:
        try:
            return self.striker.strike(case.call, phase, moment, twice=twice)
        except Exception as error:
            self.wrong.append(f"{said}: raised {type(error).__name__}: {error}")
            traceback.print_exc()
            return self.striker.stopped()

    def _compare(self, case: Case, before: tuple[list[dict[str, Any]], dict[str, Any]], said: str) -> None:
        parts = [
            *zip(before[0], map(model_state, case.models), strict=True),
            (before[1], process_state(self.tokenizers)),
        ]
        for old, new in parts:
            self.wrong += [f"{said}: {difference}" for difference in differences(old, new)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="strikes in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    campaign = Campaign(options.seed)
    chosen = [case for case in cases() if options.only in case.name]
    signal.signal(signal.SIGINT, campaign.striker.handler)
    total = 0
    for number, case in enumerate(chosen):
        share = options.count * (number + 1) // len(chosen) - options.count * number // len(chosen)
        found = campaign.run(case, share)
        total += sum(found.values())
        print(f"{case.name}: {sum(found.values())} ({', '.join(f'{k} {v}' for k, v in found.items())})", flush=True)
        if campaign.wrong:  # what is not as it was cannot be told from what comes next
            break
    for line in campaign.wrong:
        print(line)
    print(f"interrupts: {total} strikes at {len(chosen)} cases, seed {options.seed}: {len(campaign.wrong)} differences")
    return 1 if campaign.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
