"""Seconds and peak memory of a piece of work."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


@dataclass
class Cost:
    """What a piece of work took: wall seconds, and the process's peak memory meanwhile in MiB."""

    seconds: float = 0.0
    peak_mib: float = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the body's time out; its memory still counts."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds -= time.perf_counter() - begun


@contextmanager
def measured() -> Iterator[Cost]:
    """Measure the body; the cost is filled in when it ends.

    Where Linux can reset the peak, it is the body's own; elsewhere the process's so far.
    """
    try:
        _CLEAR.write_text("5")  # sets VmHWM back to the present resident size
    except OSError:
        pass
    cost = Cost()
    begun = time.perf_counter()
    try:
        yield cost
    finally:
        cost.seconds += time.perf_counter() - begun
        cost.peak_mib = _peak_mib()


def _peak_mib() -> float:
    try:
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
