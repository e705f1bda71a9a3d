"""Every setting of object discovery and of faithfulness, typed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from timm_dseq.hub.model_args import check_args

from ..boxes import Convention
from ..labels.settings import Labels
from ..system import machine
from ..system.command_line import Parser, Plain, shortened
from ..system.numbers import BelowOne, Count, CountOrNone, Few, Seed, Side, Workers


@dataclass
class Objects:
    """Images, and where their objects are: as masks, or as boxes.

    Args:
        path: a data set of the Hub, a Parquet file, or a folder (also of the images alone, see mask and boxes)
        config: the data set's configuration, where it has several
        split: the split to judge on (default: validation or test, else train)
        image: column of the images (found if not given)
        mask: column of the masks (default: mask), or the path of a folder of masks named as the images are
        boxes: instead of masks, a column of boxes, a JSON file in COCO's format, or a folder of XML files as VOC's
        numbered: masks number the objects, 0 is ground (default: true for palette PNGs; of others what is above 127 is
            object)
        unknown: number in such masks where nothing is known; VOC has 255
        other_size: take masks of another size than their image but of its shape; judged is at the masks' size
        box_format: what four numbers of a box mean; needed only where the data does not show it
        skip: images to leave out, from the first on, as those that a choice was made by
        images: the most images to judge on
    """

    path: str
    config: str | None = None
    split: str | None = None
    image: str | None = None
    mask: str = "mask"
    boxes: str | None = None
    numbered: bool | None = None
    unknown: CountOrNone | None = None
    other_size: bool = False
    box_format: Convention | None = None
    skip: CountOrNone = 0
    images: Count | None = None


@dataclass
class Discover:
    """Judge where a backbone looks.

    Args:
        model: any plain ViT of timm, hf-hub:REPOSITORY, a folder ready for the Hub, a run or checkpoint of pretrain.py,
            or a file of weights
        data: images and their objects
        queries: ways to score patches (default: all that the model can answer)
        block: the block saliency is read from, an index or a share of the depth
        num_regions: the most regions of an image, with the remainder
        min_area: smallest region, as a share of the image
        img_size: side of the square that images are resized to, in pixels (default: the model's own)
        random: random weights instead of the trained ones, as a baseline
        args: further arguments of timm.create_model
        checkpoints: of a run, judge all its checkpoints
        draws: random masks, of the area of each prediction, that it is compared with
        seed: of the random masks, and of random weights
        batch_size: images that pass the backbone together, in each process
        pictures: images to draw, half of them the best and half the worst
        workers: loader processes of each process; only the speed changes (default: its share of the cores, at most 16)
        output_dir: folder of the pictures
        results: JSON-lines file to which results are added
    """

    model: str
    data: Objects
    queries: list[str] = field(default_factory=list)
    block: int | float = 11 / 12
    num_regions: Few = 5
    min_area: BelowOne = 0.02
    img_size: Side | None = None
    random: bool = False
    args: dict[str, Plain] = field(default_factory=dict)
    checkpoints: bool = False
    draws: Few = 10
    seed: Seed = 0
    batch_size: Count = 50
    pictures: CountOrNone = 8
    workers: Workers | None = None
    output_dir: str = "runs/discover"
    results: str = "runs/discover.jsonl"


@dataclass
class Faithfulness:
    """Judge whether a classifier needs the patches that saliency puts first.

    Args:
        model: any plain ViT of timm, hf-hub:REPOSITORY, a folder ready for the Hub, a run or checkpoint of pretrain.py,
            or a file of weights
        data: the labelled images that a linear classifier is fitted to, and those that it is asked about
        queries: ways to score patches (default: all that the model can answer)
        block: the block saliency is read from, an index or a share of the depth
        images: test images, evenly spaced
        steps: in which the patches are taken away, or added
        draws: random orders of each image
        img_size: side of the square that images are resized to, in pixels (default: the model's own)
        random: random weights instead of the trained ones, as a baseline
        args: further arguments of timm.create_model
        seed: of the random orders, of the images that C is chosen on, and of random weights
        batch_size: images that pass the backbone together, in each process
        workers: loader processes of each process; only the speed changes (default: its share of the cores, at most 16)
        results: JSON-lines file to which results are added
    """

    model: str
    data: Labels
    queries: list[str] = field(default_factory=list)
    block: int | float = 11 / 12
    images: Count = 200
    steps: Few = 8
    draws: Few = 2
    img_size: Side | None = None
    random: bool = False
    args: dict[str, Plain] = field(default_factory=dict)
    seed: Seed = 0
    batch_size: Count = 50
    workers: Workers | None = None
    results: str = "runs/faithfulness.jsonl"


Settings = TypeVar("Settings", Discover, Faithfulness)


def parse(kind: type[Settings], prog: str, arguments: Sequence[str] | None = None) -> Settings:
    """The settings of a program's command line; `--data NAME` is short for `--data.path NAME`."""
    parser = Parser(prog=prog, description=(kind.__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", action="config", help="a YAML file of settings; later ones win")
    parser.add_class_arguments(kind)
    config, _ = parser.settings(kind, shortened(sys.argv[1:] if arguments is None else arguments))
    config.workers = machine.workers(config.workers)
    check_args(config.args, "args")
    return config
