"""Every setting of a fine-tuning run, typed. The defaults are the recipe `mae`; `--recipe` takes another's."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat, PositiveInt

from timm_dseq import UserError

from ..labels.settings import Labels, shortened
from ..run.resume import Checkpoint
from ..system import machine
from ..system.command_line import Parser, flagged

# Settings that may differ when a run is resumed: none of them changes what is computed.
FREE = (
    *("data.path", "workers", "optim.accumulation", "optim.max_skipped", "system.checkpointing"),
    *("checkpoint.", "output_dir", "results", "resume", "eval_every", "max_steps", "dry_run"),
)


@dataclass
class Augment:
    """What happens to a training image.

    Args:
        crop_scale: least and greatest share of the area of a random crop
        flip: chance of a horizontal flip
        rand_augment: timm's name of a RandAugment (none: no such)
        erasing: chance of a random rectangle of noise
        mixup: alpha of mixup (0: none)
        cutmix: alpha of cutmix (0: none); with both, a coin decides
        smoothing: of the labels
    """

    crop_scale: tuple[ClosedUnitInterval, ClosedUnitInterval] = (0.08, 1.0)
    flip: ClosedUnitInterval = 0.5
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    erasing: ClosedUnitInterval = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: ClosedUnitInterval = 0.1


@dataclass
class Optim:
    """Length, batch and schedule of the run; AdamW.

    Args:
        epochs: length of the run
        batch_size: images of a step, of all processes and accumulation rounds together
        accumulation: rounds in which a process computes its part of a step
        base_lr: learning rate of the head for a batch of 256, to which it is proportional
        lr_end: learning rate of the head at the end of the cosine
        warmup_epochs: length of the warm-up from 0
        layer_decay: a layer's learning rate as a share of the next one's
        weight_decay: on matrices only
        betas: of AdamW
        drop_path: rate of the last block; it grows linearly with the depth
        clip: largest norm of the gradient (none: no limit)
        ema: moving average of the weights, which is what is judged and exported (none: the weights themselves)
        max_skipped: the run stops after so many steps in a row whose loss or gradient is not finite
    """

    epochs: PositiveFloat = 100
    batch_size: PositiveInt = 1024
    accumulation: PositiveInt = 1
    base_lr: PositiveFloat = 5e-4
    lr_end: float = 1e-6
    warmup_epochs: float = 5
    layer_decay: ClosedUnitInterval = 0.65
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    drop_path: ClosedUnitInterval = 0.1
    clip: PositiveFloat | None = None
    ema: ClosedUnitInterval | None = None
    max_skipped: PositiveInt = 20


@dataclass
class System:
    """How it is computed. Processes and nodes are accelerate's: `accelerate launch --help`.

    Args:
        precision: no (float32) or bf16 autocast
        checkpointing: recompute activations instead of keeping them
    """

    precision: Literal["no", "bf16"] = "no"
    checkpointing: bool = False


@dataclass
class Tuning:
    """Fine-tune a backbone.

    Args:
        model: any model of timm, hf-hub:REPOSITORY, a folder ready for the Hub, a run or checkpoint of pretrain.py, or
            a file of weights
        data: the labelled images
        recipe: whose settings are taken where none is given: mae (He et al., 2022) or ijepa (Assran et al., 2023)
        img_size: side of the images, in pixels (default: the model's own)
        random: fresh weights instead of the trained ones, the floor to compare with
        args: further arguments of timm.create_model
        output_dir: folder of the run: seed-…/log.jsonl, seed-…/checkpoints/, export/
        results: JSON-lines file to which the result is added
        resume: auto (from the newest whole checkpoint), never, or the path of a checkpoint
        seeds: one run for each; the first one's classifier is exported
        workers: loader processes of each process, for the speed alone (default: its share of the cores, at most 16)
        eval_every: steps between looks at the test images (0: at the end only)
        max_steps: stop after so many steps; the schedule stays that of the whole run
        dry_run: build everything, run some steps, print memory, speed and the time of the whole run, write nothing
    """

    model: str
    data: Labels
    recipe: Literal["mae", "ijepa"] = "mae"
    img_size: PositiveInt | None = None
    random: bool = False
    args: dict[str, Any] = field(default_factory=dict)
    augment: Augment = field(default_factory=Augment)
    optim: Optim = field(default_factory=Optim)
    system: System = field(default_factory=System)
    checkpoint: Checkpoint = field(default_factory=lambda: Checkpoint(every=1000))
    output_dir: str = "runs/finetune"
    results: str = "runs/results.jsonl"
    resume: str = "auto"
    seeds: list[int] = field(default_factory=lambda: [0])
    workers: NonNegativeInt | None = None
    eval_every: NonNegativeInt = 0
    max_steps: PositiveInt | None = None
    dry_run: bool = False


RECIPES = {
    "mae": {},
    # Assran et al. (2023) for 1 % of ImageNet: MAE's, without mixup, cutmix, erasing and drop path.
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
    """Of `train/finetune.py`, with a recipe's defaults."""
    parser = Parser(prog="finetune.py", description="Fine-tune a backbone.", allow_abbrev=False)
    parser.add_argument("--config", action="config", help="a YAML file of settings; later ones win")
    parser.add_class_arguments(Tuning)
    parser.set_defaults({"recipe": recipe, **RECIPES[recipe]})
    return parser


def parse(arguments: Sequence[str] | None = None) -> tuple[Tuning, str]:
    """The run's configuration, and the same as YAML."""
    arguments = sys.argv[1:] if arguments is None else arguments
    arguments = shortened(flagged(arguments))
    recipe = parser().parse_args(arguments).recipe
    config, text = parser(recipe).settings(Tuning, arguments)
    config.workers = machine.workers(config.workers)
    check(config)
    return config, text


def check(config: Tuning) -> None:
    """What no type says: one line for settings that contradict each other."""
    low, high = config.augment.crop_scale
    if not 0 < low <= high:
        raise UserError(f"augment.crop_scale={low}, {high}: give the least share of the area first, above 0.")
    if config.optim.warmup_epochs >= config.optim.epochs:
        raise UserError(
            f"optim.warmup_epochs={config.optim.warmup_epochs} leaves nothing of optim.epochs={config.optim.epochs}: "
            "give less."
        )
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise UserError(f"seeds={config.seeds}: give one or more, each once.")
    if config.max_steps is not None and config.dry_run:
        raise UserError("dry_run has steps of its own: leave max_steps out.")
