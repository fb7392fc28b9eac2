"""Changes of a matrix as products: exact, or the nearest of a rank."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spurge.engine.edits.low_rank import RankTooHigh, factored

SIZES = st.integers(1, 12)


@settings(max_examples=60, deadline=None)
@given(outputs=SIZES, inputs=SIZES, rows=st.integers(0, 12), columns=st.integers(0, 12), seed=st.integers(0, 99))
def test_the_product_is_the_change(outputs: int, inputs: int, rows: int, columns: int, seed: int) -> None:
    """Some rows and columns of a matrix change: never more than the fewer of them are needed."""
    draw = torch.Generator().manual_seed(seed)
    change = torch.zeros(outputs, inputs)
    some = torch.randperm(outputs, generator=draw)[:rows], torch.randperm(inputs, generator=draw)[:columns]
    change[some[0][:, None], some[1]] = torch.randn(len(some[0]), len(some[1]), generator=draw)
    found = factored(change, 0.0, 12)
    assert found.rank == max(1, min(len(some[0]), len(some[1])))
    assert found.error == 0
    assert torch.allclose(found.b @ found.a, change, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(outputs=st.integers(2, 12), inputs=st.integers(2, 12), rank=st.integers(1, 11), seed=st.integers(0, 99))
def test_a_truncated_change_is_the_nearest_and_says_how_near(outputs: int, inputs: int, rank: int, seed: int) -> None:
    change = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sizes = torch.linalg.svdvals(change)
    found = factored(change, 0.0, rank, truncate=True)
    assert found.rank == min(rank, len(sizes))
    off = (change - found.b.double() @ found.a.double()).norm() / change.norm()
    assert float(off) == pytest.approx(float(sizes[rank:].norm() / sizes.norm()), abs=1e-6)
    assert found.error == pytest.approx(float(off), abs=1e-6)
    if rank < len(sizes):
        with pytest.raises(RankTooHigh, match=rf"needs rank {len(sizes)} to be exact, {rank} is allowed, .* off by"):
            factored(change, 0.0, rank)


def test_a_change_of_low_rank_is_found_below_the_rounding_of_the_weights() -> None:
    draw = torch.Generator().manual_seed(0)
    old, left, right = (torch.randn(*shape, generator=draw) for shape in ((40, 60), (40, 3), (3, 60)))
    new = old + left @ right * 1e-2
    slack = float(new.norm()) * torch.finfo(torch.float32).eps / 2
    found = factored(new.double() - old.double(), slack, 40)
    assert found.rank == 3
    assert (old + found.b @ found.a - new).norm() < 4 * slack
