"""Representation Surgery and SurgeryV2: adapters on merged models, their training, saving."""

from __future__ import annotations

import copy
import json
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastmerge as fm
from fastmerge.checkpoint import CheckpointError
from fastmerge.modules.representations import recording

from .layouts import LAYOUTS
from .plain import make_experts
from .samples import raw

TASKS = ["a", "b", "c"]
WIDTH, OUT, ROWS = 8, 5, 12


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 9),
            nn.Linear(9, WIDTH),
        )

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Encoder(nn.Module):
    """Blocks on tokens [B, T, 6], and a final representation [B, OUT]."""

    def __init__(self, depth=2):
        super().__init__()
        self.embed = nn.Linear(6, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.out = nn.Linear(WIDTH, OUT)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.out(x.mean(1))


def base_model(depth=2):
    torch.manual_seed(0)
    return Encoder(depth).double()


def setting(kind="plain", depth=2):
    """A merged model, its experts {task: module}, unlabelled inputs {task: [ROWS, T, 6]}."""
    base = base_model(depth)
    experts = dict(zip(TASKS, make_experts(base, 3, scale=0.2), strict=True))
    inputs = {task: torch.randn(ROWS, 4, 6).double() for task in TASKS}
    merged = copy.deepcopy(base)
    if kind == "attached":
        fm.attach(merged, experts)
    elif kind == "plain":
        merged = fm.merge(base, experts, method="task_arithmetic")
    else:
        options = {"rank": 3} if kind == "twin" else {}
        merged = fm.build(base, experts, method=kind, **options)
    return merged, experts, inputs


def build(merged, version=2, example=None, **options):
    dtype = torch.float64
    inputs = torch.randn(2, 4, 6, dtype=dtype) if example is None else example
    method = "surgery_v2" if version == 2 else "surgery"
    surgery = fm.build(merged, TASKS, method=method, inputs=inputs, **options)
    surgery.adapters.to(dtype)
    return surgery


def disturb(surgery, seed=7):
    """Adapters that change something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in surgery.adapters.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).double() * 0.3)
    return surgery


def corrected(encoder, surgery, x, task):
    """The formula written out: one sample's task, adapters after each of the sites."""
    adapters = {a.site.module: a for a in surgery.adapters}

    def correct(name, h):
        if name not in adapters:
            return h
        down, up = (p[TASKS.index(task)] for p in (adapters[name].down, adapters[name].up))
        return h - (h @ down.T).relu() @ up.T

    h = encoder.embed(x)
    for k, layer in enumerate(encoder.layers):
        h = correct(f"layers.{k}", layer(h))
    return correct("", encoder.out(h.mean(1)))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("kind", ["plain", "attached", "emr", "twin"])
def test_at_initialisation_nothing_changes(kind, version):
    merged, _, inputs = setting(kind)
    x = torch.cat([inputs[task][:2] for task in TASKS])
    ids = [0, 0, 1, 1, 2, 2]
    if kind in ("emr", "twin"):
        with fm.task(merged, ids):
            expected = merged(x)
    else:
        expected = merged(x)
    surgery = build(merged, version)
    with fm.task(surgery, ids):
        assert raw(surgery(x)) == raw(expected)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("kind", ["plain", "attached", "emr"])
def test_every_sample_gets_its_own_adapters(kind, version):
    merged, _, inputs = setting(kind)
    surgery = disturb(build(merged, version))
    assert len(surgery.sites) == (3 if version == 2 else 1)
    ids = ["c", "a", "a", "b", "c"]
    x = inputs["a"][:5]
    with fm.task(surgery, ids):
        mixed = surgery(x)
    for sample, task in enumerate(ids):
        with fm.task(surgery, task):
            alone = surgery(x[sample : sample + 1])
        torch.testing.assert_close(mixed[sample], alone[0])
        if kind == "plain":
            by_hand = corrected(merged, surgery, x[sample : sample + 1], task)
            torch.testing.assert_close(alone, by_hand)
    if kind != "emr":
        before = merged(x)  # nothing is corrected outside, though the hooks are there
        assert raw(before) == raw(surgery.remove()(x)) and not torch.equal(before, mixed)


# Layout, and what its final representation is where the output does not tell.
MODELS = {
    "clip": (None, [2, 8]),
    "vit": ("vit.layernorm", [2, 16]),
    "bert": (None, [2, 16]),
    "llama": ("model.norm", [2, 16]),
    "timm_vit": ("fc_norm", [2, 16]),
    "gpt2": ("transformer.ln_f", [2, 16]),
    "distilbert": ("vocab_layer_norm", [2, 16]),
    "open_clip": ("visual", [2, 8]),
}


@pytest.mark.parametrize("name", MODELS)
def test_unchanged_models_of_libraries(name):
    torch.manual_seed(0)
    model, inputs, _ = LAYOUTS[name]()
    final, (blocks, width) = MODELS[name]
    options = {"blocks": "visual.transformer.resblocks.*"} if name == "open_clip" else {}
    if options:
        options["blocks"] = [f"visual.transformer.resblocks.{k}" for k in (0, 1)]
    surgery = build(model, example=inputs, final=final, **options)
    assert [site.width for site in surgery.sites] == [16] * blocks + [width]
    with recording(model, surgery.sites) as found:
        model(**inputs)
        before = {site: value.clone() for site, value in found.items()}
        with fm.task(surgery, [1, 0, 2]):
            surgery(**inputs)
        assert all(raw(found[site]) == raw(before[site]) for site in before)
        disturb(surgery)
        with fm.task(surgery, [1, 0, 2]):
            surgery(**inputs)
        mixed = {site: value.clone() for site, value in found.items()}
        assert not any(torch.equal(mixed[site], before[site]) for site in before)
        for sample, task in enumerate((1, 0, 2)):
            with fm.task(surgery, task):
                surgery(**{k: v[sample : sample + 1] for k, v in inputs.items()})
            for site, value in found.items():
                torch.testing.assert_close(mixed[site][sample], value[0])


@pytest.mark.parametrize("kind", ["tuple", "list", "named", "dict", "model output"])
def test_what_blocks_give(kind):
    """The states within what a block gives are corrected, the rest is as it was."""
    from transformers.modeling_outputs import BaseModelOutput

    Pair = namedtuple("Pair", "states weights")
    made = {
        "tuple": lambda h: (h, "rest"),
        "list": lambda h: [h, "rest"],
        "named": lambda h: Pair(h, "rest"),
        "dict": lambda h: {"last_hidden_state": h, "weights": "rest"},
        "model output": lambda h: BaseModelOutput(last_hidden_state=h, attentions="rest"),
    }[kind]

    class Wrapped(Block):
        def forward(self, x):
            return made(super().forward(x))

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Wrapped()])

        def forward(self, x):
            given = self.layers[0](x)
            assert "rest" in (given.values() if hasattr(given, "values") else given)
            return next(iter(given.values())) if hasattr(given, "values") else given[0]

    torch.manual_seed(0)
    model, x = Outer().double(), torch.randn(2, 3, WIDTH).double()
    surgery = disturb(build(model, example=x))
    h, (first, last) = Block.forward(model.layers[0], x), surgery.adapters
    for adapters in (first, last):
        h = h - (h @ adapters.down[1].T).relu() @ adapters.up[1].T
    with fm.task(surgery, 1):
        torch.testing.assert_close(surgery(x), h)


