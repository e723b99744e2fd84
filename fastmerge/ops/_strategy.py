"""The cost model of `merged_linear`: which of panel, fused, stacked and grouped to run.

Times are estimates from bytes and operations; what matters is their order. Two of the rates below
were counted in compiled code, not timed: see the constants.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

STRATEGIES = ("panel", "fused", "stacked", "grouped")

TILE_ROWS = 128  # activation rows of one tile of the fused kernel
SHARED_TILES = 2  # row tiles that read a weight tile from L2 instead of memory, side by side
MERGE_CLOCKS = 0.19 / 8  # clocks to merge one weight in registers, per expert and row tile
MACS_PER_CLOCK = 2048  # dense 16-bit multiply-adds of one multiprocessor per clock
# In rows of activations that the product of a weight would take meanwhile, measured on one core
# with AVX-512: a group's panels are read, written and packed, and combined per expert; products
# over a group's few rows are slower than one over all.
GROUP_ROWS = 8.0
GROUP_ROWS_PER_EXPERT = 1.4
GROUP_SLOWER = 1.2
LAUNCH_SECONDS = 4e-6  # per kernel, where nothing hides it

_forced: ContextVar[str | None] = ContextVar("fastmerge_strategy", default=None)


@dataclass(frozen=True)
class Rates:
    """What a device can do.

    Attributes:
        bandwidth: bytes per second of a copy.
        multiply_adds: dense multiply-adds per second of the GEMMs' dtype.
        cache: bytes of the last cache.
        task_vector_rows: rows of activations whose product takes as long as writing the task
            vectors of one expert, where the stacked strategy does that.
    """

    bandwidth: float
    multiply_adds: float
    cache: int
    task_vector_rows: float = 0.0


@dataclass(frozen=True)
class Problem:
    """One merged linear layer.

    Attributes:
        rows: rows of activations R.
        weights: entries of the weight N.
        experts: K.
        base_bytes, delta_bytes, x_bytes: bytes of one entry of base, deltas and activations.
        groups: groups of rows with coefficients of their own; None: all rows share one [K].
    """

    rows: int
    weights: int
    experts: int
    base_bytes: int
    delta_bytes: int
    x_bytes: int
    groups: int | None = None


@contextmanager
def use_strategy(name: str) -> Iterator[None]:
    """Force the strategy of every merged linear layer that has a choice inside the block.

    Args:
        name: "panel" or "fused" where all rows share coefficients, on a GPU; "stacked", or
            "grouped" on a CPU, for row coefficients.

    Raises:
        ValueError: the name is none of these.
    """
    if name not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def expected_seconds(problem: Problem, rates: Rates) -> dict[str, float]:
    """Expected time of one forward pass by each strategy that can compute the problem."""
    p = problem
    multiply = p.rows * p.weights / rates.multiply_adds
    read = p.weights * (p.base_bytes + p.experts * p.delta_bytes) / rates.bandwidth
    if p.groups is not None:
        row = p.weights / rates.multiply_adds
        products = (p.experts + 1) * multiply + p.experts * rates.task_vector_rows * row
        combine = p.groups * (GROUP_ROWS + p.experts * GROUP_ROWS_PER_EXPERT) * row
        return {
            "grouped": max(read, GROUP_SLOWER * multiply + combine) + LAUNCH_SECONDS,
            "stacked": max(read * _passes(p.rows), products) + LAUNCH_SECONDS,
        }
    panel_bytes = max(1 << 20, rates.cache // 4)
    panels = max(1, -(-p.weights * p.x_bytes // panel_bytes))
    combine = read + p.weights * p.x_bytes / rates.bandwidth
    # the first combine and the last product have nothing to run beside
    beside = max(combine, multiply) * (panels - 1) / panels
    panel = beside + (combine + multiply) / panels + 2 * LAUNCH_SECONDS
    clocks = rates.multiply_adds / MACS_PER_CLOCK
    tiles = -(-p.rows // TILE_ROWS)
    merge = tiles * p.weights * p.experts * MERGE_CLOCKS / clocks
    fused = max(read * _passes(p.rows), merge + multiply) + LAUNCH_SECONDS
    return {"panel": panel, "fused": fused}


def _passes(rows: int) -> int:
    """How often row tiles read every weight from memory."""
    tiles = max(1, -(-rows // TILE_ROWS))
    return -(-tiles // SHARED_TILES)


def choose(problem: Problem, rates: Rates, available: frozenset[str]) -> str | None:
    """The fastest available strategy by expectation, or the forced one; None if there is none.

    Args:
        problem: the layer.
        rates: the device.
        available: strategies whose kernels can run here.

    Raises:
        RuntimeError: the forced strategy cannot compute this or is not available.
    """
    seconds = expected_seconds(problem, rates)
    forced = _forced.get()
    if forced is not None:
        if forced not in seconds:
            raise RuntimeError(
                f"merged_linear: strategy {forced!r} was forced, but coefficients per "
                f"{'expert' if problem.groups is None else 'row'} need {' or '.join(seconds)}"
            )
        if forced not in available:
            raise RuntimeError(
                f"merged_linear: strategy {forced!r} was forced, but its kernels cannot run here"
            )
        return forced
    able = [name for name in seconds if name in available]
    return min(able, key=seconds.__getitem__) if able else None


# one core with AVX-512
CPU_RATES = Rates(10e9, 45e9, 1 << 20, task_vector_rows=2.0)


@functools.cache
def device_rates(index: int, dtype: torch.dtype) -> Rates:
    """Rates of a CUDA device by its architecture and size; estimates for unknown ones."""
    properties = torch.cuda.get_device_properties(index)
    processors = properties.multi_processor_count
    hertz = getattr(properties, "clock_rate", 1_700_000) * 1e3
    # sm_80 multiplies at half sm_90's rate per clock; fp32 (tf32 or not) is slower again
    scale = 1.0 if properties.major >= 9 else 0.5
    scale *= 1.0 if dtype.itemsize == 2 else 0.0625
    bandwidths = {8: 1.4e12, 9: 3.0e12, 10: 6.0e12}
    bandwidth = bandwidths.get(properties.major, 1.0e12)
    if properties.major == 9 and properties.total_memory > 120 << 30:
        bandwidth = 4.3e12  # the 141 GB model's faster memory
    return Rates(bandwidth, processors * hertz * MACS_PER_CLOCK * scale, properties.L2_cache_size)
