"""The harness measures what it says: counts, medians, operations, memory."""

from __future__ import annotations

import torch

from common.harness import compare, count_flops, peak_of_call, relative_error, reset_peak, threads
from common.limits import copy_bandwidth, matmul_rate


def test_calls_take_turns_and_the_warm_up_is_not_counted():
    order: list[str] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    timings = compare(calls, repeats=3)
    assert order == ["a", "b"] * 4
    assert {name: timing.n for name, timing in timings.items()} == {"a": 3, "b": 3}


def test_a_call_warmed_up_before_is_not_warmed_up_again():
    order: list[str] = []
    compare({"a": lambda: order.append("a")}, repeats=2, first={"a": 0.0})
    assert order == ["a", "a"]


def test_a_slow_call_gets_one_sample():
    timing = compare({"slow": lambda: None}, repeats=5, budget=1.0, first={"slow": 10.0})["slow"]
    assert timing.n == 1
    assert timing.spread == 0


def test_short_calls_are_repeated_inside_a_sample():
    calls = [0]

    def count() -> None:
        calls[0] += 1

    timing = compare({"a": count}, repeats=2, sample_seconds=1e-3)["a"]
    assert timing.n == 2
    assert calls[0] > 10


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_flops_of_a_linear_layer_forward_and_backward():
    x, weight = torch.randn(4, 8), torch.randn(16, 8, requires_grad=True)
    one = 2 * 4 * 8 * 16
    assert count_flops(lambda: torch.nn.functional.linear(x, weight)) == one
    assert count_flops(lambda: torch.nn.functional.linear(x, weight).sum().backward()) == 2 * one


def test_flops_of_attention_include_the_fused_kernel():
    q = torch.randn(2, 3, 5, 8)
    assert count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)) == 2 * 2 * 3 * 5 * 5 * 8 * 2


def test_relative_error():
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])) == 4 / 3
    assert torch.tensor(relative_error(torch.tensor([torch.nan]), torch.ones(1))).isnan()


def test_peak_counts_what_was_freed_again():
    size = 64 << 20
    assert reset_peak() > 0

    def call() -> None:
        torch.ones(size // 4)

    assert 0.9 * size < peak_of_call(call) < 1.5 * size


def test_limits_are_positive():
    assert copy_bandwidth(1 << 16, repeats=1) > 0
    assert matmul_rate(8, 8, 8, torch.float32, repeats=1) > 0