def test_convolutional_networks():
    torch.manual_seed(0)
    model, inputs, _ = LAYOUTS["convnext"]()
    with pytest.raises(ValueError, match=r"gives \[3, 8, 8, 8\]: say with features="):
        build(model, example=inputs, final="convnext.layernorm")
    surgery = build(model, example=inputs, final="convnext.layernorm", features=1)
    assert [site.width for site in surgery.sites] == [8, 12, 12, 12]
    before = model(**inputs).logits
    with fm.task(surgery, [0, 1, 1]):
        torch.testing.assert_close(surgery(**inputs).logits, before)
        disturb(surgery)
        mixed = surgery(**inputs).logits
    with fm.task(surgery, 1):
        torch.testing.assert_close(surgery(**inputs).logits[1:], mixed[1:])


def batches_of(inputs, size=4):
    return {task: fm.ShuffledBatches(x, size, seed=3) for task, x in inputs.items()}


def gap(surgery, experts, inputs):
    """The objective on all inputs, {task: value}."""
    values = {}
    for task, x in inputs.items():
        with torch.no_grad(), recording(surgery.encoder, surgery.sites) as found:
            with fm.task(surgery, task):
                surgery(x)
        with torch.no_grad(), recording(experts[task], surgery.sites) as target:
            experts[task](x)
        values[task] = sum(
            float((found[s].reshape(len(x), -1, s.width).mean(1)
                   - target[s].reshape(len(x), -1, s.width).mean(1)).abs().mean())
            for s in surgery.sites
        )  # fmt: skip
    return values


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("kind", ["plain", "attached", "emr", "twin", "wemoe"])
def test_training_closes_the_gap_and_changes_adapters_only(kind, version):
    merged, experts, inputs = setting(kind)
    if kind == "attached":
        coefficients = merged._fastmerge_attachment.coefficients
    with torch.no_grad():  # gradients reach nothing else
        parameters = {n: p for n, p in merged.named_parameters() if p.requires_grad}
        before = {n: p.clone() for n, p in parameters.items()}
    surgery = build(merged, version, rank=4)
    first = gap(surgery, experts, inputs)
    history = fm.train_surgery(surgery, batches_of(inputs), experts, steps=25, lr=1e-2)
    last = gap(surgery, experts, inputs)
    share = 0.9 if kind in ("emr", "twin") else 0.7  # what is close from the start stays so
    assert all(last[task] < share * first[task] for task in TASKS), (first, last)
    assert len(history.loss) == 25 and set(history.task_loss) == set(TASKS)
    assert history.loss[0] == pytest.approx(sum(v[0] for v in history.task_loss.values()))
    assert history.loss[-1] < history.loss[0] and history.seconds > 0
    assert all(torch.equal(p, before[n]) for n, p in parameters.items())
    assert all(p.grad is None for p in parameters.values())
    if kind == "attached":
        assert coefficients.raw.grad is None and coefficients.raw.requires_grad


