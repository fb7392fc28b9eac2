"""Classification by a causal language model: a label is what the model says next, by the label's words."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from spurge.engine.base.checks import choice
from spurge.engine.base.files import PathLike, reading_json, write_json
from spurge.engine.models.projections import features
from spurge.engine.models.prompt_template import Prompted, split_template
from spurge.engine.models.readout import Readout, is_decoder, language_head, last_real_token
from spurge.engine.models.sites import known_sites

Pool = Literal["sum", "mean"]

KIND, SCHEMA = "verbalizer", 1
_KEYS = {"kind", "schema", "words", "template", "pool"}


@dataclass(frozen=True)
class Verbalizer:
    r"""Label words, and the prompt that asks for them; never changes.

    A label's logit is made of its words' next-token logits:

    .. math:: z_y = \log \sum_{w \in W_y} e^{l_w} \;\; (\text{or} \tfrac{1}{|W_y|} \sum_{w \in W_y} l_w)

    so that with ``"sum"`` the softmax over labels is the probability mass of their words, scaled to sum 1.

    Attributes:
        words: label to its words, in the order of the labels. A word stands for its first token and is tokenized as
            written: after a template that ends in ``It was``, GPT-2 says ``" great"``, with the blank. Words of one
            label that begin with the same token count once.
        template: the prompt, with ``{text}``, and with ``{pair}`` where texts come in pairs.
        pool: ``"sum"`` or ``"mean"``.

    Raises:
        TypeError: a label, a word or a template that is no str.
        ValueError: fewer than 2 labels, a label without a word, an empty word, a template without its places, or
            another ``pool``.
    """

    words: Mapping[str, Sequence[str]]
    template: str = "{text}"
    pool: Pool = "sum"

    def __post_init__(self) -> None:
        if not isinstance(self.words, Mapping):
            raise TypeError(f"words: expected labels to words, got {type(self.words).__name__}")
        if len(self.words) < 2:
            raise ValueError(f"words: expected at least 2 labels, got {list(self.words)}")
        checked = {}
        for label, words in self.words.items():
            if not isinstance(label, str) or not label:
                raise TypeError(f"words: expected a label's name, got {label!r}")
            if isinstance(words, str) or not isinstance(words, Sequence):
                raise TypeError(f"words: expected a list of words for {label!r}, got {words!r}")
            if not words:
                raise ValueError(f"words: expected at least 1 word for {label!r}, got none")
            for word in words:
                if not isinstance(word, str):
                    raise TypeError(f"words: expected str for {label!r}, got {type(word).__name__}")
                if not word.strip():
                    raise ValueError(f"words: expected a word for {label!r}, got {word!r}")
            checked[label] = tuple(words)
        split_template(self.template)
        choice("pool", self.pool, get_args(Pool))
        object.__setattr__(self, "words", checked)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels, Y, in the order of the logits."""
        return tuple(self.words)

    def wrap(self, model: nn.Module, tokenizer: Any) -> tuple[Verbalized, Prompted]:
        """The model as a classifier of texts, and the tokenizer that sets them into the prompt.

        Args:
            model: a causal language model of ``transformers``; it is not changed.
            tokenizer: its fast tokenizer.

        Raises:
            ValueError: no causal language model, a slow tokenizer, or words as :meth:`tokens` refuses them.
        """
        prompted = Prompted(tokenizer, self.template)
        return Verbalized(model, self.tokens(tokenizer), self.pool), prompted

    def tokens(self, tokenizer: Any) -> dict[str, list[int]]:
        """The tokens that stand for each label, without repetitions.

        Raises:
            ValueError: a word without a token or with an unknown one, or two labels that share a token.
        """
        found: dict[str, list[int]] = {}
        owners: dict[int, tuple[str, str]] = {}
        for label, words in self.words.items():
            for word in words:
                ids = tokenizer([word], add_special_tokens=False)["input_ids"][0]
                if not ids:
                    raise ValueError(f"words: the tokenizer makes no token of {word!r} of label {label!r}")
                if ids[0] == tokenizer.unk_token_id:
                    raise ValueError(f"words: {word!r} of label {label!r} begins with a token the tokenizer lacks")
                other, same = owners.setdefault(ids[0], (label, word))
                if other != label:
                    token = tokenizer.convert_ids_to_tokens(ids[0])
                    raise ValueError(
                        f"words: expected first tokens that tell labels apart, got {token!r} for both {same!r} of "
                        f"{other!r} and {word!r} of {label!r}; try them with or without a leading blank"
                    )
                found.setdefault(label, []).append(ids[0])
        return {label: list(dict.fromkeys(ids)) for label, ids in found.items()}

    def save(self, path: PathLike) -> None:
        """Writes a JSON file that people can read and change, all or nothing.

        Raises:
            OSError: the file cannot be written.
        """
        parts = {"words": self.words, "template": self.template, "pool": self.pool}
        write_json(path, {"kind": KIND, "schema": SCHEMA, **parts})

    @classmethod
    def load(cls, path: PathLike) -> Verbalizer:
        """Reads a file of :meth:`save`.

        By hand, ``{"words": {"negative": [" bad"], "positive": [" good"]}}`` is enough.

        Raises:
            FileError: no such file, damaged, or from a newer Spurge.
            OSError: the file cannot be read.
        """
        with reading_json(path, "a verbalizer", keys=_KEYS, kind=KIND, schema=SCHEMA, by_hand=True) as value:
            return cls(**{"words": value["words"]} | {key: value[key] for key in ("template", "pool") if key in value})


