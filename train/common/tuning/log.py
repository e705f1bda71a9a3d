"""The log of a fine-tuning run: what its lines hold."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..run.log import Step, StepLog


@dataclass
class Figures:
    """Sums over the rounds of one step, in this process; tensors stay on the device."""

    loss: torch.Tensor | float = 0.0  # ()
    images: int = 0
    gradient_norm: torch.Tensor | None = None  # ()


class TuningLog(StepLog):
    """The log of one seed's run."""

    shown: ClassVar = {"lr": "lr {:.2e}"}

    def add(self, lr: float, figures: Figures, stop: bool) -> None:
        """Take a step's figures; its line is written when the next one is added."""
        self.push(lr, figures.loss.reshape(1), {"images": figures.images}, figures.gradient_norm, stop)

    def line(self, step: Step, sums: list[float], counts: dict[str, float]) -> dict[str, Any]:
        return {"loss": sums[0] / counts["images"], "lr": step.facts}

    def advice(self, step: Step) -> str:
        return "lower optim.base_lr, set optim.clip"
