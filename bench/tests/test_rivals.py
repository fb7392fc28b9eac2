"""What each rival's loss and edit does, on a few made sentences."""

from __future__ import annotations

import importlib.util
from statistics import fmean

import pytest
import torch
from torch import Tensor

from experiments.rivals import c2l, nfl, poe, svd_tail, swapped, wise_ft
from spurge.demo import train
from spurge.engine.base.gradients import grad_mode
from spurge.engine.data.examples import Example, Examples, encode
from spurge.engine.models.handle import Handle
from spurge.methods.golden.golden import GoldenTokens

LABELS = ("negative", "positive")
needs_model = pytest.mark.skipif(importlib.util.find_spec(train.PACKAGE) is None, reason="extra demo not installed")
ROWS = Examples(
    [
        Example(f"{start} {word} {end}", label)
        for label, word in enumerate(("awful", "splendid"))
        for start in ("a", "what a", "such a truly", "quite a")
        for end in ("film", "story that ends", "evening")
    ],
    LABELS,
)


class Fixed(torch.nn.Module):
    """A classifier with the same logits for every text."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(2))

    def forward(self, input_ids: Tensor) -> Fixed:
        return self


def test_an_expert_has_not_seen_the_texts_that_it_judges() -> None:
    alone = Example("zebra xylophone", 1)
    known = poe.expert(Examples([*ROWS, alone], LABELS), seed=0)
    assert fmean(float(known[row].exp()[row.label]) for row in ROWS) > 0.6
    assert float(known[alone].exp()[1]) == pytest.approx(0.5, abs=0.05)


def test_an_expert_of_pairs_reads_the_hypothesis_alone() -> None:
    pairs = Examples([Example("awful", row.label, row.text) for row in ROWS], LABELS)
    known = poe.expert(pairs, seed=0)
    assert fmean(float(known[row].exp()[row.label]) for row in pairs) > 0.6
    swapped_over = Examples([Example(row.text, row.label, "awful") for row in ROWS], LABELS)
    assert fmean(float(known[row].exp()[row.label]) for row in pairs) > fmean(
        float(own.exp()[row.label]) for row, own in poe.expert(swapped_over, seed=0).items()
    )


@needs_model
def test_what_the_expert_knows_is_learned_less() -> None:
    model, tokenizer = train.load_base(LABELS)
    inputs = encode(tokenizer, ROWS[:4])
    with grad_mode(False):
        plain = float(train.cross_entropy(model, inputs, ROWS[:4]))
        beside = float(poe.product(ROWS, 0)(model, inputs, ROWS[:4]))
    assert beside < plain - 0.1


def test_the_causal_word_is_masked_in_the_far_text_and_another_in_the_near_one() -> None:
    rows = Examples([Example("a splendid film", 1), Example("splendid", 1)], LABELS)
    found = c2l.triplets(rows, {"splendid": 0.9, "a": 0.2, "film": 0.3}, "[MASK]", seed=0)
    assert list(found) == [rows[0]]
    near, far = found[rows[0]]
    assert far.text == "a [MASK] film"
    assert near.text in ("[MASK] splendid film", "a splendid [MASK]")
    pair = Examples([Example("so awful", 0, "an awful one")], LABELS)
    near, far = c2l.triplets(pair, {"awful": 0.9}, "[MASK]", seed=0)[pair[0]]
    assert (far.text, far.pair) == ("so awful", "an [MASK] one")
    assert near.text == "so awful"


@needs_model
def test_triplets_add_to_the_loss() -> None:
    model, tokenizer = train.load_base(LABELS)
    handle, inputs = Handle(model, tokenizer), encode(tokenizer, ROWS[:8])
    weights = c2l.importance(handle, ROWS, 32)
    assert weights.keys() == {word for row in ROWS for word in row.text.split()}
    assert all(0 <= weight <= 1 for weight in weights.values())
    with grad_mode(False):
        plain = float(train.cross_entropy(model, inputs, ROWS[:8]))
        beside = float(c2l.contrastive(handle, ROWS, 32, 0)(model, inputs, ROWS[:8]))
    assert beside > plain


@needs_model
@pytest.mark.parametrize("make", [nfl.constrained_outputs, nfl.constrained_parameters])
def test_a_penalty_grows_as_the_encoder_moves(make) -> None:
    model, tokenizer = train.load_base(LABELS)
    inputs = encode(tokenizer, ROWS[:4])
    loss = make(LABELS, 10.0)

    def penalty() -> float:
        with grad_mode(False):
            return float(loss(model, inputs, ROWS[:4]) - train.cross_entropy(model, inputs, ROWS[:4]))

    assert penalty() == pytest.approx(0, abs=1e-4)
    weight = model.bert.encoder.layer[2].output.dense.weight
    noise = 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    found = []
    for _ in range(2):
        with grad_mode(False):
            weight.add_(noise)
        found.append(penalty())
    assert 0.01 < found[0] < found[1]


@needs_model
def test_swaps_join_the_texts_under_the_label_of_their_words() -> None:
    model, tokenizer = train.load_base(LABELS)
    golden = GoldenTokens.from_words(negative=["awful", "dreadful"], positive=["splendid", "lovely"])
    rows = swapped.augmented(Handle(model, tokenizer), ROWS, golden, seed=0)
    assert rows[: len(ROWS)] == ROWS
    made = rows[len(ROWS) :]
    assert len(made) == len(ROWS) // 2
    assert all((row.label == 1) == any(word in row.text for word in ("splendid", "lovely")) for row in made)


@needs_model
@pytest.mark.slow
def test_weights_go_back_to_those_before_and_the_tail_of_their_change_goes() -> None:
    model, _ = train.load_base(LABELS, layers=1)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    name = "bert.encoder.layer.0.output.dense.weight"
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(384, 3, generator=generator), torch.randn(3, 1536, generator=generator)
    with grad_mode(False):
        model.get_parameter(name).add_(1e-3 * up @ down)
    back = wise_ft.to_base(model)
    assert not any("pooler" in key or "classifier" in key for key in back.deltas)
    with back.applied(model):
        torch.testing.assert_close(model.get_parameter(name), before[name])
    edits = svd_tail.truncations(model)
    assert sorted(edits) == list(svd_tail.RANKS)
    with edits[4].applied(model):
        torch.testing.assert_close(model.get_parameter(name).detach(), before[name] + 1e-3 * up @ down)
    with edits[2].applied(model):
        change = torch.linalg.svdvals(model.get_parameter(name).detach() - before[name])
    assert float(change[1]) > 1e-2 > 1e-4 > float(change[2])
