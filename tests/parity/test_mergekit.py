"""Merge recipes' methods beside mergekit's own, on pico models of three architectures.

Runs where FASTMERGE_MERGEKIT_PYTHON names the interpreter of an environment with mergekit 0.1.5,
which pins what our own environment does not.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastmerge as fm
from fastmerge.methods import Block, make_method, run_passes

INTERPRETER = os.environ.get("FASTMERGE_MERGEKIT_PYTHON")
pytestmark = pytest.mark.skipif(
    not INTERPRETER, reason="FASTMERGE_MERGEKIT_PYTHON names no interpreter with mergekit"
)

W = [1.0, 0.5, 0.8, 0.3]
# mergekit's name, its parameters, our method and parameters, number of experts, inputs
CASES = [
    ("linear", {"weight": W}, "linear", {"weight": W}, 4, "experts"),
    (
        "linear",
        {"weight": W, "normalize": False},
        "linear",
        {"weight": W, "normalize": False},
        4,
        "experts",
    ),
    (
        "task_arithmetic",
        {"weight": W, "lambda": 0.7},
        "task_arithmetic",
        {"weight": W, "scaling": 0.7},
        4,
        "base",
    ),
    (
        "task_arithmetic",
        {"weight": W, "normalize": True},
        "task_arithmetic",
        {"weight": W, "normalize": True, "scaling": 1.0},
        4,
        "base",
    ),
    (
        "ties",
        {"weight": W, "density": 0.3},
        "weighted_ties",
        {"weight": W, "density": 0.3},
        4,
        "base",
    ),
    (
        "ties",
        {"weight": W, "density": [0.1, 0.5, 1.0, 0.7], "normalize": False, "rescale": True},
        "weighted_ties",
        {"weight": W, "density": [0.1, 0.5, 1.0, 0.7], "normalize": False, "rescale": True},
        4,
        "base",
    ),
    ("dare_linear", {"weight": W}, "dare_linear", {"weight": W}, 4, "base"),
    ("dare_ties", {"weight": W}, "dare_ties", {"weight": W}, 4, "base"),
    ("della", {"weight": W}, "della", {"weight": W}, 4, "base"),
    *(
        (name, more, name, more, 4, "base")
        for name in ("breadcrumbs", "breadcrumbs_ties")
        for more in (
            {"weight": W, "density": 0.4},
            {"weight": W, "density": 0.9, "gamma": 0.3, "normalize": True, "rescale": True},
        )
    ),
    ("slerp", {"t": 0.3}, "slerp", {"t": 0.3}, 1, "base"),
    ("nuslerp", {"weight": W[:2]}, "nuslerp", {"weight": W[:2]}, 2, "base"),
    ("nuslerp", {"weight": W[:2]}, "nuslerp", {"weight": W[:2]}, 2, "experts"),
    *(
        ("nuslerp", {"weight": W[:2], **more}, "nuslerp", {"weight": W[:2], **more}, 2, "base")
        for more in (
            {"nuslerp_flatten": False},
            {"nuslerp_flatten": False, "nuslerp_row_wise": True},
        )
    ),
    ("multislerp", {"weight": W}, "multislerp", {"weight": W}, 4, "base"),
    ("multislerp", {"weight": W}, "multislerp", {"weight": W}, 4, "experts"),
    ("karcher", {}, "karcher", {}, 4, "experts"),
    ("model_stock", {}, "model_stock", {}, 4, "base"),
    ("model_stock", {"filter_wise": True}, "model_stock", {"filter_wise": True}, 4, "base"),
    ("sce", {}, "sce", {}, 4, "base"),
    ("sce", {"select_topk": 0.3}, "sce", {"select_topk": 0.3}, 4, "base"),
    ("nearswap", {"t": 0.005}, "nearswap", {"t": 0.005}, 1, "base"),
    ("arcee_fusion", {}, "arcee_fusion", {}, 1, "base"),
    ("ram", {"epsilon": 0.01}, "ram", {"epsilon": 0.01}, 4, "base"),
    ("ramplus_tl", {"epsilon": 0.01}, "ramplus_tl", {"epsilon": 0.01}, 4, "base"),
    ("passthrough", {"scale": 0.3}, "passthrough", {"scale": 0.3}, 1, "experts"),
]
ARCHITECTURES = ["llama", "gpt2", "bert"]


def pico(architecture: str) -> dict[str, torch.Tensor]:
    """A random model's floating-point parameters, tied ones once."""
    import transformers as tf

    torch.manual_seed(0)
    if architecture == "llama":
        config = tf.LlamaConfig(
            vocab_size=96,
            hidden_size=48,
            intermediate_size=72,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model = tf.LlamaForCausalLM(config)
    elif architecture == "gpt2":
        model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=96, n_embd=48, n_layer=2, n_head=4))
    else:
        config = tf.BertConfig(
            vocab_size=96,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=72,
        )
        model = tf.BertForMaskedLM(config)
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def tuned(base: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        for name, tensor in base.items()
    }


def run_mergekit(folder: Path, models: dict[str, dict], jobs: list[dict]) -> list[dict]:
    """mergekit's results of jobs over named models."""
    for name, tensors in models.items():
        save_file(tensors, folder / name)
    for number, job in enumerate(jobs):
        job["out"] = f"out{number}"
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("mergekit_side.py")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([INTERPRETER, script, folder], check=True, env=environment)
    return [load_file(folder / job["out"]) for job in jobs]


