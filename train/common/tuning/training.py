"""A backbone with its head while it is fine-tuned: one optimiser step over all processes and rounds, and the EMA."""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from timm.layers import trunc_normal_
from timm.loss import SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3
from torch import nn

from timm_dseq.host import to_device

from ..data.order import Draw, sample_seed
from ..drop_path import PerSampleDropPath
from ..run.update import update
from .augment import Mixer
from .log import Figures
from .settings import Tuning

HEAD_STD = 2e-5  # MAE's: the first logits are near zero, so the backbone is not disturbed

# images (B, 3, S, S) float32, labels (B,), samples (B, 2) as (epoch, index)
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class ClassifierTraining:
    """The classifier in training and its optimiser.

    `model` is trained, and `wrapped` is the same in DDP, to be called. `tested` is tested and exported: the moving
    average if there is one, else the model. `checkpointed` holds all weights that a checkpoint needs.
    """

    def __init__(self, model: nn.Module, config: Tuning, classes: int, accelerator: Accelerator) -> None:
        self.config, self.accelerator, self.model = config, accelerator, model
        head = model.get_classifier()
        if isinstance(head, nn.Linear):
            trunc_normal_(head.weight, std=HEAD_STD)
            nn.init.zeros_(head.bias)
        self.ema = None
        if config.optim.ema:  # copied before anything is wrapped around the model
            self.ema = ModelEmaV3(model, config.optim.ema, use_warmup=True).to(accelerator.device)
        self.tested = self.ema.module if self.ema else model
        self.checkpointed = nn.ModuleDict({"model": model, **({"ema": self.tested} if self.ema else {})})
        if config.system.checkpointing:
            model.set_grad_checkpointing()
        self.drop_path = PerSampleDropPath(model)
        self.mixer = Mixer(config.augment, classes, config.seeds[0])
        self.wrapped = accelerator.prepare(model)
        optim = config.optim
        not_decayed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
        groups = param_groups_layer_decay(model, optim.weight_decay, not_decayed, layer_decay=optim.layer_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=optim.base_lr, betas=optim.betas, fused=True)

    def step(self, batches: Iterator[Batch], step: int, lr: float) -> Figures:
        """One optimiser step, number `step` of the run; the host does not wait for the device.

        The backward pass runs on sums, and gradients are divided once, by the number of images in the batch of all
        processes and rounds. So how the batch is dealt to them changes nothing.
        """
        self.model.train()
        figures, batch = Figures(), self.config.optim.batch_size
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        for turn in range(self.config.optim.accumulation):
            images, labels, samples = next(batches)
            first = (step - 1) * batch + (turn * processes + rank) * len(images)
            last_turn = turn == self.config.optim.accumulation - 1
            with nullcontext() if last_turn else self.accelerator.no_sync(self.wrapped):
                loss = self._loss(images, labels, samples, first)
                loss.backward()
            figures.loss = figures.loss + loss.detach()
            figures.images += len(images)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        clip = self.config.optim.clip
        figures.gradient_norm = update(self.model.parameters(), self.optimizer, batch / processes, clip)
        if self.ema:
            self.ema.update(self.model, step)
        return figures

    def _loss(self, images: torch.Tensor, labels: torch.Tensor, samples: torch.Tensor, first: int) -> torch.Tensor:
        """The loss of a micro-batch, summed over its images: (). first: the number in the run of its first sample."""
        seed, device = self.config.seeds[0], self.accelerator.device
        images, labels = (tensor.to(device, non_blocking=True) for tensor in (images, labels))
        images, targets = self.mixer(images, labels, first)
        seeds = torch.tensor([sample_seed(seed, *sample) for sample in samples.tolist()])
        self.drop_path.draw(to_device(seeds, device))
        torch.manual_seed(sample_seed(seed, first, Draw.DROPOUT))
        with self.accelerator.autocast():
            logits = self.wrapped(images)
        return SoftTargetCrossEntropy()(logits.float(), targets) * len(images)
