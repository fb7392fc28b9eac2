"""A plain classifier of bags of words: what the words of a text say of its label, whatever their order."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from spurge.engine.base.lbfgs import minimise
from spurge.engine.data.examples import Example, Examples
from spurge.engine.data.words import split_words

_EVALUATIONS = 100  # of loss and gradient: far more than the few digits need that a probability is asked for


class BagOfWords:
    r"""Softmax regression on TF-IDF of words and of pairs of neighbours, fitted on labelled texts.

    .. math:: x_w = n_w \left(1 + \log \tfrac{1 + N}{1 + N_w}\right), \quad
              J(V, b) = \tfrac1N \sum_n \mathrm{CE}(y_n, V x_n / \|x_n\| + b) + \tfrac{1}{2 C N} \|V\|^2

    :math:`n_w` is how often w stands in a text, :math:`N_w` the texts that hold it.

    Args:
        rows: the texts; a pair counts as one text.
        fewest: words and pairs of words in fewer texts are left out.
        strength: C, the inverse of the penalty.

    Raises:
        ValueError: no word is in ``fewest`` texts.
    """

    def __init__(self, rows: Examples, *, fewest: int = 2, strength: float = 1.0) -> None:
        bags = [_bag(row) for row in rows]
        texts = Counter(unit for bag in bags for unit in bag)
        kept = sorted(unit for unit, count in texts.items() if count >= fewest)
        if not kept:
            raise ValueError(f"rows: no word is in {fewest} of {len(rows)} texts")
        self._columns = {unit: column for column, unit in enumerate(kept)}
        self._rarity = {unit: 1 + math.log((1 + len(rows)) / (1 + texts[unit])) for unit in kept}
        found = [self._weighed(bag) for bag in bags]
        places = [(row, column) for row, (columns, _) in enumerate(found) for column in columns]
        values = torch.tensor([value for _, values in found for value in values], dtype=torch.float64)
        shape = (len(rows), len(kept))
        matrix = torch.sparse_coo_tensor(torch.tensor(places).T, values, shape, check_invariants=True).coalesce()
        self._weight, self._bias = _fit(matrix, matrix.T.coalesce(), rows.targets, len(rows.labels), strength)

    def probabilities(self, example: Example) -> list[float]:
        """Of each label, for one text."""
        columns, values = self._weighed(_bag(example))
        logits = self._bias
        if columns:
            logits = logits + torch.tensor(values, dtype=torch.float64) @ self._weight[torch.tensor(columns)]
        return logits.softmax(0).tolist()

    def _weighed(self, bag: Counter[str]) -> tuple[list[int], list[float]]:
        """Columns and values of a text's known units, of unit length."""
        units = [unit for unit in bag if unit in self._columns]
        known = sorted((self._columns[unit], bag[unit] * self._rarity[unit]) for unit in units)
        length = math.sqrt(sum(value * value for _, value in known)) or 1.0
        return [column for column, _ in known], [value / length for _, value in known]


def _bag(row: Example) -> Counter[str]:
    units: Counter[str] = Counter()
    for segment in row.segments:
        words = split_words(segment)
        units.update(words)
        units.update(_pairs(words))
    return units


def _pairs(words: Sequence[str]) -> Iterable[str]:
    return (f"{first} {second}" for first, second in pairwise(words))


def _fit(matrix: Tensor, by_column: Tensor, targets: Tensor, labels: int, strength: float) -> tuple[Tensor, Tensor]:
    """Weight ``[V, Y]`` and bias ``[Y]`` at the minimum; both matrices are sparse, ``[N, V]`` and ``[V, N]``."""
    rows, width = matrix.shape
    wanted = torch.nn.functional.one_hot(targets, labels).double()

    def loss(place: Tensor) -> tuple[float, Tensor]:
        weight, bias = place[: width * labels].view(width, labels), place[width * labels :]
        logits = matrix @ weight + bias
        residual = (logits.softmax(1) - wanted) / rows
        slope = by_column @ residual + weight / (strength * rows)
        value = -(logits.log_softmax(1) * wanted).sum() / rows + weight.square().sum() / (2 * strength * rows)
        return float(value), torch.cat([slope.reshape(-1), residual.sum(0)])

    # The loss is far flatter than 1, which the search takes its second derivatives for at first: in units of
    # sqrt(rows) for the weights they are about that.
    scale = math.sqrt(rows)

    def scaled(place: Tensor) -> tuple[float, Tensor]:
        value, slope = loss(place * scale)
        return value, slope * scale

    start = torch.zeros((width + 1) * labels, dtype=torch.float64)
    best, _ = minimise(scaled, start, finished=lambda slope: float(slope.abs().max()) < 1e-4, evaluations=_EVALUATIONS)
    best = best * scale
    return best[: width * labels].view(width, labels), best[width * labels :]
