"""Arguments of ``demo``, ``bench`` and ``doctor``: does it work here, and how fast."""

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


def add_bench(parser: argparse.ArgumentParser) -> None:
    """``spurge bench``: rates of the kernels."""
    parser.description = (
        "Times every kernel at three sizes, in turn with a copy of as many bytes and with eager torch: within a core's "
        "cache, beyond it, beyond all caches. Needs an idle machine and 2 GB of memory."
    )
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="names or patterns (balance_*); default all")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda or cuda:N (%(default)s)")


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """``spurge doctor``: what was built and whether it works."""
    parser.description = "Prints versions, what was compiled in and devices; checks every kernel against its reference."
