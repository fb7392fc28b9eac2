from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spurge.engine.cascade.quadrature import MOST_NODES, gauss_legendre, gauss_radau


@given(nodes=st.integers(1, 16))
def test_exact_for_polynomials_up_to_degree_2n_minus_1(nodes: int) -> None:
    alphas, weights = gauss_legendre(nodes)
    for degree in range(2 * nodes):
        assert float((weights * alphas**degree).sum()) == pytest.approx(1 / (degree + 1), rel=1e-12)


@given(nodes=st.integers(1, 16))
def test_radau_is_exact_up_to_degree_2n(nodes: int) -> None:
    alphas, weights, end = gauss_radau(nodes)
    for degree in range(2 * nodes + 1):
        assert float((weights * alphas**degree).sum()) + end == pytest.approx(1 / (degree + 1), rel=1e-10)


@given(nodes=st.integers(1, MOST_NODES))
def test_radau_nodes_lie_inside_and_weights_sum_to_one(nodes: int) -> None:
    alphas, weights, end = gauss_radau(nodes)
    assert alphas.shape == weights.shape == (nodes,)
    assert bool((alphas > 0).all() & (alphas < 1).all() & (weights > 0).all())
    assert float(weights.sum()) + end == pytest.approx(1, abs=1e-10)


@given(nodes=st.integers(1, MOST_NODES))
def test_nodes_lie_inside_and_weights_sum_to_one(nodes: int) -> None:
    alphas, weights = gauss_legendre(nodes)
    assert alphas.dtype == weights.dtype == torch.float64
    assert bool((alphas > 0).all() & (alphas < 1).all() & (weights > 0).all())
    assert torch.equal(alphas, alphas.sort().values)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-13)


@pytest.mark.parametrize("nodes", [0, -1, MOST_NODES + 1, 2.0, "3", True, None])
def test_bad_counts_are_refused(nodes: object) -> None:
    with pytest.raises(ValueError, match="nodes: need a whole number from 1 to 64"):
        gauss_legendre(nodes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nodes: need a whole number from 1 to 64"):
        gauss_radau(nodes)  # type: ignore[arg-type]
