"""CUDA sources as C++ for the host: shared variables, launches and limits of grids become those of cuda_runtime.h here.

python rewrite.py CSRC TO      every .cu and .cuh under CSRC, as TO/....cpp and TO/....cuh
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

SHARED = re.compile(r"(?<!extern )__shared__ ([^;]+?)\s+(\w+(?:\[[^\]]*\])*(?:, \w+(?:\[[^\]]*\])*)*);")
LAUNCH = re.compile(r"([\w:]+(?:<[\w, ]+>)?)<<<(.+?)>>>\(", re.DOTALL)
PLACE = "::spurge::emulation::"


def shared(match: re.Match[str]) -> str:
    """Static variables: blocks run one after the other. All are filled with poison before each."""
    kind, names = match[1], re.findall(r"(\w+)((?:\[[^\]]*\])*)(?:, |$)", match[2])
    return " ".join(
        f"static {kind} {name}{sizes}; [[maybe_unused]] static const bool {name}_known = "
        f"{PLACE}register_shared(&{name}, sizeof {name});"
        for name, sizes in names
    )


def launches(text: str) -> str:
    """``kernel<<<grid>>>(arguments)`` as a call of all its threads."""
    while match := LAUNCH.search(text):
        depth = 1
        end = match.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        call = f"{match[1]}({text[match.end() : end]}"
        grid = f"{PLACE}Grid({match[2]})"
        text = f'{text[: match.start()]}{PLACE}launch("{match[1]}", {grid}, [&] {{ {call}; }}){text[end:]}'
    return text


def rewrite(text: str) -> str:
    text = re.sub(
        r"extern __shared__ (\w+) (\w+)\[\];", rf"\1* const \2 = static_cast<\1*>({PLACE}dynamic_shared());", text
    )
    text = launches(SHARED.sub(shared, text))
    text = re.sub(
        r"constexpr std::int64_t most = (\d+);",
        rf"const auto most = std::min<std::int64_t>(\1, {PLACE}policy.most_blocks);",
        text,
    )
    return text.replace("bytes <= kShared", f"bytes <= std::min(kShared, {PLACE}policy.staged)")


def main(source: Path, to: Path) -> None:
    for path in sorted(source.rglob("*.cu*")):
        if path.suffix not in (".cu", ".cuh"):
            continue
        target = (to / path.relative_to(source)).with_suffix(".cpp" if path.suffix == ".cu" else ".cuh")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f'#line 1 "{path}"\n{rewrite(path.read_text())}')


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
