"""Which words are alike: by the model's input embeddings, and by the words that they stand beside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from spurge.engine.data.words import split_words
from spurge.engine.models.handle import Handle
from spurge.engine.recordings.embedding import word_pieces, word_vectors

_BESIDE = 0.2  # weight of the words beside, against embeddings
_CONTEXTS = 200  # most frequent words; others count as one


def likeness(handle: Handle, words: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    r"""Vectors whose products say how alike words are, float64 ``[W, D]``.

    .. math:: s_{uv} = \frac{e_u \cdot e_v}{\sqrt{k_u k_v}} + 0.2\, g_u \cdot g_v

    with the input embeddings e at unit length, which say the less the more sub-words k a word was cut into, and the
    words beside it, g.

    Args:
        handle: of the model and its tokenizer.
        words: folded.
        texts: that the words stand in.
    """
    embedded = word_vectors(handle, words).numpy().astype(np.float64)
    pieces = np.array([max(1, len(ids)) for ids in word_pieces(handle, words)])[:, None] if words else np.ones((0, 1))
    return np.concatenate([embedded / np.sqrt(pieces), np.sqrt(_BESIDE) * beside(words, texts)], 1)


def beside(words: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    r"""The words that each word stands beside, at unit length, float64 ``[W, 2 (200 + 2)]``.

    :math:`\sqrt{p_u} - \bar p` over the word in front and the word behind, where :math:`\bar p` are the shares over
    all words: frequent words, any other word, or none.
    """
    split = [split_words(text) for text in texts]
    counts = Counter(word for text in split for word in text)
    context = {word: number for number, (word, _) in enumerate(counts.most_common(_CONTEXTS))}
    other, none, width = len(context), len(context) + 1, len(context) + 2
    number = {word: place for place, word in enumerate(words)}
    found = np.zeros((len(words), 2 * width))
    for text in split:
        places = [none, *(context.get(word, other) for word in text), none]
        for at, word in enumerate(text):
            own = number.get(word)
            if own is not None:
                found[own, places[at]] += 1
                found[own, width + places[at + 2]] += 1
    total = found.sum()
    if not total:
        return found
    found = np.sqrt(found / np.maximum(found.sum(1, keepdims=True), 1)) - found.sum(0) / total
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
