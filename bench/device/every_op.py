"""Every op on a device, beside what it has to compute: cases of ``spurge bench``, and the widths of large models.

    python bench/device/every_op.py --device cuda

``--quick`` makes everything small, as a sanitizer wants it. Exit status 1 where one computes something else, or ends
with an error; its name and what came are printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from spurge import ops, reference
from spurge.bench.case import MIB
from spurge.bench.kernels import DTYPES, KERNELS, check
from spurge.bench.timing import relative_error

WIDTHS = {"llama-7b": (4096, 11008), "qwen2-1.5b": (1536, 8960)}  # of the model, of a layer's neurons
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
Check = tuple[str, Callable[[], None]]


def benched(device: str, size: int) -> Iterator[Check]:
    """The cases of ``spurge bench``, each of so many bytes."""
    for name, make in KERNELS.items():
        for dtype in DTYPES[name]:
            yield f"{name} {dtype}", lambda make=make, dtype=dtype: check(make(size, dtype, device))


def wide(model: str, dtype: torch.dtype, device: str, tokens: int) -> None:
    """The ops of a layer at a model's widths, against their float64 twins.

    Raises:
        ValueError: one computes something else.
    """
    hidden, neurons = WIDTHS[model]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape).to(device, dtype)

    x, u, grads = normal(2, tokens, hidden), normal(2, tokens, hidden), normal(8, tokens, hidden)
    p, z = normal(2, tokens, neurons), normal(2, tokens, neurons)
    mask, scale = torch.rand(2, tokens, device=device) > 0.3, torch.rand(2, tokens, device=device)
    columns, gates = (
        torch.randperm(neurons, device=device)[: neurons // 16],
        torch.rand(2, neurons // 16, device=device),
    )
    alphas = [0.1, 0.4, 0.6, 0.9]
    found = {
        "open_rows": (ops.open_rows(x, u, alphas), reference.open_rows(x, u, alphas)),
        "node_sum": (ops.node_sum(grads, alphas), reference.node_sum(grads, alphas)),
        "multiply_sum": (ops.multiply_sum(p, z, mask), reference.multiply_sum(p, z, mask)),
        "first_order": (ops.first_order(p, z, scale, mask), reference.first_order(p, z, scale, mask)),
        "gate_columns_": (ops.gate_columns_(z.clone(), columns, gates), reference.gate_columns(z, columns, gates)),
    }
    for name, (got, want) in found.items():
        pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
        error = max(relative_error(mine, other) for mine, other in pairs)
        if not error <= BOUNDS[dtype]:
            raise ValueError(f"{name}: is {error:.1e} from its float64 twin, above {BOUNDS[dtype]:.0e}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    args = parser.parse_args()
    torch.manual_seed(0)
    checks = [*benched(args.device, MIB // 8 if args.quick else 8 * MIB)]
    for model in WIDTHS:
        for dtype in BOUNDS:
            call = partial(wide, model, dtype, args.device, 3 if args.quick else 128)
            checks.append((f"{model}, {dtype}", call))
    failed = 0
    for name, call in checks:
        try:
            call()
            print(f"ok      {name}", flush=True)
        except Exception as error:  # of whatever kind: the others are looked at, too
            failed += 1
            print(f"FAILED  {name}: {type(error).__name__}: {error}", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
