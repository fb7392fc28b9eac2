"""Topics of prompts: clusters of sentence embeddings, named by the words that tell them apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spurge.engine.base.checks import checked_labels, checked_values, integer, number
from spurge.engine.base.files import fingerprint, spurge_version
from spurge.engine.base.temporary import temporary
from spurge.engine.data.examples import checked_texts
from spurge.engine.data.words import split_words

_STARTS = 10  # of k-means; the best one counts
_SILHOUETTE_ROWS = 5000  # its time and memory grow with their square
_NAME_WORDS = 3


@dataclass(frozen=True, eq=False, repr=False)
class Topics:
    """The topic of each of N prompts. Made by :func:`find_topics`; `Confounders.of` takes it as it is.

    Attributes:
        labels: topic of each prompt, int64 ``[N]``; topic 0 has the most prompts.
        names: of the topics: the number, then the words most over-represented in it: ``"3: police, court, murder"``.
        silhouettes: mean silhouette in [-1, 1] of each number of clusters that was tried, before any were joined.
        info: how they were found.
    """

    labels: Tensor
    names: tuple[str, ...]
    silhouettes: dict[int, float]
    info: dict[str, Any]

    def __post_init__(self) -> None:
        checked_labels("labels", self.labels, len(self.labels), below=len(self.names))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Prompts of each topic."""
        return tuple(self.labels.bincount(minlength=len(self.names)).tolist())

    def __repr__(self) -> str:
        return f"Topics({len(self)} prompts, {len(self.names)} topics of {min(self.sizes)} to {max(self.sizes)})"


def find_topics(
    texts: Sequence[str],
    embeddings: Any | Callable[[list[str]], Any],
    *,
    clusters: Sequence[int] = (10, 20, 50),
    least_share: float = 0.01,
    seed: int = 0,
) -> Topics:
    r"""Topics of N prompts, by k-means on their embeddings.

    K is the candidate whose clusters have the largest mean silhouette (Rousseeuw 1987; the smaller K of equal ones;
    on 5,000 random prompts if there are more). Then clusters with less than ``least_share`` of the prompts are given
    up, and each of their prompts goes to the nearest remaining centroid: a topic of a few prompts has no treated ones
    to compare with untreated ones.

    Give the prompts, never what the model wrote. A continuation depends on the prompt's toxicity and on the mediator,
    so its topic is a descendant of both: adjusting for it blocks a part of the effect and opens a path between them
    through whatever else moves the topic (a collider).

    A topic's words are those with the largest log-likelihood ratio (Dunning 1993) among those over-represented in it,

    .. math:: G^2 = 2 \sum_{ij} o_{ij} \log (o_{ij} / e_{ij}),

    with o the 2 x 2 table of texts inside or outside the topic that have the word or not, and e what independence
    would expect. Words as frequent everywhere, such as articles, score near 0, so no list of stop words is needed.

    Args:
        texts: the prompts.
        embeddings: numbers ``[N, D]`` (tensor or array), or a function from the list of texts to them, such as
            :func:`spurge.embed` with a model. Distances are Euclidean: unit length makes them those of the cosine.
        clusters: candidates for K, from 2 to N - 1.
        least_share: of the prompts, in [0, 1).
        seed: of k-means and of the silhouette's sample. The same seed gives the same topics on the same machine, with
            any number of threads.

    Raises:
        TypeError: an argument of another type.
        ValueError: no texts, embeddings of another count or not finite, a K out of range, fewer different embeddings
            than K, or no cluster as large as ``least_share``.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    found = checked_texts("texts", texts)
    values = _values(embeddings, found)
    candidates = _candidates(clusters, len(found))
    seed = integer("seed", seed, 0)
    least = number("least_share", least_share, 0)
    different = len(np.unique(values, axis=0))
    if different < candidates[-1]:
        raise ValueError(f"clusters: {candidates[-1]} need as many different embeddings, got {different}")
    with one_thread():
        fits = {count: k_means(values, count, seed) for count in candidates}
        silhouettes = {count: _silhouette(values, labels, seed) for count, (labels, _) in fits.items()}
    best = max(candidates, key=lambda count: silhouettes[count])
    labels, kept = _joined(values, *fits[best], least)
    return Topics(
        labels=torch.from_numpy(labels),
        names=_names(found, labels, kept),
        silhouettes=silhouettes,
        info={
            "method": "find_topics",
            "clusters": candidates,
            "chosen": best,
            "joined": best - kept,
            "least_share": least,
            "seed": seed,
            "embeddings": fingerprint(torch.from_numpy(values)),
            "spurge": spurge_version(),
        },
    )


def _values(embeddings: Any, texts: list[str]) -> np.ndarray:
    """Embeddings ``[N, D]``, float32 or float64, in memory of their own or the caller's."""
    made = embeddings if isinstance(embeddings, Tensor) or not callable(embeddings) else embeddings(list(texts))
    made = made if isinstance(made, Tensor) else torch.as_tensor(np.asarray(made))
    values = checked_values("embeddings", made).cpu()
    if len(values) != len(texts):
        raise ValueError(f"embeddings: expected a row for each of {len(texts)} texts, got {len(values)}")
    return (values if values.dtype == torch.float64 else values.float()).contiguous().numpy()


