"""Merging methods against the papers' formulas, as passes over row blocks, and their registry."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

import fastmerge as fm
from fastmerge import use_backend
from fastmerge.methods import METHODS, Block, make_method, run_passes

from .samples import DTYPE_PAIRS, dtype_id, grid, random, raw
from .ties_oracle import ties_oracle
from .tolerances import assert_no_worse_than_eager

SHAPES = {"b.weight": (6, 5), "a.bias": (7,), "empty": (0, 3), "scale": (), "c.weight": (40, 9)}
COUNT = 4


def model(dtype, seed, make=random):
    return {name: make(s, dtype, 10 * seed + i) for i, (name, s) in enumerate(SHAPES.items())}


def model_and_experts(dtypes=DTYPE_PAIRS[0], make=random, count=COUNT):
    return model(dtypes[0], 1, make), [model(dtypes[1], 2 + k, make) for k in range(count)]


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors.values()])


def task_rows(base, experts, names=None):
    names = names or list(base)
    return torch.stack(
        [torch.cat([(e[n].double() - base[n].double()).flatten() for n in names]) for e in experts]
    )


def check(merged, base, truth, eager, scale):
    assert list(merged) == list(base)
    assert all(merged[n].dtype == base[n].dtype for n in base)
    assert_no_worse_than_eager(flat(merged), eager, truth, scale)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=dtype_id)
def test_average(dtypes):
    base, experts = model_and_experts(dtypes)
    merged = fm.merge(base, experts, "average")
    stack = torch.stack([flat(e) for e in experts])
    scale = stack.double().abs().mean(0) * 2
    check(merged, base, stack.double().mean(0), stack.mean(0).to(dtypes[0]), scale)


def test_weighted_average():
    base, experts = model_and_experts()
    merged = fm.merge(base, experts, "average", weights=[1, 0, 2, 1])
    stack = torch.stack([flat(e) for e in experts])
    weights = torch.tensor([0.25, 0, 0.5, 0.25]).unsqueeze(1)
    truth, eager = (stack.double() * weights).sum(0), (stack * weights).sum(0)
    check(merged, base, truth, eager, stack.double().abs().sum(0))


@pytest.mark.parametrize("count", [1, 3, 7])
def test_the_average_of_equal_experts_is_that_expert(count):
    base, experts = model_and_experts(count=1)
    merged = fm.merge(base, experts * count, "average")
    assert raw(flat(merged)) == raw(flat(experts[0]))


@pytest.mark.parametrize("scaling", [0.3, -0.5, [0.1, 0.2, 0.0, 1.5]])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=dtype_id)
def test_task_arithmetic(dtypes, scaling):
    base, experts = model_and_experts(dtypes)
    merged = fm.merge(base, experts, "task_arithmetic", scaling=scaling)
    factors = torch.tensor(scaling, dtype=torch.float64).expand(COUNT).unsqueeze(1)
    rows = task_rows(base, experts)
    origin = flat(base)
    low = torch.stack([(flat(e) - origin).to(dtypes[0]) for e in experts])
    eager = origin + (factors.to(dtypes[0]) * low).sum(0)
    scale = origin.double().abs() + (factors.abs() * (rows.abs() + origin.double().abs())).sum(0)
    if dtypes[0] == torch.float64:
        scale = 2 * scale  # the truth is rounded as often
    check(merged, base, origin.double() + (factors * rows).sum(0), eager, scale)


def test_task_arithmetic_is_exact_on_a_grid():
    base, experts = model_and_experts(DTYPE_PAIRS[1], grid)
    merged = fm.merge(base, experts, "task_arithmetic", scaling=0.5)
    expected = flat(base).double() + 0.5 * task_rows(base, experts).sum(0)
    assert torch.equal(flat(merged).double(), expected.bfloat16().double())


def test_task_arithmetic_is_a_weighted_sum_with_equal_coefficients():
    base, experts = model_and_experts()
    merged = fm.merge(base, experts, "task_arithmetic", scaling=0.3)
    learned = fm.merge(base, experts, coefficients=torch.full((COUNT,), 0.3))
    assert raw(flat(merged)) == raw(flat(learned))


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("merge", ["mean", "sum", "max"])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=dtype_id)
def test_ties_on_a_grid_matches_the_published_steps_exactly(dtypes, merge, scope):
    base, experts = model_and_experts(dtypes, grid)
    density, scaling = 0.4, 0.5
    merged = fm.merge(
        base, experts, "ties", density=density, scaling=scaling, merge=merge, scope=scope
    )
    groups = [list(base)] if scope == "model" else [[name] for name in base]
    cancellations = 0
    for names in groups:
        rows = task_rows(base, experts, names)
        expected, _, cancelled = ties_oracle(rows, density, merge)
        cancellations += cancelled
        origin = flat({n: base[n] for n in names}).double()
        # scaling by a half and the base's addition are exact; a mean by three is rounded once
        found = flat({n: merged[n] for n in names})
        exact = (origin + scaling * expected).to(dtypes[0])
        if merge == "mean":
            scale = origin.abs() + scaling * expected.abs()
            assert_no_worse_than_eager(found, exact, origin + scaling * expected, scale)
        else:
            assert torch.equal(found, exact)
    assert cancellations > 0


@pytest.mark.parametrize("merge", ["mean", "sum", "max"])
def test_ties_on_random_weights(merge):
    base, experts = model_and_experts(count=8)
    merged = fm.merge(base, experts, "ties", merge=merge, scaling=0.3)
    low = torch.stack([flat(e) - flat(base) for e in experts])  # fp32, as subtracted in registers
    truth, masks, _ = ties_oracle(low.double(), 0.2, merge)
    eager, _, _ = ties_oracle(low, 0.2, merge)
    scale = flat(base).double().abs() + 0.3 * (low.double().abs() * masks).sum(0)
    origin = flat(base)
    check(merged, base, origin.double() + 0.3 * truth, origin + 0.3 * eager, scale)


def test_ties_takes_one_majority_over_the_model():
    base = {"small": torch.zeros(2), "large": torch.zeros(5)}
    experts = [
        {"small": torch.tensor([1.0, -1]), "large": torch.full((5,), 1.0)},
        {"small": torch.tensor([-1.0, -1]), "large": torch.full((5,), 1.0)},
    ]
    merged = fm.merge(base, experts, "ties", density=1.0)
    assert merged["small"].tolist() == [1, -1]
    alone = fm.merge(base, experts, "ties", density=1.0, scope="tensor")
    assert alone["small"].tolist() == [-1, -1]


def test_ties_density_counts_the_merged_tensors_only():
    base = {"a": torch.zeros(10), "b": torch.zeros(90)}
    expert = {"a": torch.arange(1.0, 11), "b": torch.arange(100.0, 190)}
    both = fm.merge(base, [expert], "ties", density=0.5)
    assert both["a"].count_nonzero() == 0 and both["b"].count_nonzero() == 51
    one = fm.merge(base, [expert], "ties", density=0.5, exclude="b")
    assert one["a"].count_nonzero() == 6 and one["b"].count_nonzero() == 0


def test_identities():
    base, experts = model_and_experts(make=grid)
    whole = fm.merge(base, experts[:1], "ties", density=1.0)
    assert torch.equal(flat(whole), flat(experts[0]))
    same = fm.merge(base, experts[:1] * 3, "ties", density=1.0)
    assert torch.equal(flat(same), flat(experts[0]))
    nothing = fm.merge(base, experts, "task_arithmetic", scaling=0.0)
    assert torch.equal(flat(nothing), flat(base))


W = [1.0, 0.5, -0.25, 2.0]
SPARSE = [
    {"density": 0.3, "weight": W},
    {"density": [0.5, 1.0, 0.0, 0.1], "normalize": True, "scaling": 0.5},
]
RESCALED = [{**more, "rescale": how} for more in SPARSE for how in ("none", "l1", "density")]
PARAMETERS = {
    "average": [{}, {"weights": [1, 2, 3, 4]}],
    "linear": [{"weight": W}, {"weight": W, "normalize": False}],
    "task_arithmetic": [{}, {"weight": W, "normalize": True}],
    "lines": [
        {},
        {"alpha": 0.2, "beta": -0.1},
        {"vectors": "ties", "density": 0.3},
        {"vectors": "dare", "density": 0.5},
    ],
    "anchor_ramp": [{}, {"anchor": 2}],
    "metagpt": [
        {},
        {"vectors": "ties", "density": 0.3},
        {"vectors": "dare", "density": [0.5, 1, 0, 0.2], "scaling": 0.5},
        {"vectors": "dare_ties", "density": 0.5},
    ],
    "ties": [
        {"merge": merge, "scope": scope}
        for merge in ("mean", "sum", "max")
        for scope in ("model", "tensor")
    ],
    "weighted_ties": RESCALED,
    "dare_linear": RESCALED,
    "dare_ties": RESCALED,
    "breadcrumbs": [{**more, "gamma": 0.2} for more in RESCALED],
    "breadcrumbs_ties": [{**more, "gamma": [0.1, 0.2, 0.3, 0.95]} for more in RESCALED],
    "della": [{**more, "epsilon": 0.05} for more in RESCALED],
    "della_linear": [{**more, "epsilon": 0.05} for more in RESCALED],
    "consensus": [{}, {"k": 0}, {"k": 3, "threshold": [0.2, 0.4, 0.5, 0.6], "scaling": 1.0}],
    "sce": [{}, {"select_topk": 0.3}, {"select_topk": 0.5, "floor": 0}],
    "ram": [{"epsilon": 0.3}],
    "ramplus_tl": [{"epsilon": 0.3}],
    "model_stock": [{}, {"filter_wise": True}, {"norm_floor": 0}],
    "slerp": [{"t": 0.3}],
    "nuslerp": [
        {"weight": [1.0, 3.0]},
        {"nuslerp_flatten": False},
        {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    ],
    "multislerp": [{"weight": W}],
    "karcher": [{}, {"max_iter": 1}],
    "nearswap": [{"t": 0.2}],
    "arcee_fusion": [{}],
    "passthrough": [{}, {"scale": 0.3}],
}


def experts_for(method, experts):
    return experts[: method.experts_range[1]]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("rows", "make"), [(3, random), (13, grid)])
def test_row_blocks_give_the_bytes_of_whole_tensors(name, rows, make):
    base, experts = model_and_experts(make=make)
    for parameters in PARAMETERS[name]:
        method = make_method(name, **parameters)
        chosen = experts_for(method, experts)

        def blocks(method=method, chosen=chosen):
            for key, tensor in base.items():
                if tensor.dim() == 0 or tensor.shape[0] == 0 or method.needs_whole(tensor.shape):
                    yield Block(key, tensor, [e[key] for e in chosen], seed=5)
                    continue
                width = tensor[0].numel()
                for start in range(0, tensor.shape[0], rows):
                    part = slice(start, start + rows)
                    pieces = [e[key][part] for e in chosen]
                    yield Block(key, tensor[part], pieces, start * width, seed=5)

        stats = run_passes(method.passes(torch.float32), blocks)
        pieces: dict[str, list] = {key: [] for key in base}
        for block in blocks():
            pieces[block.name].append(method.combine(block, stats.of(block.name)))
        whole = fm.merge(base, chosen, name, seed=5, **parameters)
        for key, parts in pieces.items():
            assert raw(torch.cat([p.flatten() for p in parts])) == raw(whole[key].flatten()), (
                parameters,
                key,
            )


@pytest.mark.parametrize("dtypes", [DTYPE_PAIRS[3], DTYPE_PAIRS[5]], ids=dtype_id)
@pytest.mark.parametrize("name", METHODS)
def test_the_reference_gives_the_same(name, dtypes):
    """Bit by bit where natively all is computed in the order of the reference."""
    base, experts = model_and_experts(dtypes)
    for parameters in PARAMETERS[name]:
        method = make_method(name, **parameters)
        merged = []
        for backend in ("reference", None):
            with use_backend(backend) if backend else contextlib.nullcontext():
                merged.append(fm.merge(base, experts_for(method, experts), name, **parameters))
        assert raw(flat(merged[0])) == raw(flat(merged[1])), parameters


def test_fp64_somewhere_makes_all_thresholds_fp64():
    base, experts = model_and_experts()
    base["c.weight"] = base["c.weight"].double() + 1e-9
    merged = fm.merge(base, experts, "ties", density=0.3, merge="sum")
    expected, _, _ = ties_oracle(task_rows(base, experts), 0.3, "sum")
    expected = torch.cat([base[n].double().flatten() for n in base]) + expected
    for name, exact in zip(base, expected.split([t.numel() for t in base.values()]), strict=True):
        assert torch.equal(merged[name].flatten(), exact.to(base[name].dtype))


def test_the_registry_documents_every_parameter():
    for name, method in METHODS.items():
        assert method.name == name and method.summary and method.source
        built = make_method(name)
        documented = {p.name: p.default for p in method.parameters}
        accepted = method.__init__.__defaults__ or ()
        assert tuple(documented.values()) == accepted
        assert all(p.doc for p in method.parameters)
        assert isinstance(built, method)


@pytest.mark.parametrize(
    ("name", "parameters", "error", "message"),
    [
        ("dare_ties", {"density": 1.2}, ValueError, r"density must be a finite number in \[0, 1\]"),
        ("dare_ties", {"weight": [1.0, 2.0]}, ValueError, "weight has 2 values for 4 experts"),
        ("dare_ties", {"rescale": "l2"}, ValueError, "rescale must be one of none, l1, density"),
        ("della", {"density": 0.1}, ValueError, "density 0.1, epsilon 0.15"),
        ("linear", {"weight": [1e308, 1e308]}, ValueError, "weight must be a finite number"),
        ("average", {"weights": [1e308, 1e308]}, ValueError, "weights must be a finite number"),
        ("breadcrumbs", {"gamma": -1}, ValueError, r"gamma must be a finite number in \[0, 1\]"),
        ("linear", {"weight": [1.0, -1.0, 0.0, 0.0]}, ValueError, "weight must not add up to 0"),
        ("slerp", {"t": 0.3}, ValueError, "slerp takes 1 to 2 experts, got 4"),
        ("nuslerp", {"weight": [1.0]}, ValueError, "weight has 1 values for 2 experts"),
        ("karcher", {"max_iter": 1.5}, ValueError, "max_iter must be a whole number"),
        ("passthrough", {"scale": [1.0, 2.0]}, ValueError, "scale has 2 values for 1 expert"),
        ("tise", {}, ValueError, "unknown method 'tise', expected one of average"),
        ("ties", {"densty": 0.2}, TypeError, "no parameter 'densty': did you mean 'density'"),
        ("average", {"scaling": 1.0}, TypeError, "no parameter 'scaling': it has weights"),
        ("ties", {"density": 0}, ValueError, "0 < density <= 1"),
        ("ties", {"density": 20}, ValueError, "0 < density <= 1"),
        ("ties", {"scaling": math.nan}, ValueError, "scaling must be a finite number"),
        ("ties", {"merge": "median"}, ValueError, "merge must be one of mean, sum, max"),
        ("ties", {"scope": "layer"}, ValueError, "scope must be one of model, tensor"),
        ("task_arithmetic", {"scaling": [math.inf]}, ValueError, "scaling must be a finite"),
        ("task_arithmetic", {"scaling": [1.0, 2.0]}, ValueError, "2 values for 4 experts"),
        ("metagpt", {"vectors": "della"}, ValueError, "vectors must be one of plain, ties, dare"),
        ("metagpt", {"density": 0.5}, ValueError, "density belongs to vectors of ties or dare"),
        ("metagpt", {"vectors": "ties", "density": [0.5]}, ValueError, "1 values for 4 experts"),
        ("lines", {"vectors": "della"}, ValueError, "vectors must be one of plain, ties, dare"),
        ("lines", {"density": 0.5}, ValueError, "density belongs to vectors of ties or dare"),
        ("lines", {"beta": math.nan}, ValueError, "beta must be a finite number"),
        ("anchor_ramp", {"anchor": 4}, ValueError, "anchor 4 is not in 0..3"),
        ("anchor_ramp", {"anchor": -1}, ValueError, "position of an expert"),
        ("average", {"weights": [1.0]}, ValueError, "1 values for 4 experts"),
        ("average", {"weights": [1.0, -1, 0, 0]}, ValueError, "finite sum other than 0"),
    ],
)
def test_wrong_parameters_are_named(name, parameters, error, message):
    base, experts = model_and_experts()
    with pytest.raises(error, match=message):
        fm.merge(base, experts, name, **parameters)


@pytest.mark.parametrize("name", METHODS)
def test_a_block_has_a_dtype_of_its_own_and_perhaps_no_base(name):
    method = make_method(name)
    base, expert = random((4, 3), torch.float32, 1), random((4, 3), torch.bfloat16, 2)
    experts = experts_for(method, [expert, 0.5 * expert, -expert, 2 * expert])
    found = {}
    for origin in (base, None) if not method.needs_base else (base,):
        for dtype in (None, torch.float16):
            block = Block("w", origin, experts, dtype=dtype)
            stats = run_passes(method.passes(torch.float32), lambda block=block: [block])
            merged = method.combine(block, stats.of("w"))
            expected = torch.bfloat16 if origin is None else torch.float32
            assert merged.dtype == (dtype or expected) and merged.shape == base.shape
            found[origin is None, dtype] = merged
    for missing in {key[0] for key in found}:
        narrow, wide = found[missing, torch.float16], found[missing, None]
        torch.testing.assert_close(narrow.float(), wide.float(), rtol=0.01, atol=0.001)


@pytest.mark.parametrize("order", [1, -1], ids=["large-last", "large-first"])
@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_ties_counts_in_lists_and_tables_alike(monkeypatch, scope, order):
    """Small tensors add lists of bins to a sum, large ones tables: same thresholds, same bytes."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (40, 7), (90, 50)][::order]
    base = {str(i): torch.randn(s, generator=generator) for i, s in enumerate(shapes)}
    experts = [
        {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        for _ in range(3)
    ]
    merged = []
    for few in (0, 1000, 1 << 20):  # tables only, both, lists only
        monkeypatch.setattr("fastmerge.methods.ties.FEW", few)
        merged.append(fm.merge(base, experts, method="ties", density=0.3, scope=scope))
    for other in merged[1:]:
        assert all(torch.equal(other[name], merged[0][name]) for name in base)
