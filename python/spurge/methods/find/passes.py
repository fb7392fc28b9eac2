"""Exact forward passes over many texts: each different text once, sorted by length, in blocks that can be resumed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from spurge.engine.base.files import PathLike, canonical_json, fingerprint
from spurge.engine.base.resume import Blocks
from spurge.engine.data.examples import Example, Examples
from spurge.engine.evaluation.prediction import Prepared
from spurge.engine.models.fingerprint import model_print
from spurge.engine.models.handle import Handle

_BLOCK = 512  # texts


class Passes:
    """Runs a classifier over texts and counts them.

    Args:
        handle: of the classifier and its tokenizer.
        labels: names of its outputs.
        batch_size, max_length, memory: as `spurge.engine.evaluation.prediction.Prepared` takes them.
        resume: folder of finished blocks.
        progress: show a bar.

    Attributes:
        texts: how many texts were asked about so far, each different one of a call once.
    """

    def __init__(
        self,
        handle: Handle,
        labels: Sequence[str],
        *,
        batch_size: int,
        max_length: int | None,
        memory: str | int | None,
        resume: PathLike | None,
        progress: bool,
    ) -> None:
        self._handle, self._labels, self._progress = handle, tuple(labels), progress
        self._batch_size, self._max_length, self._memory = batch_size, max_length, memory
        self._resume = resume
        self._model = model_print(handle.model) if resume is not None else ""
        self.texts = 0

    def logits(self, stage: str, rows: Sequence[Example]) -> Tensor:
        """float32 ``[n, Y]`` in the order of ``rows``; ``stage`` names the blocks and the bar.

        Raises:
            ValueError: logits that are not finite, or blocks of another job.
        """
        different = list(dict.fromkeys((row.text, row.pair) for row in rows))
        different.sort(key=lambda texts: (len(texts[0]) + len(texts[1] or ""), texts[0], texts[1] or ""))
        self.texts += len(different)
        mark = fingerprint(canonical_json([self._model, self._max_length, different]))
        blocks = Blocks(self._resume, "find block", "a block of forward passes", mark)
        found = []
        with tqdm(total=len(different), desc=stage, unit="text", disable=not self._progress) as bar:
            for number, start in enumerate(range(0, len(different), _BLOCK)):
                part = different[start : start + _BLOCK]
                name = f"{stage}-{number:04d}"
                logits = blocks.find(name, lambda file: file.tensors["logits"])
                if logits is None:
                    logits = self._run(part)
                    blocks.keep(name, {"logits": logits})
                found.append(logits)
                bar.update(len(part))
        place = {texts: number for number, texts in enumerate(different)}
        return torch.cat(found)[[place[row.text, row.pair] for row in rows]]

    def _run(self, texts: Sequence[tuple[str, str | None]]) -> Tensor:
        examples = Examples([Example(text, 0, pair) for text, pair in texts], self._labels)
        prepared = Prepared(
            "changed texts",
            self._handle,
            examples,
            batch_size=self._batch_size,
            max_length=self._max_length,
            memory=self._memory,
        )
        return prepared.run().logits
