"""The end of fine-tuning: all seeds' accuracy into the table of results, the first seed's classifier into a folder.

The first, not the best: to choose by the test images would be to train on them.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from . import classifier
from .classifier import Described
from .labelled import Labelled
from .record import Screen
from .tuning import Tuning


@dataclass(frozen=True)
class Tuned:
    """What one seed's run leaves."""

    described: Described
    weights: dict[str, torch.Tensor]  # of the classifier that was judged
    right: torch.Tensor  # (test images,) bool


def hand_over(config: Tuning, tuned: list[Tuned], labelled: Labelled, screen: Screen) -> None:
    """Write export/, add the line of results, and say what to do next."""
    scores = torch.stack([one.right.double().mean() for one in tuned])
    spread = f" ± {100 * scores.std():.2f}" if len(scores) > 1 else ""
    accuracy = f"{100 * scores.mean():.2f}{spread} % over {len(scores)} seed{'s' * (len(scores) > 1)}"
    first = tuned[0]
    words = {
        "introduction": f"{first.described.backbone} with a linear head, fine-tuned on {first.described.trained_on}.",
        "training": training(config, len(labelled.train), first.described.trained_on),
        "results": f"Top-1 on the {len(first.right):,} test images: {accuracy}. "
        f"These weights are of seed {config.seeds[0]}: {100 * scores[0]:.2f} %.",
    }
    export = Path(config.output_dir) / "export"
    classifier.save(export, first.weights, first.described, words)
    screen.say(f"\ntop-1: {accuracy}\nthe classifier of seed {config.seeds[0]}, ready for the Hub: {export}\nnext:")
    screen.say(f"  timm-dseq verify {export}")
    screen.say(
        '  python -c "from transformers import pipeline; '
        f"print(pipeline('image-classification', model='{export}')('IMAGE'))\""
    )
    screen.say(f"  timm-dseq push {export} ORGANISATION/NAME")


def training(config: Tuning, images: int, trained_on: str) -> str:
    """The settings that matter, as a table."""
    optim, augment = config.optim, config.augment
    mixing = f"mixup {augment.mixup}, cutmix {augment.cutmix}" if augment.mixup or augment.cutmix else "none"
    rows = {
        "recipe": config.recipe,
        "images": f"{images:,} of {trained_on}",
        "optimiser": f"AdamW, batch {optim.batch_size}, {optim.epochs:g} epochs, {optim.warmup_epochs:g} of warm-up",
        "learning rate": f"{optim.base_lr:g} for a batch of 256, cosine, layer decay {optim.layer_decay:g}",
        "weight decay, drop path": f"{optim.weight_decay:g}, {optim.drop_path:g}",
        "augmentation": f"crops {augment.crop_scale[0]:g}–{augment.crop_scale[1]:g}, flips, "
        f"{augment.rand_augment or 'no RandAugment'}, erasing {augment.erasing:g}",
        "mixing": mixing,
        "label smoothing": f"{augment.smoothing:g}",
        "moving average": f"{optim.ema:g}" if optim.ema else "none",
        "precision": "bf16" if config.system.precision == "bf16" else "float32",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
