"""A classifier on a labelled split: which of its images it gets right."""

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


class Plain(Dataset):
    """`plain[index]`: the index, the image as the evaluation sees it, and its label."""

    def __init__(self, source: Source, data: dict[str, Any]) -> None:
        self.source = source
        self.transform: Callable = create_transform(**data, is_training=False)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor, int]:
        return index, self.transform(self.source.picture(index)), int(self.source.truth[index])


@torch.inference_mode()
def right_answers(
    model: nn.Module, source: Source, data: dict[str, Any], accelerator: Accelerator, workers: int
) -> torch.Tensor:
    """(images,) bool, in the order of the source. All processes have to ask; each looks at its share.

    data: timm's words for the preprocessing.
    """
    model.eval()
    mine = range(accelerator.process_index, len(source), accelerator.num_processes)
    pinned = accelerator.device.type == "cuda"
    own = Subset(Plain(source, data), mine)
    batches = batches_of_all(own, batch_size=_BATCH, num_workers=workers, pin_memory=pinned)
    right = torch.zeros(len(source), device=accelerator.device)
    for indices, images, labels in batches:
        with accelerator.autocast():
            logits = model(images.to(accelerator.device, non_blocking=True))
        labels = labels.to(accelerator.device, non_blocking=True)
        right[indices.to(accelerator.device)] = (logits.argmax(1) == labels).float()
    return accelerator.reduce(right, "sum").cpu() > 0
