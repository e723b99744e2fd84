"""The cost model's choices, as a table: what it should pick is known from kernels' arithmetic."""

from __future__ import annotations

import pytest

from fastmerge.ops._strategy import (
    CPU_RATES,
    STRATEGIES,
    Problem,
    Rates,
    choose,
    expected_seconds,
    use_strategy,
)

H200 = Rates(bandwidth=4.3e12, multiply_adds=395e12, cache=50 << 20)
EVERY = frozenset(STRATEGIES)
ON_GPU = EVERY - {"grouped"}


def _problem(rows, side=4096, experts=8, **options) -> Problem:
    return Problem(rows, side * side, experts, 2, 2, 2, **options)


@pytest.mark.parametrize(
    "rows, side, experts, expected",
    [
        (1, 4096, 8, "fused"),  # decoding
        (16, 4096, 8, "fused"),
        (128, 4096, 8, "fused"),
        (256, 4096, 8, "fused"),  # the last row tile that shares its weight reads
        (512, 4096, 8, "panel"),
        (3200, 768, 8, "panel"),  # AdaMerging, ViT-B/32: 8 tasks of 8 images, 50 tokens each
        (6400, 768, 8, "panel"),  # 16 images
        (32768, 1024, 8, "panel"),
        (1, 8192, 2, "fused"),
        (2048, 8192, 2, "panel"),
        (64, 1024, 32, "fused"),
        (4096, 1024, 32, "panel"),
    ],
)
def test_choices(rows, side, experts, expected):
    assert choose(_problem(rows, side, experts), H200, EVERY) == expected


@pytest.mark.parametrize("rows", [1, 100, 10_000])
def test_row_coefficients_are_stacked(rows):
    problem = _problem(rows, groups=rows)
    assert choose(problem, H200, ON_GPU) == "stacked"
    assert choose(problem, H200, ON_GPU - {"stacked"}) is None


@pytest.mark.parametrize(
    ("rows", "groups", "experts", "expected"),
    [
        (3200, 64, 8, "grouped"),  # a weight per sample, 50 tokens each
        (3200, 8, 8, "grouped"),  # a task per sample
        (3200, 1, 8, "grouped"),
        (3200, 3200, 8, "stacked"),  # a weight per token
        (64, 64, 2, "stacked"),
        (50, 1, 1, "grouped"),
    ],
)
def test_row_coefficients_on_a_cpu(rows, groups, experts, expected):
    problem = Problem(rows, 768 * 3072, experts, 4, 4, 4, groups)
    assert choose(problem, CPU_RATES, EVERY) == expected


def test_no_estimate_is_below_the_floor():
    """max(GEMM, one read of everything) bounds every strategy."""
    for rows in (1, 64, 512, 8192):
        for experts in (1, 8, 32):
            problem = _problem(rows, experts=experts)
            multiply = rows * problem.weights / H200.multiply_adds
            read = problem.weights * 2 * (experts + 1) / H200.bandwidth
            for seconds in expected_seconds(problem, H200).values():
                assert seconds >= max(multiply, read)


def test_what_cannot_run_is_not_chosen():
    assert choose(_problem(1), H200, frozenset({"panel"})) == "panel"
    assert choose(_problem(8192), H200, frozenset({"fused"})) == "fused"
    assert choose(_problem(1), H200, frozenset()) is None


def test_forced_strategy():
    with use_strategy("panel"):
        assert choose(_problem(1), H200, EVERY) == "panel"
        with pytest.raises(RuntimeError, match="kernels cannot run here"):
            choose(_problem(1), H200, frozenset({"fused"}))
        with pytest.raises(RuntimeError, match="per row need grouped or stacked"):
            choose(_problem(1, groups=1), H200, EVERY)
    with use_strategy("stacked"), pytest.raises(RuntimeError, match="need panel or fused"):
        choose(_problem(1), H200, EVERY)
    assert choose(_problem(1), H200, EVERY) == "fused"
    with pytest.raises(ValueError, match="strategy must be one of"), use_strategy("magic"):
        pass


def test_the_page_lists_these_expectations():
    expectations = pytest.importorskip("tools.kernel_expectations", reason="no source checkout")
    page = expectations.PAGE.read_text(encoding="utf-8")
    listed = page.partition(expectations.BEGIN)[2].partition(expectations.END)[0]
    assert listed == expectations.table(), (
        "docs/kernels.md is out of date: python -m tools.kernel_expectations"
    )
