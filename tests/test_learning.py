"""`learn`: agreement with a plain implementation, exact resume, clear failures."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import fastmerge as fm
from fastmerge.learning import CollapseWarning, ShuffledBatches

from .plain import built_weights, make_experts
from .tolerances import TOLERANCES

TASKS = ("a", "b", "c")


def _model(width: int = 12) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, 5)
    ).eval()


@pytest.fixture
def setting():
    model = _model()
    experts = make_experts(model, len(TASKS), scale=0.3)
    generator = torch.Generator().manual_seed(1)
    data = {task: torch.randn(40, 6, generator=generator) for task in TASKS}
    return model, experts, data


def _batches(data, batch_size=8):
    return {
        task: ShuffledBatches(x, batch_size, seed=i) for i, (task, x) in enumerate(data.items())
    }


def _plain_learn(model, experts, data, objective, steps, lr, clamp, dtype):
    """AdaMerging as its paper describes it: build, forward, sum of objectives, Adam."""
    model = copy.deepcopy(model).to(dtype)
    experts = [copy.deepcopy(e).to(dtype) for e in experts]
    base = dict(model.named_parameters())
    states = [dict(e.named_parameters()) for e in experts]
    raw = torch.full((len(base), len(experts)), 0.3, dtype=dtype, requires_grad=True)
    adam = torch.optim.Adam([raw], lr=lr)
    streams = {task: iter(batches) for task, batches in _batches(data).items()}
    for _ in range(steps):
        adam.zero_grad()
        weights = built_weights(base, states, raw.clamp(*clamp) if clamp else raw)
        total = 0
        for k, task in enumerate(TASKS):
            x = next(streams[task]).to(dtype)
            log_p = functional_call(model, weights, (x,)).log_softmax(-1)
            if objective == "entropy":
                total = total - (log_p.exp() * log_p).sum(-1).mean()
            else:
                target = experts[k](x).detach().log_softmax(-1)
                total = total + (target.exp() * (target - log_p)).sum(-1).mean()
        total.backward()
        adam.step()
    return raw.detach()


def _bf16_plain_learn(model, experts, data, steps, lr):
    """The plain implementation under autocast: built fp32 weights, GEMMs in bf16."""
    base = dict(model.named_parameters())
    states = [dict(e.named_parameters()) for e in experts]
    raw = torch.full((len(base), len(experts)), 0.3, requires_grad=True)
    adam = torch.optim.Adam([raw], lr=lr)
    streams = {task: iter(batches) for task, batches in _batches(data).items()}
    for _ in range(steps):
        adam.zero_grad()
        weights = built_weights(base, states, raw)
        total = 0
        for task in TASKS:
            with torch.autocast("cpu", torch.bfloat16):
                logits = functional_call(model, weights, (next(streams[task]),))
            log_p = logits.float().log_softmax(-1)
            total = total - (log_p.exp() * log_p).sum(-1).mean()
        total.backward()
        adam.step()
    return raw.detach()


def test_learning_in_bf16_is_as_near_to_the_truth_as_plain_autocast(setting):
    model, experts, data = setting
    truth = _plain_learn(model, experts, data, "entropy", 30, 1e-2, None, torch.float64)
    eager = _bf16_plain_learn(model, experts, data, 30, 1e-2)
    coefficients = fm.attach(model, experts, clamp=None)
    kinds = []
    model[0].register_forward_hook(lambda module, args, output: kinds.append(output.dtype))
    fm.learn(model, coefficients, _batches(data), steps=30, lr=1e-2, dtype=torch.bfloat16)
    assert set(kinds) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in coefficients.parameters())
    error = (coefficients.matrix() - truth).abs().max()
    assert error <= (eager - truth).abs().max() + TOLERANCES[torch.bfloat16]


def test_a_dtype_that_is_not_16_bits_wide_is_refused(setting):
    model, experts, data = setting
    coefficients = fm.attach(model, experts)
    with pytest.raises(ValueError, match=r"dtype must be torch\.bfloat16.*got torch\.float64"):
        fm.learn(model, coefficients, _batches(data), steps=1, dtype=torch.float64)


@pytest.mark.parametrize("objective", ["entropy", "kl"])
@pytest.mark.parametrize("clamp", [(0.0, 1.0), (0.25, 0.35), None])
def test_fifty_steps_agree_with_a_plain_implementation(setting, objective, clamp):
    model, experts, data = setting
    truth = _plain_learn(model, experts, data, objective, 50, 1e-2, clamp, torch.float64)
    eager = _plain_learn(model, experts, data, objective, 50, 1e-2, clamp, torch.float32)
    coefficients = fm.attach(model, experts, clamp=clamp)
    history = fm.learn(
        model,
        coefficients,
        _batches(data),
        objective=objective,
        expert_logits=dict(zip(TASKS, experts, strict=True)),
        steps=50,
        lr=1e-2,
    )
    assert (truth - 0.3).abs().max() > 0.1  # the fifty steps moved something
    error = (coefficients.raw.detach().double() - truth).abs().max()
    eager_error = (eager.double() - truth).abs().max()
    assert error <= eager_error + 1e-4
    assert len(history.loss) == 50 and sum(history.loss[-10:]) < sum(history.loss[:10])


class _IgnoresExtra(nn.Module):
    """Takes a second input that is not looked at, so that its width can keep tasks apart."""

    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, x, extra):
        self.calls += 1
        return self.net(x)


def test_joined_and_separate_forwards_agree(setting):
    model, experts, data = setting
    results, calls = [], []
    for widths in ((1, 1, 1), (1, 2, 3)):
        net = _IgnoresExtra(copy.deepcopy(model))
        coefficients = fm.attach(net, [_IgnoresExtra(e) for e in experts])
        batches = {
            task: [(data[task][:8], torch.zeros(8, width))]
            for task, width in zip(TASKS, widths, strict=True)
        }
        fm.learn(net, coefficients, batches, steps=5, lr=1e-2)
        results.append(coefficients.raw.detach().clone())
        calls.append(net.calls)
    assert calls == [5, 15]
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


def test_heads_and_structured_outputs(setting):
    _, _, data = setting

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x):
            return {"features": self.layer(x)}

    torch.manual_seed(3)
    model = Encoder()
    experts = make_experts(model, 3, 0.3)
    heads = {task: (lambda out, c=c: out["features"][:, :c]) for c, task in enumerate(TASKS, 2)}
    coefficients = fm.attach(model, experts)
    history = fm.learn(model, coefficients, _batches(data), heads=heads, steps=3)
    assert set(history.task_loss) == set(TASKS)
    with pytest.raises(ValueError, match="logits of task 'a' are dict"):
        fm.learn(model, coefficients, _batches(data), steps=1)


def test_resume_is_exact(setting, tmp_path):
    model, experts, data = setting
    expected_model = copy.deepcopy(model)
    expected = fm.attach(expected_model, experts)
    full = fm.learn(expected_model, expected, _batches(data), steps=30, lr=1e-2)
    path = tmp_path / "run.safetensors"
    first = fm.attach(model, experts)
    fm.learn(model, first, _batches(data), steps=13, lr=1e-2, checkpoint=path)
    fm.detach(model)
    second = fm.attach(model, experts)
    with pytest.raises(FileExistsError, match="resume=True"):
        fm.learn(model, second, _batches(data), steps=30, lr=1e-2, checkpoint=path)
    history = fm.learn(
        model, second, _batches(data), steps=30, lr=1e-2, checkpoint=path, resume=True
    )
    assert torch.equal(second.raw, expected.raw)
    assert history.loss == full.loss
    fm.detach(model)
    third = fm.attach(model, experts[:2])
    with pytest.raises(ValueError, match="experts is"):
        fm.learn(model, third, _batches(data), steps=30, checkpoint=path, resume=True)


def test_nan_loss_names_step_and_task_and_keeps_coefficients(setting):
    model, experts, data = setting
    coefficients = fm.attach(model, experts)
    batches = {task: [x[:8], x[8:16]] for task, x in data.items()}
    batches["b"][1] = torch.full((8, 6), float("nan"))
    with pytest.raises(FloatingPointError, match=r"step 1: the loss of task 'b' is nan"):
        fm.learn(model, coefficients, batches, steps=10)
    assert torch.isfinite(coefficients.raw).all()
    assert (coefficients.raw != 0.3).any()  # the first step was taken


def test_patience_evaluation_and_history(setting):
    model, experts, data = setting
    coefficients = fm.attach(model, experts)
    calls = []
    history = fm.learn(
        model,
        coefficients,
        _batches(data),
        steps=200,
        lr=0.0,
        patience=25,
        evaluate=lambda: calls.append(1) or len(calls),
        evaluate_every=10,
    )
    assert history.stopped_early and len(history.loss) < 200
    steps = [step for step, _ in history.evaluations]
    assert steps[:3] == [0, 10, 20] and steps[-1] == len(history.loss)


def test_collapse_warning_fires_on_collapse_only():
    """A model that learns to answer one class for every row, with falling entropy."""

    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return x + self.bias

    torch.manual_seed(0)
    base, expert = Biased(), Biased()
    with torch.no_grad():
        expert.bias[1] = 10.0
    data = {"only": ShuffledBatches(torch.randn(64, 3), 16)}
    coefficients = fm.attach(base, [expert], init=0.05)
    with pytest.warns(CollapseWarning, match=r"task 'only' is collapsing .* class 1"):
        fm.learn(base, coefficients, data, steps=300, lr=2e-3)
    fm.detach(base)
    coefficients = fm.attach(base, [expert], init=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CollapseWarning)
        fm.learn(base, coefficients, data, steps=80, lr=0.0)
    fm.detach(base)
    coefficients = fm.attach(base, [expert], init=0.05)
    with warnings.catch_warnings():  # an expert with one answer is followed, not warned about
        warnings.simplefilter("error", CollapseWarning)
        options = dict(objective="kl", expert_logits={"only": expert}, lr=2e-3)
        fm.learn(base, coefficients, data, steps=300, **options)


def test_other_parameters_are_frozen_meanwhile(setting):
    model, experts, data = setting
    coefficients = fm.attach(model, experts, include="3.*")
    assert model[0].weight.requires_grad
    seen = []
    fm.learn(
        model,
        coefficients,
        _batches(data),
        steps=2,
        objective=lambda logits, batch: (
            seen.append(model[0].weight.requires_grad)
            or F.mse_loss(logits, torch.zeros_like(logits))
        ),
    )
    assert not any(seen) and len(seen) == 6
    assert model[0].weight.requires_grad and model[0].weight.grad is None


class _Checkpointed(nn.Module):
    def __init__(self, net, reentrant):
        super().__init__()
        self.net, self.reentrant = net, reentrant

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=self.reentrant)


def test_activation_checkpointing(setting):
    model, experts, data = setting
    x = data["a"]
    coefficients = fm.attach(model, experts)
    (expected,) = torch.autograd.grad(model(x).square().sum(), [coefficients.raw])
    y = _Checkpointed(model, reentrant=False)(x)
    (ours,) = torch.autograd.grad(y.square().sum(), [coefficients.raw])
    torch.testing.assert_close(ours, expected)
    with pytest.raises(RuntimeError, match="checkpoint with use_reentrant=False"):
        fm.learn(_Checkpointed(model, reentrant=True), coefficients, _batches(data), steps=1)


def test_model_without_merged_weights(setting):
    model, experts, data = setting
    coefficients = fm.attach(model, experts)
    with pytest.raises(RuntimeError, match="no gradient reaches the coefficients"):
        fm.learn(fm.detach(model), coefficients, _batches(data), steps=1)


def test_arguments_that_do_not_fit(setting):
    model, experts, data = setting
    coefficients = fm.attach(model, experts)
    with pytest.raises(ValueError, match="batches is empty"):
        fm.learn(model, coefficients, {})
    with pytest.raises(ValueError, match="heads has no entry for task 'b'"):
        fm.learn(model, coefficients, _batches(data), heads={"a": lambda y: y}, steps=1)
    with pytest.raises(ValueError, match="needs expert_logits for task 'a'"):
        fm.learn(model, coefficients, _batches(data), objective="kl", steps=1)
    with pytest.raises(ValueError, match="objective must be one of"):
        fm.learn(model, coefficients, _batches(data), objective="magic", steps=1)
    with pytest.raises(ValueError, match="task 'a' are exhausted"):
        fm.learn(model, coefficients, {"a": []}, steps=1)
    with pytest.raises(ValueError, match="cuda_graph needs the model on a CUDA device"):
        fm.learn(model, coefficients, _batches(data), steps=1, cuda_graph=True)
    with pytest.raises(ValueError, match="batch_size"):
        ShuffledBatches(torch.zeros(4, 2), 5)