def _by_hand(merged, experts, inputs, surgery, updates, steps, lr, squared=False):
    """The published loop in plain PyTorch: parameters of their own for every task."""
    adapters = {
        task: [(nn.Parameter(a.down[k].detach().clone()), nn.Parameter(a.up[k].detach().clone()))
               for a in surgery.adapters]
        for k, task in enumerate(TASKS)
    }  # fmt: skip
    flat = {task: [p for pair in pairs for p in pair] for task, pairs in adapters.items()}
    whole = torch.optim.Adam([p for parameters in flat.values() for p in parameters], lr=lr)
    own = {task: torch.optim.Adam(parameters, lr=lr) for task, parameters in flat.items()}
    streams = {task: iter(batches) for task, batches in batches_of(inputs).items()}
    blocks = len(surgery.sites) > 1

    def states(encoder, x, pairs):
        h, found = encoder.embed(x), []
        for k, layer in enumerate(encoder.layers):
            h = layer(h)
            if blocks and pairs:
                h = h - (h @ pairs[k][0].T).relu() @ pairs[k][1].T
            if blocks:
                found.append(h.mean(1))
        z = encoder.out(h.mean(1))
        return [*found, z - (z @ pairs[-1][0].T).relu() @ pairs[-1][1].T if pairs else z]

    for _ in range(steps):
        for task in TASKS:
            x = next(streams[task])
            with torch.no_grad():
                targets = states(experts[task], x, None)
            pairs = states(merged, x, adapters[task])
            difference = [a - b for a, b in zip(pairs, targets, strict=True)]
            loss = sum((d.square() if squared else d.abs()).mean() for d in difference)
            stepper = whole if updates == "shared" else own[task]
            stepper.zero_grad(set_to_none=False)  # as torch before 2.0: idle tasks have zeros
            if updates == "shared":
                for parameter in (p for parameters in flat.values() for p in parameters):
                    parameter.grad = torch.zeros_like(parameter)
            loss.backward()
            stepper.step()
    return adapters


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("updates", ["own", "shared"])
@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_training_is_the_published_loop(distance, updates, version):
    merged, experts, inputs = setting()
    surgery = build(merged, version, rank=4)
    squared = distance == "l2"
    expected = _by_hand(merged, experts, inputs, surgery, updates, 6, 1e-2, squared)
    options = {"steps": 6, "lr": 1e-2, "updates": updates, "distance": distance}
    fm.train_surgery(surgery, batches_of(inputs), experts, **options)
    for k, task in enumerate(TASKS):
        for adapters, (down, up) in zip(surgery.adapters, expected[task], strict=True):
            torch.testing.assert_close(adapters.down[k], down.data, rtol=0, atol=1e-9)
            torch.testing.assert_close(adapters.up[k], up.data, rtol=0, atol=1e-9)


