"""Locating with the fused proximity gives the scores that eager torch and autograd give."""

from __future__ import annotations

import pytest
import torch

from peers.proximity import eager
from spurge import ops


@pytest.mark.parametrize("path", ["gradient", "layer", "joint"])
@pytest.mark.parametrize("form", ["soft", "hard"])
def test_locating_gives_the_scores_of_eager_torch(path: str, form: str, monkeypatch: pytest.MonkeyPatch):
    from helpers import planted_texts
    from helpers.tiny_models import tiny_tokenizer
    from spurge.methods.macu.macu import MacU

    settings = {"path": path, "proximity": form, "texts": 24, "certify": 0, "top_k": 3, "progress": False}
    settings |= {"exact": 4, "audit": 0} if path == "gradient" else {"nodes": 2}

    def located():
        found = MacU(**settings).locate(
            planted_texts.model(), tiny_tokenizer(), planted_texts.train(), planted_texts.GOLDEN
        )
        return [torch.cat([*side.values.values()]) for side in (found.causal, found.spurious)]

    fused = located()
    asked = []
    monkeypatch.setattr(ops, "proximity", lambda *arguments: asked.append(1) or eager(*arguments))
    for got, want in zip(fused, located(), strict=True):
        assert float((got - want).abs().max()) <= 1e-6 * float(want.abs().max())
    assert asked
