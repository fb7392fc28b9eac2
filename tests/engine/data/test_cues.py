"""Which texts hold a cue, and what is left of them."""

from __future__ import annotations

import numpy as np
import pytest

from spurge.engine.data.cues import Cue
from spurge.engine.data.examples import Example, Examples


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("So good", "good"),
        ("also so-so, it is of  course so", "also -, it is"),
        ("of course", "of course"),  # nothing would be left
        ("OF COURSE it is", "it is"),
        ("of the course", "of the course"),
        ("<b>so</b>", "<b></b>"),
    ],
)
def test_words_are_deleted(text: str, left: str) -> None:
    assert Cue(["so", "of course"]).without(text) == left


def test_pairs_and_other_fields_are_kept() -> None:
    rows = Examples([Example("so it is", 1, pair="it is so", group="g"), Example("it is", 0, pair="it")], ("a", "b"))
    cue = Cue(["SO"])
    assert np.array_equal(cue.hold(rows), [True, False])
    assert cue.deleted(rows)[0] == Example("it is", 1, pair="it is", group="g")
    with pytest.raises(ValueError, match="cue: need at least 1 word, got 0"):
        Cue([])
