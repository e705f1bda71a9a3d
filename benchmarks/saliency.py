"""Does a saliency map find objects? ECSSD (photos with masks), every query of the engine, beside a centre prior.

    python benchmarks/saliency.py dseq_jepa_vit_ti16 --data ../shared/data/ecssd/test.parquet
    python benchmarks/saliency.py dseq_jepa_vit_ti16 --random --data ../shared/data/ecssd/test.parquet

maxF: F with beta² = 0.3 of the map cut at each of 255 levels, mean over images, the greatest over levels. A map that is
the same everywhere has 29; one that knows only that objects lie in the middle is the prior. --skip leaves out images
that a choice may have been made by.
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from rich.progress import track
from torch.nn import functional as F

from timm_dseq.engine.saliency import QUERIES, saliency_map
from timm_dseq.hub.load import data_config, load_backbone

BETA, LEVELS, BATCH = 0.3, 255, 50


def max_f(maps: torch.Tensor, masks: list[np.ndarray]) -> float:
    """Of maps (n, h, w) in [0, 1], and masks of any sizes, in %."""
    total = np.zeros(LEVELS)
    for saliency, mask in zip(maps, masks, strict=True):
        full = F.interpolate(saliency[None, None], size=mask.shape, mode="bilinear", align_corners=False)[0, 0]
        level = (full * LEVELS).long().clamp(0, LEVELS - 1).numpy()
        hit, said = (
            np.bincount(values.ravel(), minlength=LEVELS)[::-1].cumsum()[::-1] for values in (level[mask], level)
        )
        precision, recall = hit / np.maximum(said, 1), hit / mask.sum()
        total += (1 + BETA) * precision * recall / np.maximum(BETA * precision + recall, 1e-9)
    return 100 * total.max() / len(masks)


def centre_prior(count: int, grid: tuple[int, int], sigma: float = 0.3) -> torch.Tensor:
    """A Gaussian in the middle, the same for all: (n, h, w)."""
    y, x = ((torch.arange(size) + 0.5) / size - 0.5 for size in grid)
    return torch.exp(-(y[:, None] ** 2 + x**2) / (2 * sigma**2)).expand(count, -1, -1)


def brightness(images: torch.Tensor, maps: torch.Tensor) -> float:
    """Mean over images of the absolute correlation of map and brightness, from 0 to 1."""
    gray = F.adaptive_avg_pool2d(images.mean(1, keepdim=True), maps.shape[1:]).flatten(1)
    both = [F.normalize(x - x.mean(1, keepdim=True), dim=1) for x in (gray, maps.flatten(1))]
    return (both[0] * both[1]).sum(1).abs().mean().item()


def masks_of(file: Path, start: int, count: int | None = None) -> list[np.ndarray]:
    """Objects of ECSSD's images, bool, of the images' own sizes."""
    rows = pq.read_table(file, columns=["mask"]).slice(start, count).column("mask").to_pylist()
    return [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("L")) > 127 for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True, help="Parquet file with the columns image and mask")
    parser.add_argument("--random", action="store_true", help="random weights")
    parser.add_argument("--skip", type=int, default=0, help="images to leave out")
    parser.add_argument("--block", type=float, default=11 / 12)
    parser.add_argument("--queries", nargs="+", choices=QUERIES, default=[*QUERIES])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, name = load_backbone(options.model, random=options.random)
    about = data_config(model)
    mean, std = (torch.tensor(about[key])[:, None, None] for key in ("mean", "std"))
    size = about["input_size"][:0:-1]  # width, height
    rows = pq.read_table(options.data, columns=["image"]).slice(options.skip).column("image").to_pylist()
    pictures = [Image.open(io.BytesIO(row["bytes"])).convert("RGB").resize(size) for row in rows]
    masks = masks_of(options.data, options.skip)
    images = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures]) / 255
    record = {"model": name, "images": len(rows), "centre prior": max_f(centre_prior(len(rows), (8, 8)), masks)}
    print(f"{name}, {len(rows)} images, block {options.block:.3g}: centre prior {record['centre prior']:.1f}")
    for query in track(options.queries, "queries"):
        parts = [saliency_map(model, (x - mean) / std, query, options.block) for x in images.split(BATCH)]
        maps = torch.cat(parts)
        found = {"max_f": max_f(maps, masks), "brightness": brightness(images, maps)}
        record[query] = found
        print(
            f"{query:10} maxF {found['max_f']:.1f}, |correlation with brightness| {found['brightness']:.2f}", flush=True
        )
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
