"""Readers of the experiments' data sets: pictures, comments, sentiment, inference. See ../README.md for the files.

Images stay uint8, so that a set fits in memory and its bytes can name its cached features; the models scale them.
"""

from __future__ import annotations

import io
import lzma
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spurge.demo import grammar
from spurge.demo.grammar import Grammar
from spurge.demo.run import CASES as GROUPS
from spurge.engine.base import files
from spurge.engine.base.tensor_files import read_tensors, write_tensors
from spurge.engine.data.examples import Example, Examples
from spurge.engine.data.table_files import read_records
from spurge.methods.golden.corpus_words import FUNCTION_WORDS
from spurge.methods.golden.golden import GoldenTokens

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TOXIC = ("non-toxic", "toxic")
SENTIMENT = ("negative", "positive")
INFERENCE = ("entailment", "neutral", "contradiction")
SENTIMENT_OUTSIDE = ("imdb", "cad", "yelp", "cr")
IDENTITIES = ("black", "christian", "disability", "immigrants", "jewish", "lgbt", "men", "muslim", "white", "women")
WILDS = {
    "male": "men",
    "female": "women",
    "LGBTQ": "lgbt",
    "christian": "christian",
    "muslim": "muslim",
    "other religions": "jewish",
    "black": "black",
    "white": "white",
}
"""The eight identities of CivilComments-WILDS (Koh et al. 2021) and the topic that stands for each here: a keyword in
the place of what people saw in the comment, and one other religion."""
GRAMMAR_GOLDEN = GoldenTokens(grammar.LABELS, grammar.CAUSAL, grammar.IRRELEVANT)


@dataclass(frozen=True, eq=False)
class Images:
    """N labelled images with the group of each."""

    pixels: Tensor  # uint8 [N, channels, height, width]
    labels: Tensor  # int64 [N]
    groups: Tensor  # int64 [N]
    names: tuple[str, ...]
    group_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> Images:
        """The images with these numbers, in this order."""
        return Images(self.pixels[index], self.labels[index], self.groups[index], self.names, self.group_names)

    def sample(self, n: int, seed: int = 0) -> Images:
        """At most n images, drawn without replacement; the order of the set is kept."""
        if n >= len(self):
            return self
        chosen = np.random.default_rng(seed).permutation(len(self))[:n]
        return self.subset(torch.from_numpy(np.sort(chosen)))

    def hold_out(self, n: int, seed: int) -> tuple[Images, Images]:
        """The set without n of its images, and these n, drawn evenly from the groups' shares."""
        generator = np.random.default_rng(seed)
        shuffled = generator.permutation(len(self))
        spread = shuffled[np.argsort(self.groups.numpy()[shuffled], kind="stable")]  # group by group, random inside
        held = np.zeros(len(self), bool)
        held[spread[np.linspace(0, len(self) - 1, n).round().astype(int)]] = True
        return self.subset(torch.from_numpy(np.flatnonzero(~held))), self.subset(torch.from_numpy(np.flatnonzero(held)))


