"""Causal words named by a language model, asked through any function from prompt to answer (MacU, section 3.1.1)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from spurge.engine.base.checks import integer
from spurge.engine.data.examples import Examples
from spurge.engine.data.words import as_phrase, split_words

# The first two sentences are the paper's prompt.
PROMPT = (
    "This is a {task} task with the labels of {labels}. "
    "Extract tokens that are causally correlated to the different labels from the text in the data.\n"
    "Take single words or short phrases exactly as they stand in the text, and only those whose meaning speaks for a "
    "label. Answer with one JSON object that has a list of tokens for each label: {shape}\n\n"
    "Data:\n{texts}\n"
)
_BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s*")
_MARKS = " \t\"'`“”‘’«»*_.:;#{}[]"


def prompt(texts: Sequence[str | tuple[str, str]], labels: Sequence[str], task: str) -> str:
    """The question about some texts; blanks inside a text are joined, so that each is one line."""
    lines = [" / ".join(text) if isinstance(text, tuple) else text for text in texts]
    listed = "\n".join(f"{number}. {' '.join(line.split())}" for number, line in enumerate(lines, 1))
    shape = json.dumps({label: ["..."] for label in labels}, ensure_ascii=False)
    return PROMPT.format(task=task, labels=", ".join(labels), shape=shape, texts=listed)


def _json_answer(answer: str, labels: dict[str, str]) -> dict[str, list[str]] | None:
    """Tokens per label from the first JSON object in the answer that has a label, wherever it stands."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\{", answer):
        try:
            value, _ = decoder.raw_decode(answer, match.start())
        except (ValueError, RecursionError):
            continue
        out: dict[str, list[str]] = {}
        for key, tokens in value.items() if isinstance(value, dict) else ():
            label = labels.get(key.strip().casefold())
            tokens = [tokens] if isinstance(tokens, str) else tokens
            if label is not None and isinstance(tokens, list):
                out.setdefault(label, []).extend(token for token in tokens if isinstance(token, str))
        if out:
            return out
    return None


def _label_in(head: str, labels: dict[str, str], *, whole: bool) -> str | None:
    """The label that a line's head is, or (unless ``whole``) the only one it mentions: "Tokens for positive"."""
    text = head.strip(_MARKS).casefold()
    if text in labels or whole:
        return labels.get(text)
    mentioned = [label for name, label in labels.items() if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)]
    return mentioned[0] if len(mentioned) == 1 and len(text.split()) <= 6 else None


def parse(answer: str, labels: Sequence[str]) -> dict[str, list[str]]:
    """Tokens per label from an answer: a JSON object, also inside prose or a code fence, or lines.

    Lines are ``label: token, token`` or a line with the label followed by tokens, with or without bullets; JSON that
    was cut off reads as lines. Labels are recognised whatever their case. No label at all gives an empty dict.

    >>> parse("Sure!\\nPositive: charm, well-made\\nNegative:\\n- fail", ["negative", "positive"])
    {'positive': ['charm', 'well-made'], 'negative': ['fail']}
    """
    names = {label.casefold(): label for label in labels}
    found = _json_answer(answer, names)
    if found is not None:
        return found
    out: dict[str, list[str]] = {}
    current: str | None = None
    for line in answer.splitlines():
        line = _BULLET.sub("", line)
        head, colon, rest = line.partition(":")
        label = _label_in(head, names, whole=not colon)
        if label is not None:
            current, line = label, rest
        elif colon:
            # "fail: it speaks of failure" names a token; "Some more remarks:" ends the list.
            current, line = (current, head) if rest.strip() else (None, "")
        if current is not None:
            tokens = [token.strip(_MARKS) for token in re.split(r"[,;]", line)]
            out.setdefault(current, []).extend(token for token in tokens if token)
    return out


def collect(
    ask: Callable[[str], str],
    examples: Examples,
    labels: Sequence[str],
    task: str,
    batch_size: int,
    progress: bool,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Asks about all texts. Rows of a review file (``count``: answers that named the word), and provenance.

    Raises:
        ValueError: no answer could be read.
        TypeError: ``ask`` cannot be called, or gives something other than text.
    """
    if not callable(ask):
        raise TypeError(f"ask: expected a function from prompt to answer, got {type(ask).__name__}")
    if len({label.casefold() for label in labels}) < len(labels):
        raise ValueError(f"labels: names must differ in more than case, got {tuple(labels)}")
    batches = list(examples.batches(integer("batch_size", batch_size, 1)))
    named: dict[str, Counter[str]] = {}
    answers: list[str] = []
    unread = strange = 0
    for batch in tqdm(batches, desc="asking", disable=not progress):
        answer = ask(prompt(batch.texts, labels, task))
        if not isinstance(answer, str):
            raise TypeError(f"ask: expected text as answer, got {type(answer).__name__}")
        answers.append(answer)
        found = parse(answer, labels)
        unread += not found
        # One blank around each text keeps matches to whole words and to one text.
        texts = [f" {' '.join(split_words(part or ''))} " for row in batch for part in (row.text, row.pair)]
        for label, tokens in found.items():
            for word in {" ".join(as_phrase(token) or ()) for token in tokens}:
                if word and any(f" {word} " in text for text in texts):
                    named.setdefault(word, Counter())[label] += 1
                else:
                    strange += 1
    if unread == len(batches):
        raise ValueError(f"ask: no answer could be read; expected JSON or 'label: tokens', got {answers[0]!r:.200}")
    rows = []
    tied = 0
    for word in sorted(named):
        (label, count), *others = named[word].most_common()
        if others and others[0][1] == count:
            tied += 1
            continue
        rows.append(
            {"word": word, "label": label, "count": count, "log_odds": "", "z": "", "role": "causal", "keep": "yes"}
        )
    info = {
        "prompt": prompt(["..."], labels, task),
        "data": examples.fingerprint(),
        "batch_size": batch_size,
        "answers": answers,
        "unread_answers": unread,
        "not_in_the_texts": strange,
        "tied_between_labels": tied,
    }
    return rows, info
