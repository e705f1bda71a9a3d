"""Every setting of a probe, typed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from timm_dseq import UserError
from timm_dseq.hub.model_args import check_args

from ..labels.settings import Labels
from ..salient_crop import QueryName
from ..system import machine
from ..system.command_line import Parser, Plain, shortened
from ..system.numbers import Count, Positive, Seed, Side, Workers

CACHED = ("dseq-cached", "ijepa-cached", "dinov2-cached")
ON_FEATURES = ("knn", "logistic", "vtab", *CACHED)


@dataclass
class Knn:
    """k nearest neighbours. Every pair of k and temperature is a result.

    Args:
        k: neighbours that vote
        temperature: T of the votes' weights, exp(similarity / T)
    """

    k: list[Count] = field(default_factory=lambda: [20])
    temperature: list[Positive] = field(default_factory=lambda: [0.07])


@dataclass
class Cache:
    """The feature cache.

    Args:
        folder: where the features of all backbones and data sets are stored
        dtype: of the stored features
        batch_size: images that pass the backbone together, in each process
    """

    folder: str = "runs/features"
    dtype: Literal["float16", "float32"] = "float16"
    batch_size: Count = 128


@dataclass
class Heads:
    """How heads are trained, where it is not as the protocol says.

    Args:
        epochs: passes over the training images
        batch_size: images in a step, of all processes together
        at_once: images that pass the backbone together, in each process
        select_on: images that the best head of a grid is chosen on: test, as published, or validation, a tenth of the
            training images
        checkpoint_every: steps between checkpoints of the heads
    """

    epochs: Positive | None = None
    batch_size: Count | None = None
    at_once: Count = 128
    select_on: Literal["test", "validation"] = "test"
    checkpoint_every: Count = 1000


@dataclass
class Probe:
    """Judge a frozen backbone.

    Args:
        model: any model of timm, hf-hub:REPOSITORY, a folder ready for the Hub, a run or checkpoint of pretrain.py, or
            a file of weights
        data: the labelled images
        protocol: knn, logistic or vtab, on stored features; dseq, ijepa, dinov2 or attentive, on fresh augmentations in
            every epoch; dseq-cached, ijepa-cached or dinov2-cached, on stored features without augmentation
        img_size: side of the images, in pixels (default: the model's own)
        random: random weights instead of the trained ones, as a baseline
        salient_crop: a saliency query, to probe also the mean of an image's features and of those of its most salient
            region, seen closer (protocols on stored features)
        args: further arguments of timm.create_model
        views: features that are read, of mean, mean4, class, class4, class+mean, class4+mean (default: the protocol's)
        knn: settings of the protocol knn
        heads: settings of the protocols that train heads
        cache: settings of the protocols on stored features
        precision: of the backbone, no (float32) or bf16 (autocast)
        seeds: one run for each; a seed draws the subset, the order and augmentation of images, and the heads' weights
        workers: loader processes of each process; only the speed changes (default: its share of the cores, at most 16)
        output_dir: folder of what the heads answered, and of their checkpoints while they are trained
        results: JSON-lines file to which results are added
    """

    model: str
    data: Labels
    protocol: Literal[
        "knn",
        "logistic",
        "vtab",
        "dseq",
        "ijepa",
        "dinov2",
        "attentive",
        "dseq-cached",
        "ijepa-cached",
        "dinov2-cached",
    ] = "knn"
    img_size: Side | None = None
    random: bool = False
    salient_crop: QueryName | None = None
    args: dict[str, Plain] = field(default_factory=dict)
    views: list[str] = field(default_factory=list)
    knn: Knn = field(default_factory=Knn)
    heads: Heads = field(default_factory=Heads)
    cache: Cache = field(default_factory=Cache)
    precision: Literal["no", "bf16"] = "no"
    seeds: list[Seed] = field(default_factory=lambda: [0])
    workers: Workers | None = None
    output_dir: str = "runs/probe"
    results: str = "runs/results.jsonl"


def parser() -> Parser:
    """The parser of `train/probe.py`."""
    parser = Parser(prog="probe.py", description="Judge a frozen backbone.")
    parser.add_argument("--config", action="config", help="a YAML file of settings; later ones win")
    parser.add_class_arguments(Probe)
    return parser


def parse(arguments: Sequence[str] | None = None) -> Probe:
    """The settings of a command line; `--data NAME` is short for `--data.path NAME`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    config, _ = parser().settings(Probe, shortened(arguments))
    config.workers = machine.workers(config.workers)
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise UserError(f"seeds={config.seeds}: give one or more, each once.")
    check_args(config.args, "args")
    if config.salient_crop and config.protocol not in ON_FEATURES:
        raise UserError(f"salient_crop is for protocols on stored features ({', '.join(ON_FEATURES)}): take one.")
    for name in ("k", "temperature"):
        if not getattr(config.knn, name):
            raise UserError(f"knn.{name}=[]: give one or more.")
    return config
