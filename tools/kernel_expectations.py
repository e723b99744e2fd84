"""Writes what the cost model expects of each GPU kernel into docs/kernels.md.

From the top folder: python -m tools.kernel_expectations
"""

from __future__ import annotations

from pathlib import Path

from fastmerge.ops._strategy import LAUNCH_SECONDS, Problem, Rates, expected_seconds

PAGE = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"
BEGIN, END = "<!-- expectations: begin -->\n", "<!-- expectations: end -->"
# Measured rates of an H200: a copy, and bf16 products of vendor GEMMs (790 TFLOP/s).
H200 = Rates(bandwidth=4.3e12, multiply_adds=395e12, cache=50 << 20)
BF16, SIDE, COUNT = 2, 4096, 8


def _streaming(kernel: str, case: str, entries: int, streams: int, item: int = BF16) -> str:
    """A kernel that waits for memory: the time of its bytes, and no ratio to expect but 1."""
    seconds = streams * entries * item / H200.bandwidth + LAUNCH_SECONDS
    return f"| `{kernel}` | {case} | {seconds * 1e6:.1f} | {streams} streams at copy speed | - |"


def _linear(rows: int, side: int = SIDE, count: int = COUNT, by_row: bool = False) -> list[str]:
    problem = Problem(rows, side * side, count, BF16, BF16, BF16, rows if by_row else None)
    gemm = max(rows / H200.multiply_adds, BF16 / H200.bandwidth) * side * side + LAUNCH_SECONDS
    floor = (count + 1) * side * side * BF16 / H200.bandwidth
    kernels = {
        "panel": "`weighted_sum`, GEMM",
        "fused": "`merged_linear`",
        "stacked": "`row_linear`",
    }
    estimates = expected_seconds(problem, H200)
    expected = {name: estimates[name] for name in kernels if name in estimates}
    lines = []
    for strategy, seconds in expected.items():
        picked = ", picked" if seconds == min(expected.values()) and len(expected) > 1 else ""
        lines.append(
            f"| {kernels[strategy]} | {strategy}{picked}: {rows} rows, {side}², K = {count} "
            f"| {seconds * 1e6:.1f} | {seconds / gemm:.2f} x the GEMM "
            f"| {floor / seconds:.2f} of one read |"
        )
    return lines


def _coefficient_grad(rows: int) -> str:
    gemm = rows * SIDE * SIDE / H200.multiply_adds + LAUNCH_SECONDS
    read = (COUNT + 1) * SIDE * SIDE * BF16 / H200.bandwidth
    return (
        f"| `linear_coefficient_grad` | {rows} rows, {SIDE}², K = {COUNT} "
        f"| {(gemm + read) * 1e6:.1f} | {(gemm + read) / gemm:.2f} x the dW GEMM "
        f"| {read / (gemm + read):.2f} of one read |"
    )


def table() -> str:
    """The table between the page's two marks."""
    entries = 1 << 28
    lines = [
        "| kernel | bf16 case | expected µs | over | bandwidth |",
        "|---|---|---|---|---|",
        *_linear(8192),
        *(line for rows in (1, 16, 256) for line in _linear(rows)),
        *_linear(3200, 768),
        *_linear(16448, 1024),
        *_linear(256, by_row=True),
        _coefficient_grad(8192),
        _streaming("weighted_sum", "2²⁸ entries, K = 8", entries, COUNT + 2),
        _streaming("coefficient_grad", "2²⁸ entries, K = 8", entries, COUNT + 2),
        _streaming("combine_and_dot", "2²⁸ entries, K = 8", entries, COUNT + 3),
        _streaming("magnitude_histogram", "2²⁸ entries, one delta", entries, 1),
        _streaming("ties_merge", "2²⁸ entries, K = 8, with base", entries, COUNT + 2),
        _streaming("softmax_entropy", "64 x 50 257 logits, forward", 64 * 50257, 1),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    page = before + BEGIN + table() + END + rest.partition(END)[2]
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
