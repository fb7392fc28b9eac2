"""The evidence on candidates, from the texts that they stand in and the model's idea of words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from spurge.engine.data.bound import associate
from spurge.engine.data.examples import Examples
from spurge.engine.models.handle import Handle
from spurge.engine.recordings.embedding import word_vectors
from spurge.methods.find.candidates import ARROW, Candidate
from spurge.methods.find.likeness import likeness
from spurge.methods.find.peers import Peers, Texts
from spurge.methods.find.roles import Evidence, Lexicon, weigh, written_as_names
from spurge.methods.golden.golden import GoldenTokens


class Judge:
    """Collects the evidence on candidates of a set of texts.

    Args:
        handle: of the model whose input embeddings say which words are alike.
        examples: the texts.
        words: the single words of each place.
        targets: labels, int64 ``[N]``.
        golden: the lexicon, None for none.
    """

    def __init__(
        self,
        handle: Handle,
        examples: Examples,
        words: Mapping[str, Sequence[Candidate]],
        targets: np.ndarray,
        golden: GoldenTokens | None,
    ) -> None:
        self._labels, self._targets = examples.labels, targets
        self._peers: dict[str, Peers] = {}
        self._lexicons: dict[str, Lexicon | None] = {}
        self._named: dict[str, dict[str, tuple[int, int]]] = {}
        for index, (place, own) in enumerate(words.items()):
            names = [one.name for one in own]
            texts = [row.segments[index] for row in examples]
            rows = [one.rows for one in own]
            classes = len(examples.labels)
            excess = associate(rows, targets, classes).excess
            self._peers[place] = Peers(names, likeness(handle, names, texts), excess, Texts(rows, targets, classes))
            self._lexicons[place] = None if golden is None else lexicon_of(handle, golden, names)
            self._named[place] = written_as_names(texts)

    def evidence(self, one: Candidate, label: int, log_odds: float) -> list[Evidence]:
        """Of a candidate that goes with ``label``."""
        place = one.place if one.place in self._peers else list(self._peers)[-1]
        name = one.name.split(ARROW)[-1]
        return weigh(
            one.kind,
            name,
            label,
            log_odds,
            self._peers[place].of(name, one.rows),
            named=self._share_named(name, place),
            covers=self._covers(one.rows, label),
            lexicon=self._lexicons[place],
            label_names=self._labels,
        )

    def _covers(self, rows: np.ndarray, label: int) -> float:
        """Share of the label's texts among some rows, less that of all others."""
        own = self._targets == label
        having = np.zeros(len(own), dtype=bool)
        having[rows] = True
        return float(having[own].mean() - having[~own].mean())

    def _share_named(self, name: str, place: str) -> float:
        counts = [self._named[place].get(word, (0, 0)) for word in name.split()]
        return max((capital / places for capital, places in counts if places >= 5), default=0.0)


def lexicon_of(handle: Handle, golden: GoldenTokens, names: Sequence[str]) -> Lexicon:
    """A lexicon for the words of some texts."""
    vectors = word_vectors(handle, names).numpy()
    listed = word_vectors(handle, Lexicon.single(golden)).numpy()
    return Lexicon(golden, names, vectors, listed)
