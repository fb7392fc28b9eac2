"""Tensor files: equal inputs give equal bytes, every damage is refused, and no copy of a tensor is made."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.earlier import V1
from spurge.engine.base import tensor_files
from spurge.engine.base.files import FileError, canonical_json
from spurge.engine.base.tensor_files import flat, kind_of, of_group, read_tensors, reading, write_tensors

TENSORS = {"w": torch.arange(12.0).reshape(3, 4), "index": torch.tensor([0, 5]), "none": torch.empty(0)}
META = {"kind": "scores", "info": canonical_json({"seed": 1})}


def test_tensors_come_back(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS, META)
    tensors, metadata = read_tensors(path, "scores")
    assert set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor)
        assert tensors[name].dtype == tensor.dtype
    assert metadata["info"] == META["info"]
    assert metadata["schema"] == str(tensor_files.SCHEMA)
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
    write_tensors(path, {"t": tensor}, {"kind": "x", "text": text})
    tensors, metadata = read_tensors(path)
    assert torch.equal(tensors["t"], tensor)
    assert metadata["text"] == text


def test_views_that_share_memory_are_stored(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    write_tensors(tmp_path / "a", {"all": base, "row": base[0], "turned": base.T}, {"kind": "x"})
    tensors, _ = read_tensors(tmp_path / "a")
    assert torch.equal(tensors["turned"], base.T)
    assert torch.equal(tensors["row"], base[0])


def test_equal_inputs_give_equal_bytes_in_every_process(tmp_path: Path) -> None:
    metadata = {"kind": "x", "z": "1", "y": "2", "info": "{}"}
    write_tensors(tmp_path / "a", {"a": torch.zeros(2, dtype=torch.int64), "b": torch.ones(3)}, metadata)
    code = (
        "import sys, torch; from spurge.engine.base.tensor_files import write_tensors\n"
        "write_tensors(sys.argv[1], {'b': torch.ones(3), 'a': torch.zeros(2, dtype=torch.int64)},"
        " {'info': '{}', 'kind': 'x', 'y': '2', 'z': '1'})"
    )
    env = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "b")], check=True, env=env)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "a"
    write_tensors(path, TENSORS, META)
    return path.read_bytes()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_is_refused(tmp_path_factory: pytest.TempPathFactory, whole: bytes, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(whole) * 8 - 1))
    changed = bytearray(whole)
    changed[position // 8] ^= 1 << (position % 8)
    path = tmp_path_factory.mktemp("flip") / "a"
    path.write_bytes(changed)
    with pytest.raises(FileError):
        read_tensors(path, "scores")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_truncated_file_is_refused(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(FileError, match=r"truncated|not a safetensors file|is empty"):
        read_tensors(path)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "a"
    path.write_bytes(data)
    with pytest.raises(FileError):
        read_tensors(path)


def test_wrong_kind_newer_schema_and_foreign_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_tensors(path, TENSORS, META)
    with pytest.raises(FileError, match="holds 'scores', expected 'edit'"):
        read_tensors(path, "edit")
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "foreign")
    with pytest.raises(FileError, match="not written by Spurge"):
        read_tensors(tmp_path / "foreign")
    monkeypatch.setattr(tensor_files, "SCHEMA", 7)
    write_tensors(path, TENSORS, META)
    monkeypatch.undo()
    with pytest.raises(FileError, match=r"schema 7, .* is newer than this Spurge"):
        read_tensors(path)
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "absent")


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
        write_tensors(tmp_path / "a", tensors, metadata)
    assert not os.listdir(tmp_path)


def as_safetensors_writes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The file by the library, its header sorted, which the library leaves in any order."""
    data = safetensors.torch.save(tensors, metadata)
    end = 8 + int.from_bytes(data[:8], "little")
    header = canonical_json(json.loads(data[8:end])).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]


