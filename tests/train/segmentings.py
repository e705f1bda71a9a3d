"""Segmentation runs of a few seconds: a tiny folder of images and masks, settings, and processes."""

import random
from pathlib import Path

import numpy as np
from PIL import Image

from .runs import environments, finished, launch, said_of, words

COLOURS = {3: (230, 40, 40), 7: (40, 200, 60), 200: (60, 60, 230)}  # id in masks → colour of its pixels
TINY = {
    "model": "test_vit",
    "random": "true",
    "img_size": 32,
    "channels": 16,
    "data.ignore": "[255]",
    "optim.batch_size": 4,
    "optim.epochs": 20,  # 40 steps
    "optim.warmup_epochs": 1,
    "optim.lr": 0.01,
    "optim.layer_decay": 1,
    "workers": 0,
    "checkpoint.every": 6,
}


def patches(folder: Path, train: int = 8, test: int = 4, side: int = 40) -> Path:
    """FOLDER/images/SPLIT and FOLDER/masks/SPLIT: images of coloured rectangles, whose colour is the class; a border of
    each mask is ignored."""
    draw = random.Random(0)
    for split, count in (("train", train), ("val", test)):
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True)
        for number in range(count):
            ids = np.full((side, side + 8), 3, np.uint8)
            for id_ in (7, 200):
                top, left = draw.randrange(side - 20), draw.randrange(side - 12)
                ids[top : top + 20, left : left + 20] = id_
            picture = np.array([COLOURS.get(i, (0, 0, 0)) for i in range(256)], np.uint8)[ids]
            noise = np.frombuffer(draw.randbytes(picture.size), np.uint8).reshape(picture.shape)
            Image.fromarray(picture // 2 + noise // 4).save(folder / "images" / split / f"{number}.png")
            ids[:2] = 255
            Image.fromarray(ids).save(folder / "masks" / split / f"{number}.png")
    return folder


def options(output: Path, data: Path, **settings) -> list[str]:
    """Arguments of a tiny run; `optim__lr` stands for optim.lr, None for the default."""
    own = {"data.path": data, "output_dir": output, "results": output.parent / "results.jsonl"}
    return words({**TINY, **own}, settings)


def start(output: Path, data: Path, environment: dict[str, str] | None = None, **settings):
    return launch("segment", options(output, data, **settings), output, environment)


def segment(output: Path, data: Path, processes: int = 1, port: int = 0, **settings) -> tuple[list[int], str]:
    """A run from its start to its end: the exit code of each process, and all they said."""
    said_of(output).unlink(missing_ok=True)
    places = environments(port, processes) if processes > 1 else [{}]
    runs = [start(output, data, place, **settings) for place in places]
    return finished(runs, output)
