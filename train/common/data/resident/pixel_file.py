"""The file of a data set's pixels, decoded once and mapped into memory: a safetensors file of squares.

    CACHE/NAME-KEY.safetensors  sizes (N, 2) int32, (height, width) before; images (N, 3, W, W) uint8

The key is a digest of the data set and W, so a file is never out of date. Size 0: the image cannot be read.
"""

import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from huggingface_hub.constants import HF_HOME

from timm_dseq import UserError
from timm_dseq.images import UnreadableImage, open_image

from ..settings import Data
from ..source import Source


@dataclass(frozen=True)
class PixelFile:
    """A file of pixels, whether it is built already or not."""

    path: Path
    header: bytes
    images: int  # N
    side: int  # W

    @classmethod
    def of(cls, source: Source, side: int, data: Data) -> "PixelFile":
        about = [source.fingerprint(), source.revision, len(source), side, source.image]
        key = hashlib.blake2b(json.dumps(about).encode(), digest_size=8).hexdigest()
        folder = Path(data.cache) if data.cache else Path(HF_HOME) / "timm_dseq"
        return cls(folder / f"{source.name}-{key}.safetensors", _header(key, len(source), side), len(source), side)

    @property
    def bytes(self) -> int:
        return len(self.header) + self.images * (8 + 3 * self.side**2)

    @property
    def unfinished(self) -> Path:
        """The file while it is built."""
        return self.path.with_suffix(".part")

    @property
    def marks(self) -> Path:
        """One byte for each chunk of images: 1 once it is on the disk. It exists while the file is built."""
        return self.path.with_suffix(".marks")

    def missing_bytes(self) -> int:
        """How many bytes the disk has too few to build it."""
        folder = next(folder for folder in self.path.absolute().parents if folder.exists())
        held = self.unfinished.stat().st_blocks * 512 if self.unfinished.exists() else 0
        return 0 if self.path.exists() else max(0, self.bytes - held - shutil.disk_usage(folder).free)

    def offset(self, index: int) -> int:
        """The byte at which an image's pixels begin."""
        return len(self.header) + 8 * self.images + 3 * self.side**2 * index

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """images (N, 3, W, W) uint8, mapped, and sizes (N, 2) int32; or one line on what is wrong with the file."""
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            header = file.read(len(self.header))
        if header != self.header:
            raise UserError(f"{self.path} holds other data than its name says: delete it, and it is built again.")
        if size != self.bytes:
            raise UserError(f"{self.path} has {size} of {self.bytes} bytes: delete it, and it is built again.")
        sizes = np.memmap(self.path, np.int32, "r", len(self.header), (self.images, 2))
        # "c", copy on write: torch warns of memory that may not be written
        images = np.memmap(self.path, np.uint8, "c", self.offset(0), (self.images, 3, self.side, self.side))
        return images, np.array(sizes)


def working_side(source: Source, img_size: int) -> int:
    """The side W of squares that crops of img_size lose little from: 8/7 of it, or that of the largest image.

    64 images are asked for their size; 0 where none of them can be read.
    """
    largest = 0
    for index in range(0, len(source), max(1, len(source) // 64)):
        try:
            largest = max(largest, *source.read(index, open_image).size)
        except UnreadableImage:
            continue
    return min(math.ceil(img_size * 8 / 7), largest)


def _header(key: str, images: int, side: int) -> bytes:
    """That of a safetensors file: the length of a JSON text, and the text."""
    first, second = 8 * images, 8 * images + 3 * images * side**2
    tensors = {
        "__metadata__": {"format": "timm_dseq pixels 1", "key": key, "images": str(images), "side": str(side)},
        "sizes": {"dtype": "I32", "shape": [images, 2], "data_offsets": [0, first]},
        "images": {"dtype": "U8", "shape": [images, 3, side, side], "data_offsets": [first, second]},
    }
    text = json.dumps(tensors).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