# what fp32 decides by its rounding, mergekit computes in fp64 for the comparison
ILL_CONDITIONED = {"nuslerp", "arcee_fusion"}


def job_of(case, dtype=None):
    method, parameters, _, _, count, inputs = case
    parameters = dict(parameters)
    experts = [f"expert{k}" for k in range(count)]
    for name in ("weight", "density"):
        if isinstance(parameters.get(name), list):
            parameters[name] = dict(zip(experts, parameters[name], strict=True))
    return {
        "method": method,
        "parameters": parameters,
        "models": experts if inputs == "experts" else ["base", *experts],
        "base": None if inputs == "experts" else "base",
        "dtype": dtype or ("float64" if method in ILL_CONDITIONED else "float32"),
    }


def ours(case, models, **more):
    _, _, method, parameters, count, inputs = case
    experts = [models[f"expert{k}"] for k in range(count)]
    if inputs == "experts":
        return merge_without_base(make_method(method, **parameters), experts)
    return fm.merge(models["base"], experts, method, **parameters, **more)


def merge_without_base(method, experts):
    merged = {}
    for name, tensor in experts[0].items():
        block = Block(name, None, [expert[name] for expert in experts])
        stats = run_passes(method.passes(tensor.dtype), lambda block=block: [block])
        merged[name] = method.combine(block, stats.of(name))
    return merged


def models_of(architecture):
    base = pico(architecture)
    return {"base": base, **{f"expert{k}": tuned(base, k) for k in range(4)}}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def fp32(request, tmp_path_factory):
    models = models_of(request.param)
    results = run_mergekit(tmp_path_factory.mktemp("fp32"), models, [job_of(c) for c in CASES])
    return models, results


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: f"{CASES[i][0]}{i}")
def test_fp32_results_agree(fp32, number):
    models, results = fp32
    theirs, found = results[number], ours(CASES[number], models)
    assert set(theirs) == set(found)
    for name, expected in theirs.items():
        error = (found[name].double() - expected.double()).norm()
        assert error <= 1e-5 * expected.double().norm(), (name, float(error / expected.norm()))


NEARER = [
    case
    for case in CASES
    if case[0] in ("task_arithmetic", "multislerp", "karcher", "model_stock", "nearswap", "ram")
    or case[:2] in (("sce", {}), ("dare_linear", {"weight": W}))
]


def test_bf16_results_are_nearer_to_fp64(tmp_path):
    """Where mergekit rounds every intermediate to the bf16 it works in."""
    models = {
        name: {n: t.bfloat16() for n, t in tensors.items()}
        for name, tensors in models_of("llama").items()
    }
    jobs = [job_of(case, dtype) for case in NEARER for dtype in ("bfloat16", "float64")]
    results = run_mergekit(tmp_path, models, jobs)
    for case, theirs, truth in zip(NEARER, results[::2], results[1::2], strict=True):
        found = ours(case, models)
        for name, exact in truth.items():
            mine, other = ((m[name].double() - exact).norm() for m in (found, theirs))
            assert mine <= other * 1.001, (case[:2], name, float(mine), float(other))
            assert mine <= 2**-8 * exact.norm(), (case[:2], name)


def kept(merged, base):
    return (merged["w"] - base["w"]) != 0


def test_selections_keep_as_many_entries_and_the_largest(tmp_path):
    """In bf16 many magnitudes are equal; mergekit breaks ties in no particular order."""
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.zeros(64, 100, dtype=torch.bfloat16)}
    expert = {"w": (torch.randn(64, 100, generator=generator) * 0.01).bfloat16()}
    models = {"base": base, "expert0": expert}
    cases = [
        ("ties", {"weight": 1.0, "density": 0.37}, "weighted_ties"),
        ("breadcrumbs", {"weight": 1.0, "density": 0.37, "gamma": 0.13}, "breadcrumbs"),
    ]
    cases = [(name, more, method, more, 1, "base") for name, more, method in cases]
    results = run_mergekit(tmp_path, models, [job_of(case, "bfloat16") for case in cases])
    for case, theirs in zip(cases, results, strict=True):
        mine, other = kept(ours(case, models), base), kept(theirs, base)
        sizes = [expert["w"][mask].abs().float().sort().values for mask in (mine, other)]
        assert torch.equal(*sizes), case[0]


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_random_methods_agree_in_distribution(tmp_path, method):
    """Fractions kept in each tenth of the ranks of a row, and the L1 norm."""
    rows, width, density = 400, 100, 0.4
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.zeros(rows, width)}
    expert = {"w": torch.randn(rows, width, generator=generator)}
    models = {"base": base, "expert0": expert}
    parameters = {"weight": 1.0, "density": density}
    case = (method, parameters, method, parameters, 1, "base")
    (theirs,) = run_mergekit(tmp_path, models, [job_of(case)])
    merged = ours(case, models)
    norm = expert["w"].abs().sum()
    rank = expert["w"].abs().argsort(dim=1).argsort(dim=1)
    for result in (theirs, merged):
        assert abs(result["w"].abs().sum() - norm) <= 1e-5 * norm
    for tenth in range(10):
        group = rank // 10 == tenth
        fractions = [kept(result, base)[group].double().mean() for result in (theirs, merged)]
        noise = math.sqrt(2 * 0.25 / (rows * 10))
        assert abs(fractions[0] - fractions[1]) < 5 * noise, (tenth, fractions)
