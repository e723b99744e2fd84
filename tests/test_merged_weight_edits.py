"""What would change, replace or optimize merged weights: refused, or noticed before it matters."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastmerge as fm
from fastmerge.merged_weight import MergedWeight

from .attached import Net, attached, loss_of
from .plain import make_experts


@pytest.fixture
def it():
    return attached()


OTHER = torch.zeros(8, 6)

IN_PLACE = {
    "mul_": lambda w: w.mul_(2),
    "copy_": lambda w: w.copy_(OTHER),
    "w[0] =": lambda w: w.__setitem__(0, 1.0),
    "w +=": lambda w: w.__iadd__(1),
    "set_": lambda w: w.set_(OTHER),
    "resize_": lambda w: w.resize_(2, 2),
    "detach_": lambda w: w.detach_(),
    "relu_": lambda w: torch.relu_(w),
    "dropout": lambda w: nn.functional.dropout(w, inplace=True),
    "out": lambda w: torch.add(OTHER, 1, out=w),
    "foreach": lambda w: torch._foreach_mul_([w], 2.0),
    "fused": lambda w: torch._fused_sgd_(
        [w],
        [OTHER],
        [],
        weight_decay=0.0,
        momentum=0.0,
        lr=1.0,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=True,
    ),
    "swap": lambda w: torch.utils.swap_tensors(w, nn.Parameter(OTHER)),
    ".data =": lambda w: setattr(w, "data", OTHER),
    ".data.copy_": lambda w: w.data.copy_(OTHER),
    ".data[...] =": lambda w: w.data.__setitem__(0, 1.0),
    ".data[1:3].zero_": lambda w: w.data[1:3].zero_(),
    ".detach().zero_": lambda w: w.detach().zero_(),
    "init.normal_": lambda w: nn.init.normal_(w),
    "init.zeros_": lambda w: nn.init.zeros_(w),
    "init.xavier": lambda w: nn.init.xavier_uniform_(w),
    "init.kaiming": lambda w: nn.init.kaiming_uniform_(w),
    "vector": lambda w: nn.utils.vector_to_parameters(OTHER.flatten(), [w]),
}


@pytest.mark.parametrize("edit", IN_PLACE)
def test_in_place(it, edit):
    for grad_mode in (True, False):
        with torch.set_grad_enabled(grad_mode):
            with pytest.raises(RuntimeError, match=r"change merged weight 'up\.weight' in place"):
                IN_PLACE[edit](it.weight)
    assert it.learns()


def test_in_place_through_views(it):
    """Row slices are merged weights; other views refuse where parameters are edited, in no_grad."""
    with torch.no_grad():
        for view in (it.weight[0], it.weight.view(-1), it.weight.t(), it.weight.data[2]):
            with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
                view.zero_()
        with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
            nn.init.orthogonal_(it.weight)
        with pytest.raises(RuntimeError, match="in place"):
            it.weight[2:4].zero_()
        assert not (it.weight.t() + 1).is_inference()
    assert it.learns()


def test_reset_parameters(it):
    with pytest.raises(RuntimeError, match=r"kaiming_uniform_ would change merged weight"):
        it.net.up.reset_parameters()


def test_requires_grad(it):
    for refused in (
        lambda: it.net.requires_grad_(True),
        lambda: setattr(it.weight, "requires_grad", True),
        lambda: it.weight.requires_grad_(),
    ):
        with pytest.raises(RuntimeError, match=r"Optimize coefficients\.parameters\(\)"):
            refused()
    it.net.requires_grad_(False)
    it.weight.requires_grad = False
    assert not it.weight.requires_grad and it.learns()


@pytest.mark.parametrize(
    "make",
    [
        lambda net: torch.optim.Adam(net.parameters()),
        lambda net: torch.optim.SGD(net.parameters(), lr=1.0, weight_decay=0.1),
        lambda net: torch.optim.AdamW(net.named_parameters()),
        lambda net: torch.optim.LBFGS([{"params": net.up.parameters()}]),
        lambda net: torch.optim.Adam(nn.Linear(2, 2).parameters()).add_param_group(
            {"params": [net.up.weight]}
        ),
    ],
)
def test_optimizers(it, make):
    with pytest.raises(TypeError, match=r"pass coefficients\.parameters\(\) to the optimizer"):
        make(it.net)
    optimizer = torch.optim.SGD(it.coefficients.parameters(), lr=0.01, weight_decay=0.1)
    before, gradient = it.coefficients.raw.detach().clone(), it.gradient()
    loss_of(it.net(it.x)).backward()
    optimizer.step()
    torch.testing.assert_close(
        it.coefficients.raw.detach(), before - 0.01 * (gradient + 0.1 * before)
    )


def test_gradients_of_the_model(it):
    """clip_grad_norm_ and zero_grad of the model do not reach the coefficients: they warn."""
    it.net.zero_grad()  # nothing to say before a backward pass
    loss_of(it.net(it.x)).backward()
    for ignored in (it.net.zero_grad, lambda: nn.utils.clip_grad_norm_(it.net.parameters(), 1.0)):
        with pytest.warns(fm.MergedWeightWarning, match=r"coefficients\.zero_grad\(\)"):
            ignored()
    assert it.weight.detach().requires_grad is False
    with pytest.raises(RuntimeError, match="no gradient of its own"):
        it.weight.grad = torch.zeros(8, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nn.utils.clip_grad_norm_(it.coefficients.parameters(), 1e-3)
        assert it.coefficients.raw.grad.norm() < 1.1e-3
        it.coefficients.zero_grad()
        assert it.weight.grad is None


@pytest.mark.parametrize("replace", ["parameter", "module", "delete"])
def test_replaced_weights_are_noticed(it, replace):
    if replace == "parameter":
        it.net.up.weight = nn.Parameter(torch.zeros(8, 6))
    elif replace == "module":
        it.net.up = nn.Linear(6, 8)
    else:
        del it.net.up.weight
    batches = {"task": [it.x]}
    for function in (
        lambda: fm.materialize(it.net),
        lambda: fm.coverage(it.net),
        lambda: fm.remerge_(it.net, it.coefficients),
        lambda: fm.learn(nn.Sequential(it.net), it.coefficients, batches, steps=1),
    ):
        with pytest.raises(ValueError, match=r"'up\.weight' was replaced after fastmerge\.attach"):
            function()
    fm.detach(it.net)
    if replace != "module":
        assert torch.equal(it.net(it.x), it.base(it.x))


def test_new_parameters_of_a_weight(it):
    for make in (
        lambda: nn.Parameter(it.weight),
        lambda: nn.Parameter(it.weight.data),
        lambda: nn.Parameter(it.weight, requires_grad=False),
    ):
        with pytest.raises(RuntimeError, match=r"fastmerge\.materialize|coefficients\.parameters"):
            make()
    assert type(nn.Parameter(it.weight.combined().detach())) is nn.Parameter


class _Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize(
    "wrap",
    [
        lambda layer: parametrizations.weight_norm(layer),
        lambda layer: parametrizations.spectral_norm(layer),
        lambda layer: parametrizations.orthogonal(layer),
        lambda layer: parametrize.register_parametrization(layer, "weight", _Double()),
        lambda layer: nn.utils.weight_norm(layer),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_parametrizations(it, wrap):
    with pytest.raises(RuntimeError, match=r"before fastmerge\.attach|fastmerge\.materialize"):
        wrap(it.net.up)
    fm.detach(it.net)
    wrap(it.net.up)
    assert it.net(it.x).isfinite().all()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_pruning_and_old_spectral_norm(it):
    """They keep the merged weight under another name, so gradients are right; then they go."""
    prune.l1_unstructured(it.net.up, "weight", 0.5)
    mask = it.net.up.weight_mask
    y = it.net(it.x)
    weights = {**it.built(), "up.weight": it.built()["up.weight"] * mask}
    torch.testing.assert_close(y, torch.func.functional_call(it.base, weights, (it.x,)))
    loss_of(y).backward()
    assert it.coefficients.raw.grad[0].abs().min() > 0
    with pytest.raises(ValueError, match=r"'up\.weight' was replaced"):
        fm.materialize(it.net)
    other = attached()
    nn.utils.spectral_norm(other.net.up)
    loss_of(other.net(other.x)).backward()
    assert other.coefficients.raw.grad[0].abs().min() > 0


def test_parameters_to_vector(it):
    vector = nn.utils.parameters_to_vector(it.net.parameters())
    expected = torch.cat([v.flatten() for v in it.built().values()])
    torch.testing.assert_close(vector.detach(), expected)
    vector.sum().backward()
    assert it.coefficients.raw.grad.abs().min() > 0


@pytest.mark.filterwarnings("ignore")
def test_quantization(it):
    """Quantized copies hold the present merged values."""
    quantized = torch.ao.quantization.quantize_dynamic(it.net, {nn.Linear})
    torch.testing.assert_close(quantized(it.x), it.net(it.x), rtol=0.1, atol=0.1)
    assert isinstance(it.weight, MergedWeight) and it.learns()


def test_peft(it):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(it.net, peft.LoraConfig(target_modules=["up"], r=2))
    y = model(it.x)
    assert it.learns(y)
    adapter = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert adapter[0].grad.abs().max() > 0
    with pytest.raises(RuntimeError, match="in place"):
        model.merge_and_unload()


def test_averaged_models(it):
    averaged = torch.optim.swa_utils.AveragedModel(it.net)
    with pytest.raises(RuntimeError, match="copy_ would change merged weight"):
        averaged.update_parameters(it.net)
    of_coefficients = torch.optim.swa_utils.AveragedModel(it.coefficients)
    of_coefficients.update_parameters(it.coefficients)
    with torch.no_grad():
        it.coefficients.raw.add_(0.5)
    of_coefficients.update_parameters(it.coefficients)
    assert torch.allclose(of_coefficients.module.raw, torch.full((6, 2), 0.55))


def test_moving_averages_by_hand(it):
    average = {n: p.detach().clone() for n, p in it.net.named_parameters()}
    with torch.no_grad():
        for name, p in it.net.named_parameters():
            average[name].mul_(0.9).add_(p, alpha=0.1)
    torch.testing.assert_close(average, it.built())


def test_attaching_twice():
    torch.manual_seed(0)
    model = nn.Sequential(Net(), nn.Linear(3, 2))
    experts = make_experts(model, 2)
    inner = [expert[0] for expert in experts]
    fm.attach(model[0], inner)
    with pytest.raises(ValueError, match="merged weights already"):
        fm.attach(model[0], inner)
    with pytest.raises(ValueError, match=r"'0\.up\.weight' is a merged weight already"):
        fm.attach(model, experts)
    with pytest.raises(ValueError, match=r"its part '0' has"):
        fm.materialize(model)
    fm.detach(model[0])
    fm.attach(model, experts)
    with pytest.raises(ValueError, match=r"'up\.weight' is a merged weight already"):
        fm.attach(model[0], inner)


def test_attached_models_as_experts(it):
    """An attached model counts as an expert with its present values; as a base it is refused."""
    expected = it.built()["up.weight"]
    model = copy.deepcopy(it.base)
    fm.attach(model, [it.net, *it.experts])
    torch.testing.assert_close(model.up.weight.deltas.tensors[0], expected)
    merged = fm.merge(it.base, [it.net], method="task_arithmetic", scaling=1.0)
    torch.testing.assert_close(merged.up.weight.data, expected)
    with pytest.raises(ValueError, match="is a merged weight already"):
        fm.merge(it.net, it.experts, method="average")
