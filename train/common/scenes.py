"""A data set drawn on the spot: scenes of coloured shapes, with labels that a good encoder can read.

Scene i of a split is a pure function of i, so there is nothing to download or to store. Each has 1 to 5 shapes of one
class on a textured ground; colours, sizes, places and turns are free, so neither mean colour nor raw pixels give the
class away.
"""

import math
import random
from typing import Any

from PIL import Image, ImageDraw

from .order import sample_seed

CLASSES = ("disc", "square", "triangle", "star", "ring", "cross", "crescent", "bars")
COUNTS = (1, 2, 3, 4, 5)
DISTANCES = (0.27, 0.33, 0.42)  # edges of the bins of the nearest pair's distance, in sides of the image
LABELS = {"label": len(CLASSES), "count": len(COUNTS), "distance": 4}  # and how many classes each has
LENGTHS = {"train": 8192, "test": 2048}
_SIDE = 80
_FINER = 2  # drawn so many times larger, then shrunk: smooth edges


class Scenes:
    """One split: `scenes[i]` is a dictionary of image, label (class), count and distance (nearest pair, in bins)."""

    def __init__(self, split: str = "train") -> None:
        self.split, self.length = split, LENGTHS[split]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        draw = random.Random(sample_seed(list(LENGTHS).index(self.split), 0, index))
        label, count = draw.randrange(len(CLASSES)), draw.choice(COUNTS)
        side = _SIDE * _FINER
        picture = _ground(draw, side)
        discs: list[tuple[float, float, float]] = []
        while len(discs) < count:
            radius = draw.uniform(0.09, 0.17) * side
            x, y = (draw.uniform(radius, side - radius) for _ in range(2))
            if all(math.hypot(x - a, y - b) > radius + r for a, b, r in discs):
                discs.append((x, y, radius))
        for x, y, radius in discs:
            picture.paste(_ink(draw), (0, 0), _shape(CLASSES[label], x, y, radius, draw.uniform(0, 2 * math.pi), side))
        gaps = [math.hypot(x - a, y - b) for i, (x, y, _) in enumerate(discs) for a, b, _ in discs[:i]]
        distance = sum(min(gaps, default=side) / side > edge for edge in DISTANCES)  # a lone shape is far
        image = picture.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        return {"image": image, "label": label, "count": count - 1, "distance": distance}


def _ink(draw: random.Random) -> tuple[int, int, int]:
    return tuple(draw.randrange(256) for _ in range(3))


def _ground(draw: random.Random, side: int) -> Image.Image:
    """A soft texture between two muted colours."""
    cells = draw.choice((2, 4, 8, 16))
    noise = Image.frombytes("L", (cells, cells), bytes(draw.randrange(256) for _ in range(cells * cells)))
    tones = [Image.new("RGB", (side, side), tuple(90 + c // 3 for c in _ink(draw))) for _ in range(2)]
    return Image.composite(*tones, noise.resize((side, side), Image.Resampling.BICUBIC))


def _shape(kind: str, x: float, y: float, radius: float, turn: float, side: int) -> Image.Image:
    """The stencil of one shape."""
    stencil = Image.new("L", (side, side))
    draw = ImageDraw.Draw(stencil)

    def at(angle: float, reach: float) -> tuple[float, float]:
        return x + radius * reach * math.cos(turn + angle), y + radius * reach * math.sin(turn + angle)

    def corners(count: int, *reach: float) -> list[tuple[float, float]]:
        return [at(2 * math.pi * i / count, reach[i % len(reach)]) for i in range(count)]

    def disc(centre: tuple[float, float], reach: float, fill: int) -> None:
        a, b = centre
        r = radius * reach
        draw.ellipse([a - r, b - r, a + r, b + r], fill=fill)

    def beam(width: float, shift: float, length: float = 1.0, across: bool = False) -> None:
        ends = [(-length, shift - width), (length, shift - width), (length, shift + width), (-length, shift + width)]
        points = [(b, a) if across else (a, b) for a, b in ends]
        draw.polygon([at(math.atan2(b, a), math.hypot(a, b)) for a, b in points], fill=255)

    if kind == "disc":
        disc((x, y), 0.85, 255)
    elif kind == "square":
        draw.polygon(corners(4, 1.0), fill=255)
    elif kind == "triangle":
        draw.polygon(corners(3, 1.0), fill=255)
    elif kind == "star":
        draw.polygon(corners(10, 1.0, 0.42), fill=255)
    elif kind == "ring":
        disc((x, y), 0.95, 255)
        disc((x, y), 0.55, 0)
    elif kind == "cross":
        beam(0.28, 0.0)
        beam(0.28, 0.0, across=True)
    elif kind == "crescent":
        disc((x, y), 0.95, 255)
        disc(at(0.0, 0.5), 0.75, 0)
    else:
        for shift in (-0.65, 0.0, 0.65):
            beam(0.18, shift, 0.8)
    return stencil
