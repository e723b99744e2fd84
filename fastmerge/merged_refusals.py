"""What a merged weight refuses because it would otherwise fail silently, and what to do instead."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel

from .merged_functions import as_tuple, is_merged

MATERIALIZE = "call fastmerge.materialize(model) for ordinary weights"

# mul_, _foreach_mul_, nn.init.normal_; w[0] = 1; w += 1; w.names = ...
_IN_PLACE = re.compile(
    r".*[^_]_|__setitem__|__set__|"
    r"__i(add|sub|mul|truediv|floordiv|mod|pow|matmul|and|or|xor|lshift|rshift)__"
)
_REDUCED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class MergedWeightWarning(UserWarning):
    """Something was asked of a merged weight that only its coefficients have."""


def writes(name: str) -> bool:
    """Whether torch's naming rules say that a function of this name changes its argument."""
    return _IN_PLACE.fullmatch(name) is not None


def refuse_write(weight: Any, what: str) -> NoReturn:
    raise RuntimeError(
        f"{what} would change merged weight {weight.name!r} in place, but its value follows from "
        f"base, experts and coefficients: change those, {MATERIALIZE}, or load, move, convert or "
        "wrap the model before fastmerge.attach"
    )


def refuse_written(func: Callable, args: tuple, kwargs: dict) -> None:
    """Raise if `func` would write to a merged weight, which a combined copy would hide."""
    name = getattr(func, "__name__", str(func))
    if getattr(func, "__module__", None) == "torch.distributed.distributed_c10d":
        refuse_dispatch(next(w for a in (*args, *kwargs.values()) for w in _merged(a)), name)
    targets: list = []
    if writes(name) or kwargs.get("inplace"):
        arguments = (*args, *kwargs.values())
        targets = list(arguments if name.startswith("_fused_") else arguments[:1])
    if kwargs.get("out") is not None:
        targets.append(kwargs["out"])
    for target in targets:
        for weight in _merged(target):
            refuse_write(weight, "setting an attribute" if name == "__set__" else name)


def _merged(argument: Any) -> list:
    return [value for value in as_tuple(argument) if is_merged(value)]


def refuse_storage(weight: Any, name: str) -> NoReturn:
    raise RuntimeError(
        f"{name}: merged weight {weight.name!r} has no memory of its own; use "
        f"model.state_dict() for merged values, or {MATERIALIZE}"
    )


def refuse_hook(weight: Any, name: str) -> NoReturn:
    raise RuntimeError(
        f"{name}: merged weight {weight.name!r} gets no gradient of its own; put the hook on the "
        "coefficients' parameter or on the module"
    )


def refuse_requires_grad(weight: Any) -> NoReturn:
    raise RuntimeError(
        f"merged weight {weight.name!r} cannot require grad: its coefficients do. Optimize "
        f"coefficients.parameters(), or {MATERIALIZE}"
    )


def refuse_parameter(weight: Any) -> NoReturn:
    raise RuntimeError(
        f"nn.Parameter of merged weight {weight.name!r} would no longer follow the coefficients: "
        f"take nn.Parameter(weight.combined().detach()) for a copy, or {MATERIALIZE}"
    )


def refuse_optimizer(weight: Any) -> NoReturn:
    raise TypeError(
        f"merged weight {weight.name!r} follows from its coefficients and cannot be optimized "
        "itself: pass coefficients.parameters() to the optimizer, and of the model's parameters "
        "those that require grad"
    )


def refuse_sharding(weight: Any) -> NoReturn:
    raise RuntimeError(
        f"merged weight {weight.name!r} cannot be sharded: it would become an ordinary weight "
        f"that ignores the coefficients. To shard the merged model, {MATERIALIZE}"
    )


def refuse_dispatch(weight: Any, func: Any) -> NoReturn:
    raise NotImplementedError(
        f"{func} reached merged weight {weight.name!r} directly (from C++, TorchScript, a "
        "collective, or as an input of torch.func), where its coefficients would lose their "
        "gradient: differentiate with respect to the coefficients, pass a built copy "
        "weight.combined(), give DistributedDataParallel the very model that was attached, or "
        f"{MATERIALIZE}"
    )


def warn_about_gradient(weight: Any) -> None:
    """Warn who looks for a weight's gradient while the coefficients have one."""
    if any(p.grad is not None for p in weight.coefficients.parameters()):
        import warnings

        warnings.warn(
            f"merged weight {weight.name!r} has no gradient, its coefficients do: pass "
            "coefficients.parameters() to clip_grad_norm_, and call coefficients.zero_grad() or "
            "the optimizer's besides model.zero_grad()",
            MergedWeightWarning,
            stacklevel=4,
        )


def transforms_active() -> bool:
    """Whether torch.func transforms or forward-mode differentiation are running.

    Registered ops have rules for reverse mode only, so plain PyTorch computes meanwhile.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refuse_lost_gradient(weight: Any) -> None:
    """Raise where a forward pass would silently cut the coefficients off from their gradient."""
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            raise RuntimeError(f"torch.export of merged weights is not supported: {MATERIALIZE}")
        return
    if torch.jit.is_tracing():
        raise RuntimeError(
            f"torch.jit.trace would freeze merged weight {weight.name!r} at the present "
            f"coefficients: {MATERIALIZE}, or use torch.compile"
        )
    if torch.is_grad_enabled():
        _refuse_unreduced(weight)
    # torch disables forward-mode gradients inside autograd.Function.forward, but not in no_grad
    elif not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled():
        if any(p.requires_grad for p in weight.coefficients.parameters()):
            raise RuntimeError(
                f"merged weight {weight.name!r} is used inside an autograd.Function, where its "
                "coefficients may lose their gradient: checkpoint with use_reentrant=False, and "
                "pass weight.combined() to an autograd.Function of your own"
            )


def _refuse_unreduced(weight: Any) -> None:
    """Raise if DistributedDataParallel would leave the coefficients' gradients unreduced."""
    wrapper = DistributedDataParallel._active_ddp_module
    coefficients = weight.coefficients
    if wrapper is None or coefficients in _REDUCED.get(wrapper, ()):
        return
    reduced = {id(p) for p in wrapper.parameters()}
    if any(p.requires_grad and id(p) not in reduced for p in coefficients.parameters()):
        raise RuntimeError(
            "DistributedDataParallel does not know the coefficients, so their gradients would "
            "differ from process to process: set model.coefficients = coefficients before "
            "wrapping the model"
        )
    _REDUCED.setdefault(wrapper, weakref.WeakSet()).add(coefficients)
