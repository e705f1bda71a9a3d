"""A data set decoded once: numbered images → one file of squares, uint8, that is mapped into memory.

    CACHE/NAME-KEY.safetensors  sizes (N, 2) int32, height and width before; images (N, 3, W, W) uint8

The key is made of the images and W, so no file can be stale. All processes of a node decode their share; one that is
killed leaves a .part and marks of what is whole in it, and the next one goes on from there. Size 0: cannot be read.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HOME
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from timm_dseq import UserError

from ..system.screen import Screen
from ..system.signals import deaf
from .settings import Data
from .source import TRIES, Source, decode, measured, opened

CHUNK = 64  # images that are decoded, written and marked together
SECONDS = 5.0  # work that a kill may undo
_ROUND = 60.0  # seconds after which processes tell each other how far they are


@dataclass(frozen=True)
class Place:
    """A file of pixels that is there, or is to be built."""

    path: Path
    header: bytes
    images: int
    side: int

    @classmethod
    def of(cls, source: Source, side: int, data: Data) -> "Place":
        known = getattr(source.rows, "_fingerprint", "")  # of `datasets`
        about = [source.fingerprint(), known, len(source), side, source.image]
        key = hashlib.blake2b(json.dumps(about).encode(), digest_size=8).hexdigest()
        folder = Path(data.cache) if data.cache else Path(HF_HOME) / "timm_dseq"
        return cls(folder / f"{source.name}-{key}.safetensors", _header(key, len(source), side), len(source), side)

    @property
    def bytes(self) -> int:
        return len(self.header) + self.images * (8 + 3 * self.side**2)

    @property
    def part(self) -> Path:
        return self.path.with_suffix(".part")

    @property
    def marks(self) -> Path:
        return self.path.with_suffix(".marks")

    def lacks(self) -> int:
        """Bytes that the disk has too few for it."""
        folder = next(folder for folder in self.path.absolute().parents if folder.exists())
        held = self.part.stat().st_blocks * 512 if self.part.exists() else 0
        return 0 if self.path.exists() else max(0, self.bytes - held - shutil.disk_usage(folder).free)

    def row(self, index: int) -> int:
        """Where an image begins."""
        return len(self.header) + 8 * self.images + 3 * self.side**2 * index

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """images (N, 3, W, W) and sizes (N, 2), mapped; or one line on what is wrong with the file."""
        found = self.path.stat().st_size
        with self.path.open("rb") as file:
            header = file.read(len(self.header))
        if header != self.header:
            raise UserError(f"{self.path} holds other data than its name says: delete it, and it is built again.")
        if found != self.bytes:
            raise UserError(f"{self.path} has {found} of {self.bytes} bytes: delete it, and it is built again.")
        sizes = np.memmap(self.path, np.int32, "r", len(self.header), (self.images, 2))
        # copy on write: torch takes no memory that may not be written
        images = np.memmap(self.path, np.uint8, "c", self.row(0), (self.images, 3, self.side, self.side))
        return images, np.array(sizes)


def _header(key: str, images: int, side: int) -> bytes:
    """Of a safetensors file."""
    first, second = 8 * images, 8 * images + 3 * images * side**2
    described = {
        "__metadata__": {"format": "timm_dseq pixels 1", "key": key, "images": str(images), "side": str(side)},
        "sizes": {"dtype": "I32", "shape": [images, 2], "data_offsets": [0, first]},
        "images": {"dtype": "U8", "shape": [images, 3, side, side], "data_offsets": [first, second]},
    }
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def working_side(source: Source, img_size: int) -> int:
    """Crops of img_size lose little in squares of 8/7 of it, nor do images that are smaller; 0: none can be read."""
    largest = 0
    for index in range(0, len(source), max(1, len(source) // 64)):
        try:
            largest = max(largest, *opened(source.rows[index][source.image]).size)
        except Exception:  # PIL's readers raise almost anything on damaged files
            continue
    return min(math.ceil(img_size * 8 / 7), largest)


class Squares(Dataset):
    """`squares[index]`: the image squashed to (3, W, W) uint8, and its height and width; zeros where unreadable."""

    def __init__(self, source: Source, side: int) -> None:
        self.source, self.side = source, side

    def __getitem__(self, index: int) -> tuple[np.ndarray, tuple[int, int]]:
        try:
            image, size = measured(self.source.rows[index][self.source.image])
            picture = decode(image, min(size) / self.side)
        except Exception:  # it is named whenever its turn comes
            return np.zeros((3, self.side, self.side), np.uint8), (0, 0)
        if picture.size != (self.side, self.side):
            shrunk = round(size[1] / picture.width)  # of a JPEG decoded smaller the last line may lie half outside
            box = (0, 0, size[1] / shrunk, size[0] / shrunk)
            picture = picture.resize((self.side, self.side), Image.Resampling.BICUBIC, box=box)
        return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1)), size


def _together(items: list) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, sizes = zip(*items, strict=True)
    return torch.from_numpy(np.stack(pixels)), torch.tensor(sizes, dtype=torch.int32)


def build(place: Place, source: Source, workers: int, accelerator: Accelerator) -> Place:
    """The file, on every node's disk. All processes have to call it; each hears within a minute what became of others.

    Returned is the place as the node's first process knows it: the one that is built.
    """
    rank, first = accelerator.process_index, accelerator.process_index - accelerator.local_process_index
    lock = FileLock(place.path.with_suffix(".lock"))
    share: Iterator[None] | None = None
    waited = False
    try:
        while True:
            mine = _state(place, lock) if rank == first else ("", None)
            every = gather_object([(first, place, *mine)])
            _agree(wrong for _, _, _, wrong in every)
            states = {node: (its, state) for node, its, state, _ in every if state}
            place, state = states[first]
            if all(state == "ready" for _, state in states.values()):
                return place
            wrong = None
            if state == "build":
                processes = sum(node == first for node, *_ in every)
                share = share or _decoded(place, source, workers, rank - first, processes, accelerator.is_main_process)
                wrong = _for_a_while(share, place)
            else:
                if accelerator.is_main_process and not waited:
                    print(f"waiting for another process, which builds {place.path}", flush=True)
                waited = True
                time.sleep(1)
            _agree(gather_object([wrong]))
    finally:
        lock.release()


def _agree(wrongs: Iterable[str | None]) -> None:
    """What went wrong in one process ends all, with its line."""
    if wrong := next(filter(None, wrongs), None):
        raise UserError(wrong)


def _state(place: Place, lock: FileLock) -> tuple[str, str | None]:
    """What is to be done on this node: nothing (ready), build, or wait for another run; and what is wrong."""
    try:
        place.path.parent.mkdir(parents=True, exist_ok=True)
        if not lock.is_locked and not place.path.exists():
            lock.acquire(timeout=0)
        if not place.path.exists():
            _begin(place)
            if not all(place.marks.read_bytes()):
                return "build", None
            os.replace(place.part, place.path)
            place.marks.unlink()
        return "ready", None
    except Timeout:
        return "wait", None
    except OSError as error:
        return "wrong", _unwritable(place, error)
    except UserError as error:
        return "wrong", str(error)


def _begin(place: Place) -> None:
    """An empty file of the right size, and no marks; one that is there already stays."""
    if lacks := place.lacks():
        raise UserError(
            f"{place.path} needs {place.bytes / 2**30:.1f} GiB and the disk has {lacks / 2**30:.1f} GiB too little: "
            "make room, name another folder with data.cache, or give --data.resident false."
        )
    chunks = -(-place.images // CHUNK)
    if place.part.exists() and place.marks.exists() and place.marks.stat().st_size == chunks:
        with place.part.open("rb") as file:
            if file.read(len(place.header)) == place.header and place.part.stat().st_size == place.bytes:
                return
    place.marks.unlink(missing_ok=True)
    with place.part.open("wb") as file:
        file.write(place.header)
        file.truncate(place.bytes)
    place.marks.write_bytes(bytes(chunks))


def _unwritable(place: Place, error: OSError) -> str:
    return f"{place.path.parent} cannot be written ({error.strerror}): make room, or name another with data.cache."


def _decoded(
    place: Place, source: Source, workers: int, rank: int, processes: int, shown: bool
) -> Generator[None, None, None]:
    """Decode one process's chunks of those that are not marked, write and mark them; stops behind each."""
    done = place.marks.read_bytes()
    chunks = [at for at in range(rank, len(done), processes) if not done[at]]
    images = [range(at * CHUNK, min(place.images, (at + 1) * CHUNK)) for at in chunks]
    loader = DataLoader(
        Squares(source, place.side),
        batch_sampler=[list(some) for some in images],
        num_workers=workers,
        collate_fn=_together,
        worker_init_fn=deaf,
    )
    screen = Screen(sum(map(len, images)), 0, shown, unit="image")
    there = min(place.images, CHUNK * sum(done))
    said = f"{place.images:,} images of {source.name} once, into {place.path}" + (
        f": {there:,} are there" if there else ""
    )
    screen.say(f"decoding {said}")
    seen, whole, marked, waiting = 0, False, time.monotonic(), []
    try:
        with place.part.open("r+b") as file, place.marks.open("r+b") as marks:
            for at, some, (pixels, sizes) in zip(chunks, images, loader, strict=True):
                file.seek(len(place.header) + 8 * some.start)
                file.write(sizes.numpy())
                file.seek(place.row(some.start))
                file.write(pixels.numpy())
                seen, whole = seen + len(some), whole or bool(sizes.any())
                if seen >= TRIES and not whole:
                    raise UserError(
                        f"{seen} images in a row cannot be read, the first {source.where(images[0].start)}: is this an "
                        "image column?"
                    )
                waiting.append(at)
                if at == chunks[-1] or time.monotonic() - marked > SECONDS:
                    file.flush()
                    os.fsync(file.fileno())  # before its mark: what is marked is on the disk
                    for place_of_mark in waiting:
                        marks.seek(place_of_mark)
                        marks.write(b"\1")
                    marks.flush()
                    marked, waiting = time.monotonic(), []
                screen.show(seen, f"{source.name}: pixels at {place.side} px")
                yield
    finally:
        screen.close()


def _for_a_while(share: Iterator[None], place: Place) -> str | None:
    """Go on decoding, and return now and then; what is wrong, if anything."""
    end = time.monotonic() + _ROUND
    try:
        for _ in share:
            if time.monotonic() > end:
                break
    except OSError as error:
        return _unwritable(place, error)
    except UserError as error:
        return str(error)
    return None
