"""Twin-Merging: oracles, routing, mixed batches, saving, and what it refuses."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastmerge as fm
from fastmerge.deltas import Dense, Experts, LowRank
from fastmerge.modules.task_router import (
    TaskRouter,
    binned,
    fit_router,
    pooled_state,
    train_router,
)
from fastmerge.modules.twin import TwinMerging, rank_of

from .plain import make_experts
from .samples import random

TASKS = ["digits", "signs", "fields"]


class Net(nn.Module):
    """Patches, a position table, norms and an MLP; logits of four classes."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 2, stride=2)
        self.positions = nn.Parameter(torch.randn(1, 4, 12) * 0.1)
        self.norm = nn.LayerNorm(12)
        self.up = nn.Linear(12, 24)
        self.down = nn.Linear(24, 12)
        self.classifier = nn.Linear(12, 4)

    def states(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return x + self.down(F.gelu(self.up(self.norm(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.states(x).mean(1))


def state_features(model: Net, x: Tensor) -> Tensor:
    return model.states(x).mean(1)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def experts_of(net, count=3):
    return dict(zip(TASKS, make_experts(net, count, 0.2), strict=False))


def build(net, experts=None, **options):
    options = {"rank_ratio": 0.5} | options
    return TwinMerging.build(net, experts or experts_of(net), **options)


def images(count, seed=1):
    return random((count, 3, 4, 4), torch.float32, seed)


def one_hot(ids, count=3):
    return F.one_hot(torch.tensor(ids), count).float()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_one_hot_and_full_rank_is_each_expert(net):
    experts = experts_of(net)
    twin, x, ids = build(net, experts, rank_ratio=1.0), images(6), [2, 0, 1, 0, 2, 2]
    with twin.select(one_hot(ids)):
        found = twin(x)
    for row, task in enumerate(ids):
        close(found[row], experts[TASKS[task]](x[row : row + 1])[0])
    for task, expert in experts.items():
        state = twin.fold(task)
        assert set(state) == set(expert.state_dict())
        for name, tensor in expert.state_dict().items():
            close(state[name], tensor)


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_rests_of_low_rank_are_kept_whole(net, svd):
    """Adapters of rank 1 each: the rest of each is of rank 3, which rank 3 keeps."""
    experts = {}
    for k, task in enumerate(TASKS):
        experts[task] = copy.deepcopy(net)
        with torch.no_grad():
            for name, p in experts[task].named_parameters():
                if name in ("up.weight", "down.weight", "patches.weight"):
                    left = random((p.shape[0], 1), torch.float32, 10 + k)
                    right = random((1, p[0].numel()), torch.float32, 20 + k)
                    p.add_((left @ right).view_as(p), alpha=0.1)
    twin = build(net, experts, rank=3, svd=svd)
    deltas = {n: w.deltas for n, w in twin._weights().items()}
    assert sorted(deltas) == ["down.weight", "patches.weight", "up.weight"]
    assert all(isinstance(d, LowRank) and d.ranks == (3, 3, 3) for d in deltas.values())
    for task, expert in experts.items():
        state = twin.fold(task)
        for name, tensor in expert.state_dict().items():
            close(state[name], tensor)


def test_the_shared_expert_and_its_rests(net):
    """W_s = W_0 + 0.3 sum tau; what is kept is the best of rank r, relative to W_s."""
    experts = experts_of(net)
    twin = build(net, experts, whole="up.*", exclude="classifier.*")
    assert "classifier.weight" not in twin._weights()
    for name, weight in twin._weights().items():
        base = net.state_dict()[name]
        theirs = [e.state_dict()[name] for e in experts.values()]
        shared = base + 0.3 * sum(t - base for t in theirs)
        close(weight.base, shared)
        for theta, tau in zip(theirs, weight.deltas.task_vectors(base, torch.float32), strict=True):
            rest = theta - shared
            if name in ("up.weight", "positions") or base.dim() == 1:
                assert isinstance(weight.deltas, Dense)
                close(tau, rest)
            else:
                rank = min(base.shape[0], base[0].numel()) // 2
                assert weight.deltas.ranks == (rank,) * 3
                values = torch.linalg.svdvals(rest.double().flatten(1))
                assert abs(float((rest - tau).norm()) - float(values[rank:].norm())) < 1e-5


def test_the_shared_expert_may_be_any_merge(net):
    experts = experts_of(net)
    twin = build(net, experts, shared={"method": "ties", "density": 0.5})
    expected = fm.merge(net, experts, method="ties", density=0.5)
    expected = expected if isinstance(expected, dict) else expected.state_dict()
    for name, weight in twin._weights().items():
        close(weight.base, expected[name])


def built(twin, row, own=None):
    """The weights of one sample, formed."""
    state = {}
    for name, weight in twin._weights().items():
        lam = own if name in twin.task_tensors else row
        total = weight.base.double()
        taus = weight.deltas.task_vectors(weight.base, torch.float64)
        state[name] = total + sum(c * t for c, t in zip(lam.double(), taus, strict=True))
    return state


@pytest.mark.parametrize("kind", ["one_hot", "soft", "same"])
def test_a_mixed_batch_is_its_samples_one_by_one(net, kind):
    twin, x = build(net), images(6)
    rows = random((6, 3), torch.float32, 3).softmax(-1)
    rows = {"one_hot": one_hot([2, 0, 1, 0, 2, 2]), "soft": rows, "same": rows[0]}[kind]
    with twin.select(rows):
        found = twin(x)
    plain = copy.deepcopy(net).double()
    for b, row in enumerate(rows.expand(6, 3)):
        expected = functional_call(plain, built(twin, row), (x[b : b + 1].double(),))
        close(found[b], expected[0].float())


def trained(net, **options):
    twin = build(net, features=state_features, **options)
    twin.set_router(TaskRouter(12, TASKS))
    torch.manual_seed(3)
    for parameter in twin.router.parameters():
        nn.init.normal_(parameter, std=0.5)
    return twin


def test_the_router_reads_the_shared_expert_and_mixes(net):
    twin, x = trained(net), images(5)
    shared = copy.deepcopy(net)
    shared.load_state_dict({n: w.base for n, w in twin._weights().items()}, strict=False)
    features = state_features(shared, x)
    close(twin.features_of(x), features)
    with torch.no_grad():
        weights = twin.router(features).softmax(-1)
    close(twin.weights(x), weights)
    with twin.select(weights):
        expected = twin(x)
    close(twin(x), expected)
    twin.routing = "one_hot"
    assert torch.equal(twin.weights(x), F.one_hot(weights.argmax(-1), 3).float())
    twin.routing, twin.least = "soft", float(weights.max())
    kept = twin.weights(x)
    assert int((kept > 0).sum()) == 1
    twin.routing, twin.least = "binned", 0.0
    close(twin.weights(x), binned(weights))


def test_the_router_evaluates_while_the_model_trains(net):
    twin, x = trained(net), images(5)
    before = twin.weights(x)
    twin.train()
    assert twin.model.training and not twin.router.training
    assert torch.equal(twin.weights(x), before)


def test_one_expert_needs_no_router(net):
    experts = {"only": make_experts(net, 1, 0.2)[0]}
    twin, x = build(net, experts, rank_ratio=1.0), images(3)
    close(twin(x), experts["only"](x))


def test_task_tensors_as_in_the_code_follow_the_task(net):
    """Classifiers and biases of the true task, the rest by the router."""
    experts = experts_of(net)
    twin = build(net, experts, task_tensors="code", selection="task_tensors")
    names = [n for n in net.state_dict() if "classifier" in n or "bias" in n]
    assert sorted(twin.task_tensors) == sorted(names)
    assert all(isinstance(twin._weights()[n].deltas, Experts) for n in names)
    assert torch.equal(twin._weights()["up.bias"].base, net.up.bias)
    twin.features = state_features
    twin.set_router(TaskRouter(12, TASKS))
    x, ids = images(4), [1, 2, 0, 1]
    weights = twin.weights(x)
    with twin.select(one_hot(ids)):
        found = twin(x)
    plain = copy.deepcopy(net).double()
    for b, task in enumerate(ids):
        state = built(twin, weights[b], own=one_hot([task])[0])
        for name in names:
            close(state[name].float(), experts[TASKS[task]].state_dict()[name])
        close(found[b], functional_call(plain, state, (x[b : b + 1].double(),))[0].float())
    with pytest.raises(RuntimeError, match=r"no coefficients are set.*fastmerge\.task"):
        twin(x)
    paper = build(net, experts, task_tensors="paper")
    assert paper.task_tensors == [] and "up.bias" in paper._weights()


def test_saving_and_restoring(net):
    twin, x = trained(net, task_tensors="code", least=0.01), images(4)
    tensors, config = twin.tensors(), twin.config()
    assert config == json.loads(json.dumps(config))
    again = TwinMerging.restore(net, tensors, config, features=state_features)
    for rows in (one_hot([0, 2, 1, 1]), random((4, 3), torch.float32, 5)):
        with twin.select(rows), again.select(rows):
            assert torch.equal(twin(x), again(x))
    assert torch.equal(twin.weights(x), again.weights(x))
    assert again.config() == config
    without = TwinMerging.restore(net, tensors, config)
    with pytest.raises(RuntimeError, match="a function of its own"):
        without.weights(x)
    config["router"]["tasks"] = TASKS[::-1]
    with pytest.raises(ValueError, match=r"trained for tasks \['fields', 'signs', 'digits'\]"):
        TwinMerging.restore(net, tensors, config)


def test_the_base_model_stays_as_it_is(net):
    before = copy.deepcopy(net.state_dict())
    twin = build(net)
    with twin.select(one_hot([0])):
        twin(images(1))
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert not any(isinstance(p, fm.MergedWeight) for p in net.parameters())


def test_ranks():
    assert rank_of((768, 3072), 0.1) == rank_of((768, 3072), 0.1, "float") == 76
    assert rank_of((5120, 5120), 0.1) == 512 and rank_of((5120, 5120), 0.1, "float") == 511
    assert rank_of((10, 20), 0.1) == 1 and rank_of((10, 20), 0.1, "float") == 0
    assert rank_of((6, 5, 2, 2), 1.0) == 6
    for ratio in (0, -0.1, 1.5):
        with pytest.raises(ValueError, match="rank_ratio must be in"):
            rank_of((5, 5), ratio)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rank_ratio=0.1), r"rank_ratio 0.1 of 'classifier.weight' \[4, 12\] is rank 0"),
        (dict(rank=0), "rank must be at least 1, got 0"),
        (dict(rank_rule="round"), "rank_rule must be one of exact, float"),
        (dict(routing="hard"), "routing must be one of soft, one_hot, binned"),
        (dict(selection="none"), "selection must be one of all, task_tensors"),
        (dict(least=1.0), "least must be at least 0"),
        (dict(svd="fast"), "method must be one of auto"),
        (dict(router=TaskRouter(12, TASKS[:2])), r"trained for tasks \['digits', 'signs'\]"),
    ],
)
def test_what_build_refuses(net, options, message):
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=message):
        build(net, **options)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_what_a_model_refuses(net):
    twin = build(net)
    with pytest.raises(RuntimeError, match="no router: train one"):
        twin(images(2))
    with pytest.raises(ValueError, match="unknown task 'cars', expected one of"):
        twin.fold("cars")
    with pytest.raises(ValueError, match="the experts are all alike"):
        build(net, {task: net for task in TASKS})
    bad = build(net, features=lambda model, x: model.states(x))
    bad.set_router(TaskRouter(12, TASKS))
    with pytest.raises(ValueError, match=r"features are \[2, 4, 12\], expected \[B, d\]"):
        bad(images(2))
    wide = build(net, features=state_features, router=TaskRouter(7, TASKS))
    with pytest.raises(ValueError, match=r"features are \[2, 12\], expected \[B, 7\]"):
        wide(images(2))


