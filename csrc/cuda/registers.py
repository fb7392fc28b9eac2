"""Writes each kernel's registers and spills into csrc/README.md, from what a build said.

cmake -S . -B BUILD -DSPURGE_CUDA=ON -DCMAKE_CUDA_FLAGS=-Xptxas=-v
cmake --build BUILD | python csrc/cuda/registers.py
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- registers.py: begin -->\n", "<!-- registers.py: end -->\n"

KERNEL = re.compile(
    r"Compiling entry function '(?:void )?(?P<name>[^']+)' for 'sm_(?P<architecture>\d+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def short(name: str) -> str:
    """``op::kernel<4, float>`` of a kernel's whole name."""
    name = re.sub(r"spurge::|\(anonymous namespace\)::|\((?:int|bool)\)", "", name)
    depth = 0
    for at, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and not depth:
            return name[:at]
    return name


def kernels(text: str) -> dict[tuple[str, int], str]:
    """Of each kernel and architecture: registers, with the bytes of spill stores and loads where there are any."""
    text = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout
    found = {}
    for match in KERNEL.finditer(text):
        stores, loads = int(match["stores"]), int(match["loads"])
        spills = f" ({stores} + {loads})" if stores + loads else ""
        found[short(match["name"]), int(match["architecture"])] = match["registers"] + spills
    return found


def table(found: dict[tuple[str, int], str]) -> str:
    architectures = sorted({architecture for _, architecture in found})
    lines = [["kernel", *(f"sm_{a}" for a in architectures)], ["---"] * (1 + len(architectures))]
    for name in sorted({name for name, _ in found}):
        lines.append([f"`{name}`", *(found.get((name, a), "") for a in architectures)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    found = kernels(sys.stdin.read())
    if not found:
        sys.exit("stdin: expected the output of a build with -Xptxas=-v, got no kernel")
    text = README.read_text()
    README.write_text(text[: text.index(BEGIN) + len(BEGIN)] + table(found) + text[text.index(END) :])


if __name__ == "__main__":
    main()
