"""Arguments of ``demo`` and ``doctor``: does it work here."""

from __future__ import annotations

import argparse


def add_demo(parser: argparse.ArgumentParser) -> None:
    """``spurge demo``: a planted shortcut, learned and cut."""
    parser.description = (
        "Fine-tunes a small language model on sentences with a planted shortcut, locates the neurons that carry it, "
        "edits them by the paper's procedure and by the best setting, and measures both with their controls."
    )
    parser.add_argument("--out", metavar="DIR", default="spurge-demo", help="folder for all files (%(default)s)")
    parser.add_argument("--keep-model", action="store_true", help="also write the fine-tuned model (90 MB)")


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """``spurge doctor``: what was built and whether it works."""
    parser.description = "Prints versions, what was compiled in and devices; checks every kernel against its reference."
