"""Every kernel at every configuration that can be reached, as cases to compile."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastmerge.kernels import (
    coefficient_grad,
    lowrank_linear,
    masked_linear,
    merged_linear,
    partial_sums,
    residual_adapter,
    row_linear,
    softmax_entropy,
)
from fastmerge.kernels.launching import Config

# Bytes of shared memory a block may use, by target (CUDA programming guide, technical
# specifications per compute capability, less the 1 KiB that the system keeps).
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448, 120: 101376}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEFAULTS = {
    "x": "bf16",
    "weights": "bf16",
    "base": None,  # as weights
    "count": 8,
    "precision": "ieee",
    "experts": True,
    "layout": "aligned",
}
# "odd": no size or stride is a multiple of 16; "odd outer": the number of outputs alone is not;
# "offset": every address is off by an element; "odd bytes": rows of packed masks begin anywhere.
LAYOUTS = ("aligned", "odd outer", "odd", "offset")
SAMPLE, MASKED_SAMPLE, SEED = 70, 12, 3
MASKED_FORMS = ("forward", "backward_x", "backward")
NO_CONFIG = Config(0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Case:
    """One kernel at one configuration for one target; `form` names the variant."""

    kernel: str
    form: str
    target: int
    config: Config
    options: tuple[tuple[str, Any], ...] = ()

    def __getitem__(self, name: str) -> Any:
        return dict(self.options).get(name, DEFAULTS[name])

    @property
    def name(self) -> str:
        tile = f"{self.config.out}x{self.config.rows}x{self.config.inner}"
        options = "".join(f" {value}" for value in self.inputs)
        return (
            f"{self.kernel} {self.form}{options} {tile} "
            f"w{self.config.warps} s{self.config.stages} sm_{self.target}"
        )

    @property
    def inputs(self) -> list[str]:
        if self.kernel in ("partial_sums", "softmax_entropy", "task_order"):
            return [self["x"]]
        dtypes = self["x"] if self["x"] == self["weights"] else f"{self['x']}/{self['weights']}"
        dtypes += " tf32" if self["precision"] == "tf32" else ""
        if self.kernel == "residual_adapter":  # compiled for any number of tasks
            return [dtypes, *([self["layout"]] if self["layout"] != "aligned" else [])]
        unusual = [f"base {self['base']}"] if self["base"] else []
        unusual += ["task vectors"] if not self["experts"] else []
        unusual += [self["layout"]] if self["layout"] != "aligned" else []
        return [f"K={self['count']}", dtypes, *unusual]

    @property
    def aligned(self) -> bool:
        """Whether the launchers take it as such: outputs apart in memory need no 16-byte copies."""
        layouts = ("aligned", "odd bytes")
        layouts += ("odd outer",) if self.form == "forward" else ()
        return self["layout"] in layouts

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
        """Of activations, base and deltas."""
        weights = self["weights"]
        return DTYPES[self["x"]], DTYPES[self["base"] or weights], DTYPES[weights]


def _configurations(case: Case, rows: int) -> list[Config]:
    """What the launcher chooses from; `rows` is a weight's shorter side for coefficient_grad."""
    limit = SHARED_MEMORY[case.target]
    if case.kernel in ("coefficient_grad", "masked_coefficient_grad"):
        x, _, delta = case.dtypes
        return coefficient_grad.configurations(rows, 1024, x, delta, case.aligned, limit)
    if case.kernel == "lowrank_linear":
        x, base, factor = case.dtypes
        weights = (base, factor, factor)
        return lowrank_linear.configurations(rows, x, weights, case.aligned, limit)
    if case.kernel == "masked_linear":
        return masked_linear.configurations(rows, *case.dtypes, case.aligned, limit)
    if case.kernel == "residual_adapter":
        x, _, factor = case.dtypes
        rank = int(case.form.removeprefix("rank "))
        return residual_adapter.configurations(rows, rank, x, factor, case.aligned, limit)
    if case.kernel == "row_linear":
        return row_linear.configurations(rows, *case.dtypes, case.aligned, limit)
    arguments = rows, *case.dtypes, case["count"], case.aligned, case.target // 10, limit
    return merged_linear.configurations(*arguments)


def _of(kernel: str, form: str, target: int, rows: int, **options: Any) -> Iterator[Case]:
    """All configurations for 8 experts in bf16, the first one for other inputs, to save time."""
    case = Case(kernel, form, target, NO_CONFIG, tuple(options.items()))
    for config in _configurations(case, rows)[: 1 if options else None]:
        yield replace(case, config=config)


