"""Detection as a task of a dense run: the detector, its training images, its loss and its AP."""

import hashlib
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from timm_dseq import UserError
from timm_dseq.hub.load import data_config

from ..data.digests import weights_digest
from ..dense.backbone import load_dense
from ..dense.pyramid import EVERYWHERE, TAPS
from .annotated import Annotated
from .evaluation import Detection, evaluate
from .jitter import JitteredImages, collate
from .model import Detector
from .settings import Detecting


class DetectionTask:
    """What train/detect.py trains. `backbone` names the ViT in tables, and `digest` is of its weights before."""

    collate = staticmethod(collate)

    def __init__(self, config: Detecting, train: Annotated, test: Annotated, accelerator: Accelerator) -> None:
        self.config, self.train, self.test, self.accelerator = config, train, test, accelerator
        settings = config.detector
        drop = {"drop_path_rate": config.optim.drop_path} if config.optim.drop_path else {}
        kind = settings.pyramid
        dense, self.backbone = load_dense(
            config.model,
            TAPS[kind],
            random=config.random,
            seed=config.seed,
            args={**drop, **config.args},
            window=settings.window,
            everywhere=EVERYWHERE[kind],
        )
        self.digest = weights_digest(dense.vit)
        both = train.has_masks and test.has_masks
        if settings.masks is True and not both:
            raise UserError("detector.masks=true, and not every object has a mask: leave it out, or take other data.")
        self.with_masks = with_masks = both if settings.masks == "auto" else settings.masks
        pixels = data_config(dense.vit)
        self.model = Detector(
            dense,
            kind,
            len(train.names),
            settings.size,
            pixels["mean"],
            pixels["std"],
            with_masks,
            settings.channels,
            settings.samples,
        )
        unit = 2 * dense.patch  # so that the smallest level of the pyramid is whole
        size = -(-settings.size // unit) * unit
        self.images = JitteredImages(train, config.seed, size, settings.scale, settings.flip, with_masks)
        self.title = f"{self.model.name}, {kind} pyramid: {self.backbone} on {config.data.path}"
        self.found: list[Detection] = []

    def loss(
        self, model: nn.Module, batch: Any, seeds: torch.Tensor, _first: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The sum of the detector's losses, (), and each of them."""
        parts = model(*batch, seeds)
        return sum(parts.values()), parts

    def evaluate(self) -> dict[str, float]:
        """AP on the test images; the detections stay in `found`."""
        figures, self.found = evaluate(self.model, self.test, self.accelerator, self.config.workers)
        return figures

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(self.train.source.fingerprint().encode(), digest_size=8)
        for objects in self.train.objects:
            for array in (objects.boxes, objects.labels, objects.crowd):
                digest.update(array.tobytes())
        return digest.hexdigest()
