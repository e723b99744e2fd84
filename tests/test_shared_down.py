"""`SharedDown`: low-rank deltas with one down factor, the same as each expert with its own."""

from __future__ import annotations

import pytest
import torch

import fastmerge as fm
from fastmerge import ops
from fastmerge.deltas import LowRank, SharedDown

from .tolerances import assert_no_worse_than_eager


def pair(shape, rank, count, dtype=torch.float64):
    """The shared form, the general one, and a base of this shape."""
    g = torch.Generator().manual_seed(2)

    def draw(*sizes):
        return torch.randn(*sizes, generator=g, dtype=torch.float64).to(dtype)

    down, ups = draw(rank, *shape[1:]), [draw(shape[0], rank) for _ in range(count)]
    return SharedDown(down, ups), LowRank([down] * count, ups), draw(*shape)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("lead", [(5,), (2, 3), (0,)])
@pytest.mark.parametrize(("rank", "count"), [(1, 1), (3, 2), (4, 17)])
@pytest.mark.parametrize("per_row", [False, True])
def test_a_layer_is_the_same(transpose, lead, rank, count, per_row):
    shared, general, base = pair((7, 6), rank, count)
    bias = torch.randn(6 if transpose else 7).double()
    results = []
    for form in (shared, general):
        torch.manual_seed(1)
        x = torch.randn(*lead, 7 if transpose else 6).double().requires_grad_()
        lam = torch.randn(*(lead if per_row else ()), count).double().requires_grad_()
        y = ops.merged_linear(x, base, form, lam, bias, transpose=transpose)
        grads = torch.autograd.grad(y.sin().sum(), [x, lam])
        results.append((y, *grads))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", [(7, 6), (4, 3, 2, 2), (1, 1)])
def test_sums_gradients_and_parts_are_the_same(shape):
    shared, general, base = pair(shape, 3, 2)
    lam = torch.tensor([0.4, -1.5], dtype=torch.float64)
    grad = torch.randn(shape).double()
    for part in (
        lambda f: ops.weighted_sum(base, f, lam),
        lambda f: ops.coefficient_grad(grad, f),
        lambda f: torch.stack(list(f.task_vectors(base, torch.float64))),
        lambda f: ops.weighted_sum(base[:1], f.rows(0, 1), lam),
        lambda f: ops.weighted_sum(base[0], f.entry(0), lam) if base.dim() > 2 else torch.ones(1),
        lambda f: ops.weighted_sum(base[[0, 0]], f.gather(torch.tensor([0, 0])), lam),
        lambda f: ops.weighted_sum(base.flatten(1), f.flat(), lam),
    ):
        torch.testing.assert_close(part(shared), part(general))
    assert len(shared) == 2 and shared.nbytes() < general.nbytes()


def test_errors_in_fp32_are_those_of_eager():
    shared, _, base = pair((40, 33), 8, 3, torch.float32)
    torch.manual_seed(1)
    x, lam = torch.randn(9, 33), torch.tensor([0.3, 0.5, -0.2])
    weights = [base, *shared.task_vectors(base, torch.float32)]
    exact = [base.double(), *shared.task_vectors(base, torch.float64)]
    eager = x @ (weights[0] + sum(c * w for c, w in zip(lam, weights[1:], strict=True))).T
    truth = (
        x.double() @ (exact[0] + sum(c * w for c, w in zip(lam.double(), exact[1:], strict=True))).T
    )
    parts = sum(c.abs() * w.abs() for c, w in zip([torch.ones(()), *lam], exact, strict=True))
    scale = x.double().abs() @ parts.T
    assert_no_worse_than_eager(ops.merged_linear(x, base, shared, lam), eager, truth, scale)


def test_attach_shares_what_is_equal(tmp_path):
    from .test_linearized import X, net, two_experts

    _, adapters, states, paths = two_experts(tmp_path)
    base = adapters.remove()
    coefficients = fm.attach(base, paths, deltas="lora", init=[0.7, -0.4], clamp=None)
    assert all(
        isinstance(p.deltas, SharedDown)
        for n, p in base.named_parameters()
        if n in coefficients.names
    )
    wide = net()
    reference = fm.attach(wide, paths, init=[0.7, -0.4], clamp=None, include=coefficients.names)
    for model in (base, wide):
        model(X.double()).sin().sum().backward()
    torch.testing.assert_close(base(X.double()), wide(X.double()))
    torch.testing.assert_close(coefficients.raw.grad, reference.raw.grad)
    compiled = torch.compile(base, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X.double()), wide(X.double()))
    other = fm.linearize(net(), ["up", "down"], rank=2, seed=3)
    other.load_state(states[0])
    apart = other.save(tmp_path / "apart")
    mixed = net()
    fm.attach(mixed, [paths[0], apart], deltas="lora")
    assert isinstance(mixed.up.weight.deltas, LowRank)
