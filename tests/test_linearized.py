"""L-LoRA: adapters that are linear in their parameters, PEFT's linearised, saved and merged."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call, jvp

import fastmerge as fm
from fastmerge.checkpoint import CheckpointError
from fastmerge.linearized.layers import LinearizedLora

from . import layouts
from .attached import Net

X = torch.tensor([[1.0, -2, 3, 0, 2, -1], [0, 1, 1, -3, 2, 2], [4, 0, -1, 2, 1, -2]])


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return Net().to(dtype)


def drawn(adapters, seed, scale=0.5):
    """Random parameters for adapters, as `state` gives them."""
    generator = torch.Generator().manual_seed(seed)
    state = adapters.state()
    return {n: scale * torch.randn(t.shape, generator=generator).to(t) for n, t in state.items()}


def whole(generator, *shape):
    """Small whole numbers, whose sums and products are exact."""
    return torch.randint(-4, 5, shape, generator=generator).double()


def start_folder(folder, **options):
    """A LoRA of PEFT's with both factors other than 0."""
    torch.manual_seed(5)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["up", "down"], init_lora_weights=False)
    for name, value in options.items():
        setattr(config, name, value)
    model = get_peft_model(net(torch.float32), config)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("with_b0", [False, True])
def test_a_layer_is_affine_bit_for_bit_and_the_tangent_of_lora(with_b0):
    g = torch.Generator().manual_seed(1)
    a0, b0 = whole(g, 2, 6), whole(g, 5, 2) if with_b0 else torch.zeros(5, 2).double()
    layer = LinearizedLora(a0, 2.0, 5, b0 if with_b0 else None)
    names = [n for n, _ in layer.named_parameters()]
    assert names == (["up", "down"] if with_b0 else ["up"])

    def at(point):
        return functional_call(layer, point, (X.double(),))

    one, two = ({"up": whole(g, 5, 2), "down": whole(g, 2, 6)} for _ in range(2))
    one, two = ({n: t[n] for n in names} for t in (one, two))
    zero = at({n: torch.zeros_like(t) for n, t in one.items()})
    mixed = at({n: 3 * one[n] - 0.5 * two[n] for n in names})
    assert torch.equal(mixed, zero + 3 * (at(one) - zero) - 0.5 * (at(two) - zero))

    def lora(a, b):
        return 2.0 * X.double() @ a.t() @ b.t()

    moves = (one.get("down", whole(g, 2, 6)), one["up"])
    value, tangent = jvp(lora, (a0, b0), moves)
    assert torch.equal(at(one), value + tangent)
    assert not torch.equal(lora(a0 + moves[0], b0 + moves[1]), value + tangent)


def test_lora_of_peft_is_linear_after_linearize_and_not_before():
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["up"])).double()
    layer = model.base_model.model.up
    assert isinstance(layer, LoraLayer) and not isinstance(layer, nn.Linear)  # why others fail

    def bend():
        """How far the layer is from affine along a random line through its start."""
        trained = {n: p for n, p in layer.named_parameters() if p.requires_grad}
        torch.manual_seed(3)
        moves = {n: torch.randn_like(p) for n, p in trained.items()}

        def at(t):
            point = {n: p + t * moves[n] for n, p in trained.items()}
            return functional_call(layer, point, (X.double(),)).detach()

        return float((at(2.0) - 2 * at(1.0) + at(0.0)).abs().max())

    assert bend() > 0.1
    adapters = fm.linearize(model)
    assert bend() < 1e-13
    model.set_adapter("default")  # asks for gradients of A and B both, if it can
    assert bend() < 1e-13 and list(adapters.layers) == ["up"]
    assert [p.shape for p in adapters.parameters()] == [(8, 2)]
    adapters.remove()
    assert bend() > 0.1


