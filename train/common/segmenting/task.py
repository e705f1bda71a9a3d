"""Segmentation as a task of a dense run, and the test of a segmenter on all test images."""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import Subset

from ..data.unreadable import batches_of_all
from ..system.screen import Screen
from .classes import Classes
from .images import Crops, Sample, Whole
from .opening import Masked
from .scores import Scores, confusion, tally
from .segmenter import Segmenter, losses, sliding


class Test:
    """The test images, and how they are looked at: in windows of `window` pixels, one every `stride` pixels."""

    def __init__(
        self, masked: Masked, classes: Classes, window: int, stride: int, workers: int, accelerator: Accelerator
    ) -> None:
        self.images, self.classes = Whole(masked, classes), len(classes)
        self.window, self.stride, self.workers, self.accelerator = window, stride, workers, accelerator

    @torch.inference_mode()
    def scores(self, segmenter: Segmenter, shown: bool = False) -> Scores:
        """All processes have to call it; each tests its share. shown: whether progress is."""
        count, process = len(self.images), self.accelerator.process_index
        mine = range(process, count, self.accelerator.num_processes)
        screen = Screen(len(mine), 0, shown and self.accelerator.is_main_process, unit="image")
        tallies = torch.zeros(count, 3, self.classes, dtype=torch.int64, device=self.accelerator.device)
        for seen, (index, (_, numbers), predicted) in enumerate(self.predictions(segmenter, mine), 1):
            matrix = confusion(numbers.to(predicted.device, non_blocking=True), predicted, self.classes)
            tallies[index] = tally(matrix)
            screen.show(seen, "tested")
        screen.close()
        # each image's is zero in all processes but one
        return Scores(self.accelerator.reduce(tallies, "sum").cpu())

    def predictions(self, segmenter: Segmenter, indices: range) -> Iterator[tuple[int, Sample, torch.Tensor]]:
        """Of these images: the index, the image with its classes, and the predicted classes (H, W) on the device."""
        device = self.accelerator.device
        segmenter.eval()

        def logits_of(images: torch.Tensor) -> torch.Tensor:
            with self.accelerator.autocast():
                return segmenter(images)[0]

        samples = batches_of_all(
            Subset(self.images, indices), _only, num_workers=self.workers, pin_memory=device.type == "cuda"
        )
        for index, (image, numbers) in samples:
            logits = sliding(logits_of, image.to(device, non_blocking=True), self.window, self.stride)
            yield index, (image, numbers), logits.argmax(0)


class Segmentation:
    """What a dense run needs of its task."""

    def __init__(self, title: str, model: Segmenter, images: Crops, test: Test) -> None:
        self.title, self.model, self.images, self.test = title, model, images, test

    @staticmethod
    def collate(samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, S, S) uint8 and (B, S, S) int16."""
        images, numbers = zip(*samples, strict=True)
        return torch.stack(images), torch.stack(numbers)

    def loss(
        self, model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor], _seeds: torch.Tensor, _first: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The cross entropy summed over the images, (), auxiliary heads by their weights. Nothing in it is random."""
        images, numbers = batch
        each = losses(model(images), numbers)
        total = sum(weight * loss for weight, loss in zip(self.model.head.weights, each, strict=True))
        return total, {"auxiliary loss": each[1]} if len(each) > 1 else {}

    def evaluate(self) -> dict[str, float]:
        """Mean IoU and pixel accuracy, in per cent."""
        return figures(self.test.scores(self.model))

    def fingerprint(self) -> str:
        """Of the training images and masks, and the ids of the classes."""
        return f"{self.images.masked.fingerprint()} {','.join(map(str, self.images.classes.ids))}"


def figures(scores: Scores) -> dict[str, float]:
    """What logs and the screen show."""
    return {"mIoU": scores.mean_iou, "pixel accuracy": scores.accuracy}


def _only(items: list[Any]) -> Any:
    """The one item of a batch of one: images have sizes of their own."""
    return items[0]
