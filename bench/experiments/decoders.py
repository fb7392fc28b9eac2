"""Tables 9 and 10: MacU on a causal language model that classifies by label words, as it is and fine-tuned.

SmolLM2-135M-Instruct is asked by a prompt, its answer read from the logits of the label words. Fine-tuning trains its
last layers on a few hundred training texts by cross-entropy of the same logits. The paper's swarm costs 800 forward
passes a text, hours for a decoder on one core; ``macu-paper-small`` and ``macu-best-small`` search less, and the full
settings are methods, too.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from common import language
from experiments import command, models
from experiments.data import kept
from experiments.methods import Bench, labels_used
from experiments.outcomes import Record
from experiments.subjects import PRESETS, SECONDS, Subject
from experiments.tasks import TASKS
from spurge.demo import train
from spurge.engine.base import files
from spurge.engine.models.handle import Handle
from spurge.engine.models.verbalizers import Verbalizer
from spurge.methods.macu.macu import MacU
from spurge.methods.macu.search import Climb
from spurge.methods.macu.swarm import Swarm
from spurge.report.results import Results

PROMPTS = {
    "sa": Verbalizer({"negative": [" negative"], "positive": [" positive"]}, "Review: {text}\nSentiment:"),
    "nli": Verbalizer(
        {"entailment": [" yes"], "neutral": [" maybe"], "contradiction": [" no"]},
        "{text}\nQuestion: {pair} Yes, no or maybe?\nAnswer:",
    ),
}
ROWS, EPOCHS = 200, 1
LAYERS = 10  # of 30, the last ones: those that are trained
TRAINING: dict[str, Any] = {"batch_size": 8, "learning_rate": 5e-5, "warmup": 0.1}
PLAIN = "no edit"
MODELS = {"zero-shot": False, "fine-tuned": True}
"""Whether each is trained."""
SMALL = tuple(f"{preset}-small" for preset in PRESETS)
CONTROLS = ("zero", "random", "threshold")
DEFAULT = (
    PLAIN,
    *(f"{preset}{part}" for preset in SMALL for part in ("", *(f":{name}" for name in CONTROLS))),
    "deleted",
)
KNOWN = (*DEFAULT, *(f"{preset}{part}" for preset in PRESETS for part in ("", *(f":{name}" for name in CONTROLS))))
COMPARED = tuple((name.partition(":")[0], name) for name in KNOWN if ":" in name)


@dataclass(frozen=True, eq=False)
class Decoder(Subject):
    """A decoder at one seed, in the place of fine-tuned MiniLMs: whatever is asked for, it is this model.

    Attributes:
        trained: on the task's training texts, else as it is.
    """

    trained: bool

    def tuned(self, name: str, factor: float | None = None) -> models.Tuned:
        """The model by label words."""
        return self._own

    @cached_property
    def _own(self) -> models.Tuned:
        verbalizer = PROMPTS[self.task.name]
        model, tokenizer = verbalizer.wrap(*language.smollm2())
        if not self.trained:
            return models.Tuned(model.eval(), tokenizer, 0.0)
        inside = tuple(f"{site.name.partition('.mlp')[0]}." for site in Handle(model).sites[-LAYERS:])
        parameters = {name: one for name, one in model.named_parameters() if name.startswith(inside)}

        def tune() -> dict[str, Tensor]:
            start = time.process_time()
            model.requires_grad_(False)
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            how: dict[str, Any] = {"loss": train.cross_entropy, "max_length": self.task.max_length, "pool": 1}
            how |= {"epochs": self.task.epochs, "seed": self.seed, "progress": sys.stderr.isatty(), **TRAINING}
            train.optimize(model, tokenizer, self.rows, **how)
            model.requires_grad_(True)
            seconds = torch.tensor(time.process_time() - start, dtype=torch.float64)
            return {**{name: one.detach().clone() for name, one in parameters.items()}, SECONDS: seconds}

        key = [self.rows.fingerprint(), self.seed, self.task.epochs, self.task.max_length, TRAINING]
        state = dict(kept(self.cache, "smollm2", files.canonical_json([*key, torch.__version__]), tune))
        seconds = float(state.pop(SECONDS))
        model.load_state_dict(state, strict=False)
        return models.Tuned(model.eval(), tokenizer, seconds)

    def macu(self, preset: str) -> MacU:
        """The settings of a preset, or of its small form."""
        if preset not in SMALL:
            return super().macu(preset)
        how: dict[str, Any] = {"certify": 0, "audit": 0, "max_length": self.task.max_length, "seed": self.seed}
        quick = self.quick
        how |= {"progress": False, "texts": 16 if quick else 48, "batch_size": 16}
        if preset == "macu-best-small":
            climb = Climb(steps=2 if quick else 16, look=2 if quick else 4, seed=self.seed)
            return MacU.best(**how, edit_texts=16 if quick else 48, climb=climb)
        swarm = Swarm.paper(particles=3 if quick else 5, seed=self.seed)
        swarm = replace(swarm, iterations=2 if quick else 5)
        return MacU.paper(**how, edit_texts=4 if quick else 8, swarm=swarm)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--task", choices=list(PROMPTS), default="sa", help="sa: table 9; nli: table 10")
    parser.add_argument("--models", type=command.some_of(MODELS), default=list(MODELS), help="default: both")
    parser.add_argument("--methods", type=command.some_of(KNOWN), default=list(DEFAULT), help="default: the small ones")


def used(method: str) -> str:
    """Labels that a method used, beyond those of fine-tuning."""
    return labels_used(method.replace("-small", ""))


def run(args: argparse.Namespace, results: Results) -> None:
    """SmolLM2-135M by label words: MacU and its controls on the model as it is and on the fine-tuned one."""
    texts, rows = (8, 32) if args.quick else (args.texts, args.rows or ROWS)
    task = TASKS[args.task](args.data).cut(rows, 1 if args.quick else args.epochs or EPOCHS, texts)
    verbalizer = PROMPTS[args.task]
    size = {"rows": task.rows, "epochs": task.epochs, "max_length": task.max_length, "layers": LAYERS, **TRAINING}
    results.head["settings"] |= size | {"template": verbalizer.template, "words": dict(verbalizer.words)}
    with command.cache(args) as folder:
        asked = [verbalizer.words, verbalizer.template, LAYERS, TRAINING]
        place = folder / f"decoders-{files.fingerprint(files.canonical_json(asked))[:12]}"
        record = Record(place, "macu outcomes", task.outside)
        for model in args.models:
            make = partial(Decoder, task, cache=place / model, quick=args.quick, factors={}, trained=MODELS[model])
            subjects = lru_cache(maxsize=1)(lambda seed, make=make: make(seed=seed))
            bench = Bench(task, record, args.seeds, args.quick, plain=PLAIN, prefix=f"{model}: ", subjects=subjects)
            (place / model).mkdir(parents=True, exist_ok=True)
            for seed in args.seeds:
                for method in args.methods:
                    bench.part(method, seed)
                    record.write(results, PLAIN, used, also=COMPARED)
                    if args.json is not None:
                        results.write(args.json)
