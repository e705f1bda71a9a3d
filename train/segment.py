"""Segment images with a head on a backbone: `accelerate launch train/segment.py --model NAME --data NAME`.

Ends in a segmenter, tested in sliding windows, and a report. `--head` names whose recipe gives the defaults, `--help`
lists every setting. A run that was stopped, killed or crashed resumes when the same command is given again.
`--evaluate RUN` tests what a run has exported.
"""

import common.system.environment  # noqa: F401, I001  # before torch is loaded

import html
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from common.data.digests import data_digest, digests_of, duplicates, split_digest, weights_digest
from common.dense.backbone import check as check_vit
from common.dense.report import log_charts
from common.dense.run import dense_run
from common.run import results
from common.run.export import public_name
from common.run.lock import locked
from common.run.report import page, picture
from common.segmenting.classes import Classes, check_known, classes_of, look_at
from common.segmenting.export import Description, build, check_rebuilds, describe, load, save
from common.segmenting.images import Crops
from common.segmenting.opening import Masked, open_masked, resolved
from common.segmenting.pictures import sheet
from common.segmenting.scores import Scores
from common.segmenting.segmenter import Segmenter
from common.segmenting.settings import FREE, RECIPES, Segmenting, fitted, parse, settings_of, usual_stride
from common.segmenting.task import Segmentation, Test
from common.system import launch
from common.system.signals import STOPPED, Stop

from timm_dseq.hub.load import data_config, load_backbone

