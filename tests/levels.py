"""Runs of the CPU kernels at every instruction-set level and thread count."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from fastmerge._native import extensions

from .samples import raw

THREADS = [1, 2, 3, 5]


def same_everywhere(run: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    """Results of `run`, after checking that each level and thread count gives the same bytes."""
    isa, before = extensions.cpu.isa(), torch.get_num_threads()
    first: tuple[torch.Tensor, ...] | None = None
    try:
        for level, threads in itertools.product(extensions.cpu.supported_isas(), THREADS):
            extensions.cpu.set_isa(level)
            torch.set_num_threads(threads)
            results = run()
            first = results if first is None else first
            for expected, found in zip(first, results, strict=True):
                assert raw(expected) == raw(found), f"bytes differ at {level}, {threads} threads"
    finally:
        extensions.cpu.set_isa(isa)
        torch.set_num_threads(before)
    return first