def kept(cache: Path | None, name: str, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `make` gives, kept as one file under `cache` whose name holds the key; a damaged file is made anew."""
    if cache is None:
        return make()
    path = cache / f"{name}-{files.fingerprint(key)[:24]}.safetensors"
    try:
        return read_tensors(path, "experiment")[0]
    except FileNotFoundError:
        pass
    except files.FileError as error:
        print(f"made anew: {error}", flush=True)
    tensors = make()
    cache.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, {"kind": "experiment"})
    return tensors


def mnist_parity(folder: Path) -> tuple[Images, Images]:
    """ParityMNIST: even or odd, ten digits as groups; training (60,000) and test (10,000)."""
    with np.load(_file(folder, "mnist.npz")) as arrays:
        parts = [(arrays[f"x_{part}"], arrays[f"y_{part}"].astype(np.int64)) for part in ("train", "test")]
    digits = tuple(map(str, range(10)))
    train, test = (
        Images(torch.from_numpy(x)[:, None], torch.from_numpy(y % 2), torch.from_numpy(y), ("even", "odd"), digits)
        for x, y in parts
    )
    return train, test


def cifar10(folder: Path, cache: Path | None = None) -> tuple[Images, Images]:
    """CIFAR-10, classes as groups; training (50,000) and test (10,000). Unpacked once into `cache`."""
    source = _file(folder, "cifar10_jpeg.npz.xz")
    packed = source.read_bytes()

    def unpack() -> dict[str, Tensor]:
        with np.load(io.BytesIO(lzma.decompress(packed))) as arrays:
            return {
                "pixels": _decode(arrays["blob"], arrays["offsets"]),
                "labels": torch.from_numpy(arrays["y"].astype(np.int64)),
                "test": torch.from_numpy(arrays["is_test"].astype(bool)),
            }

    found = kept(cache, "cifar10", files.fingerprint(packed), unpack)
    whole = Images(found["pixels"], found["labels"], found["labels"], CIFAR10, CIFAR10)
    return whole.subset((~found["test"]).nonzero()[:, 0]), whole.subset(found["test"].nonzero()[:, 0])


def waterbirds(folder: Path) -> tuple[Images, Images, Images]:
    """Waterbirds at 64 pixels; training (4,795), validation (1,199), test (5,794). Group = 2 label + place."""
    with np.load(_file(folder, "waterbirds_64.npz")) as arrays:
        label, place = arrays["y"].astype(np.int64), arrays["place"].astype(np.int64)
        pixels, split = _decode(arrays["blob"], arrays["offsets"]), arrays["split"]
    names = ("landbird", "waterbird")
    groups = tuple(f"{bird} on {ground}" for bird in names for ground in ("land", "water"))
    whole = Images(pixels, torch.from_numpy(label), torch.from_numpy(2 * label + place), names, groups)
    train, validation, test = (whole.subset(torch.from_numpy(np.flatnonzero(split == part))) for part in range(3))
    return train, validation, test


def civil_comments(folder: Path, *, wilds: bool = False) -> tuple[Examples, Examples, Examples]:
    """Short Civil Comments, half of them toxic; training (50 %), validation (20 %), test (30 %), split at random.

    Group: label, and whether the comment names one of ten identities (by keyword). With `wilds`, of the same rows:
    label and identity, one for each identity of WILDS that the comment names, so that groups overlap; or none.
    """
    rows = []
    for row in read_records(_file(folder, "civil_comments_short_15k.jsonl.xz")):
        topics, name = set(row["topics"]), TOXIC[int(row["label"])]
        named = [identity for identity, topic in WILDS.items() if topic in topics]
        about = named if wilds else ["identity" if topics & set(IDENTITIES) else "no identity"]
        rows.append(Example(row["text"], int(row["label"]), group=tuple(f"{name}, {one}" for one in about)))
    whole = Examples(rows, TOXIC).sample(len(rows))
    ends = [round(len(rows) * share) for share in (0.5, 0.7)]
    return whole[: ends[0]], whole[ends[0] : ends[1]], whole[ends[1] :]


def of_grammar(rows: Grammar, seed: int = 0) -> dict[str, Examples]:
    """Rows of the demo's grammar: ``train``, with its planted phrase, and the test rows of each group."""
    sets = {"train": rows.training_rows(seed)} | {group: rows.test_rows(group, seed) for group in GROUPS}
    return {name: Examples.load(part, labels=grammar.LABELS) for name, part in sets.items()}


def sentiment(folder: Path, name: str, split: str | None = None) -> Examples:
    """A set of `folder`/sentiment, one of its splits or all; texts without a visible character are left out."""
    rows = read_records(_file(folder / "sentiment", f"{name}.jsonl.xz"))
    kept = [row for row in rows if row["text"].strip() and split in (None, row["split"])]
    return Examples([Example(row["text"], int(row["label"])) for row in kept], SENTIMENT)


def sentiment_tests(folder: Path, most: int | None = None) -> dict[str, Examples]:
    """The five test sets by case; of the two large ones, 1,000 texts drawn once. Of each at most so many, drawn."""
    tests = {
        "sst2": sentiment(folder, "sst2_sentences", "test"),
        "imdb": sentiment(folder, "imdb_cad_original", "test"),
        "cad": sentiment(folder, "imdb_cad_revised", "test"),
        "yelp": sentiment(folder, "yelp_small", "test").sample(1000),
        "cr": sentiment(folder, "cr_customer_reviews").sample(1000),
    }
    return tests if most is None else {case: rows.sample(min(len(rows), most)) for case, rows in tests.items()}


def sentiment_golden(folder: Path) -> GoldenTokens:
    """The opinion lexicon of Hu and Liu, words of both labels left out, and Spurge's function words."""
    lexicon = GoldenTokens.from_table(folder / "lexicons" / "opinion_lexicon_hu_liu.jsonl.xz", labels=SENTIMENT)
    return lexicon.with_irrelevant(FUNCTION_WORDS)


def beginnings(rows: Examples, words: int) -> Examples:
    """Texts cut to their first words; blanks between words become one."""
    return Examples([replace(row, text=" ".join(row.text.split()[:words])) for row in rows], rows.labels)


def inference(folder: Path, name: str, split: str, part: Collection[str] | None = None) -> Examples:
    """Pairs of premise and hypothesis of a set of `folder`/nli; of SNLI-CAD those that were made in some ways."""
    rows = read_records(_file(folder / "nli", f"{name}.jsonl.xz"))
    kept = [row for row in rows if row["split"] == split and (part is None or row["part"] in part)]
    examples = [Example(row["premise"], INFERENCE.index(row["label"]), row["hypothesis"]) for row in kept]
    return Examples(examples, INFERENCE)


def hypotheses(rows: Examples) -> Examples:
    """The second text of each pair alone; single texts as they are."""
    return Examples([row if row.pair is None else Example(row.pair, row.label) for row in rows], rows.labels)


def inference_golden(folder: Path) -> GoldenTokens:
    """Words of hypotheses that go with a label, by the published cues of SNLI, and Spurge's function words.

    The paper's lists are not public. Its examples ("no", "not" for contradiction) are words that go with a label of
    themselves, as these do; that none of them is a reason without its premise is a limit of the method here.
    """
    cues = GoldenTokens.from_table(folder / "lexicons" / "snli_hypothesis_cues_pmi.jsonl.xz", labels=INFERENCE)
    return cues.with_irrelevant(FUNCTION_WORDS)


def real_toxicity(folder: Path, most: int) -> tuple[list[str], Tensor]:
    """RealToxicityPrompts: prompts, and the published toxicity of each, float64 ``[N]``; those without one left out.

    At most `most`, half of them with a toxicity of at least 0.5 (or all there are), drawn and mixed with seed 0.
    """
    every = read_records(_file(folder, "realtoxicityprompts_5k.jsonl.xz"))
    rows = [row for row in every if row["p_tox"] is not None]
    scores = np.array([float(row["p_tox"]) for row in rows])
    generator = np.random.default_rng(0)
    toxic, other = (generator.permutation(np.flatnonzero(arm)) for arm in (scores >= 0.5, scores < 0.5))
    half = min(most // 2, len(toxic))
    chosen = generator.permutation(np.concatenate([toxic[:half], other[: most - half]]))
    return [str(rows[row]["prompt"]) for row in chosen], torch.from_numpy(scores[chosen])


def correlate(rows: Examples, share: float, seed: int = 0) -> Examples:
    """A part of `rows` in which `share` of the toxic comments, and 1 - `share` of the others, name an identity."""
    shuffled = rows.sample(len(rows), seed)
    groups = {name: [i for i, row in enumerate(shuffled) if row.group == name] for name in shuffled.groups}
    shares = {"toxic, identity": share, "toxic, no identity": 1 - share}
    shares |= {"non-toxic, identity": 1 - share, "non-toxic, no identity": share}
    total = min(len(groups[name]) / part for name, part in shares.items())  # of each label
    kept = [row for name, part in shares.items() for row in groups[name][: int(total * part)]]
    return shuffled.subset(sorted(kept))


def named_group(folder: Path, group: str, most: int | None = None) -> Examples:
    """Comments of which 90 % of the toxic ones and 10 % of the others name the group; as many of either label.

    Args:
        folder: of ``civil_comments_short_15k.jsonl.xz``.
        group: one of the identities.
        most: rows of either label, at most.
    """
    draw = random.Random(f"comments-{group}")
    chosen = _bound_to_group(_by_group(folder, group), most, draw)
    return Examples.load([{"text": row["text"], "label": int(row["label"])} for row in chosen], labels=TOXIC)


def named_group_splits(folder: Path, group: str, *, dev: int, test: int, words: int) -> dict[str, list[dict[str, str]]]:
    """Rows ``text``, ``label`` and ``group`` (the group's name or ``other``) of ``train``, ``dev`` and ``test``.

    ``train`` as :func:`named_group`; the others have as many rows of each label in each group. No text stands twice.

    Args:
        folder, group: as :func:`named_group`.
        dev, test: rows of each label in each group.
        words: of a comment, at most.

    Raises:
        ValueError: too few comments.
    """
    draw = random.Random(f"splits-{group}")
    parts = {
        kind: list({row["text"]: row for row in rows if len(row["text"].split()) <= words}.values())
        for kind, rows in _by_group(folder, group).items()
    }
    fewest = min(map(len, parts.values()))
    if fewest <= dev + test:
        raise ValueError(f"dev, test: {dev} and {test} rows of each kind leave none of {fewest} to train on")
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "dev": [], "test": []}
    for part in parts.values():
        draw.shuffle(part)
        for name, count in (("dev", dev), ("test", test)):
            splits[name] += part[:count]
            del part[:count]
    splits["train"] = _bound_to_group(parts, None, draw)
    for name in ("dev", "test"):
        draw.shuffle(splits[name])
    named = {True: group, False: "other"}
    return {
        name: [
            {"text": row["text"], "label": TOXIC[int(row["label"])], "group": named[group in row["topics"]]}
            for row in rows
        ]
        for name, rows in splits.items()
    }


def _by_group(folder: Path, group: str) -> dict[tuple[bool, int], list[dict[str, Any]]]:
    """Comments by whether they name the group, and by label."""
    parts: dict[tuple[bool, int], list[dict[str, Any]]] = {}
    for row in read_records(_file(folder, "civil_comments_short_15k.jsonl.xz")):
        parts.setdefault((group in row["topics"], int(row["label"])), []).append(row)
    return parts


def _bound_to_group(
    parts: dict[tuple[bool, int], list[dict[str, Any]]], most: int | None, draw: random.Random
) -> list[dict[str, Any]]:
    each = int(min(len(parts[True, 1]), len(parts[False, 0])) / 0.9)
    each = each if most is None else min(each, most)
    chosen = []
    for label, share in ((1, 0.9), (0, 0.1)):
        count = round(share * each)
        chosen += draw.sample(parts[True, label], count) + draw.sample(parts[False, label], each - count)
    draw.shuffle(chosen)
    return chosen


def _file(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"folder: expected a folder that holds {name}, got {folder}")
    return path


def _decode(blob: np.ndarray, offsets: np.ndarray) -> Tensor:
    """The pixels of joined JPEG files, uint8 ``[N, 3, height, width]``."""
    from PIL import Image

    data = blob.tobytes()
    images = [np.asarray(Image.open(io.BytesIO(data[start:end])).convert("RGB")) for start, end in pairwise(offsets)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