def _merged_linear_cases(target: int) -> Iterator[Case]:
    def of(form: str, rows: int, **options: Any) -> Iterator[Case]:
        return _of("merged_linear", form, target, rows, **options)

    for rows in (16, 32, 64, 128):
        yield from of("forward", rows)
        yield from of("backward_x", rows)
    for form in ("forward", "backward_x"):
        yield from of(form, 128, x="fp32", weights="fp32")
        yield from of(form, 128, layout="odd")
        yield from of(form, 16, count=32, layout="odd")
    for count in (1, 16, 32):
        yield from of("forward", 128, count=count)
    yield from of("backward_x", 16, count=32)
    yield from of("forward", 64, count=32)
    yield from of("forward", 64, x="fp16", weights="fp16")
    yield from of("forward", 128, weights="fp32")
    yield from of("forward", 16, x="fp32", weights="fp32")
    if target != 120:  # too little shared memory there; test_support.py has the message
        yield from of("forward", 64, x="fp32", weights="fp32", count=32)
    yield from of("forward", 64, x="fp32", weights="fp32", precision="tf32")
    yield from of("backward_x", 64, x="fp32", weights="fp32", count=32, layout="odd")


def _coefficient_grad_cases(target: int) -> Iterator[Case]:
    def of(rows: int, **options: Any) -> Iterator[Case]:
        return _of("coefficient_grad", "gradient", target, rows, **options)

    yield from of(1024)
    yield from of(1024, experts=False)
    yield from of(64)
    yield from of(1024, count=32)
    yield from of(1024, weights="fp32")
    yield from of(1024, x="fp32", weights="fp32")
    yield from of(1024, x="fp32", weights="fp32", precision="tf32")
    yield from of(1024, layout="odd")


def _masked_coefficient_grad_cases(target: int) -> Iterator[Case]:
    def of(rows: int, **options: Any) -> Iterator[Case]:
        return _of("masked_coefficient_grad", "gradient", target, rows, **options)

    yield from of(1024)
    yield from of(64)
    yield from of(1024, weights="fp32")
    yield from of(1024, x="fp32", weights="fp32")
    yield from of(1024, x="fp32", weights="fp32", precision="tf32")
    yield from of(1024, x="fp32")
    yield from of(1024, layout="odd")
    yield from of(1024, layout="odd bytes")


def _row_linear_cases(target: int) -> Iterator[Case]:
    def of(form: str, rows: int, **options: Any) -> Iterator[Case]:
        return _of("row_linear", form, target, rows, **options)

    for form in ("forward", "backward"):
        for rows in (16, 32, 64, 1024):
            yield from of(form, rows)
        yield from of(form, 64, x="fp32", weights="fp32")
        yield from of(form, 64, layout="odd")
    yield from of("backward", 64, count=32)
    yield from of("backward", 1024, weights="fp32")
    yield from of("backward", 64, x="fp32", weights="fp32", precision="tf32")


def _lowrank_linear_cases(target: int) -> Iterator[Case]:
    def of(form: str, rows: int, **options: Any) -> Iterator[Case]:
        for case in _of("lowrank_linear", form, target, rows, **options):
            if form == "thin":  # the same launch with another tile
                case = replace(case, config=replace(case.config, out=lowrank_linear.COLUMNS))
            yield case

    for form in ("thin", "output", "output backward"):
        for rows in (16, 64, 1024):
            yield from of(form, rows)
        yield from of(form, 64, x="fp32", weights="fp32")
        yield from of(form, 64, layout="odd")
    yield from of("output", 1024, weights="fp32")
    yield from of("output", 64, x="fp32", weights="fp32", precision="tf32")


def _masked_linear_cases(target: int) -> Iterator[Case]:
    def of(form: str, rows: int, **options: Any) -> Iterator[Case]:
        return _of("masked_linear", form, target, rows, **options)

    for form in MASKED_FORMS:
        for rows in (16, 64, 1024):
            yield from of(form, rows)
        yield from of(form, 64, x="fp32", weights="fp32")
        yield from of(form, 64, layout="odd")
        yield from of(form, 1024, layout="odd bytes")
    yield from of("backward", 32, count=32)
    yield from of("forward", 1024, weights="fp32")
    yield from of("backward", 1024, base="fp32", x="fp16", weights="fp16")
    yield from of("forward", 64, x="fp32", weights="fp32", precision="tf32")


