"""Hooks on modules that hold merged weights: what their state dicts give, and that none is loaded.

`state_dict()` gives merged values. `load_state_dict` raises before anything is loaded.
`DistributedDataParallel` does not send merged weights about: every process has its own base and
experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .merged_functions import is_merged

_IGNORED = "_ddp_params_and_buffers_to_ignore"  # what DistributedDataParallel reads


def add_hooks(model: nn.Module, modules: Iterable[nn.Module], names: Iterable[str]) -> None:
    """Put hooks on the modules that hold merged weights, and on the model itself.

    Args:
        model: the model that is attached.
        modules: the modules that hold merged weights.
        names: all names of merged weights in the model, tied ones too.
    """
    for module in {id(m): m for m in (model, *modules)}.values():
        module.register_state_dict_post_hook(_give_merged_values)
        module.register_load_state_dict_pre_hook(_refuse_loading)
    setattr(model, _IGNORED, [*getattr(model, _IGNORED, ()), *names])


def remove_hooks(model: nn.Module, modules: Iterable[nn.Module], names: Iterable[str]) -> None:
    """Undo `add_hooks`."""
    for module in (model, *modules):
        for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
            for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
                del hooks[key]
    ignored = set(names)
    left = [name for name in getattr(model, _IGNORED, ()) if name not in ignored]
    if left:
        setattr(model, _IGNORED, left)
    else:
        model.__dict__.pop(_IGNORED, None)


def _is_ours(hook: Any) -> bool:
    return getattr(hook, "hook", hook) in (_give_merged_values, _refuse_loading)


def _give_merged_values(module: nn.Module, state: dict, prefix: str, local_metadata: Any) -> None:
    for attribute in (*module._parameters, *module._buffers):
        value = state.get(prefix + attribute)
        if is_merged(value) and value.detached:  # with keep_vars=True it is the weight itself
            state[prefix + attribute] = value.combined()


def _refuse_loading(module: nn.Module, state: dict, prefix: str, *others: Any) -> None:
    merged = [prefix + name for name, p in module.named_parameters() if is_merged(p)]
    loaded = next((name for name in merged if name in state), None)
    if loaded is not None:
        raise RuntimeError(
            f"load_state_dict would change merged weight {loaded!r}, whose value follows from "
            "base, experts and coefficients: load into the base model before fastmerge.attach, "
            "load coefficients with coefficients.load(path), or call fastmerge.materialize(model) "
            "for ordinary weights first"
        )
