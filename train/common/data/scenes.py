"""A data set drawn on the spot: scenes of patterned shapes, with labels that a good encoder can tell.

Scene i of a split is a pure function of i, so nothing is downloaded or stored. Each has 1 to 5 shapes on a soft
background. All shapes have one pattern, which is the class. Their forms, positions and colours and the phase of the
pattern are random: neither a mean colour nor a single pixel tells the class, only the structure that the shapes share.
"""

import itertools
import math
import random
from typing import Any

from PIL import Image, ImageDraw

from .order import sample_seed

CLASSES = ("level", "upright", "rising", "falling", "checks", "dots")
FORMS = ("disc", "square", "triangle", "star", "ring", "cross")
RADII = {1: 0.32, 2: 0.26, 3: 0.21, 4: 0.19, 5: 0.17}  # number of shapes → their largest radius, in sides of the image
COUNTS = (1, 2, 3, 4, 5)
DISTANCES = (0.34, 0.40, 0.48)  # edges of the bins of the nearest pair's distance, in sides of the image
LABELS = {"label": len(CLASSES), "count": len(COUNTS), "distance": 4}  # label → its number of classes
LENGTHS = {"train": 8192, "test": 2048}  # split → its number of scenes
_SIDE = 128
_GRAIN = 0.3  # share of noise: a trained encoder ignores what it cannot predict, a random one does not
_FINER = 2  # scenes are drawn so many times larger and then reduced, for smooth edges


class Scenes:
    """One split: `scenes[i]` is a dictionary of image, label (class), count, and distance (bin of the nearest pair)."""

    def __init__(self, split: str = "train", most: int | None = None) -> None:
        """most: scenes, the first ones (default: all)."""
        self.split, self.length = split, min(most or LENGTHS[split], LENGTHS[split])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.drawn(index)[0]

    def drawn(self, index: int) -> tuple[dict[str, Any], list[tuple[str, Image.Image]]]:
        """The scene, and of each of its shapes the form, and a mask: "L", 255 where the shape is."""
        draw = random.Random(sample_seed(list(LENGTHS).index(self.split), 0, index))
        label, count = draw.randrange(len(CLASSES)), draw.choice(COUNTS)
        side = _SIDE * _FINER
        picture = _ground(draw, side)
        discs: list[tuple[float, float, float]] = []
        for attempt in itertools.count():
            if len(discs) == count:
                break
            if attempt % 50 == 49:  # the first shapes may leave no room for the rest: start again
                discs.clear()
            radius = draw.uniform(0.75, 1) * RADII[count] * side
            x, y = (draw.uniform(radius, side - radius) for _ in range(2))
            if all(math.hypot(x - a, y - b) > radius + r for a, b, r in discs):
                discs.append((x, y, radius))
        shapes = []
        for x, y, radius in discs:
            name = draw.choice(FORMS)
            form = _form(name, x, y, radius, draw.uniform(0, 2 * math.pi), side)
            picture.paste(_pattern(CLASSES[label], draw, side), (0, 0), form)
            shapes.append((name, form.resize((_SIDE, _SIDE), Image.Resampling.BOX).point(lambda x: 255 * (x > 127))))
        gaps = [math.hypot(x - a, y - b) for i, (x, y, _) in enumerate(discs) for a, b, _ in discs[:i]]
        distance = sum(min(gaps, default=side) / side > edge for edge in DISTANCES)  # a single shape counts as far
        image = picture.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        grain = Image.frombytes("RGB", image.size, draw.randbytes(3 * _SIDE**2))
        image = Image.blend(image, grain, _GRAIN)
        return {"image": image, "label": label, "count": count - 1, "distance": distance}, shapes


def _ink(draw: random.Random) -> tuple[int, int, int]:
    """A random colour."""
    return tuple(draw.randrange(256) for _ in range(3))


def _ground(draw: random.Random, side: int) -> Image.Image:
    """A smooth background between two colours, none of them extreme."""
    cells = draw.choice((2, 3, 4))
    noise = Image.frombytes("L", (cells, cells), bytes(draw.randrange(256) for _ in range(cells * cells)))
    tones = [Image.new("RGB", (side, side), tuple(68 + c * 120 // 255 for c in _ink(draw))) for _ in range(2)]
    return Image.composite(*tones, noise.resize((side, side), Image.Resampling.BICUBIC))


def _pattern(kind: str, draw: random.Random, side: int) -> Image.Image:
    """Stripes, checks or dots in a dark and a light colour, with a random phase, over a whole picture."""
    dark, light = (tuple(base + c // 3 for c in _ink(draw)) for base in (0, 170))
    picture = Image.new("RGB", (side, side), dark)
    pen = ImageDraw.Draw(picture)
    period = side * draw.uniform(0.09, 0.12)
    a, b = (draw.uniform(0, period) for _ in range(2))
    starts = range(-1, round(side / period) + 2)
    if kind in ("checks", "dots"):
        for i in starts:
            for j in starts:
                x, y = i * period - a, j * period - b
                if kind == "dots":
                    pen.ellipse([x, y, x + 0.6 * period, y + 0.6 * period], fill=light)
                elif (i + j) % 2:
                    pen.rectangle([x, y, x + period - 1, y + period - 1], fill=light)
        return picture
    slope = {"level": 0, "upright": None, "rising": -1, "falling": 1}[kind]
    step = period * (math.sqrt(2) if slope else 1)
    for i in range(-round(side / step) - 2, 2 * round(side / step) + 2):
        at = i * step - a
        ends = [(at, 0), (at, side)] if slope is None else [(0, at), (side, at + slope * side)]
        pen.line(ends, fill=light, width=round(period / 2))
    return picture


def _form(kind: str, x: float, y: float, radius: float, turn: float, side: int) -> Image.Image:
    """The mask of one shape. turn: its angle in radians."""
    stencil = Image.new("L", (side, side))
    draw = ImageDraw.Draw(stencil)

    def corners(count: int, *reach: float) -> list[tuple[float, float]]:
        angles = [turn + 2 * math.pi * i / count for i in range(count)]
        far = [radius * reach[i % len(reach)] for i in range(count)]
        return [(x + r * math.cos(angle), y + r * math.sin(angle)) for r, angle in zip(far, angles, strict=True)]

    def disc(reach: float, fill: int) -> None:
        r = radius * reach
        draw.ellipse([x - r, y - r, x + r, y + r], fill=fill)

    if kind in ("disc", "ring"):
        disc(0.95, 255)
        if kind == "ring":
            disc(0.4, 0)
    else:
        reach = {"square": (4, 1.0), "triangle": (3, 1.0), "star": (10, 1.0, 0.55), "cross": (12, 1.0, 1.0, 0.45)}[kind]
        draw.polygon(corners(*reach), fill=255)
    return stencil