def _residual_adapter_cases(target: int) -> Iterator[Case]:
    def of(rank: int, rows: int, **options: Any) -> Iterator[Case]:
        return _of("residual_adapter", f"rank {rank}", target, rows, **options)

    for rank in (16, 64):
        for rows in (1, 50, 1024):
            yield from of(rank, rows)
        yield from of(rank, 50, weights="fp32")
        yield from of(rank, 50, x="fp32", weights="fp32")
        yield from of(rank, 50, layout="odd")
    yield from of(64, 50, weights="fp32", layout="odd")
    yield from of(64, 50, x="fp32", weights="fp32", layout="odd")
    yield from of(16, 50, x="fp32", weights="fp32", precision="tf32")


def combinations() -> list[Case]:
    """Kernel, target, layout, dtypes, number of experts and every configuration for them."""
    every: dict[str, Case] = {}
    inputs = [
        {},
        {"x": "fp16", "weights": "fp16"},
        {"base": "fp32"},
        {"weights": "fp32"},
        {"x": "fp32"},
        {"x": "fp32", "weights": "fp32"},
        {"x": "fp32", "weights": "fp32", "precision": "tf32"},
    ]
    masked = [("masked_linear", form, (16, 64, 1024)) for form in MASKED_FORMS]
    shapes = [("merged_linear", form, (16, 32, 64, 128)) for form in ("forward", "backward_x")]
    shapes += [("row_linear", form, (16, 32, 64, 1024)) for form in ("forward", "backward")]
    shapes += [("coefficient_grad", "gradient", (64, 1024))]
    for axes in itertools.product(shapes, (80, 90), LAYOUTS, inputs, (1, 8, 16, 32), (True, False)):
        (kernel, form, sizes), target, layout, dtypes, count, experts = axes
        options = {"layout": layout, "count": count, "experts": experts, **dtypes}
        case = Case(kernel, form, target, NO_CONFIG, tuple(options.items()))
        for config in (config for rows in sizes for config in _configurations(case, rows)):
            found = replace(case, config=config)
            every[found.name] = found
    for axes in itertools.product(masked, (80, 90), (*LAYOUTS, "odd bytes"), inputs):
        (kernel, form, sizes), target, layout, dtypes = axes
        case = Case(kernel, form, target, NO_CONFIG, tuple({"layout": layout, **dtypes}.items()))
        for config in (config for rows in sizes for config in _configurations(case, rows)):
            found = replace(case, config=config)
            every[found.name] = found
    return list(every.values())


def sample() -> list[Case]:
    """Some of the combinations, always the same."""
    masked = [case for case in combinations() if case.kernel == "masked_linear"]
    others = [case for case in combinations() if case.kernel != "masked_linear"]
    draw = random.Random(SEED)
    return draw.sample(others, SAMPLE) + draw.sample(masked, MASKED_SAMPLE)


def _streaming_cases(target: int) -> Iterator[Case]:
    order = Config(masked_linear.SORTED_SAMPLES, 1, 1, masked_linear.ORDER_WARPS, 2)
    yield Case("task_order", "order", target, order, (("x", "fp32"),))
    for form in ("forward", "backward"):
        for config in softmax_entropy.configurations(4096):
            yield Case("softmax_entropy", form, target, config)
    yield from (
        Case("softmax_entropy", "forward", target, config, (("x", "fp32"),))
        for config in softmax_entropy.configurations(10)[:1]
    )
    for form, parts, width in (("plain", 1024, 8), ("bias", 4, 4096)):
        block_width, block_parts = partial_sums.blocks(parts, width)
        config = Config(block_width, block_parts, 1, 4, 2)
        yield Case("partial_sums", form, target, config, (("x", "fp32"),))


def cases() -> list[Case]:
    """Every case, once: the full lists for sm_80 and sm_90, one per form for newer targets."""
    every: dict[str, Case] = {}
    for target in SHARED_MEMORY:
        newer: dict[tuple[str, str], Case] = {}
        generators = (
            _merged_linear_cases,
            _coefficient_grad_cases,
            _masked_coefficient_grad_cases,
            _row_linear_cases,
            _lowrank_linear_cases,
            _masked_linear_cases,
            _residual_adapter_cases,
            _streaming_cases,
        )
        for case in (case for generate in generators for case in generate(target)):
            if target <= 90 or (newer.setdefault((case.kernel, case.form), case) is case):
                every[case.name] = case
    return list(every.values())
