"""Gradients of the coefficients through torch's transforms, compilers, checkpointing and hooks."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import fastmerge as fm

from .attached import attached, loss_of
from .plain import built_call, make_experts


@pytest.fixture
def it():
    return attached()


class _Loss(nn.Module):
    """The loss of an attached model as a function of its coefficients, for torch.func."""

    def __init__(self, it):
        super().__init__()
        self.net, self.coefficients = it.net, it.coefficients

    def forward(self, x):
        return loss_of(self.net(x))


def _loss(it):
    module = _Loss(it)
    return lambda raw, x: functional_call(module, {"coefficients.raw": raw}, (x,))


def _plain_loss(it):
    return lambda raw, x: built_call(it.base, it.experts, raw, lambda f: loss_of(f(x)))


def test_functional_call(it):
    y = functional_call(it.net, dict(it.net.named_parameters()), (it.x,))
    assert it.learns(y)
    other = dict(it.base.named_parameters())
    assert torch.equal(functional_call(it.net, other, (it.x,)), it.base(it.x))
    assert it.learns()


@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "jacrev", "jacfwd", "hessian"])
def test_func_transforms_over_coefficients(it, transform):
    raw = it.coefficients.raw.detach()

    def transformed(loss):
        function = lambda raw: loss(raw, it.x)  # noqa: E731
        if transform == "vjp":
            return torch.func.vjp(function, raw)[1](torch.ones(()))[0]
        if transform == "jvp":
            return torch.func.jvp(function, (raw,), (torch.ones_like(raw),))[1]
        return getattr(torch.func, transform)(function)(raw)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.func.jvp uses torch.jit inside
        ours, theirs = transformed(_loss(it)), transformed(_plain_loss(it))
    assert theirs.abs().max() > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_vmap(it):
    torch.testing.assert_close(torch.func.vmap(it.net)(it.x), it.net(it.x))
    raws = torch.stack([it.coefficients.raw.detach(), torch.full_like(it.coefficients.raw, 0.7)])
    over_coefficients = torch.func.vmap(_loss(it), (0, None))(raws, it.x)
    plain = torch.stack([_plain_loss(it)(raw, it.x) for raw in raws])
    torch.testing.assert_close(over_coefficients, plain)
    per_sample = torch.func.vmap(torch.func.grad(_loss(it)), (None, 0))(raws[0], it.x)
    torch.testing.assert_close(per_sample.sum(0), it.gradient())


def test_func_over_the_weights_themselves(it):
    with pytest.raises(NotImplementedError, match="differentiate with respect to the coeff"):
        torch.func.grad(lambda p: loss_of(functional_call(it.net, p, (it.x,))))(
            dict(it.net.named_parameters())
        )


def test_forward_mode(it):
    tangent = torch.ones_like(it.coefficients.raw)
    expected = it.gradient().sum()
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        raw = it.coefficients.raw.detach()
        del it.coefficients._parameters["raw"]
        it.coefficients.raw = forward_ad.make_dual(raw, tangent)
        ours = forward_ad.unpack_dual(loss_of(it.net(it.x))).tangent
        torch.testing.assert_close(ours, expected)
        deltas = fm.Experts([e.up.weight.detach() for e in it.experts])
        row, base = it.coefficients.raw[0], it.base.up.weight.detach()
        with pytest.raises(NotImplementedError, match="merged_linear has no forward-mode"):
            fm.ops.merged_linear(it.x, base, deltas, row)
        with pytest.raises(NotImplementedError, match="weighted_sum has no forward-mode"):
            fm.ops.weighted_sum(base, deltas, row)
        with pytest.raises(NotImplementedError, match="softmax_entropy has no forward-mode"):
            fm.ops.softmax_entropy(forward_ad.make_dual(it.x, it.x))


def test_double_backward(it):
    (gradient,) = torch.autograd.grad(loss_of(it.net(it.x)), it.coefficients.raw, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivatives .*torch\.func\.hessian"):
        gradient.sum().backward()


def test_checkpointing_non_reentrant(it):
    assert it.learns(checkpoint(it.net, it.x, use_reentrant=False))


@pytest.mark.parametrize("grad_mode", [True, False])
def test_checkpointing_reentrant(it, grad_mode):
    x = it.x.clone().requires_grad_()
    for values in (it.x, x):
        with torch.set_grad_enabled(grad_mode), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(RuntimeError, match="checkpoint with use_reentrant=False"):
                checkpoint(it.net, values, use_reentrant=True)
    it.coefficients.requires_grad_(False)
    checkpoint(it.net, x, use_reentrant=True).sum().backward()
    assert x.grad is not None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


def test_autograd_functions(it):
    with pytest.raises(RuntimeError, match=r"weight\.combined\(\) to an autograd\.Function"):
        _Product.apply(it.x.requires_grad_(), it.weight)
    _Product.apply(it.x, it.weight.combined()).sum().backward()
    assert it.coefficients.raw.grad[0].abs().min() > 0


def test_autocast(it):
    """bf16 within bf16's rounding of plain autocast; gradients too."""
    raw = it.coefficients.raw.detach().clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = it.net(it.x)
        plain = built_call(it.base, it.experts, raw, lambda f: f(it.x))
    assert y.dtype == plain.dtype == torch.bfloat16
    (ours,) = torch.autograd.grad(loss_of(y.float()), it.coefficients.raw)
    (theirs,) = torch.autograd.grad(loss_of(plain.float()), raw)
    truth = it.gradient()
    assert (ours - truth).norm() <= (theirs - truth).norm() + 2**-8 * truth.norm()
    assert 0 < (ours - truth).norm() < 0.1 * truth.norm()


