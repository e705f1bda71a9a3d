"""Every setting of a detection run, typed. The defaults are the paper's recipe for COCO."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from timm_dseq import UserError
from timm_dseq.hub.model_args import check_args

from ..boxes import Convention
from ..dense.settings import Optim
from ..run.length import check_max_steps, check_warmup
from ..run.resume import Checkpoint
from ..system import machine
from ..system.command_line import Parser, Plain, flagged, shortened
from ..system.computing import System
from ..system.numbers import Count, CountOrNone, Positive, Seed, Share, Side, Width, Workers


@dataclass
class Annotations:
    """Images with boxes, and masks where there are any.

    Args:
        path: a folder in COCO's layout, a JSON file in COCO's format, a data set of the Hub with a column of objects, a
            Parquet file, or `scenes`
        images: folder of the images, where path is a JSON file
        train: the split to train on (default: train)
        test: the split, or the JSON file, to test on (default: val, valid, validation or test)
        test_images: folder of the images, where test is a JSON file
        config: the data set's configuration on the Hub, where it has several
        image: column of the images (found if not given)
        objects: column of the objects (found if not given)
        box_format: what four numbers of a box mean; needed only where the data does not show it
        limit: use the first so many images of each split only
    """

    path: str
    images: str | None = None
    train: str | None = None
    test: str | None = None
    test_images: str | None = None
    config: str | None = None
    image: str | None = None
    objects: str | None = None
    box_format: Convention | None = None
    limit: Count | None = None


@dataclass
class DetectorSettings:
    """What is built on the ViT.

    Args:
        pyramid: dseq (a level from each of four taps) or vitdet (all levels from the last map)
        window: largest side of the windows of attention, in patches (null: all blocks attend to the whole map)
        size: side of the square that training images are cut or padded to, and longest side of test images
        scale: least and greatest size of a training image, as a share of `size`
        flip: probability of a horizontal flip
        channels: of the pyramid's levels and the mask head; fewer are faster
        samples: proposals of each image that the heads learn from; fewer are faster
        masks: true, false, or auto (where every object has one)
    """

    pyramid: Literal["dseq", "vitdet"] = "dseq"
    window: Count | None = 14
    size: Side = 1024
    scale: tuple[Positive, Positive] = (0.1, 2.0)
    flip: Share = 0.5
    channels: Width = 256
    samples: Count = 512
    masks: Literal["auto"] | bool = "auto"


@dataclass
class Detecting:
    """Train a detector on a ViT, or evaluate one.

    Args:
        data: the annotated images
        model: any model of timm, hf-hub:REPOSITORY, a folder ready for the Hub, a run or checkpoint of pretrain.py, or
            a file of weights
        evaluate: instead of training, evaluate the detector of this run, or export/, on the test split
        random: start from random weights instead of the trained ones, as a baseline
        args: further arguments of timm.create_model
        output_dir: folder of the run: log.jsonl, checkpoints/, report.html, export/
        results: JSON-lines file to which the result is added
        resume: auto (from the newest complete checkpoint), never, or the path of a checkpoint
        workers: loader processes of each process; only the speed changes (default: its share of the cores, at most 16)
        eval_every: steps between evaluations on the test images (0: at the end only)
        max_steps: stop after so many steps; the schedules stay those of the full run
        dry_run: build everything, run some steps, print memory, speed and the time of a full run, write nothing
    """

    data: Annotations
    model: str | None = None
    evaluate: str | None = None
    random: bool = False
    args: dict[str, Plain] = field(default_factory=dict)
    detector: DetectorSettings = field(default_factory=DetectorSettings)
    optim: Optim = field(default_factory=Optim)
    system: System = field(default_factory=System)
    checkpoint: Checkpoint = field(default_factory=lambda: Checkpoint(every=1000))
    output_dir: str = "runs/detect"
    results: str = "runs/results.jsonl"
    resume: str = "auto"
    seed: Seed = 0
    workers: Workers | None = None
    eval_every: CountOrNone = 0
    max_steps: Count | None = None
    dry_run: bool = False


def parser() -> Parser:
    """The parser of `train/detect.py`."""
    parser = Parser(prog="detect.py", description="Train a detector on a ViT.", allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a YAML file of settings; later ones win")
    parser.add_class_arguments(Detecting)
    return parser


def parse(arguments: Sequence[str] | None = None) -> tuple[Detecting, str]:
    """The settings of a command line, and the same as YAML."""
    arguments = sys.argv[1:] if arguments is None else arguments
    config, text = parser().settings(Detecting, shortened(flagged(arguments)))
    config.workers = machine.workers(config.workers)
    check(config)
    return config, text


def check(config: Detecting) -> None:
    """One line for settings that contradict each other, which their types cannot say."""
    check_args(config.args, "args")
    if config.optim.warmup_epochs != Optim.warmup_epochs:
        check_warmup(config.optim)
    check_max_steps(config.max_steps, config.dry_run)
    if (config.model is None) == (config.evaluate is None):
        raise UserError("name the backbone to train with --model, or a run to evaluate with --evaluate.")
    low, high = config.detector.scale
    if low > high:
        raise UserError(f"detector.scale={low:g}, {high:g}: give the smaller one first.")
