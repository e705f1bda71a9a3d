"""Every setting of a run, typed. The defaults are the paper's ViT-B/16.

Without a file of settings, configs/demo.yaml is taken, which a laptop runs in minutes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from timm_dseq import UserError
from timm_dseq.hub.model_args import check_args

from ..data.settings import Data
from ..run.length import check_max_steps
from ..run.resume import Checkpoint
from ..system import machine
from ..system.command_line import Parser, Plain, flagged, shortened
from ..system.numbers import BelowOne, Count, CountOrNone, Few, NotNegative, Positive, Seed, Share, Side, Width

# Settings that may differ when a run is resumed, since none of them changes what is computed.
FREE = (
    *("data.path", "data.workers", "data.max_broken", "data.probe_split", "data.cache"),
    *("optim.accumulation", "optim.max_skipped", "model.init"),
    *("system.compile", "system.checkpointing", "system.fsdp"),
    *("checkpoint.", "watch.", "hub.", "output_dir", "resume", "max_steps", "dry_run"),
)
# Settings that older checkpoints do not know, and the values that their runs had in effect.
ADDED = {
    **{"model.terms": {}, "model.views": 0, "model.views_factor": 1.0, "model.view_share": 0.25},
    **{"model.temperature": 0.2, "data.hue": 0.0, "data.gray": 0.0, "data.solarize": 0.0},
    "minutes": None,
}
AUTOMATIC = ("system.precision", "data.resident")  # `auto` is resolved when a run begins, and stays
DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


@dataclass
class Model:
    """The encoder and what it learns to predict.

    Args:
        name: a ViT of timm, DSeq-JEPA or any other plain one
        img_size: side of the training crops, in pixels
        args: further arguments of timm.create_model
        init: weights to start from, named as in every command, or a folder with pretraining.safetensors to go on from
        objective: dseq (the paper), dseq_causal (one pass, block-causal), ijepa (random blocks only) or views (views
            alone)
        query: how patches are scored, cls_param (the paper), cls_out, norm, or border (unlike the patches there)
        block: the block saliency is read from, an index or a share of the depth
        num_regions: most regions of an image, the remainder among them
        min_area: least share of the image of a region
        order: of the regions, saliency (descending), inverse, random or spatial
        regions: connected components of the salient patches, bands of equally many, or uniform rectangles
        stop_after: the sequence ends with this region
        flat: predict every region from the first alone
        loss: mean over target tokens, or over the tokens of each step first
        contrastive: add C-JEPA's VICReg term, short for terms.contrastive=1
        terms: losses to add, each with its factor
        views: crops of each image, each seen through a few windows, that have to recognise one another (0: none)
        views_factor: of that loss, where a prediction is trained, too
        view_share: share of its patches that a view keeps
        temperature: of the views' InfoNCE
        predictor_width: channels of the predictor
        predictor_depth: its blocks (default: 6 up to a depth of 12, else 12)
    """

    name: str = "dseq_jepa_vit_b16"
    img_size: Side = 224
    args: dict[str, Plain] = field(default_factory=dict)
    init: str | None = None
    objective: Literal["dseq", "dseq_causal", "ijepa", "views"] = "dseq"
    query: Literal["cls_param", "cls_out", "norm", "border"] = "cls_param"
    block: int | float = 11 / 12
    num_regions: Few = 5
    min_area: BelowOne = 0.02
    order: Literal["saliency", "inverse", "random", "spatial"] = "saliency"
    regions: Literal["components", "bands", "uniform"] = "components"
    stop_after: Few | None = None
    flat: bool = False
    loss: Literal["token", "step"] = "token"
    contrastive: bool = False
    terms: dict[str, Positive] = field(default_factory=dict)
    views: CountOrNone = 0
    views_factor: Positive = 1.0
    view_share: Share = 0.25
    temperature: Positive = 0.2
    predictor_width: Width = 384
    predictor_depth: Few | None = None


@dataclass
class Optim:
    """Length, batch and schedules of the run; AdamW.

    Args:
        epochs: length of the run
        batch_size: images of a step, of all processes and accumulation rounds together
        accumulation: rounds in which a process computes its part of a step
        lr_start: learning rate at the start of the warm-up
        lr: learning rate after the warm-up
        lr_end: learning rate at the end
        warmup_epochs: length of the warm-up
        weight_decay: at the start
        weight_decay_end: at the end, by a cosine
        decay_class_token: weight decay on the class token, which is the saliency query, too
        betas: of AdamW
        clip: largest norm of the gradient (none: no limit)
        momentum: of the target's moving average at the start
        momentum_end: at the end, linear
        regions: lambda, the chance of a sample to be trained on its regions, at the start
        regions_end: at the end, linear
        max_skipped: the run stops after so many steps in a row whose loss or gradient is not finite
    """

    epochs: Positive = 600
    batch_size: Count = 2048
    accumulation: Count = 1
    lr_start: Positive = 1e-4
    lr: Positive = 1e-3
    lr_end: Positive = 1e-6
    warmup_epochs: NotNegative = 15
    weight_decay: NotNegative = 0.04
    weight_decay_end: NotNegative = 0.4
    decay_class_token: bool = False
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    clip: Positive | None = None
    momentum: Share = 0.996
    momentum_end: Share = 1.0
    regions: Share = 0.0
    regions_end: Share = 1.0
    max_skipped: Count = 20


@dataclass
class System:
    """How it is computed. Processes and nodes are accelerate's: `accelerate launch --help`.

    Args:
        precision: no (float32), bf16 autocast, float64 (for equality tests), or auto: bf16 where it is faster
        fsdp: shard weights, gradients and optimiser over the processes (FSDP2), for models too large for one device
        compile: torch.compile the blocks (auto: on CUDA)
        checkpointing: recompute activations instead of keeping them
    """

    precision: Literal["auto", "no", "bf16", "float64"] = "auto"
    fsdp: bool = False
    compile: Literal["auto"] | bool = "auto"
    checkpointing: bool = False


@dataclass
class Watch:
    """Probes, pictures and trackers during the run.

    Args:
        probe_every: steps between probes of the target encoder (0: none)
        probe_images: images that the probes learn from and are tested on
        pictures_every: steps between pictures of the regions (0: none)
        pictures: images in them
        trackers: where figures go besides log.jsonl, of tensorboard, wandb and trackio
        project: the trackers' project
    """

    probe_every: CountOrNone = 6250
    probe_images: Count = 5000
    pictures_every: CountOrNone = 6250
    pictures: Count = 6
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    project: str = "dseq-jepa"


@dataclass
class Hub:
    """What becomes of the target encoder at the end.

    Args:
        push_to: repository of the Hub to publish it in, ORGANISATION/NAME
        private: create it private
        license: of the weights, as the Hub writes it (apache-2.0, cc-by-nc-4.0, …)
    """

    push_to: str | None = None
    private: bool = True
    license: str | None = None


@dataclass
class Config:
    """Pretrain a ViT with DSeq-JEPA.

    Args:
        output_dir: folder of the run: log.jsonl, checkpoints/, pictures/, export/, report.html
        resume: auto (from the newest complete checkpoint), never, or the path of a checkpoint
        seed: of everything random
        minutes: how long the run takes on this machine, instead of optim.epochs: some steps are timed before the first
        max_steps: stop after so many steps; the schedules stay those of the whole run
        dry_run: build everything, run some steps of both ends of the run, print memory, speed and time, write nothing
    """

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    system: System = field(default_factory=System)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    watch: Watch = field(default_factory=Watch)
    hub: Hub = field(default_factory=Hub)
    output_dir: str = "runs/dseq_jepa"
    resume: str = "auto"
    seed: Seed = 0
    minutes: Positive | None = None
    max_steps: Count | None = None
    dry_run: bool = False


def free(config: Config) -> tuple[str, ...]:
    """Settings that may differ when this run is resumed.

    Losses that compare the images of a round with each other depend on how many rounds there are.
    """
    model = config.model
    compares = model.views or model.contrastive or model.terms
    return tuple(name for name in FREE if not (compares and name == "optim.accumulation"))


def parser() -> Parser:
    """The parser of `train/pretrain.py`: YAML files by --config (later ones win), and options."""
    parser = Parser(prog="pretrain.py", description="Pretrain a ViT with DSeq-JEPA.", allow_abbrev=False)
    parser.add_argument(
        "--config", action="config", help="a YAML file of settings; later ones win (none: configs/demo.yaml)"
    )
    parser.add_class_arguments(Config)
    return parser


def parse(arguments: Sequence[str] | None = None) -> tuple[Config, str]:
    """The settings of a command line, and the same as YAML. --data, --model and --init are short for what they mean."""
    arguments = flagged(sys.argv[1:] if arguments is None else arguments)
    arguments = shortened(arguments, model="model.name", init="model.init")
    if not any(a.split("=")[0] == "--config" for a in arguments):
        arguments = [f"--config={DEMO}", *arguments]
    config, text = parser().settings(Config, arguments)
    config.data.workers = machine.workers(config.data.workers)
    check(config)
    return config, text


def check(config: Config) -> None:
    """Refuse settings that contradict each other, which types cannot express."""
    model, optim = config.model, config.optim
    check_args(model.args, "model.args")
    if optim.batch_size % optim.accumulation:
        raise UserError(
            f"optim.batch_size={optim.batch_size} is no multiple of optim.accumulation={optim.accumulation}: "
            "change one of them."
        )
    low, high = config.data.crop_scale
    if not 0 < low <= high:
        raise UserError(f"data.crop_scale={low}, {high}: give the least share of the area first, above 0.")
    if model.flat and model.objective == "dseq_causal":
        raise UserError("model.flat and model.objective=dseq_causal exclude each other: use objective=dseq.")
    if model.views == 1 or (model.objective == "views" and not model.views):
        raise UserError(f"model.views={model.views}: an image has to be recognised in at least two views.")
    if config.hub.push_to and not config.hub.license:
        raise UserError("hub.push_to needs hub.license, which the model card states: apache-2.0 or another.")
    if config.data.streaming and config.data.resident is True:
        raise UserError("data.resident=true decodes numbered images once: leave it or data.streaming out.")
    check_max_steps(config.max_steps, config.dry_run)
