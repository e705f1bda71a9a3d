"""One sheet of pictures: each image, its saliency and its ranked regions below."""

from pathlib import Path

import torch
from PIL import Image

from timm_dseq.engine.regions import Regions
from timm_dseq.explain import draw_regions, draw_saliency

_CELL, _GAP = 160, 4  # pixels of one picture on the sheet, and between two


def save_sheet(path: Path, images: torch.Tensor, saliency: torch.Tensor, regions: Regions) -> None:
    """images (n, 3, S, S) uint8, saliency (n, h, w) and regions, all on the host → a PNG of n columns."""
    step = _CELL + _GAP
    sheet = Image.new("RGB", (len(images) * step - _GAP, 3 * step - _GAP), "white")
    for i, pixels in enumerate(images):
        photo = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((_CELL, _CELL), Image.Resampling.BICUBIC)
        rows = photo, draw_saliency(photo, saliency[i]), draw_regions(photo, regions, i)
        for row, picture in enumerate(rows):
            sheet.paste(picture, (i * step, row * step))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
