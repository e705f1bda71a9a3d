"""The model while it is pretrained: over all processes, in the run's precision, one optimiser step at a time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from timm_dseq import DSeqJEPA, UserError, block_masks
from timm_dseq.engine.random import uniform
from timm_dseq.host import to_device

from ..data.crops import augmented, normalised
from ..data.order import RandomStream, sample_seeds
from ..run.update import update
from .attention import choose_attention
from .figures import Figures
from .model import optimizer_of
from .precision import Precision
from .schedule import Now
from .settings import Config

Batch = tuple[torch.Tensor, torch.Tensor, list[str]]  # images (B, 3, S, S) uint8, (epoch, index) (B, 2), what is broken


class Training:
    """`model` is what learns; `whole` is the same as all processes call it."""

    def __init__(self, model: DSeqJEPA, config: Config, precision: Precision, accelerator: Accelerator) -> None:
        self.config, self.precision, self.accelerator, self.model = config, precision, accelerator, model
        model.explicit_attention(accelerator.device.type == "cpu" and precision.name == "bf16")
        model.to(accelerator.device)
        micro_batch = config.optim.batch_size // config.optim.accumulation // accelerator.num_processes
        self.attention = choose_attention(model, precision, micro_batch)
        if config.system.compile is True or (config.system.compile == "auto" and accelerator.device.type == "cuda"):
            model.compile()
        self.whole = spread(model, config, accelerator)
        self.optimizer = optimizer_of(model, config.optim)

    def step(self, batches: Iterator[Batch], now: Now, fetch: torch.Tensor | None = None) -> Figures:
        """One optimiser step over all processes and accumulation rounds; the host waits for the device once.

        fetch: numbers on the device that come to the host with that one copy, as the figures' `fetched`.

        The backward runs on sums, and gradients are divided once by the number of target tokens of the whole batch:
        how it is dealt to processes and rounds changes nothing.
        """
        config, accelerator, device, figures = self.config, self.accelerator, self.accelerator.device, Figures()
        for last_round in [False] * (config.optim.accumulation - 1) + [True]:
            images, samples, broken = next(batches)
            seeds = to_device(sample_seeds(config.seed, samples), device)
            coins = uniform(seeds, 1, stream=RandomStream.COINS)[:, 0] < now.regions
            images = augmented(images.to(device, non_blocking=True), seeds, config.data.flip, config.data.color_jitter)
            inputs = normalised(images, self.precision.dtype)
            blocks = block_masks(self.model.student.patch_embed.grid_size, seeds)
            with gathering(self.whole, last_round), self.precision.autocast():
                loss, count, facts = self.whole(inputs, coins, blocks, fetch=fetch)
                loss.backward()
            figures.add(loss, count, facts, samples, broken)
            fetch = None  # it came in the first round

        for group in self.optimizer.param_groups:
            group["lr"] = now.lr
            group["weight_decay"] = now.weight_decay if group["decays"] else 0.0
        figures.total = accelerator.reduce(torch.full_like(figures.loss, figures.count), "sum")
        # processes have averaged their gradients
        divisor = figures.total / accelerator.num_processes
        figures.gradient_norm = update(self.whole.parameters(), self.optimizer, divisor, config.optim.clip)
        self.model.update_target(now.momentum)
        return figures


def spread(model: DSeqJEPA, config: Config, accelerator: Accelerator) -> torch.nn.Module:
    """The model over all processes: whole in each (DDP), or sharded (FSDP2), in a group of one, too."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        raise UserError("FSDP is a setting of this script: launch without --use_fsdp, and give --system.fsdp=true.")
    if not config.system.fsdp or not dist.is_initialized():
        return accelerator.prepare(model)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    model.to(accelerator.device)
    for block in (*model.student.blocks, *model.target.blocks, *model.predictor.blocks):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@contextmanager
def gathering(whole: torch.nn.Module, now: bool) -> Iterator[None]:
    """Gradients meet over the processes in the last round of a step only."""
    if isinstance(whole, FSDPModule):
        whole.set_requires_gradient_sync(now)
    elif isinstance(whole, DistributedDataParallel) and not now:
        with whole.no_sync():
            yield
        return
    yield
