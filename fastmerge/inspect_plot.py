"""The picture of `fastmerge inspect`: cosines, norms and sign conflicts, over all and by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .jobs.inspection import Inspection, Measure
from .report import load_pyplot, save_figure

_COLORS = (
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#222255",
)  # fmt: skip
_NUMBERED = 10  # matrices up to so many experts show their values


def plot_inspection(found: Inspection, labels: Sequence[str], path: str | Path) -> Path:
    """One row over all tensors, then one row for each stack of layers.

    Args:
        found: what was measured.
        labels: the experts' names.
        path: PNG file to write.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    pyplot = load_pyplot()
    stacks = {stack: measures for stack, measures in found.layers.items() if measures}
    height = len(stacks) + 1
    figure, axes = pyplot.subplots(
        height, 3, figsize=(13, 3.7 * height), layout="constrained", squeeze=False
    )
    matrix = found.total.cosines()
    _matrix(figure, axes[0][0], matrix, labels, "cosines of the task vectors", True)
    conflicts = found.total.conflicts()
    _matrix(figure, axes[0][1], conflicts, labels, "opposite signs, of entries both change", False)
    _bars(axes[0][2], found.total.relative_norms(), labels)
    for row, (stack, measures) in zip(axes[1:], stacks.items(), strict=True):
        _layers(row, stack, measures, labels)
    return save_figure(figure, path)


def _matrix(
    figure: Any, axis: Any, values: Tensor, labels: Sequence[str], title: str, signed: bool
) -> None:
    cells = values.numpy().copy()
    np.fill_diagonal(cells, np.nan)
    low, colors = (-1.0, "RdBu_r") if signed else (0.0, "viridis")
    image = axis.imshow(cells, interpolation="nearest", cmap=colors, vmin=low, vmax=1.0)
    places = range(len(labels))
    axis.set_xticks(places, labels, fontsize=7, rotation=30, ha="right")
    axis.set_yticks(places, labels, fontsize=7)
    axis.tick_params(length=0)
    axis.set_title(title, fontsize=10)
    if len(labels) <= _NUMBERED:
        for i, j in np.argwhere(np.isfinite(cells)):
            dark = abs(cells[i, j]) > 0.6 if signed else cells[i, j] < 0.5
            color = "white" if dark else "black"
            axis.text(j, i, f"{cells[i, j]:.2f}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, ax=axis, shrink=0.85).ax.tick_params(labelsize=7)


def _bars(axis: Any, norms: Sequence[float], labels: Sequence[str]) -> None:
    axis.barh(range(len(labels)), norms, color=[_color(k) for k in range(len(labels))])
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.invert_yaxis()
    axis.set_title("norm of the task vector / norm of the base model", fontsize=10)
    _tidy(axis)


def _layers(row: Any, stack: str, measures: Sequence[Measure], labels: Sequence[str]) -> None:
    layers = range(len(measures))
    norms, cosines, conflict = row
    for k, label in enumerate(labels):
        values = [measure.relative_norms()[k] for measure in measures]
        norms.plot(layers, values, color=_color(k), marker="o", markersize=3, label=label)
    norms.set_ylim(bottom=0)
    norms.set_title(f"{stack}N: norm / norm of the base model", fontsize=10)
    norms.legend(fontsize=7, frameon=False)
    if len(labels) > 1:
        pairs = np.triu_indices(len(labels), 1)
        spread = np.array([measure.cosines().numpy()[pairs] for measure in measures])
        cosines.fill_between(
            layers, spread.min(1), spread.max(1), color=_COLORS[0], alpha=0.2,
            label="lowest to highest pair",
        )  # fmt: skip
        cosines.plot(
            layers, spread.mean(1), color=_COLORS[0], marker="o", markersize=3, label="mean"
        )
        cosines.axhline(0, color="black", linewidth=0.6)
        cosines.legend(fontsize=7, frameon=False)
        shares = [100 * measure.conflict() for measure in measures]
        conflict.plot(layers, shares, color=_COLORS[1], marker="o", markersize=3)
        conflict.set_ylim(0, 100)
    cosines.set_title(f"{stack}N: cosines of the task vectors", fontsize=10)
    conflict.set_title(f"{stack}N: entries with sign conflicts, %", fontsize=10)
    for axis in row:
        axis.set_xlabel("layer", fontsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
        _tidy(axis)


def _color(k: int) -> str:
    return _COLORS[k % len(_COLORS)]


def _tidy(axis: Any) -> None:
    axis.grid(alpha=0.25)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
