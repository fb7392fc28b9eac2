"""A memory budget holds for long texts: peaks of a process of its own, above what it held with the model loaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

MEASURED = """
import ctypes, gc, sys
from pathlib import Path
import torch
from transformers import BertConfig, BertForSequenceClassification
from spurge.engine.cascade.cascade import Cascade

def held(field):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if field in line)

torch.set_num_threads(1)
sizes = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 6}
model = BertForSequenceClassification(BertConfig(vocab_size=99, max_position_embeddings=1024, **sizes)).eval()
def located(tokens, memory):
    inputs = {"input_ids": torch.arange(2 * tokens).view(2, tokens) % 99}
    settings = {"nodes": 4, "path": "layer"} if sys.argv[3] == "layer" else {"exact": 8, "audit": 8}
    Cascade(model, memory=memory, **settings).attribute(inputs, lambda rows: rows.logits[:, 0])
located(8, "64MiB")  # what is loaded and kept by the first call of all
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = held("VmRSS:")
located(int(sys.argv[1]), sys.argv[2])
print(held("VmHWM:") - before)
"""


def child(tokens: int, memory: str, path: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-c", MEASURED, str(tokens), memory, path]
    return subprocess.run(call, env=env, check=False, capture_output=True, text=True)


@pytest.mark.parametrize("path", ["gradient", "layer"])
def test_the_budget_holds_for_long_texts_and_the_need_is_said_right(path: str) -> None:
    tokens = 512
    refused = child(tokens, "16MiB", path)
    assert refused.returncode == 1
    need = re.search(rf"memory: one example of {tokens} tokens needs (\d+) MiB, got 16 MiB", refused.stderr)
    assert need, refused.stderr[-2000:]
    for budget in (int(need[1]), 2 * int(need[1])):
        done = child(tokens, f"{budget}MiB", path)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) <= 1024 * budget