def test_compile(it):
    torch._dynamo.reset()
    compiled = torch.compile(it.net, fullgraph=True, backend="aot_eager")
    assert it.learns(compiled(it.x))
    with torch.no_grad():
        it.coefficients.raw.fill_(0.8)
        torch.testing.assert_close(compiled(it.x), it.net(it.x))
    assert it.learns(compiled(it.x))


def test_fx(it):
    traced = torch.fx.symbolic_trace(it.net)
    assert it.learns(traced(it.x))


@pytest.mark.parametrize("strict", [True, False])
def test_export(it, strict):
    with pytest.raises(Exception, match=r"fastmerge\.materialize"):
        torch.export.export(it.net, (it.x,), strict=strict)
    exported = torch.export.export(fm.materialize(it.net), (it.x,)).module()
    torch.testing.assert_close(exported(it.x), it.net(it.x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torchscript(it):
    with pytest.raises(RuntimeError, match=r"fastmerge\.materialize"):
        torch.jit.trace(it.net, (it.x,))
    scripted = torch.jit.script(nn.Sequential(it.net.up))
    with pytest.raises((RuntimeError, NotImplementedError)):
        scripted(it.x)
    fm.materialize(it.net)
    torch.testing.assert_close(torch.jit.trace(it.net, (it.x,))(it.x), it.net(it.x))


def test_accumulation(it):
    for _ in range(2):
        loss_of(it.net(it.x)).backward()
    torch.testing.assert_close(it.coefficients.raw.grad, 2 * it.gradient())
    loss = loss_of(it.net(it.x))
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(it.coefficients.raw.grad, 4 * it.gradient())


def test_coefficients_changed_before_backward(it):
    loss = loss_of(it.net(it.x))
    with torch.no_grad():
        it.coefficients.raw.add_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_gradients(it):
    with torch.inference_mode():
        inferred = it.net(it.x)
        assert it.net.state_dict()["up.weight"].shape == (8, 6)
    with torch.no_grad():
        torch.testing.assert_close(it.net(it.x), inferred)
    assert not inferred.requires_grad and it.learns()
    detached = F.linear(it.x, it.weight.detach(), it.net.up.bias.detach())
    assert not detached.requires_grad


def test_train_and_eval(it):
    assert it.net.train().training and it.learns()
    assert not it.net.eval().training and it.learns()


def test_hooks(it):
    for refused in ("register_hook", "register_post_accumulate_grad_hook"):
        with pytest.raises(RuntimeError, match=r"hook on the coefficients' parameter"):
            getattr(it.weight, refused)(print)
    with pytest.raises(RuntimeError, match="gets no gradient of its own"):
        it.weight.retain_grad()
    calls = []
    it.net.up.register_forward_pre_hook(lambda *_: calls.append("before"))
    it.net.up.register_forward_hook(lambda *_: calls.append("after"))
    it.net.norm.register_full_backward_hook(lambda *_: calls.append("backward"))
    it.coefficients.raw.register_hook(lambda g: calls.append("coefficients"))
    assert it.learns()
    assert calls[:3] == ["before", "after", "backward"] and "coefficients" in calls


def test_saved_tensor_hooks(it):
    with torch.autograd.graph.save_on_cpu():
        y = it.net(it.x)
    assert it.learns(y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            assert it.learns(it.net(it.x))


def test_two_threads(it):
    expected, found = it.gradient(), []

    def work():
        for _ in range(10):
            found.append(torch.autograd.grad(loss_of(it.net(it.x)), it.coefficients.raw)[0])

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    for gradient in found:
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: torch.einsum("bi,oi->bo", x, w),
        lambda w, x: x @ w.t(),
        lambda w, x: torch.matmul(x, w.mT),
        lambda w, x: torch.bmm(x[None], w.t()[None]),
        lambda w, x: torch.cat([w, w[2:5]]) @ torch.stack([x, x])[0].t(),
        lambda w, x: F.bilinear(x[:, :3], x[:, :2], w.view(8, 3, 2)),
        lambda w, x: torch.linalg.norm(w) + F.normalize(w).sum() + (2 * w - 1).exp().sum(),
        lambda w, x: w[0] * w[torch.tensor([1, 2])] + w[None, 1:3],
    ],
)
def test_other_functions_get_a_copy_with_its_gradient(it, function):
    raw = it.coefficients.raw.detach().clone().requires_grad_()
    experts = [e.up.weight.detach() for e in it.experts]
    base = it.base.up.weight.detach()
    weight = base + sum(lam * (e - base) for lam, e in zip(raw[0], experts, strict=True))
    ours, theirs = function(it.weight, it.x), function(weight, it.x)
    torch.testing.assert_close(ours, theirs)
    gradients = [
        torch.autograd.grad(y.square().sum(), p)[0]
        for y, p in ((ours, it.coefficients.raw), (theirs, raw))
    ]
    assert gradients[1].abs().max() > 0
    torch.testing.assert_close(*gradients)
    uses = dict(fm.coverage(it.net)[0][1])
    assert uses.get("built", 0) >= 1


def test_modules_of_torch(it):
    """Bilinear, LSTM and embeddings, which torch computes outside of Python."""
    torch.manual_seed(3)
    x, ids = torch.randn(4, 2, 5), torch.tensor([[1, 2], [0, 3]])
    cases = [
        (nn.Bilinear(5, 5, 3), lambda f: f(x, x)),
        (nn.LSTM(5, 4), lambda f: f(x)[0]),
        (nn.EmbeddingBag(6, 3), lambda f: f(ids)),
        (nn.EmbeddingBag(6, 3, sparse=True), lambda f: f(ids)),
        (nn.Embedding(6, 3, sparse=True), lambda f: f(ids)),
        (nn.Embedding(6, 3, sparse=True), lambda f: f(ids.repeat(1, 2))),
        (nn.Embedding(6, 3, scale_grad_by_freq=True, padding_idx=1), lambda f: f(ids)),
    ]
    for module, call in cases:
        experts = make_experts(module, 2, scale=0.3)
        base = copy.deepcopy(module)
        coefficients = fm.attach(module, experts)
        raw = coefficients.raw.detach().clone().requires_grad_()
        theirs = built_call(base, experts, raw, lambda f, call=call: loss_of(call(f)))
        (expected,) = torch.autograd.grad(theirs, raw)
        (found,) = torch.autograd.grad(loss_of(call(module)), coefficients.raw)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_embeddings_that_renormalize():
    """max_norm changes the rows that are looked up in place."""
    for kind, length in ((nn.Embedding, 2), (nn.Embedding, 20), (nn.EmbeddingBag, 2)):
        module = kind(6, 3, max_norm=0.5)
        fm.attach(module, make_experts(module, 2))
        with pytest.raises(RuntimeError, match=r"max_norm would change merged weight 'weight'"):
            module(torch.zeros(1, length, dtype=torch.int64))


class _Cached(nn.Module):
    """Keeps a view of its weight from the first pass on."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.kept = layer, None

    def forward(self, x):
        self.kept = self.layer.weight.t() if self.kept is None else self.kept
        return x @ self.kept


def test_views_kept_between_passes(it):
    module = _Cached(it.net.up)
    loss_of(module(it.x)).backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss_of(module(it.x)).backward()
