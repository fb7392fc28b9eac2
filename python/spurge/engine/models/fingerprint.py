"""What a model computes with, as one SHA-256: weights, settings and code, so that stored results cannot go stale."""

from __future__ import annotations

import dis
import functools
import os
import re
import sys
from collections import deque
from collections.abc import Mapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from spurge.engine.base.files import canonical_json, fingerprint
from spurge.engine.models.heads import print_of

# Their versions stand for their code.
_LIBRARIES = {"torch", "transformers", "numpy", "builtins", *sys.stdlib_module_names} - {"__main__"}
_OF_EVERY_MODULE = set(vars(nn.Module()))
_NO_MATTER = {"name_or_path", "_name_or_path", "transformers_version"}  # where a model came from changes no number
_READS = {
    "LOAD_GLOBAL": "global",
    "LOAD_NAME": "global",
    "LOAD_ATTR": "attribute",
    "LOAD_METHOD": "attribute",
    "IMPORT_FROM": "attribute",
    "IMPORT_NAME": "module",
}
_NO_STATE = {"logging", "threading", "weakref"}  # types whose objects lead to the whole process
_DEEPEST = 150


class Opaque(ValueError):
    """A model that runs code nobody can look into."""


def model_print(model: nn.Module) -> str:
    """SHA-256 of all that decides what ``model`` computes, in evaluation mode.

    Parameters and buffers bit by bit; every module's class and attributes; the configuration; attached gates; the
    bytecode of methods, of the functions and constants they name, and of their defaults and closures (of torch,
    transformers, numpy and the standard library: the versions). What it cannot follow: code reached only through
    attributes of other objects, and files read while the model runs.

    Raises:
        Opaque: forward hooks that are not Spurge's or transformers', a replaced ``forward``, or attributes nested
            without end.
        ValueError: weights on the meta device.
    """
    walk = _Walk()
    parts: list[Any] = [sys.version, torch.__version__, transformers.__version__, np.__version__]
    parts.append(torch.get_float32_matmul_precision())
    first: dict[int, str] = {}  # a module may stand at several places
    for name, module in model.named_modules(remove_duplicate=False):
        if first.setdefault(id(module), name) != name:
            parts.append([name, first[id(module)]])
        else:
            parts.append([name, walk.module(module), [walk.value(vars(gate)) for gate in _gates(name, module)]])
    return fingerprint(canonical_json(parts))


def _gates(name: str, module: nn.Module) -> list[Any]:
    """Spurge's gates on a module, in the order they act; refuses it where anything else has a hand in its forward."""
    forward = vars(module).get("forward", module.forward)
    if getattr(forward, "__func__", None) is not type(module).forward or forward.__self__ is not module:
        raise Opaque(f"the forward of module {name!r} was replaced")
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    hooks = [hook for hook in hooks if _root(hook) != "transformers"]  # those only record what a caller asks for
    if any(_root(hook) != "spurge" for hook in hooks):
        raise Opaque(f"module {name!r} has forward hooks")
    return hooks


def _root(value: Any) -> str:
    return str(getattr(value, "__module__", None) or "builtins").partition(".")[0]


