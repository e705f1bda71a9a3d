"""Testing a classifier: which images of a labelled split it classifies correctly."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import create_transform
from torch import nn
from torch.utils.data import Dataset, Subset

from ..data.source import Source
from ..data.unreadable import batches_of_all

_BATCH = 128


class EvaluationImages(Dataset):
    """`images[index]`: the index, the image by timm's evaluation transform (3, S, S) float32, its label."""

    def __init__(self, source: Source, preprocessing: dict[str, Any]) -> None:
        self.source = source
        self.transform: Callable = create_transform(**preprocessing, is_training=False)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, int]:
        return index, self.transform(self.source.picture(index)), int(self.source.truth[index])


@torch.inference_mode()
def correct_answers(
    model: nn.Module, source: Source, preprocessing: dict[str, Any], accelerator: Accelerator, workers: int
) -> torch.Tensor:
    """(n,) bool, in the order of the source. All processes have to call it; each classifies its share of the images.

    preprocessing: timm's words, input_size, mean, std, crop_pct, …
    """
    model.eval()
    device = accelerator.device
    mine = range(accelerator.process_index, len(source), accelerator.num_processes)
    images = Subset(EvaluationImages(source, preprocessing), mine)
    batches = batches_of_all(images, batch_size=_BATCH, num_workers=workers, pin_memory=device.type == "cuda")
    correct = torch.zeros(len(source), device=device)
    for indices, inputs, labels in batches:
        with accelerator.autocast():
            logits = model(inputs.to(device, non_blocking=True))
        correct[indices.to(device)] = (logits.argmax(1) == labels.to(device, non_blocking=True)).float()
    return accelerator.reduce(correct, "sum").cpu() > 0
