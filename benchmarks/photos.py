"""Photos for benchmarks and pictures: a Parquet file with an image column → (B, 3, H, W), normalised as ImageNet."""

import io

import pyarrow.parquet as pq
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms import functional as T


def photos(path: str, count: int | None = None) -> list[Image.Image]:
    """The file's images, from the start again where there are fewer than asked for."""
    column = pq.read_table(path, columns=["image"])["image"].to_pylist()
    images = [Image.open(io.BytesIO(row["bytes"])).convert("RGB") for row in column]
    return images if count is None else [images[i % len(images)] for i in range(count)]


def tensors(images: list[Image.Image], size: int) -> torch.Tensor:
    """Centre crops of one size; a photo that comes round again is cropped elsewhere."""
    out = []
    for i, image in enumerate(images):
        short = size * (1 + 0.15 * (i // 40))
        scale = short / min(image.size)
        image = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))))
        x = T.to_tensor(T.center_crop(image, [size, size]))
        out.append(T.normalize(x, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return torch.stack(out)
