"""`merge`: kinds of models; what is merged, averaged, kept and refused; coefficients."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from torch import nn

import fastmerge as fm
from fastmerge.checking import select_names

from .plain import make_experts
from .samples import random, raw


class Net(nn.Module):
    """Tied embedding and head, batch norm, an integer and a floating-point buffer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.BatchNorm1d(6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("positions", torch.arange(4))
        self.register_buffer("table", torch.linspace(0, 1, 5))


def net_and_experts(count=3):
    torch.manual_seed(0)
    net = Net()
    experts = make_experts(net, count)
    for k, expert in enumerate(experts):
        expert.norm.running_mean += k
        expert.norm.running_var *= k + 1
        expert.norm.num_batches_tracked += 7
        expert.table += 1
    return net, experts


def state(count=3, dtype=torch.float32):
    def one(seed):
        return {
            "a.weight": random((4, 3), dtype, seed),
            "a.bias": random(4, dtype, seed + 1),
            "steps": torch.tensor(seed),
            "flag": torch.tensor([True, False]),
        }

    return one(0), [one(10 * (k + 1)) for k in range(count)]


def test_state_dict_in_state_dict_out():
    base, experts = state()
    merged = fm.merge(base, experts, "average")
    assert type(merged) is dict and list(merged) == list(base)
    expected = torch.stack([e["a.weight"] for e in experts]).mean(0)
    torch.testing.assert_close(merged["a.weight"], expected)
    assert merged["steps"] == 0 and merged["flag"].tolist() == [True, False]


def test_kind_and_metadata_of_a_module_s_state_dict_are_kept():
    net, experts = net_and_experts()
    merged = fm.merge(net.state_dict(), [e.state_dict() for e in experts], "average")
    assert type(merged) is OrderedDict and merged._metadata == net.state_dict()._metadata
    Net().load_state_dict(merged)


def test_module_in_module_out():
    net, experts = net_and_experts()
    net.embed.weight.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    merged = fm.merge(net, experts, "task_arithmetic", scaling=0.3)
    assert type(merged) is Net and merged is not net
    for name, tensor in net.state_dict().items():
        assert raw(tensor) == raw(before[name])
    expected = net.body.weight + 0.3 * sum(e.body.weight - net.body.weight for e in experts)
    torch.testing.assert_close(merged.body.weight, expected)
    assert not merged.embed.weight.requires_grad and merged.body.weight.requires_grad
    assert merged.body.weight.is_leaf and isinstance(merged.body.weight, nn.Parameter)


def test_modules_and_state_dicts_may_be_mixed():
    net, experts = net_and_experts()
    mixed = [experts[0], experts[1].state_dict(), OrderedDict(experts[2].state_dict())]
    for method in ("average", "ties"):
        a = fm.merge(net, experts, method).state_dict()
        b = fm.merge(net, mixed, method).state_dict()
        assert all(raw(a[name]) == raw(b[name]) for name in a)


def test_running_statistics_are_averaged_and_other_buffers_kept():
    net, experts = net_and_experts()
    for method in ("average", "task_arithmetic", "ties"):
        merged = fm.merge(net, experts, method)
        torch.testing.assert_close(merged.norm.running_mean, net.norm.running_mean + 1)
        torch.testing.assert_close(merged.norm.running_var, net.norm.running_var * 2)
        assert merged.norm.num_batches_tracked == 0
        assert torch.equal(merged.positions, net.positions)
        assert torch.equal(merged.table, net.table)


def test_ties_between_tensors_are_kept():
    net, experts = net_and_experts()
    merged = fm.merge(net, experts, "ties", density=0.5)
    assert merged.head.weight is merged.embed.weight
    states = fm.merge(net.state_dict(), [e.state_dict() for e in experts], "ties", density=0.5)
    assert states["head.weight"].data_ptr() == states["embed.weight"].data_ptr()
    assert raw(states["head.weight"]) != raw(net.head.weight)


def test_tied_entries_count_once():
    """A threshold over the model sees the tied tensor once, whatever it is called."""
    tied = random((30, 4), torch.float32, seed=1)
    untied = {"x": tied.clone(), "z": random(40, torch.float32, seed=2)}
    base = {"x": tied, "y": tied, "z": untied["z"]}
    expert = {"x": random((30, 4), torch.float32, seed=3), "z": random(40, torch.float32, seed=4)}
    merged = fm.merge(base, [expert], "ties", density=0.1)
    expected = fm.merge(untied, [expert], "ties", density=0.1)
    assert raw(merged["x"]) == raw(expected["x"]) and raw(merged["z"]) == raw(expected["z"])


def test_an_expert_may_have_a_tied_tensor_under_either_name():
    net, experts = net_and_experts(2)
    expected = fm.merge(net, experts, "average")
    for missing in ("head.weight", "embed.weight"):
        reduced = [{n: t for n, t in e.state_dict().items() if n != missing} for e in experts]
        merged = fm.merge(net, reduced, "average")
        assert raw(merged.head.weight) == raw(expected.head.weight)


def test_shared_running_statistics_may_have_either_name():
    shared = torch.zeros(3)
    base = {"w": torch.zeros(2), "a.running_mean": shared, "b.running_mean": shared}
    expert = {"w": torch.ones(2), "a.running_mean": torch.ones(3)}
    merged = fm.merge(base, [expert], "average")
    assert merged["a.running_mean"] is merged["b.running_mean"]
    assert merged["b.running_mean"].tolist() == [1, 1, 1]


def test_an_expert_that_untied_its_tensors_is_refused():
    net, experts = net_and_experts(2)
    broken = experts[1].state_dict()
    broken["head.weight"] = broken["head.weight"] + 1
    with pytest.raises(ValueError, match=r"expert1: .*'embed.weight' and 'head.weight' differ"):
        fm.merge(net, [experts[0], broken], "average")
    broken["head.weight"] = experts[1].embed.weight.detach().clone()
    fm.merge(net, [experts[0], broken], "average")


def test_the_result_shares_no_memory_with_its_inputs():
    base, experts = state(1)
    for method, parameters in (
        ("average", {}),
        ("task_arithmetic", {"scaling": 0.0}),
        ("ties", {"density": 1.0}),
    ):
        merged = fm.merge(base, experts, method, **parameters)
        pointers = {t.data_ptr() for model in (base, *experts) for t in model.values()}
        assert not pointers & {t.data_ptr() for t in merged.values()}
    kept = fm.merge(base, experts, "average", exclude="a.bias")
    assert kept["a.bias"].data_ptr() != base["a.bias"].data_ptr()


def test_mixed_dtypes_give_the_base_s():
    base, experts = state(3, torch.bfloat16)
    experts[0]["a.weight"] = experts[0]["a.weight"].half()
    experts[1]["a.weight"] = experts[1]["a.weight"].double()
    for method in ("average", "task_arithmetic", "ties"):
        merged = fm.merge(base, experts, method)
        assert {t.dtype for n, t in merged.items() if n.startswith("a.")} == {torch.bfloat16}
    exact = torch.stack([e["a.weight"].double() for e in experts]).mean(0)
    merged = fm.merge(base, experts, "average")
    assert torch.equal(merged["a.weight"], exact.bfloat16())


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties"])
def test_non_contiguous_tensors(method):
    base, experts = state()
    turned = [
        {n: t.t().contiguous().t() if t.dim() == 2 else t for n, t in model.items()}
        for model in (base, *experts)
    ]
    expected = fm.merge(base, experts, method)
    merged = fm.merge(turned[0], turned[1:], method)
    assert all(raw(merged[n]) == raw(expected[n]) for n in base)


def test_include_and_exclude():
    base, experts = state()
    merged = fm.merge(base, experts, "average", include="*.weight")
    assert torch.equal(merged["a.bias"], base["a.bias"])
    same = fm.merge(base, experts, "average", exclude=lambda name: name.endswith("bias"))
    assert raw(same["a.weight"]) == raw(merged["a.weight"])
    assert raw(same["a.bias"]) == raw(base["a.bias"])


def test_excluded_tensors_need_not_match():
    base, experts = state(2)
    experts[0]["a.bias"] = torch.zeros(99)
    del experts[1]["a.bias"]
    experts[1]["classifier.weight"] = torch.full((2, 2), float("nan"))
    merged = fm.merge(base, experts, "average", exclude=["a.bias", "classifier.*"])
    assert raw(merged["a.bias"]) == raw(base["a.bias"])


def test_experts_by_name_are_named_in_messages():
    base, experts = state(2)
    experts[1]["a.bias"] = torch.zeros(3)
    message = r"^svhn: tensor 'a.bias' has shape \[3\], expected \[4\] as in base$"
    with pytest.raises(ValueError, match=message):
        fm.merge(base, {"mnist": experts[0], "svhn": experts[1]}, "average")


def without(model, name):
    return {n: t for n, t in model.items() if n != name}


NAN = torch.full((4,), float("nan"))
INF = torch.tensor([0.0, float("inf"), 1, 2])

REFUSED = {
    "no expert": (lambda b, e: (b, []), ValueError, "experts is empty"),
    "missing": (
        lambda b, e: (b, [without(e, "a.bias")]),
        ValueError,
        r"expert0: tensor 'a.bias' is missing.*\(1 of 2",
    ),
    "extra": (
        lambda b, e: (b, [e | {"z": torch.zeros(1)}]),
        ValueError,
        "expert0: tensor 'z' is not in base",
    ),
    "integers": (
        lambda b, e: (b, [e | {"a.bias": torch.ones(4, dtype=int)}]),
        ValueError,
        "expert0: tensor 'a.bias' is torch.int64, expected one of float32",
    ),
    "complex": (
        lambda b, e: (b | {"a.bias": torch.ones(4, dtype=torch.complex64)}, [e]),
        ValueError,
        "base: tensor 'a.bias' is torch.complex64",
    ),
    "float8": (
        lambda b, e: (b, [e | {"a.bias": torch.ones(4).to(torch.float8_e4m3fn)}]),
        ValueError,
        "expert0: tensor 'a.bias' is torch.float8_e4m3fn",
    ),
    "nan in an expert": (
        lambda b, e: (b, [e | {"a.bias": NAN}]),
        ValueError,
        "expert0: tensor 'a.bias' has 4 NaN or Inf entries of 4",
    ),
    "inf in the base": (
        lambda b, e: (b | {"a.bias": INF}, [e]),
        ValueError,
        "base: tensor 'a.bias' has 1 NaN or Inf entries of 4",
    ),
    "meta": (
        lambda b, e: (b, [e | {"a.bias": torch.ones(4, device="meta")}]),
        ValueError,
        "expert0: tensor 'a.bias' is on (the )?meta",
    ),
    "meta base": (
        lambda b, e: (b | {"a.bias": torch.ones(4, device="meta")}, [e]),
        ValueError,
        "base: tensor 'a.bias' is on the meta device",
    ),
    "sparse": (
        lambda b, e: (b, [e | {"a.bias": torch.ones(4).to_sparse()}]),
        ValueError,
        "expert0: tensor 'a.bias' is sparse",
    ),
    "no tensor": (
        lambda b, e: (b | {"epoch": 3}, [e]),
        TypeError,
        "base: entry 'epoch' is int, expected a tensor",
    ),
    "one state dict": (lambda b, e: (b, e), TypeError, "got one state dict; pass a list"),
    "a path": (lambda b, e: ("model.bin", [e]), ValueError, "checkpoint folders need out"),
    "an expert's path": (
        lambda b, e: (b, ["model.bin"]),
        ValueError,
        "a pickle, which can run any code",
    ),
    "a string": (lambda b, e: (b, "models"), TypeError, "experts: expected a list"),
    "nothing to merge": (
        lambda b, e: ({"steps": torch.tensor(1)}, [{}]),
        ValueError,
        "no tensor is selected",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_computed(case, monkeypatch):
    base, experts = state(1)
    build, error, message = REFUSED[case]

    def computed(*args):
        raise AssertionError("computed something before all checks were done")

    for method in fm.methods.METHODS.values():
        monkeypatch.setattr(method, "combine", computed)
    with pytest.raises(error, match=message):
        fm.merge(*build(base, experts[0]), "ties")


def test_nonfinite_values_can_be_allowed():
    base, experts = state(2)
    experts[0]["a.bias"] = INF
    merged = fm.merge(base, experts, "task_arithmetic", allow_nonfinite=True)
    assert torch.isfinite(merged["a.bias"]).tolist() == [True, False, True, True]
    experts[0]["a.bias"] = NAN
    assert fm.merge(base, experts, "average", allow_nonfinite=True)["a.bias"].isnan().all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "give either method or coefficients"),
        (dict(method="ties", coefficients=torch.ones(2)), ValueError, "give either method or"),
        (dict(coefficients=torch.ones(2), density=0.2), TypeError, "no parameter 'density'"),
        (dict(method="ties", names=["a.bias"]), ValueError, "names belong to coefficients"),
        (dict(coefficients=torch.ones(3)), ValueError, r"have shape \[3\], expected \[2\] or"),
        (dict(coefficients=torch.ones(3, 2)), ValueError, r"\[3, 2\], expected \[2\] or \[2, 2\]"),
        (dict(coefficients=NAN[:2]), ValueError, "finite floating-point numbers"),
        (dict(coefficients=[0.3, 0.3]), TypeError, "got list"),
        (dict(coefficients="none.safetensors"), FileNotFoundError, "no coefficient file"),
        (dict(method="average", include="b.*"), ValueError, r"include: no tensor name matches"),
        (dict(method="average", exclude="*a*"), ValueError, "no tensor is selected"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    base, experts = state(2)
    with pytest.raises(error, match=message):
        fm.merge(base, experts, **arguments)


def test_coefficient_rows_belong_to_the_tensors_in_order():
    net, experts = net_and_experts()
    names = ["embed.weight", "norm.weight", "norm.bias", "body.weight", "body.bias"]
    matrix = random((5, 3), torch.float32, seed=1)
    merged = fm.merge(net, experts, coefficients=matrix).state_dict()
    theirs = [e.state_dict() for e in experts]
    for row, name in zip(matrix, names, strict=True):
        tensor = net.state_dict()[name]
        expected = fm.ops.weighted_sum(tensor, fm.Experts([e[name] for e in theirs]), row)
        assert raw(merged[name]) == raw(expected)


def test_coefficient_rows_with_names():
    base, experts = state(2)
    rows = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    merged = fm.merge(base, experts, coefficients=rows, names=["a.bias", "a.weight"])
    torch.testing.assert_close(merged["a.bias"], experts[1]["a.bias"])
    torch.testing.assert_close(merged["a.weight"], experts[0]["a.weight"])
    part = fm.merge(base, experts, coefficients=rows[:1], names=["a.bias"])
    assert raw(part["a.bias"]) == raw(merged["a.bias"])
    assert raw(part["a.weight"]) == raw(base["a.weight"])
    for wrong, message in ((["a.bias", "b"], "'b', which is no"), (["a.bias"] * 2, "two rows")):
        with pytest.raises(ValueError, match=message):
            fm.merge(base, experts, coefficients=rows, names=wrong)


@pytest.mark.parametrize("granularity", ["task", "layer"])
def test_learned_coefficients_and_their_file_equal_materialize(tmp_path, granularity):
    net, experts = net_and_experts()
    attached = copy.deepcopy(net)
    coefficients = fm.attach(attached, experts, granularity=granularity)
    with torch.no_grad():
        coefficients.raw += random(tuple(coefficients.raw.shape), torch.float32, seed=4)
    fm.materialize(attached)
    coefficients.save(tmp_path / "c.safetensors")
    for given in (coefficients, tmp_path / "c.safetensors", str(tmp_path / "c.safetensors")):
        merged = fm.merge(net, experts, coefficients=given)
        for name, tensor in attached.state_dict().items():
            assert raw(merged.state_dict()[name]) == raw(tensor), name


def test_coefficients_of_a_part_of_the_model_leave_the_rest():
    net, experts = net_and_experts()
    attached = copy.deepcopy(net)
    coefficients = fm.attach(attached, experts, include="body.*")
    merged = fm.merge(net, experts, coefficients=coefficients).state_dict()
    fm.materialize(attached)
    for name, tensor in attached.state_dict().items():
        assert raw(merged[name]) == raw(tensor), name


def test_coefficients_follow_the_experts_names():
    base, (first, second) = state(2)
    coefficients = fm.Coefficients(
        ["a.weight", "a.bias"], ["x", "y"], granularity="task", init=[1.0, 0.0]
    )
    swapped = {"y": second, "x": first}
    merged = fm.merge(base, swapped, coefficients=coefficients)
    torch.testing.assert_close(merged["a.bias"], first["a.bias"])
    with pytest.raises(ValueError, match=r"for experts \['x', 'y'\], got \['x', 'z'\]"):
        fm.merge(base, {"x": first, "z": second}, coefficients=coefficients)
    with pytest.raises(ValueError, match=r"\[2, 2\], expected \[1\] or \[2, 1\]"):
        fm.merge(base, [first], coefficients=coefficients)


def test_coefficients_of_another_model_are_refused():
    base, experts = state(2)
    shapes = [[4, 3], [5]]
    other = fm.Coefficients(["a.weight", "a.bias"], ["x", "y"], shapes=shapes)
    with pytest.raises(ValueError, match=r"another model: tensor 'a.bias' has shape \[5\]"):
        fm.merge(base, experts, coefficients=other)


def test_a_model_with_merged_weights_is_refused_as_base():
    net, experts = net_and_experts()
    attached = copy.deepcopy(net)
    fm.attach(attached, experts)
    with pytest.raises(ValueError, match=r"'embed.weight' is a merged weight already"):
        fm.merge(attached, experts, "average")


def test_progress_changes_nothing(capsys):
    base, experts = state()
    quiet = fm.merge(base, experts, "ties")
    assert capsys.readouterr().out == ""
    shown = fm.merge(base, experts, "ties", progress=True)
    assert all(raw(quiet[n]) == raw(shown[n]) for n in base)


def test_globs_must_match_something():
    assert select_names(["a.x", "b.x"], exclude="a.*") == ["b.x"]
    assert select_names(["a.x", "b.x"], include=["b.*", "a.*"]) == ["a.x", "b.x"]
    assert select_names(["a.x"], exclude="head.*", others=["head.w"]) == ["a.x"]
    with pytest.raises(ValueError, match=r"exclude: no tensor name matches 'head"):
        select_names(["a.x"], exclude="head.*")


def test_importing_fastmerge_is_cheap():
    code = (
        "import sys, fastmerge; fastmerge.merge; "
        "print([m for m in ('transformers', 'matplotlib', 'rich') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
