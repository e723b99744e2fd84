"""What a job shows while it runs: bytes, tensors, speed and the time that is left."""

from __future__ import annotations

import sys
from typing import Any


class Progress:
    """A line on the terminal; nothing where there is none.

    Args:
        total: bytes that will be read.
        tensors: tensors that will be written.
        show: False to show nothing.
    """

    def __init__(self, total: int, tensors: int, show: bool):
        self._bar: Any = None
        if not show or not sys.stderr.isatty():
            return
        from rich import progress as rich  # here: jobs without a terminal need not wait for it
        from rich.console import Console

        self._bar = rich.Progress(
            rich.TextColumn("{task.description}"),
            rich.BarColumn(),
            rich.DownloadColumn(),
            rich.TransferSpeedColumn(),
            rich.TextColumn("{task.fields[written]}/{task.fields[tensors]} tensors"),
            rich.TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._written = 0
        self._task = self._bar.add_task("merging", total=total, written=0, tensors=tensors)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def read(self, count: int) -> None:
        """Count bytes that were read."""
        if self._bar is not None:
            self._bar.advance(self._task, count)

    def wrote(self, tensors: int = 1) -> None:
        """Count tensors that were written."""
        if self._bar is not None:
            self._written += tensors
            self._bar.update(self._task, written=self._written)