PICTURES = 8  # test images in the report
# Settings that decide nothing, or have a place of their own in a record. Batch norms see the images of a round.
LEFT_OUT = ("epochs", "batch_size", "lr", "max_skipped")


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit code: 0 done, 1 something the message names is wrong, 2 misspelt, 75 stopped and saved."""
    return launch.answer("segment.py", lambda: parse(arguments), run)


def run(config: Segmenting, text: str) -> int:
    """All of it, alone in its folder. text: the settings as YAML."""
    results.check(config.results)
    accelerator = launch.accelerator(mixed_precision="bf16" if config.system.precision == "bf16" else "no")
    config, shorter = fitted(config)
    if config.evaluate:
        return evaluate(config, accelerator)
    if accelerator.is_main_process and shorter:
        print("\n".join(shorter), flush=True)
    with locked(config.output_dir, accelerator, wanted=not config.dry_run):
        return train(config, text, accelerator)


def train(config: Segmenting, text: str, accelerator: Accelerator) -> int:
    """Train, test, export."""
    data = opened(config, accelerator)
    segmenter, description = made(config, data.classes)
    test = Test(data.test, data.classes, config.img_size, config.stride, config.workers, accelerator)
    crops = Crops(data.train, data.classes, config.augment, config.img_size, description.mean, config.seed)
    title = f"{config.head} on {description.backbone}, {config.data.path}"
    training = dense_run(Segmentation(title, segmenter, crops, test), config, text, accelerator, FREE)
    if config.dry_run:
        training.dry_run()
        return 0
    shared = count_duplicates(config, data, accelerator)  # slow: it comes after all quick checks
    stopped = training.train(Stop())
    if not training.finished:
        return STOPPED if stopped else 0
    scores = test.scores(segmenter, shown=True)
    accelerator.end_training()
    if accelerator.is_main_process:
        record = record_of(config, description, segmenter, data, scores, shared)
        output = Path(config.output_dir)
        save(output / "export", segmenter, description)
        results.append(config.results, [record])
        report(output, segmenter, description, test, record)
        print(said(record))
        print(f"the segmenter: {output / 'export'}; its report: {output / 'report.html'}", flush=True)
    return 0


def evaluate(config: Segmenting, accelerator: Accelerator) -> int:
    """Test what a run has exported."""
    segmenter, description = load(Path(config.evaluate))
    data = opened(config, accelerator, description.classes)
    test = Test(data.test, data.classes, config.img_size, config.stride, config.workers, accelerator)
    shared = count_duplicates(config, data, accelerator)
    scores = test.scores(segmenter.to(accelerator.device), shown=True)
    accelerator.end_training()
    if accelerator.is_main_process:
        record = record_of(config, description, segmenter, data, scores, shared)
        results.append(config.results, [record])
        print(said(record), flush=True)
    return 0


@dataclass(frozen=True)
class Opened:
    """A data set whose masks have all been looked at."""

    train: Masked
    test: Masked
    classes: Classes


def opened(config: Segmenting, accelerator: Accelerator, classes: Classes | None = None) -> Opened:
    """Both splits. classes: of a segmenter that is there already (default: those of the data set)."""
    settings = resolved(config.data)
    train, test = open_masked(settings)
    for split in (train, test):
        found = look_at(split, settings.ignore, config.workers, accelerator)
        classes = classes or classes_of(settings, train, found)
        check_known(split, found, classes, settings.ignore)
        if accelerator.is_main_process and found.empty:
            print(f"{found.empty} of {len(split)} masks of {split.split} hold ignored ids only", flush=True)
    return Opened(train, test, classes)


def count_duplicates(config: Segmenting, data: Opened, accelerator: Accelerator) -> int:
    """Test images that are also trained on, pixel for pixel. An image that cannot be read is named on the way."""
    folder = str(Path(config.evaluate or config.output_dir) / "digests")
    train, test = (digests_of(x.images, config.workers, folder, accelerator) for x in (data.train, data.test))
    return duplicates(train, test)


def made(config: Segmenting, classes: Classes) -> tuple[Segmenter, Description]:
    """The backbone with a fresh head."""
    drop = {"drop_path_rate": config.optim.drop_path} if config.optim.drop_path else {}
    vit, shown = load_backbone(config.model, random=config.random, seed=config.seed, **drop, **config.args)
    check_vit(vit, shown)
    colours = data_config(vit)
    description = Description(
        **describe(vit),
        head=config.head,
        channels=config.channels,
        ids=classes.ids,
        names=classes.names,
        mean=colours["mean"],
        std=colours["std"],
        backbone=shown,
        weights=weights_digest(vit),
    )
    torch.manual_seed(config.seed)  # the head's weights are the same on any backbone
    segmenter = build(vit, config.head, config.channels, len(classes), description.mean, description.std)
    check_rebuilds(segmenter, description)
    return segmenter, description


def record_of(
    config: Segmenting, description: Description, segmenter: Segmenter, data: Opened, scores: Scores, shared: int
) -> dict[str, Any]:
    """The record for the file of results. shared: test images that are trained on, too."""
    optim = config.optim
    head = {"channels": description.channels} if description.head == "upernet" else {}
    training = {"epochs": optim.epochs, "batch_size": optim.batch_size, "lr": optim.lr}
    more = results.changed([config.augment, optim], RECIPES[description.head], LEFT_OUT, config.args)
    if config.evaluate and not settings_of(config.evaluate):  # a copied export
        training, more = {"training": "not known"}, {}
    if config.stride != usual_stride(config.img_size):
        more["stride"] = config.stride
    ignored = resolved(config.data).ignore
    if ignored != resolved(replace(config.data, ignore=None)).ignore:
        more["ignore"] = ignored

    def of(masked: Masked) -> str:
        return split_digest(masked.images, masked.masks)

    each = zip(description.names, scores.iou.tolist(), strict=True)
    return {
        "model": description.backbone,
        "parameters": sum(parameter.numel() for parameter in segmenter.parameters()),
        "img_size": [config.img_size, config.img_size],
        "weights": description.weights,
        "data": public_name(config.data.path),
        "data_digest": data_digest(data.train.images),
        "label": data.train.masks.image,
        "train": {"split": data.train.split, "images": len(data.train), "subset": None, "digest": of(data.train)},
        "test": {"split": data.test.split, "images": len(data.test), "digest": of(data.test)},
        "classes": len(data.classes),
        "protocol": description.head,
        "precision": config.system.precision,
        "seeds": [config.seed],
        "duplicates": {"train_test": shared},
        "view": {"upernet": "all weights", "linear": "last map", "linear4": "last 4 maps"}[description.head],
        "settings": {**training, **head, **more},
        **results.figure("mIoU", scores.mean_iou),
        "interval": scores.interval(),
        "pixel_accuracy": scores.accuracy,
        "iou": {name: None if math.isnan(value) else value for name, value in each},
    }


def said(record: dict[str, Any]) -> str:
    """The result as a line."""
    return f"{results.line(record)}; pixel accuracy {record['pixel_accuracy']:.2f} %"


def report(output: Path, segmenter: Segmenter, description: Description, test: Test, record: dict[str, Any]) -> None:
    """Write report.html: the log's curves, pictures of some test images, and the IoU of every class."""
    pictures = [
        picture(f"Test image {index}: image, truth, prediction", sheet(image, numbers, predicted, description.names))
        for index, (image, numbers), predicted in test.predictions(segmenter, range(min(PICTURES, len(test.images))))
    ]
    seen = {name: value for name, value in record["iou"].items() if value is not None}
    rows = [
        f"<tr><td>{html.escape(name)}</td><td>{value:.1f}</td></tr>"
        for name, value in sorted(seen.items(), key=lambda entry: -entry[1])
    ]
    table = f"<table><tr><th>class</th><th>IoU, %</th></tr>{''.join(rows)}</table>"
    body = f"{log_charts(output)}<h2>Predictions</h2>{''.join(pictures)}<h2>Classes</h2>{table}"
    page(output, "segmentation", html.escape(said(record)), body)


if __name__ == "__main__":
    launch.exit_with(main)