@pytest.mark.parametrize("version", [1, 2])
def test_a_task_trained_alone_is_as_among_others(version):
    merged, experts, inputs = setting()
    together, alone = build(merged, version), build(merged, version)
    fm.train_surgery(together, batches_of(inputs), experts, steps=5, lr=1e-2)
    initial = [a.up[0].clone() for a in alone.adapters]
    for task in ("b", "c"):
        only = {task: batches_of(inputs)[task]}
        fm.train_surgery(alone, only, experts, steps=5, lr=1e-2)
    for a, b, first in zip(together.adapters, alone.adapters, initial, strict=True):
        torch.testing.assert_close(a.up[1:], b.up[1:], rtol=0, atol=1e-9)
        torch.testing.assert_close(a.down[1:], b.down[1:], rtol=0, atol=1e-9)
        assert torch.equal(b.up[0], first) and a.up[0].abs().sum() > 0


@pytest.mark.parametrize("version", [1, 2])
def test_gradients_against_autograd(version):
    merged, _, inputs = setting()
    surgery = disturb(build(merged, version))
    x = torch.cat([inputs[task][:2] for task in TASKS])
    with fm.task(surgery, [0, 0, 1, 1, 2, 2]):
        surgery(x).square().sum().backward()
    found = [p.grad.clone() for p in surgery.adapters.parameters()]
    surgery.adapters.zero_grad()
    for k, task in enumerate(TASKS):
        corrected(merged, surgery, x[2 * k : 2 * k + 2], task).square().sum().backward()
    for gradient, parameter in zip(found, surgery.adapters.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("version", [1, 2])
def test_other_ways_to_give_batches_and_experts(version, tmp_path):
    """Lists of batches, inputs of unequal shapes, experts as state dicts and files."""
    from safetensors.torch import save_file

    merged, experts, inputs = setting()
    save_file(experts["b"].state_dict(), tmp_path / "b.safetensors")
    given = {"a": experts["a"], "b": tmp_path / "b.safetensors", "c": experts["c"].state_dict()}
    first, second, third = (build(merged, version) for _ in range(3))
    streams = {task: iter(b) for task, b in batches_of(inputs).items()}
    lists = {task: [next(stream) for _ in range(5)] for task, stream in streams.items()}
    fm.train_surgery(first, batches_of(inputs), experts, steps=5)
    fm.train_surgery(second, lists, given, steps=5)
    lists["a"] = [torch.cat([x, x], 1) for x in lists["a"]]  # 8 tokens: same means, other shape
    fm.train_surgery(third, {t: [(x,) for x in b] for t, b in lists.items()}, given, steps=5)
    for parts in zip(first.adapters, second.adapters, third.adapters, strict=True):
        for other in parts[1:]:
            torch.testing.assert_close(parts[0].up, other.up, rtol=0, atol=1e-9)


def test_what_is_compared():
    merged, experts, inputs = setting()
    losses = {}

    def mask(x):
        """The first token, and others by what is in them."""
        return (x[..., 0] > 0) | (torch.arange(x.shape[1]) == 0)

    for name, options in {
        "mean": {},
        "first": {"compare": "first"},
        "all": {"compare": "all"},
        "masked": {"mask": mask},
        "all, masked": {"mask": mask, "compare": "all"},
    }.items():
        surgery = build(merged)
        full = {task: [x] for task, x in inputs.items()}
        losses[name] = fm.train_surgery(surgery, full, experts, steps=1, **options).loss[0]
    pools = {
        "mean": lambda h, w: h.mean(1),
        "first": lambda h, w: h[:, 0],
        "all": lambda h, w: h,
        "masked": lambda h, w: (h * w).sum(1) / w.sum(1),
        "all, masked": lambda h, w: h * w,
    }
    sites = build(merged).sites
    for name, pool in pools.items():
        expected = 0.0
        for task, x in inputs.items():
            weight = mask(x).unsqueeze(-1).double()
            with torch.no_grad(), recording(merged, sites) as own:
                merged(x)
            with torch.no_grad(), recording(experts[task], sites) as target:
                experts[task](x)
            for site in sites:
                pair = (own[site], target[site])
                a, b = pair if pair[0].dim() == 2 else (pool(h, weight) for h in pair)
                expected += float((a - b).abs().mean())
        assert losses[name] == pytest.approx(expected, rel=1e-9), name
    assert len({round(loss, 6) for loss in losses.values()}) == len(losses)


def test_experts_are_read_once_and_kept(tmp_path, monkeypatch):
    merged, experts, inputs = setting()
    counts = {}

    def counting(task):
        def count(module, args):
            counts[task] = counts.get(task, 0) + len(args[0])

        return count

    for task, expert in experts.items():
        expert.register_forward_pre_hook(counting(task))
    merged.register_forward_pre_hook(counting("merged"))
    surgery = build(merged)
    counts.clear()
    history = fm.train_surgery(surgery, batches_of(inputs), experts, steps=7, cache=tmp_path)
    assert counts == {**dict.fromkeys(TASKS, ROWS), "merged": 7 * 3 * 4}
    assert len(list(tmp_path.iterdir())) == 3
    counts.clear()
    again = build(merged)
    same = fm.train_surgery(again, batches_of(inputs), experts, steps=7, cache=tmp_path)
    assert same.loss == history.loss and "a" not in counts
    with torch.no_grad():
        experts["a"].out.bias.add_(1)  # another expert, other representations
    counts.clear()
    fm.train_surgery(build(merged), batches_of(inputs), experts, steps=1, cache=tmp_path)
    assert counts["a"] == ROWS and "b" not in counts and len(list(tmp_path.iterdir())) == 4
    counts.clear()  # a single representation: the merged model too is read once
    fm.train_surgery(build(merged, 1), batches_of(inputs), experts, steps=7)
    assert counts["merged"] == 3 * ROWS + 2 + 1  # two rows in build, one to see the shape
    for path in tmp_path.iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot be read"):
        fm.train_surgery(build(merged), batches_of(inputs), experts, steps=1, cache=tmp_path)


def test_no_weight_is_merged_while_training():
    merged, experts, inputs = setting()
    called = set()

    class Listening(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.add(function.name())
            return function(*args, **(kwargs or {}))

    surgery = build(merged)
    with Listening():
        fm.train_surgery(surgery, batches_of(inputs), experts, steps=2)
    ours = {name for name in called if name.startswith("fastmerge::")}
    assert ours == {"fastmerge::residual_adapter", "fastmerge::residual_adapter_backward"}


@pytest.mark.parametrize("kind", ["plain", "attached", "emr"])
def test_saving(kind, tmp_path):
    merged, experts, inputs = setting(kind)
    surgery = build(merged)
    fm.train_surgery(surgery, batches_of(inputs), experts, steps=3, lr=1e-2)
    with fm.task(surgery, "b"):
        expected = surgery(inputs["b"])
    fm.save(surgery, tmp_path / "saved")
    surgery.remove()
    if kind == "emr":
        fm.save(merged, tmp_path / "merged")
        merged = fm.load(tmp_path / "merged", base_model())
    again = fm.load(tmp_path / "saved", merged)
    assert type(again) is type(surgery) and again.tasks == TASKS and again.nbytes() > 0
    with fm.task(again, "b"):
        assert raw(again(inputs["b"])) == raw(expected)
    size = (tmp_path / "saved" / "model.safetensors").stat().st_size
    assert surgery.nbytes() < size < surgery.nbytes() + 4096
    other = setting("plain", depth=1)[0]
    with pytest.raises(CheckpointError, match="belongs to another base model"):
        fm.load(tmp_path / "saved", other)


def test_coefficients_learned_after_building_are_told(tmp_path):
    merged, experts, inputs = setting("attached")
    surgery = build(merged)
    with torch.no_grad():
        merged._fastmerge_attachment.coefficients.raw.fill_(0.5)
    fm.train_surgery(surgery, batches_of(inputs), experts, steps=1)
    fm.save(surgery, tmp_path / "saved")
    assert fm.load(tmp_path / "saved", merged).sites == surgery.sites


def test_description_of_another_model(tmp_path):
    merged, _, _ = setting()
    surgery = build(merged)
    config = json.loads(json.dumps(surgery.config()))
    assert type(surgery).restore(merged, surgery.tensors(), config).sites == surgery.sites
    config["sites"][0]["module"] = "layers.9"
    with pytest.raises(ValueError, match=r"another model's: this one has no 'layers\.9'"):
        type(surgery).restore(merged, surgery.tensors(), config)


def test_copies_have_adapters_of_their_own():
    merged, _, inputs = setting()
    surgery = build(merged)
    twin = disturb(copy.deepcopy(surgery))
    with fm.task(surgery, 0), fm.task(twin, 1):
        plain, changed = surgery(inputs["a"]), twin(inputs["a"])
    torch.testing.assert_close(plain, merged(inputs["a"]))
    torch.testing.assert_close(changed, corrected(twin.model, twin, inputs["a"], "b"))


def test_compile():
    merged, _, inputs = setting(depth=1)
    surgery = disturb(build(merged))
    torch._dynamo.reset()
    compiled = torch.compile(surgery, fullgraph=True, backend="aot_eager")
    for step, ids in enumerate(([0, 1, 2, 0, 1], [2, 2, 1, 0, 0])):
        with fm.task(surgery, ids), torch._dynamo.config.patch(error_on_recompile=step > 0):
            x = inputs["a"][:5]
            torch.testing.assert_close(compiled(x), surgery(x))


def test_checkpointed_blocks():
    from torch.utils.checkpoint import checkpoint

    merged, _, inputs = setting()
    surgery = disturb(build(merged))
    x, ids = inputs["a"][:3], [2, 0, 1]
    with fm.task(surgery, ids):
        surgery(x).sum().backward()
        expected = [p.grad.clone() for p in surgery.adapters.parameters()]
        surgery.adapters.zero_grad()
        checkpoint(surgery, x, use_reentrant=False).sum().backward()
    for parameter, gradient in zip(surgery.adapters.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_wrong_use():
    merged, _, inputs = setting()
    surgery, x = build(merged), inputs["a"]
    with pytest.raises(RuntimeError, match=r"no task is selected: run .* fastmerge\.task"):
        surgery(x)
    with pytest.raises(ValueError, match="unknown task 'd'"):
        fm.task(surgery, "d")
    with fm.task(surgery, [0, 1]), pytest.raises(ValueError, match="2 task ids for a batch of 12"):
        surgery(x)
    with pytest.raises(TypeError, match="no state dict of one task"):
        fm.fold(surgery, "a")
    merged.layers[1].register_forward_pre_hook(lambda module, args: (args[0][..., :7],))
    merged.layers[1].norm = merged.layers[1].up = nn.Identity()
    merged.layers[1].down = nn.Identity()
    with fm.task(surgery, 0), pytest.raises(ValueError, match=r"'layers\.1' gives .*7\].* width 8"):
        surgery(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rank=0), "rank must be at least 1, got 0"),
        (dict(blocks="encoder.*"), r"no module is called 'encoder\.\*'"),
        (dict(blocks="out"), None),
        (dict(final="nowhere"), "no representation 'nowhere' in the output of the model"),
        (dict(final="unused"), "final module 'unused' does not run"),
        (dict(final="twice"), r"'twice' runs 2 times"),
    ],
    ids=str,
)
def test_wrong_places(options, message):
    merged, _, _ = setting()
    merged.unused = nn.Linear(2, 2)
    merged.twice = nn.Identity()
    for layer in merged.layers[:2]:
        layer.register_forward_hook(lambda module, args, output: merged.twice(output))
    if message is None:
        assert [s.module for s in build(merged, **options).sites] == ["out", ""]
        return
    with pytest.raises(ValueError, match=message):
        build(merged, **options)