def test_training_a_router_tells_tasks_apart(net):
    """Inputs around a centre of each task, told apart by what the shared model makes of them."""
    twin = build(net, features=state_features)
    centres = images(3, seed=9)

    def batches(task, seed):
        return [(centres[task] + 0.3 * images(20, seed + i),) for i in range(3)]

    inputs = {name: batches(k, 100 * k) for k, name in enumerate(TASKS)}
    state = torch.random.get_rng_state()
    history = train_router(twin, inputs, epochs=30, batch_size=32, lr=5e-3, dropout=0.1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(history.losses) == len(history.accuracies) == 30
    assert history.losses[-1] < history.losses[0] / 2
    assert history.accuracies[history.best] == max(history.accuracies)
    fresh = torch.cat([batches(k, 1000 + 100 * k)[0][0] for k in range(3)])
    found = twin.weights(fresh).argmax(-1)
    assert (found == torch.arange(3).repeat_interleave(20)).float().mean() > 0.9
    first = {n: t.clone() for n, t in twin.router.state_dict().items()}
    train_router(twin, inputs, epochs=30, batch_size=32, lr=5e-3, dropout=0.1)
    assert all(torch.equal(t, first[n]) for n, t in twin.router.state_dict().items())
    with pytest.raises(ValueError, match="'fields' is missing"):
        train_router(twin, {name: inputs[name] for name in TASKS[:2]})
    with pytest.raises(ValueError, match="task 'signs' has no batches"):
        train_router(twin, inputs | {"signs": []})


def test_the_router_is_the_published_one():
    router = TaskRouter(6, TASKS)
    kinds = [type(layer) for layer in router.layers]
    hidden = [nn.Linear, nn.BatchNorm1d, nn.LeakyReLU, nn.Dropout]
    assert kinds == [*hidden, *hidden, nn.Linear]
    assert [tuple(m.weight.shape) for m in router.layers if isinstance(m, nn.Linear)] == [
        (12, 6),
        (12, 12),
        (3, 12),
    ]
    slope, dropout = router.layers[2].negative_slope, router.layers[3].p
    assert (slope, dropout) == (0.01, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(epochs=0), "epochs 0"),
        (dict(batch_size=1), "batch_size 1"),
        (dict(held_out=1.0), "held_out 1.0"),
        (dict(features=torch.full((4, 6), float("nan"))), "not finite"),
        (dict(features=torch.zeros(1, 6), labels=torch.zeros(1, dtype=int)), "1 inputs to train"),
    ],
)
def test_what_training_refuses(options, message):
    given = dict(features=torch.zeros(4, 6), labels=torch.tensor([0, 1, 2, 0])) | options
    with pytest.raises(ValueError, match=message):
        fit_router(TaskRouter(6, TASKS), **given)


