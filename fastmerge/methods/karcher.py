"""The Karcher mean of models on a sphere."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._gram import combine_points, gram_pass
from ._method import Block, Method, Parameter, Pass, Stats
from ._parameters import check_number


class Karcher(Method):
    """theta = r m, m the point of the unit sphere with the least sum of squared angles to u_k.

    u_k = theta_k / |theta_k|, r the mean of |theta_k|, per tensor. From the normalized mean m goes
    along the tangent v = mean_k (w_k / sin w_k) (u_k - cos w_k m), w_k the angle to u_k, to
    cos |v| m + sin |v| v / |v|, until |v| < tol. m stays a combination of the u_k, so all of it is
    computed from their inner products in fp64 and tensors are read twice whatever `max_iter`.

    Args:
        max_iter: most steps.
        tol: smallest norm of a tensor and smallest angle or step that counts.

    Source: Karcher, Riemannian center of mass (1977); mergekit's `karcher`. A base model is not
    read: to have it take part, pass it as an expert.
    """

    name = "karcher"
    summary = "Riemannian mean of the experts' directions with their mean norm"
    formula = "mean |θₖ| · Riemannian mean of the θₖ/|θₖ|"
    source = "Karcher, CPAM 1977"
    needs_base = False
    parameters = (
        Parameter("max_iter", 10, "most steps"),
        Parameter("tol", 1e-5, "smallest angle or step that counts"),
    )

    def __init__(self, max_iter: int = 10, tol: float = 1e-5):
        if not isinstance(max_iter, int) or max_iter < 0:
            raise ValueError(f"max_iter must be a whole number >= 0, got {max_iter!r}")
        self.max_iter, self.tol = max_iter, check_number("tol", tol, 0)

    def passes(self, dtype: torch.dtype) -> list[Pass]:
        return [gram_pass(_points)]

    def combine(self, block: Block, stats: Stats) -> Tensor:
        if len(block.experts) == 1:
            return block.experts[0].to(block.dtype, copy=True)
        row = self._coefficients(stats["gram"])
        return combine_points(block.experts, row, None, block.dtype)

    def _coefficients(self, gram: Tensor) -> Tensor:
        norms = gram.diagonal().sqrt()
        valid = norms > self.tol
        if not valid.any():
            return torch.zeros(len(gram), dtype=torch.float64)
        lengths = norms[valid]
        angles = gram[valid][:, valid] / torch.outer(lengths, lengths)  # cosines of all pairs
        share = 1 / len(lengths)
        mean = torch.full_like(lengths, share)
        size = _length(mean, angles)
        if size < self.tol:
            mean = torch.zeros_like(lengths)
            mean[0] = 1.0
        else:
            mean = mean / size
        for _ in range(self.max_iter):
            cosines = (angles @ mean).clamp(-1, 1)
            theta = cosines.acos()
            far = (theta >= self.tol) & (theta.sin() > 1e-8)  # an opposite point has no direction
            pull = torch.where(far, share * theta / theta.sin(), 0.0)
            tangent = pull - (pull @ cosines) * mean
            step = _length(tangent, angles)
            if step < self.tol:
                break
            mean = math.cos(step) * mean + math.sin(step) / step * tangent
            size = _length(mean, angles)
            if size > self.tol:
                mean = mean / size
        result = torch.zeros(len(gram), dtype=torch.float64)
        result[valid] = norms.mean() * mean / lengths
        return result


def _points(block: Block) -> tuple[list[Tensor], None]:
    return list(block.experts), None


def _length(coefficients: Tensor, gram: Tensor) -> float:
    """|sum_i c_i u_i|."""
    return math.sqrt(max(0.0, float(coefficients @ gram @ coefficients)))
