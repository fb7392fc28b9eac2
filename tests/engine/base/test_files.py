"""Files are whole or absent, JSON has one form, and what is not as expected is refused in one sentence."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spurge.engine.base import files
from spurge.engine.base.temporary import Temporaries

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


NOT_JSON = [b"", b"{", b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000, b"{} x"]
NOT_OURS = [b'{"a": 1e999}', b"[-1e400]", b"[%s]" % (b"9" * 5000), b'{"a": {"b": 1, "b": 1}}']


@pytest.mark.parametrize("data", NOT_JSON + NOT_OURS)
def test_read_json_says_what_is_wrong(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(files.FileError, match=r"a\.json: (not a JSON file|is empty)"):
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


# ---- what is no file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "empty", "sparse"])
def test_what_is_no_file_of_bytes_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path(os.devnull)
    else:
        path.touch()
    if kind == "sparse":
        os.truncate(path, 2**40)
    with pytest.raises(files.FileError, match=f"^{path}: is (a )?{kind}"), files.opened(path):
        pass


def test_a_file_with_some_holes_is_read(tmp_path: Path) -> None:
    with open(tmp_path / "a", "wb") as stream:
        stream.write(b"x" * 2**16)
        stream.truncate(2**21)
    with files.opened(tmp_path / "a") as stream:
        assert len(stream.read()) == 2**21


# ---- drafts ----------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from spurge.engine.base.files import begin_draft, write_parts
from spurge.engine.base.temporary import Temporaries

def parts():
    yield b"half"
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[2] == "file":
    write_parts(sys.argv[1], parts())
else:
    with Temporaries() as changes:
        (begin_draft(changes, Path(sys.argv[1]), folder=True) / "inside").touch()
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_run_left_goes_with_the_next_write(tmp_path: Path, kind: str) -> None:
    files.write_bytes(tmp_path / "a", b"old")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    target = tmp_path / ("a" if kind == "file" else "b")
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), kind], env=env, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_bytes() == b"old"
    assert len(os.listdir(tmp_path)) == 2
    files.write_bytes(tmp_path / "a", b"new")
    assert os.listdir(tmp_path) == ["a"]


def test_a_draft_that_is_being_written_stays(tmp_path: Path) -> None:
    with Temporaries() as changes:
        draft = files.begin_draft(changes, tmp_path / "a")
        files.write_bytes(tmp_path / "a", b"other")
        files.remove_drafts(tmp_path)
        assert draft.exists()
        (tmp_path / f"{draft.name}.txt").touch()
        (tmp_path / draft.name.removeprefix(".")).touch()
    files.remove_drafts(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(["a", f"{draft.name}.txt", draft.name.removeprefix(".")])


def test_a_draft_that_was_removed_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, waiting = fcntl.flock, [True]

    def late(descriptor: int, how: int) -> None:
        if waiting and how == fcntl.LOCK_EX:
            waiting.clear()
            files.remove_drafts(tmp_path)
            assert os.listdir(tmp_path) == []
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    files.write_bytes(tmp_path / "a", b"new")
    assert not waiting
    assert (tmp_path / "a").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


# ---- targets ---------------------------------------------------------------------------------------------------------


def test_a_file_keeps_its_mode_and_a_long_name(tmp_path: Path) -> None:
    path = tmp_path / ("非" * 85)
    path.touch()
    path.chmod(0o604)
    files.write_bytes(path, b"new")
    assert path.stat().st_mode & 0o7777 == 0o604


def test_a_file_with_several_names_is_refused(tmp_path: Path) -> None:
    files.write_bytes(tmp_path / "a", b"old")
    os.link(tmp_path / "a", tmp_path / "b")
    for attempt in (files.check_writable, lambda path: files.write_bytes(path, b"new")):
        with pytest.raises(OSError, match="has 2 hard links, which a new file would part") as caught:
            attempt(tmp_path / "a")
        assert caught.value.filename == str(tmp_path / "a")
    assert (tmp_path / "b").read_bytes() == b"old"


def test_a_target_is_tried_without_a_trace(tmp_path: Path) -> None:
    files.write_bytes(tmp_path / "a", b"old")
    before = (tmp_path / "a").stat()
    for name in ("a", "new", os.devnull):
        files.check_writable(tmp_path / name)
    assert (tmp_path / "a").stat() == before
    assert os.listdir(tmp_path) == ["a"]
    with pytest.raises(IsADirectoryError, match="is a folder"):
        files.check_writable(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"folder .* does not exist"):
        files.check_writable(tmp_path / "no" / "file")


def test_what_may_not_be_written_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_bytes(tmp_path / "a", b"old")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="is not writable"):
        files.write_bytes(tmp_path / "a", b"new")


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """Files of this process may have so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    files.write_bytes(path, b"old")
    with at_most(2**16), pytest.raises(OSError, match="File too large") as caught:
        files.write_bytes(path, bytes(2**20))
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]
    with pytest.raises(OSError, match="No space left") as caught:
        files.write_bytes("/dev/full", b"x")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/dev/full")


def test_a_pipe_behind_a_name_is_written_to(tmp_path: Path) -> None:
    code = "from spurge.engine.base.files import write_bytes; write_bytes('/dev/stdout', b'numbers')"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, check=True, stdout=subprocess.PIPE)
    assert done.stdout == b"numbers"
