"""A small transformer with one shortcut pathway whose neurons are known, beside decoys that do nothing.

The residual stream of a BERT of random weights is cut into blocks. In the first the grammar's opinions are trained, on
rows whose phrase (`grammar.SHORTCUT`) goes with either label alike. In blocks of its own the shortcut is wired: the
embedding of the phrase's last word, planted neurons of the first layer, one attention head of the second, planted
neurons of the third and of the fourth layer, and one unit of the pooler, which adds to the lead of the phrase's label.
Each reads the block that the one before writes, and nothing else reads or writes these. So what the phrase adds to the
answer goes through the planted neurons of each of three layers, but for what the layer norms mix; they differ in
slope, and in what share of their layer's signal they write. GELU, softmax and tanh bend the way, as they do in any
model.

Every planted neuron has two decoys in its layer: the same weights that read (so the same activations), and columns of
the same norm that write, one the negative of the other, into a block that nothing reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from experiments.data import kept
from spurge.demo import grammar
from spurge.demo.grammar import Grammar
from spurge.engine.base import files
from spurge.engine.data.examples import Examples, Inputs, encode
from spurge.engine.models.handle import Handle
from spurge.engine.models.hooks import hook_before
from spurge.engine.models.neurons import NeuronSet

LAYERS, HEADS, BATCH = 4, 4, 32
LABEL = grammar.LABELS.index(grammar.SHORTCUT_LABEL)
LAYER, SITE = "bert.encoder.layer.{}", "bert.encoder.layer.{}.output.dense"
BLOCK = 4  # numbers of a block
BLOCKS = 6  # behind the opinions' own: the embeddings', four that are written on the way, the decoys'
DECOYS, END = 5, 4
PLANTED_LAYERS = {0: (0, 1), 2: (2, 3), 3: (3, 4)}  # of each, the block that is read and the one that is written
HEAD_LAYER, HEAD_BLOCKS = 1, (1, 2)
SIGNAL = 3.0  # how far a step moves the block that it writes, where the phrase stands
SCORE = 5.0  # of the head, for the phrase's last word beside the others
SQUASHED = 0.5  # what goes into the pooler's tanh


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes and training of the model.

    Attributes:
        rows: that opinions are trained on.
        epochs: of that.
        planted: neurons of each planted layer.
        width: neurons of a layer.
        hidden: numbers of the residual stream.
        lead: of the label that an opinion speaks for.
        effect: what the phrase adds to the lead of its label, about.
    """

    rows: int = 1600
    epochs: int = 3
    planted: int = 5
    width: int = 256
    hidden: int = 64
    lead: float = 3.0
    effect: float = 6.0

    def block(self, number: int) -> Tensor:
        """Which numbers of the residual stream are a block's."""
        start = self.hidden - (BLOCKS - number) * BLOCK
        return torch.arange(start, start + BLOCK)

    @property
    def opinions(self) -> Tensor:
        """Which numbers of the residual stream are the opinions'."""
        return torch.arange(self.hidden - BLOCKS * BLOCK)