def test_wrong_models():
    merged, _, _ = setting()
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match="no transformer blocks are found"):
        build(nn.Sequential(nn.Linear(6, 4), nn.ReLU()).double())
    with pytest.raises(ValueError, match=r"blocks= is for surgery_v2"):
        build(merged, 1, blocks="layers.*")
    with pytest.raises(ValueError, match="has adapters already"):
        build(build(merged))
    with pytest.raises(ValueError, match=r"tasks are \['x'\], expected the merged model's"):
        fm.build(setting("emr")[0], ["x"], method="surgery", inputs=x)
    with pytest.raises(ValueError, match="different tasks"):
        fm.build(merged, ["x", "x"], method="surgery", inputs=x)
    with pytest.raises(TypeError, match="inputs"):
        fm.build(merged, TASKS, method="surgery")
    model, inputs, _ = LAYOUTS["llama"]()
    with pytest.raises(ValueError, match=r"output of the model \(logits\): name with final="):
        build(model, 1, example=inputs)

    class TimeFirst(nn.Module):
        def forward(self, x):
            return x.transpose(0, 1)

    with pytest.raises(ValueError, match=r"gives \[5, 2, 6\] for 2 samples"):
        build(
            nn.Sequential(nn.Linear(6, 6), TimeFirst()).double(),
            1,
            example=torch.randn(2, 5, 6).double(),
        )


