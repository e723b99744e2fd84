"""The coverage report: which way each tensor went, and how many bytes were built at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastmerge as fm
from fastmerge import _native
from fastmerge.ops import _panel

from .layouts import IDS, LAYOUTS, outputs
from .plain import make_experts


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.wide = nn.Linear(16, 512)
        self.norm = nn.LayerNorm(512)
        self.proj = nn.Parameter(torch.randn(512, 24))
        self.idle = nn.Linear(3, 3)

    def forward(self, ids):
        return self.norm(self.wide(self.embed(ids))) @ self.proj


IDS_OF = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.mark.skipif(not _native.available(), reason=_native.unavailable_reason() or "built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_scratch_that_was_used(monkeypatch, dtype):
    monkeypatch.setattr(_panel, "CPU_PANEL_BYTES", 8192)
    _panel._scratch.__dict__.clear()
    torch.manual_seed(0)
    model = _Net().to(dtype)
    fm.attach(model, make_experts(model, 3))
    model(IDS_OF).sum().backward()
    report = fm.coverage(model)
    found = {name: (uses, size) for name, uses, size in report}
    item = dtype.itemsize
    buffers = sum(b.numel() * b.element_size() for b in _panel._scratch.__dict__.values())
    assert report.scratch == buffers
    assert buffers < 512 * 24 * item * 2
    assert found["proj"][0] == {"merged_linear": 1} and 0 < found["proj"][1] <= buffers
    assert found["embed.weight"] == ({"rows": 1}, 6 * 16 * item * (1 + 3 + 1))
    assert found["norm.weight"] == ({"built": 1}, 512 * item)
    assert found["idle.weight"] == ({}, 0)
    assert report.copies == (512 + 512 + 512) * item  # norm.weight, norm.bias, wide.bias
    assert report.at_once == report.copies + report.scratch
    assert report.weights == sum(p.numel() for p in model.parameters()) * item


def test_reference_builds_whole_weights():
    torch.manual_seed(0)
    model = _Net()
    fm.attach(model, make_experts(model, 3))
    with fm.use_backend("reference"):
        model(IDS_OF)
        report = fm.coverage(model)
    assert {n: s for n, _, s in report}["proj"] == 2 * 512 * 24 * 4


def test_uses_add_up_and_print():
    torch.manual_seed(0)
    model = _Net()
    fm.attach(model, make_experts(model, 2))
    assert fm.coverage(model).at_once == 0
    for _ in range(3):
        model(IDS_OF)
    model(torch.arange(40).view(2, 20))  # as many ids as rows: the whole table
    report = fm.coverage(model)
    assert report[1].name == "embed.weight" and report[1].uses == {"rows": 3, "built": 1}
    lines = str(report).splitlines()
    assert len(lines) == len(report) + 1
    assert "only the rows looked up x 3, combined copy x 1" in lines[1]
    assert lines[-2].split()[0] == "idle.bias" and "not used yet" in lines[-2]
    assert lines[-1].startswith("built at once: at most ")
    fm.detach(model)
    with pytest.raises(ValueError, match="no merged weights"):
        fm.coverage(model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_a_report(layout):
    torch.manual_seed(0)
    model, inputs, _ = LAYOUTS[layout]()
    model = model.float()
    fm.attach(model, make_experts(model, 2), granularity="chunk")
    inputs = {n: t.float() if t.is_floating_point() else t for n, t in inputs.items()}
    inputs = {"input_ids": torch.tensor(IDS)} if layout == "gpt2" else inputs
    sum(y.sum() for y in outputs(model(**inputs))).backward()
    report = fm.coverage(model)
    assert all(tensor.nbytes > 0 for tensor in report if tensor.uses)
    assert 0 < report.at_once and str(report).count("\n") == len(report)
