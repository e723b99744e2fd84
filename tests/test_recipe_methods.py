"""The methods of merge recipes against fp64 implementations of their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastmerge as fm
from fastmerge.ops import random_key
from fastmerge.ops.random_masks import draws

from .samples import grid, random
from .tolerances import TOLERANCES

SHAPES = {"w": (40, 27), "v": (61,), "conv": (5, 4, 3), "one": (1, 1)}
COUNT = 4
WEIGHTS = [1.0, 0.5, -0.25, 2.0]


def models(make=random, count=COUNT, spread=0.25):
    def model(seed):
        return {n: make(s, torch.float32, seed + i) for i, (n, s) in enumerate(SHAPES.items())}

    base, steps = model(0), [model(100 * k) for k in range(1, count + 1)]
    return base, [{name: base[name] + spread * step[name] for name in base} for step in steps]


def rows_of(tensor: Tensor) -> Tensor:
    """[rows, last dimension]; a vector is one row."""
    return tensor.reshape(-1, tensor.shape[-1])


def compare(merged, expected, base, experts):
    """Within some roundings of the numbers that were added up."""
    for name in base:
        scale = base[name].double().abs() + sum((e[name].double()).abs() for e in experts)
        error = (merged[name].double() - expected[name]).abs()
        assert (error <= 16 * TOLERANCES[torch.float32] * scale).all(), (name, error.max())


def run(method, oracle, make=random, count=COUNT, spread=0.25, **parameters):
    base, experts = models(make, count, spread)
    merged = fm.merge(base, experts, method, **parameters)
    expected = {}
    for name in base:
        # task vectors as they are in fp32 registers, so that selections have one right answer
        taus = torch.stack([(e[name] - base[name]).double() for e in experts])
        points = torch.stack([e[name].double() for e in experts])
        expected[name] = oracle(name, base[name].double(), taus, points)
    compare(merged, expected, base, experts)
    return merged, base


def above(tau: Tensor, count: int) -> Tensor:
    """The `count` entries of largest magnitude, equal ones in the order of their indices."""
    order = tau.abs().flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(tau.numel(), dtype=torch.bool)
    mask[order[:count]] = True
    return mask.view(tau.shape)


def magnitude_mask(k, name, tau, density):
    return above(tau, max(1, int(density * tau.numel())))


def breadcrumbs_mask(gamma):
    def mask(k, name, tau, density):
        kept, total = int(density * tau.numel()), tau.numel()
        bottom = max(0, total - kept - int(gamma * total))
        return above(tau, total - bottom) & ~above(tau, total - bottom - kept)

    return mask


def random_mask(seed):
    def mask(k, name, tau, density):
        u = draws(tau.numel(), 0, k, random_key(seed, name), "cpu")
        return (u < int(density * 2**32)).view(tau.shape)

    return mask


def rank_mask(seed, epsilon):
    def mask(k, name, tau, density):
        u = draws(tau.numel(), 0, k, random_key(seed, name), "cpu").view(tau.shape)
        keep = torch.zeros(tau.shape, dtype=torch.bool)
        for row, out, u_row in zip(rows_of(tau), rows_of(keep), rows_of(u), strict=True):
            for i, value in enumerate(row.abs()):
                rank = int((row.abs() < value).sum() + (row.abs()[:i] == value).sum())
                middle = rank / (len(row) - 1) if len(row) > 1 else 0.5
                out[i] = u_row[i] / 2**32 < density - epsilon + 2 * epsilon * middle
        return keep

    return mask


def sparse_oracle(mask, elect, normalize, rescale, density, scaling):
    def oracle(name, base, taus, points):
        weights = torch.tensor(WEIGHTS[: len(taus)]).double()
        parts = []
        for k, tau in enumerate(taus):
            part = tau * mask(k, name, tau, density)
            before, after = tau.abs().sum(), part.abs().sum()
            if rescale == "l1" and before >= 1e-7 and after >= 1e-7:
                part = part * before / after
            elif rescale == "density":
                part = part / density
            parts.append(weights[k] * part)
        parts = torch.stack(parts)
        if not elect:
            total = parts.sum(0) / (weights.sum() if normalize else 1)
            return base + scaling * total
        # in fp32, where an election can come out near 0
        positive = parts.sum(0) >= 0
        agree = torch.where(positive, parts > 0, parts < 0)
        total = (parts * agree).sum(0)
        if normalize:
            divisor = (weights.view(-1, *[1] * base.dim()) * agree).sum(0)
            total = total / torch.where(divisor == 0, 1, divisor)
        return base + scaling * total

    return oracle


@pytest.mark.parametrize("rescale", ["none", "l1", "density"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("method", "elect", "mask", "more"),
    [
        ("weighted_ties", True, magnitude_mask, {}),
        ("breadcrumbs", False, breadcrumbs_mask(0.1), {"gamma": 0.1}),
        ("breadcrumbs_ties", True, breadcrumbs_mask(0.8), {"gamma": 0.8}),
        ("dare_linear", False, random_mask(3), {}),
        ("dare_ties", True, random_mask(3), {}),
        ("della", True, rank_mask(3, 0.2), {"epsilon": 0.2}),
        ("della_linear", False, rank_mask(3, 0.2), {"epsilon": 0.2}),
    ],
)
def test_masked_merges(method, elect, mask, more, normalize, rescale):
    density, scaling = 0.35, 0.7
    oracle = sparse_oracle(mask, elect, normalize, rescale, density, scaling)
    for make in (random, grid):
        run(
            method,
            oracle,
            make,
            weight=WEIGHTS,
            density=density,
            normalize=normalize,
            rescale=rescale,
            scaling=scaling,
            seed=3,
            **more,
        )


def test_a_tie_at_the_cut_is_broken_by_the_index_and_counts_are_exact():
    for size in (10, 70_001):
        tau = torch.full((size,), 0.5)
        tau[::3] = -0.5
        tau[1] = 2.0
        base = {"w": torch.zeros(size)}
        merged = fm.merge(base, [{"w": tau}], "weighted_ties", density=0.3, normalize=False)["w"]
        count = int(0.3 * size)
        assert merged.count_nonzero() == count
        assert torch.equal(merged[:count], tau[:count])


@pytest.mark.parametrize("method", ["weighted_ties", "breadcrumbs", "dare_linear", "della_linear"])
def test_density_0_keeps_nothing_and_1_everything(method):
    base, experts = models(grid)
    none = fm.merge(base, experts, method, density=0.0)
    assert all(torch.equal(none[n], base[n]) for n in base)
    whole = fm.merge(base, experts[:1], method, density=1.0)
    assert all(torch.equal(whole[n], experts[0][n]) for n in base)
    mixed = fm.merge(base, experts[:2], method, density=[0.0, 1.0], normalize=False)
    assert all(torch.equal(mixed[n], experts[1][n]) for n in base)


def test_the_paper_s_rescale_keeps_the_mean_and_the_l1_rescale_the_norm():
    base = {"w": torch.zeros(200_000)}
    expert = {"w": random(200_000, torch.float32, 1).abs()}
    merged = fm.merge(base, [expert], "dare_linear", density=0.1, rescale="density")["w"]
    kept = merged != 0
    torch.testing.assert_close(merged[kept], expert["w"][kept] / 0.1)
    assert abs(merged.mean() / expert["w"].mean() - 1) < 0.03
    l1 = fm.merge(base, [expert], "dare_linear", density=0.1, rescale="l1")["w"]
    torch.testing.assert_close(l1.double().sum(), expert["w"].double().sum(), rtol=1e-5, atol=0)


def test_seeds_names_and_experts_have_masks_of_their_own():
    size = 10_000
    base = {"a": torch.zeros(size), "b": torch.zeros(size)}
    expert = {"a": torch.ones(size), "b": torch.ones(size)}
    first, again, other = (
        fm.merge(base, [expert], "dare_linear", density=0.5, rescale=False, seed=s)
        for s in (1, 1, 2)
    )
    assert torch.equal(first["a"], again["a"])
    pairs = [(first["a"], first["b"]), (first["a"], other["a"])]
    both = fm.merge(base, [expert, expert], "dare_linear", density=0.5, rescale=False, seed=1)
    second = both["a"] - first["a"]
    for x, y in [*pairs, (first["a"], second)]:
        assert abs((x == y).double().mean() - 0.5) < 5 * 0.5 / math.sqrt(size)


def test_sce_selects_by_variance():
    def oracle(name, base, taus, points):
        variance = taus.float().var(0, unbiased=False).double()
        mask = above(variance, int((variance > 0).sum() * 0.4))
        taus = taus * mask
        energy = taus.square().flatten(1).mean(1)
        weights = (energy / energy.sum()).view(-1, *[1] * base.dim())
        if energy.sum() == 0:
            return base
        agree = torch.where(taus.sum(0) >= 0, taus > 0, taus < 0)
        divisor = (weights * agree).sum(0)
        return base + (weights * agree * taus).sum(0) / torch.where(divisor == 0, 1, divisor)

    run("sce", oracle, select_topk=0.4, floor=0)
    run("sce", oracle, select_topk=0.4)


def test_sce_with_little_energy_has_equal_weights_unless_told_otherwise():
    def oracle(name, base, taus, points):
        agree = torch.where(taus.sum(0) >= 0, taus > 0, taus < 0)
        return base + (taus * agree).sum(0) / agree.sum(0).clamp(min=1)

    run("sce", oracle, spread=1e-4)
    base, experts = models(spread=1e-4)
    experts[0] = {name: 3 * experts[0][name] - 2 * base[name] for name in base}
    equal, paper = (fm.merge(base, experts, "sce", floor=floor)["w"] for floor in (1e-6, 0))
    assert (equal - paper).norm() > 0.1 * (equal - base["w"]).norm()


@pytest.mark.parametrize("plus", [False, True])
def test_ram(plus):
    def oracle(name, base, taus, points):
        own = taus.abs() > 0.2
        count = own.sum(0)
        alone = [1.0] * len(taus)
        if plus:
            for k, mine in enumerate(own):
                ratio = (mine & (count > 1)).sum() / max((mine & (count == 1)).sum(), 0.2)
                alone[k] = 1 + 0.5 * min(float(ratio), 0.3)
        parts = [
            t * m * torch.where(count == 1, a, 1 / count.clamp(min=1))
            for t, m, a in zip(taus, own, alone, strict=True)
        ]
        return base + sum(parts)

    if plus:
        run("ramplus_tl", oracle, epsilon=0.2, r=0.5, alpha=0.3)
    else:
        run("ram", oracle, epsilon=0.2)


def angle(a: Tensor, b: Tensor) -> Tensor:
    return (a.flatten() @ b.flatten() / a.norm() / b.norm()).clamp(-1, 1).acos()


def slerp(t, a, b):
    theta = angle(a, b)
    if 1 - theta.cos() ** 2 <= 1e-16:
        return (1 - t) * a + t * b
    return (((1 - t) * theta).sin() * a + (t * theta).sin() * b) / theta.sin()


def test_linear():
    run("linear", lambda n, b, t, p: (p * weighted(p)).sum(0) / sum(WEIGHTS), weight=WEIGHTS)
    run(
        "linear",
        lambda n, b, t, p: (p * weighted(p)).sum(0),
        weight=WEIGHTS,
        normalize=False,
    )


def weighted(points):
    return torch.tensor(WEIGHTS[: len(points)]).double().view(-1, *[1] * (points.dim() - 1))


def test_task_arithmetic_with_weights():
    run(
        "task_arithmetic",
        lambda n, b, t, p: b + 0.5 * (t * weighted(t)).sum(0) / sum(WEIGHTS),
        weight=WEIGHTS,
        normalize=True,
        scaling=0.5,
    )


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_of_two_experts_and_of_base_and_expert(t):
    run("slerp", lambda n, b, tau, p: slerp(t, p[0], p[1]), count=2, t=t)
    run("slerp", lambda n, b, tau, p: slerp(t, b, p[0]), count=1, t=t)


def test_slerp_of_nearly_parallel_tensors_is_linear():
    base = {"w": random((30, 30), torch.float32, 1)}
    near = {"w": 1.5 * base["w"] + 1e-3 * random((30, 30), torch.float32, 2)}
    merged = fm.merge(base, [near], "slerp", t=0.25)["w"].double()
    torch.testing.assert_close(merged, 0.75 * base["w"].double() + 0.25 * near["w"].double())


@pytest.mark.parametrize("options", [{}, {"nuslerp_flatten": False}, "columns"])
def test_nuslerp(options):
    if options == "columns":
        options = {"nuslerp_flatten": False, "nuslerp_row_wise": True}

    def oracle(name, base, taus, points):
        if not options:
            return base + slerp(0.75, taus[0], taus[1])
        a, b = taus
        turn = options.get("nuslerp_row_wise") and a.dim() > 1
        if turn:
            a, b = a.transpose(0, -1), b.transpose(0, -1)
        rows = [slerp(0.75, x, y) for x, y in zip(rows_of(a), rows_of(b), strict=True)]
        merged = torch.stack(rows).reshape(a.shape)
        return base + (merged.transpose(0, -1) if turn else merged)

    run("nuslerp", oracle, count=2, weight=[1.0, 3.0], **options)


def test_multislerp_is_the_published_tangent_step():
    def oracle(name, base, taus, points):
        weights = weighted(taus) / sum(WEIGHTS)
        norms = taus.flatten(1).norm(dim=1).view(weights.shape)
        units = taus / (norms + 1e-8)
        mean = (weights * units).sum(0)
        mean = mean / mean.norm()
        tangents = units - (units * mean).flatten(1).sum(1).view(weights.shape) * mean
        step = (weights * tangents).sum(0)
        length = step.norm() + 1e-8
        result = mean * length.cos() + step * length.sin() / length
        return base + result * (weights * norms).sum()

    run("multislerp", oracle, weight=WEIGHTS)


def test_karcher():
    def oracle(name, base, taus, points):
        norms = points.flatten(1).norm(dim=1)
        units = [p / n for p, n in zip(points, norms, strict=True)]
        mean = sum(units) / len(units)
        mean = units[0] if mean.norm() < 1e-5 else mean / mean.norm()
        for _ in range(10):
            tangent = torch.zeros_like(mean)
            for unit in units:
                theta = angle(mean, unit)
                if theta >= 1e-5 and theta.sin() > 1e-8:
                    tangent += theta / theta.sin() * (unit - theta.cos() * mean) / len(units)
            if tangent.norm() < 1e-5:
                break
            step = tangent.norm()
            mean = step.cos() * mean + step.sin() * tangent / step
            mean = mean / mean.norm()
        return norms.mean() * mean

    run("karcher", oracle)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock(filter_wise):
    def ratio(taus, floor):
        cosines = [
            (a * b).sum() / max(a.norm() * b.norm(), floor)
            for i, a in enumerate(taus)
            for b in taus[i + 1 :]
        ]
        c = sum(cosines) / len(cosines)
        return 0.0 if abs(1 + 3 * c) < 1e-6 else 4 * c / (1 + 3 * c)

    def oracle(name, base, taus, points):
        if not filter_wise:
            return base + ratio(taus, 1e-6) * taus.mean(0)
        rows = [rows_of(tau) for tau in taus]
        steps = [ratio(row, 1e-6) * sum(row) / 4 for row in zip(*rows, strict=True)]
        return base + torch.stack(steps).reshape(base.shape)

    run("model_stock", oracle, filter_wise=filter_wise)


def test_model_stock_s_norm_floor_pulls_small_steps_to_the_base():
    base = {"w": torch.zeros(50, dtype=torch.float64)}
    experts = [{"w": 1e-5 * random(50, torch.float64, k).abs()} for k in range(3)]
    near = fm.merge(base, experts, "model_stock")["w"].norm()
    paper = fm.merge(base, experts, "model_stock", norm_floor=0)["w"].norm()
    larger = [{"w": 1e5 * e["w"]} for e in experts]
    scaled = fm.merge(base, larger, "model_stock")["w"].norm()
    torch.testing.assert_close(1e5 * paper, scaled)
    assert near < 0.5 * paper


def test_nearswap():
    def oracle(name, base, taus, points):
        share = (0.1 / taus[0].abs().clamp(min=1e-6)).clamp(max=1)
        return share * points[0] + (1 - share) * base

    run("nearswap", oracle, count=1, t=0.1)


def test_arcee_fusion():
    def oracle(name, base, taus, points):
        p = points[0].softmax(-1) + 1e-8
        q = base.softmax(-1) + 1e-8
        importance = (points[0] - base).abs() * (p * (p / q).log()).sum(-1, keepdim=True).clamp(
            min=0
        )
        ordered = importance.flatten().sort().values
        q1, median, q3 = (ordered[int(f * (len(ordered) - 1))] for f in (0.25, 0.5, 0.75))
        return torch.where(importance >= median + 1.5 * (q3 - q1), points[0], base)

    merged, base = run("arcee_fusion", oracle, count=1)
    changed = (merged["w"] != base["w"]).double().mean()
    assert 0 < changed < 0.5


def test_passthrough():
    run("passthrough", lambda n, b, t, p: 0.3 * p[0], count=1, scale=[0.3])
    base, experts = models(count=1)
    same = fm.merge(base, experts, "passthrough")
    assert all(torch.equal(same[n], experts[0][n]) for n in base)
    assert same["w"].data_ptr() != experts[0]["w"].data_ptr()
