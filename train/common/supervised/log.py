"""The log of a supervised run: what its lines hold."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from ..run.log import Step, StepLog


@dataclass
class Figures:
    """Sums over the images of one step, in this process; tensors stay on the device."""

    loss: torch.Tensor | float = 0.0  # ()
    parts: dict[str, torch.Tensor] = field(default_factory=dict)  # of the loss, or other facts, each ()
    images: int = 0
    gradient_norm: torch.Tensor | None = None  # ()

    def add(self, loss: torch.Tensor, parts: dict[str, torch.Tensor], images: int) -> None:
        """Take a round's."""
        self.loss, self.images = self.loss + loss.detach(), self.images + images
        for name, value in parts.items():
            self.parts[name] = self.parts.get(name, 0.0) + value.detach()


class SupervisedLog(StepLog):
    """A line's loss and parts are means over the images."""

    shown: ClassVar = {"lr": "lr {:.2e}"}

    def add(self, lr: float, figures: Figures, stop: bool) -> None:
        """Take a step's figures; its line is written when the next one is added."""
        sums = torch.stack([figures.loss, *figures.parts.values()]).float()
        self.push((lr, list(figures.parts)), sums, {"images": figures.images}, figures.gradient_norm, stop)

    def line(self, step: Step, sums: list[float], counts: dict[str, float]) -> dict[str, Any]:
        lr, names = step.facts
        means = [value / counts["images"] for value in sums]
        return {"loss": means[0], **dict(zip(names, means[1:], strict=True)), "lr": lr}

    def advice(self, step: Step) -> str:
        return f"lower {self.config.optim.peak}, set optim.clip"
