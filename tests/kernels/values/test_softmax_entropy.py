"""Softmax entropy and its gradient."""

from __future__ import annotations

import pytest
import torch

from fastmerge import use_backend
from fastmerge.kernels import launching
from fastmerge.kernels import softmax_entropy as module
from fastmerge.ops import softmax_entropy

from ...tolerances import assert_no_worse_than_eager
from .data import DTYPES, normal

INF = float("inf")


def eager(logits, grad):
    leaf = logits.clone().requires_grad_()
    with use_backend("reference"):
        entropy = softmax_entropy(leaf)
        entropy.backward(grad)
    return entropy.detach(), leaf.grad


def kernel(logits, grad):
    entropy, normalizer = module.softmax_entropy_forward(logits)
    return entropy, module.softmax_entropy_backward(grad, logits, entropy, normalizer)


def check(logits, seed=9):
    grad = normal(logits.shape[0], seed=seed, dtype=torch.float32, device=logits.device)
    found, plain = kernel(logits, grad), eager(logits, grad)
    truth = eager(logits.double(), grad.double())
    # An entropy is the difference of two numbers of the size of log C.
    scale = max(1.0, torch.tensor(float(logits.shape[1])).log().item())
    assert_no_worse_than_eager(found[0], plain[0], truth[0], scale)
    slope_scale = truth[1].abs() + scale * grad.double().abs()[:, None]
    assert_no_worse_than_eager(found[1], plain[1], truth[1], slope_scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 257), (70, 10), (2, 2500)], ids=str)
def test_no_worse_than_eager(shape, dtype, device):
    check(3 * normal(*shape, seed=1, dtype=dtype, device=device))


def test_shifted_logits(device):
    check(normal(4, 300, seed=1, dtype=torch.float32, device=device) + 10000)


def test_peaked_rows(device):
    logits = normal(4, 1500, seed=1, dtype=torch.float32, device=device)
    logits[:, 1400] += 40
    check(logits)


def test_no_rows(device):
    entropy, grad = kernel(torch.empty(0, 5, device=device), torch.empty(0, device=device))
    assert entropy.shape == (0,) and grad.shape == (0, 5)


def test_minus_infinity_is_probability_zero(device):
    logits = normal(3, 2100, seed=1, dtype=torch.float32, device=device)
    logits[0, :1500] = -INF
    logits[1, 1:] = -INF
    logits[2, 7] = -INF
    grad = torch.ones(3, device=device)
    entropy, slope = kernel(logits, grad)
    kept = logits[0, 1500:][None].clone()
    assert entropy[1] == 0 and not slope[1].any() and slope[2, 7] == 0
    torch.testing.assert_close(entropy[0], eager(kept, grad[:1])[0][0])


@pytest.mark.parametrize("row", [[0.0, float("nan"), 1.0], [0.0, INF, 1.0], [-INF] * 3], ids=str)
def test_not_finite(row, device):
    logits = torch.tensor([row, [1.0, 2.0, 3.0]], device=device)
    entropy, slope = kernel(logits, torch.ones(2, device=device))
    assert torch.isnan(entropy).tolist() == [True, False]
    assert torch.isnan(slope).any(1).tolist() == [True, False]


def test_strides(device):
    logits = normal(300, 12, seed=1, dtype=torch.float16, device=device).t()[::2]
    check(logits)


def test_launch_configurations_keep_the_bytes(device, monkeypatch):
    logits = normal(9, 700, seed=1, dtype=torch.float32, device=device)
    grad = normal(9, seed=2, dtype=torch.float32, device=device)
    first = kernel(logits, grad)
    for config in module.configurations(700):
        monkeypatch.setattr(launching, "choose", lambda *_, config=config: config)
        for expected, found in zip(first, kernel(logits, grad), strict=True):
            assert torch.equal(expected, found), config
