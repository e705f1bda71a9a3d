"""Where images come from, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..system.numbers import Count, Share, Side, Workers


@dataclass
class Data:
    """Where images come from, and how they are cropped.

    Args:
        path: `scenes` (drawn by this project), a data set of the Hub, a Parquet file, or a folder of images or shards
        config: the data set's configuration, where it has several
        split: the split to train on
        image: column of the images (found if not given)
        label: column of the classes, for the probes only (found if not given; a data set without is fine)
        streaming: read shards in turn instead of addressing images; see docs/pretraining.md for what differs
        images: images in an epoch, where a stream does not tell
        crop_scale: least and greatest share of the area of a random crop
        workers: loader processes of each process, for the speed alone (default: its share of the cores, at most 16)
        flip: chance of a horizontal flip (the paper: 0)
        color_jitter: strength of changes of brightness, contrast and saturation (the paper: 0)
        hue: strength of changes of hue, 0.5 is half a turn
        gray: chance to lose all colour
        solarize: chance that what is bright becomes dark
        resident: decode once into a file of pixels and crop on the device: true, false, or auto (where it fits)
        resident_size: side of the images in that file, in pixels (default: from the crop's side and the images)
        cache: folder of such files (default: beside the Hub's caches)
        max_broken: share of unreadable images at which the run stops
        probe_split: the split the probes are tested on (default: validation or test, else images held out)
    """

    path: str = "ILSVRC/imagenet-1k"
    config: str | None = None
    split: str = "train"
    image: str | None = None
    label: str | None = None
    streaming: bool = False
    images: Count | None = None
    crop_scale: tuple[Share, Share] = (0.3, 1.0)
    workers: Workers | None = None
    flip: Share = 0.0
    color_jitter: Share = 0.0
    hue: Share = 0.0
    gray: Share = 0.0
    solarize: Share = 0.0
    resident: Literal["auto"] | bool = "auto"
    resident_size: Side | None = None
    cache: str | None = None
    max_broken: Share = 0.01
    probe_split: str | None = None
