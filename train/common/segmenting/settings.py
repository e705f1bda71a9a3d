"""Every setting of a segmentation run, typed. The defaults are the recipe of the head that `--head` names."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from timm_dseq import UserError
from timm_dseq.hub.model_args import check_args

from ..dense.settings import Optim
from ..run.length import check_max_steps, check_warmup, fitted_warmup
from ..run.resume import Checkpoint
from ..system import machine
from ..system.command_line import Parser, Plain, flagged, shortened
from ..system.computing import System
from ..system.numbers import Count, CountOrNone, Positive, Seed, Share, Side, Width, Workers

FREE = ("evaluate", "data.names")  # may differ when a run is resumed, besides those of all dense runs
ADE20K = 20_210  # training images, by which the published numbers of steps become epochs


@dataclass
class Masks:
    """Images, each with a mask: a picture whose every pixel is the id of a class.

    Args:
        path: ade20k, ade20k:FOLDER, scenes (drawn by this project), a data set of the Hub, a folder, or a Parquet file
        config: the data set's configuration, where it has several
        image: column of the images, or the folder where they are, {} for the split (found if not given)
        mask: column of the masks, or the folder where they are, {} for the split (found if not given)
        train: the split, or a Parquet file, to train on (default: train or training)
        test: the split, or a Parquet file, to test on (default: validation, else test)
        ignore: ids that are no class (default: 255; of ade20k 0, too)
        names: JSON file of the classes, {id: name} or a list (default: names.json or semantic_names.json in the folder;
            without, the ids in the training masks are the classes)
        classes: how many there have to be
        limit: only the first images of each split, for a trial
    """

    path: str
    config: str | None = None
    image: str | None = None
    mask: str | None = None
    train: str | None = None
    test: str | None = None
    ignore: list[CountOrNone] | None = None
    names: str | None = None
    classes: Count | None = None
    limit: Count | None = None


@dataclass
class Augment:
    """How training images are augmented.

    Args:
        scale: least and greatest factor by which an image is resized, before a square is cut out of it
        flip: chance of a horizontal flip
        distort: chance of each change of brightness, contrast, saturation and hue
    """

    scale: tuple[Positive, Positive] = (0.5, 2.0)
    flip: Share = 0.5
    distort: Share = 0.5


@dataclass
class Segmenting:
    """Segment images with a head on a backbone.

    Args:
        model: any plain ViT of timm, hf-hub:REPOSITORY, a folder ready for the Hub, a run or checkpoint of pretrain.py,
            or a file of weights
        data: images and masks
        head: upernet (all weights are trained); linear or linear4, on the last map or the last 4 of a frozen backbone
        channels: of UPerNet's maps
        img_size: side of the training crops, and of the windows in testing
        stride: pixels between two windows in testing (default: two thirds of their side)
        random: start from random weights instead of the trained ones, as a baseline
        args: further arguments of timm.create_model
        output_dir: folder of the run: log.jsonl, checkpoints/, export/, report.html
        results: JSON-lines file to which the result is added
        resume: auto (from the newest complete checkpoint), never, or the path of a checkpoint
        evaluate: train nothing, test what the run in this folder exported; its settings are the defaults then
        seed: draws the head's weights, the order of the images and their augmentation
        workers: loader processes of each process; only the speed changes (default: its share of the cores, at most 16)
        eval_every: steps between tests on the test images (0: at the end only)
        max_steps: stop after so many steps; the schedules stay those of the full run
        dry_run: build everything, run some steps, print memory, speed and the time of a full run, write nothing
    """

    model: str
    data: Masks
    head: Literal["upernet", "linear", "linear4"] = "upernet"
    channels: Width = 512
    img_size: Side = 512
    stride: Side | None = None
    random: bool = False
    args: dict[str, Plain] = field(default_factory=dict)
    augment: Augment = field(default_factory=Augment)
    optim: Optim = field(default_factory=Optim)
    system: System = field(default_factory=System)
    checkpoint: Checkpoint = field(default_factory=lambda: Checkpoint(every=1000))
    output_dir: str = "runs/segment"
    results: str = "runs/results.jsonl"
    resume: str = "auto"
    evaluate: str | None = None
    seed: Seed = 0
    workers: Workers | None = None
    eval_every: CountOrNone = 0
    max_steps: Count | None = None
    dry_run: bool = False


def _epochs(steps: int) -> float:
    """A published number of steps of 16 images of ADE20K in epochs, which suit data sets of any size."""
    return round(steps * 16 / ADE20K, 2)


_ALL = {"optim.schedule": "linear", "optim.warmup_epochs": _epochs(1500)}
# Oquab et al. (2024): a head on a frozen backbone.
_LINEAR = {
    **_ALL,
    "optim.epochs": _epochs(40_000),
    "optim.lr": 1e-3,
    "optim.weight_decay": 1e-4,
    "optim.clip": None,
    "optim.drop_path": 0.0,
    "optim.layer_decay": 1.0,
}
RECIPES = {
    # The DSeq-JEPA paper's; what it leaves open (warm-up, layer decay, drop path, clip) is as for MAE, BEiT and Swin.
    "upernet": {
        **_ALL,
        "optim.epochs": _epochs(160_000),
        "optim.lr": 1e-4,
        "optim.weight_decay": 0.05,
        "optim.layer_decay": 0.65,
    },
    "linear": _LINEAR,
    "linear4": _LINEAR,
}


def parser(head: str = "upernet") -> Parser:
    """The parser of `train/segment.py`, with the defaults of a head's recipe."""
    parser = Parser(prog="segment.py", description="Segment images.", allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a YAML file of settings; later ones win")
    parser.add_class_arguments(Segmenting)
    parser.set_defaults({"head": head, **RECIPES[head]})
    return parser


def parse(arguments: Sequence[str] | None = None) -> tuple[Segmenting, str]:
    """The settings of a command line, and the same as YAML."""
    arguments = sys.argv[1:] if arguments is None else arguments
    arguments = with_settings_of_run(shortened(flagged(arguments)))
    head = parser().settings(Segmenting, arguments)[0].head
    config, text = parser(head).settings(Segmenting, arguments)
    config.workers = machine.workers(config.workers)
    config.stride = config.stride or usual_stride(config.img_size)
    check(config)
    return config, text


def usual_stride(size: int) -> int:
    """Pixels between two windows of `size` pixels."""
    return max(1, size * 2 // 3)


def with_settings_of_run(arguments: Sequence[str]) -> list[str]:
    """With `--evaluate RUN`, the run's own settings come first, and the others win."""
    following = [*arguments, ""][1:]
    for word, after in zip(arguments, following, strict=True):
        option, equals, run = word.partition("=")
        settings = settings_of(run if equals else after) if option == "--evaluate" else None
        if settings:
            return [f"--config={settings}", *arguments]
    return list(arguments)


def settings_of(run: str) -> Path | None:
    """The file of settings of a run, or of the run whose export/ this is; None if they are not there."""
    folder = Path(run).resolve()
    places = [folder, *([folder.parent] if folder.name == "export" else [])]
    return next((place / "config.yaml" for place in places if (place / "config.yaml").is_file()), None)


def fitted(config: Segmenting) -> tuple[Segmenting, list[str]]:
    """The recipe's warm-up for as many epochs as there are, and what to say. What was given, and differs, stays."""
    optim, said = fitted_warmup(config.optim, RECIPES[config.head]["optim.warmup_epochs"])
    return replace(config, optim=optim), said


def check(config: Segmenting) -> None:
    """One line for settings that contradict each other, which their types cannot say."""
    check_args(config.args, "args")
    if config.optim.warmup_epochs != RECIPES[config.head]["optim.warmup_epochs"]:  # `fitted` shortens the recipe's
        check_warmup(config.optim)
    check_max_steps(config.max_steps, config.dry_run)
    low, high = config.augment.scale
    if low > high:
        raise UserError(f"augment.scale={low:g}, {high:g}: give the lesser factor first.")
    if config.stride > config.img_size:
        raise UserError(f"stride={config.stride} would leave pixels between windows of {config.img_size}: give less.")
    if config.head != "upernet" and (config.optim.drop_path or config.optim.layer_decay != 1):
        raise UserError(f"head={config.head} leaves the backbone as it is: optim.drop_path is 0, optim.layer_decay 1.")
    if config.head == "upernet" and config.optim.batch_size // config.optim.accumulation < 2:
        raise UserError("head=upernet has batch norms, which need two images in a round: raise optim.batch_size.")
