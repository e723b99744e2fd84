"""Compiles every Triton kernel and configuration without a GPU and reads what the code needs.

`python tests/kernels/offline.py --part 0/2` prints one JSON line per case of that part;
`--write` brings the resource table of docs/kernels.md up to date.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastmerge.kernels import (
    coefficient_grad,
    merged_linear,
    partial_sums,
    row_linear,
    softmax_entropy,
)
from fastmerge.kernels.launching import Config

# Bytes of shared memory a block may use, by target (CUDA programming guide, technical
# specifications per compute capability, less the 1 KiB that the system keeps).
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448, 120: 101376}
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
BEGIN, END = "<!-- resources: begin -->\n", "<!-- resources: end -->"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Axis, body and operand shape of a reduction in Triton's intermediate code.
REDUCTION = (
    r'"tt\.reduce"[^{]*<\{axis = (\d+) : i32\}>(.*?)tt\.reduce\.return.*?: \(tensor<([\dx]+)x'
)
ALIGNED = [["tt.divisibility", 16]]
DEFAULTS = {"x": "bf16", "weights": "bf16", "count": 8, "precision": "ieee"}


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
        if self.kernel in ("partial_sums", "softmax_entropy"):
            return [self["x"]]
        dtypes = self["x"] if self["x"] == self["weights"] else f"{self['x']}/{self['weights']}"
        dtypes += " tf32" if self["precision"] == "tf32" else ""
        return [f"K={self['count']}", dtypes]


@dataclass
class Launch:
    """What Triton needs to compile one launch: the function and its arguments by kind."""

    function: Any
    pointers: dict[str, str | tuple[str, ...] | None]
    aligned: set[str]  # integers divisible by 16
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)


def _merged_linear(case: Case) -> Launch:
    contiguous = "stride_wi" if case.form == "forward" else "stride_wo"
    return Launch(
        merged_linear._merged_linear_kernel,
        {
            "x_ptr": case["x"],
            "base_ptr": case["weights"],
            "delta_ptrs": (case["weights"],) * case["count"],
            "coefficients_ptr": "fp32",
            "bias_ptr": case["x"] if case.form == "forward" else None,
            "y_ptr": case["x"],
        },
        {"inner", "outer", "stride_xr", "stride_wo", "stride_wi"},
        {
            "stride_xi": 1,
            contiguous: 1,
            "COUNT": case["count"],
            "EXPERTS": True,
            "HAS_BIAS": case.form == "forward",
            "PRECISION": case["precision"],
            "BLOCK_O": case.config.out,
            "BLOCK_R": case.config.rows,
            "BLOCK_I": case.config.inner,
        },
    )


def _coefficient_grad(case: Case) -> Launch:
    return Launch(
        coefficient_grad._coefficient_grad_kernel,
        {
            "left_ptr": case["x"],
            "right_ptr": case["x"],
            "base_ptr": case["weights"],
            "delta_ptrs": (case["weights"],) * case["count"],
            "partials_ptr": "fp32",
        },
        {"outer", "inner", "share", "stride_lr", "stride_rr", "stride_wo"},
        {
            "stride_lo": 1,
            "stride_ri": 1,
            "stride_wi": 1,
            "COUNT": case["count"],
            "EXPERTS": case.form == "experts",
            "PRECISION": case["precision"],
            "BLOCK_O": case.config.out,
            "BLOCK_I": case.config.rows,
            "BLOCK_R": case.config.inner,
        },
    )


def _row_linear(case: Case) -> Launch:
    backward = case.form == "backward"
    contiguous = "stride_wo" if backward else "stride_wi"
    return Launch(
        row_linear._row_linear_kernel,
        {
            "x_ptr": case["x"],
            "base_ptr": case["weights"],
            "delta_ptrs": (case["weights"],) * case["count"],
            "coefficients_ptr": "fp32",
            "bias_ptr": None if backward else case["x"],
            "other_ptr": case["x"] if backward else None,
            "y_ptr": case["x"],
            "dots_ptr": "fp32" if backward else None,
        },
        {"inner", "outer", "stride_xr", "stride_wo", "stride_wi", "stride_or"},
        {
            "stride_xi": 1,
            "stride_oo": 1,
            contiguous: 1,
            "COUNT": case["count"],
            "EXPERTS": True,
            "HAS_BIAS": not backward,
            "HAS_DOTS": backward,
            "PRECISION": case["precision"],
            "BLOCK_O": case.config.out,
            "BLOCK_R": case.config.rows,
            "BLOCK_I": case.config.inner,
        },
    )


def _softmax_entropy(case: Case) -> Launch:
    pointers = {"logits_ptr": case["x"], "entropy_ptr": "fp32", "normalizer_ptr": "fp32"}
    function = softmax_entropy._softmax_entropy_kernel
    if case.form == "backward":
        function = softmax_entropy._softmax_entropy_backward_kernel
        pointers |= {"grad_ptr": "fp32", "out_ptr": case["x"]}
    blocks = {"BLOCK_R": case.config.rows, "BLOCK_C": case.config.out}
    options = {"enable_fp_fusion": False}
    return Launch(function, pointers, {"classes", "stride_r"}, {"stride_c": 1, **blocks}, options)


def _partial_sums(case: Case) -> Launch:
    bias = case.form == "bias"
    return Launch(
        partial_sums._partial_sums_kernel,
        {"partials_ptr": "fp32", "bias_ptr": "bf16" if bias else None, "out_ptr": case["x"]},
        {"width"},
        {"HAS_BIAS": bias, "BLOCK_WIDTH": case.config.out, "BLOCK_PARTS": case.config.rows},
    )


LAUNCHES = {
    "merged_linear": _merged_linear,
    "coefficient_grad": _coefficient_grad,
    "row_linear": _row_linear,
    "softmax_entropy": _softmax_entropy,
    "partial_sums": _partial_sums,
}


def _variants(
    kernel: str, form: str, target: int, configs: list[Config], options: dict[str, Any]
) -> Iterator[Case]:
    """All configurations for 8 experts in bf16, the first one for other inputs, to save time."""
    for config in configs[:1] if options else configs:
        yield Case(kernel, form, target, config, tuple(options.items()))


def _merged_linear_cases(target: int) -> Iterator[Case]:
    def of(form: str, rows: int, **options: Any) -> Iterator[Case]:
        values = DEFAULTS | options
        weights, limit = DTYPES[values["weights"]], SHARED_MEMORY[target]
        arguments = rows, DTYPES[values["x"]], weights, weights, values["count"], True
        configs = merged_linear.configurations(*arguments, target // 10, limit)
        yield from _variants("merged_linear", form, target, configs, options)

    for rows in (16, 32, 64, 128):
        yield from of("forward", rows)
        yield from of("backward_x", rows)
    for form in ("forward", "backward_x"):
        yield from of(form, 128, x="fp32", weights="fp32")
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


def _coefficient_grad_cases(target: int) -> Iterator[Case]:
    def of(form: str, outer: int, **options: Any) -> Iterator[Case]:
        values = DEFAULTS | options
        dtypes = DTYPES[values["x"]], DTYPES[values["weights"]]
        configs = coefficient_grad.configurations(outer, 1024, *dtypes, SHARED_MEMORY[target])
        yield from _variants("coefficient_grad", form, target, configs, options)

    yield from of("experts", 1024)
    yield from of("task vectors", 1024)
    yield from of("experts", 64)
    yield from of("experts", 1024, count=32)
    yield from of("experts", 1024, weights="fp32")
    yield from of("experts", 1024, x="fp32", weights="fp32")
    yield from of("experts", 1024, x="fp32", weights="fp32", precision="tf32")


def _row_linear_cases(target: int) -> Iterator[Case]:
    def of(form: str, rows: int, **options: Any) -> Iterator[Case]:
        values = DEFAULTS | options
        weights = DTYPES[values["weights"]]
        arguments = rows, DTYPES[values["x"]], weights, weights, True, SHARED_MEMORY[target]
        configs = row_linear.configurations(*arguments)
        yield from _variants("row_linear", form, target, configs, options)

    for form in ("forward", "backward"):
        for rows in (16, 32, 64, 1024):
            yield from of(form, rows)
        yield from of(form, 64, x="fp32", weights="fp32")
    yield from of("backward", 64, count=32)
    yield from of("backward", 1024, weights="fp32")
    yield from of("backward", 64, x="fp32", weights="fp32", precision="tf32")


def _streaming_cases(target: int) -> Iterator[Case]:
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
            _row_linear_cases,
            _streaming_cases,
        )
        for case in (case for generate in generators for case in generate(target)):
            if target <= 90 or (newer.setdefault((case.kernel, case.form), case) is case):
                every[case.name] = case
    return list(every.values())


def measure(case: Case) -> dict[str, Any]:
    """Compile one case and count registers, spills, shared memory and matrix instructions."""
    launch = LAUNCHES[case.kernel](case)
    signature: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    constants = dict(launch.constants)
    for index, name in enumerate(launch.function.arg_names):
        pointer = launch.pointers.get(name)
        if isinstance(pointer, tuple):
            signature[name] = tuple(f"*{dtype}" for dtype in pointer)
            attributes |= {(index, k): ALIGNED for k in range(len(pointer))}
        elif pointer is not None:
            signature[name] = f"*{pointer}"
            attributes[(index,)] = ALIGNED
        elif name in constants or name in launch.pointers:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
        else:
            signature[name] = "i32"
            if name in launch.aligned:
                attributes[(index,)] = ALIGNED
    compiled = triton.compile(
        ASTSource(launch.function, signature, constants, attributes),
        target=GPUTarget("cuda", case.target, 32),
        options=case.config.launch | launch.options,
    )
    return read(compiled)


def read(compiled: Any) -> dict[str, Any]:
    """Registers, spills, shared memory and instructions of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ptx, ttir = compiled.asm["ptx"], compiled.asm["ttir"]
    reductions = re.findall(REDUCTION, ttir, re.DOTALL)
    counts = {kind: ptx.count(f"{kind}.") for kind in set(MATRIX_INSTRUCTION.values())}
    return counts | {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        # Registers that do not fit are spilled to the stack frame in local memory.
        "spilled": sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)),
        "shared": compiled.metadata.shared,
        # In this form the second operand is a list of registers instead of a descriptor.
        "register_a": len(re.findall(r"wgmma\.mma_async\S* \{[^}]*\}, \{", ptx)),
        "wide_copies": len(re.findall(r"cp\.async\.cg\S* [^;]*, 0x10[,;]", ptx)),
        "widest_sum": max(
            (
                int(shape.split("x")[int(axis)])
                for axis, body, shape in reductions
                if "arith.addf" in body
            ),
            default=0,
        ),
        "atomics": len(re.findall(r"^\s*(?:@\S+ )?(?:atom|red)\.", ptx, re.MULTILINE)),
    }


