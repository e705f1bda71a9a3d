"""One sheet of pictures: for some images their photo, truth, map and ranked regions, side by side."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from timm_dseq.engine.regions import Regions
from timm_dseq.explain import COLOURS, REST, draw_regions, draw_saliency

from .truth import Truth

_CELL, _GAP, _HEAD = 168, 6, 22
HEADS = ("image", "truth", "map", "ranked regions")


def save_sheet(
    path: Path, photos: Sequence[Image.Image], truths: Sequence[Truth], maps: torch.Tensor, regions: Regions, title: str
) -> None:
    """Photos, their truths, maps (n, h, w) and regions → a JPEG of two halves, side by side: the first n/2 and the
    others."""
    half = -(-len(photos) // 2)
    step = _CELL + _GAP
    width = len(HEADS) * step
    sheet = Image.new("RGB", (_GAP + 2 * width + _GAP, 2 * _HEAD + half * step), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    draw.text((_GAP, 4), title, fill="black", font=font)
    for i, photo in enumerate(photos):
        photo = photo.resize((_CELL, _CELL), Image.Resampling.BICUBIC)
        x, y = _GAP + (i // half) * (width + _GAP), 2 * _HEAD + (i % half) * step
        row = photo, _draw_truth(photo, truths[i]), draw_saliency(photo, maps[i]), draw_regions(photo, regions, i)
        for column, picture in enumerate(row):
            sheet.paste(picture, (x + column * step, y))
    for x in (_GAP, _GAP + width + _GAP)[: 1 + (len(photos) > half)]:
        for column, head in enumerate(HEADS):
            draw.text((x + column * step, _HEAD + 2), head, fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=88)


def _draw_truth(photo: Image.Image, truth: Truth) -> Image.Image:
    """The objects in colour on the grey photo, or their boxes."""
    grey = photo.convert("L").convert("RGB")
    if truth.labels is None:
        draw = ImageDraw.Draw(grey)
        scale = torch.tensor([photo.width / truth.size[0], photo.height / truth.size[1]]).repeat(2)
        for i, box in enumerate((torch.from_numpy(truth.boxes) * scale).tolist()):
            draw.rectangle(box, outline=COLOURS[i % len(COLOURS)], width=2)
        return grey
    palette = torch.tensor([REST, *COLOURS], dtype=torch.uint8)
    labels = torch.from_numpy(truth.labels).long()
    index = torch.where(labels > 0, (labels - 1) % len(COLOURS) + 1, 0)
    tint = Image.fromarray(palette[index].numpy()).resize(photo.size, Image.Resampling.NEAREST)
    inside = Image.fromarray(((labels > 0) * 255).to(torch.uint8).numpy()).resize(photo.size, Image.Resampling.NEAREST)
    return Image.composite(Image.blend(photo, tint, 0.5), grey, inside)
