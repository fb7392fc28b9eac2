"""Blocks of a job are found again, by that job only."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from spurge.engine.base.files import FileError
from spurge.engine.base.resume import Blocks
from spurge.engine.base.tensor_files import Contents, read_tensors


def blocks(folder: Path | None, fingerprint: str = "mine") -> Blocks:
    return Blocks(folder, "sum block", "a block of a sum", fingerprint)


def total(file: Contents) -> float:
    return float(file.tensors["parts"].sum()) + float(file.value("more"))


def test_a_block_is_found_again(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    assert blocks(folder).find("block-0", total) is None
    blocks(folder).keep("block-0", {"parts": torch.ones(3)}, more="4")
    assert blocks(folder).find("block-0", total) == 7
    assert blocks(folder).find("block-1", total) is None
    _, texts = read_tensors(folder / "block-0.safetensors", "sum block")
    assert texts["fingerprint"] == "mine"


def test_without_a_folder_nothing_is_kept() -> None:
    blocks(None).keep("block-0", {"parts": torch.ones(3)}, more="4")
    assert blocks(None).find("block-0", total) is None


def test_blocks_of_another_job_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    blocks(tmp_path).keep("block-0", {"parts": torch.ones(3)})
    with pytest.raises(ValueError, match=r"^resume: .*block-0.safetensors was made with other settings, data or model"):
        blocks(tmp_path, "other").find("block-0", total)
    with pytest.raises(FileError, match="not a block of a sum: 'more' is missing"):
        blocks(tmp_path).find("block-0", total)
    (tmp_path / "block-0.safetensors").write_bytes(b"{")
    with pytest.raises(FileError, match="not a safetensors file"):
        blocks(tmp_path).find("block-0", total)


def test_what_a_killed_run_was_writing_goes_when_the_job_goes_on(tmp_path: Path) -> None:
    blocks(tmp_path).keep("block-0", {"parts": torch.ones(3)}, more="4")
    (tmp_path / ".block-1.safetensors.0123abcd.spurge-draft").write_bytes(b"half")
    blocks(tmp_path)
    assert os.listdir(tmp_path) == ["block-0.safetensors"]