def test_peft_saves_what_was_trained_linearised(tmp_path):
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["up", "down"]))
    adapters = fm.linearize(model)
    adapters.load_state(drawn(adapters, 1))
    expected = model(X.double())
    model.save_pretrained(tmp_path / "peft")
    adapters.save(tmp_path / "ours")
    files = [load_file(tmp_path / n / "adapter_model.safetensors") for n in ("peft", "ours")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(t, files[1][n]) for n, t in files[0].items())
    for name in ("peft", "ours"):
        again = PeftModel.from_pretrained(net(), tmp_path / name)
        torch.testing.assert_close(again(X.double()), expected)


TARGETS = {
    "clip": ["q_proj", "v_proj"],
    "bert": ["query", "value"],
    "gpt2": ["c_attn"],
    "llama": ["*.self_attn.*", "down_proj"],
    "t5": ["q", "wo"],
    "timm_vit": ["qkv"],
}


@pytest.mark.parametrize(("name", "targets"), TARGETS.items(), ids=TARGETS)
def test_gradients_in_unchanged_models(name, targets):
    model, inputs, _ = getattr(layouts, name)()
    before = {n: p for n, p in model.named_parameters()}

    def loss(parameters=None):
        given = () if parameters is None else (parameters,)
        found = functional_call(model, *given, (), inputs) if given else model(**inputs)
        return sum(t.sin().sum() for t in layouts.outputs(found))

    plain = loss()
    adapters = fm.linearize(model, targets, rank=2, alpha=6)
    torch.testing.assert_close(loss(), plain)
    adapters.load_state(drawn(adapters, 2, scale=0.1))
    found = loss()
    gradients = torch.autograd.grad(found, list(adapters.parameters()))
    ups = {n: layer.up.detach().requires_grad_() for n, layer in adapters.layers.items()}
    starts = {n: (layer.start_down, layer.transposed) for n, layer in adapters.layers.items()}
    adapters.remove()
    assert [n for n, _ in model.named_parameters()] == list(before)
    assert all(p.requires_grad for p in model.parameters())
    built = {}
    for layer, (down, transposed) in starts.items():
        product = 3.0 * ups[layer] @ down
        built[f"{layer}.weight"] = before[f"{layer}.weight"] + (
            product.t() if transposed else product
        )
    truth = loss(built)
    torch.testing.assert_close(found, truth)
    for ours, theirs in zip(gradients, torch.autograd.grad(truth, list(ups.values())), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_fine_tuning_loop_compiled_or_not():
    losses = []
    for compiled in (False, True):
        model = net(torch.float32)
        adapters = fm.linearize(model, "*", rank=2)
        frozen = {n: p.clone() for n, p in model.named_parameters() if "linearized" not in n}
        call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        optimizer = torch.optim.AdamW(adapters.parameters(), lr=0.05)
        losses.append([])
        for _ in range(8):
            loss = F.cross_entropy(call(X), torch.tensor([0, 1, 2]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(float(loss.detach()))
        assert losses[-1][-1] < 0.5 * losses[-1][0]
        after = dict(model.named_parameters())
        assert all(
            torch.equal(p, after[n]) and not after[n].requires_grad for n, p in frozen.items()
        )
    torch.testing.assert_close(losses[0], losses[1])


def test_a_half_precision_model_keeps_its_adapters_in_fp32():
    model = net(torch.bfloat16)
    adapters = fm.linearize(model, ["up"], rank=2)
    adapters.load_state(drawn(adapters, 1))
    y = model(X.bfloat16())
    assert y.dtype == torch.bfloat16 and next(adapters.parameters()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.float()(X), y, rtol=0.05, atol=0.05)


def test_dropout_acts_in_training_alone():
    model = net()
    adapters = fm.linearize(model, ["up"], rank=2, dropout=0.5)
    adapters.load_state(drawn(adapters, 1))
    assert torch.equal(model.eval()(X.double()), model(X.double()))
    assert not torch.equal(model.train()(X.double()), model(X.double()))


def two_experts(folder, **options):
    """Base net, two saved adapters of it, and what they hold."""
    model = net()
    adapters = fm.linearize(model, **({"targets": ["up", "down"], "rank": 2} | options))
    states, paths = [], []
    for k in range(2):
        adapters.load_state(drawn(adapters, 10 + k))
        states.append(adapters.state())
        paths.append(adapters.save(folder / f"expert{k}"))
    adapters.reset()
    assert not any(p.any() for p in adapters.parameters())
    return model, adapters, states, paths


@pytest.mark.parametrize("with_start", [False, True])
def test_merging_is_linear_in_the_coefficients(tmp_path, with_start):
    start = start_folder(tmp_path / "start") if with_start else None
    options = dict(start=start, targets=None) if with_start else {}
    model, adapters, states, paths = two_experts(tmp_path, **options)
    lam = [0.7, -0.4]
    origin = {n: torch.zeros_like(t) for n, t in states[0].items()}
    fused = fm.merge(origin, states, method="task_arithmetic", scaling=0.5)
    torch.testing.assert_close(fused["up.up"], 0.5 * (states[0]["up.up"] + states[1]["up.up"]))
    adapters.load_state({n: lam[0] * states[0][n] + lam[1] * states[1][n] for n in origin})
    expected, at_up = model(X.double()), model.up(X.double())
    base = adapters.remove()
    if with_start:
        state = fm.merge(base.state_dict(), [start], method="task_arithmetic", scaling=1.0)
        base.load_state_dict(state)
    coefficients = fm.attach(base, paths, deltas="lora", init=lam, clamp=None, granularity="task")
    torch.testing.assert_close(base(X.double()), expected)
    torch.testing.assert_close(base.up(X.double()), at_up)

    def layer_at(scale):
        with torch.no_grad():
            coefficients.raw.copy_(scale * torch.tensor([lam]))
        return base.up(X.double()).detach()

    zero = layer_at(0)
    torch.testing.assert_close(
        layer_at(3) - zero, 3 * (layer_at(1) - zero), rtol=1e-6, atol=1e-6
    )  # the coefficients are fp32


def test_ties_and_learned_coefficients_on_the_saved_experts(tmp_path):
    _, adapters, states, paths = two_experts(tmp_path)
    base = adapters.remove()
    origin = {n: torch.zeros_like(t) for n, t in states[0].items()}
    ties = fm.merge(origin, states, method="ties", density=0.5, scaling=1.0)
    assert (
        0
        < sum(int(t.count_nonzero()) for t in ties.values())
        < sum(t.numel() for t in ties.values())
    )
    merged = fm.merge(base, paths, method="ties", density=0.5, scaling=1.0)
    assert not torch.equal(merged.up.weight, base.up.weight)
    coefficients = fm.attach(base, paths, deltas="lora")
    history = fm.learn(base, coefficients, {"task": [X.double()]}, steps=5, lr=0.05)
    assert history.loss[-1] < history.loss[0]


def test_saved_adapters_come_back_and_go_through_peft(tmp_path):
    _, adapters, states, paths = two_experts(tmp_path)
    adapters.load(paths[1])
    assert all(torch.equal(t, states[1][n]) for n, t in adapters.state().items())
    expected = adapters.model(X.double())
    again = PeftModel.from_pretrained(net(), paths[1])
    torch.testing.assert_close(again(X.double()), expected)
    assert copy.deepcopy(adapters.model)(X.double()).equal(expected)


def test_adapters_of_other_ranks_in_one_folder(tmp_path):
    config = LoraConfig(r=2, target_modules=["up", "down"], rank_pattern={"down": 3})
    model = get_peft_model(net(), config)
    adapters = fm.linearize(model)
    adapters.load_state(drawn(adapters, 1))
    expected = model(X.double())
    again = PeftModel.from_pretrained(net(), adapters.save(tmp_path / "a"))
    torch.testing.assert_close(again(X.double()), expected)


def test_transposed_layers_are_saved_as_peft_has_them(tmp_path):
    model, inputs, _ = layouts.gpt2()
    adapters = fm.linearize(model, ["c_attn"], rank=2)
    adapters.load_state(drawn(adapters, 1, scale=0.1))
    expected = layouts.outputs(model(**inputs))[0].detach()
    path = adapters.save(tmp_path / "gpt2")
    assert json.loads((path / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    base = adapters.remove()
    again = PeftModel.from_pretrained(copy.deepcopy(base), path)
    torch.testing.assert_close(layouts.outputs(again(**inputs))[0], expected)
    fm.attach(base, [path], deltas="lora", init=1.0)
    torch.testing.assert_close(layouts.outputs(base(**inputs))[0], expected)
    mixed = nn.ModuleDict(
        {"conv": base.get_submodule("transformer.h.0.mlp.c_fc"), "plain": nn.Linear(3, 2)}
    )
    fm.detach(base)
    both = fm.linearize(mixed, "*")
    both.load_state(drawn(both, 1))
    with pytest.raises(ValueError, match=r"'plain' is stored as \[O, I\] and 'conv' as \[I, O\]"):
        both.save(tmp_path / "mixed")


def test_a_start_of_another_base_is_refused(tmp_path):
    start = start_folder(tmp_path / "start")
    with pytest.raises(CheckpointError, match=r"has no tensor 'down.weight' to adapt"):
        fm.linearize(nn.Sequential(nn.Linear(3, 3)), start=start)
    whole = start_folder(tmp_path / "whole", modules_to_save=["norm"])
    with pytest.raises(ValueError, match=r"replaces 'norm.weight' whole"):
        fm.linearize(net(), start=whole)


def test_training_on_from_a_lora(tmp_path):
    start = start_folder(tmp_path / "start")
    model = net()
    adapters = fm.linearize(model, start=start)
    expected = PeftModel.from_pretrained(net(), start)(X.double())
    torch.testing.assert_close(model(X.double()), expected)
    adapters.load_state(drawn(adapters, 1))
    saved = adapters.save(tmp_path / "more")
    expected = model(X.double())
    adapters.reset()
    assert torch.equal(adapters.load(saved).model(X.double()), expected)


def test_the_start_depends_on_seed_and_name_alone():
    one = fm.linearize(net(), ["up", "down"]).layers["down"].start_down
    two = fm.linearize(net(torch.float32), ["down"]).layers["down"].start_down
    other = fm.linearize(net(), ["down"], seed=7).layers["down"].start_down
    assert torch.equal(one, two.double()) and not torch.equal(one, other)
    assert one.abs().max() <= 8**-0.5 and one.abs().max() > 0.8 * 8**-0.5


def attention():
    return nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "embed": nn.Embedding(3, 4)})


def peft_net(**options):
    config = LoraConfig(**({"r": 2, "target_modules": ["up"]} | options))
    return get_peft_model(net(), config)


def twice():
    model = net()
    fm.linearize(model, ["up"])
    return model


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (net, dict(targets=["up", "v_porj"]), "no linear layer matches 'v_porj'"),
        (net, dict(targets="norm"), "no linear layer matches 'norm'; 'norm' is a LayerNorm"),
        (net, dict(targets=lambda name: False), "no linear layer is selected"),
        (net, dict(targets="up", rank=0), "rank must be at least 1, got 0"),
        (net, dict(targets="up", start="x"), "either targets or start"),
        (net, {}, "the model has no LoRA of PEFT's"),
        (net, dict(start="nowhere"), "'nowhere' is no adapter folder"),
        (attention, dict(targets="out_proj"), "'attn.out_proj': nn.MultiheadAttention reads"),
        (twice, dict(targets="down"), "'up.linearized' is a linearised adapter"),
        (lambda: peft_net(init_lora_weights=False), {}, "up': B is not 0"),
        (lambda: peft_net(use_dora=True), {}, "up' is a variant of LoRA"),
    ],
)
def test_what_cannot_be_linearised_is_named(make, options, message):
    model = make()
    before = {n: (p.requires_grad, p.clone()) for n, p in model.named_parameters()}
    with pytest.raises((ValueError, CheckpointError), match=message):
        fm.linearize(model, **options)
    for name, parameter in model.named_parameters():
        assert before[name][0] == parameter.requires_grad and before[name][1].equal(parameter)


def test_merged_weights_and_adapters_do_not_mix(tmp_path):
    model, adapters, _, paths = two_experts(tmp_path)
    with pytest.raises(ValueError, match=r"'up.linearized' is a linearised adapter"):
        fm.attach(model, paths, deltas="lora")
    fm.attach(adapters.remove(), paths, deltas="lora")
    with pytest.raises(ValueError, match="merged weights already"):
        fm.linearize(model, ["up"])


def test_an_adapter_that_was_not_trained_is_not_saved(tmp_path):
    adapters = fm.linearize(net(), ["up", "down"], rank=2)
    state = drawn(adapters, 1)
    adapters.load_state(state | {"down.up": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match="adapter of 'down' is still at its start"):
        adapters.save(tmp_path / "a")
    adapters.load_state(state | {"up.up": torch.full((8, 2), float("nan"))})
    with pytest.raises(ValueError, match="adapter of 'up' has NaN or Inf in up"):
        adapters.save(tmp_path / "a")
    with pytest.raises(ValueError, match=r"state misses 'down.up'"):
        adapters.load_state({"up.up": state["up.up"]})
    with pytest.raises(ValueError, match=r"'up.up' is \[1\], expected \[8, 2\]"):
        adapters.load_state(state | {"up.up": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t, m: m.pop("fastmerge"), "not written by a linearised model"),
        (lambda t, m: t.pop(next(iter(t))), "a factor of 'down' is missing"),
        (lambda t, m: t.update(more=torch.ones(1)), "unknown tensor 'more'"),
        (lambda t, m: m.update(scaling='{"up": 16.0}'), "unknown tensor .*down.lora_A"),
        (lambda t, m: m.update(scaling='{"up": "x", "down": 1}'), "scaling of 'up' is 'x'"),
        (lambda t, m: m.update(scaling='{"up": 3, "down": 16}'), "'up' has factors .* scaling 3"),
        (lambda t, m: next(iter(t.values())).add_(1), "'down' was trained from another start"),
        (lambda t, m: m.update(scaling="{"), "scaling"),
    ],
)
def test_other_folders_are_refused(tmp_path, spoil, message):
    _, adapters, _, paths = two_experts(tmp_path)
    file = paths[0] / "adapter_model.safetensors"
    tensors = load_file(file)
    scaling = json.dumps({"up": 16.0, "down": 16.0})
    about = {"fastmerge": "fastmerge linearized lora 1", "scaling": scaling, "transposed": "{}"}
    spoil(tensors, about)
    save_file(tensors, file, metadata=about)
    with pytest.raises((ValueError, CheckpointError), match=message):
        adapters.load(paths[0])
    assert not any(p.any() for p in adapters.parameters())


def test_adapters_of_other_layers_or_another_seed_are_refused(tmp_path):
    _, _, _, paths = two_experts(tmp_path)
    with pytest.raises(ValueError, match="has an adapter for 'down', expected one for each of 1"):
        fm.linearize(net(), ["up"], rank=2).load(paths[0])
    with pytest.raises(ValueError, match="was trained from another start"):
        fm.linearize(net(), ["up", "down"], rank=2, seed=1).load(paths[0])
    with pytest.raises(FileNotFoundError, match="expected what save wrote"):
        fm.linearize(net(), ["up"], rank=2).load(tmp_path)
