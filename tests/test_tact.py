"""TACT: affines that give a merged model's activations the experts' moments."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmerge as fm
from fastmerge.modules.tact import moments

from .plain import make_experts
from .samples import raw

TASKS = ["a", "b", "c"]


class Net(nn.Module):
    """Linear layers around a norm, on tokens [B, T, 6]."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x, attention_mask=None):
        return self.last(self.norm(F.gelu(self.first(x))))


def setting(make=Net, dtype=torch.float64, shape=(10, 3, 6)):
    """A merged model, its experts, and a batch of each task."""
    torch.manual_seed(0)
    base = make().to(dtype).eval()
    experts = dict(zip(TASKS, make_experts(base, 3, scale=0.3), strict=True))
    merged = fm.merge(base, experts, "task_arithmetic", scaling=0.3)
    inputs = {task: torch.randn(shape, dtype=dtype) + k for k, task in enumerate(TASKS)}
    return merged, experts, inputs


def layerwise(z, target, epsilon=1e-5):
    """z with the moments of `target`, and the affine that makes them so."""
    dims = tuple(range(z.dim() - 1))
    mean, spread = z.mean(dims), z.std(dims, correction=0)
    gamma = (target.std(dims, correction=0) + epsilon) / (spread + epsilon)
    beta = target.mean(dims) - gamma * mean
    return z * gamma + beta, gamma, beta


def test_layers_are_corrected_in_running_order():
    merged, experts, inputs = setting()
    dyn = fm.build(merged, experts, method="tact", inputs=inputs)
    assert list(dyn.affines) == ["first", "last"]
    for k, task in enumerate(TASKS):
        x, expert = inputs[task], experts[task]
        first, gamma, beta = layerwise(merged.first(x), expert.first(x))
        assert torch.allclose(dyn.affines["first"].gamma[k], gamma, rtol=1e-12, atol=1e-12)
        assert torch.allclose(dyn.affines["first"].beta[k], beta, rtol=1e-12, atol=1e-12)
        # what the last layer of the merged model sees has been corrected already
        hidden = merged.norm(F.gelu(first))
        expected, gamma, beta = layerwise(merged.last(hidden), expert(x))
        assert torch.allclose(dyn.affines["last"].gamma[k], gamma, rtol=1e-11, atol=1e-11)
        with fm.task(dyn, task):
            found = dyn(x)
        assert torch.allclose(found, expected, rtol=1e-11, atol=1e-11)
        assert torch.allclose(found.mean((0, 1)), expert(x).mean((0, 1)), atol=1e-11)
        spread = expert(x).std((0, 1), correction=0)
        assert torch.allclose(found.std((0, 1), correction=0), spread, rtol=1e-3)


def test_identical_statistics_are_the_identity():
    merged, _, inputs = setting(dtype=torch.float32)
    same = {task: copy.deepcopy(merged) for task in TASKS}
    dyn = fm.build(merged, same, method="tact", inputs=inputs, layers="*")
    assert list(dyn.affines) == ["first", "norm", "last"]
    for affine in dyn.affines.values():
        assert bool((affine.gamma == 1).all()) and bool((affine.beta == 0).all())
    plain = merged(inputs["b"])  # no task is selected: nothing is corrected
    with fm.task(dyn, "b"):
        assert torch.equal(dyn(inputs["b"]), plain)
    folded = dyn.fold("c")
    assert all(raw(folded[name]) == raw(t) for name, t in merged.state_dict().items())


def test_a_mixed_batch_is_what_each_task_gives_alone():
    merged, experts, inputs = setting()
    dyn = fm.build(merged, experts, method="tact", inputs=inputs)
    x = torch.cat([inputs[task][:2] for task in TASKS])
    ids = ["a", "a", "b", "b", "c", "c"]
    with fm.task(dyn, ids):
        mixed = dyn(x)
    for k, task in enumerate(TASKS):
        with fm.task(dyn, task):
            alone = dyn(inputs[task][:2])
        assert torch.allclose(mixed[2 * k : 2 * k + 2], alone, rtol=1e-12, atol=1e-12)
    with fm.task(dyn, ids), pytest.raises(ValueError, match="6 task ids for a batch of 5"):
        dyn(x[:5])
    with pytest.raises(RuntimeError, match="no task is selected"):
        dyn(x)


class Pixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 4, 3, stride=2, groups=1), nn.Linear(4, 5)

    def forward(self, x):
        return self.out(F.relu(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize("layers", [None, "*"])
@pytest.mark.parametrize(("make", "shape"), [(Net, (10, 3, 6)), (Pixels, (6, 3, 9, 9))])
def test_folded_weights_compute_the_same(make, shape, layers):
    merged, experts, inputs = setting(make, shape=shape)
    dyn = fm.build(merged, experts, method="tact", inputs=inputs, layers=layers)
    for task in TASKS:
        plain = make().double().eval()
        plain.load_state_dict(fm.fold(dyn, task))
        with fm.task(dyn, task):
            assert torch.allclose(dyn(inputs[task]), plain(inputs[task]), rtol=1e-10, atol=1e-10)


def test_moments_of_channels_and_of_the_rows_that_count():
    z = torch.randn(4, 3, 5, 2, dtype=torch.float64)
    mean, spread = moments(z, 1)
    assert torch.allclose(mean, z.mean((0, 2, 3)))
    assert torch.allclose(spread, z.std((0, 2, 3), correction=0))
    z, mask = torch.randn(4, 3, 5, dtype=torch.float64), torch.rand(4, 3) > 0.5
    mean, spread = moments(z, -1, mask)
    assert torch.allclose(mean, z[mask].mean(0))
    assert torch.allclose(spread, z[mask].std(0, correction=0))

    merged, experts, inputs = setting()
    padded = {}
    for task, x in inputs.items():
        mask = torch.ones(len(x), 5, dtype=torch.int64)
        mask[:, 3:] = 0
        padded[task] = {"x": torch.cat([x, 100 * x[:, :2]], 1), "attention_mask": mask}
    without = fm.build(merged, experts, method="tact", inputs=inputs)
    without.remove()
    dyn = fm.build(merged, experts, method="tact", inputs=padded)
    for name, affine in dyn.affines.items():
        assert torch.allclose(affine.gamma, without.affines[name].gamma, rtol=1e-12, atol=1e-12)


def test_any_merged_model_is_left_as_it_was_by_remove():
    merged, experts, inputs = setting(dtype=torch.float32)
    masked = fm.build(merged, experts, method="emr")  # another dynamic model, of the same tasks
    dyn = fm.build(masked, experts, method="tact", inputs=inputs)
    with fm.task(masked, "b"):
        plain = masked(inputs["b"])
    with fm.task(dyn, "b"):
        corrected = dyn(inputs["b"])
    assert not torch.equal(plain, corrected)
    assert dyn.remove() is masked
    with fm.task(masked, "b"):
        assert torch.equal(masked(inputs["b"]), plain)
    with pytest.raises(ValueError, match="tact on emr, a dynamic model, cannot be folded"):
        dyn.fold("b")


def test_an_attached_model_is_corrected_like_a_built_one():
    merged, experts, inputs = setting()
    torch.manual_seed(0)
    attached = Net().double().eval()  # the base model again
    fm.attach(attached, experts, granularity="task", init=0.3, clamp=None)
    found = fm.build(attached, experts, method="tact", inputs=inputs)
    expected = fm.build(merged, experts, method="tact", inputs=inputs)
    for task in TASKS:
        with fm.task(found, task), fm.task(expected, task):
            assert torch.allclose(found(inputs[task]), expected(inputs[task]), atol=1e-6)
        folded = fm.fold(expected, task)
        assert all(torch.allclose(t, folded[n], atol=1e-6) for n, t in fm.fold(found, task).items())


def test_save_and_load(tmp_path):
    merged, experts, inputs = setting(dtype=torch.float32)
    states = {task: expert.state_dict() for task, expert in experts.items()}
    dyn = fm.build(merged, states, method="tact", inputs=inputs)
    with fm.task(dyn, "c"):
        expected = dyn(inputs["c"])
    assert dyn.nbytes() == 2 * 4 * 3 * (8 + 5)
    fm.save(dyn, tmp_path / "out")
    dyn.remove()
    again = fm.load(tmp_path / "out", merged)
    with fm.task(again, "c"):
        assert torch.equal(again(inputs["c"]), expected)


def test_dead_channels_stay_finite():
    merged, experts, inputs = setting(dtype=torch.float32)
    with torch.no_grad():
        merged.first.weight[2] = 0
        experts["a"].first.weight[2] = 0
        experts["a"].first.bias[2] = 7.0
    for epsilon in (1e-5, 0.0):
        dyn = fm.build(merged, experts, method="tact", inputs=inputs, epsilon=epsilon)
        affine = dyn.affines["first"]
        assert affine.gamma[0, 2] == 1
        moved = merged.first.bias[2] + affine.beta[0, 2]
        assert moved.item() == pytest.approx(7.0, rel=1e-6)
        dyn.remove()


class Twice(Net):
    def forward(self, x):
        return self.last(self.first(x)) + self.last(self.first(x))


class Wider(Net):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, e, i: (m, e, {"a": i["a"]}, {}), "inputs are of tasks"),
        (lambda m, e, i: (m, e, i, {"layers": "nothing*"}), "no module is called"),
        (lambda m, e, i: (m, e, i, {"epsilon": -1}), "epsilon must not be negative"),
        (lambda m, e, i: (nn.Identity(), e, i, {}), "has no linear layer or convolution"),
        (lambda m, e, i: (m, {**e, "b": Wider().double()}, i, {}), "an expert has 9 channels"),
        (lambda m, e, i: (m, {**e, "b": {"x": torch.ones(1)}}, i, {}), "which the model lacks"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    model, experts, inputs, options = change(*setting())
    with pytest.raises(ValueError, match=message):
        fm.build(model, experts, method="tact", inputs=inputs, **options)
    if isinstance(model, Net):
        assert not model.first._forward_hooks and not model.last._forward_hooks


def test_what_cannot_be_folded_is_named():
    merged, experts, inputs = setting()
    for model in (merged, *experts.values()):
        model.first.bias = None
    dyn = fm.build(merged, experts, method="tact", inputs=inputs)
    with pytest.raises(ValueError, match="'first' is no linear layer, convolution or norm with a"):
        dyn.fold("a")


def test_layers_that_run_twice_and_models_corrected_already_are_refused():
    merged, experts, inputs = setting(Twice)
    with pytest.raises(ValueError, match="'first' runs more than once"):
        fm.build(merged, experts, method="tact", inputs=inputs)
    merged, experts, inputs = setting()
    dyn = fm.build(merged, experts, method="tact", inputs=inputs)
    with pytest.raises(ValueError, match="corrected already"):
        fm.build(dyn, experts, method="tact", inputs=inputs)
