"""Data parallel with merged weights, and the ways to shard them that are refused."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastmerge as fm

from .attached import attached, loss_of
from .plain import make_experts

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo"
)


@pytest.fixture
def it():
    return attached()


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    gc.collect()  # the last wrapper must not take the group with it, whose threads want the GIL
    dist.destroy_process_group()


def test_data_parallel(it):
    assert it.learns(nn.DataParallel(it.net)(it.x))


def test_distributed_data_parallel(it, group):
    it.net.coefficients = it.coefficients
    wrapped = DistributedDataParallel(it.net)
    assert it.learns(wrapped(it.x)) and it.learns(wrapped(it.x))
    del it.net.coefficients
    fm.detach(it.net)
    assert not hasattr(it.net, "_ddp_params_and_buffers_to_ignore")


def test_data_parallel_that_does_not_know_the_coefficients(it, group):
    with pytest.raises(RuntimeError, match="any parameter that requires a gradient"):
        DistributedDataParallel(it.net)
    fm.detach(it.net)
    fm.attach(it.net, it.experts, include="up.*")
    wrapped = DistributedDataParallel(it.net)  # which finds other parameters to train
    with pytest.raises(RuntimeError, match=r"set model\.coefficients = coefficients before"):
        wrapped(it.x)
    with torch.no_grad():
        wrapped(it.x)


def test_data_parallel_around_a_larger_model(it, group):
    it.net.coefficients = it.coefficients
    with pytest.raises(NotImplementedError, match="the very model that was attached"):
        DistributedDataParallel(nn.Sequential(it.net, nn.Linear(3, 2)))
    whole = nn.Sequential(it.base, nn.Linear(3, 2))
    experts = make_experts(whole, 2)
    coefficients = fm.attach(whole, experts, include="0.*")
    whole[0].coefficients = coefficients  # nn.Sequential would call one of its own
    loss_of(DistributedDataParallel(whole)(it.x)).backward()
    assert coefficients.raw.grad.abs().min() > 0 and whole[1].weight.grad.abs().max() > 0


def _rank(rank: int, port: int, folder: Path) -> None:
    """One of two processes, each with rows of its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=2)
    it = attached()
    it.net.coefficients = it.coefficients
    with torch.no_grad():
        it.coefficients.raw.add_(0.1 * rank)  # the first process's values win
    wrapped = DistributedDataParallel(it.net)
    loss_of(wrapped(it.x[2 * rank : 2 * rank + 2])).backward()
    raw = it.coefficients.raw
    torch.save({"raw": raw.detach(), "gradient": raw.grad}, folder / f"{rank}.pt")
    dist.barrier()
    os._exit(0)  # without waiting for gloo's threads, which may wait for this one


def test_two_processes_average_the_coefficients_gradients(it, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # forked processes need not import torch again; with a GPU its threads forbid forking
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    processes = [
        context.Process(target=_rank, args=(r, port, tmp_path), daemon=True) for r in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    expected = (it.gradient(it.x[:2]) + it.gradient(it.x[2:4])) / 2
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["raw"], it.coefficients.raw.detach())
        torch.testing.assert_close(found["gradient"], expected)


def test_fully_sharded(it, group):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    with pytest.raises(RuntimeError, match=r"cannot be sharded.*fastmerge\.materialize"):
        fsdp.fully_shard(it.net, mesh=mesh)
    for original in (True, False):
        with pytest.raises(RuntimeError, match=r"cannot be sharded.*fastmerge\.materialize"):
            fsdp.FullyShardedDataParallel(
                attached().net, use_orig_params=original, device_id=torch.device("cpu")
            )


def test_distributed_tensors(it, group):
    tensor = pytest.importorskip("torch.distributed.tensor")
    parallel = pytest.importorskip("torch.distributed.tensor.parallel")
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    with pytest.raises(RuntimeError, match="leaf"):
        tensor.distribute_tensor(it.weight, mesh, [tensor.Replicate()])
    with pytest.raises(RuntimeError, match="leaf"):
        parallel.parallelize_module(it.net, mesh, {"up": parallel.ColwiseParallel()})
    assert it.learns()


def test_collectives(it, group):
    for collective in (
        lambda: dist.broadcast(it.weight, 0),
        lambda: dist.all_reduce(it.weight),
        lambda: dist.broadcast(it.weight.data, 0),
    ):
        with pytest.raises(NotImplementedError, match=r"reached merged weight 'up\.weight'"):
            collective()
