"""Word lists that others made: tables of words with labels, and installed lexicon packages."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spurge.engine.base import files
from spurge.engine.base.checks import choice, warn
from spurge.engine.data.rows import check_names, of_file, read_column, read_label, read_text
from spurge.engine.data.table_files import read_records
from spurge.engine.data.words import as_phrase

# name -> module, file in it (word, tab, score, ...), what pip calls it
_PACKAGES = {
    "vader": ("vaderSentiment", "vader_lexicon.txt", "vaderSentiment"),
    "afinn": ("afinn", "data/AFINN-en-165.txt", "afinn"),
}


def without_conflicts(causal: Mapping[str, Iterable[str]]) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Words of exactly one label, and counts of the rest: ``not_words`` (emoticons, "a+") and ``of_two_labels``.

    Warns where words are left out because two labels claim them.
    """
    owners: dict[str, set[str]] = {}
    strange = 0
    for label, words in causal.items():
        for word in words:
            phrase = as_phrase(word)
            strange += phrase is None
            if phrase is not None:
                owners.setdefault(" ".join(phrase), set()).add(label)
    shared = sorted(word for word, labels in owners.items() if len(labels) > 1)
    if shared:
        shown = ", ".join(shared[:5]) + (", ..." if len(shared) > 5 else "")
        # Past the helper and GoldenTokens' two calls, to the line of the user.
        warn(f"{len(shared)} words of two labels are left out: {shown}")
    clear = {label: [word for word, labels in owners.items() if labels == {label}] for label in causal}
    return clear, {"not_words": strange, "of_two_labels": len(shared)}


def from_table(
    path: str | os.PathLike[str],
    word: str,
    label: str,
    labels: Sequence[str] | Mapping[str, str] | None,
    irrelevant: Sequence[str],
) -> tuple[dict[str, list[str]], list[str], dict[str, Any]]:
    """Causal words per label, irrelevant words and provenance from the rows of a table."""
    if isinstance(irrelevant, str):
        raise TypeError(f"irrelevant: expected a list of names, got one str {irrelevant!r}")
    found: dict[str, list[str]] = {}
    with of_file(path):
        for number, row in enumerate(read_records(path), 1):
            value = read_text(read_column(row, word, number), word, number)
            found.setdefault(str(read_label(read_column(row, label, number), number)), []).append(value)
    if not found:
        raise ValueError(f"{path}: no rows")
    rest = [entry for name in irrelevant for entry in found.pop(name, ()) if as_phrase(entry)]
    if labels is None:
        mapping = {name: name for name in sorted(found)}
    else:
        mapping = dict(labels) if isinstance(labels, Mapping) else {name: name for name in check_names(labels)}
    absent = [name for name in mapping if name not in found]
    if absent:
        raise ValueError(f"labels: {absent[0]!r} is not in the table, it has {sorted(found)}")
    causal: dict[str, list[str]] = {}
    for old, new in mapping.items():
        causal.setdefault(new, []).extend(found[old])
    info = {"file": Path(path).name, "sha256": files.fingerprint(Path(path).read_bytes())}
    return causal, rest, info


def from_package(name: str, labels: Sequence[str], strength: float) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """Words of low and of high score from an installed lexicon package, and provenance."""
    choice("name", name.lower() if isinstance(name, str) else name, sorted(_PACKAGES))
    if not isinstance(strength, (int, float)) or not 0 <= strength < math.inf:
        raise ValueError(f"strength: need at least 0, got {strength!r}")
    module, inner, pip = _PACKAGES[name.lower()]
    # Its folder is enough: importing the package would run its code and need its dependencies.
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the lexicon {name!r} is not installed: pip install {pip}", name=module)
    path = Path(next(iter(spec.submodule_search_locations))) / inner
    data = path.read_bytes()
    causal: dict[str, list[str]] = {label: [] for label in labels}
    for line, text in enumerate(data.decode("utf-8").splitlines(), 1):
        if not text.strip():
            continue
        word, _, rest = text.partition("\t")
        try:
            score = float(rest.partition("\t")[0])
        except ValueError as error:
            raise files.FileError(f"{path}: line {line}: expected a word, a tab and a score") from error
        if abs(score) > strength:
            causal[labels[score > 0]].append(word)
    return causal, {"lexicon": name.lower(), "sha256": files.fingerprint(data), "strength": float(strength)}
