"""Pictures of what a segmenter sees: image, truth and prediction side by side, with a legend of their classes."""

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .classes import IGNORED

_GAP, _LINE, _SWATCH = 6, 18, 12  # pixels between pictures, of a line of the legend, of a colour in it
_NARROW, _WIDE = 196, 296  # pixels of a picture's width, at least and at most
_SHARE = 0.002  # of the pixels of both pictures: rarer classes are not in the legend


def palette(classes: int) -> np.ndarray:
    """(K + 1, 3) uint8: a colour for each class, told apart by hue, then by lightness; black for ignored pixels."""
    golden = 0.618034
    colours = [
        colorsys.hls_to_rgb(k * golden % 1, (0.5, 0.68, 0.36)[k // 8 % 3], (0.75, 0.55)[k // 24 % 2])
        for k in range(classes)
    ]
    return np.rint(255 * np.array([*colours, (0, 0, 0)])).astype(np.uint8)


def sheet(image: torch.Tensor, numbers: torch.Tensor, predicted: torch.Tensor, names: Sequence[str]) -> Image.Image:
    """image (3, H, W) uint8; numbers, of classes or IGNORED, and predicted (H, W) → one picture."""
    colours = palette(len(names))
    truth, said = (each.cpu().numpy().astype(np.int64) for each in (numbers, predicted))
    photo = image.permute(1, 2, 0).cpu().numpy()
    parts = [Image.fromarray(pixels) for pixels in (photo, colours[truth], colours[said])]
    width = min(max(_NARROW, parts[0].width), _WIDE)
    size = (width, max(1, round(parts[0].height * width / parts[0].width)))
    modes = (Image.Resampling.BILINEAR, Image.Resampling.NEAREST, Image.Resampling.NEAREST)
    parts = [part.resize(size, mode) for part, mode in zip(parts, modes, strict=True)]
    counts = np.bincount(np.concatenate([truth[truth != IGNORED], said.ravel()]), minlength=len(names))
    shown = [k for k in np.argsort(-counts, kind="stable").tolist() if counts[k] > _SHARE * counts.sum()]
    entries = [(names[k], colours[k]) for k in shown] + [("ignored", colours[IGNORED])] * bool((truth == IGNORED).any())
    legend = _legend(entries, 3 * width + 2 * _GAP)
    page = Image.new("RGB", (legend.width, size[1] + _GAP + legend.height), "white")
    for place, part in enumerate(parts):
        page.paste(part, (place * (width + _GAP), 0))
    page.paste(legend, (0, size[1] + _GAP))
    return page


def _legend(entries: Sequence[tuple[str, np.ndarray]], width: int) -> Image.Image:
    """Colours and names in as many lines as they need."""
    font, places, x, y = ImageFont.load_default(12), [], 0, 0
    for name, _ in entries:
        length = _SWATCH + 4 + round(font.getlength(name)) + 14
        if x and x + length > width:
            x, y = 0, y + _LINE
        places.append((x, y))
        x += length
    picture = Image.new("RGB", (width, y + _LINE), "white")
    draw = ImageDraw.Draw(picture)
    for (name, colour), (x, y) in zip(entries, places, strict=True):
        draw.rectangle([x, y + 2, x + _SWATCH, y + 2 + _SWATCH], fill=tuple(colour.tolist()))
        draw.text((x + _SWATCH + 4, y + 1), name, fill="#181a20", font=font)
    return picture
