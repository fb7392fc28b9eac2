"""``python -m spurge``: the command line; without arguments, the doctor."""

from __future__ import annotations

import sys

from spurge.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["doctor"]))
