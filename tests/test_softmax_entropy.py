"""`softmax_entropy`: values, extreme logits, gradients."""

from __future__ import annotations

import math

import pytest
import torch

from fastmerge.ops import softmax_entropy

from .samples import (
    DTYPES,
    LAYOUTS,
    assert_same_bytes_for_threads,
    dtype_id,
    laid_out,
    random,
)
from .tolerances import assert_no_worse_than_eager


def entropy(logits):
    log_p = torch.log_softmax(logits, dim=-1)
    return -(log_p.exp() * log_p).sum(-1)


def plain(logits):
    """As learning loops write it: fp32 inside, as losses are under autocast."""
    return entropy(logits if logits.dtype == torch.float64 else logits.float())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (5,), (7, 15), (2, 3, 257), (3, 1000)])
def test_values_and_gradients(backend, shape, layout):
    logits = laid_out(4 * random(shape, torch.float32, seed=1), layout)
    grad = random(shape[:-1], torch.float32, seed=2)
    check(logits, grad)


@pytest.mark.parametrize("scale", [0.01, 3, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_dtypes_and_sharpness(dtype, scale):
    check(random((9, 101), dtype, seed=3) * scale, random(9, torch.float32, seed=4))


def check(logits, grad):
    ours, eager, truth = (logits.detach().to(d).requires_grad_() for d in dtypes_of(logits))
    found, expected, exact = softmax_entropy(ours), plain(eager), entropy(truth)
    assert found.dtype == expected.dtype
    # H = log Z - sum p x: what is added up is as large as the logits' spread
    spread = (logits.double().amax(-1) - logits.double().amin(-1)) + math.log(logits.shape[-1])
    assert_no_worse_than_eager(found, expected, exact, spread)
    for result in (found, expected, exact):
        result.backward(grad.to(result.dtype))
    scale = (grad.double().abs() * (1 + spread)).unsqueeze(-1).expand_as(logits)
    assert_no_worse_than_eager(ours.grad, eager.grad, truth.grad, scale)


def dtypes_of(logits):
    return logits.dtype, logits.dtype, torch.float64


def test_equal_logits_have_the_entropy_of_their_number(backend):
    found = softmax_entropy(torch.full((2, 64), -7.5))
    torch.testing.assert_close(found, torch.full((2,), math.log(64)), rtol=2**-22, atol=0)


def test_minus_infinity_is_probability_zero(backend):
    logits = torch.tensor([[0.0, -math.inf, 0.0], [1.0, -math.inf, -math.inf]]).requires_grad_()
    found = softmax_entropy(logits)
    torch.testing.assert_close(found, torch.tensor([math.log(2), 0.0]), rtol=2**-22, atol=2**-24)
    found.sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0, 1] == 0 and logits.grad[1].abs().max() == 0


def test_huge_logits_do_not_overflow(backend):
    logits = torch.tensor([[3e38, -3e38, 0.0], [1e30, 1e30, -1e30]])
    found = softmax_entropy(logits)
    torch.testing.assert_close(found, torch.tensor([0.0, math.log(2)]), rtol=2**-22, atol=0)


def test_nan_stays_in_its_row(backend):
    logits = random((3, 5), torch.float32, seed=1)
    logits[1, 2] = math.nan
    assert softmax_entropy(logits).isnan().tolist() == [False, True, False]


def test_gradcheck():
    logits = random((3, 7), torch.float64, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(softmax_entropy, (logits,))


def test_same_bytes_for_every_thread_count():
    logits, grad = random((301, 507), torch.float32, 1), random(301, torch.float32, 2)
    backward = torch.ops.fastmerge.softmax_entropy_backward
    assert_same_bytes_for_threads(lambda: (softmax_entropy(logits), backward(grad, logits)))


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(3, 0), r"shape \[3, 0\], expected \[..., C >= 1\]"),
        (torch.zeros(()), r"shape \[\], expected"),
        (torch.zeros(3, dtype=int), "logits must be a floating-point tensor, got torch.int64"),
    ],
)
def test_errors_name_the_argument(logits, message):
    with pytest.raises(RuntimeError, match=message):
        softmax_entropy(logits)