def test_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    base = torch.arange(6).reshape(2, 3)
    tensors = {f"{dtype}": base.to(dtype) for dtype in tensor_files._TYPES.values()}
    tensors |= {"turned": base.T, "number": torch.tensor(2.0), "none": torch.empty(0, 3), "Ä": base + 0.5, "é": base}
    write_tensors(tmp_path / "a", tensors, {"kind": "x", "text": "naïve – 非"})
    _, texts = read_tensors(tmp_path / "a")
    owned = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    assert (tmp_path / "a").read_bytes() == as_safetensors_writes(owned, texts)


@pytest.mark.parametrize("name", sorted(str(path.relative_to(V1)) for path in V1.rglob("*.safetensors")))
def test_files_of_earlier_versions_are_written_again_byte_by_byte(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "spurge_version", lambda: "0.1.0")
    tensors, texts = read_tensors(V1 / name)
    write_tensors(tmp_path / "a", tensors, {k: v for k, v in texts.items() if k not in ("schema", "spurge", "sha256")})
    assert (tmp_path / "a").read_bytes() == (V1 / name).read_bytes()


GROWTH = """
import re, sys
from pathlib import Path
import torch
from spurge.engine.base.tensor_files import read_tensors, write_tensors

def most():  # MiB
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

job, small, large = sys.argv[1:]
tensors = {name: torch.ones(8 << 20) for name in "ab" if job == "write"}  # 32 MiB each
for path in (small, large):  # the first one warms up
    begin = most()
    if job == "write":
        write_tensors(path, tensors if path == large else {"a": torch.ones(9)}, {"kind": "x"})
    else:
        read_tensors(path)
print(most() - begin)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory of Linux")
def test_files_need_no_memory_beside_their_tensors(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    growth = {}
    for job in ("write", "read"):
        call = [sys.executable, "-c", GROWTH, job, str(tmp_path / "small"), str(tmp_path / "large")]
        growth[job] = float(subprocess.run(call, check=True, env=env, capture_output=True, text=True).stdout)
    assert growth["write"] < 8
    assert growth["read"] < 64 + 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header["w"].update(dtype="F9"), "its header cannot be read at 'w'"),
        (lambda header: header["w"].update(shape=[3, 5]), "'w' at another place"),
        (lambda header: header["w"].update(shape=[-3, -4]), "its header cannot be read at 'w'"),
        (lambda header: header["w"].update(shape=[3.0, 4]), "its header cannot be read"),
        (lambda header: header["w"].update(shape=7), "its header cannot be read"),
        (lambda header: header["none"].update(shape=[0, 2**70]), "its header cannot be read"),
        (lambda header: header["w"].update(data_offsets=[0, 48]), "at another place"),
        (lambda header: header.pop("index"), "at another place"),
        (lambda header: header.pop("w"), "48 bytes too many"),
        (lambda header: header.update(w=3), "its header cannot be read"),
        (lambda header: header["__metadata__"].update(schema="new"), "schema 'new' is no version"),
    ],
)
def test_headers_that_do_not_fit_the_bytes_are_refused(tmp_path: Path, change, message) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "a"
    write_tensors(path, TENSORS, META)
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    with pytest.raises(FileError, match=message):
        read_tensors(path)


def test_a_pipe_is_written_to_and_not_read(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with subprocess.Popen(["cat", str(path)], stdout=subprocess.PIPE) as reader:
        write_tensors(path, TENSORS, META)
        data = reader.communicate()[0]
    (tmp_path / "whole").write_bytes(data)
    assert torch.equal(read_tensors(tmp_path / "whole").tensors["w"], TENSORS["w"])
    with pytest.raises(FileError, match="is a pipe, expected a file"):  # whose size nobody knows
        read_tensors(path)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda file: file.tensors["v"], "a: not a list of scores: 'v' is missing"),
        (lambda file: file.value("more"), "a: not a list of scores: 'more' is missing"),
        (lambda file: file.value("kind"), "a: not a list of scores: kind: not JSON: Expecting value"),
        (lambda file: file.value("info")["seed"]["x"], "a: not a list of scores: 'int' object is not subscriptable"),
        (lambda file: int("two"), "a: not a list of scores: invalid literal"),
    ],
)
def test_what_a_file_lacks_is_named(tmp_path: Path, use, message: str) -> None:  # type: ignore[no-untyped-def]
    write_tensors(tmp_path / "a", TENSORS, META)
    with pytest.raises(FileError, match=message), reading(tmp_path / "a", "scores", "a list of scores") as file:
        use(file)


def test_the_kind_is_told_by_the_header(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", TENSORS, META)
    assert kind_of(tmp_path / "a") == "scores"
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "foreign")
    with pytest.raises(FileError, match="not written by Spurge"):
        kind_of(tmp_path / "foreign")


def test_groups_come_back() -> None:
    one, two = torch.ones(1), torch.ones(2)
    tensors = flat({"a": {"x": one, "b/y": two}, "b": {}})
    assert [*tensors] == ["a/x", "a/b/y"]
    assert of_group("a", tensors) == {"x": one, "b/y": two}
    assert of_group("b", tensors) == {}


# ---- headers that say what cannot be ---------------------------------------------------------------------------------


def of_header(folder: Path, header: str, size: int = 0) -> Path:
    """A file with this header and ``size`` bytes, which are a hole, behind it."""
    path = folder / "a"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    os.truncate(path, 8 + len(header) + size)
    return path


def entry(shape: str, end: str = "8", dtype: str = '"U8"', begin: str = "0") -> str:
    return f'{{"__metadata__":{OURS},"t":{{"dtype":{dtype},"shape":{shape},"data_offsets":[{begin},{end}]}}}}'


OURS = '{"schema":"1","kind":"x","sha256":"0","spurge":"0"}'


@pytest.mark.parametrize(
    "header",
    [
        *(entry(shape) for shape in ("[8.0]", "[true,8]", '["a",1000000000]', "8", "{}", "[-8,-1]", "[1e999]", "null")),
        *(entry(shape) for shape in (f"[0,{2**63}]", f"[{10**400}]", f"[{','.join(['1'] * 65)}]", f"[{'9' * 5000}]")),
        *(entry("[8]", end) for end in ("8.0", "9", "7", "null", '"8"', "8,8")),
        entry("[8]", "9", begin="1"),
        entry("[8]", dtype="[]"),
        entry("[8]", dtype='"F7"'),
        entry("[8]").replace('"dtype"', '"shape":[8],"dtype"'),
        entry("[8]").replace(OURS, '{"schema":1,"kind":"x","sha256":"0"}'),
        entry("[8]").replace(OURS, '{"schema":"1","kind":["x"],"sha256":"0"}'),
        entry("[8]").replace(OURS, '{"schema":"' + "9" * 5000 + '","kind":"x","sha256":"0"}'),
        entry("[8]").replace(OURS, '{"schema":"1","kind":"\\ud800","sha256":"0"}'),
        entry("[8]").replace('"t"', '"\\ud800"'),
        entry("[8]").replace(OURS, "[" * 5000 + "]" * 5000),
        f'{{"__metadata__":{OURS},"t":[1]}}',
        f'{{"__metadata__":{OURS},"t":{{}}}}',
        '{"__metadata__":[]}' + " " * 8,
    ],
)
def test_a_header_that_says_what_cannot_be_is_refused(tmp_path: Path, header: str) -> None:
    with pytest.raises(FileError, match=f"^{tmp_path}"):
        read_tensors(of_header(tmp_path, header, 8))


def test_sizes_of_a_header_are_held_against_the_file_before_memory_is_taken(tmp_path: Path) -> None:
    size = 2**40
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in (of_header(tmp_path, entry(f"[{size}]", str(size)), 8), tmp_path / "b"):
        if path.name == "b":
            path = of_header(tmp_path, entry(f"[{size}]", str(size)), size)  # as large as it says, but a hole
        with pytest.raises(FileError, match=r"truncated|is sparse"):
            read_tensors(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB


def test_the_text_of_a_value_is_json_with_numbers_that_are_finite() -> None:
    for text in ("NaN", "1e999", '{"a":1,"a":2}', "[" * 5000, ""):
        with pytest.raises(ValueError, match=r"^info: not JSON: "):
            tensor_files.Contents({}, {"info": text}).value("info")
