"""WEMoE against weights built for one sample at a time, in fp64 with plain autograd."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

import fastmerge as fm
from fastmerge.modules.mlp_blocks import find_mlp_blocks
from fastmerge.modules.router import Router, Routers
from fastmerge.objectives import entropy

from .layouts import LAYOUTS, outputs
from .plain import make_experts

EXPERTS = 3


class Built(nn.Module):
    """A linear layer, or GPT-2's Conv1D, with the weights of one sample built whole."""

    def __init__(self, layer: nn.Module, experts: list[nn.Module], cell: dict[str, Tensor]):
        super().__init__()
        self.layer, self.experts, self.cell = [layer], [experts], cell
        self.weight, self.bias = layer.weight, layer.bias  # whose dtype T5 and open_clip ask for

    def _merged(self, name: str) -> Tensor | None:
        base = getattr(self.layer[0], name)
        if base is None:
            return None
        base = base.detach()
        taus = [getattr(expert, name).detach() - base for expert in self.experts[0]]
        return base + sum(c * tau for c, tau in zip(self.cell["row"], taus, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._merged("weight"), self._merged("bias")
        if isinstance(self.layer[0], nn.Linear):
            return F.linear(x, weight, bias)
        return x @ weight + bias


def gate(router: Router, x: Tensor) -> Tensor:
    """Coefficients of one sample [1, ..., d] as published: per token, then the mean."""
    tokens = x.flatten(0, -2)
    if router.depth == 0:
        return router.bias
    if router.depth == 2:
        tokens = (tokens @ router.hidden.weight.t() + router.hidden.bias).relu()
    return (tokens @ router.weight.t() + router.bias).mean(0)


def plain_wemoe(base: nn.Module, experts: list[nn.Module], routers: Routers) -> nn.Module:
    """The model for one sample at a time: task arithmetic, and built MLPs behind the routers."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for p, b, *e in zip(*(m.parameters() for m in (model, base, *experts)), strict=True):
            p.copy_(b + 0.3 * sum(t - b for t in e))
    for block, router in zip(find_mlp_blocks(base), routers, strict=True):
        cell: dict[str, Tensor] = {}
        for name in dict.fromkeys(n.rpartition(".")[0] for n in block.parameters):
            parent, _, child = name.rpartition(".")
            layers = [expert.get_submodule(name) for expert in experts]
            setattr(
                model.get_submodule(parent), child, Built(base.get_submodule(name), layers, cell)
            )

        def set_row(module, args, kwargs, cell=cell, router=router):
            cell["row"] = gate(router, next(iter((*args, *kwargs.values()))))

        model.get_submodule(block.before).register_forward_pre_hook(set_row, with_kwargs=True)
    return model


def results(output: object) -> list[Tensor]:
    """The outputs that are compared; CLIP's embeddings, as its logits are of pairs of samples."""
    both = [getattr(output, name, None) for name in ("image_embeds", "text_embeds")]
    return outputs(output) if both[1] is None else both


def one_by_one(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Outputs of each sample alone, as one batch."""
    count = len(next(iter(inputs.values())))
    singly = [results(model(**{k: v[i : i + 1] for k, v in inputs.items()})) for i in range(count)]
    return [torch.cat(parts) if parts[0].dim() else parts[0] for parts in zip(*singly, strict=True)]


def shake(routers: Routers, scale: float = 0.5) -> None:
    """Router weights with which samples differ."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in routers.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise.to(parameter.dtype) * scale / parameter.shape[-1] ** 0.5)


def wemoe(layout: str, **options):
    torch.manual_seed(0)
    base, inputs, _ = LAYOUTS[layout]()
    experts = make_experts(base, EXPERTS)
    model = fm.build(copy.deepcopy(base), experts, **options, method="wemoe")
    return base, experts, model, inputs


VALUE_LAYOUTS = [name for name in LAYOUTS if name != "resnet"]


@pytest.mark.parametrize("layout", VALUE_LAYOUTS)
def test_layouts(layout):
    """A mixed batch gives what each sample gets alone from built weights; gradients too."""
    base, experts, model, inputs = wemoe(layout)
    shake(model.routers)
    twin = copy.deepcopy(model.routers)
    expected = one_by_one(plain_wemoe(base, experts, twin), inputs)
    found = results(model(**inputs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    sum(y.square().sum() for y in found).backward()
    sum(y.square().sum() for y in expected).backward()
    for (name, p), q in zip(model.routers.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-10, msg=name)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_gate_depths(depth):
    base, experts, model, inputs = wemoe("clip", depth=depth)
    shake(model.routers)
    twin = copy.deepcopy(model.routers)
    (expected, *_), (found, *_) = (
        one_by_one(plain_wemoe(base, experts, twin), inputs),
        results(model(**inputs)),
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    found.sum().backward()
    expected.sum().backward()
    for p, q in zip(model.routers.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-10)
    assert len(list(model.routers[0].parameters())) == (1, 2, 4)[depth]


@pytest.mark.parametrize("layout", ["clip", "bert", "gpt2"])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_zero_router_weights_give_task_arithmetic(layout, depth):
    base, experts, model, inputs = wemoe(layout, depth=depth)
    with torch.no_grad():
        for name, parameter in model.routers.named_parameters():
            if name.endswith("weight"):
                parameter.zero_()
    merged = fm.merge(base, experts, method="task_arithmetic", scaling=0.3)
    expected, found = results(merged(**inputs)), results(model(**inputs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_start_is_near_task_arithmetic():
    """Weights of standard deviation 0.01 hardly move the coefficients from 0.3."""
    base, experts, model, inputs = wemoe("clip")
    merged = fm.merge(base, experts, method="task_arithmetic", scaling=0.3)
    found, expected = results(model(**inputs))[0], results(merged(**inputs))[0]
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 1e-2 * expected.norm()
    for router in model.routers:
        assert router.hidden.weight.std().item() == pytest.approx(0.01, rel=0.2)
        assert torch.equal(router.hidden.bias, torch.zeros_like(router.hidden.bias))
        assert torch.equal(router.bias, torch.full_like(router.bias, 0.3))


def test_one_seed_one_start():
    first, again, other = (wemoe("clip", seed=s)[2].routers for s in (1, 1, 2))
    for p, q, r in zip(*(m.parameters() for m in (first, again, other)), strict=True):
        assert torch.equal(p, q)
        assert p.std() == 0 or not torch.equal(p, r)


def test_batch_routing_merges_once_with_the_mean():
    """Every sample takes the mean coefficients of its batch, and results depend on the batch."""
    base, experts, model, inputs = wemoe("clip", routing="batch")
    shake(model.routers)
    plain = plain_wemoe(base, experts, model.routers)
    found = results(model(**inputs))[0]
    # given a whole batch, `gate` means over tokens and samples alike
    torch.testing.assert_close(found, results(plain(**inputs))[0], rtol=1e-9, atol=1e-11)
    alone = one_by_one(model, inputs)[0]
    assert not torch.allclose(found, alone)
    by_sample = wemoe("clip")[2]
    shake(by_sample.routers)
    torch.testing.assert_close(alone, results(by_sample(**inputs))[0], rtol=1e-9, atol=1e-11)


def learn(model, inputs, **options):
    """Five steps on two tasks' halves of random images."""
    generator = torch.Generator().manual_seed(3)
    x = inputs["pixel_values"]
    pixels = torch.randn(8, *x.shape[1:], generator=generator, dtype=torch.float64).to(x.dtype)
    batches = {
        "a": [{"pixel_values": pixels[:4]}],
        "b": [{"pixel_values": 2 * pixels[4:]}],
    }
    heads = {task: (lambda output: 5 * output[0]) for task in batches}
    options = {"steps": 5, "lr": 1e-2, "heads": heads} | options
    history = fm.learn(model, model.routers, batches, **options)
    return history, batches, heads


def test_learning_by_entropy_equals_plain_adam():
    """The same steps with built weights, one sample at a time, in fp64."""
    base, experts, model, inputs = wemoe("clip")
    twin = copy.deepcopy(model.routers)
    history, batches, _ = learn(model, inputs)
    plain, adam = plain_wemoe(base, experts, twin), torch.optim.Adam(twin.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        total = 0.0
        for (batch,) in batches.values():
            logits = 5 * one_by_one(plain, batch)[0]
            p = logits.softmax(-1)
            total = total - (p * p.log()).sum(-1).mean()
        adam.zero_grad()
        total.backward()
        adam.step()
        losses.append(float(total.detach()))
    assert history.loss == pytest.approx(losses, rel=1e-6)
    assert history.loss[-1] < history.loss[0]
    for p, q in zip(model.routers.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_learning_moves_routers_only():
    _, _, model, inputs = wemoe("clip")
    before = {n: p.detach().clone() for n, p in model.model.named_parameters() if not merged(p)}
    routers = {n: p.detach().clone() for n, p in model.routers.named_parameters()}
    learn(model, inputs, steps=1)
    assert all(torch.equal(dict(model.model.named_parameters())[n], p) for n, p in before.items())
    assert not any(
        torch.equal(dict(model.routers.named_parameters())[n], p) for n, p in routers.items()
    )


def merged(parameter: Tensor) -> bool:
    return isinstance(parameter, fm.MergedWeight)


def test_learning_by_kl():
    _, experts, model, inputs = wemoe("clip")
    history, *_ = learn(
        model, inputs, objective="kl", expert_logits=dict(zip("ab", experts, strict=False))
    )
    assert history.loss[-1] < history.loss[0]


@pytest.mark.parametrize("routing", ["sample", "batch"])
def test_tasks_are_joined_only_where_samples_are_independent(routing):
    """One forward pass for both tasks, or one each where a batch shares its mean."""
    _, _, model, inputs = wemoe("clip", routing=routing)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    learn(model, inputs, steps=1)
    assert len(calls) == {"sample": 1, "batch": 2}[routing]


def test_cosine_schedule():
    """The first step has the whole rate, the last almost none."""
    _, _, model, inputs = wemoe("clip", depth=0)
    seen = []

    def optimizer(parameters):
        found = torch.optim.SGD(parameters, lr=0.1)
        found.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
        return found

    learn(model, inputs, steps=4, schedule="cosine", optimizer=optimizer)
    assert seen == pytest.approx([0.1, 0.0853553, 0.05, 0.0146447], rel=1e-5)
    with pytest.raises(ValueError, match="schedule must be 'constant' or 'cosine', got 'linear'"):
        learn(model, inputs, schedule="linear")


def test_learning_goes_on_from_a_checkpoint(tmp_path):
    """Interrupted after three of six steps, it ends where it would have."""
    options = {"steps": 6, "schedule": "cosine"}
    path, calls = tmp_path / "learning.safetensors", []

    def interrupted(logits, batch):
        calls.append(batch.task)
        if len(calls) > 6:
            raise KeyboardInterrupt
        return entropy(logits, batch)

    _, _, whole, inputs = wemoe("clip", seed=5)
    learn(whole, inputs, **options)
    _, _, first, _ = wemoe("clip", seed=5)
    with pytest.raises(KeyboardInterrupt):
        learn(first, inputs, objective=interrupted, checkpoint=path, checkpoint_every=3, **options)
    _, _, second, _ = wemoe("clip", seed=6)
    history, *_ = learn(second, inputs, checkpoint=path, resume=True, **options)
    assert len(history.loss) == 6
    for p, q in zip(whole.routers.parameters(), second.routers.parameters(), strict=True):
        assert torch.equal(p, q)
    _, _, other, _ = wemoe("clip", depth=1)
    with pytest.raises(ValueError, match="parametrization is gate depth 2, expected gate depth 1"):
        learn(other, inputs, checkpoint=path, resume=True, **options)


def test_fold():
    """The mean coefficients of a task's batches, as an ordinary state dict."""
    base, experts, model, inputs = wemoe("clip")
    shake(model.routers)
    pixels = inputs["pixel_values"]
    batches = [{"pixel_values": pixels[:1]}, {"pixel_values": pixels[1:]}]
    rows = model.coefficients_of(batches)
    both = model.coefficients_of([inputs])
    torch.testing.assert_close(rows, both)
    assert list(rows.shape) == [2, EXPERTS]
    folded = model.fold("expert1", batches)
    assert list(folded) == list(base.state_dict())
    blocks = find_mlp_blocks(base)
    of = {name: i for i, block in enumerate(blocks) for name in block.parameters}
    states = [expert.state_dict() for expert in experts]
    for name, value in base.state_dict().items():
        row = rows[of[name]] if name in of else [0.3] * EXPERTS
        if value.is_floating_point():
            taus = [state[name] - value for state in states]
            value = value + sum(c * tau for c, tau in zip(row, taus, strict=True))
        torch.testing.assert_close(folded[name], value, rtol=1e-12, atol=1e-14)
    fresh = copy.deepcopy(base)
    fresh.load_state_dict(folded)
    one = {"pixel_values": pixels[:1]}  # of one sample the mean is the sample's own
    fresh.load_state_dict(model.fold("expert0", [one]))
    torch.testing.assert_close(results(fresh(**one))[0], results(model(**one))[0])


def test_fold_without_inputs():
    base, experts, model, _ = wemoe("clip", depth=0)
    merged = fm.merge(base, experts, method="task_arithmetic", scaling=0.3).state_dict()
    for name, value in model.fold("expert0").items():
        torch.testing.assert_close(value, merged[name], rtol=1e-12, atol=1e-14)
    _, _, model, _ = wemoe("clip")
    with pytest.raises(ValueError, match=r"fold\('expert0'\) needs batches"):
        model.fold("expert0")
    with pytest.raises(ValueError, match="unknown task 'other', expected one of"):
        model.fold("other", [])
    with pytest.raises(ValueError, match="needs batches that reach every MLP, got none"):
        model.fold("expert0", [])


def test_copies_are_independent():
    _, _, model, inputs = wemoe("clip")
    shake(model.routers)
    before = results(model(**inputs))[0]
    clone = copy.deepcopy(model)
    assert torch.equal(results(clone(**inputs))[0], before)
    shake(clone.routers)
    assert not torch.equal(results(clone(**inputs))[0], before)
    assert torch.equal(results(model(**inputs))[0], before)


def test_base_model_stays_as_it_is():
    base, inputs, _ = LAYOUTS["clip"]()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    output = results(base(**inputs))[0]
    model = fm.build(base, make_experts(base, 2), method="wemoe")
    model(**inputs)
    assert torch.equal(results(base(**inputs))[0], output)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_compile():
    """One graph, also after the routers have learned and for another number of samples."""
    _, _, model, inputs = wemoe("clip")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    larger = {name: torch.cat([value, value[:2]]) for name, value in inputs.items()}
    with torch.no_grad():
        for given in (inputs, inputs, larger):
            shake(model.routers)
            torch.testing.assert_close(results(compiled(**given))[0], results(model(**given))[0])


def test_activation_checkpointing():
    """What is computed again in the backward pass asks the routers again."""
    _, _, model, inputs = wemoe("clip")
    shake(model.routers)
    twin = copy.deepcopy(model)
    twin.model.gradient_checkpointing_enable({"use_reentrant": False})
    twin.train()
    for m in (model, twin):
        results(m(**inputs))[0].square().sum().backward()
    for p, q in zip(model.routers.parameters(), twin.routers.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_autocast():
    """Products in bf16, coefficients in fp32."""
    base, inputs, _ = LAYOUTS["clip"]()
    base, inputs = base.float(), {name: value.float() for name, value in inputs.items()}
    model = fm.build(base, make_experts(base, EXPERTS), method="wemoe")
    shake(model.routers)
    seen = []
    for route in model.routes:
        route.heard = seen
    expected = results(model(**inputs))[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = results(model(**inputs))[0]
    assert {rows.dtype for rows in seen} == {torch.float32}
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_16_bit_models_have_routers_in_fp32():
    base, inputs, _ = LAYOUTS["clip"]()
    base, inputs = base.bfloat16(), {name: value.bfloat16() for name, value in inputs.items()}
    model = fm.build(base, make_experts(base, EXPERTS), method="wemoe")
    assert {p.dtype for p in model.routers.parameters()} == {torch.float32}
    output = results(model(**inputs))[0]
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    grads = [p.grad for p in model.routers.parameters()]
    assert all(g is not None and g.dtype == torch.float32 for g in grads)


def test_flattened_activations():
    """A layer that flattens [B, T, d] to [B * T, d] keeps every sample's own coefficients."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
            self.flat = False

        def forward(self, x):
            y = x.flatten(0, 1) if self.flat else x
            return x + self.down(self.up(y).relu()).view_as(x)

    torch.manual_seed(0)
    base = nn.Sequential(Layer(), Layer()).double()
    model = fm.build(base, make_experts(base, EXPERTS), method="wemoe")
    shake(model.routers)
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    expected = model(x)
    for layer in model.model:
        layer.flat = True
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-14)
    for layer in model.model:
        layer.flat = False
    with pytest.raises(RuntimeError, match=r"input of '0' is \[5, 3, 4\], and .* samples \[3\]"):
        hook = model.model.register_forward_pre_hook(lambda m, args: args[0].transpose(0, 1))
        model(x)
    hook.remove()
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-14)


def test_generation():
    """A language model generates for each prompt what it would alone."""
    _, _, model, _ = wemoe("llama")
    shake(model.routers)
    ids = torch.tensor([[3, 7, 9, 21], [11, 2, 5, 8]])
    options = {"max_new_tokens": 4, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    model(input_ids=ids[:1])  # another number of samples before
    both = model.model.generate(ids, **options)
    for row, prompt in zip(both, ids, strict=True):
        alone = model.model.generate(prompt[None], **options)[0]
        assert torch.equal(row[: len(alone)], alone)


def test_samples_in_the_second_dimension_are_refused():
    base = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8), 2, enable_nested_tensor=False)
    with pytest.raises(ValueError, match=r"'self_attn' beside 'layers.0.linear1' has"):
        fm.build(base, make_experts(base, 2), method="wemoe")
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    base = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    model = fm.build(base, make_experts(base, 2), method="wemoe")
    assert model(torch.randn(2, 3, 4)).shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 3}, "gate depth must be 0, 1 or 2, got 3"),
        ({"routing": "token"}, "routing must be 'sample' or 'batch', got 'token'"),
        ({"blocks": ["*.ffn"]}, "no module of CLIPVisionModelWithProjection matches"),
        ({"exclude": "nothing"}, "no tensor name matches 'nothing'"),
        ({"exclude": "*.mlp.*"}, "exclude leaves no parameter of any MLP"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        wemoe("clip", **options)


def test_a_model_without_mlps_is_refused():
    with pytest.raises(ValueError, match="no MLP was found in ResNetForImageClassification"):
        wemoe("resnet")


def test_excluded_parameters_stay_the_base_models():
    base, _, model, inputs = wemoe("vit", exclude=["classifier.*", "*.fc2.bias"])
    state = model.fold("expert0", [inputs])
    for name, value in base.state_dict().items():
        kept = name.startswith("classifier.") or name.endswith("fc2.bias")
        assert torch.equal(state[name], value) == kept, name


def test_routers_of_others_are_refused(tmp_path):
    path = tmp_path / "routers.safetensors"
    base, experts, model, inputs = wemoe("clip")
    shake(model.routers)
    model.routers.save(path)
    again = fm.build(base, experts, method="wemoe")
    again.routers.load(path)
    assert torch.equal(results(again(**inputs))[0], results(model(**inputs))[0])
    named = dict(zip(("cars", "mnist", "dtd"), experts, strict=True))
    others = {
        r"tasks \['expert0', 'expert1', 'expert2'\], expected \['cars', 'mnist', 'dtd'\]": (
            fm.build(base, named, method="wemoe")
        ),
        "tasks .*, expected .*'expert1'\\]": fm.build(base, experts[:2], method="wemoe"),
        "gate depth 2, expected 1": fm.build(base, experts, depth=1, method="wemoe"),
        "MLPs .*layers.1.mlp'\\], expected .*layers.0.mlp'\\]": fm.build(
            base, experts, blocks="*.layers.0.mlp", method="wemoe"
        ),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            other.routers.load(path)
    with pytest.raises(FileNotFoundError):
        model.routers.load(tmp_path / "nowhere")
    path.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="not a valid file of routers"):
        model.routers.load(path)


def test_saved_and_loaded(tmp_path):
    """The same outputs to the bit, from the experts' MLPs and not from whole experts."""
    base, _, model, inputs = wemoe("bert", routing="batch", exclude="pooler.*")
    shake(model.routers)
    fm.save(model, tmp_path / "merged")
    again = fm.load(tmp_path / "merged", base)
    for a, b in zip(results(again(**inputs)), results(model(**inputs)), strict=True):
        assert torch.equal(a, b)
    assert again.tasks == model.tasks and again.mixes_rows
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "expert2.encoder.layer.0.output.dense.weight" in names
    assert not any(name.startswith("expert") and "attention" in name for name in names)
    other, _, _ = LAYOUTS["bert"]()
    with pytest.raises(ValueError, match="belongs to another base model"):
        fm.load(tmp_path / "merged", other)
    size = sum(p.stat().st_size for p in (tmp_path / "merged").iterdir())
    assert model.nbytes() < size < model.nbytes() + 10_000  # names, shapes and tasks


def test_doors():
    """`fold` takes the method's options, and there is no task to select."""
    _, _, model, inputs = wemoe("clip")
    folded, expected = fm.fold(model, 1, batches=[inputs]), model.fold("expert1", [inputs])
    assert all(torch.equal(value, expected[name]) for name, value in folded.items())
    with pytest.raises(TypeError, match="wemoe follows from its inputs"), fm.task(model, 0):
        pass