class _Walk:
    """Describes values by lists and texts that are equal only for equal values; each object once."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # so that no id is used twice
        self._depth = 0

    def module(self, module: nn.Module) -> list[Any]:
        """Class, attributes, parameters and buffers of a module, not its children."""
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        prints = [[name, print_of(name, tensor), self._extra(tensor)] for name, tensor in tensors]
        own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE | {"forward"}}
        if _root(type(module)) == "transformers":
            own = {name: value for name, value in own.items() if not name.startswith("_")}
        return [self.value(type(module)), self.value(own), prints]

    def _extra(self, tensor: Tensor) -> Any:
        """What a quantised weight carries beside its bits."""
        return None if type(tensor) in (Tensor, nn.Parameter) else self.value([type(tensor), vars(tensor)])

    def value(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
            return repr(value)
        if isinstance(value, (torch.dtype, torch.device, torch.Size, np.dtype)):
            return str(value)
        if isinstance(value, tuple):  # constants, which Python may or may not share: no place for identity
            return ["tuple", *map(self.value, value)]
        if id(value) in self._seen:
            return self._seen[id(value)]
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        if self._depth > _DEEPEST:
            raise Opaque(f"attributes of a {type(value).__name__} are nested too deeply")
        self._depth += 1
        try:
            return self._object(value)
        finally:
            self._depth -= 1

    def _object(self, value: Any) -> Any:
        if isinstance(value, (Tensor, np.ndarray)):
            return fingerprint(torch.as_tensor(value))
        if isinstance(value, Mapping):
            entries = [(repr(key), item) for key, item in value.items() if key not in _NO_MATTER]
            return ["dict", *([key, self.value(item)] for key, item in sorted(entries, key=lambda entry: entry[0]))]
        if isinstance(value, (set, frozenset)):
            return ["set", *sorted(map(repr, value))]
        if isinstance(value, (list, deque)):
            return ["list", *map(self.value, value)]
        if isinstance(value, functools.partial):
            return ["partial", self.value(value.func), self.value(value.args), self.value(value.keywords)]
        if isinstance(value, MethodType):
            return ["method", self.value(value.__func__), self.value(value.__self__)]
        if isinstance(value, (FunctionType, type)) and _root(value) in _LIBRARIES:
            return f"{value.__module__}.{value.__qualname__}"
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, type):
            bases = [self.value(base) for base in value.__bases__]
            own = {name: item for name, item in vars(value).items() if not _bookkeeping(name)}
            return [value.__qualname__, bases, self.value(own)]
        if isinstance(value, (staticmethod, classmethod)):
            return self.value(value.__func__)
        if isinstance(value, property):
            return self.value([value.fget, value.fset])
        if isinstance(value, nn.Module):  # one that is no child: kept in a list, or shared
            children = [self.value(child) for child in value.children()]
            return [self.module(value), children]
        if isinstance(value, (ModuleType, os.PathLike)):
            return str(getattr(value, "__name__", value))
        if hasattr(value, "to_dict") and _root(type(value)) == "transformers":
            return [self.value(type(value)), self.value(value.to_dict()), self._attention(value)]
        if isinstance(value, torch.jit.ScriptFunction):
            return str(value.code)
        inside = {} if _root(type(value)) in _NO_STATE else _state(value)
        text = "" if inside else re.sub(" at 0x[0-9a-f]+", "", repr(value))
        return [self.value(type(value)), self.value(inside), text]

    def _attention(self, config: Any) -> Any:
        return self.value(getattr(config, "_attn_implementation", None))

    def _function(self, function: FunctionType) -> list[Any]:
        """Bytecode, defaults, closure, and the globals that it reads."""
        code = []
        for part in _codes(function.__code__):
            plain = [repr(value) for value in part.co_consts if not isinstance(value, (CodeType, frozenset))]
            sets = [sorted(map(repr, value)) for value in part.co_consts if isinstance(value, frozenset)]
            code.append([part.co_code.hex(), plain, sets, part.co_names, part.co_varnames, part.co_freevars])
        cells = [_content(cell) for cell in function.__closure__ or ()]
        return [code, self.value([function.__defaults__, function.__kwdefaults__, cells]), self._globals(function)]

    def _globals(self, function: FunctionType) -> list[Any]:
        """Globals of a function by name, and of modules among them or imported inside what it takes from them."""
        names: dict[str, set[str]] = {"global": set(), "attribute": set(), "module": set()}
        for step in [step for part in _codes(function.__code__) for step in dis.get_instructions(part)]:
            if step.opname in _READS:
                names[_READS[step.opname]].add(str(step.argval))
        found = {name: function.__globals__[name] for name in names["global"] if name in function.__globals__}
        modules = [value for value in found.values() if isinstance(value, ModuleType)]
        modules += [sys.modules[name] for name in names["module"] if name in sys.modules]
        for module in modules:
            if module.__name__.partition(".")[0] not in _LIBRARIES:
                taken = [name for name in names["attribute"] if hasattr(module, name)]
                found |= {f"{module.__name__}.{name}": getattr(module, name) for name in taken}
        return [[name, self.value(found[name])] for name in sorted(found)]


def _state(value: Any) -> dict[str, Any]:
    """What an object holds, in its dictionary and in its slots."""
    slots = [name for base in type(value).__mro__ for name in vars(base).get("__slots__", ())]
    held = {name: getattr(value, name) for name in slots if hasattr(value, name) and name != "__dict__"}
    return held | dict(getattr(value, "__dict__", {}))


def _codes(code: CodeType) -> list[CodeType]:
    """A function's code and that of the functions inside it."""
    inner = [part for value in code.co_consts if isinstance(value, CodeType) for part in _codes(value)]
    return [code, *inner]


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _bookkeeping(name: str) -> bool:
    """Entries of a class that say where it stands, or that Python adds when it is copied; not what it does."""
    places = ("__module__", "__doc__", "__dict__", "__weakref__", "__firstlineno__", "__static_attributes__")
    return name in (*places, "__slotnames__", "__annotations__")
