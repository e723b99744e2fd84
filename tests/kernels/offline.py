"""Compiles the Triton kernels without a GPU and reads what the code needs.

From the top folder, `python -m tests.kernels.offline --write` brings the resource table of
docs/kernels.md up to date; `--every` compiles all combinations, of which the tests take a sample
(half an hour on two cores); `--part 0/2` prints one JSON line per case of that part.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastmerge.kernels import (
    coefficient_grad,
    lowrank_linear,
    masked_coefficient_grad,
    masked_linear,
    merged_linear,
    partial_sums,
    residual_adapter,
    row_linear,
    softmax_entropy,
)

from .cases import Case, cases, combinations, sample

MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- resources: begin -->\n", "<!-- resources: end -->"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Axis, body and operand shape of a reduction in Triton's intermediate code.
REDUCTION = (
    r'"tt\.reduce"[^{]*<\{axis = (\d+) : i32\}>(.*?)tt\.reduce\.return.*?: \(tensor<([\dx]+)x'
)
ALIGNED = [["tt.divisibility", 16]]


@dataclass
class Launch:
    """What Triton needs to compile one launch: the function and its arguments by kind."""

    function: Any
    pointers: dict[str, str | tuple[str, ...] | None]
    aligned: set[str]  # integers divisible by 16
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    unaligned: set[str] = field(default_factory=set)  # pointers
    numbers: dict[str, int] = field(default_factory=dict)  # tuples of so many fp32

    def laid_out(self, layout: str) -> Launch:
        """The launch with sizes, strides and addresses of that layout."""
        if layout == "odd":
            self.aligned = set()
        elif layout == "odd outer":
            self.aligned = self.aligned - {"outer", "stride_or"}
        elif layout == "offset":
            self.unaligned = {"x_ptr", "left_ptr", "right_ptr", "other_ptr"}
            self.unaligned |= {"base_ptr", "delta_ptrs", "unified_ptr", "masks_ptr"}
        elif layout == "odd bytes":
            self.aligned = self.aligned - {"stride_mk", "stride_mo", "stride_mi"}
            self.unaligned = {"masks_ptr"}
        return self


def _merged_linear(case: Case) -> Launch:
    contiguous = "stride_wi" if case.form == "forward" else "stride_wo"
    return Launch(
        merged_linear._merged_linear_kernel,
        {
            "x_ptr": case["x"],
            "base_ptr": case["base"] or case["weights"],
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
            "GROUP": merged_linear.expert_group(case["count"], case.aligned),
            "EXPERTS": case["experts"],
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
            "base_ptr": case["base"] or case["weights"],
            "delta_ptrs": (case["weights"],) * case["count"],
            "partials_ptr": "fp32",
        },
        {"outer", "inner", "share", "stride_lr", "stride_rr", "stride_wo"},
        {
            "stride_lo": 1,
            "stride_ri": 1,
            "stride_wi": 1,
            "COUNT": case["count"],
            "EXPERTS": case["experts"],
            "PRECISION": case["precision"],
            "BLOCK_O": case.config.out,
            "BLOCK_I": case.config.rows,
            "BLOCK_R": case.config.inner,
        },
    )


def _masked_coefficient_grad(case: Case) -> Launch:
    return Launch(
        masked_coefficient_grad._masked_coefficient_grad_kernel,
        {
            "left_ptr": case["x"],
            "right_ptr": case["x"],
            "unified_ptr": case["weights"],
            "masks_ptr": "u8",
            "partials_ptr": "fp32",
        },
        {"outer", "inner", "share", "stride_lr", "stride_rr", "stride_wo"}
        | {"stride_mk", "stride_mo"},
        {
            "stride_lo": 1,
            "stride_ri": 1,
            "COUNT": case["count"],
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
            "base_ptr": case["base"] or case["weights"],
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
            "EXPERTS": case["experts"],
            "HAS_BIAS": not backward,
            "HAS_DOTS": backward,
            "PRECISION": case["precision"],
            "BLOCK_O": case.config.out,
            "BLOCK_R": case.config.rows,
            "BLOCK_I": case.config.inner,
        },
    )


def _lowrank_linear(case: Case) -> Launch:
    blocks = {
        "PRECISION": case["precision"],
        "BLOCK_O": case.config.out,
        "BLOCK_R": case.config.rows,
        "BLOCK_I": case.config.inner,
    }
    factor = case["weights"]
    if case.form == "thin":
        return Launch(
            lowrank_linear._thin_kernel,
            {
                "x_ptr": case["x"],
                "down_ptr": factor,
                "coefficients_ptr": "fp32",
                "thin_ptr": case["x"],
                "used_ptr": "i32",
            },
            {"inner", "total", "stride_xr", "stride_do"},
            {"stride_xi": 1, "stride_di": 1, "COUNT": case["count"], **blocks},
            numbers={"ends": case["count"]},
        )
    backward = case.form.endswith("backward")
    contiguous = ("stride_wo", "stride_uo") if backward else ("stride_wi", "stride_ui")
    return Launch(
        lowrank_linear._lowrank_linear_kernel,
        {
            "x_ptr": case["x"],
            "base_ptr": case["base"] or factor,
            "thin_ptr": case["x"],
            "up_ptr": factor,
            "used_ptr": "i32",
            "bias_ptr": None if backward else case["x"],
            "y_ptr": case["x"],
        },
        {"inner", "outer", "total", "stride_xr", "stride_wo", "stride_wi", "stride_uo"}
        | {"stride_ui"},
        {
            "stride_xi": 1,
            **dict.fromkeys(contiguous, 1),
            "HAS_BIAS": not backward,
            "BLOCK_C": lowrank_linear.COLUMNS,
            **blocks,
        },
    )


def _masked_linear(case: Case) -> Launch:
    forward, dots = case.form == "forward", case.form == "backward"
    contiguous = ("stride_wi", "stride_mi") if forward else ("stride_wo", "stride_mo")
    return Launch(
        masked_linear._masked_linear_kernel,
        {
            "x_ptr": case["x"],
            "base_ptr": case["base"] or case["weights"],
            "unified_ptr": case["weights"],
            "masks_ptr": "u8",
            "coefficients_ptr": "fp32",
            "order_ptr": "i32",
            "bias_ptr": case["x"] if forward else None,
            "other_ptr": case["x"] if dots else None,
            "y_ptr": case["x"],
            "dots_ptr": "fp32" if dots else None,
        },
        {"inner", "outer", "stride_xr", "stride_wo", "stride_wi", "stride_or"}
        | {"stride_mk", "stride_mo", "stride_mi"},
        {
            "stride_xi": 1,
            "stride_lk": 1,
            "stride_oo": 1,
            **dict.fromkeys(contiguous, 1),
            "COUNT": case["count"],
            "PACKED_INNER": forward,
            "HAS_BIAS": forward,
            "HAS_DOTS": dots,
            "PRECISION": case["precision"],
            "BLOCK_O": case.config.out,
            "BLOCK_R": case.config.rows,
            "BLOCK_I": case.config.inner,
        },
    )


def _task_order(case: Case) -> Launch:
    return Launch(
        masked_linear._order_kernel,
        {"coefficients_ptr": "fp32", "order_ptr": "i32"},
        set(),
        {"stride_lk": 1, "COUNT": 8, "BLOCK": case.config.out},
    )


def _residual_adapter(case: Case) -> Launch:
    rank = int(case.form.removeprefix("rank "))
    return Launch(
        residual_adapter._residual_adapter_kernel,
        {
            "x_ptr": case["x"],
            "down_ptr": case["weights"],
            "up_ptr": case["weights"],
            "tasks_ptr": "i64",
            "y_ptr": case["x"],
        },
        {"width", "rank", "stride_xr", "stride_dk", "stride_dr", "stride_uk", "stride_uo"},
        {
            "stride_xi": 1,
            "stride_di": 1,
            "stride_ur": 1,
            "PRECISION": case["precision"],
            "BLOCK_O": case.config.out,
            "BLOCK_R": case.config.rows,
            "BLOCK_I": case.config.inner,
            "BLOCK_C": residual_adapter.thin_columns(rank),
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
    "masked_coefficient_grad": _masked_coefficient_grad,
    "row_linear": _row_linear,
    "lowrank_linear": _lowrank_linear,
    "masked_linear": _masked_linear,
    "task_order": _task_order,
    "residual_adapter": _residual_adapter,
    "softmax_entropy": _softmax_entropy,
    "partial_sums": _partial_sums,
}


def measure(case: Case) -> dict[str, Any]:
    """Compile one case and count registers, spills, shared memory and matrix instructions."""
    launch = LAUNCHES[case.kernel](case).laid_out(case["layout"])
    signature: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    constants = dict(launch.constants)
    for index, name in enumerate(launch.function.arg_names):
        pointer = launch.pointers.get(name)
        if isinstance(pointer, tuple):
            signature[name] = tuple(f"*{dtype}" for dtype in pointer)
            aligned = () if name in launch.unaligned else range(len(pointer))
            attributes |= {(index, k): ALIGNED for k in aligned}
        elif name in launch.numbers:
            signature[name] = ("fp32",) * launch.numbers[name]
        elif pointer is not None:
            signature[name] = f"*{pointer}"
            if name not in launch.unaligned:
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
    """Resources of the table's cases and the sample by name, measured in parallel processes."""
    command = [sys.executable, "-m", "tests.kernels.offline", "--part"]
    running = [
        subprocess.Popen(
            [*command, f"{part}/{processes}"], stdout=subprocess.PIPE, text=True, cwd=ROOT
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
    parser.add_argument("--part", default="0/1", help="I/N: every N-th case from the I-th")
    parser.add_argument("--every", action="store_true", help="all combinations; print what spills")
    parser.add_argument("--write", action="store_true", help="rewrite the table of docs/kernels.md")
    arguments = parser.parse_args()
    if arguments.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + table(measure_all()) + END + rest.partition(END)[2])
        return
    part, parts = map(int, arguments.part.split("/"))
    chosen = combinations() if arguments.every else list(dict.fromkeys([*cases(), *sample()]))
    for case in chosen[part::parts]:
        line = {"name": case.name, "resources": measure(case)}
        if not arguments.every or line["resources"]["spilled"]:
            print(json.dumps(line), flush=True)
    if arguments.every:
        print(f"compiled {len(chosen[part::parts])} of {len(chosen)} combinations")


if __name__ == "__main__":
    main()
