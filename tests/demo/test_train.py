"""The demo's fine-tuning: repeatable, silent, and without traces in the process."""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from spurge.demo import train
from spurge.demo.grammar import LABELS, Grammar
from spurge.engine.data.examples import Examples, Inputs

needs_model = pytest.mark.skipif(importlib.util.find_spec(train.PACKAGE) is None, reason="extra demo not installed")


def rows(n: int) -> Examples:
    return Examples.load(Grammar(train=n).training_rows(0), labels=LABELS)


@needs_model
def test_same_seed_same_weights_and_no_traces(capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.get_rng_state()
    model, tokenizer = train.fine_tune(rows(8), epochs=1, batch_size=4, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
    assert not model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert model.config.id2label == dict(enumerate(LABELS))
    again, _ = train.fine_tune(rows(8), epochs=1, batch_size=4, progress=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    other, _ = train.fine_tune(rows(8), epochs=1, batch_size=4, seed=1, progress=False)
    assert not torch.equal(model.classifier.weight, other.classifier.weight)
    assert tokenizer("near the old station")["input_ids"][1:-1]


@needs_model
def test_another_loss_sees_every_row_once_beside_rows_of_its_length() -> None:
    seen: list[Examples] = []

    def none_of_it(model: torch.nn.Module, inputs: Inputs, batch: Examples) -> torch.Tensor:
        seen.append(batch)
        assert inputs["input_ids"].shape[1] <= 6
        return 0 * train.cross_entropy(model, inputs, batch)

    how = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-9, "progress": False}
    train.fine_tune(rows(32), loss=none_of_it, max_length=6, pool=8, **how)
    assert sorted(row.text for batch in seen for row in batch) == sorted(row.text for row in rows(32))
    lengths = sorted((min(map(len, batch.texts)), max(map(len, batch.texts))) for batch in seen)
    assert all(longest <= shortest for (_, longest), (shortest, _) in pairwise(lengths))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs: need at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: need at least 1, got 0"),
        ({"seed": -1}, "seed: need at least 0, got -1"),
        ({"learning_rate": 0.0}, "learning_rate: must be above 0, got 0.0"),
        ({"pool": 0}, "pool: need at least 1, got 0"),
        ({"warmup": 1.5}, "warmup: must lie in 0 to 1, got 1.5"),
    ],
)
def test_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train.fine_tune(rows(4), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("found", [None, SimpleNamespace(submodule_search_locations=["/nowhere"])])
def test_a_missing_model_says_what_to_install(found: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(FileNotFoundError, match=r"pip install 'spurge\[demo\]'"):
        train.base_folder()
