"""What all results that can be saved have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from spurge.engine.base.files import PathLike, canonical_json
from spurge.engine.base.tensor_files import Contents, reading, write_tensors

_Saved = TypeVar("_Saved", bound="Saved")


class Saved:
    """A result that knows its parts, and with them its file.

    Subclasses name the kind of their files, and what such a file is in errors:
    ``class NeuronScores(Saved, kind="scores", what="a file of neuron scores")``.
    """

    _kind: ClassVar[str]
    _what: ClassVar[str]

    def __init_subclass__(cls, *, kind: str = "", what: str = "") -> None:
        super().__init_subclass__()
        if kind:
            cls._kind, cls._what = kind, what

    @abstractmethod
    def _to_parts(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """Tensors and JSON-able values, by name."""

    @classmethod
    @abstractmethod
    def _of_parts(cls: type[_Saved], file: Contents) -> _Saved:
        """The result of :meth:`_to_parts`; KeyError, TypeError and ValueError say what is wrong with a file."""

    def save(self, path: PathLike) -> None:
        """Writes a safetensors file, all or nothing.

        Raises:
            OSError: the file cannot be written.
        """
        tensors, values = self._to_parts()
        texts = {name: canonical_json(value) for name, value in values.items()}
        write_tensors(path, tensors, {"kind": self._kind, **texts})

    @classmethod
    def load(cls: type[_Saved], path: PathLike) -> _Saved:
        """Reads a file of :meth:`save`.

        Raises:
            FileError: not such a file, truncated, changed, or from a newer Spurge.
            OSError: the file cannot be read.
        """
        with reading(path, cls._kind, cls._what) as file:
            return cls._of_parts(file)
