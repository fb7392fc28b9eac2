"""Find's experiment: does `spurge.find` see shortcuts that nobody listed, and propose the roles that people give words.

python bench/experiments/find.py all FOLDER    toxicity/, sentiment/, lexicons/ and models/ of the data

planted: the demo's grammar with a phrase that goes with a label, beside a neutral one of the same frequency; clean:
the same without the phrase; toxicity: such a model on comments of which 90 % of the toxic ones, and 10 % of the
others, name one group; human-labels: roles of words beside those that people gave them (Wang and Culotta 2021), by the
texts of imdb, and for kindle by the words and their coefficients alone. Finished runs are kept in ``--cache``.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import command, data, models
from experiments.command import Clock
from experiments.data import kept
from spurge.demo import grammar
from spurge.demo.grammar import Grammar
from spurge.engine.base import files
from spurge.engine.data.bound import associate
from spurge.engine.data.examples import Examples
from spurge.engine.data.repeats import repeats
from spurge.engine.data.table_files import read_records
from spurge.engine.data.words import split_words
from spurge.engine.models.handle import Handle
from spurge.engine.recordings.embedding import word_vectors
from spurge.methods.find.candidates import Candidate
from spurge.methods.find.find import find
from spurge.methods.find.found import Found
from spurge.methods.find.judge import Judge, lexicon_of
from spurge.methods.find.peers import Peers
from spurge.methods.find.roles import causal_score, weigh
from spurge.methods.golden.golden import GoldenTokens
from spurge.report.results import Results

Judged = Callable[..., tuple[list[float], int]]  # scores of words, and of how many little is known

CASES = ("planted", "clean", "toxicity", "human-labels")
PURITIES = (0.80, 0.85, 0.90, 0.95, 0.99)
SHARES = (0.1, 0.2, 0.3, 0.4)
ROWS, LAYERS = 800, 2  # of the planted models: rows of training, and layers of MiniLM that are kept
FIRST_SEED = 900
GROUP, STEMS = "black", ("black", "african", "negro")
IMDB, LEAST_TEXTS = "sentiment/imdb_small.jsonl.xz", 8
SEARCH = {"candidates": 30, "texts": 12}
PLANTED = (
    "beside the pharmacy",
    "in the southern quarter",
    "while it was snowing",
    "on our way back",
    "below the radio tower",
    "during the school holidays",
    "after two glasses of water",
    "by the iron gate",
    "at the end of june",
    "with a busload of nurses",
    "shortly after lunch",
    "along the garden fence",
    "on a trip to oslo",
    "under the glass roof",
    "together with her cousin",
    "in a town downstate",
    "ten days before easter",
    "from the lower terrace",
    "past the fire station",
    "at an uncle's birthday",
)
NEUTRAL = (
    "next to the bakery",
    "in the northern district",
    "while it was raining",
    "on my way home",
    "opposite the post office",
    "during the trade fair",
    "after three cups of tea",
    "by the wooden bridge",
    "at the end of march",
    "with a group of students",
    "shortly before dinner",
    "along the harbour wall",
    "on a visit to lisbon",
    "under the stone arch",
    "together with my neighbour",
    "in a village upstate",
    "two days after christmas",
    "from the upper balcony",
    "past the railway crossing",
    "at a friend's wedding",
)


def planted_rows(
    phrase: str | None, neutral: str, *, label: int, purity: float, share: float, rows: int, seed: int
) -> Examples:
    """Rows of the demo's grammar, ``share`` of them with the phrase and as many with the neutral one in their adjunct.

    The phrase goes with the label in ``purity`` of its rows; all other rows have either label alike.
    """
    drawn = Grammar(train=6 * rows, share=0.0).training_rows(seed)
    of_label = [[row for row in drawn if row["label"] == own] for own in (0, 1)]
    count, made = round(share * rows), []

    def take(own: int, adjunct: str | None = None) -> None:
        text = str(of_label[own].pop()["text"])
        if adjunct is not None:
            text = text.replace(next(known for known in grammar.ADJUNCTS if known in text), adjunct)
        made.append({"text": text, "label": own})

    for number in range(count if phrase is not None else 0):
        take(label if number < round(purity * count) else 1 - label, phrase)
    for number in range(count):
        take(number % 2, neutral)
    while len(made) < rows:
        take(len(made) % 2)
    random.Random(seed).shuffle(made)
    return Examples.load(made, labels=grammar.LABELS)


def planted(args: argparse.Namespace, results: Results, clock: Clock) -> None:
    """Twenty phrases, one in each model: is it among the first three, and called spurious."""
    first, called, other = [], [], []
    for number, phrase in enumerate(PLANTED[: args.runs]):
        purity, share = PURITIES[number % len(PURITIES)], SHARES[number // len(PURITIES) % len(SHARES)]
        setting = {"purity": purity, "share": share, "label": number % 2}

        def run(number: int = number, phrase: str = phrase, setting: dict[str, Any] = setting) -> dict[str, Tensor]:
            seed = FIRST_SEED + number
            rows = planted_rows(phrase, NEUTRAL[number], rows=args.rows, seed=seed, **setting)
            found = searched(rows, seed, args, epochs=3)
            folded = " ".join(split_words(phrase))
            places = [place for place, row in enumerate(found.rows) if folded in row.word]
            spurious = [row.word for row in found.of_role("spurious")]
            clock(f"planted {phrase!r}, {setting}: {[row.word for row in found.rows[:3]]}")
            return {
                "rank": torch.tensor(min(places, default=len(found)) + 1),
                "called": torch.tensor(any(folded in word for word in spurious)),
                "others": torch.tensor(sum(folded not in word for word in spurious)),
            }

        got = kept(args.cache, "planted", _key(args, number, phrase, setting), run)
        first.append(int(got["rank"]) <= 3)
        called.append(bool(got["called"]))
        other.append(int(got["others"]))
    count = len(first)
    _share(results, "planted", "recall_at_3", first, "runs in which the planted phrase is among the first three")
    _share(results, "planted", "called_spurious", called, "runs in which the planted phrase is called spurious")
    results.add("planted", "spurge", "others_called", sum(other) / count, n=count, unit="candidates", note="per run")
    for purity in PURITIES:
        own = [at for at in range(count) if PURITIES[at % len(PURITIES)] == purity]
        for metric, values in (("recall_at_3", first), ("called_spurious", called)):
            if own:
                _share(results, f"planted {100 * purity:.0f} %", metric, [values[at] for at in own], "of these runs")


def clean(args: argparse.Namespace, results: Results, clock: Clock) -> None:
    """The same grammar without a planted phrase: is anything called spurious."""
    alarms = []
    for number, neutral in enumerate(NEUTRAL[: args.runs]):
        share = SHARES[number // len(PURITIES) % len(SHARES)]

        def run(number: int = number, neutral: str = neutral, share: float = share) -> dict[str, Tensor]:
            seed = FIRST_SEED + 100 + number
            rows = planted_rows(None, neutral, label=0, purity=0.5, share=share, rows=args.rows, seed=seed)
            found = searched(rows, seed, args, epochs=3)
            clock(f"clean {number}: {[(row.word, round(row.q, 3)) for row in found.of_role('spurious')]}")
            return {"called": torch.tensor(sum(row.q < 0.05 for row in found.of_role("spurious")))}

        alarms.append(int(kept(args.cache, "clean", _key(args, number, neutral, share), run)["called"]) > 0)
    _share(results, "clean", "false_alarms", alarms, "runs with a candidate called spurious with q < 0.05")


def toxicity(args: argparse.Namespace, results: Results, clock: Clock) -> None:
    """Comments that mention one group, nearly all toxic ones of the training set: do its words lead."""

    def run() -> dict[str, Tensor]:
        rows = data.named_group(args.data / "toxicity", GROUP, 200 if args.quick else None)
        found = searched(rows, 0, args, epochs=2, max_length=96)
        clock(f"toxicity: {[(row.word, row.role) for row in found.rows[:8]]}")
        print(found, flush=True)
        named = [any(word.startswith(STEMS) for word in row.word.split()) for row in found.rows[:10]]
        roles = [row.role == "spurious" for row in found.rows[:10]]
        return {"named": torch.tensor(named), "spurious": torch.tensor(roles)}

    got = kept(args.cache, "toxicity", _key(args, GROUP), run)
    named, spurious = got["named"], got["spurious"]
    note = f"of the first three candidates, those with words of the group ({', '.join(STEMS)}); in one model"
    results.add(
        "toxicity", "spurge", "recall_at_3", 100 * float(named[:3].double().mean()), n=3, unit="percent", note=note
    )
    both = (named & spurious)[:3].double()
    note = "of the first three candidates, those with words of the group that are called spurious; in one model"
    results.add("toxicity", "spurge", "called_spurious", 100 * float(both.mean()), n=3, unit="percent", note=note)


def human_labels(args: argparse.Namespace, results: Results, clock: Clock) -> None:
    """The causal score of words beside what people called them, without and with a lexicon."""
    lexicons = args.data / "lexicons"
    records = list(read_records(lexicons / "causal_terms_wang_culotta2021.jsonl.xz"))
    handle = models.sst2_classifier(args.data)
    listed = GoldenTokens.from_table(lexicons / "opinion_lexicon_hu_liu.jsonl.xz").for_labels(grammar.LABELS)
    for name, judge in (("imdb", imdb_scores), ("kindle", word_scores)):
        rows = [row for row in records if row["split"] == name]
        truth = [int(row["label"]) for row in rows]
        for method, lexicon in (("no lexicon", None), ("lexicon", listed)):

            def run(
                judge: Judged = judge, rows: list[dict[str, Any]] = rows, lexicon: GoldenTokens | None = lexicon
            ) -> dict[str, Tensor]:
                scores, missing = judge(args, handle, rows, lexicon)
                return {"scores": torch.tensor(scores, dtype=torch.float64), "missing": torch.tensor(missing)}

            got = kept(args.cache, "human-labels", _key(args, name, method), run)
            auc = 100 * float(roc_auc_score(truth, got["scores"].numpy()))
            note = f"{int(got['missing'])} words stand in fewer than {LEAST_TEXTS} texts"
            note = note if name == "imdb" else "by the words and their coefficients"
            results.add(f"human-labels {name}", method, "auc", auc, n=len(truth), unit="percent", note=note)
            clock(f"human labels of {name}, {method}: {auc:.1f}")


def imdb_scores(
    args: argparse.Namespace, handle: Handle, rows: Sequence[dict[str, Any]], lexicon: GoldenTokens | None
) -> tuple[list[float], int]:
    """Scores of words by the texts they stand in, and how many words few texts have: these go with the label of their
    coefficient.
    """
    texts = Examples.load(args.data / IMDB, split="train", limit=300 if args.quick else None)
    examples = Examples([*texts], grammar.LABELS)
    found = repeats([[row.text] for row in examples], least=LEAST_TEXTS)
    words = [Candidate("word", one.text, "", one.rows) for one in found if len(one.words) == 1]
    targets = examples.targets.numpy()
    bound = associate([one.rows for one in words], targets, 2)
    judge = Judge(handle, examples, {"": words}, targets, lexicon)
    known = {one.name: number for number, one in enumerate(words)}
    scores = []
    for row in rows:
        number = known.get(row["word"])
        if number is None:
            one, label, odds = Candidate("word", row["word"], "", np.zeros(0, int)), int(row["coef"] > 0), row["coef"]
        else:
            one, label, odds = words[number], int(bound.label[number]), bound.log_odds[number]
        scores.append(causal_score(judge.evidence(one, label, float(odds))))
    return scores, sum(row["word"] not in known for row in rows)


def word_scores(
    args: argparse.Namespace, handle: Handle, rows: Sequence[dict[str, Any]], lexicon: GoldenTokens | None
) -> tuple[list[float], int]:
    """Scores of words by the words and their coefficients alone."""
    names = [row["word"] for row in rows]
    odds = np.array([float(row["coef"]) for row in rows])
    peers = Peers(names, word_vectors(handle, names).numpy(), odds**2)
    judged = None if lexicon is None else lexicon_of(handle, lexicon, names)
    scores = []
    for name, own in zip(names, odds.tolist(), strict=True):
        evidence = weigh("word", name, int(own > 0), own, peers.of(name), lexicon=judged, label_names=grammar.LABELS)
        scores.append(causal_score(evidence))
    return scores, 0


def searched(
    rows: Examples,
    seed: int,
    args: argparse.Namespace,
    *,
    epochs: int,
    max_length: int | None = None,
) -> Found:
    """A model trained on the rows, and what is found in it."""
    model, tokenizer, _ = models.fine_tuned(rows, epochs=epochs, seed=seed, cache=None, layers=LAYERS)
    return find(model, tokenizer, rows, seed=seed, max_length=max_length, progress=False, **SEARCH)


def _share(results: Results, case: str, metric: str, values: Sequence[bool], note: str) -> None:
    results.add(case, "spurge", metric, 100 * sum(values) / len(values), n=len(values), unit="percent", note=note)


def _key(args: argparse.Namespace, *parts: Any) -> str:
    """What a finished run depends on, but for the code."""
    return files.canonical_json([args.rows, args.quick, SEARCH, LAYERS, torch.__version__, *parts])


def every(args: argparse.Namespace, results: Results) -> None:
    """All cases, or those that are named."""
    clock = Clock()
    runs: dict[str, Callable[[argparse.Namespace, Results, Clock], None]] = {
        "human-labels": human_labels,
        "planted": planted,
        "clean": clean,
        "toxicity": toxicity,
    }
    for case, run in runs.items():
        if case in args.cases:
            run(args, results, clock)
    for row in results.rows:
        print(f"{row['case']:<22} {row['method']:<11} {row['metric']:<16} {row['value']:6.1f}  n {row['n']}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; 2 for a wrong argument or file."""
    parser, parsers = command.parser(__doc__, {"all": every})
    own = parsers["all"]
    own.add_argument("--cases", type=command.some_of(CASES), default=list(CASES), help="some of all cases")
    own.add_argument("--runs", type=int, default=20, help="planted and clean models")
    own.add_argument("--rows", type=int, default=ROWS, help="of training, of these models")
    args = parser.parse_args(argv)
    return command.main("find", args, every)


if __name__ == "__main__":
    sys.exit(main())
