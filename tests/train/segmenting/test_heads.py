"""Batch norm over processes equals torch's over the whole batch, and its gradients do."""

import pytest
import torch
from common.segmenting.heads import BatchNorm
from torch import nn

from ..runs import FORKS


def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 5, 6, generator=generator) * 3 + 7, torch.randn(4, 3, 5, 6, generator=generator)


def trained(norm: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output, all gradients, and the statistics after one step."""
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        norm.bias.copy_(torch.tensor([1.0, 0.0, -1.0]))
    x = x.clone().requires_grad_()
    out = norm.train()(x)
    (out * weights).sum().backward()
    found = {"out": out, "x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    return {name: tensor.detach() for name, tensor in {**found, **dict(norm.named_buffers())}.items()}


def _process(rank: int, port: int, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    x, weights = (tensor[2 * rank : 2 * rank + 2] for tensor in inputs())
    results.put((rank, {name: tensor.numpy() for name, tensor in trained(BatchNorm(3), x, weights).items()}))
    torch.distributed.destroy_process_group()


def test_one_process_has_torchs_batch_norm():
    wanted = trained(nn.BatchNorm2d(3), *inputs())
    for name, tensor in trained(BatchNorm(3), *inputs()).items():
        torch.testing.assert_close(tensor, wanted[name], msg=name)


@pytest.mark.xdist_group("segmentings")
def test_two_processes_have_the_statistics_and_gradients_of_the_whole_batch(unused_port):
    results = FORKS.Queue()
    processes = [FORKS.Process(target=_process, args=(rank, unused_port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
    wanted = trained(nn.BatchNorm2d(3), *inputs())
    for name in ("out", "x"):
        ours = torch.cat([torch.from_numpy(found[rank][name]) for rank in range(2)])
        torch.testing.assert_close(ours, wanted[name], rtol=1e-5, atol=1e-5, msg=name)
    for name in ("weight", "bias"):  # each process has its images' part
        ours = torch.from_numpy(found[0][name] + found[1][name])
        torch.testing.assert_close(ours, wanted[name], rtol=1e-4, atol=1e-4, msg=name)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        for rank in range(2):
            torch.testing.assert_close(torch.from_numpy(found[rank][name]), wanted[name], msg=name)
