from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spurge.engine.base.budgets import budget, free_bytes, parse_bytes
from spurge.engine.cascade.memory_model import AGAIN, Footprint

LIGHT = Footprint(
    block_of=(0, 1, 2, 3),
    blocks=4,
    tokens=8,
    trace=100,
    saved=10,
    spare=7,
    last=5,
    opened=8,
    head=3,
    row=4,
    passing=6,
    fixed=50,
    cpu=False,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [("256MiB", 2**28), ("1 GB", 10**9), ("2gib", 2**31), ("0.5 KiB", 512), (17, 17), ("17", 17), ("3 k", 3000)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1 TiB", "1,5 GB", 0, "0", True, None, 1.5])
def test_bad_sizes_are_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r"memory: "):
        parse_bytes(text)  # type: ignore[arg-type]


def test_default_is_a_share_of_what_is_free() -> None:
    assert 0 < budget(None, "cpu") < free_bytes("cpu") * 1.1
    assert budget("1KiB", "cpu") == 1024


@given(limit=st.integers(1, 40_000), nodes=st.integers(1, 9), batch=st.integers(1, 3), count=st.integers(1, 4))
def test_cuts_cover_every_site_and_node_once_and_fit(limit: int, nodes: int, batch: int, count: int) -> None:
    sites = list(range(4))[-count:]
    whole = LIGHT.backward(sites, nodes, batch) <= limit
    if not whole and LIGHT.backward(sites[:1], 1, batch) > int(limit / AGAIN):
        with pytest.raises(ValueError, match="memory: one example of 8 tokens needs"):
            LIGHT.cuts(limit, nodes, batch, sites)
        return
    cuts = LIGHT.cuts(limit, nodes, batch, sites)
    seen = [(p, s) for group, part in cuts for p in group for s in range(nodes)[part]]
    assert sorted(seen) == [(p, s) for p in range(count) for s in range(nodes)]
    sizes = [([sites[p] for p in group], len(range(nodes)[part])) for group, part in cuts]
    assert all(LIGHT.backward(group, own, batch) <= limit for group, own in sizes)


@given(limit=st.integers(1, 40_000), batch=st.integers(1, 3))
def test_forward_rows_fit(limit: int, batch: int) -> None:
    if LIGHT.forward(1, batch) > limit:
        with pytest.raises(ValueError, match="memory: one row needs"):
            LIGHT.rows_forward(limit, batch)
        return
    assert LIGHT.forward(LIGHT.rows_forward(limit, batch), batch) <= limit


@given(limit=st.integers(1, 4000), nodes=st.integers(1, 9), batch=st.integers(1, 3))
def test_node_slices_of_the_joint_path_cover_every_node_and_fit(limit: int, nodes: int, batch: int) -> None:
    if LIGHT.scaled(nodes, batch) > limit and LIGHT.scaled(1, batch) > int(limit / AGAIN):
        with pytest.raises(ValueError, match="memory: one example of 8 tokens needs"):
            LIGHT.node_slices(limit, nodes, batch)
        return
    slices = LIGHT.node_slices(limit, nodes, batch)
    assert [s for part in slices for s in range(nodes)[part]] == list(range(nodes))
    assert all(LIGHT.scaled(len(range(nodes)[part]), batch) <= limit for part in slices)


def test_what_several_passes_need() -> None:
    one, other = LIGHT.backward([0, 1], 2, 1), LIGHT.backward([2, 3], 2, 1)
    assert one > other
    assert LIGHT.peak([([0, 1], 2)], 1) == one
    assert one < LIGHT.peak([([0, 1], 2), ([2, 3], 2)], 1) < 1.5 * one
    assert LIGHT.kept(2, differentiable=True) > LIGHT.kept(2, differentiable=False) > 2 * LIGHT.trace
