"""Coefficients of one model for another of a different depth."""

from __future__ import annotations

import pytest
import torch

import fastmerge as fm
from fastmerge.coefficients import Coefficients, load_coefficients

from .layouts import DECODER, t5, transformers
from .plain import make_experts


def _names(depth, extra=("embed.weight", "head.weight")):
    blocks = [f"model.layers.{i}.{t}" for i in range(depth) for t in ("q.weight", "norm.weight")]
    return [extra[0], *blocks, *extra[1:]]


def _shapes(depth):
    return {name: [3, 2] if name.endswith(("q.weight", "head.weight")) else [3]
            for name in _names(depth)}  # fmt: skip


def _learned(depth, **options):
    """Coefficients whose value tells the block: (b + 1) / 100 for q, its half for norm."""
    names = _names(depth)
    values = [
        (int(n.split(".")[2]) + 1) / (100 if "q." in n else 200) if "layers" in n else 0.9
        for n in names
    ]
    init = torch.tensor(values).unsqueeze(1) * torch.tensor([1.0, 0.5])
    shapes = list(_shapes(depth).values())
    return Coefficients(names, ["a", "b"], init=init, shapes=shapes, **options)


def _row(coefficients, name):
    return coefficients.matrix()[coefficients.labels.index(name)].tolist()


@pytest.mark.parametrize(
    "source, target, blocks",
    [
        (2, 4, [1, 1, 2, 2]),
        (12, 24, [b for b in range(1, 13) for _ in range(2)]),
        (4, 2, [2, 4]),
        (3, 3, [1, 2, 3]),
        (3, 5, [1, 2, 2, 3, 3]),
        (1, 3, [1, 1, 1]),
        (3, 1, [3]),
    ],
)
def test_blocks_take_the_relative_position(source, target, blocks):
    transferred = fm.transfer_coefficients(_learned(source), _shapes(target))
    assert transferred.names == _names(target) and transferred.experts == ["a", "b"]
    for i, block in enumerate(blocks):
        expected = [block / 100, block / 200]
        assert _row(transferred, f"model.layers.{i}.q.weight") == pytest.approx(expected)
        assert _row(transferred, f"model.layers.{i}.norm.weight")[0] == pytest.approx(block / 200)
    assert _row(transferred, "embed.weight") == pytest.approx([0.9, 0.45])


@pytest.mark.parametrize(
    "source, target, blocks",
    [(2, 3, [1, 1.5, 2]), (3, 2, [1, 3]), (12, 12, range(1, 13)), (1, 2, [1, 1]), (4, 1, [2.5]),
     (3, 5, [1, 1.5, 2, 2.5, 3])],
)  # fmt: skip
def test_interpolation_is_linear_in_the_position(source, target, blocks):
    transferred = fm.transfer_coefficients(_learned(source), _shapes(target), interpolate=True)
    for i, block in enumerate(blocks):
        assert _row(transferred, f"model.layers.{i}.q.weight")[0] == pytest.approx(block / 100)


@pytest.mark.parametrize("parametrization", ["identity", "tanh", "softmax"])
@pytest.mark.parametrize("granularity", ["task", "block", "layer"])
def test_the_same_depth_gives_the_same_coefficients(granularity, parametrization):
    torch.manual_seed(0)
    shapes = list(_shapes(3).values())
    learned = Coefficients(
        _names(3), ["a", "b"], granularity=granularity, parametrization=parametrization,
        shapes=shapes, clamp=None,
    )  # fmt: skip
    with torch.no_grad():
        learned.raw.add_(torch.randn_like(learned.raw))
    for interpolate in (False, True):
        transferred = fm.transfer_coefficients(learned, _shapes(3), interpolate=interpolate)
        assert torch.equal(transferred.matrix(), learned.matrix())


def test_chunks_go_along():
    shapes = _shapes(2)
    chunks = {"model.layers.0.q.weight": 2, "model.layers.1.q.weight": 3}
    learned = Coefficients(
        list(shapes), ["a"], granularity="chunk", chunks=chunks, shapes=list(shapes.values()),
        init=torch.rand(9, 1),
    )  # fmt: skip
    assert len(learned.labels) == 9
    transferred = fm.transfer_coefficients(learned, _shapes(4))
    assert [transferred.chunks[transferred.names.index(f"model.layers.{i}.q.weight")]
            for i in range(4)] == [2, 2, 3, 3]  # fmt: skip
    assert _row(transferred, "model.layers.3.q.weight#2") == _row(
        learned, "model.layers.1.q.weight#2"
    )
    with pytest.raises(ValueError, match=r"layers\.0\.q\.weight' has 2 chunks and .* 3"):
        fm.transfer_coefficients(learned, _shapes(3), interpolate=True)


def test_from_a_small_llama_to_a_deeper_one(tmp_path):
    torch.manual_seed(1)
    small, deep = (
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                **(DECODER | {"num_hidden_layers": depth, "hidden_size": size})
            )
        ).eval()
        for depth, size in ((2, 16), (4, 32))
    )
    learned = fm.attach(small, make_experts(small, 2), granularity="block")
    with torch.no_grad():
        learned.raw.uniform_(0, 0.5)
    path = tmp_path / "transferred.safetensors"
    fm.transfer_coefficients(learned, deep).save(path)
    coefficients = fm.attach(deep, make_experts(deep, 2), granularity="block", init=path)
    for i in range(4):
        expected = learned.raw[learned.groups.index(f"model.layers.{i // 2}")]
        found = coefficients.raw[coefficients.groups.index(f"model.layers.{i}")]
        torch.testing.assert_close(found, expected)
    assert deep(input_ids=torch.tensor([[1, 2]]))[0].shape == (1, 2, 50)
    assert torch.equal(load_coefficients(path).matrix(), coefficients.matrix())


def test_lists_of_blocks_are_counted_apart():
    """T5: encoder and decoder, and a tensor that only the first block has."""
    torch.manual_seed(2)
    model, _, _ = t5()
    names = [n for n, _ in model.named_parameters()]
    bias = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    learned = Coefficients(names, ["a"], init=torch.rand(len(names), 1))
    added = [
        n.replace("decoder.block.1", "decoder.block.2") for n in names if "decoder.block.1" in n
    ]
    deeper = {name: [1] for name in (*names, *added)}
    transferred = fm.transfer_coefficients(learned, deeper)
    for side in ("encoder", "decoder"):
        assert _row(transferred, f"{side}.{bias}") == _row(learned, f"{side}.{bias}")
    tensor = "layer.0.SelfAttention.q.weight"
    for i, (encoder, decoder) in enumerate([(0, 0), (1, 1)]):
        assert _row(transferred, f"encoder.block.{i}.{tensor}") == _row(
            learned, f"encoder.block.{encoder}.{tensor}"
        )
        assert _row(transferred, f"decoder.block.{i}.{tensor}") == _row(
            learned, f"decoder.block.{decoder}.{tensor}"
        )
    assert _row(transferred, f"decoder.block.2.{tensor}") == _row(
        learned, f"decoder.block.1.{tensor}"
    )


def test_a_tensor_without_counterpart_is_named():
    target = _shapes(2) | {"model.layers.0.gate.weight": [2]}
    with pytest.raises(ValueError, match=r"none for 'model\.layers\.0\.gate\.weight'"):
        fm.transfer_coefficients(_learned(2), target)
    left = fm.transfer_coefficients(_learned(2), target, exclude="*gate*")
    assert left.names == _names(2)
