"""A model while it is trained: one optimiser step over all processes and rounds, and the moving average of weights."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from timm.utils import ModelEmaV3
from torch import nn

from timm_dseq.host import to_device

from ..data.order import Draw, sample_seed
from ..run.update import update
from .drop_path import PerSampleDropPath
from .log import Figures
from .settings import Settings

# What is called with the model (wrapped for several processes), a batch on the device, its samples' seeds (B,), and the
# number in the run of its first sample: the loss, summed over the images, (), and facts that are summed likewise.
Loss = Callable[[nn.Module, Any, torch.Tensor, int], tuple[torch.Tensor, dict[str, torch.Tensor]]]
Batch = tuple[torch.Tensor, Any]  # samples (B, 2) as (epoch, index), and what the task's collate makes of them


class Training:
    """The model in training and its optimiser. `wrapped` is the model in DDP, to be called."""

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]],
        loss: Loss,
        config: Settings,
        accelerator: Accelerator,
        ema: ModelEmaV3 | None = None,
        saved: nn.Module | None = None,
    ) -> None:
        """groups: of parameters, with timm's "lr_scale". ema: a moving average of the model's weights, on the device.
        saved: all weights that a checkpoint needs (default: the model's)."""
        self.config, self.accelerator, self.model, self.loss, self.ema = config, accelerator, model, loss, ema
        self.saved = model if saved is None else saved
        self.drop_path = PerSampleDropPath(model)
        self.wrapped = accelerator.prepare(model)
        self.optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, fused=True)

    def step(self, batches: Iterator[Batch], step: int, lr: float) -> Figures:
        """One optimiser step, number `step` of the run; the host does not wait for the device.

        The backward pass runs on sums, and gradients are divided once, by the number of images in the batch of all
        processes and rounds. So how the batch is dealt to them changes nothing.
        """
        self.model.train()
        figures, batch = Figures(), self.config.optim.batch_size
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        for turn in range(self.config.optim.accumulation):
            samples, inputs = next(batches)
            first = (step - 1) * batch + (turn * processes + rank) * len(samples)
            last_turn = turn == self.config.optim.accumulation - 1
            with nullcontext() if last_turn else self.accelerator.no_sync(self.wrapped):
                loss, parts = self._loss(samples, inputs, first)
                loss.backward()
            figures.add(loss, parts, len(samples))
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        clip = self.config.optim.clip
        figures.gradient_norm = update(self.model.parameters(), self.optimizer, batch / processes, clip)
        if self.ema:
            self.ema.update(self.model, step)
        return figures

    def _loss(self, samples: torch.Tensor, inputs: Any, first: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a micro-batch and its parts. first: the number in the run of its first sample."""
        seed, device = self.config.seed, self.accelerator.device
        seeds = to_device(torch.tensor([sample_seed(seed, *sample) for sample in samples.tolist()]), device)
        self.drop_path.draw(seeds)
        torch.manual_seed(sample_seed(seed, first, Draw.DROPOUT))
        with self.accelerator.autocast():
            return self.loss(self.wrapped, send_to_device(inputs, device, non_blocking=True), seeds, first)
