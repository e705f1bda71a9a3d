"""A dense model while it is trained: one optimiser step over all processes and rounds."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from timm.optim import param_groups_layer_decay
from torch import nn

from timm_dseq.host import to_device

from ..data.order import Draw, sample_seed
from ..drop_path import PerSampleDropPath
from ..run.update import update
from .backbone import DenseBackbone
from .log import Figures
from .settings import Optim, Settings

# What is called with the model (wrapped for several processes), a batch on the device, and its samples' seeds (B,):
# the loss, summed over the images, (), and facts that are summed likewise.
Loss = Callable[[nn.Module, Any, torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]]
Batch = tuple[torch.Tensor, Any]  # samples (B, 2) as (epoch, index), and what the task's collate makes of them


class DenseTraining:
    """The model in training and its optimiser. `wrapped` is the model in DDP, to be called."""

    def __init__(self, model: nn.Module, loss: Loss, config: Settings, accelerator: Accelerator) -> None:
        self.config, self.accelerator, self.model, self.loss = config, accelerator, model, loss
        backbone_of(model).checkpointing = config.system.checkpointing
        self.drop_path = PerSampleDropPath(model)
        self.wrapped = accelerator.prepare(model)
        groups = layer_groups(model, config.optim)
        self.optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, betas=config.optim.betas, fused=True)

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
        return figures

    def _loss(self, samples: torch.Tensor, inputs: Any, first: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a micro-batch and its parts. first: the number in the run of its first sample."""
        seed, device = self.config.seed, self.accelerator.device
        seeds = to_device(torch.tensor([sample_seed(seed, *sample) for sample in samples.tolist()]), device)
        self.drop_path.draw(seeds)
        torch.manual_seed(sample_seed(seed, first, Draw.DROPOUT))
        with self.accelerator.autocast():
            return self.loss(self.wrapped, send_to_device(inputs, device, non_blocking=True), seeds)


def backbone_of(model: nn.Module) -> DenseBackbone:
    """The dense backbone that is a part of the model."""
    return next(module for module in model.modules() if isinstance(module, DenseBackbone))


def layer_groups(model: nn.Module, optim: Optim) -> list[dict[str, Any]]:
    """timm's groups with layer decay: the layers of the ViT, then at full rate all that is built on it."""
    layers = _Layers(backbone_of(model).vit, model)
    not_decayed = {f"vit.{name}" for name in layers.vit.no_weight_decay()}
    return param_groups_layer_decay(layers, optim.weight_decay, not_decayed, layer_decay=optim.layer_decay)


class _Layers(nn.Module):
    """A ViT and a model that it is part of, for timm: a parameter that is in both has the first name alone."""

    def __init__(self, vit: nn.Module, model: nn.Module) -> None:
        super().__init__()
        self.vit, self.model = vit, model

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[float, ...]]:
        return self._layer

    @staticmethod
    def _layer(name: str) -> tuple[float, ...]:
        """The place of a parameter's layer in the order of layers: the stem, each block, the rest."""
        part, inner, number, *_ = [*name.split("."), "", ""]
        if part == "vit" and inner == "blocks":
            return 1.0, float(number)
        return (0.0,) if part == "vit" and inner not in ("norm", "fc_norm") else (float("inf"),)
