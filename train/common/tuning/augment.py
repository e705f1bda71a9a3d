"""Fine-tuning's images: a source → augmented, normalised float32 (3, S, S) with labels, and batches mixed in pairs.

Crops, RandAugment, erasing, mixup and cutmix are timm's. Their draws are pure functions of (seed, epoch, index) of the
image, and of the place in the run for what is drawn once for several: processes, rounds and restarts change nothing.
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

TOGETHER = 32  # images that share a draw of mixup or cutmix: what one of MAE's 32 devices had


@contextmanager
def all_seeded(seed: int) -> Iterator[None]:
    """`seeded` for timm's transforms, which draw from Python and numpy as well."""
    with seeded(seed):
        python, numpy = random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def training_transform(augment: Augment, data: dict) -> Callable[[Image.Image], torch.Tensor]:
    """data: what timm's resolve_model_data_config tells of the model."""
    transform = create_transform(
        data["input_size"],
        is_training=True,
        scale=augment.crop_scale,
        hflip=augment.flip,
        color_jitter=None,
        auto_augment=augment.rand_augment,
        interpolation=data["interpolation"],
        mean=data["mean"],
        std=data["std"],
        re_prob=augment.erasing,
        re_mode="pixel",
    )
    for step in transform.transforms:
        for operation in step.ops if isinstance(step, RandAugment) else ():
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **_) -> Image.Image:
    """timm's. Its RandAugment now and then asks for 0 bits: black until Pillow 13, which refuses."""
    return posterize(image, bits) if bits else Image.new(image.mode, image.size)


class Augmented(Dataset):
    """`augmented[epoch, index]`: image (3, S, S), label, (epoch, index)."""

    def __init__(self, source: Source, transform: Callable, seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __getitem__(self, sample: tuple[int, int]) -> tuple[torch.Tensor, int, torch.Tensor]:
        _, index = sample
        picture = self.source.picture(index)
        with all_seeded(sample_seed(self.seed, *sample)):
            return self.transform(picture), int(self.source.truth[index]), torch.tensor(sample)


class Mixer:
    """Mixup and cutmix of neighbours in the run's order, and soft targets.

    Neighbours always lie in the same round of the same process, so how a batch is dealt does not change who meets whom.
    """

    def __init__(self, augment: Augment, classes: int, seed: int) -> None:
        self.classes, self.smoothing, self.seed = classes, augment.smoothing, seed
        self.mixup = None
        if augment.mixup or augment.cutmix:
            self.mixup = Mixup(augment.mixup, augment.cutmix, label_smoothing=self.smoothing, num_classes=classes)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, 3, S, S) and labels (B,) of the run's samples from number `first` on → mixed, (B, K) targets."""
        if self.mixup is None:
            return images, mixup_target(labels, self.classes, smoothing=self.smoothing)
        targets = torch.empty(len(images), self.classes, device=images.device)
        for group in range(first // TOGETHER, (first + len(images) - 1) // TOGETHER + 1):
            start, end = (min(max(at * TOGETHER - first, 0), len(images)) for at in (group, group + 1))
            facing = torch.cat([torch.arange(start, end, 2), torch.arange(start + 1, end, 2).flip(0)])  # timm flips
            facing = to_device(facing, images.device)
            with all_seeded(sample_seed(self.seed, group, Draw.MIXING)):
                images[facing], targets[facing] = self.mixup(images[facing], labels[facing])
        return images, targets
