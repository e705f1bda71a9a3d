"""Tiny data sets: a bright square on a dark ground, its mask and its box."""

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from ..data.test_source import encoded

SIZE = (48, 32)  # width, height
TINY = {
    "model": "vit_tiny_patch16_224",
    "img_size": 32,
    "random": "true",
    "args": '{"patch_size": 8, "depth": 3, "embed_dim": 48, "num_heads": 2}',
    "workers": 0,
    "batch_size": 4,
}


def squares(count: int) -> tuple[list[Image.Image], list[Image.Image], list[list[list[int]]]]:
    """Images, masks, and a box each, [left, top, right, bottom]."""
    draw = np.random.default_rng(0)
    images, masks, boxes = [], [], []
    for number in range(count):
        left, top = (int(draw.integers(16, 28)), int(draw.integers(10, 16)))
        box = [left, top, left + int(draw.integers(10, 18)), top + int(draw.integers(8, 14))]
        if number == 0:
            box = [34, 20, 46, 31]  # inside in no other convention
        mask = np.zeros(SIZE[::-1], np.uint8)
        mask[box[1] : box[3], box[0] : box[2]] = 255
        pixels = draw.integers(0, 60, (*SIZE[::-1], 3), dtype=np.uint8)
        pixels[mask > 0, 0] += 180
        images.append(Image.fromarray(pixels))
        masks.append(Image.fromarray(mask))
        boxes.append([box])
    return images, masks, boxes


def as_parquet(file: Path, image: list, mask: list | None = None, **columns: list) -> Path:
    """A Parquet file with these columns; images are encoded where they are not yet."""
    content, kinds = {**columns}, {}
    for name, values in (("image", image), ("mask", mask)):
        if values is not None:
            content[name] = [encoded(each, "PNG") if isinstance(each, Image.Image) else each for each in values]
            kinds[name] = datasets.Image(decode=False)
    rows = datasets.Dataset.from_dict(content)
    for name, kind in kinds.items():
        rows = rows.cast_column(name, kind)
    rows.to_parquet(file)
    return file


def as_folders(folder: Path, images: list, masks: list) -> tuple[Path, Path]:
    """A folder of photos and one of masks with the same names."""
    for name, pictures, kind in (("photos", images, "jpg"), ("truths", masks, "png")):
        (folder / name).mkdir()
        for number, picture in enumerate(pictures):
            picture.save(folder / name / f"{number}.{kind}")
    return folder / "photos", folder / "truths"


def said_by(script: str, **settings) -> tuple[int, str]:
    """A program in this process: its exit code and all it said. `data__path` stands for data.path."""
    import importlib

    main = importlib.import_module(script).main
    said = io.StringIO()
    words = [f"--{name.replace('__', '.')}={value}" for name, value in settings.items() if value is not None]
    with redirect_stdout(said), redirect_stderr(said):
        code = main(words)
    return code, said.getvalue()
