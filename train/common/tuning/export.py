"""The end of fine-tuning: all seeds' accuracy into the table of results, the first seed's classifier into a folder.

The first, not the best: to choose by the test images would be to train on them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.digests import data_digest, labels_digest, split_digest
from ..labels.labelled import Labelled
from ..run import results
from ..run.export import next_steps, public_name, table
from ..salient_crop import gain, said
from . import classifier
from .classifier import Description
from .settings import RECIPES, Tuning

LEFT_OUT = ("epochs", "batch_size", "base_lr", "layer_decay", "ema", "accumulation", "max_skipped")


@dataclass(frozen=True)
class SeedResult:
    """The classifier that one seed's run ends in, and which test images it classifies correctly."""

    description: Description
    weights: dict[str, torch.Tensor]
    correct: torch.Tensor  # (test images,) bool
    closer: torch.Tensor | None = None  # the same with salient crops


def export(config: Tuning, by_seed: list[SeedResult], labelled: Labelled, duplicates: dict[str, int]) -> None:
    """Write export/, add the record to the results, and say what to do next. duplicates: counts of duplicate images."""
    first = by_seed[0]
    record = record_of(config, by_seed, labelled, duplicates)
    folder = Path(config.output_dir) / "export"
    backbone, trained_on = first.description.backbone, first.description.trained_on
    words = {
        "introduction": f"{backbone} with a linear head, fine-tuned on {trained_on}.",
        "training": training(config, record, trained_on),
        "results": accuracy(config, record),
    }
    classifier.save(folder, first.weights, first.description, words)
    records = [record] + ([with_crops(config, record, by_seed)] if config.salient_crop else [])
    results.append(config.results, records)
    for one in records:
        print(results.line(one) + (f": {said(one['gain'])}" if "gain" in one else ""))
    if duplicates["train_test"]:
        print(f"{duplicates['train_test']} test images are also in the training images, pixel for pixel")
    print(f"the classifier of seed {config.seeds[0]}, ready for the Hub: {folder}")
    source = json.dumps(str(folder))
    trial = f'from transformers import pipeline; print(pipeline("image-classification", {source})("IMAGE"))'
    print(next_steps(folder, trial), flush=True)


def record_of(
    config: Tuning, by_seed: list[SeedResult], labelled: Labelled, duplicates: dict[str, int]
) -> dict[str, Any]:
    """The record for the file of results."""
    first = by_seed[0]
    optim, test = config.optim, labelled.test
    tested = split_digest(test, more=[labels_digest(test).encode()])
    return {
        "model": first.description.backbone,
        "parameters": sum(tensor.numel() for tensor in first.weights.values()),
        "img_size": list(first.description.preprocessing["input_size"][1:]),
        "weights": first.description.backbone_digest,
        "data": public_name(config.data.path),
        "data_digest": data_digest(labelled.train),
        "label": labelled.train.label,
        "train": {"split": labelled.train_split, "images": len(labelled.train), "subset": config.data.subset},
        "test": {"split": labelled.test_split, "images": len(test), "digest": tested},
        "classes": len(labelled.names),
        "protocol": f"finetune-{config.recipe}",
        "precision": config.system.precision,
        "seeds": config.seeds,
        "duplicates": duplicates,
        "view": "all weights",
        "settings": {
            "epochs": optim.epochs,
            "batch_size": optim.batch_size,
            "base_lr": optim.base_lr,
            "layer_decay": optim.layer_decay,
            **({"ema": optim.ema} if optim.ema else {}),
            **results.changed([config.augment, config.optim], RECIPES[config.recipe], LEFT_OUT, config.args),
        },
        **results.summary([one.correct for one in by_seed]),
    }


def with_crops(config: Tuning, record: dict[str, Any], by_seed: list[SeedResult]) -> dict[str, Any]:
    """The record of the test with salient crops, beside the record without."""
    closer = [one.closer for one in by_seed]
    settings = {**record["settings"], "salient crop": config.salient_crop}
    gained = gain(closer, [one.correct for one in by_seed])
    return {**record, "settings": settings, **results.summary(closer), "gain": gained}


def accuracy(config: Tuning, record: dict[str, Any]) -> str:
    """The accuracy in words, for the card."""
    deviation = f" ± {record['std']:.2f}" if record["std"] is not None else ""
    seeds = f"{len(config.seeds)} seeds" if len(config.seeds) > 1 else "one seed"
    low, high = record["interval"]
    test, shared = record["test"], record["duplicates"]["train_test"]
    return (
        f"Top-1 on the {test['images']:,} images of the split `{test['split']}`: "
        f"**{record['accuracy']:.2f}{deviation} %** over {seeds}, 95 % interval over images {low:.2f} to {high:.2f}. "
        f"These weights are of seed {config.seeds[0]}: {record['each'][0]:.2f} %. "
        f"{shared or 'None'} of the test images {'are' if shared else 'is'} also trained on, pixel for pixel."
    )


def training(config: Tuning, record: dict[str, Any], trained_on: str) -> str:
    """The settings as a table, for the card."""
    optim, augment, train = config.optim, config.augment, record["train"]
    mixing = f"mixup {augment.mixup:g}, cutmix {augment.cutmix:g}" if augment.mixup or augment.cutmix else "none"
    rows = {
        "recipe": config.recipe,
        "images": f"{train['images']:,} of {trained_on}, split {train['split']}",
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
    return table(rows)
