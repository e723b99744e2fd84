"""Unchanged models in fp32 and bf16 on the kernels: gradients no worse than plain PyTorch's."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch.func import functional_call

import fastmerge as fm

from .layouts import LAYOUTS, outputs
from .plain import make_experts
from .tolerances import TOLERANCES


def _cast(inputs, dtype):
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}


def _pieces(tensor, count):
    """Views of its nearly equal chunks of rows."""
    rows = tensor.shape[0] if tensor.dim() else 1
    bounds = [rows * c // count for c in range(count + 1)]
    return [tensor[a:b] if tensor.dim() else tensor for a, b in pairwise(bounds)]


def _plain_gradients(model, experts, coefficients, inputs, probes, dtype):
    """<dW, tau_k> and its size <|dW|, |tau_k|> for every row, W built in `dtype`, dots in fp64."""
    parts = dict(
        zip(coefficients.names, coefficients.matrix().split(coefficients.chunks), strict=True)
    )
    base = dict(model.named_parameters())
    sums = torch.promote_types(dtype, torch.float32)
    weights, taus = {}, {}
    for name, part in parts.items():
        origin = base[name].detach()
        taus[name] = [dict(e.named_parameters())[name].detach().to(sums) - origin.to(sums)
                      for e in experts]  # fmt: skip
        total = origin.to(sums, copy=True)
        for k, tau in enumerate(taus[name]):
            pieces = (_pieces(t, len(part)) for t in (total, tau))
            for row, out, change in zip(part, *pieces, strict=True):
                out += row[k].to(sums) * change
        weights[name] = total.to(dtype).requires_grad_()
    found = outputs(functional_call(copy.deepcopy(model).to(dtype), weights, (),
                                    _cast(inputs, dtype)))  # fmt: skip
    loss = sum((y * p.to(dtype)).sum() for y, p in zip(found, probes, strict=True))
    gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True,
                                    allow_unused=True)  # fmt: skip
    dots, sizes = [], []
    for (name, part), gradient in zip(parts.items(), gradients, strict=True):
        columns = [_pieces(gradient.double() * tau.double(), len(part)) for tau in taus[name]]
        dots += [[products.sum() for products in row] for row in zip(*columns, strict=True)]
        sizes += [[products.abs().sum() for products in row] for row in zip(*columns, strict=True)]
    return torch.tensor(dots), torch.tensor(sizes)


@pytest.mark.parametrize(
    "dtype, granularity",
    [(torch.float32, "chunk"), (torch.bfloat16, "layer")],
    ids=["fp32-chunk", "bf16-layer"],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_worse_than_plain_pytorch(layout, granularity, dtype):
    torch.manual_seed(0)
    model, inputs, _ = LAYOUTS[layout]()
    model, inputs = model.to(dtype), _cast(inputs, dtype)
    experts = make_experts(model, 3)
    plain = copy.deepcopy(model)
    coefficients = fm.attach(model, experts, granularity=granularity)
    found = outputs(model(**inputs))
    probes = [torch.randn_like(y) for y in found]
    sum((y * p).sum() for y, p in zip(found, probes, strict=True)).backward()
    arguments = (plain, experts, coefficients, inputs, probes)
    truth, size = _plain_gradients(*arguments, torch.float64)
    eager, _ = _plain_gradients(*arguments, dtype)
    error, plain_error = (
        torch.linalg.vector_norm(g.double() - truth) for g in (coefficients.raw.grad, eager)
    )
    assert truth.abs().max() > 0
    assert error <= plain_error + TOLERANCES[dtype] * torch.linalg.vector_norm(size)