def test_pooled_states():
    """The encoder's last state, without its padding; outputs [B, d] as they are."""
    state, mask = random((2, 3, 4), torch.float32, 1), torch.tensor([[1, 1, 0], [1, 1, 1]])

    class Encoder(nn.Module):
        def forward(self, **kwargs):
            return type("Output", (), {"last_hidden_state": state})()

    class Headed(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_model = Encoder()

    found = pooled_state(Headed(), input_ids=None, attention_mask=mask, labels=None)
    close(found, torch.stack([state[0, :2].mean(0), state[1].mean(0)]))
    close(pooled_state(Encoder()), state.mean(1))
    assert torch.equal(pooled_state(nn.Identity(), state[0]), state[0])
    with pytest.raises(ValueError, match="pass features="):
        pooled_state(lambda: {"logits": state})


def test_bins_have_means_of_similar_samples():
    weights = random((50, 4), torch.float64, 1).mul(3).softmax(-1)
    found = binned(weights, 6)
    assert len(found.unique(dim=0)) <= 6 + 4
    close(found.sum(-1), torch.ones(50, dtype=torch.float64))
    for row in found.unique(dim=0):
        members = (found == row).all(1)
        close(weights[members].mean(0), row)
        assert len(weights[members].argmax(-1).unique()) == 1
    assert torch.equal(binned(weights, 6), found)
    assert torch.equal(binned(weights, 10000), weights)
    assert binned(weights[:0]).shape == (0, 4)


def test_twin_under_compile(net):
    twin, x, rows = build(net), images(3), one_hot([2, 0, 1])
    with twin.select(rows):
        expected = twin(x)
        found = torch.compile(twin, backend="aot_eager")(x)
    close(found, expected)


def test_through_the_front_door(net, tmp_path):
    """`fm.build`, `fm.task`, `fm.fold`, `fm.save`, `fm.load`."""
    experts, x = experts_of(net), images(4)
    twin = fm.build(
        net, experts, method="twin", rank_ratio=0.5, features=state_features, least=0.01
    )
    with pytest.raises(RuntimeError, match="no router"):
        twin(x)
    inputs = {task: [images(8, seed)] for seed, task in enumerate(TASKS)}
    fm.train_router(twin, inputs, epochs=2, held_out=0)
    fm.save(twin, tmp_path / "twin")
    again = fm.load(tmp_path / "twin", net, features=state_features)
    assert torch.equal(again(x), twin(x))
    ids = ["signs", "digits", "fields", "signs"]
    with fm.task(twin, ids):
        found = twin(x)
        with pytest.raises(ValueError, match="4 task ids for a batch of 3"):
            twin(x[:3])
    for row, task in enumerate(ids):
        plain = copy.deepcopy(net)
        plain.load_state_dict(fm.fold(again, task))
        close(found[row], plain(x[row : row + 1])[0])
    for wrong in ("cars", 3, ["digits", "cars"], torch.tensor([0, 3])):
        with pytest.raises(ValueError, match=r"unknown task|is not in 0\.\.2"):
            fm.task(twin, wrong)
    with torch.no_grad():
        net.up.bias += 1
    with pytest.raises(ValueError, match="belongs to another base model"):
        fm.load(tmp_path / "twin", net)
