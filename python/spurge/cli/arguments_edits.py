"""Arguments of ``evaluate``, ``apply``, ``export`` and ``report``: what an edit does, and how it is handed on."""

from __future__ import annotations

import argparse

from spurge.cli.arguments import add_data, add_golden, add_model, positive

_ANY = "transformers folder of a classifier or causal language model, or a GGUF file of one of the latter"


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """``spurge evaluate``: accuracy on test sets, with an edit and its controls."""
    parser.description = (
        "Accuracy on test sets: without an edit, with it, with a moved threshold in its place, with random neurons or "
        "weights, and for an edit of neurons with these erased."
    )
    add_model(parser, verbalizer=True)
    add_data(parser, several=True)
    cross = "judge each class in each group, for the worst group; areas under the curve stay within groups"
    parser.add_argument("--cross-groups", action="store_true", help=cross)
    edit = "edit to measure, without NAME= called 'edit'; without --edit only the model is"
    parser.add_argument("--edit", metavar="NAME=FILE", help=edit)
    located = "erase its spurious neurons as a control, not the edit's own; eta reads texts as its settings do"
    parser.add_argument("--located", metavar="FILE", help=located)
    parser.add_argument(
        "--top-k", type=int, metavar="K", help="correlation tokens of a text, for eta (as located, or 5)"
    )
    parser.add_argument("--force", action="store_true", help="apply an edit that was made for other weights")
    parser.add_argument("--no-controls", action="store_true", help="measure the edit alone")
    random = "draws of random neurons or weights (%(default)s)"
    parser.add_argument("--draws", type=int, default=20, metavar="N", help=random)
    beside = "another edit to measure, such as a repair or a new last layer, as often as there are edits"
    parser.add_argument("--beside", metavar="NAME=FILE", action="append", default=[], help=beside)
    cue = "words or phrases: a control deletes them from the texts, and texts without them should stay as they are"
    parser.add_argument("--cue", metavar="A,B", help=cue)
    untouched = "labelled texts whose answers should stay as they are, in the columns of --data"
    parser.add_argument("--untouched", metavar="FILE", help=untouched)
    changed = "write texts whose answer the edit changes, and what their words do to it (JSONL, for the report)"
    parser.add_argument("--changed", metavar="FILE", help=changed)
    number = "random texts of each set in --changed (%(default)s)"
    parser.add_argument("--changed-texts", type=positive, default=20, metavar="N", help=number)
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="for intervals (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="texts in a batch (%(default)s)")
    parser.add_argument("--max-length", type=positive, metavar="N", help="tokens a text is cut to")
    parser.add_argument("--memory", metavar="SIZE", help="budget, e.g. 256MiB")
    add_golden(parser, required=False)


def add_apply(parser: argparse.ArgumentParser) -> None:
    """``spurge apply``: a plain checkpoint with the edit folded in."""
    parser.description = "Writes a copy of a model's folder with an edit folded into its weights: a plain checkpoint."
    add_model(parser, what=_ANY)
    parser.add_argument("--edit", metavar="FILE", required=True, help="edit to fold in")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="new folder; must not exist")
    parser.add_argument("--force", action="store_true", help="apply an edit that was made for other weights")


def add_export(parser: argparse.ArgumentParser) -> None:
    """``spurge export``: an adapter that peft loads."""
    parser.description = (
        "Writes an edit as an adapter that peft loads on the model's own folder: "
        "PeftModel.from_pretrained(model, FOLDER) computes what the model with the edit folded in does."
    )
    add_model(parser, what=_ANY)
    parser.add_argument("--edit", metavar="FILE", required=True, help="edit to export")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="new folder; must not exist")
    kinds = (
        "lora: any edit; ia3: gates, as vectors; head: an edit of the classifier's head alone, beside an adapter that "
        "does nothing (%(default)s)"
    )
    parser.add_argument("--format", choices=("lora", "ia3", "head"), default="lora", help=kinds)
    rank = "of lora: the highest rank of a layer (%(default)s)"
    parser.add_argument("--max-rank", type=positive, default=512, metavar="N", help=rank)
    nearest = "of lora: take the nearest change of rank N where none is exact, and say its error"
    parser.add_argument("--truncate", action="store_true", help=nearest)
    parser.add_argument("--force", action="store_true", help="export an edit that was made for other weights")


def add_report(parser: argparse.ArgumentParser) -> None:
    """``spurge report``: one page of a job."""
    parser.description = (
        "Writes one HTML page that needs nothing else of what lies in folders: what was found, located, edited and "
        "measured, the texts with another answer, and the commands that repeat it."
    )
    what = "folder with what commands wrote (--json, --out, --changed), or one such file"
    parser.add_argument("folders", metavar="FOLDER", nargs="+", help=what)
    parser.add_argument("--out", metavar="FILE", required=True, help="the page, such as report.html")
    parser.add_argument("--title", metavar="TEXT", default="What the model leaned on", help="its heading (%(default)s)")
    card = "also an edit card for model hubs, .md or .json, as often as there are such files"
    parser.add_argument("--card", metavar="FILE", action="append", default=[], help=card)
