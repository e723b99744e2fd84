"""Dynamic models: building, selecting tasks, folding, saving, loading; EMR-Merging."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.func import functional_call

import fastmerge as fm
from fastmerge.modules.fingerprint import fingerprint

from .attached import Net
from .layouts import LAYOUTS, outputs
from .plain import make_experts


def _net(count=3, dtype=torch.float64):
    torch.manual_seed(0)
    net = Net().to(dtype)
    experts = {f"t{k}": e for k, e in enumerate(make_experts(net, count, scale=0.3))}
    return net, experts, torch.randn(5, 6, dtype=dtype)


def _oracle(base, experts, rescale="global", cancelled="negative"):
    """EMR-Merging written out: {task: state dict}, lambda, masks."""
    taus = {n: torch.stack([e[n] - base[n] for e in experts]) for n in base}
    unified, masks = {}, {}
    for name, tau in taus.items():
        sign = torch.where(tau.sum(0) > 0, 1.0, 0.0 if cancelled == "zero" else -1.0)
        sign = torch.where(tau.sum(0) < 0, -1.0, sign)
        agree = torch.where(tau * sign > 0, tau.abs(), 0)
        unified[name] = sign * agree.max(0).values
        masks[name] = tau * sign > 0
    mean = rescale == "tensor_mean"
    scales = []
    for k in range(len(experts)):
        pairs = [(taus[n][k].abs(), (masks[n][k] * unified[n]).abs()) for n in base]
        sums = [[x.mean() if mean else x.sum() for x in pair] for pair in pairs]
        whole, kept = (sum(column) for column in zip(*sums, strict=True))
        scales.append(whole / kept if rescale != "none" else torch.tensor(1.0))
    folded = [
        {n: base[n] + scales[k] * masks[n][k] * unified[n] for n in base}
        for k in range(len(experts))
    ]
    return folded, torch.stack(scales), masks


@pytest.mark.parametrize("rescale", ["global", "tensor_mean", "none"])
@pytest.mark.parametrize("cancelled", ["negative", "zero"])
def test_emr_against_its_formulas(rescale, cancelled):
    net, experts, x = _net()
    with torch.no_grad():  # entries that cancel
        for parameter, other in zip(experts["t0"].parameters(), net.parameters(), strict=True):
            parameter.copy_((other * 8).round() / 8 + 0.25)
        for k, shift in ((1, 0.5), (2, -0.75)):
            for p, q in zip(experts[f"t{k}"].parameters(), net.parameters(), strict=True):
                p.copy_((q * 8).round() / 8 + shift * (torch.rand_like(q) > 0.3))
        for q in net.parameters():
            q.copy_((q * 8).round() / 8)
    states = [e.state_dict() for e in experts.values()]
    folded, scales, masks = _oracle(net.state_dict(), states, rescale, cancelled)
    dynamic = fm.build(net, experts, method="emr", rescale=rescale, cancelled=cancelled)
    torch.testing.assert_close(dynamic.scales.double(), scales.double(), rtol=1e-6, atol=0)
    assert dynamic.bits().tolist() == [
        sum(int(m[k].sum()) for m in masks.values()) for k in range(3)
    ]
    for k, name in enumerate(experts):
        found = fm.fold(dynamic, name)
        assert found.keys() == folded[k].keys()
        for key, value in found.items():
            torch.testing.assert_close(value, folded[k][key].double(), rtol=1e-6, atol=1e-6)
        with fm.task(dynamic, name):
            torch.testing.assert_close(dynamic(x), functional_call(net, found, (x,)))


def test_one_expert_is_itself():
    net, experts, _ = _net(1)
    dynamic = fm.build(net, experts, method="emr")
    assert dynamic.scales.item() == 1
    for name, value in fm.fold(dynamic, 0).items():
        torch.testing.assert_close(value, experts["t0"].state_dict()[name], rtol=0, atol=1e-15)


def test_identical_experts_are_themselves():
    net, experts, _ = _net(1)
    dynamic = fm.build(net, [experts["t0"]] * 4, method="emr", rescale="tensor_mean")
    for task in range(4):
        for name, value in fm.fold(dynamic, task).items():
            torch.testing.assert_close(value, experts["t0"].state_dict()[name], rtol=0, atol=1e-15)


def test_an_expert_that_is_the_base():
    net, experts, _ = _net()
    dynamic = fm.build(net, experts | {"none": net}, method="emr")
    assert all(torch.equal(v, net.state_dict()[n]) for n, v in fm.fold(dynamic, "none").items())


@pytest.mark.parametrize("layout", ["clip", "bert", "open_clip"])
def test_mixed_batches_equal_one_task_at_a_time(layout):
    torch.manual_seed(1)
    model, inputs, _ = LAYOUTS[layout]()
    dynamic = fm.build(model, make_experts(model, 4), method="emr")
    ids = [2, 0, 3]
    with fm.task(dynamic, ids):
        mixed = outputs(dynamic(**inputs))
    for b, task in enumerate(ids):
        one = {name: value[b : b + 1] for name, value in inputs.items()}
        folded = fm.fold(dynamic, task)
        with fm.task(dynamic, task):
            alone = outputs(dynamic(**one))
        plain = outputs(functional_call(model, folded, (), one))
        for y, z, w in zip(mixed, alone, plain, strict=True):
            torch.testing.assert_close(z, w, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(y[b : b + 1].view_as(z), z, rtol=1e-9, atol=1e-11)


def test_the_model_is_left_as_it_is():
    net, experts, _ = _net()
    before = copy.deepcopy(net.state_dict())
    dynamic = fm.build(net, experts, method="emr")
    assert all(isinstance(p, nn.Parameter) for p in net.parameters())
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    bases = {n: p.base.data_ptr() for n, p in dynamic.model.named_parameters()}
    assert bases == {n: p.data_ptr() for n, p in net.named_parameters()}  # shared, not copied


@pytest.mark.parametrize(
    "ids", [["t2", "t0", "t1", "t1", "t0"], [2, 0, 1, 1, 0], torch.tensor([2, 0, 1, 1, 0])]
)
def test_ids_of_every_sample(ids):
    net, experts, x = _net()
    dynamic = fm.build(net, experts, method="emr")
    with fm.task(dynamic, ids):
        mixed = dynamic(x)
        with fm.task(dynamic, "t1"):
            inner = dynamic(x)
        assert torch.equal(dynamic(x), mixed)
    torch.testing.assert_close(mixed[2:4], inner[2:4])
    with pytest.raises(RuntimeError, match="no coefficients are set"):
        dynamic(x)


def test_switching_writes_nothing():
    net, experts, x = _net()
    dynamic = fm.build(net, experts, method="emr")
    kept = {id(t): t._version for p in dynamic.model.parameters() for t in (p.base, p.deltas.masks)}
    for task in experts:
        with fm.task(dynamic, task):
            dynamic(x)
    after = {
        id(t): t._version for p in dynamic.model.parameters() for t in (p.base, p.deltas.masks)
    }
    assert kept == after


@pytest.mark.parametrize("method", ["emr", "tall"])
def test_save_and_load(tmp_path, method):
    net, experts, x = _net(dtype=torch.float32)
    dynamic = fm.build(net, experts, method=method)
    fm.save(dynamic, tmp_path / "saved")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved"]
    loaded = fm.load(tmp_path / "saved", copy.deepcopy(net))
    assert loaded.tasks == dynamic.tasks and type(loaded) is type(dynamic)
    for model in (dynamic, loaded):
        model.eval()
    with fm.task(dynamic, [0, 1, 2, 0, 1]), fm.task(loaded, [0, 1, 2, 0, 1]):
        assert torch.equal(dynamic(x), loaded(x))
    fm.save(loaded, tmp_path / "again")
    for name in ("model.safetensors", "dynamic.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()
    with pytest.raises(FileExistsError):
        fm.save(dynamic, tmp_path / "again")
    fm.save(dynamic, tmp_path / "again", overwrite=True)


def test_one_bit_an_entry_a_task(tmp_path):
    net = nn.Linear(256, 512)
    sizes = []
    for count in (2, 10):
        fm.save(fm.build(net, make_experts(net, count), method="emr"), tmp_path / f"{count}")
        sizes.append(sum(p.stat().st_size for p in (tmp_path / f"{count}").iterdir()))
    entries = sum(p.numel() for p in net.parameters())
    assert 0 <= sizes[1] - sizes[0] - 8 * entries / 8 < 300  # names and scales of eight tasks
    assert sizes[0] - 4 * entries - 2 * entries / 8 < 2000  # the unified task vector, two masks


def _rewrite(path, **changes):
    about = json.loads(path.read_text())
    path.write_text(json.dumps(about | changes))


def test_a_damaged_folder(tmp_path):
    net, experts, _ = _net()
    fm.save(fm.build(net, experts, method="emr"), tmp_path / "saved")
    good = {p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()}
    weights, about = (tmp_path / "saved" / name for name in ("model.safetensors", "dynamic.json"))
    damages = [
        (lambda: weights.write_bytes(good[weights.name][:-5]), "cannot be read"),
        (lambda: weights.write_bytes(good[weights.name][:-1] + b"\x7f"), "damaged"),
        (lambda: weights.unlink(), "no such file"),
        (lambda: about.write_text("{"), "dynamic.json"),
        (lambda: _rewrite(about, format="other"), "format 'other'"),
        (lambda: _rewrite(about, config=None), "config is None"),
        (lambda: _rewrite(about, config={"tasks": ["a", "b", "c"]}), "damaged"),
        (lambda: _rewrite(about, method="none"), "unknown dynamic method 'none'"),
    ]
    for damage, message in damages:
        damage()
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            fm.load(tmp_path / "saved", net)
        weights.write_bytes(good[weights.name])
        about.write_bytes(good[about.name])
    fm.load(tmp_path / "saved", net)


def test_masks_of_another_base_model(tmp_path):
    net, experts, _ = _net()
    fm.save(fm.build(net, experts, method="emr"), tmp_path / "saved")
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.up.weight[0, 0] += 1e-9
    with pytest.raises(ValueError, match="another base model"):
        fm.load(tmp_path / "saved", other)
    with pytest.raises(ValueError, match="another base model"):
        fm.load(tmp_path / "saved", copy.deepcopy(net).float())
    assert fingerprint({"a": torch.zeros(2)}) != fingerprint({"b": torch.zeros(2)})
    assert fingerprint({"a": torch.zeros(2)}) != fingerprint({"a": torch.zeros(1, 2)})
    assert fingerprint({"a": torch.zeros(2)}) != fingerprint({"a": torch.zeros(4).half()})


@pytest.mark.parametrize(
    "ids, error, message",
    [
        ("t9", ValueError, "unknown task 't9'"),
        (3, ValueError, r"task index 3 is not in 0\.\.2"),
        (-1, ValueError, "task index -1"),
        ([0, "no"], ValueError, "unknown task 'no'"),
        (torch.tensor([0, 5]), ValueError, "task index 5"),
        (torch.tensor([0.0]), TypeError, "float32"),
        (torch.zeros(2, 2).long(), TypeError, r"\[2, 2\]"),
        ([], ValueError, "empty"),
        (None, TypeError, "NoneType"),
        ([True], TypeError, "bool"),
        ([0, 1, 2], ValueError, "3 task ids for a batch of 5"),
        ([0], ValueError, "1 task ids for a batch of 5"),
    ],
)
def test_wrong_ids(ids, error, message):
    net, experts, x = _net()
    dynamic = fm.build(net, experts, method="emr")
    with pytest.raises(error, match=message), fm.task(dynamic, ids):
        dynamic(x)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"method": "erm"}, ValueError, "unknown dynamic method 'erm'"),
        ({"method": "emr", "rescal": "none"}, TypeError, "did you mean 'rescale'"),
        ({"method": "emr", "rescale": "l2"}, ValueError, "rescale must be one of"),
        ({"method": "emr", "cancelled": "up"}, ValueError, "cancelled must be"),
        ({"method": "emr", "exclude": "nothing*"}, ValueError, "no tensor name matches"),
        ({"method": "tall", "threshold": [0.1]}, ValueError, "1 values for 3 experts"),
    ],
)
def test_wrong_options(arguments, error, message):
    net, experts, _ = _net()
    with pytest.raises(error, match=message):
        fm.build(net, experts, **arguments)
    assert all(isinstance(p, nn.Parameter) for p in net.parameters())


def test_wrong_models():
    net, experts, _ = _net()
    with pytest.raises(ValueError, match="experts is empty"):
        fm.build(net, [], method="emr")
    with pytest.raises(ValueError, match="missing"):
        fm.build(net, [{"up.weight": net.up.weight.detach()}], method="emr")
    dynamic = fm.build(net, experts, method="emr")
    with pytest.raises(ValueError, match=r"merged weights? already"):
        fm.build(dynamic.model, experts, method="emr")
    with pytest.raises(TypeError, match=r"expected a model of fastmerge\.build"):
        fm.task(net, 0)
    with pytest.raises(ValueError, match="unknown task"):
        fm.fold(dynamic, "t7")
    direct = type(dynamic).build(net, experts)
    with pytest.raises(ValueError, match=r"save needs a model of fastmerge\.build"):
        fm.save(direct, "nowhere")


def test_running_statistics_are_the_experts_mean(tmp_path):
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    experts = make_experts(net, 2)
    for k, expert in enumerate(experts):
        expert[1].running_mean.fill_(k + 1.0)
    dynamic = fm.build(net, experts, method="emr")
    assert fm.fold(dynamic, 0)["1.running_mean"].tolist() == [1.5] * 3
    assert net[1].running_mean.tolist() == [0] * 3
    fm.save(dynamic, tmp_path / "saved")
    assert fm.fold(fm.load(tmp_path / "saved", net), 1)["1.running_mean"].tolist() == [1.5] * 3


def test_compile():
    net, experts, x = _net()
    dynamic = fm.build(net, experts, method="emr").eval()
    torch._dynamo.reset()
    compiled = torch.compile(dynamic, fullgraph=True, backend="aot_eager")
    for step, ids in enumerate(([0, 1, 2, 0, 1], [2, 2, 1, 0, 0])):
        with fm.task(dynamic, ids), torch._dynamo.config.patch(error_on_recompile=step > 0):
            torch.testing.assert_close(compiled(x), dynamic(x))
