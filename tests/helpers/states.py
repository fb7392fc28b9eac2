"""What must come back after any use of a model: the model's own state, and that of the process."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch._dynamo import eval_frame
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from spurge.engine.base import device_checks, temporary
from spurge.engine.edits import overwrites
from spurge.engine.models import attention, hooks

SIGNALS = (signal.SIGALRM, signal.SIGTERM, signal.SIGINT)


def model_state(model: nn.Module) -> dict[str, Any]:
    """Bits and identity of all tensors, gradients, flags, hooks, forwards and configurations, by name."""
    state: dict[str, Any] = {"lock": _is_free(hooks._locks.get(next(model.parameters(), None)))}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        state[f"{name}: bits"] = tensor.detach().clone()
        state[f"{name}: flags"] = (id(tensor), tensor.data_ptr(), tensor.requires_grad, tensor.grad is None)
    for name, module in model.named_modules():
        state[f"{name}: attributes"] = {key: id(value) for key, value in vars(module).items() if key != "training"}
        state[f"{name}: training"] = module.training
        tables = {key: tuple(table) for key, table in vars(module).items() if "hooks" in key and table is not None}
        state[f"{name}: hooks"] = tables
        config: Any = getattr(module, "config", None)
        state[f"{name}: attention implementation"] = getattr(config, "_attn_implementation", None)
        state[f"{name}: edits"] = len(overwrites._STACKS.get(module, {}))
        state[f"{name}: open rows"] = module in attention._open_rows
    return state


def process_state(tokenizers: Iterable[Any] = ()) -> dict[str, Any]:
    """Handlers, modes and stances of torch, threads and locks, and the settings of tokenizers."""
    torch.autocast_increment_nesting()
    return {
        "handlers": [signal.getsignal(which) for which in SIGNALS],
        "waiting signals": dict(temporary._waiting),
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default type": torch.get_default_dtype(),
        "autocast": [torch.is_autocast_enabled(name) for name in ("cpu", "cuda")],
        "autocast depth": torch.autocast_decrement_nesting(),
        "modes": [type(mode) for mode in (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack())],
        "stance": eval_frame._stance.stance,
        "eager holders": hooks.EAGER._holders,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch threads": torch.get_num_threads(),
        "threads": {thread.name for thread in threading.enumerate()},
        "locks": [_is_free(overwrites._LOCK), _is_free(hooks._locks_guard), _is_free(hooks.EAGER._lock)],
        "deferred checks": device_checks._kept.get(),
        "warning filters": list(warnings.filters),
        "tokenizers": [(own.padding_side, own.pad_token) for own in tokenizers],
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The names of what is not as it was, with both values where they are short."""
    found = []
    for name in before.keys() | now.keys():
        old, new = before.get(name), now.get(name)
        if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
            if old.shape != new.shape or old.dtype != new.dtype or not torch.equal(_bytes(old), _bytes(new)):
                found.append(name)
        elif old != new:
            found.append(f"{name}: {old!r} became {new!r}"[:400])
    return sorted(found)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _is_free(lock: Any) -> bool:
    """Whether another thread could take a lock; None is free."""
    free = [True]

    def look() -> None:
        free[0] = lock.acquire(blocking=False)
        if free[0]:
            lock.release()

    if lock is not None:
        other = threading.Thread(target=look)
        other.start()
        other.join()
    return free[0]
