"""Arguments of ``find``: what a model leans on."""

from __future__ import annotations

import argparse

from spurge.cli.arguments import add_data, add_model, positive

#: Options of ``find`` that `spurge.find` takes.
FIND_SETTINGS = (
    *("candidates", "texts", "least_count", "least_lean", "level", "passes", "topics"),
    *("batch_size", "max_length", "memory", "resume"),
)


def add_find(parser: argparse.ArgumentParser) -> None:
    """``spurge find``: a ranked table of what a model leans on, for review."""
    parser.description = (
        "Ranks what a classifier leans on, from its labelled texts alone: words, phrases, word pairs, overlap, "
        "negation, length, punctuation, columns and topics. Writes a table with a proposed role for each; change "
        "role, label and keep in it, and give it to --golden of the other commands, or to --reviewed here. With "
        "--features in place of --model and --data: slices of each class, of any model, and their errors."
    )
    add_model(parser, verbalizer=True, required=False)
    add_data(parser, required=False)
    parser.add_argument("--features", metavar="FILE", help="features of any model (spurge features): find slices")
    parser.add_argument("--columns", metavar="A,B", help="columns beside the text that are candidates, too")
    parser.add_argument("--lexicon", metavar="NAME|FILE", help="vader or afinn if installed, or a table of words")
    parser.add_argument("--out", metavar="FILE", help="where to write the table, e.g. found.tsv")
    parser.add_argument("--reviewed", metavar="FILE", help="a table that was reviewed: no search, only what is written")
    spurious = "of a reviewed table: words of it that ought not to decide"
    parser.add_argument("--spurious", metavar="A,B", help=spurious)
    causal = "of a reviewed table: words that ought to decide for a label, in it or not, in place of those it proposes"
    parser.add_argument("--causal", metavar="LABEL=A,B", action="append", default=[], help=causal)
    parser.add_argument("--golden-out", metavar="FILE", help="also write golden words, e.g. golden.json")
    parser.add_argument(
        "--groups-out",
        metavar="FILE",
        help="also write the texts with a column 'group', e.g. grouped.jsonl; of slices, the features in these groups",
    )
    parser.add_argument("--top", type=positive, default=15, metavar="N", help="rows to print (%(default)s)")
    settings = parser.add_argument_group("settings")
    settings.add_argument("--candidates", type=int, metavar="N", help="how many are measured (60)")
    settings.add_argument("--texts", type=int, metavar="N", help="of each candidate, changed in each way (32)")
    settings.add_argument("--least-count", type=int, metavar="N", help="texts that have a candidate (8, or 1 of 200)")
    settings.add_argument("--least-lean", type=float, metavar="X", help="log-odds below which none is spurious (0.1)")
    settings.add_argument("--level", type=float, metavar="Q", help="false discovery rate of spurious ones (0.05)")
    settings.add_argument("--passes", type=int, metavar="N", help="budget of changed texts")
    settings.add_argument("--topics", type=int, metavar="K", help="clusters of texts that are candidates (none)")
    settings.add_argument("--batch-size", type=int, metavar="N", help="texts in a batch (64)")
    settings.add_argument("--max-length", type=int, metavar="N", help="tokens a text is cut to")
    settings.add_argument("--memory", metavar="SIZE", help="budget of a batch, e.g. 256MiB")
    settings.add_argument("--resume", metavar="DIR", help="keep finished passes here; a second run goes on from them")
