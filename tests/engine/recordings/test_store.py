"""The files of a recording: one header for all blocks, and every block checked before it is read."""

from __future__ import annotations

import json

import pytest
import torch

from spurge.engine.base.files import FileError, canonical_json, fingerprint, read_json, write_json
from spurge.engine.recordings.store import SCHEMA, Store

MADE = {"model": "abc", "block": 4, "tokens": "t", "generate": 1, "neurons": False, "storage": "float32"}
SITES = [{"name": "x", "width": 1, "hidden": 3}]
HEADER = {"made": MADE, "prompts": [*"abcdefghij"], "rows": 2, "sites": SITES}


def filled(folder) -> Store:
    store = Store.begin(folder, HEADER)
    for number in range(len(store)):
        rows = store.rows(number)
        values = torch.arange(3.0) + torch.tensor(rows)[:, None] * 10
        store.write(number, {"outputs/x": values}, [f"row {row}" for row in rows])
    return store


def test_blocks_cover_all_rows_once(tmp_path):
    store = Store.begin(tmp_path, HEADER)
    assert [list(store.rows(number)) for number in range(len(store))] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert store.missing() == store.unfinished() == [0, 1, 2]


def test_columns_and_texts_come_back(tmp_path):
    filled(tmp_path)
    store = Store.open(tmp_path)
    want = torch.arange(10.0)[:, None] * 10 + torch.arange(3.0)
    assert torch.equal(store.read("outputs/x", 3), want)
    assert torch.equal(store.read("outputs/x", 3, slice(1, 2)), want[:, 1:2])
    assert store.read("outputs/x", 3, slice(2, 1)).shape == (10, 0)
    assert store.texts() == tuple(f"row {row}" for row in range(10))
    with pytest.raises(ValueError, match="part: expected a slice without a step"):
        store.read("outputs/x", 3, slice(None, None, -1))


def test_a_folder_that_was_begun_keeps_its_header(tmp_path):
    Store.begin(tmp_path, HEADER)
    again = Store.begin(tmp_path, HEADER | {"rows": 1})  # for information only
    assert again.header["rows"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"made": MADE | {"model": "xyz"}}, "model: .* holds a recording of another model"),
        ({"made": MADE | {"block": 5}}, "block: .* was begun with 4, got 5"),
        ({"made": MADE | {"tokens": "u"}}, "tokenizer: makes other tokens"),
        ({"prompts": [*"abcdefghix"]}, "other prompts, the first at 9"),
        ({"prompts": [*"abc"]}, "a recording of 10 prompts, got 3"),
    ],
)
def test_another_job_is_refused(change, message, tmp_path):
    Store.begin(tmp_path, HEADER)
    with pytest.raises(ValueError, match=message):
        Store.begin(tmp_path, HEADER | change)


def test_a_header_of_a_newer_schema_is_refused(tmp_path):
    filled(tmp_path)
    header = read_json(tmp_path / "recording.json") | {"schema": SCHEMA + 1, "spurge": "9.0"}
    write_json(tmp_path / "recording.json", header)
    for use in (Store.open, lambda folder: Store.begin(folder, HEADER)):
        with pytest.raises(FileError, match=f"schema {SCHEMA + 1}, written by Spurge 9.0, is newer than this Spurge"):
            use(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON file"),
        ("[]", "not the header of a recording"),
        ("{}", "not the header of a recording"),
        ('{"kind": "scores", "schema": 1}', "holds 'scores', expected 'recording'"),
        ('{"kind": "recording", "schema": 1}', "changed since it was written"),
        ('{"kind": "recording", "schema": "?"}', "changed since it was written"),
    ],
)
def test_other_headers_are_refused(text, message, tmp_path):
    (tmp_path / "recording.json").write_text(text)
    with pytest.raises(FileError, match=f"recording.json: {message}"):
        Store.open(tmp_path)


def test_a_changed_header_is_refused(tmp_path):
    filled(tmp_path)
    path = tmp_path / "recording.json"
    path.write_text(path.read_text().replace('"c"', '"C"'))
    with pytest.raises(FileError, match="SHA-256 does not fit"):
        Store.open(tmp_path)


