"""Random crops and colours: seeds (B,) → boxes (B, 4), and batches of pixels, uint8 in and out.

Boxes are drawn on the host, for decoded and for resident images alike, so a sample's box is the same in both. A batch
is cropped at once by matrix products of integers small enough to be exact in float32: pixels depend neither on the
device nor on the rest of the batch.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from timm_dseq.engine.random import uniform
from timm_dseq.engine.views.windows import SIDE
from timm_dseq.host import to_device

from .order import RandomStream

_RATIO = (3 / 4, 4 / 3)  # least and greatest aspect ratio of a box
_ATTEMPTS = 10  # to draw a box that lies inside the image, as torchvision's RandomResizedCrop
_FINE = 2.0**16  # weights are multiples of 1 / _FINE: 128 * _FINE * sum |weight| stays below 2**24, exact in float32
_AT_ONCE = 2**28  # bytes of a batch's pixels, as float32, that are cropped together


def box_draws(seeds: torch.Tensor, scale: tuple[float, float]) -> np.ndarray:
    """Random numbers for boxes in images of any size, (B, 10 attempts, 4): share of the area, aspect ratio, and the
    position down and across, from 0 to 1."""
    draws = uniform(seeds, 4 * _ATTEMPTS, stream=RandomStream.CROPS).double().view(-1, _ATTEMPTS, 4)
    low, high = map(math.log, _RATIO)
    share = scale[0] + draws[..., 0] * (scale[1] - scale[0])
    aspect = torch.exp(low + draws[..., 1] * (high - low))
    return torch.stack([share, aspect, draws[..., 2], draws[..., 3]], dim=2).numpy()


def crop_boxes(draws: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """RandomResizedCrop's boxes (B, 4) int64: top, left, height, width.

    draws: box_draws' (B, 10, 4). sizes: (height, width) of the images (B, 2).
    """
    every = np.arange(len(draws))
    size = sizes.astype(np.float64)
    area = size.prod(1, keepdims=True) * draws[..., 0]  # (B, 10)
    box = np.stack([np.sqrt(area / draws[..., 1]), np.sqrt(area * draws[..., 1])], axis=2).round()  # height, width
    inside = ((box > 0) & (box <= size[:, None])).all(2)
    first = inside.argmax(1)
    box = box[every, first]
    corner = np.floor(draws[every, first, 2:] * (size - box + 1))
    failed = ~inside.any(1)
    if failed.any():  # the largest box whose aspect ratio is allowed, in the middle of the image
        height, width = size[failed].T
        largest = [np.minimum(height, (width / _RATIO[0]).round()), np.minimum(width, (height * _RATIO[1]).round())]
        box[failed] = np.stack(largest, axis=1)
        corner[failed] = (size[failed] - box[failed]) // 2
    return np.concatenate([corner, box], axis=1).astype(np.int64)


def cropped(
    images: torch.Tensor, sizes: np.ndarray, boxes: np.ndarray, size: int, flips: torch.Tensor | None = None
) -> torch.Tensor:
    """Boxes (B, 4) of images, resized to S × S: uint8 (B, 3, S, S); mirrored where flips (B,) say so.

    images: uint8 (B, 3, W, W), resized from (height, width) sizes (B, 2), in which the boxes are given. As Pillow's
    bicubic resizing of the cropped image: antialiased, rounded to integers between its two passes, without pixels from
    beyond the box. (Pillow from 13 on makes the vertical pass of tall boxes first, which differs where values between
    the passes are clipped at 0 or 255.)
    """
    lines = torch.arange(size).expand(len(boxes), 1, -1)
    return _cropped_parts(images, sizes, boxes, size, lines, lines, flips).squeeze(1)


def cropped_windows(
    images: torch.Tensor,
    sizes: np.ndarray,
    boxes: np.ndarray,
    size: int,
    flips: torch.Tensor,
    windows: torch.Tensor,
    grid: tuple[int, int],
) -> torch.Tensor:
    """Some patches of V such crops of each image, as `cut` cuts them: uint8 (B·V, 3, K·p, p).

    sizes, boxes, flips, windows (B·V, …): those of an image side by side. Only the windows are computed.
    """
    corner, patch = windows[:, :: SIDE**2], size // grid[0]
    line = torch.arange(SIDE * patch)
    down, across = (part[..., None] * patch + line for part in (corner // grid[1], corner % grid[1]))
    parts = _cropped_parts(images, sizes, boxes, size, down, across, flips)  # (B·V, windows, 3, 2·p, 2·p)
    parts = parts.unflatten(4, (SIDE, patch)).unflatten(3, (SIDE, patch))
    return parts.permute(0, 2, 1, 3, 5, 4, 6).flatten(2, 5)


def _cropped_parts(
    images: torch.Tensor,
    sizes: np.ndarray,
    boxes: np.ndarray,
    size: int,
    down: torch.Tensor,
    across: torch.Tensor,
    flips: torch.Tensor | None,
) -> torch.Tensor:
    """Parts of crops to S × S, V of each image: uint8 (B·V, M, 3, r, c).

    images (B, 3, W, W); sizes, boxes, flips (B·V, …). down (B·V, M, r) and across (B·V, M, c): the lines and columns of
    the crop that each of its M parts has.
    """
    batch, _, side, _ = images.shape
    views, count, width = len(boxes) // batch, down.shape[1], across.shape[2]
    if flips is not None:
        across = torch.where(flips[:, None, None], size - 1 - across, across)
    spans = boxes.reshape(-1, 2, 2) * (side / sizes.astype(np.float64))[:, None]  # start, length; down, across
    spans = to_device(torch.from_numpy(spans), images.device)
    down, across = (to_device(lines, images.device) for lines in (down, across))
    at_once = max(1, _AT_ONCE // (12 * side * max(side, views * count * width)))
    with _exact(images.device):
        found = []
        for part in range(0, batch, at_once):
            crops = slice(part * views, (part + at_once) * views)
            own = images[part : part + at_once]
            rows = _weights(*spans[crops, :, 0].T, side, size, down[crops])  # (b·V, M, r, W)
            columns = _weights(*spans[crops, :, 1].T, side, size, across[crops])
            levels = own.reshape(len(own), 3 * side, side).float().sub_(128)
            levels = _centred(levels @ columns.view(len(own), -1, side).mT)  # (b, 3·W, V·M·c)
            levels = levels.view(len(own), 3, side, views * count, width).permute(0, 3, 2, 1, 4)
            levels = rows.flatten(0, 1) @ levels.reshape(-1, side, 3 * width)  # (b·V·M, r, 3·c)
            levels = _centred(levels).add_(128).to(torch.uint8)
            found.append(levels.view(-1, count, levels.shape[1], 3, width).transpose(2, 3))
        return torch.cat(found)


def _centred(levels: torch.Tensor) -> torch.Tensor:
    """Rounded in place to integers from -128 to 127; halves are rounded up, as in Pillow."""
    return levels.add_(0.5).floor_().clamp_(-128, 127)


def _weights(start: torch.Tensor, length: torch.Tensor, side: int, size: int, lines: torch.Tensor) -> torch.Tensor:
    """Weights of `side` input lines in some of `size` output lines, for boxes along one axis: lines (B, …) →
    (B, …, side) float32.

    start, length: of the boxes (B,), in input lines. A line that lies in the box partly counts partly. The weights of
    an output line are multiples of 1 / _FINE and add up to 1.
    """
    device = start.device
    start, length = (x.view(-1, *[1] * lines.ndim) for x in (start, length))
    step = length / size
    width = step.clamp(min=1)  # of the filter, in input lines
    taps = min(side, math.ceil(4 * max(1.0, side / size)) + 1)
    centre = start + (lines[..., None] + 0.5) * step  # (B, …, 1)
    line = (centre - 2 * width).floor().clamp(0, side - taps) + torch.arange(taps, device=device)  # (B, …, taps)
    covered = ((start + length).minimum(line + 1) - start.maximum(line)).clamp(0, 1)
    cumulative = (_bicubic((line + 0.5 - centre) / width) * covered * 2.0**30).round().cumsum(-1)
    cumulative = (cumulative / cumulative[..., -1:] * _FINE).round()
    weight = cumulative.diff(dim=-1, prepend=torch.zeros_like(cumulative[..., :1])) / _FINE
    return torch.zeros(*lines.shape, side, device=device).scatter_(-1, line.long(), weight.float())


def _bicubic(x: torch.Tensor) -> torch.Tensor:
    """Keys' kernel with a = -0.5, as in Pillow."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((2.5 - 0.5 * x) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _rounded(levels: torch.Tensor) -> torch.Tensor:
    """Rounded in place to integers from 0 to 255."""
    return levels.round_().clamp_(0, 255)


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """Matrix products in full float32, also where the run uses TF32 or autocast elsewhere."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False), torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class Colours:
    """How colours change at random. jitter: brightness, contrast and saturation are multiplied by 1 - jitter to
    1 + jitter. hue: colours are turned by -hue to hue of a circle. gray, solarize: chances."""

    jitter: float = 0.0
    hue: float = 0.0
    gray: float = 0.0
    solarize: float = 0.0

    def __call__(self, images: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, H, W) → the same, by seeds (B,), changed in the order of the attributes."""
        if not (self.jitter or self.hue or self.gray or self.solarize):
            return images
        draws = uniform(seeds.to(images.device), 7, stream=RandomStream.COLOURS)  # the first one is the flip's
        draws = draws[:, :, None, None, None]
        if self.jitter or self.hue or self.gray:
            images = self._changed(images, draws)
        if self.solarize:
            images = torch.where((draws[:, 6] < self.solarize) & (images >= 128), 255 - images, images)
        return images

    def _changed(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """All changes but the last; draws (B, 7, 1, 1, 1)."""
        brightness, contrast, saturation = (1 + self.jitter * (2 * draws[:, 1:4] - 1)).unbind(1)
        saturation = torch.where(draws[:, 5] < self.gray, 0.0, saturation)
        levels = images.float()
        if self.jitter:
            # rounded after each change, so the mean is one of integers: the same on every device and in every batch
            levels = _rounded(levels.mul_(brightness))
            mean = (_gray(levels).sum((1, 2, 3), keepdim=True, dtype=torch.float64) / images[0, 0].numel()).float()
            levels = _rounded(levels.mul_(contrast).add_(mean * (1 - contrast)))
        if self.hue:
            levels = _turned(levels, saturation.flatten(), self.hue * (2 * draws[:, 4].flatten() - 1))
        else:
            levels = levels * saturation + _gray(levels) * (1 - saturation)
        return _rounded(levels).to(torch.uint8)


_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))  # brightness, and two of colour


