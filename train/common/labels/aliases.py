"""Known data sets by one word each: where they are, their columns, splits and classes. Settings override each entry.

`ALIAS` is the data set on the Hub, `ALIAS:FOLDER` a copy of it on the disk.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Alias:
    """What a word stands for."""

    path: str | None  # on the Hub
    classes: int
    config: str | None = None
    image: str | None = "image"
    label: str | None = "label"
    train: str = "train"
    test: str = "test"
    task: str | None = None  # count or distance: a label of CLEVR that can be computed from scenes
    get: str | None = None  # how to get the data set, where it cannot simply be downloaded


_GATED = (
    "accept its terms at https://huggingface.co/datasets/ILSVRC/imagenet-1k and log in (hf auth login), or give a copy "
    "as imagenet:FOLDER"
)
_WDS = (
    "accept the terms at https://huggingface.co/datasets/timm/imagenet-1k-wds and log in (hf auth login), or give a "
    "copy as imagenet-wds:FOLDER"
)
_INAT = (
    "it is not on the Hub: download train{}.tar.gz and val.tar.gz from https://github.com/visipedia/inat_comp "
    "(2021), unpack both into one folder, and give it as {}:FOLDER"
)

ALIASES = {
    "imagenet": Alias("ILSVRC/imagenet-1k", 1000, test="validation", get=_GATED),
    "imagenet-wds": Alias("timm/imagenet-1k-wds", 1000, image="jpg", label="cls", test="validation", get=_WDS),
    "imagenet100": Alias("clane9/imagenet-100", 100, test="validation"),
    "imagenette": Alias("frgfm/imagenette", 10, config="160px", test="validation"),
    "cub": Alias("Donghyun99/CUB-200-2011", 200),
    "cars": Alias("tanganke/stanford_cars", 196),
    "clevr-count": Alias("clip-benchmark/wds_vtab-clevr_count_all", 8, image="webp", label="cls", task="count"),
    "clevr-distance": Alias(
        "clip-benchmark/wds_vtab-clevr_closest_object_distance", 6, image="webp", label="cls", task="distance"
    ),
    "inat21": Alias(None, 10_000, test="val", get=_INAT.format("", "inat21")),
    "inat21-mini": Alias(None, 10_000, train="train_mini", test="val", get=_INAT.format("_mini", "inat21-mini")),
}
