"""Jobs of several ranks: real processes, started by torchrun on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def torchrun(ranks: int, *command: object, limit: float = 120) -> subprocess.CompletedProcess[str]:
    """Runs ``command`` (a script or ``-m module``, and arguments) as so many ranks of one thread each.

    Raises:
        subprocess.TimeoutExpired: the job hangs.
    """
    launch = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", ranks, "--master-addr", "127.0.0.1")
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    words = [str(word) for word in (*launch, "--master-port", _free_port(), *command)]
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        try:
            out, err = job.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            job.terminate()  # torchrun then ends its ranks
            raise
    return subprocess.CompletedProcess(words, job.returncode, out, err)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
