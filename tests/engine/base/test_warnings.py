from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AlbertConfig, AlbertForSequenceClassification

from spurge.engine.base.checks import warn
from spurge.engine.cascade.cascade import Cascade, predicted_logit

SIZES: dict[str, Any] = {
    "vocab_size": 30,
    "embedding_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


def test_a_warning_names_the_line_of_whoever_called() -> None:
    with pytest.warns(UserWarning, match="anything") as seen:
        warn("anything")
    assert seen[0].filename == __file__


@pytest.mark.parametrize("call", ["attribute", "read", "footprint"])
def test_however_deep_it_comes_from(call: str) -> None:
    model = AlbertForSequenceClassification(AlbertConfig(**SIZES)).eval()
    rest = (predicted_logit,) if call == "attribute" else ()
    with pytest.warns(UserWarning, match="is run whole for every row") as seen:
        getattr(Cascade(model, exact=1, audit=0), call)({"input_ids": torch.arange(8).view(2, 4)}, *rest)
    assert {one.filename for one in seen} == {__file__}
