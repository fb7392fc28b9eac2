"""Files are whole or absent, equal inputs give equal bytes, and every damage is refused in one sentence."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spurge.engine.base import files

TENSORS = {"w": torch.arange(12.0).reshape(3, 4), "index": torch.tensor([0, 5]), "none": torch.empty(0)}
META = {"kind": "scores", "info": files.canonical_json({"seed": 1})}

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(json_values)
def test_canonical_json_reads_back(value: object) -> None:
    assert json.loads(files.canonical_json(value)) == value


@given(st.dictionaries(st.text("abc", max_size=3), st.integers(), max_size=6))
def test_canonical_json_ignores_the_order_of_keys(value: dict[str, int]) -> None:
    assert files.canonical_json(value) == files.canonical_json(dict(reversed(value.items())))


def test_canonical_json_takes_arrays_and_tensors() -> None:
    value = {"a": np.float32(0.5), "b": np.arange(2), "c": torch.tensor([[1.0]]), "d": (1, 2)}
    assert files.canonical_json(value) == '{"a":0.5,"b":[0,1],"c":[[1.0]],"d":[1,2]}'


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, np.float32("nan"), torch.tensor(math.nan)])
def test_json_refuses_what_is_not_finite_unless_asked(bad: object) -> None:
    with pytest.raises(ValueError, match=r"value\.x\[0\]: JSON has no"):
        files.canonical_json({"x": [bad]})
    assert files.canonical_json({"x": [bad]}, nan_to_null=True) == '{"x":[null]}'


@pytest.mark.parametrize("bad", [{1: 2}, {"a": {1}}, object(), {"a": b"x"}, {"a": 1j}])
def test_json_refuses_what_has_no_json_form(bad: object) -> None:
    with pytest.raises(TypeError, match="value"):
        files.canonical_json(bad)
    with pytest.raises(ValueError, match="not valid Unicode"):
        files.canonical_json({"a": "\ud800"})


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON has no nan"):
        files.write_json(path, {"a": math.nan})

    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, broken)
            with pytest.raises(KeyboardInterrupt):
                files.write_json(path, {"a": 2})
    assert files.read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_write_follows_links_and_writes_to_devices(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    files.write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    files.write_bytes(os.devnull, b"gone")
    assert not Path(os.devnull).is_file()
    with pytest.raises(IsADirectoryError):
        files.write_bytes(tmp_path, b"x")
    with pytest.raises(FileNotFoundError, match=r"folder .* does not exist"):
        files.write_bytes(tmp_path / "no" / "file", b"x")
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_write_respects_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        files.write_bytes(tmp_path / "a", b"")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000, b"{} x"])
def test_read_json_says_what_is_wrong(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(files.FileError, match=r"a\.json: not a JSON file"):
        files.read_json(tmp_path / "a.json")


def test_tensors_come_back(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    files.write_tensors(path, TENSORS, META)
    tensors, metadata = files.read_tensors(path, "scores")
    assert set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor)
        assert tensors[name].dtype == tensor.dtype
    assert metadata["info"] == META["info"]
    assert metadata["schema"] == str(files.SCHEMA)
    assert safetensors.torch.load_file(path)["w"].shape == (3, 4)  # plain safetensors reads it too


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]),
    text=st.text(st.characters(exclude_categories=["Cs"])),
)
def test_any_dense_tensor_and_text_comes_back(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], dtype: torch.dtype, text: str
) -> None:
    path = tmp_path_factory.mktemp("t") / "a"
    tensor = torch.randint(-3, 4, shape).to(dtype)
    files.write_tensors(path, {"t": tensor}, {"kind": "x", "text": text})
    tensors, metadata = files.read_tensors(path)
    assert torch.equal(tensors["t"], tensor)
    assert metadata["text"] == text


def test_views_that_share_memory_are_stored(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    files.write_tensors(tmp_path / "a", {"all": base, "row": base[0], "turned": base.T}, {"kind": "x"})
    tensors, _ = files.read_tensors(tmp_path / "a")
    assert torch.equal(tensors["turned"], base.T)
    assert torch.equal(tensors["row"], base[0])


def test_equal_inputs_give_equal_bytes_in_every_process(tmp_path: Path) -> None:
    metadata = {"kind": "x", "z": "1", "y": "2", "info": "{}"}
    files.write_tensors(tmp_path / "a", {"a": torch.zeros(2, dtype=torch.int64), "b": torch.ones(3)}, metadata)
    code = (
        "import sys, torch; from spurge.engine.base import files\n"
        "files.write_tensors(sys.argv[1], {'b': torch.ones(3), 'a': torch.zeros(2, dtype=torch.int64)},"
        " {'info': '{}', 'kind': 'x', 'y': '2', 'z': '1'})"
    )
    env = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "b")], check=True, env=env)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "a"
    files.write_tensors(path, TENSORS, META)
    return path.read_bytes()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_is_refused(tmp_path_factory: pytest.TempPathFactory, whole: bytes, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(whole) * 8 - 1))
    changed = bytearray(whole)
    changed[position // 8] ^= 1 << (position % 8)
    header = len(whole) - int.from_bytes(whole[:8], "little")
    path = tmp_path_factory.mktemp("flip") / "a"
    path.write_bytes(changed)
    try:
        tensors, metadata = files.read_tensors(path, "scores")
    except files.FileError:
        return
    # Only a flip that leaves the meaning alone may pass: one blank of the header's padding for another.
    assert header
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    assert metadata["info"] == META["info"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_truncated_file_is_refused(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(files.FileError, match=r"truncated|not a safetensors file"):
        files.read_tensors(path)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "a"
    path.write_bytes(data)
    with pytest.raises(files.FileError):
        files.read_tensors(path)


def test_wrong_kind_newer_schema_and_foreign_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    files.write_tensors(path, TENSORS, META)
    with pytest.raises(files.FileError, match="holds 'scores', expected 'edit'"):
        files.read_tensors(path, "edit")
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "foreign")
    with pytest.raises(files.FileError, match="not written by Spurge"):
        files.read_tensors(tmp_path / "foreign")
    monkeypatch.setattr(files, "SCHEMA", 7)
    files.write_tensors(path, TENSORS, META)
    monkeypatch.undo()
    with pytest.raises(files.FileError, match=r"schema 7, .* is newer than this Spurge"):
        files.read_tensors(path)
    with pytest.raises(FileNotFoundError):
        files.read_tensors(tmp_path / "absent")


@pytest.mark.parametrize(
    ("tensors", "metadata", "error", "message"),
    [
        ({}, {}, ValueError, "need 'kind'"),
        ({}, {"kind": "x", "sha256": "0"}, ValueError, "'sha256' is written by Spurge"),
        ({}, {"kind": "x", "n": 1}, TypeError, "metadata: keys and values must be str"),
        ({"a": 1.0}, {"kind": "x"}, TypeError, "expected str to tensor"),
        ({"a": torch.eye(2).to_sparse()}, {"kind": "x"}, ValueError, "must be dense"),
    ],
)
def test_write_tensors_refuses(tmp_path: Path, tensors, metadata, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        files.write_tensors(tmp_path / "a", tensors, metadata)
    assert not os.listdir(tmp_path)


def test_fingerprint_depends_on_bytes_type_and_shape() -> None:
    base = torch.arange(6.0)
    prints = {
        files.fingerprint(value)
        for value in (base, base.reshape(2, 3), base.double(), base.reshape(2, 3).T, b"", "a", base + 1)
    }
    assert len(prints) == 7
    assert files.fingerprint("a") == files.fingerprint(b"a")
    assert files.fingerprint(base.reshape(3, 2).T) == files.fingerprint(base.reshape(3, 2).T.contiguous())
    with pytest.raises(TypeError, match="expected a tensor, bytes or str, got int"):
        files.fingerprint(1)  # type: ignore[arg-type]
