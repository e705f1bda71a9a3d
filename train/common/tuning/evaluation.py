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
from ..salient_crop import DETAIL, salient_views

_BATCH = 128


class EvaluationImages(Dataset):
    """`images[index]`: the index, the image by timm's evaluation transform (3, S, S) float32, its label.

    detail: behind them the image at twice the size, (3, 2S, 2S).
    """

    def __init__(self, source: Source, preprocessing: dict[str, Any], detail: bool = False) -> None:
        self.source = source
        channels, *size = preprocessing["input_size"]
        fine = {**preprocessing, "input_size": [channels, *(side * DETAIL for side in size)]}
        self.transforms: list[Callable] = [
            create_transform(**words, is_training=False)
            for words in ([preprocessing, fine] if detail else [preprocessing])
        ]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple:
        picture = self.source.picture(index)
        image, *fine = [transform(picture) for transform in self.transforms]
        return index, image, int(self.source.truth[index]), *fine


@torch.inference_mode()
def correct_answers(
    model: nn.Module,
    source: Source,
    preprocessing: dict[str, Any],
    accelerator: Accelerator,
    workers: int,
    salient_crop: str | None = None,
) -> torch.Tensor:
    """(n,) bool, in the order of the source. All processes have to call it; each classifies its share of the images.

    preprocessing: timm's words, input_size, mean, std, crop_pct, … salient_crop: a query, by which logits are the mean
    of the image's and of its most salient region's, seen closer.
    """
    model.eval()
    device = accelerator.device
    mine = range(accelerator.process_index, len(source), accelerator.num_processes)
    images = Subset(EvaluationImages(source, preprocessing, bool(salient_crop)), mine)
    batches = batches_of_all(images, batch_size=_BATCH, num_workers=workers, pin_memory=device.type == "cuda")
    correct = torch.zeros(len(source), device=device)
    for indices, inputs, labels, *fine in batches:
        with accelerator.autocast():
            logits = model(inputs.to(device, non_blocking=True))
            if salient_crop:
                logits = (logits + model(salient_views(model, fine[0].to(device, non_blocking=True), salient_crop))) / 2
        correct[indices.to(device)] = (logits.argmax(1) == labels.to(device, non_blocking=True)).float()
    return accelerator.reduce(correct, "sum").cpu() > 0
