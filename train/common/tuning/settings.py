"""Every setting of a fine-tuning run, typed. The defaults are those of the recipe `mae`; `--recipe` takes others."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from timm_dseq import UserError
from timm_dseq.hub.model_args import check_args

from ..labels.settings import Labels
from ..run.length import check_max_steps, check_warmup, fitted_warmup
from ..run.resume import Checkpoint
from ..run.schedules import warmup_cosine
from ..salient_crop import QueryName
from ..supervised import settings as supervised
from ..system import machine
from ..system.command_line import Parser, Plain, flagged, shortened
from ..system.computing import System
from ..system.numbers import BelowOne, Count, CountOrNone, NotNegative, Positive, Seed, Share, Side, Workers

FREE = (*supervised.FREE, "salient_crop")  # settings that may differ when a run is resumed


@dataclass
class Augment:
    """How training images are augmented.

    Args:
        crop_scale: least and greatest share of the image's area in a random crop
        flip: probability of a horizontal flip
        rand_augment: a RandAugment policy by timm's name (null: none)
        erasing: probability that a random rectangle is replaced by noise
        mixup: alpha of mixup (0: none)
        cutmix: alpha of cutmix (0: none); with both, one of them is chosen at random for every 32 images
        smoothing: label smoothing
    """

    crop_scale: tuple[Share, Share] = (0.08, 1.0)
    flip: Share = 0.5
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    erasing: Share = 0.25
    mixup: NotNegative = 0.8
    cutmix: NotNegative = 1.0
    smoothing: Share = 0.1


@dataclass
class Optim:
    """Length, batch and schedule of the run; AdamW.

    Args:
        epochs: length of the run
        batch_size: images in a step, of all processes and accumulation rounds together
        accumulation: rounds in which a process computes its part of a step
        base_lr: head learning rate at batch 256; scaled linearly with the batch size
        lr_end: head learning rate at the end of the cosine schedule
        warmup_epochs: length of the linear warm-up from 0
        layer_decay: learning rate of a layer, as a factor of the next layer's
        weight_decay: of matrices; biases and norms have none
        betas: of AdamW
        drop_path: stochastic depth rate of the last block; it rises linearly from 0 at the first block
        clip: largest norm of the gradient (null: no clipping)
        ema: decay of a moving average of the weights, which is then tested and exported (null: no average)
        max_skipped: the run ends after so many steps in a row whose loss or gradient is not finite
    """

    epochs: Positive = 100
    batch_size: Count = 1024
    accumulation: Count = 1
    base_lr: Positive = 5e-4
    lr_end: NotNegative = 1e-6
    warmup_epochs: NotNegative = 5
    layer_decay: Share = 0.65
    weight_decay: NotNegative = 0.05
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    drop_path: BelowOne = 0.1
    clip: Positive | None = None
    ema: Share | None = None
    max_skipped: Count = 20

    peak: ClassVar[str] = "optim.base_lr"

    def learning_rate(self, samples: int, epoch: int, total: int) -> float:
        """The head's, after `samples` of `total` samples. epoch: samples in one."""
        peak = self.base_lr * self.batch_size / 256
        return warmup_cosine(samples, total, self.warmup_epochs * epoch, 0.0, peak, self.lr_end)