def measure_all(processes: int = 2) -> dict[str, dict[str, Any]]:
    """Resources of every case by its name, measured in parallel processes."""
    running = [
        subprocess.Popen(
            [sys.executable, __file__, "--part", f"{part}/{processes}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for part in range(processes)
    ]
    found: dict[str, dict[str, Any]] = {}
    for process in running:
        output, _ = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"offline compilation failed: {process.args}")
        lines = (json.loads(line) for line in output.splitlines())
        found |= {line["name"]: line["resources"] for line in lines}
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """The resource table of docs/kernels.md."""
    lines = [
        "| kernel | form | inputs | target | tile | warps | stages | registers | shared memory "
        "| matrix instructions |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases():
        r, c = found[case.name], case.config
        kind = MATRIX_INSTRUCTION[case.target]
        matrix = f"{r[kind]} {kind}" if r[kind] else "-"
        if r["register_a"]:
            matrix += f", {r['register_a']} with A in registers"
        tile = f"{c.out} x {c.rows}" + (f" x {c.inner}" if c.inner > 1 else "")
        lines.append(
            f"| {case.kernel} | {case.form} | {', '.join(case.inputs)} | sm_{case.target} | {tile} "
            f"| {c.warps} | {c.stages} | {r['registers']} | {r['shared']} | {matrix} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", help="I/N: print the resources of every N-th case from the I-th")
    parser.add_argument("--write", action="store_true", help="rewrite the table of docs/kernels.md")
    arguments = parser.parse_args()
    if arguments.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + table(measure_all()) + END + rest.partition(END)[2])
        return
    part, parts = map(int, (arguments.part or "0/1").split("/"))
    for case in cases()[part::parts]:
        line = {"name": case.name, "resources": measure(case)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
