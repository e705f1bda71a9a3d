"""Fine-tuning's images: augmented, normalised float32 (3, S, S), and batches mixed by mixup and cutmix.

Crops, RandAugment, erasing, mixup and cutmix are timm's. What is random about an image is a pure function of (seed,
epoch, index), and what is random about a group of images of (seed, number of the group in the run). So processes,
rounds and restarts change nothing; timm's own loaders, which draw once for a process, could not promise that.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import RandAugment, posterize
from timm.data.mixup import mixup_target
from torch.utils.data import Dataset

from timm_dseq.host import to_device

from ..data.order import Draw, sample_seed, seeded
from ..data.source import Source
from .settings import Augment

GROUP = 32  # images that share the random numbers of mixup or cutmix: what one of MAE's 32 devices had


@contextmanager
def all_seeded(seed: int) -> Iterator[None]:
    """`seeded` for timm's transforms, which also take random numbers from Python and numpy."""
    with seeded(seed):
        python, numpy = random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def training_transform(augment: Augment, preprocessing: dict) -> Callable[[Image.Image], torch.Tensor]:
    """PIL image → normalised float32 (3, S, S). preprocessing: timm's words, input_size, mean, std, …"""
    transform = create_transform(
        preprocessing["input_size"],
        is_training=True,
        scale=augment.crop_scale,
        hflip=augment.flip,
        color_jitter=None,
        auto_augment=augment.rand_augment,
        interpolation=preprocessing["interpolation"],
        mean=preprocessing["mean"],
        std=preprocessing["std"],
        re_prob=augment.erasing,
        re_mode="pixel",
    )
    for step in transform.transforms:
        for operation in step.ops if isinstance(step, RandAugment) else ():
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **_) -> Image.Image:
    """timm's posterize, and black for 0 bits, which its RandAugment sometimes asks for and Pillow 13 refuses."""
    return posterize(image, bits) if bits else Image.new(image.mode, image.size)


class AugmentedImages(Dataset):
    """`images[epoch, index]`: the augmented image (3, S, S), and its label."""

    def __init__(self, source: Source, transform: Callable, seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, sample: tuple[int, int]) -> tuple[torch.Tensor, int]:
        _, index = sample
        picture = self.source.picture(index)
        with all_seeded(sample_seed(self.seed, *sample)):
            return self.transform(picture), int(self.source.truth[index])


class Mixer:
    """timm's mixup and cutmix of pairs of neighbours in the order of the run, and soft targets.

    Neighbours are always in the same round of the same process, so how a batch is dealt does not change the pairs.
    """

    def __init__(self, augment: Augment, classes: int, seed: int) -> None:
        self.classes, self.smoothing, self.seed = classes, augment.smoothing, seed
        self.mixup = None
        if augment.mixup or augment.cutmix:
            self.mixup = Mixup(augment.mixup, augment.cutmix, label_smoothing=self.smoothing, num_classes=classes)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, 3, S, S) and labels (B,) → mixed images, in place, and soft targets (B, classes).

        first: the number in the run of the first sample.
        """
        if self.mixup is None:
            return images, mixup_target(labels, self.classes, smoothing=self.smoothing)
        targets = torch.empty(len(images), self.classes, device=images.device)
        for group in range(first // GROUP, (first + len(images) - 1) // GROUP + 1):
            start, end = (min(max(at * GROUP - first, 0), len(images)) for at in (group, group + 1))
            # timm mixes the first image with the last, the second with the last but one, …
            paired = torch.cat([torch.arange(start, end, 2), torch.arange(start + 1, end, 2).flip(0)])
            paired = to_device(paired, images.device)
            with all_seeded(sample_seed(self.seed, group, Draw.MIXING)):
                images[paired], targets[paired] = self.mixup(images[paired], labels[paired])
        return images, targets
