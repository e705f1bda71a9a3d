"""Fine-tuning as a task of a supervised run: a backbone with its head, its training images, its loss and its test."""

import torch
from accelerate import Accelerator
from timm.layers import trunc_normal_
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import default_collate

from timm_dseq.hub.load import data_config, load_backbone

from ..data.digests import labels_digest
from ..labels.labelled import Labelled
from ..salient_crop import check_crop
from .augment import AugmentedImages, Mixer, training_transform
from .classifier import describe
from .evaluation import correct_answers
from .export import SeedResult
from .settings import Tuning

HEAD_STD = 2e-5  # MAE's: the first logits are near zero, so the backbone is not disturbed


class Classification:
    """What one seed of train/finetune.py trains.

    `tested` is tested and exported: the moving average `ema` of the weights if there is one, else the model. `saved`
    holds all weights that a checkpoint needs.
    """

    collate = staticmethod(default_collate)

    def __init__(self, config: Tuning, labelled: Labelled, accelerator: Accelerator) -> None:
        self.config, self.labelled, self.accelerator = config, labelled, accelerator
        drop = {"drop_path_rate": config.optim.drop_path} if config.optim.drop_path else {}
        args = {**drop, **config.args, "num_classes": len(labelled.names)}
        model, backbone = load_backbone(config.model, config.img_size, random=config.random, seed=config.seed, **args)
        if config.salient_crop:
            check_crop(model, config.salient_crop)
        self.preprocessing = data_config(model)
        self.description = describe(model, backbone, labelled.names, config.data.path, self.preprocessing)
        head = model.get_classifier()
        if isinstance(head, nn.Linear):
            trunc_normal_(head.weight, std=HEAD_STD)
            nn.init.zeros_(head.bias)
        self.ema = None
        if config.optim.ema:  # copied before anything is wrapped around the model
            self.ema = ModelEmaV3(model, config.optim.ema, use_warmup=True).to(accelerator.device)
        self.model, self.tested = model, self.ema.module if self.ema else model
        self.saved = nn.ModuleDict({"model": model, **({"ema": self.tested} if self.ema else {})})
        transform = training_transform(config.augment, self.preprocessing)
        self.images = AugmentedImages(labelled.train, transform, config.seed)
        self.mixer = Mixer(config.augment, len(labelled.names), config.seed)
        self.title = f"recipe {config.recipe}: {backbone} on {config.data.path}, seed {config.seed}"

    def loss(
        self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], _seeds: torch.Tensor, first: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The cross entropy summed over the images (B, 3, S, S) with labels (B,), which are mixed: ()."""
        images, targets = self.mixer(*batch, first)
        return SoftTargetCrossEntropy()(model(images).float(), targets) * len(images), {}

    def evaluate(self) -> dict[str, float]:
        """The share of the test images that are classified correctly."""
        return {"accuracy": self.correct().float().mean().item()}

    def fingerprint(self) -> str:
        """Of the training images and their labels."""
        return f"{self.labelled.train.fingerprint()} {labels_digest(self.labelled.train)}"

    def correct(self, salient_crop: str | None = None) -> torch.Tensor:
        """Which test images are classified correctly: (n,) bool. salient_crop: a query, with it also seen closer."""
        test, workers = self.labelled.test, self.config.workers
        return correct_answers(self.tested, test, self.preprocessing, self.accelerator, workers, salient_crop)

    def result(self) -> SeedResult:
        """The classifier as it is now, and what it says of the test images."""
        correct = self.correct()
        if self.accelerator.is_main_process:
            said = f"seed {self.config.seed}: {correct.float().mean():.2%} of {len(correct)} test images"
            print(said, flush=True)
        weights = {name: tensor.detach().cpu().clone() for name, tensor in self.tested.state_dict().items()}
        closer = self.correct(self.config.salient_crop) if self.config.salient_crop else None
        return SeedResult(self.description, weights, correct, closer)