def _wrong_training(**change):
    merged, experts, inputs = setting()
    arguments = {"model": build(merged), "batches": batches_of(inputs), "experts": experts}
    return fm.train_surgery(**(arguments | {"steps": 1} | change))


def test_wrong_training():
    merged, experts, _ = setting()
    narrow = copy.deepcopy(experts["a"])
    narrow.layers[1] = nn.Linear(WIDTH, 7).double()
    narrow.out = nn.Linear(7, OUT).double()
    shallow = setting(depth=1)[1]["a"]
    state = experts["a"].state_dict()
    cases = [
        (dict(model=merged), TypeError, "expected a model of fastmerge.build"),
        (dict(batches={}), ValueError, "batches is empty"),
        (dict(batches={"d": []}), ValueError, "unknown task 'd'"),
        (dict(batches={"a": []}), ValueError, "batches of task 'a' are exhausted"),
        (dict(experts={"a": experts["a"]}), ValueError, "experts has no entry for task 'b'"),
        (dict(steps=-1), ValueError, "steps must not be negative"),
        (dict(compare="last"), ValueError, "compare must be one of mean, first, all"),
        (dict(distance="l3"), ValueError, "distance must be one of l1, l2"),
        (dict(updates="code"), ValueError, "updates must be one of own, shared"),
        (dict(experts=experts | {"a": narrow}), ValueError, r"'a' has width 7 at 'layers\.1'"),
        (dict(experts=experts | {"a": shallow}), ValueError, r"no module 'layers\.1'"),
        (dict(experts=experts | {"a": {**state, "x": state["out.bias"]}}), ValueError, "lacks"),
        (dict(experts=experts | {"a": {"out.bias": torch.zeros(3)}}), ValueError, r"is \[3\]"),
    ]
    for change, error, message in cases:
        with pytest.raises(error, match=message):
            _wrong_training(**change)
    attached, experts, _ = setting("attached")
    with pytest.raises(ValueError, match=r"expert 'a' lacks 'embed\.weight', which is merged"):
        _wrong_training(
            model=build(attached), experts=experts | {"a": {"out.bias": state["out.bias"]}}
        )


def test_nan_stops_before_anything_changes():
    merged, experts, inputs = setting()
    surgery = build(merged)
    inputs["b"][:] = float("nan")
    with pytest.raises(FloatingPointError, match="step 0: the loss of task 'b' is nan"):
        fm.train_surgery(surgery, batches_of(inputs), experts, steps=1)
    assert all(a.up.abs().sum() == 0 for a in surgery.adapters)


def test_seeds():
    merged, _, _ = setting()
    first, same, other = (build(merged, seed=s).adapters[0].down for s in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert first.abs().max() <= WIDTH**-0.5 and first.abs().max() > 0.9 * WIDTH**-0.5