class Verbalized(nn.Module):
    """A causal language model as a classifier, logits ``[R, Y]``; made by :meth:`Verbalizer.wrap`.

    Its modules are the language model's own, by the same paths: sites, edits and fingerprints made through the one fit
    the other, and what is folded into the one is in both.

    Args:
        model: a causal language model of ``transformers``.
        tokens: label to the tokens that stand for it.
        pool: what a label's tokens make together, see :class:`Verbalizer`.

    Attributes:
        tokens, pool: as given.
        config: the model's configuration, a copy that names the labels.
        language_model: the model as it was given.

    Raises:
        ValueError: no causal language model, or a token it has no output for.
    """

    config: Any
    language_model: Any

    def __init__(self, model: nn.Module, tokens: Mapping[str, Sequence[int]], pool: Pool = "sum") -> None:
        super().__init__()
        head = language_head(model)
        if head is None or not is_decoder(model, known_sites(model)) or isinstance(model, Verbalized):
            raise ValueError(
                "model: expected a causal language model with a head to its vocabulary (AutoModelForCausalLM), got "
                f"{type(model).__name__}"
            )
        most, outputs = max(map(max, tokens.values())), _outputs(head)
        if most >= outputs:
            raise ValueError(f"words: expected tokens of the model's {outputs} outputs, got {most}; another tokenizer?")
        self._modules, self._parameters, self._buffers = model._modules, model._parameters, model._buffers
        object.__setattr__(self, "language_model", model)  # not as a module, which would give all parts a second path
        self.training, self.pool = model.training, pool
        self.tokens = {label: list(ids) for label, ids in tokens.items()}
        taken = inspect.signature(model.forward).parameters
        self._takes = {name for name in ("position_ids", "use_cache") if name in taken}
        self.config = copy.deepcopy(model.config)
        self.config.id2label = dict(enumerate(tokens))
        self.config.label2id = {label: y for y, label in enumerate(tokens)}
        self.config.is_decoder = True  # not every family's attention tells, and here it is known
        wide = max(map(len, tokens.values()))
        self._tokens = torch.tensor([[*ids, *[-1] * (wide - len(ids))] for ids in tokens.values()])  # [Y, W]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool = False,
        **others: Any,
    ) -> SequenceClassifierOutput:
        """Logits of the labels after each row's last real token.

        Positions count from a row's first real token where nothing else is said, so that the side of the padding does
        not matter.

        Args:
            input_ids: ``[R, T]``.
            attention_mask: ``[R, T]``, 1 at real tokens, 0 at padding.
            position_ids: ``[R, T]``.
            use_cache: as the language model takes it.
            others: further arguments of the language model.

        Raises:
            ValueError: a row without a real token.
        """
        if position_ids is None and attention_mask is not None and "position_ids" in self._takes:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp_min(0)
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        inputs = {name: value for name, value in given.items() if value is not None} | others
        position = last_real_token(inputs)
        if "use_cache" in self._takes:
            inputs["use_cache"] = use_cache
        words = Readout(language_head(self)).logits(lambda: self.language_model(**inputs), position)  # [R, V]
        return SequenceClassifierOutput(logits=self._pooled(words))  # type: ignore[arg-type]

    def _pooled(self, words: Tensor) -> Tensor:
        """``[R, Y]`` from next-token logits ``[R, V]``, in float32 or wider."""
        tokens = self._tokens.to(words.device)
        real = tokens >= 0
        logits = words[:, tokens.clamp_min(0)].to(torch.promote_types(words.dtype, torch.float32))  # [R, Y, W]
        if self.pool == "mean":
            return logits.where(real, 0).sum(2) / real.sum(1)
        return logits.masked_fill(~real, -torch.inf).logsumexp(2)

    def get_input_embeddings(self) -> Any:
        """The table of token embeddings."""
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """The head to the vocabulary."""
        return self.language_model.get_output_embeddings()

    @property
    def device(self) -> torch.device:
        """Where the language model takes its inputs."""
        return self.language_model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the language model's weights."""
        return self.language_model.dtype

    @property
    def hf_device_map(self) -> Mapping[str, Any]:
        """Where the language model's parts lie; empty where they are all in one place."""
        return getattr(self.language_model, "hf_device_map", {})


def _outputs(head: Any) -> int:
    """How many tokens a head to the vocabulary knows."""
    sizes = features(head)
    return int(head.weight.shape[0]) if sizes is None else sizes[1]
