"""What the compiler makes of every kernel and configuration, read from its output; needs no GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton

from fastmerge.kernels import (
    coefficient_grad,
    launching,
    lowrank_linear,
    masked_linear,
    merged_linear,
    residual_adapter,
    row_linear,
    softmax_entropy,
)

from . import cases, offline

pytestmark = [
    pytest.mark.skipif(launching.INTERPRETED, reason="kernels loaded for the interpreter"),
    pytest.mark.xdist_group("offline"),  # they share what is compiled once
]
PINNED = triton.__version__ == "3.6.0"
CASES = {case.name: case for case in [*cases.cases(), *cases.sample()]}
# Tiles that feed a matrix instruction; fp32 without tf32 has none.
MATRIX = [
    name
    for name, case in CASES.items()
    if case.kernel.endswith(("_linear", "coefficient_grad", "adapter"))
    and not (case["x"] == "fp32" and case["precision"] == "ieee")
]


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, int]]:
    return offline.measure_all()


@pytest.fixture
def resources(found, request) -> dict[str, int]:
    return found[request.param]


def each(names):
    cases = [pytest.param(name, name, id=name) for name in names]
    return pytest.mark.parametrize("resources, name", cases, indirect=["resources"])


@each(CASES)
def test_fits_the_target(resources, name):
    case = CASES[name]
    assert resources["shared"] <= cases.SHARED_MEMORY[case.target]
    assert resources["atomics"] == 0
    if case.target <= 90 and PINNED:
        assert resources["spilled"] == 0 and resources["registers"] <= 255, resources


@each(MATRIX)
def test_matrix_instructions(resources, name):
    case = CASES[name]
    kind = offline.MATRIX_INSTRUCTION[case.target]
    assert resources[kind] > 0, resources
    others = set(offline.MATRIX_INSTRUCTION.values()) - {kind}
    if case.form == "rank 16":  # its thin product has fewer rows than the newer instructions take
        others -= {"mma.sync"}
    assert not any(resources[other] for other in others), resources
    if case.kernel == "merged_linear" and case.target == 90 and PINNED:
        # The merged tile goes from registers into the instruction, never through shared memory.
        assert resources["register_a"] == resources[kind], resources


@each(name for name, case in CASES.items() if case.kernel == "merged_linear" and case.aligned)
def test_weights_arrive_in_copies_of_16_bytes(resources, name):
    case = CASES[name]
    tiles = case["count"] + 1
    threads = 32 * case.config.warps
    width = {"fp32": 4}.get(case["weights"], 2)
    a_stage = tiles * case.config.out * case.config.inner * width // (16 * threads)
    stages = case.config.stages if PINNED else 1
    assert resources["wide_copies"] >= a_stage * stages, resources


@each(name for name, case in CASES.items() if case.kernel in ("softmax_entropy", "partial_sums"))
def test_sums_do_not_depend_on_the_number_of_warps(resources, name):
    """A reduction groups its terms by thread, unless it has only two: their sum has one order."""
    assert resources["widest_sum"] == (2 if CASES[name].form != "backward" else 0)


def test_a_wide_sum_is_seen(found):
    names = [name for name, case in CASES.items() if case.kernel.endswith("coefficient_grad")]
    assert all(found[name]["widest_sum"] > 2 for name in names)


def needed(case: cases.Case) -> int | None:
    x, base, delta = (dtype.itemsize for dtype in case.dtypes)
    if case.kernel == "merged_linear":
        in_flight = merged_linear.expert_group(case["count"], case.aligned)
        return merged_linear.needed_shared_memory(case.config, x, base, delta * in_flight)
    if case.kernel.endswith("coefficient_grad"):
        return coefficient_grad.needed_shared_memory(case.config, x)
    if case.kernel == "lowrank_linear":
        return lowrank_linear.needed_shared_memory(case.config, x, max(base, delta))
    if case.kernel == "masked_linear":
        return masked_linear.needed_shared_memory(case.config, x, base + delta)
    if case.kernel == "residual_adapter":
        rank = int(case.form.removeprefix("rank "))
        return residual_adapter.needed_shared_memory(case.config, rank, x, delta)
    if case.kernel == "row_linear":
        return row_linear.needed_shared_memory(case.config, x, base + delta)
    return None


@pytest.mark.skipif(not PINNED, reason="other versions of the compiler allocate differently")
@each(name for name, case in CASES.items() if case.target <= 90 and needed(case) is not None)
def test_the_bound_on_shared_memory_holds(resources, name):
    assert resources["shared"] <= needed(CASES[name])


@pytest.mark.skipif(not PINNED, reason="the page lists the resources under Triton 3.6.0")
def test_the_page_lists_these_resources(found):
    listed = offline.PAGE.read_text().partition(offline.BEGIN)[2].partition(offline.END)[0]
    assert listed == offline.table(found), (
        "docs/kernels.md is out of date: python -m tests.kernels.offline --write"
    )


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("limit", [101376, 166912, 232448])
@pytest.mark.parametrize("capability", [8, 9, 10, 12])
def test_configurations_never_change_the_order_of_a_sum(capability, limit):
    """Measuring picks among these, so whatever orders a sum must be the same in all of them."""
    for dtype in DTYPES:
        for delta_dtype in DTYPES:
            for rows in (1, 17, 40, 65, 5000):
                dtypes = dtype, delta_dtype, delta_dtype
                for count, aligned in itertools.product((1, 8, 9, 17), (False, True)):
                    arguments = rows, *dtypes, count, aligned, capability, limit
                    configs = merged_linear.configurations(*arguments)
                    assert 1 <= len(configs) <= 4 and len({c.inner for c in configs}) == 1
                for aligned in (False, True):
                    weights = (delta_dtype,) * 3
                    configs = lowrank_linear.configurations(rows, dtype, weights, aligned, limit)
                    assert len({(c.out, c.rows, c.inner, c.warps) for c in configs}) == 1
                    assert lowrank_linear.COLUMNS % configs[0].inner == 0
                    for kernel in (row_linear, masked_linear):
                        configs = kernel.configurations(rows, *dtypes, aligned, limit)
                        assert len({(c.out, c.rows, c.inner, c.warps) for c in configs}) == 1
            for outer, aligned in itertools.product((10, 1000), (False, True)):
                arguments = outer, 1000, dtype, delta_dtype, aligned, limit
                configs = coefficient_grad.configurations(*arguments)
                assert len({(c.out, c.rows, c.inner, c.warps) for c in configs}) == 1
    for classes in (1, 10, 1000, 50000):
        assert len({c.out for c in softmax_entropy.configurations(classes)}) == 1


def test_more_experts_take_narrower_steps():
    blocks = [merged_linear.inner_block(2, 2, count, True) for count in range(1, 33)]
    assert blocks == [64] * 8 + [32] * 8 + [16] * 16
    assert merged_linear.inner_block(2, 2, 1, False) == 16
