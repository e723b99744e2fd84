"""MetaGPT against its formula in fp64, and what its coefficients must be."""

from __future__ import annotations

import math

import pytest
import torch

import fastmerge as fm
from fastmerge.methods import Block, make_method, run_passes
from fastmerge.ops import random_key
from fastmerge.ops.random_masks import draws

from .samples import DTYPE_PAIRS, dtype_id, grid, random, raw
from .tolerances import assert_no_worse_than_eager

SHAPES = {"a.weight": (40, 27), "b.bias": (61,), "conv": (5, 4, 3), "scale": (), "empty": (0, 3)}


def models(dtypes=(torch.float32, torch.float32), make=random, count=3):
    def one(dtype, seed):
        return {n: make(s, dtype, seed + i) for i, (n, s) in enumerate(SHAPES.items())}

    return one(dtypes[0], 0), [one(dtypes[1], 100 * k) for k in range(1, count + 1)]


def flat(tensors):
    return torch.cat([tensors[name].flatten() for name in SHAPES])


def task_vectors(base, experts):
    """As they are in registers: subtracted in fp32, or fp64 if a tensor is fp64."""
    dtype = torch.promote_types(flat(base).dtype, torch.float32)
    dtype = torch.promote_types(dtype, flat(experts[0]).dtype)
    return torch.stack([(flat(e).to(dtype) - flat(base).to(dtype)).double() for e in experts])


def lambdas(method, base, experts):
    def blocks():
        return [Block(n, base[n], [e[n] for e in experts]) for n in base]

    return run_passes(method.passes(torch.float32), blocks).model["lambdas"]


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=dtype_id)
def test_the_formula(dtypes):
    base, experts = models(dtypes)
    for k, expert in enumerate(experts):  # unequal norms
        for name in expert:
            expert[name] = expert[name] * 2**k
    taus, origin = task_vectors(base, experts), flat(base)
    squares = taus.square().sum(1)
    factors = (squares / squares.sum()).unsqueeze(1)
    merged = flat(fm.merge(base, experts, "metagpt", scaling=0.5))
    low = torch.stack([(flat(e) - origin).to(origin.dtype) for e in experts])
    eager = origin + (0.5 * factors.to(origin.dtype) * low).sum(0)
    scale = origin.double().abs() + (factors * (taus.abs() + origin.double().abs())).sum(0)
    scale = 2 * scale if dtypes[0] == torch.float64 else scale
    truth = origin.double() + 0.5 * (factors * taus).sum(0)
    assert_no_worse_than_eager(merged, eager, truth, scale)


def test_equal_norms_give_the_average():
    base, (expert, *_) = models(make=grid)
    mirrored = {n: 2 * base[n] - expert[n] for n in base}  # exact on the grid
    assert lambdas(make_method("metagpt"), base, [expert, mirrored, expert]) == [1 / 3] * 3
    merged = fm.merge(base, [expert, mirrored], "metagpt")
    average = fm.merge(base, [expert, mirrored], "average")
    assert raw(flat(merged)) == raw(flat(average)) == raw(flat(base))
    fixed = fm.merge(base, [expert, mirrored, expert], "task_arithmetic", scaling=1 / 3)
    merged = fm.merge(base, [expert, mirrored, expert], "metagpt")
    assert raw(flat(merged)) == raw(flat(fixed))


def test_norms_are_of_the_whole_model_and_exact():
    base, experts = models()
    taus = task_vectors(base, experts)
    exact = [math.fsum((t * t).tolist()) for t in taus]
    expected = [value / math.fsum(exact) for value in exact]
    found = lambdas(make_method("metagpt"), base, experts)
    assert found == pytest.approx(expected, rel=1e-14) and sum(found) == pytest.approx(1)
    backwards = {name: base[name] for name in reversed(base)}
    assert lambdas(make_method("metagpt"), backwards, experts) == found


def test_no_change_at_all_and_a_single_expert():
    base, experts = models()
    assert raw(flat(fm.merge(base, [base, base], "metagpt"))) == raw(flat(base))
    merged = fm.merge(base, experts[:1], "metagpt")
    assert raw(flat(merged)) == raw(flat(fm.merge(base, experts[:1], "task_arithmetic", scaling=1)))
    merged = fm.merge(base, [experts[0], base], "metagpt")  # a task vector of 0 counts for nothing
    assert raw(flat(merged)) == raw(flat(fm.merge(base, experts[:1], "metagpt")))


def test_on_vectors_that_ties_trims():
    base, experts = models(make=grid)
    density, kept = 0.3, []
    for expert in experts:
        parts = []
        for name in SHAPES:
            tau = (expert[name] - base[name]).flatten().double()
            order = tau.abs().argsort(descending=True, stable=True)
            mask = torch.zeros_like(tau)
            mask[order[: max(1, int(density * len(tau)))]] = 1
            parts.append(tau * mask)
        kept.append(torch.cat(parts))
    squares = torch.stack([tau.square().sum() for tau in kept])
    weights = (squares / squares.sum()).tolist()
    method = make_method("metagpt", vectors="ties", density=density)
    assert lambdas(method, base, experts) == weights
    merged = fm.merge(base, experts, method)
    expected = fm.merge(
        base, experts, "weighted_ties", weight=weights, density=density, normalize=False
    )
    assert raw(flat(merged)) == raw(flat(expected))


@pytest.mark.parametrize("vectors", ["dare", "dare_ties"])
def test_on_vectors_that_dare_leaves(vectors):
    base, experts = models(make=grid)
    density = [0.5, 0.25, 1.0]
    squares = []
    for k, expert in enumerate(experts):
        total = 0.0
        for name in SHAPES:
            tau = (expert[name] - base[name]).flatten().double() / density[k]
            u = draws(tau.numel(), 0, k, random_key(7, name), "cpu")
            total += float(tau[u < int(density[k] * 2**32)].square().sum())
        squares.append(total)
    weights = [s / math.fsum(squares) for s in squares]
    merged = fm.merge(base, experts, "metagpt", vectors=vectors, density=density, seed=7)
    name = {"dare": "dare_linear", "dare_ties": "dare_ties"}[vectors]
    expected = fm.merge(
        base, experts, name, weight=weights, density=density, rescale="density", seed=7
    )
    assert raw(flat(merged)) == raw(flat(expected))


def test_norms_that_are_not_finite_are_named():
    base, experts = models()
    experts[1]["b.bias"][3] = math.nan
    with pytest.raises(ValueError, match="metagpt: task vector 1 has NaN or Inf"):
        fm.merge(base, experts, "metagpt", allow_nonfinite=True)