def _candidates(clusters: Any, rows: int) -> list[int]:
    """The numbers of clusters to try, rising."""
    if not isinstance(clusters, (Sequence, np.ndarray)) or isinstance(clusters, str):
        raise TypeError(f"clusters: expected a sequence of whole numbers, got {type(clusters).__name__}")
    found = sorted({integer("clusters", count, 2) for count in clusters})
    if not found:
        raise ValueError("clusters: need at least 1 number, got 0")
    if found[-1] >= rows:
        raise ValueError(f"clusters: expected numbers below {rows}, the number of texts, got {found[-1]}")
    return found


@temporary
def one_thread() -> Iterator[None]:
    """scikit-learn on one thread: several add up their parts of a sum in the order in which they finish.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import sklearn.cluster  # noqa: F401
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "clusters need scikit-learn: pip install 'spurge[mediation]'", name="sklearn"
        ) from error
    with threadpool_limits(1):
        yield


def k_means(values: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cluster of each row ``[N]``, and the centroids ``[K, D]``."""
    from sklearn.cluster import KMeans

    fitted = KMeans(count, n_init=_STARTS, random_state=seed).fit(values)
    return fitted.labels_, fitted.cluster_centers_


def _silhouette(values: np.ndarray, labels: np.ndarray, seed: int) -> float:
    """Mean silhouette; 0 where the sample shows no clusters."""
    from sklearn.metrics import silhouette_score

    rows = np.random.default_rng(seed).permutation(len(values))[:_SILHOUETTE_ROWS]
    if not 1 < len(np.unique(labels[rows])) < len(rows):
        return 0.0
    return float(silhouette_score(values[rows], labels[rows]))


def _joined(
    values: np.ndarray, labels: np.ndarray, centroids: np.ndarray, least_share: float
) -> tuple[np.ndarray, int]:
    """Topic of each row, int64 ``[N]``, in the order of their sizes; and their number."""
    sizes = np.bincount(labels, minlength=len(centroids))
    large = np.flatnonzero(sizes >= max(1, least_share * len(labels)))
    if not len(large):
        share = sizes.max() / len(labels)
        raise ValueError(f"least_share: the largest of {len(centroids)} clusters has {share:.3g}, got {least_share}")
    number = np.full(len(centroids), -1)
    number[large] = np.arange(len(large))
    joined = number[labels]
    moved = np.flatnonzero(joined < 0)
    # |v - c|^2 without |v|^2, which is the same for every centroid
    distances = (centroids[large] ** 2).sum(1) - 2 * values[moved] @ centroids[large].T
    joined[moved] = distances.argmin(1)
    order = np.argsort(-np.bincount(joined, minlength=len(large)), kind="stable")
    return np.argsort(order)[joined].astype(np.int64), len(large)


def _names(texts: list[str], labels: np.ndarray, count: int) -> tuple[str, ...]:
    """A number and the most over-represented words of each topic."""
    words = [{word for word in split_words(text) if len(word) > 1 and not word.isdecimal()} for text in texts]
    everywhere = Counter(word for found in words for word in found)
    names = []
    for topic in range(count):
        rows = np.flatnonzero(labels == topic)
        inside = Counter(word for row in rows for word in words[row])
        ranked = sorted((-_ratio(n, len(rows), everywhere[word], len(texts)), word) for word, n in inside.items())
        leading = [word for score, word in ranked[:_NAME_WORDS] if score < 0]
        names.append(f"{topic}: {', '.join(leading)}" if leading else str(topic))
    return tuple(names)


def _ratio(both: int, inside: int, have: int, texts: int) -> float:
    """G^2 of a word that ``both`` of ``inside`` texts, and ``have`` of all texts have; 0 if under-represented."""
    if both * texts <= inside * have:
        return 0.0
    observed = np.array([both, inside - both, have - both, texts - inside - have + both], dtype=float)
    rows, columns = (inside, inside, texts - inside, texts - inside), (have, texts - have) * 2
    expected = np.multiply(rows, columns) / texts
    some = observed > 0
    return float(2 * (observed[some] * np.log(observed[some] / expected[some])).sum())