@dataclass
class Tuning:
    """Fine-tune a backbone.

    Args:
        model: any model of timm, hf-hub:REPOSITORY, a folder ready for the Hub, a run or checkpoint of pretrain.py, or
            a file of weights
        data: the labelled images
        recipe: whose settings are the defaults, mae (He et al., 2022) or ijepa (Assran et al., 2023)
        img_size: side of the images, in pixels (default: the model's own)
        random: start from random weights instead of the trained ones, as a baseline
        salient_crop: a saliency query, to test at the end also with the mean of an image's logits and of those of its
            most salient region, seen closer
        args: further arguments of timm.create_model
        output_dir: folder of the run: seed-…/log.jsonl, seed-…/checkpoints/, export/
        results: JSON-lines file to which the result is added
        resume: auto (from the newest complete checkpoint), never, or the path of a checkpoint
        seeds: one run for each; the classifier of the first is exported
        workers: loader processes of each process; only the speed changes (default: its share of the cores, at most 16)
        eval_every: steps between tests on the test images (0: at the end only)
        max_steps: stop after so many steps; the schedules stay those of the full run
        dry_run: build everything, run some steps, print memory, speed and the time of a full run, write nothing
    """

    model: str
    data: Labels
    recipe: Literal["mae", "ijepa"] = "mae"
    img_size: Side | None = None
    random: bool = False
    salient_crop: QueryName | None = None
    args: dict[str, Plain] = field(default_factory=dict)
    augment: Augment = field(default_factory=Augment)
    optim: Optim = field(default_factory=Optim)
    system: System = field(default_factory=System)
    checkpoint: Checkpoint = field(default_factory=lambda: Checkpoint(every=1000))
    output_dir: str = "runs/finetune"
    results: str = "runs/results.jsonl"
    resume: str = "auto"
    seeds: list[Seed] = field(default_factory=lambda: [0])
    workers: Workers | None = None
    eval_every: CountOrNone = 0
    max_steps: Count | None = None
    dry_run: bool = False

    @property
    def seed(self) -> int:
        """Of a run of one."""
        return self.seeds[0]


STEPS = 20  # of an epoch, at least, where a recipe's batch would leave fewer
RECIPES = {
    "mae": {},
    # Assran et al. (2023) for 1 % of ImageNet: as MAE, without mixup, cutmix, erasing and drop path.
    "ijepa": {
        "optim.epochs": 50,
        "optim.batch_size": 512,
        "optim.base_lr": 1.5e-5,  # 3e-5 at a batch of 512
        "optim.layer_decay": 0.75,
        "optim.drop_path": 0.0,
        "augment.mixup": 0.0,
        "augment.cutmix": 0.0,
        "augment.erasing": 0.0,
    },
}


def parser(recipe: str = "mae") -> Parser:
    """The parser of `train/finetune.py`, with the defaults of a recipe."""
    parser = Parser(prog="finetune.py", description="Fine-tune a backbone.", allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a YAML file of settings; later ones win")
    parser.add_class_arguments(Tuning)
    parser.set_defaults({"recipe": recipe, **RECIPES[recipe]})
    return parser


def parse(arguments: Sequence[str] | None = None) -> tuple[Tuning, str]:
    """The settings of a command line, and the same as YAML."""
    arguments = sys.argv[1:] if arguments is None else arguments
    arguments = shortened(flagged(arguments))
    recipe = parser().settings(Tuning, arguments)[0].recipe
    config, text = parser(recipe).settings(Tuning, arguments)
    config.workers = machine.workers(config.workers)
    check(config)
    return config, text


def fitted(config: Tuning, images: int, processes: int) -> tuple[Tuning, list[str]]:
    """A recipe's batch and warm-up, which are ImageNet's, for as many images and epochs as there are; and what to say.

    images: in an epoch. What was given on the command line or in a file, and differs from the recipe's, stays.
    """
    optim, said = config.optim, []
    if optim.batch_size == RECIPES[config.recipe].get("optim.batch_size", Optim.batch_size):
        unit = optim.accumulation * processes * (2 if config.augment.mixup or config.augment.cutmix else 1)
        wanted = min(images, max(8, 1 << (max(1, images // STEPS).bit_length() - 1)))  # a power of two where it can be
        batch = min(optim.batch_size, max(unit, wanted // unit * unit))
        if batch < optim.batch_size:
            said.append(
                f"optim.batch_size is {batch}, not the recipe's {optim.batch_size}: there are {images:,} images"
            )
        optim = replace(optim, batch_size=batch)
    optim, shorter = fitted_warmup(optim, Optim.warmup_epochs)
    return replace(config, optim=optim), said + shorter


def check(config: Tuning) -> None:
    """One line for settings that contradict each other, which their types cannot say."""
    check_args(config.args, "args")
    low, high = config.augment.crop_scale
    if not 0 < low <= high:
        raise UserError(f"augment.crop_scale={low}, {high}: give the least share of the area first, above 0.")
    if config.optim.warmup_epochs != Optim.warmup_epochs:  # `fitted` shortens the default
        check_warmup(config.optim)
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise UserError(f"seeds={config.seeds}: give one or more, each once.")
    check_max_steps(config.max_steps, config.dry_run)
