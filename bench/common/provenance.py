"""Whether a run's results can be kept: only those that name a clean commit can."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def warning(commit: str | None) -> str | None:
    """One line on why results that name ``commit`` cannot be kept, with the changed files; None where they can."""
    if commit is None:
        return "not to be kept: the results name no commit, since the package is not that of a checkout"
    if not commit.endswith("-dirty"):
        return None
    command = ["git", "-C", str(ROOT), "diff", "--name-only", "HEAD"]
    changed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    return f"not to be kept: changed since commit {commit[:10]}: {', '.join(changed)}"
