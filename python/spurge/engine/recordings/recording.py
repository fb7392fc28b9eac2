"""What a model does with each of many prompts, kept on disk: outputs and neurons of its MLPs, and continuations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from spurge.engine.base.checks import choice, device_of, integer, warn
from spurge.engine.base.files import FileError, PathLike
from spurge.engine.data.examples import checked_texts
from spurge.engine.models.fingerprint import Opaque, model_print
from spurge.engine.models.handle import Handle
from spurge.engine.models.hooks import frozen
from spurge.engine.models.sites import Site, find_sites, widths
from spurge.engine.recordings.generation import check_generates
from spurge.engine.recordings.padding import padded
from spurge.engine.recordings.prompt_pass import Position, PromptPass, check_length, fitting, token_print
from spurge.engine.recordings.store import STORAGE, Store

_HOST = torch.device("cpu")
_STORAGE = tuple(getattr(torch, name) for name in STORAGE)


@dataclass(frozen=True, eq=False, repr=False)
class Recording:
    """Outputs and neurons of a model's MLPs for N prompts, read from disk when they are wanted.

    Made by :func:`record` and :meth:`open`. A block's SHA-256 is verified when the block is first read.

    Attributes:
        device: where what is read lies, and all that is done with it is done; see :meth:`to`.
    """

    _store: Store
    device: torch.device = _HOST

    @classmethod
    def open(cls, folder: PathLike) -> Recording:
        """The whole recording in ``folder``.

        Raises:
            FileError: not a recording, one that was cut off, a damaged header, or one of a newer schema.
            OSError: a file cannot be read.
        """
        store = Store.open(folder)
        missing = store.missing()
        if missing:
            rows = sum(len(store.rows(number)) for number in missing)
            total = len(store.header["prompts"])
            raise FileError(
                f"{folder}: was cut off: {total - rows} of {total} prompts are recorded; call record with the same "
                "arguments to go on"
            )
        return cls(store)

    def __len__(self) -> int:
        return len(self._store.header["prompts"])

    @property
    def prompts(self) -> tuple[str, ...]:
        """The N prompts."""
        return tuple(self._store.header["prompts"])

    @property
    def continuations(self) -> tuple[str, ...] | None:
        """What the model wrote after each prompt, without the prompt; None where nothing was generated."""
        return self._store.texts() if self._store.header["made"]["generate"] else None

    @property
    def widths(self) -> dict[str, int]:
        """Site name to F, the neurons of the site, in the order of the layers."""
        return {site["name"]: site["width"] for site in self._store.header["sites"]}

    @property
    def hidden(self) -> dict[str, int]:
        """Site name to H, the numbers of the MLP's output."""
        return {site["name"]: site["hidden"] for site in self._store.header["sites"]}

    @property
    def info(self) -> dict[str, Any]:
        """How it was made, JSON-able."""
        header = self._store.header
        own = {name: value for name, value in header.items() if name not in ("prompts", "sites", "made", "sha256")}
        return {
            "method": "record",
            "prompts": len(self),
            **header["made"],
            **own,
            "model_print": header["made"]["model"],
        }

    def to(self, device: torch.device | str) -> Recording:
        """The same recording, read to another device.

        Raises:
            TypeError, ValueError: no device, or one that is not there.
        """
        return replace(self, device=device_of("device", device))

    def outputs(self, site: str) -> Tensor:
        """Outputs ``u = W2 z + b`` of one MLP, float32 ``[N, H]``.

        Raises:
            ValueError: a site that was not recorded. `FileError`: a file is missing or damaged.
            OSError: a file cannot be read.
        """
        return self._store.read(f"outputs/{self._recorded(site)}", self.hidden[site]).to(self.device)

    def neurons(self, site: str, part: slice | None = None) -> Tensor:
        """Neurons ``z`` of one site, the input of its down projection, float32 ``[N, F']``.

        Args:
            site: its name.
            part: which of the F neurons, a slice without a step; by default all. Only these are read, so that a
                site that does not fit in memory can be looked at in parts.

        Raises:
            ValueError: a site that was not recorded, no neurons recorded, or a step. `FileError`: a file is missing
                or damaged.
            TypeError: ``part`` is no slice.
            OSError: a file cannot be read.
        """
        if part is not None and not isinstance(part, slice):
            raise TypeError(f"part: expected a slice, got {type(part).__name__}")
        self._recorded(site)
        if not self._store.header["made"]["neurons"]:
            raise ValueError("neurons: were not recorded; record with neurons=True")
        return self._store.read(f"neurons/{site}", self.widths[site], part).to(self.device)

    def fingerprint(self) -> str:
        """SHA-256 over all that was recorded and how; raises `FileError` where a file is missing or damaged."""
        return self._store.fingerprint()

    def _recorded(self, site: str) -> str:
        if site not in self.widths:
            raise ValueError(f"site: {site!r} is not among {list(self.widths)}")
        return site

    def __repr__(self) -> str:
        made = self._store.header["made"]
        parts = ["outputs", *["neurons"] * made["neurons"], *["continuations"] * bool(made["generate"])]
        return f"Recording({len(self)} prompts, {len(self.widths)} sites, {made['position']}: {', '.join(parts)})"