@dataclass(frozen=True, eq=False)
class Planted:
    """A model with what is known of it.

    Attributes:
        train: rows of a training set in which the phrase goes with its label.
    """

    handle: Handle
    train: Examples
    planted: NeuronSet
    decoys: NeuronSet

    def of_layer(self, layer: int) -> NeuronSet:
        """Planted neurons of one layer."""
        site = SITE.format(layer)
        return NeuronSet({site: self.planted.indices(site)})


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the grammar."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    drawn = [row["text"] for row in Grammar(train=4000, share=0.0, unseen=0.0).training_rows(0)]
    words = sorted({word for text in (*drawn, grammar.SHORTCUT) for word in str(text).split()})
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def build(plan: Plan, seed: int, cache: Path | None = None) -> Planted:
    """The model of a seed: trained and wired, or as it was kept."""
    words, rows = tokenizer(), _rows(plan, 0.5, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForSequenceClassification(_config(plan, len(words))).eval()
        places = {layer: torch.randperm(plan.width)[: 3 * plan.planted] for layer in PLANTED_LAYERS}
    planted = {layer: own[: plan.planted] for layer, own in places.items()}
    decoys = {layer: own[plan.planted :] for layer, own in places.items()}

    def make() -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _train(model, encode(words, rows), rows.targets, plan, places)
            _Wiring(model, words, rows, plan).wire(planted, decoys)
        return model.state_dict()

    key = files.canonical_json([asdict(plan), seed, torch.__version__, rows.fingerprint(), SIGNAL, SCORE, SQUASHED])
    model.load_state_dict(kept(cache, "planted-circuit", key, make))
    sets = (NeuronSet({SITE.format(layer): own for layer, own in known.items()}) for known in (planted, decoys))
    return Planted(Handle(model, words), _rows(plan, 0.95, seed), *sets)


def _rows(plan: Plan, purity: float, seed: int) -> Examples:
    rows = Grammar(train=plan.rows, purity=purity, noise=0.0, noise_of_two=0.0, unseen=0.0).training_rows(seed)
    return Examples.load(rows, labels=grammar.LABELS)


def _config(plan: Plan, words: int) -> BertConfig:
    return BertConfig(
        vocab_size=words,
        hidden_size=plan.hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=plan.width,
        max_position_embeddings=48,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
        num_labels=2,
        id2label=dict(enumerate(grammar.LABELS)),
        label2id={label: i for i, label in enumerate(grammar.LABELS)},
    )


def _of_opinions(model: nn.Module, plan: Plan, wired: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """Which entries of each parameter the opinions may use; the others but the norms' start at 0.

    Args:
        wired: neurons of each layer that are not theirs.
    """
    mine = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in model.named_parameters()}
    first = plan.opinions

    def linear(name: str, rows: Tensor, columns: Tensor) -> None:
        mine[f"{name}.weight"][rows[:, None], columns] = True
        mine[f"{name}.bias"][rows] = True

    for table in ("word", "position"):
        mine[f"bert.embeddings.{table}_embeddings.weight"][:, first] = True
    for layer in range(LAYERS):
        place = LAYER.format(layer)
        heads = torch.arange(plan.hidden - (plan.hidden // HEADS if layer == HEAD_LAYER else 0))
        for part in ("query", "key", "value"):
            linear(f"{place}.attention.self.{part}", heads, first)
        linear(f"{place}.attention.output.dense", first, heads)
        theirs = torch.ones(plan.width, dtype=torch.bool)
        theirs[wired.get(layer, first[:0])] = False
        neurons = theirs.nonzero()[:, 0]
        linear(f"{place}.intermediate.dense", neurons, first)
        linear(f"{place}.output.dense", first, neurons)
    linear("bert.pooler.dense", first, first)
    linear("classifier", torch.arange(2), first)
    return mine


def _train(model: Any, inputs: Inputs, targets: Tensor, plan: Plan, wired: Mapping[int, Tensor]) -> None:
    """The opinions: the label leads by what the plan says. Adam on their entries alone; the norms stay as they are."""
    mine = {name: own for name, own in _of_opinions(model, plan, wired).items() if "LayerNorm" not in name}
    named = {name: weight for name, weight in model.named_parameters() if name in mine}
    for name, weight in named.items():
        weight.data *= mine[name]
    wanted = plan.lead * (2.0 * (targets == LABEL) - 1)
    optimizer = torch.optim.Adam(named.values(), lr=2e-3)
    steps = plan.epochs * -(-len(targets) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.2)
    for _ in range(plan.epochs):
        for at in torch.randperm(len(targets)).split(BATCH):
            logits = model(**{name: value[at] for name, value in inputs.items()}).logits
            loss = (logits[:, LABEL] - logits[:, 1 - LABEL] - wanted[at]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            for name, weight in named.items():
                if weight.grad is not None:
                    weight.grad *= mine[name]
            optimizer.step()
            schedule.step()
    model.zero_grad(set_to_none=True)


class _Wiring:
    """The shortcut's weights, step by step: each is measured on rows with the phrase before the next is set.

    All blocks are written and read along one direction whose numbers add up to 0: a layer norm's mean then cancels.
    """

    def __init__(self, model: Any, words: Any, rows: Examples, plan: Plan) -> None:
        self.model, self.plan = model, plan
        phrase = [i for i, row in enumerate(rows) if grammar.SHORTCUT in row.text][:BATCH]
        self.inputs = encode(words, rows.subset(phrase))
        self.word = words.convert_tokens_to_ids(grammar.SHORTCUT.split()[-1])
        self.along = torch.tensor([0.5, -0.5, 0.5, -0.5])

    @torch.no_grad()
    def wire(self, planted: Mapping[int, Tensor], decoys: Mapping[int, Tensor]) -> None:
        """From the embedding to the answer."""
        embeddings = self.model.get_input_embeddings().weight
        embeddings[self.word, self.plan.block(0)] = SIGNAL * self.along
        for layer in range(LAYERS):
            if layer == HEAD_LAYER:
                self._head()
            if layer in planted:
                self._neurons(layer, planted[layer])
        self._answer()
        for layer, own in decoys.items():
            self._decoys(layer, planted[layer], own)

    def _seen(self, module: str, layer: int) -> Tensor:
        """What goes into a module, a mean over rows: at the phrase's last word in the layers before the head's value
        is written, at the first token behind it.
        """
        caught: list[Tensor] = []
        with _watched(self.model.get_submodule(module), caught):
            self.model(**self.inputs)
        at_word = self.inputs["input_ids"] == self.word
        return (caught[0][at_word] if layer <= HEAD_LAYER else caught[0][:, 0]).mean(0)

    def _neurons(self, layer: int, own: Tensor) -> None:
        reads, writes = (self.plan.block(number) for number in PLANTED_LAYERS[layer])
        inner, outer = (
            self.model.get_submodule(f"{LAYER.format(layer)}.{part}.dense") for part in ("intermediate", "output")
        )
        signal = self._seen(f"{LAYER.format(layer)}.intermediate.dense", layer)[reads] @ self.along
        slopes = 2.0 + torch.rand(len(own))
        inner.weight[own[:, None], reads] = (slopes / signal)[:, None] * self.along
        inner.bias[own] = -1.0
        shares = 1.0 + torch.rand(len(own))
        active = self._seen(SITE.format(layer), layer)[own]
        outer.weight[writes[:, None], own] = self.along[:, None] * (SIGNAL * shares / shares.sum() / active)

    def _head(self) -> None:
        place = f"{LAYER.format(HEAD_LAYER)}.attention"
        reads, writes = (self.plan.block(number) for number in HEAD_BLOCKS)
        size = self.plan.hidden // HEADS
        first = self.plan.hidden - size  # of the last head
        query, key, value = (self.model.get_submodule(f"{place}.self.{part}") for part in ("query", "key", "value"))
        signal = self._seen(f"{place}.self.key", HEAD_LAYER)[reads] @ self.along
        query.bias[first] = SCORE * size**0.5 / signal
        key.weight[first, reads] = value.weight[first, reads] = self.along
        carried = self._seen(f"{place}.output.dense", HEAD_LAYER + 1)[first]
        self.model.get_submodule(f"{place}.output.dense").weight[writes, first] = self.along * SIGNAL / carried

    def _answer(self) -> None:
        reads = self.plan.block(END)
        signal = self._seen("bert.pooler", LAYERS)[reads] @ self.along
        self.model.bert.pooler.dense.weight[reads[0], reads] = self.along * SQUASHED / signal
        half = self.plan.effect / 2 / torch.tensor(SQUASHED).tanh()
        self.model.classifier.weight[LABEL, reads[0]], self.model.classifier.weight[1 - LABEL, reads[0]] = half, -half

    def _decoys(self, layer: int, planted: Tensor, decoys: Tensor) -> None:
        inner, outer = (
            self.model.get_submodule(f"{LAYER.format(layer)}.{part}.dense") for part in ("intermediate", "output")
        )
        into = self.plan.block(DECOYS)
        for neuron, pair in zip(planted, decoys.view(-1, 2), strict=True):
            inner.weight[pair], inner.bias[pair] = inner.weight[neuron].clone(), inner.bias[neuron].clone()
            direction = torch.randn(BLOCK)
            direction -= direction.mean()
            direction *= outer.weight[:, neuron].norm() / direction.norm()
            outer.weight[into[:, None], pair] = torch.stack([direction, -direction], 1)


@contextmanager
def _watched(module: nn.Module, caught: list[Tensor]) -> Iterator[None]:
    """Notes what a module is called with."""

    def note(module: nn.Module, args: tuple[Tensor, ...], kwargs: Any) -> None:
        caught.append(args[0])

    with hook_before(module, note):
        yield
