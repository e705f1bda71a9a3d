"""The number format of a run, and how `auto` chooses it on a CPU: by a measurement."""

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from timm_dseq import DSeqJEPA, block_masks, plan_blocks

from ..run.resume import Progress
from .settings import Config

FASTER = 1.1  # bf16 is chosen on a CPU if it is so many times as fast
_SECONDS = 2.0


@dataclass(frozen=True)
class Precision:
    """`no` is float32, `bf16` autocast over float32 weights, `float64` is for tests of equality."""

    name: str
    device: torch.device

    def autocast(self) -> AbstractContextManager:
        """The context in which a model is called."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.name == "bf16")

    @property
    def dtype(self) -> torch.dtype:
        """The type of images and weights."""
        return torch.float64 if self.name == "float64" else torch.float32

    @property
    def product_dtype(self) -> torch.dtype:
        """The type in which matrix products are computed."""
        return torch.bfloat16 if self.name == "bf16" else self.dtype


def choose_precision(
    config: Config, model: DSeqJEPA, progress: Progress, accelerator: Accelerator
) -> tuple[Precision, str]:
    """A run's precision, chosen once and kept in `progress.chosen`, and why. All processes have to call it."""
    why = " as the run began"
    if "precision" not in progress.chosen:
        answer: list = [None]
        if accelerator.is_main_process:
            name, reason = chosen(config.system.precision, model, config.model.img_size, accelerator.device)
            answer = [(name, f": {reason}")]
        broadcast_object_list(answer)
        progress.chosen["precision"], why = answer[0]
    name = progress.chosen["precision"]
    return Precision(name, accelerator.device), f"precision {name}{why}"


def chosen(setting: str, model: DSeqJEPA, img_size: int, device: torch.device) -> tuple[str, str]:
    """The name of the precision that the setting becomes on this device, and why."""
    if setting != "auto":
        return setting, "asked for"
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "the GPU has it") if able else ("no", "the GPU has no bf16")
    if device.type != "cpu":
        return "no", f"bf16 is not tried on {device.type}"
    gain = _gain_on_a_cpu(model, img_size)
    return ("bf16" if gain >= FASTER else "no"), f"bf16 runs at {gain:.2f} times the speed of float32 here"


def _gain_on_a_cpu(model: DSeqJEPA, img_size: int) -> float:
    """How many times as fast as float32 a small step is in bf16, each computed as the run would.

    One process measures for all of them, so nothing here may be a collective operation.
    """
    batch = max(4, min(32, 400_000 // img_size**2))
    images = torch.rand(batch, 3, img_size, img_size, generator=torch.Generator().manual_seed(0))
    plan = plan_blocks(block_masks(model.student.patch_embed.grid_size, torch.arange(batch)))

    def seconds(name: str) -> float:
        model.explicit_attention(name == "bf16")
        begun = time.perf_counter()
        with Precision(name, images.device).autocast(), torch.no_grad():
            model.features_and_saliency(images)
        with Precision(name, images.device).autocast():
            predictions = model.predict(images, plan)
        predictions.float().square().mean().backward()
        return time.perf_counter() - begun

    least = {name: float("inf") for name in ("no", "bf16")}
    begun, rounds = time.perf_counter(), 0
    while rounds < 2 or (time.perf_counter() - begun < _SECONDS and rounds < 10):
        least = {name: min(least[name], seconds(name)) for name in least}
        rounds += 1
    model.zero_grad(set_to_none=True)
    model.explicit_attention(False)
    return least["no"] / least["bf16"]
