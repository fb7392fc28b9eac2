"""Files are whole or absent, JSON has one form, and what is not as expected is refused in one sentence."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spurge.engine.base import files

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
