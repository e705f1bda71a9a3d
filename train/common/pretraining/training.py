"""One optimiser step of pretraining, over all processes and accumulation rounds, in the run's precision."""

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

from ..data.crops import Colours, normalised
from ..data.decoded import Batch
from ..data.framing import Framing
from ..data.order import RandomStream
from ..run.update import update
from .attention import choose_attention
from .figures import Figures
from .model import optimizer_of
from .precision import Precision
from .schedule import Now
from .settings import Config


class Training:
    """The model and its optimiser. `model` is the DSeqJEPA itself, `wrapped` the same in DDP or FSDP2, to be called."""

    def __init__(self, model: DSeqJEPA, config: Config, precision: Precision, accelerator: Accelerator) -> None:
        self.config, self.precision, self.accelerator, self.model = config, precision, accelerator, model
        model.explicit_attention(accelerator.device.type == "cpu" and precision.name == "bf16")
        model.to(accelerator.device)
        micro_batch = config.optim.batch_size // config.optim.accumulation // accelerator.num_processes
        self.attention = choose_attention(model, precision, micro_batch)
        if config.system.compile is True or (config.system.compile == "auto" and accelerator.device.type == "cuda"):
            model.compile()
        self.wrapped = wrap(model, config, accelerator)
        self.optimizer = optimizer_of(model, config.optim)
        data = config.data
        self.framing = framing_of(config, model)
        self.colours = Colours(data.color_jitter, data.hue, data.gray, data.solarize)

    def step(self, batches: Iterator[Batch], now: Now, fetch: torch.Tensor | None = None) -> Figures:
        """One optimiser step; the host waits for the device once, for the numbers that a plan needs.

        The backward pass runs on sums, and gradients are divided once, by the number of target tokens in the batch of
        all processes and rounds. So how the batch is dealt to them changes nothing.

        fetch: numbers on the device that the same copy brings to the host, as the figures' `fetched`.
        """
        config, accelerator, device, figures = self.config, self.accelerator, self.accelerator.device, Figures()
        framing = self.framing
        for last_round in [False] * (config.optim.accumulation - 1) + [True]:
            pixels, samples, broken = next(batches)
            every_seed = to_device(framing.seeds(samples), device)
            seeds = every_seed[:: framing.crops]
            inputs = {name: self._coloured(x, seeds if name == "images" else every_seed) for name, x in pixels.items()}
            if framing.views:
                inputs["windows"] = framing.windows(every_seed)
            if framing.whole:
                inputs["use_regions"] = uniform(seeds, 1, stream=RandomStream.COINS)[:, 0] < now.regions
                inputs["blocks"] = block_masks(framing.grid, seeds)
            with gradient_sync(self.wrapped, last_round), self.precision.autocast():
                loss, count, facts = self.wrapped(**inputs, fetch=fetch)
                loss.backward()
            figures.add(loss, count, facts, samples, broken)
            fetch = None  # the first round has brought it

        for group in self.optimizer.param_groups:
            group["lr"] = now.lr
            group["weight_decay"] = now.weight_decay if group["decays"] else 0.0
        figures.total = accelerator.reduce(torch.full_like(figures.loss, figures.count), "sum")
        divisor = figures.total / accelerator.num_processes  # DDP and FSDP2 have averaged the gradients of processes
        figures.gradient_norm = update(self.wrapped.parameters(), self.optimizer, divisor, config.optim.clip)
        self.model.update_target(now.momentum)
        return figures

    def _coloured(self, crops: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        """uint8 (n, 3, H, W) → what the model takes, on the device, the colours changed by seeds (n,)."""
        crops = self.colours(crops.to(self.accelerator.device, non_blocking=True), seeds)
        return normalised(crops, self.precision.dtype)


def framing_of(config: Config, model: DSeqJEPA) -> Framing:
    """What the model is to see of a run's images."""
    data, settings = config.data, config.model
    return Framing(
        config.seed,
        settings.img_size,
        data.crop_scale,
        data.flip,
        whole=model.predicts,
        views=model.views,
        grid=model.student.patch_embed.grid_size,
        share=settings.view_share,
    )


def wrap(model: DSeqJEPA, config: Config, accelerator: Accelerator) -> torch.nn.Module:
    """The model for all processes: a copy in each (DDP) or sharded (FSDP2), also where the only process is a group."""
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
def gradient_sync(wrapped: torch.nn.Module, on: bool) -> Iterator[None]:
    """Whether this backward pass averages gradients over processes: it does in the last round of a step."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(on)
    elif isinstance(wrapped, DistributedDataParallel) and not on:
        with wrapped.no_sync():
            yield
        return
    yield