def _turned(levels: torch.Tensor, saturation: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Levels (B, 3, H, W) with their colours weakened by a factor (B,) and turned by a share of a circle (B,).

    The matrix is made of multiples of 1 / 4096, so that sums of its products with integers are exact in float32.
    """
    angle, (yiq, rgb) = 2 * math.pi * turn.double(), _yiq_and_back(levels.device)
    cosine, sine = saturation * angle.cos(), saturation * angle.sin()
    zero, one = torch.zeros_like(sine), torch.ones_like(sine)
    rows = [[one, zero, zero], [zero, cosine, -sine], [zero, sine, cosine]]
    matrix = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)  # (B, 3, 3)
    matrix = ((rgb @ matrix @ yiq * 4096).round() / 4096).float()
    with _exact(levels.device):
        return (matrix @ levels.flatten(2)).view_as(levels)


@lru_cache
def _yiq_and_back(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix that makes YIQ of RGB, and its inverse: (3, 3) float64 each."""
    yiq = torch.tensor(_YIQ, dtype=torch.float64)
    forth, back = (to_device(x, device) for x in (yiq, torch.linalg.inv(yiq)))
    return forth, back


def _gray(levels: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) → (B, 1, H, W), integers."""
    red, green, blue = levels.unbind(1)
    return _rounded(0.299 * red + 0.587 * green + 0.114 * blue)[:, None]


def normalised(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 (B, 3, H, W) → of that type, minus ImageNet's mean, divided by its standard deviation."""
    mean, std = _mean_and_std(dtype, images.device)
    return images.to(dtype).sub_(mean).div_(std)


@lru_cache
def _mean_and_std(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """ImageNet's, for values from 0 to 255: (3, 1, 1) each."""
    both = (255 * torch.tensor(x, dtype=dtype) for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    mean, std = (to_device(x, device)[:, None, None] for x in both)
    return mean, std
