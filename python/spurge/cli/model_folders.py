"""Models in folders of ``transformers``, loaded or refused in one sentence."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any, Literal

import torch

from spurge.engine.base.checks import device_of
from spurge.engine.base.files import FileError, read_json
from spurge.engine.base.tensor_files import read_header

ModelKind = Literal["classifier", "language", "encoder", "any"]
_POINTER = b"version https://git-lfs"
_GGUF = ".gguf"
_OF_GGUF = {"architectures": ["ForCausalLM"]}  # what llama.cpp runs
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_model(name: str, folder: str, device: str, dtype: str, kind: ModelKind = "classifier") -> tuple[Any, Any]:
    """A model of ``transformers`` in evaluation mode, and its tokenizer, with a padding token.

    Nothing is downloaded, and no code of the folder runs.

    Args:
        name: of the argument, for errors.
        folder: of the model, or a GGUF file of a language model, whose weights are widened.
        device, dtype: where and in what it is loaded.
        kind: ``"classifier"``, ``"language"`` (causal), ``"encoder"``, or ``"any"``: what the folder's configuration
            says, of the first two.

    Raises:
        ValueError: not a folder of such a model, files that are damaged or do not fit the configuration, weights that
            are missing or quantised in a way that cannot be read here, or no such device.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    path = Path(folder)
    source: dict[str, Any] = {"pretrained_model_name_or_path": path}
    if path.suffix == _GGUF and path.is_file():
        config, source = _OF_GGUF, {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    else:
        config = _checked_config(name, path)
    where = device_of("device", device)
    if kind == "any":
        kind = "language" if _is_language_model(config) else "classifier"
    _check_files(name, path)
    logging.set_verbosity_error()  # what matters of it is checked below
    logging.disable_progress_bar()
    with _refused(name, path, config), _without_bar() if config is _OF_GGUF else nullcontext():
        model, loading = _loader(kind).from_pretrained(
            **source,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are refused below, with their names
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(**source, local_files_only=True, trust_remote_code=False)
    _check_weights(name, path, config, loading, kind)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.eos_token_id
    return model.eval().to(where), tokenizer


def _loader(kind: ModelKind) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    if kind == "encoder":
        return AutoModel
    return AutoModelForCausalLM if kind == "language" else AutoModelForSequenceClassification


def _without_bar() -> AbstractContextManager[Any]:
    """Hides the progress bar of reading GGUF, which ``transformers`` shows whatever it is told."""
    return redirect_stderr(io.StringIO())


@contextmanager
def _refused(name: str, path: Path, config: dict[str, Any]) -> Iterator[None]:
    """Whatever the libraries make of a folder that is not as it should be, in one sentence."""
    try:
        yield
    except (MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        quantised = config.get("quantization_config")
        what = "cannot be loaded"
        if quantised:
            method = quantised.get("quant_method") if isinstance(quantised, dict) else None
            what = (
                f"has quantised weights ({method or 'of an unknown kind'}) that cannot be loaded here, while those of "
                "the model before it was quantised can"
            )
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{name}: {str(path)!r} {what}: {kind}{error}") from error


def _check_weights(name: str, path: Path, config: dict[str, Any], loading: dict[str, Any], kind: ModelKind) -> None:
    """Refuses weights of other shapes than the configuration says, and weights that the folder lacks."""
    for key, found, expected in sorted(loading["mismatched_keys"]):
        raise ValueError(
            f"{name}: {str(path)!r} has a config.json that does not fit its weights: {key} is {list(found)} in the "
            f"file, {list(expected)} by the configuration"
        )
    missing = sorted(loading["missing_keys"])
    if missing and kind != "encoder":  # an encoder's pooler, which nobody here reads, may well be missing
        wanted = "a fine-tuned classifier" if kind == "classifier" else "a language model"
        if kind == "classifier" and _is_language_model(config):
            wanted += " (a language model classifies by label words: --verbalizer)"
        raise ValueError(f"{name}: {str(path)!r} has no weights for {', '.join(missing[:3])}: not {wanted}")


def _checked_config(name: str, path: Path) -> dict[str, Any]:
    """The folder's configuration."""
    if not (path / "config.json").is_file():
        advice = "it has no config.json"
        files = sorted(path.glob(f"*{_GGUF}"))
        if path.is_file():
            advice = "it is a file; give the folder that it is in, or a GGUF file"
        elif files:
            advice = f"it has no config.json; give its file {files[0].name}"
        elif not path.exists() and _HUB_NAME.fullmatch(str(path)):
            advice = (
                "there is no such folder, and nothing is downloaded; if it is a name on the Hub, fetch it first: "
                f"hf download {path} --local-dir FOLDER"
            )
        elif not path.exists():
            advice = "there is no such folder"
        raise ValueError(f"{name}: {str(path)!r} is not a transformers folder: {advice}")
    _check_pointer(path / "config.json")
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        raise FileError(f"{path / 'config.json'}: expected a JSON object, got {type(config).__name__}")
    return config


def _check_files(name: str, path: Path) -> None:
    """Refuses a folder whose files were not fetched, or not wholly, before a library trips over them."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            _check_pointer(file)
            if file.suffix == ".safetensors":
                _check_whole(file)
    index = path / "model.safetensors.index.json"
    if index.is_file() and not (path / "model.safetensors").is_file():
        shards = read_json(index).get("weight_map", {}).values()
        absent = sorted({shard for shard in shards if not (path / shard).is_file()})
        if absent:
            raise ValueError(f"{name}: {str(path)!r} lacks {absent[0]}, which {index.name} names; was it copied whole?")


def _check_pointer(file: Path) -> None:
    with file.open("rb") as stream:
        start = stream.read(len(_POINTER))
    if start == _POINTER:
        raise FileError(f"{file}: is a Git LFS pointer, not the file itself; fetch it: git lfs pull")


def _check_whole(file: Path) -> None:
    """Refuses a safetensors file that has not as many bytes as its header says."""
    with file.open("rb") as stream:
        header, size = read_header(stream, file)
    try:
        ends = [int(entry["data_offsets"][1]) for key, entry in header.items() if key != "__metadata__"]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise FileError(f"{file}: damaged: its header cannot be read") from error
    expected = max(ends, default=0)
    if size != expected:
        what = "truncated" if size < expected else "damaged"
        raise FileError(f"{file}: {what}: {expected} bytes expected behind the header, {size} found")


def _is_language_model(config: dict[str, Any]) -> bool:
    named = config.get("architectures") or []
    return any(str(architecture).endswith(("ForCausalLM", "LMHeadModel")) for architecture in named)
