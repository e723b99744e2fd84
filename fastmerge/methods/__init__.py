"""The merging methods, one file each, and their registry."""

from __future__ import annotations

import difflib
from typing import Any

from ._method import Block, Method, Parameter, Pass, Statistics, run_passes
from .anchor_ramp import AnchorRamp
from .arcee_fusion import ArceeFusion
from .average import Average
from .breadcrumbs import Breadcrumbs, BreadcrumbsTies
from .concrete import ConcreteWeighted
from .consensus import Consensus
from .dare import DareLinear, DareTies
from .della import Della, DellaLinear
from .karcher import Karcher
from .linear import Linear
from .lines import Lines
from .metagpt import MetaGPT
from .model_stock import ModelStock
from .multislerp import MultiSlerp
from .nearswap import NearSwap
from .nuslerp import NuSlerp
from .passthrough import Passthrough
from .ram import Ram, RamPlus
from .sce import Sce
from .slerp import Slerp
from .task_arithmetic import TaskArithmetic
from .ties import Ties
from .weighted import Weighted
from .weighted_ties import WeightedTies

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Average,
        Linear,
        TaskArithmetic,
        MetaGPT,
        Lines,
        AnchorRamp,
        Ties,
        WeightedTies,
        DareLinear,
        DareTies,
        Consensus,
        Breadcrumbs,
        BreadcrumbsTies,
        Della,
        DellaLinear,
        Sce,
        Ram,
        RamPlus,
        ModelStock,
        Slerp,
        NuSlerp,
        MultiSlerp,
        Karcher,
        NearSwap,
        ArceeFusion,
        Passthrough,
    )
}

__all__ = [
    "METHODS",
    "Average",
    "Block",
    "ConcreteWeighted",
    "Method",
    "Parameter",
    "Pass",
    "Statistics",
    "TaskArithmetic",
    "Ties",
    "Weighted",
    "make_method",
    "run_passes",
]


def make_method(name: str, **parameters: Any) -> Method:
    """A method by its name in the registry.

    Args:
        name: a key of `METHODS`, for example "average" or "ties".
        parameters: the method's parameters, its defaults for the others.

    Raises:
        ValueError: unknown method, or a parameter value out of range.
        TypeError: the method has no such parameter.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}, expected one of {', '.join(METHODS)}")
    method = METHODS[name]
    known = [parameter.name for parameter in method.parameters]
    for given in parameters:
        if given not in known:
            near = difflib.get_close_matches(given, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
            raise TypeError(f"method {name!r} has no parameter {given!r}: {hint}")
    return method(**parameters)
