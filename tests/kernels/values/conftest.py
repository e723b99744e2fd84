"""Set-up of the value tests."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastmerge.kernels import launching

if launching.INTERPRETED:
    from .. import bf16_interpreter

    bf16_interpreter.install()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if launching.INTERPRETED else "cuda")
