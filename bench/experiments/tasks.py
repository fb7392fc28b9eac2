"""The two tasks of MacU's tables: what is trained on, what chooses, what is tested, which words ought to decide."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments import data
from spurge.engine.data.examples import Examples
from spurge.methods.golden.golden import GoldenTokens


@dataclass(frozen=True, eq=False)
class Task:
    """A task and the size that it is cut to.

    Attributes:
        name: of the table.
        train: texts to draw training texts from.
        dev: texts that choose.
        tests: by case.
        home: the case of the training texts' own domain.
        outside: the cases that a mean is taken of.
        golden: words by label.
        rows, epochs: of fine-tuning.
        max_length: tokens that a text is cut to, everywhere.
    """

    name: str
    train: Examples
    dev: Examples
    tests: dict[str, Examples]
    home: str
    outside: tuple[str, ...]
    golden: GoldenTokens
    rows: int
    epochs: int
    max_length: int

    def cut(self, rows: int | None, epochs: int | None, texts: int | None) -> Task:
        """With other numbers where they are given: of training texts, of epochs, of texts of each set at most."""
        how: dict[str, Any] = {"rows": rows or self.rows, "epochs": epochs or self.epochs}
        if texts is not None:
            how["tests"] = {case: part.sample(min(len(part), texts)) for case, part in self.tests.items()}
            how["dev"] = self.dev.sample(min(len(self.dev), texts))
        return replace(self, **how)


def sentiment(folder: Path) -> Task:
    """Table 6: sentences of SST-2; reviews of films, their human counterfactuals, of shops, of products outside."""
    train, dev = (data.sentiment(folder, "sst2_sentences", split) for split in ("train", "dev"))
    tests, golden = data.sentiment_tests(folder), data.sentiment_golden(folder)
    return Task("sa", train, dev, tests, "sst2", data.SENTIMENT_OUTSIDE, golden, rows=2000, epochs=2, max_length=64)


def inference(folder: Path) -> Task:
    """Table 7: SNLI; MultiNLI, human counterfactuals of SNLI and Breaking NLI outside."""
    train, dev = (data.inference(folder, "snli_subset", split) for split in ("train", "validation"))
    tests = {
        "snli": data.inference(folder, "snli_subset", "test"),
        "mnli": data.inference(folder, "mnli_subset", "validation"),
        "cad": data.inference(folder, "snli_cad", "test", part=("revised_premise", "revised_hypothesis")),
        "breaking": data.inference(folder, "breaking_nli", "test"),
    }
    golden, outside = data.inference_golden(folder), ("mnli", "cad", "breaking")
    return Task("nli", train, dev, tests, "snli", outside, golden, rows=5000, epochs=2, max_length=64)


TASKS = {"sa": sentiment, "nli": inference}