def record(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    folder: PathLike,
    *,
    neurons: bool = True,
    position: Position = "last",
    sites: Sequence[str] | None = None,
    generate: int = 0,
    batch_size: int = 32,
    block: int = 64,
    max_length: int | None = None,
    storage: torch.dtype = torch.float16,
    memory: str | int | None = None,
    progress: bool = True,
) -> Recording:
    r"""What each MLP of a model does with each of N prompts, in one forward pass a prompt.

    For a site with neurons :math:`z_t` and output :math:`u_t = W_2 z_t + b` at token t, it keeps z and u of the last
    token, or their means :math:`\sum_t m_t z_t / \sum_t m_t` over the prompt's tokens (m is 0 at padding; the
    tokenizer's own tokens, such as [CLS], are tokens). These are the mediators whose effects `spurge.Mediation`
    estimates: nothing is patched, and no gradient is taken.

    Finished blocks stay. A call that was cut off goes on from them, when it is made again with the same model and
    arguments, and ends in the same files as one that was not. Model and tokenizer come back as they were.

    Args:
        model: a causal language model or classifier of ``transformers``.
        tokenizer: the model's; without a padding token, its end token pads meanwhile.
        prompts: N texts.
        folder: made if need be; for one recording.
        neurons: keep the neurons, not only the outputs: F numbers for each site and prompt.
        position: ``"last"``: the prompt's last token; ``"mean"``: mean over its tokens.
        sites: names of down projections (default: all of :func:`spurge.find_sites`).
        generate: new tokens of a greedy continuation; 0 for none. Costs a second pass over the prompts.
        batch_size: prompts that run at once.
        block: prompts of a file.
        max_length: tokens a prompt is cut to (default: the tokenizer's own limit, where it has one).
        storage: type on disk, float16, bfloat16 or float32.
        memory: bytes (``"2 GiB"``) that a batch may take, by default half of what is free; a batch beyond it is
            split, by an estimate from the longest prompt, at least to single prompts. A recording that goes on keeps
            the split it began with, because another one changes numbers by rounding.
        progress: show a progress bar.

    Raises:
        TypeError: an argument of another type.
        ValueError: no prompts or an empty one, settings out of range, a model without such layers, with a decoder of
            its own or without a head to generate with, numbers that are not finite, or a folder with a recording of
            another model, of other prompts or with other settings (`FileError`: a damaged one).
        OSError: the folder cannot be written.
    """
    texts = _prompts(prompts)
    choice("position", position, get_args(Position))
    choice("storage", storage, _STORAGE)
    model = getattr(model, "_orig_mod", model)
    made: dict[str, Any] = {"neurons": bool(neurons), "position": position}
    made |= {"generate": integer("generate", generate, 0), "batch_size": integer("batch_size", batch_size, 1)}
    made |= {"block": integer("block", block, 1), "max_length": max_length, "storage": _text(storage)}
    found = find_sites(model, sites)
    _check_model(model, generate)
    handle = Handle(model, tokenizer)
    with frozen(model, gradients=False), padded(tokenizer):
        tokens, longest = token_print(tokenizer, texts, max_length)
        check_length(model, longest, generate)
        made |= {"model": _print(model), "tokens": tokens, "sites": list(widths(found)), "device": handle.device.type}
        rows = min(batch_size, fitting(handle, found, longest, generate, memory))
        store = _begin(folder, model, made, texts, found, rows, limited=memory is not None)
        _run(store, PromptPass(handle, found, made), progress)
    return Recording.open(folder)


def _check_model(model: nn.Module, generate: int) -> None:
    """Refuses a model that prompts alone do not run."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"model: {type(model).__name__} has an encoder and a decoder; only one of them has the prompt")
    if generate:
        check_generates(model)


def _begin(
    folder: PathLike,
    model: nn.Module,
    made: dict[str, Any],
    prompts: list[str],
    sites: list[Site],
    rows: int,
    *,
    limited: bool,
) -> Store:
    """The store of this recording, new or begun before; refused where ``limited`` and it runs more rows at once."""
    header = {
        "made": made,
        "prompts": prompts,
        "architecture": type(model).__name__,
        "rows": rows,
        "sites": [{"name": site.name, "width": site.width, "hidden": site.hidden} for site in sites],
        "torch": str(torch.__version__),
    }
    store = Store.begin(folder, header)
    if limited and rows < store.header["rows"]:
        raise ValueError(
            f"memory: {rows} prompts fit at once, but the recording in {folder} was begun with "
            f"{store.header['rows']}; give more, or another folder"
        )
    return store


def _prompts(prompts: Sequence[str]) -> list[str]:
    texts = checked_texts("prompts", prompts)
    for row, text in enumerate(texts):
        if not text.strip():
            raise ValueError(f"prompts: is empty at row {row}")
    return texts


def _run(store: Store, forward: PromptPass, progress: bool) -> None:
    """Makes the blocks that are not there."""
    texts, rows = store.header["prompts"], int(store.header["rows"])
    unfinished = store.unfinished()
    done = len(texts) - sum(len(store.rows(number)) for number in unfinished)
    with tqdm(total=len(texts), initial=done, desc="record", unit="prompts", disable=not progress) as bar:
        for number in unfinished:
            own = store.rows(number)
            order = sorted(own, key=lambda row: len(texts[row]))
            parts: list[dict[str, Tensor]] = []
            for start in range(0, len(order), rows):
                some = order[start : start + rows]
                parts.append(forward([texts[row] for row in some], some))
                bar.update(len(some))
            back = torch.tensor(order).argsort()
            tensors = {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}
            store.write(number, tensors, forward.continuations([texts[row] for row in own], rows))


def _print(model: nn.Module) -> str | None:
    """What the model computes with; None, with a warning, where nobody can tell."""
    try:
        return model_print(model)
    except Opaque as error:
        warn(f"recording: cannot go on when it is cut off: {error}")
        return None


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
