"""P8: a mixed batch of eight tasks through models that keep their experts."""

from __future__ import annotations

import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastmerge as fm

from .dynamic_models import IMAGES_PER_TASK, ROWS, mixed_ids, routed
from .forward_memory import PLAIN, peak_of_forward
from .fusion_process import figures
from .side_by_side import Results, interleaved
from .step_models import draw_images
from .vision import TASKS, build

CASE = f"ViT-B/32, a mixed batch of {TASKS * IMAGES_PER_TASK} images, K={TASKS}"


@pytest.fixture(scope="module")
def models(device, small):
    return build(small, device)


@pytest.mark.parametrize("name", ROWS)
def test_mixed_batch(benchmark, name, models, device, rounds, small, results: Results):
    """Forward passes in turns with the plain model's."""
    base, experts = models
    images = draw_images(IMAGES_PER_TASK, small, device)
    run = ROWS[name](base, experts)
    with torch.inference_mode():
        assert run(images).shape == base(images).shape
        variants = {"plain forward": lambda: base(images), name: lambda: run(images)}
        seconds = interleaved(variants, device, max(3, rounds // 3))
        ratios = results.add("P8", CASE, seconds, "plain forward")
        benchmark.extra_info["ratio"] = ratios[name]
        benchmark.pedantic(variants[name], rounds=1)


def test_wemoe_beside_fusion_bench(models, device, rounds, small, results: Results, tmp_path):
    """FusionBench's own class, which adds up the MLPs of every sample: one pass over the images.

    Ours is timed before and after its process. Answers agree.
    """
    if device.type != "cpu":
        pytest.skip("FusionBench's process runs on the CPU")
    base, experts = models
    images = draw_images(IMAGES_PER_TASK, small, device)
    model = routed(base, experts)
    routers, outputs = tmp_path / "routers.safetensors", tmp_path / "outputs.safetensors"
    save_file({name: p.detach() for name, p in model.routers.named_parameters()}, routers)
    variants = {"plain forward": lambda: base(images), "wemoe": lambda: model(images)}
    half = max(1, rounds // 6)
    with torch.inference_mode():
        before = interleaved(variants, device, half)
        sizes = ["--images", str(IMAGES_PER_TASK), *(["--small"] if small else [])]
        theirs = figures("fusion_wemoe.py", str(routers), str(outputs), *sizes)
        if theirs is None:
            pytest.skip("FASTMERGE_FUSIONBENCH names no interpreter")
        after = interleaved(variants, device, half)
        expected, found = load_file(outputs)["outputs"], model(images)
    assert (found - expected).norm() <= 1e-4 * expected.norm()
    results.add("P8", f"{CASE}, FusionBench's process", theirs["seconds"], "plain forward")
    ours = {name: (before[name] + after[name]) / 2 for name in variants}
    beside = {"wemoe": ours["wemoe"], "fusion_bench": theirs["seconds"]["fusion_bench"]}
    results.add("P8", f"{CASE}, beside FusionBench", beside, "wemoe")


def test_memory(device, small, results: Results):
    """The peak of a forward pass above what the model keeps, over the plain model's."""
    if device.type != "cpu":
        pytest.skip("measures a process's memory")
    peaks = {way: peak_of_forward(way, small) for way in (PLAIN, "emr", "wemoe")}
    if None in peaks.values():
        pytest.skip("this system does not tell a process's peak memory")
    for way, peak in peaks.items():
        results.add_value("P8", f"{CASE}, memory", way, peak / peaks[PLAIN], PLAIN, peak)


@pytest.mark.parametrize("method", ["emr", "tall"])
def test_switch(method, models, results: Results):
    """Selecting a task for every sample, and going back: milliseconds."""
    base, experts = models
    model, ids = fm.build(base, experts, method=method), mixed_ids()
    taken = []
    for _ in range(50):
        start = time.perf_counter()
        with fm.task(model, ids):
            taken.append(time.perf_counter() - start)
    results.add_value("P8", f"{method}: switching {len(ids)} tasks", method, 1e3 * min(taken), "ms")
    assert min(taken) < 1e-3
