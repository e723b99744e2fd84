"""Coefficients: granularity, limits, files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from fastmerge.coefficients import Coefficients, load_coefficients

NAMES = ["block.0.weight", "block.0.bias", "block.1.weight"]
SHAPES = [[4, 3], [4], [2, 4]]


def _coefficients(**options) -> Coefficients:
    return Coefficients(NAMES, ["a", "b"], **({"shapes": SHAPES} | options))


@pytest.mark.parametrize(
    "granularity, groups, rows",
    [
        ("task", 1, [0, 0, 0]),
        ("layer", 3, [0, 1, 2]),
        (lambda name: name[:7], 2, [0, 0, 1]),
        ({NAMES[0]: "x", NAMES[1]: "y", NAMES[2]: "x"}, 2, [0, 1, 0]),
    ],
)
def test_granularity(granularity, groups, rows):
    coefficients = _coefficients(granularity=granularity)
    assert coefficients.raw.shape == (groups, 2) and coefficients.rows == rows
    with torch.no_grad():
        coefficients.raw.copy_(torch.rand(groups, 2))
    assert torch.equal(coefficients.matrix(), coefficients.raw.detach()[rows])
    assert torch.equal(coefficients.row(2), coefficients.raw[rows[2]])


def test_clamp_acts_in_the_forward_pass_only():
    coefficients = _coefficients(init=torch.tensor([[-0.5, 0.0], [0.4, 1.0], [1.5, 0.2]]))
    expected = torch.tensor([[0.0, 0.0], [0.4, 1.0], [1.0, 0.2]])
    assert torch.equal(coefficients.matrix(), expected)
    sum(coefficients.row(i).sum() for i in range(3)).backward()
    # zero strictly outside, passed at the boundary
    assert coefficients.raw.grad.tolist() == [[0, 1], [1, 1], [0, 1]]
    assert coefficients.raw[0, 0].item() == -0.5
    unclamped = _coefficients(init=[-2.0, 3.0], clamp=None)
    assert unclamped.matrix().tolist() == [[-2.0, 3.0]] * 3


def test_save_and_load(tmp_path):
    path = tmp_path / "coefficients.safetensors"
    saved = _coefficients(granularity=lambda n: n[:7], init=[0.1, 0.7], clamp=None)
    with torch.no_grad():
        saved.raw.add_(torch.rand(2, 2))
    saved.save(path)
    loaded = load_coefficients(path)
    assert torch.equal(loaded.raw, saved.raw) and torch.equal(loaded.matrix(), saved.matrix())
    for attribute in ("names", "experts", "groups", "rows", "clamp", "shapes", "granularity"):
        assert getattr(loaded, attribute) == getattr(saved, attribute)
    fresh = _coefficients(granularity=lambda n: n[:7], clamp=None).load(path)
    assert torch.equal(fresh.raw, saved.raw)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "other, message",
    [
        (Coefficients(NAMES[:2], ["a", "b"]), "has a row for 'block.1.weight'"),
        (Coefficients([*NAMES, "new"], ["a", "b"]), "has no row for 'new'"),
        (Coefficients(NAMES[::-1], ["a", "b"]), "row 0 belongs to"),
        (_coefficients(shapes=[[4, 3], [4], [9, 9]]), "shape .*2, 4.*expected .*9, 9"),
        (Coefficients(NAMES, ["a", "c"]), "experts are"),
        (_coefficients(granularity="task"), "granularity is 'layer'"),
        (_coefficients(clamp=None), "clamp is"),
    ],
)
def test_file_of_another_model(tmp_path, other, message):
    path = tmp_path / "coefficients.safetensors"
    _coefficients().save(path)
    before = other.raw.detach().clone()
    with pytest.raises(ValueError, match=message):
        other.load(path)
    assert torch.equal(other.raw, before)


def test_files_that_are_not_coefficients(tmp_path):
    with pytest.raises(FileNotFoundError, match="no coefficient file"):
        load_coefficients(tmp_path / "missing.safetensors")
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"\x80\x04 not a safetensors file")
    with pytest.raises(ValueError, match="not a valid coefficient file"):
        load_coefficients(garbage)
    weights = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(2)}, weights)
    with pytest.raises(ValueError, match="not a coefficient file"):
        load_coefficients(weights)
    poisoned = _coefficients()
    with torch.no_grad():
        poisoned.raw[0, 0] = float("nan")
    poisoned.save(tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="NaN"):
        load_coefficients(tmp_path / "nan.safetensors")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"granularity": "word"}, "granularity must be"),
        ({"granularity": {NAMES[0]: "x"}}, "maps no group to tensor 'block.0.bias'"),
        ({"init": [0.1, 0.2, 0.3]}, "3 values for 2 experts"),
        ({"init": torch.zeros(5, 2)}, r"shape \[5, 2\], expected \[3, 2\]"),
        ({"init": float("inf")}, "finite"),
        ({"clamp": (1.0, 0.0)}, "low < high"),
        ({"shapes": [[1]]}, "1 shapes for 3 tensors"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        _coefficients(**options)


def test_empty_and_repeated_names():
    with pytest.raises(ValueError, match="at least one expert"):
        Coefficients(NAMES, [])
    with pytest.raises(ValueError, match="at least one tensor"):
        Coefficients([], ["a"])
    with pytest.raises(ValueError, match="unique"):
        Coefficients(["x", "x"], ["a"])
