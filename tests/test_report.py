"""Report: tables say what the rows say, coefficients land in the right cell, plots are written."""

from __future__ import annotations

import struct

import pytest
import torch
from rich.console import Console

from fastmerge import report

ROWS = [
    {
        "method": method,
        "protocol": protocol,
        "accuracy": {"red": red, "blue": blue},
        "average": (red + blue) / 2,
        "seconds": 1.25,
        "peak_mib": 812.4,
        **more,
    }
    for method, protocol, red, blue, more in (
        ("pretrained", "strict", 50.0, 40.0, {}),
        ("task_arithmetic_tuned", "strict", 71.25, 62.0, {"scaling": 0.4}),
        ("adamerging_layer", "strict", 81.0, 70.0, {}),
        ("adamerging_layer", "paper", 83.0, 74.0, {}),
    )
]


def _text(table) -> str:
    console = Console(width=140)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def _png_size(path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_table_shows_every_number_with_its_row():
    text = _text(report.accuracy_table(ROWS, "a title"))
    line = next(line for line in text.splitlines() if "tuned" in line)
    assert line.split() == ["task", "arithmetic,", "tuned", "(λ", "0.4)", "strict",
                            "71.2", "62.0", "66.6", "1.2", "812"]  # fmt: skip
    assert "a title" in text


def test_table_has_a_protocol_column_only_where_protocols_differ():
    assert "protocol" in _text(report.accuracy_table(ROWS))
    assert "protocol" not in _text(report.accuracy_table(ROWS[:3]))


def test_standard_error_is_the_binomial_one():
    row = {"accuracy": {"red": 50.0, "blue": 90.0}}
    assert report.standard_error(row, 100) == pytest.approx((25 + 9) ** 0.5 / 2)


def test_spread_is_taken_over_the_seeds_of_one_method_and_protocol():
    rows = [{**ROWS[2], "average": value} for value in (80.0, 82.0, 84.0)] + [ROWS[3]]
    first, second = report.spread(rows)
    assert first == {"method": "adamerging_layer", "protocol": "strict", "mean": 82.0,
                     "spread": 2.0, "lowest": 80.0, "highest": 84.0, "seeds": 3}  # fmt: skip
    assert (second["protocol"], second["mean"], second["spread"]) == ("paper", 78.5, 0.0)
    assert "82.0" in _text(report.spread_table([first, second]))


def test_coefficients_land_by_kind_and_block():
    names = ["enc.0.a.weight", "enc.0.a.bias", "enc.2.a.weight", "pool.weight"]
    values = torch.arange(8.0).reshape(4, 2).numpy()
    grid, kinds, blocks = report.coefficient_grid(values, names)
    assert kinds == ["a.weight", "a.bias", "pool.weight"] and blocks == [-1, 0, 2]
    assert grid.shape == (2, 3, 3)
    assert grid[1].tolist()[0][1:] == [1.0, 5.0]
    assert grid[0, 1, 1] == 2.0 and grid[0, 2, 0] == 6.0
    assert (grid == grid).sum() == 8  # all other cells are NaN


def test_heat_map_is_a_picture_and_checks_its_shape(tmp_path):
    names = [f"layer.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")]
    matrix = torch.linspace(-0.2, 1, 12).reshape(6, 2)
    path = report.heat_map(matrix, names, ["red", "blue"], tmp_path / "deep" / "map.png")
    assert min(_png_size(path)) > 100
    with pytest.raises(ValueError, match=r"shape \[6, 2\], expected \[6, 3\]"):
        report.heat_map(matrix, names, ["red", "blue", "green"], path)


def test_curves_and_bars_are_pictures(tmp_path):
    curve = report.Curve(
        "a run",
        {"red": [1.0, 0.5, 0.4], "blue": [0.7, 0.7, 0.6]},
        [(0, {"red": 50.0, "blue": 40.0}), (3, {"red": 60.0, "blue": 44.0})],
    )
    width, height = _png_size(report.learning_curves([curve, curve], tmp_path / "curves.png"))
    assert width > height > 300
    width, height = _png_size(report.bar_chart(ROWS, tmp_path / "bars.png", "title"))
    assert width > height > 300


def test_smoothing_averages_over_the_window_behind():
    assert report._smooth([3.0, 1.0, 2.0, 6.0], window=2) == [3.0, 2.0, 1.5, 4.0]