def test_a_folder_without_header(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileError, match=r"not the folder of a recording: it has no recording\.json"):
            Store.open(folder)


def test_a_lost_header_is_written_again_and_the_blocks_still_belong(tmp_path):
    filled(tmp_path)
    (tmp_path / "recording.json").unlink()
    assert Store.begin(tmp_path, HEADER).unfinished() == []


def test_blocks_of_another_recording_are_refused(tmp_path):
    filled(tmp_path / "a")
    other = Store.begin(tmp_path / "b", HEADER | {"prompts": [*"ABCDEFGHIJ"]})
    other.path(1).write_bytes(Store.open(tmp_path / "a").path(1).read_bytes())
    with pytest.raises(FileError, match=r"block-00001.safetensors: is a block of another recording.*; call record"):
        other.check(1)
    with pytest.raises(FileError, match=r"block-00000.safetensors: is missing; call record"):
        other.check(0)
    with pytest.warns(UserWarning, match=r"made anew: .*block-00001.safetensors: is a block of another"):
        assert other.unfinished() == [0, 1, 2]


def test_a_block_is_verified_once(tmp_path):
    filled(tmp_path)
    store = Store.open(tmp_path)
    store.check(0)
    damaged = bytearray(store.path(0).read_bytes())
    damaged[-1] ^= 1
    store.path(0).write_bytes(damaged)
    store.check(0)
    with pytest.raises(FileError, match="SHA-256 does not fit"):
        Store.open(tmp_path).check(0)


def test_the_fingerprint_covers_header_and_blocks(tmp_path):
    marks = {filled(tmp_path / "a").fingerprint(), filled(tmp_path / "same").fingerprint()}
    assert len(marks) == 1
    filled(tmp_path / "b").write(2, {"outputs/x": torch.zeros(2, 3)}, ["", ""])
    marks.add(Store.open(tmp_path / "b").fingerprint())
    assert len(marks) == 2


def test_the_header_is_what_its_mark_says(tmp_path):
    header = filled(tmp_path).header
    content = {key: value for key, value in header.items() if key != "sha256"}
    assert header["sha256"] == fingerprint(canonical_json(content))
    assert json.loads((tmp_path / "recording.json").read_text()) == header


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"made": MADE | {"block": 0}}, "block: need at least 1, got 0"),
        ({"made": MADE | {"storage": "int8"}}, "storage: expected one of float16, bfloat16, float32, got 'int8'"),
        ({"made": [1]}, "made: expected dict, got list"),
        ({"made": {"block": 4}}, "'generate' is missing"),
        ({"prompts": []}, "prompts: expected at least 1, got 0"),
        ({"prompts": [1]}, "prompts: expected str, got int"),
        ({"sites": [{"name": "x", "width": 1}]}, "'hidden' is missing"),
        ({"rows": "2"}, "rows: expected an integer, got str"),
    ],
)
def test_a_header_of_another_structure_is_refused(change, message, tmp_path):
    header = {"kind": "recording", "schema": SCHEMA, **HEADER, **change}
    write_json(tmp_path / "recording.json", {**header, "sha256": fingerprint(canonical_json(header))})
    with pytest.raises(FileError, match=f"recording.json: not the header of a recording: {message}"):
        Store.open(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "texts", "message"),
    [
        ({}, ["a"] * 4, "outputs/x: expected torch.float32, got NoneType"),
        ({"outputs/x": torch.zeros(4, 2)}, ["a"] * 4, r"outputs/x: expected shape \[4, 3\], got \[4, 2\]"),
        ({"outputs/x": torch.zeros(4, 3).half()}, ["a"] * 4, "outputs/x: expected torch.float32, got torch.float16"),
        ({"outputs/x": torch.zeros(4, 3)}, ["a"], "texts: expected one for each of 4 prompts"),
        ({"outputs/x": torch.zeros(4, 3)}, None, "'texts' is missing"),
    ],
)
def test_a_block_of_another_structure_is_refused(tensors, texts, message, tmp_path):
    store = Store.begin(tmp_path, HEADER)
    store.write(0, tensors, texts)
    with pytest.raises(FileError, match=f"block-00000.safetensors: not a block of this recording: {message}"):
        store.check(0)
