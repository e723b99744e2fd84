"""`fastmerge inspect`: numbers against fp64, warnings, tables and files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from fastmerge.cli import app
from fastmerge.inspect_command import short_names
from fastmerge.jobs import inspection
from fastmerge.jobs.inspection import inspect_models
from fastmerge.jobs.models import open_models
from fastmerge.jobs.recipe import ModelName

from .tiny_models import tensors_of, write_model


@pytest.fixture
def models(tmp_path, monkeypatch):
    """base, three experts near it (c with half of it unchanged), far, which is ten times as far.

    All values are on a grid, so that differences, products and their sums are exact.
    """
    monkeypatch.chdir(tmp_path)
    base = {n: (8 * t).round() / 8 for n, t in tensors_of(0).items()}
    write_model(tmp_path / "base", base)
    for seed, (name, size) in enumerate({"a": 1, "b": 1, "c": 1, "far": 10}.items(), 1):
        moved = {n: base[n] + size * (2 * t).round() / 8 for n, t in tensors_of(seed).items()}
        if name == "c":
            for n, t in moved.items():
                t[: len(t) // 2] = base[n][: len(t) // 2]
        write_model(tmp_path / name, moved)
    return tmp_path


def _inspect(*names):
    keys = [ModelName(name) for name in names]
    folders = {name: Path(name) for name in names}
    opened = open_models(keys, folders, keys[0])
    return inspect_models(opened[keys[0]], [opened[key] for key in keys[1:]])


def _truth(*names):
    """Task vectors of all tensors, flattened, in fp64: [K, N], and the base."""
    stored = [load_file(f"{name}/model.safetensors") for name in names]
    flat = [torch.cat([t[n].double().flatten() for n in stored[0]]) for t in stored]
    return torch.stack(flat[1:]) - flat[0], flat[0]


@pytest.mark.parametrize("block", [1 << 20, 7])
def test_numbers_against_fp64(models, monkeypatch, block):
    monkeypatch.setattr(inspection, "BLOCK_ENTRIES", block)
    found = _inspect("base", "a", "b", "c")
    vectors, base = _truth("base", "a", "b", "c")
    products = vectors @ vectors.T
    assert torch.equal(found.total.products, products)
    norms = products.diagonal().sqrt()
    assert found.total.norms() == norms.tolist()
    assert torch.equal(found.total.cosines(), products / torch.outer(norms, norms))
    assert found.total.relative_norms() == [n / math.sqrt(base @ base) for n in norms.tolist()]
    pairs = [(i, j) for i in range(3) for j in range(3)]
    opposed = [int((vectors[i] * vectors[j] < 0).sum()) for i, j in pairs]
    assert found.total.opposed.flatten().tolist() == opposed
    both = [int(((vectors[i] != 0) & (vectors[j] != 0)).sum()) for i, j in pairs]
    assert found.total.both.flatten().tolist() == both
    torn = ((vectors > 0).any(0) & (vectors < 0).any(0)).sum()
    assert found.total.torn == int(torn) and found.total.entries == vectors.shape[1]
    assert found.total.conflict() == int(torn) / vectors.shape[1]


def test_layers_and_tensors_add_up(models):
    found = _inspect("base", "a", "b")
    assert len(found.tensors) == 12
    (layers,) = found.layers.values()
    outside = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    parts = [*layers, *(found.tensors[name] for name in outside)]
    assert sum(part.entries for part in parts) == found.total.entries
    assert sum(part.torn for part in parts) == found.total.torn
    assert torch.equal(sum(part.products for part in parts), found.total.products)


def test_unlike_norms_and_copies_are_warned_of(models):
    found = _inspect("base", "a", "b", "far")
    (warning,) = found.warnings
    assert warning.startswith("the task vector of far is ") and "outweighs them" in warning
    assert 9 < float(warning.split(" is ")[1].split()[0]) < 11
    write_model(models / "same", load_file("base/model.safetensors"))
    assert _inspect("base", "same", "a", "b").warnings == ["same equals the base model"]
    copy = load_file("a/model.safetensors")
    write_model(models / "copy", copy)
    assert "a and copy have nearly the same task vector" in _inspect("base", "a", "copy").warnings
    assert not _inspect("base", "a", "b").warnings


def test_what_cannot_be_compared_is_told(models):
    tensors = load_file("a/model.safetensors")
    tensors["lm_head.weight"] = torch.ones(13, 8)
    tensors["model.norm.weight"][0] = math.nan
    tensors["model.embed_tokens.weight"] = torch.ones(1)
    write_model(models / "odd", tensors)
    found = _inspect("base", "odd")
    assert found.skipped == {
        "lm_head.weight": "has shape [13, 8] in odd, [12, 8] in base",
        "model.embed_tokens.weight": "has shape [1] in odd, [12, 8] in base",
        "model.norm.weight": "has NaN or Inf entries",
    }
    (warning,) = found.warnings
    assert "not compared: tensor 'lm_head.weight'" in warning and "(3 such tensors)" in warning


def test_the_command_prints_tables_and_writes_files(models):
    arguments = ["inspect", "base", "a", "b", "far", "--json", "i.json", "--plot", "p/i.png"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.exception
    for text in ("cos far", "signs conflict in", "layers model.layers.N", "warning: the task vec"):
        assert text in result.stdout
    found = json.loads((models / "i.json").read_text())
    assert found["experts"] == ["a", "b", "far"] and len(found["tensors"]) == 12
    assert found["total"]["norms"] == _inspect("base", "a", "b", "far").total.norms()
    assert (models / "p" / "i.png").read_bytes().startswith(b"\x89PNG")


def test_one_expert_has_no_pairs(models):
    result = CliRunner().invoke(
        app, ["inspect", "base", "a", "--json", "i.json", "--plot", "i.png"]
    )
    assert result.exit_code == 0, result.exception
    total = json.loads((models / "i.json").read_text())["total"]
    assert len(total["cosines"]) == len(total["norms"]) == 1 and total["sign_conflict"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["base", "gone"], "gone: no such folder"), (["base", "a", "a"], "one is given twice")],
)
def test_refusals(models, arguments, message):
    result = CliRunner().invoke(app, ["inspect", *arguments])
    assert isinstance(result.exception, ValueError) and message in str(result.exception)


def test_the_folder_of_the_numbers_is_made(models):
    result = CliRunner().invoke(app, ["inspect", "base", "a", "--json", "new/i.json"])
    assert result.exit_code == 0, result.exception
    assert json.loads((models / "new" / "i.json").read_text())["experts"] == ["a"]


def test_labels_are_short_unless_they_repeat():
    assert short_names(["x/a", "y/b/"]) == ["a", "b"]
    assert short_names(["x/a", "y/a"]) == ["x/a", "y/a"]
