"""``spurge bench``: see `spurge.bench`."""

from __future__ import annotations

import argparse

import torch

from spurge.bench import kernels
from spurge.cli.inputs import prepare, write_results
from spurge.engine.base.checks import device_of
from spurge.report.results import Results


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints the table."""
    names = kernels.chosen(arguments.kernels)
    prepare(arguments)
    device = str(device_of("device", arguments.device))
    results = Results("bench", {"kernels": names, "device": device, "threads": torch.get_num_threads()})
    results.extend(kernels.run(names, device, lambda line: print(line, flush=True)))
    print(
        "rate: bytes moved, each input and output counted once, or time per element\n"
        "copy: beside a copy of as many bytes; torch: times as fast as eager torch\n"
        f"{device}, {kernels.counted(torch.get_num_threads())}"
    )
    write_results(arguments, results)
    return 0
