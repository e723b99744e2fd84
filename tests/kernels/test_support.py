"""What the launchers refuse and how they say it, without a GPU: fake tensors and fake devices."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton", reason="triton is not installed")

from fastmerge import kernels
from fastmerge.kernels import launching


@pytest.fixture
def gpu(monkeypatch):
    """A device that torch describes and nothing can run on; returns its adjustable properties."""
    properties = SimpleNamespace(major=9, minor=0, shared_memory_per_block_optin=232448)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: (properties.major, properties.minor)
    )
    return properties


def fake(*shape, dtype=torch.bfloat16, device="cuda"):
    with FakeTensorMode():
        return torch.empty(*shape, dtype=dtype, device=device)


def arguments(count=2, device="cuda", dtype=torch.bfloat16):
    """Fake x [3, 8], base and deltas [5, 8] and coefficients of a merged linear."""
    base, *deltas = (fake(5, 8, dtype=dtype, device=device) for _ in range(count + 1))
    x = fake(3, 8, dtype=dtype, device=device)
    return x, base, deltas, fake(count, dtype=torch.float32, device=device)


def forward(x, base, deltas, lam, bias=None):
    return kernels.merged_linear_forward(x, base, deltas, lam, bias, True, False)


def test_a_fitting_device_is_supported(gpu):
    x, base, deltas, _ = arguments()
    for name in ("merged_linear_forward", "merged_linear_backward_x", "row_linear_forward"):
        assert kernels.supports(name, {"x": x, "base": base}, deltas) == (True, "")
    tensors = {"dy": x, "x": x, "base": None}
    assert kernels.supports("linear_coefficient_grad", tensors, deltas) == (True, "")
    for name in ("masked_linear_forward", "linear_masked_coefficient_grad"):
        assert kernels.supports(name, {"x": x, "base": base}, deltas[:1]) == (True, "")
    assert kernels.supports("softmax_entropy_forward", {"logits": x}) == (True, "")
    with pytest.raises(ValueError, match="function must be one of linear_coefficient_grad"):
        kernels.supports("matmul", {"x": x})


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8], ids=str)
def test_unsupported_dtype(gpu, dtype):
    x, base, deltas, lam = arguments()
    base = fake(5, 8, dtype=dtype)
    message = f"base is {dtype}, expected one of float32, float16, bfloat16"
    assert message in kernels.supports("merged_linear_forward", {"x": x, "base": base}, deltas)[1]
    with pytest.raises(RuntimeError, match=f"^merged_linear: {message}"):
        forward(x, base, deltas, lam)


def test_deltas_of_two_dtypes(gpu):
    x, base, deltas, lam = arguments()
    deltas[1] = arguments(dtype=torch.float16)[2][1]
    with pytest.raises(RuntimeError, match=r"deltas\[1\] is torch.float16, expected .*bfloat16"):
        forward(x, base, deltas, lam)


def test_mismatched_devices(gpu):
    x, base, deltas, lam = arguments()
    deltas[1] = arguments(device="cuda:1")[2][1]
    with pytest.raises(RuntimeError, match=r"deltas\[1\] is on cuda:1, expected cuda:0 as x"):
        forward(x, base, deltas, lam)


@pytest.mark.parametrize("count", [0, 33])
def test_count_over_the_limit(gpu, count):
    with pytest.raises(RuntimeError, match=f"merged_linear: {count} deltas, expected 1 to 32"):
        forward(*arguments(count))


def test_shapes(gpu):
    x, base, deltas, lam = arguments()
    with pytest.raises(RuntimeError, match=r"x has shape \[3, 5\], expected \[3, 8\]"):
        forward(fake(3, 5), base, deltas, lam)
    with pytest.raises(RuntimeError, match=r"deltas\[0\] has shape \[4, 8\], expected \[5, 8\]"):
        forward(x, base, [fake(4, 8), deltas[1]], lam)
    with pytest.raises(RuntimeError, match=r"coefficients has shape \[1\], expected \[2\]"):
        forward(x, base, deltas, fake(1))
    with pytest.raises(RuntimeError, match=r"bias has shape \[4\], expected \[5\]"):
        forward(x, base, deltas, lam, fake(4))
    with pytest.raises(RuntimeError, match=r"coefficients has shape \[2\], expected \[3, 2\]"):
        kernels.row_linear_forward(x, base, deltas, lam, None, True, False)
    with pytest.raises(RuntimeError, match=r"x is torch\.float32, expected torch\.bfloat16 as dy"):
        kernels.linear_coefficient_grad(
            fake(3, 5), fake(3, 8, dtype=torch.float32), None, deltas, False
        )

    def masked(lam, masks):
        weights = fake(5, 8), fake(5, 8), masks
        return kernels.masked_linear_forward(x, *weights, lam, None, False)

    masks, row = fake(2, 5, 1, dtype=torch.uint8), fake(1, 2, dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"masks has shape \[2, 5, 2\], expected \[2, 5, 1\]"):
        masked(row, fake(2, 5, 2, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match=r"masks is torch\.bfloat16 on cuda:0, expected .*uint8"):
        masked(row, fake(2, 5, 1))
    with pytest.raises(RuntimeError, match="2 rows of coefficients do not divide 3 rows of x"):
        masked(fake(2, 2, dtype=torch.float32), masks)
    with pytest.raises(RuntimeError, match=r"logits has shape \[8\], expected \[R, C >= 1\]"):
        kernels.softmax_entropy_forward(fake(8))


def test_too_little_shared_memory(gpu):
    gpu.shared_memory_per_block_optin = 49152
    x, lam = fake(3, 64), fake(8, dtype=torch.float32)
    base, *deltas = (fake(32, 64) for _ in range(9))
    message = (
        "merged_linear: 8 deltas in torch.bfloat16 need 86016 bytes of shared memory per block"
    )
    with pytest.raises(RuntimeError, match=f"^{message}, found 49152$"):
        forward(x, base, deltas, lam)
    tensors = {"x": x, "base": base}
    assert kernels.supports("merged_linear_forward", tensors, deltas) == (
        False,
        f"{message}, found 49152",
    )
    gpu.shared_memory_per_block_optin = 16384
    assert "found 16384" in kernels.supports("row_linear_forward", tensors, deltas)[1]
    found = kernels.supports("linear_coefficient_grad", {"dy": x, "x": x}, deltas)
    assert found[0] is False and "found 16384" in found[1]


def test_old_device(gpu):
    gpu.major, gpu.minor = 7, 5
    with pytest.raises(RuntimeError, match=r"cuda:0 has compute capability 7.5, expected 8.0 or"):
        forward(*arguments())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_device():
    with pytest.raises(RuntimeError, match="merged_linear: torch finds no CUDA device"):
        forward(*arguments())
    with pytest.raises(RuntimeError, match="x is on cpu, expected a CUDA device"):
        forward(*arguments(device="cpu"))


def test_without_triton(gpu, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else found(name)
    )
    x, base, deltas, _ = arguments()
    expected = (False, "merged_linear_forward: triton is not installed")
    assert kernels.supports("merged_linear_forward", {"x": x, "base": base}, deltas) == expected


class FakeEvent:
    """A CUDA event on a clock that each launch moves."""

    now = 0.0

    def __init__(self, enable_timing):
        self.at = 0.0

    def record(self):
        self.at = FakeEvent.now

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return other.at - self.at


def test_choice_is_measured_once_and_skips_what_does_not_fit(monkeypatch):
    from triton.runtime.errors import OutOfResources

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.delenv("FASTMERGE_TUNE", raising=False)
    monkeypatch.setattr(launching, "_chosen", {})
    configs = [launching.Config(64, 16, 64, 4, stages) for stages in (4, 3, 2)]
    milliseconds = {4: None, 3: 5.0, 2: 2.0}
    launched = []

    def launch(config):
        launched.append(config)
        if milliseconds[config.stages] is None:
            raise OutOfResources(300000, 232448, "shared memory")
        FakeEvent.now += milliseconds[config.stages]

    capturing = True
    assert launching.choose("key", configs, launch) is configs[0] and not launched
    capturing = False
    assert launching.choose("key", configs, launch) is configs[2]
    count = len(launched)
    assert count == 13 and launching.choose("key", configs, launch) is configs[2]
    assert len(launched) == count
    monkeypatch.setenv("FASTMERGE_TUNE", "0")
    assert launching.choose("other", configs, launch) is configs[0] and len(launched) == count
