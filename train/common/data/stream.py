"""Images in turn: shards of a data set, read as they come, → the same micro-batches that numbered images give.

The order is a function of seed, epoch, shards and number of processes. Shards are shuffled by `datasets`, samples in
blocks here, so that the place in the stream is the data set's own state at the block's start and a count: a run that
goes on reads one block again and continues with the very next sample.
"""

import tarfile
import traceback
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Dataset

from timm_dseq import UserError

from ..system.signals import deaf
from .order import Draw, sample_seed
from .settings import Data
from .source import Crops, Item, collate, image_column, load

BLOCK = 512  # samples of one process that are shuffled together


class Stream:
    """This process's endless micro-batches. `state` is where the last one that was taken ends.

    The rows are read in this process, in their order; the loader's workers decode and crop them.
    """

    def __init__(
        self,
        data: Data,
        size: int,
        seed: int,
        rank: int,
        processes: int,
        micro_batch: int,
        state: dict | None = None,
        pinned: bool = False,
    ) -> None:
        """size: side of the crops."""
        self.state = state or {"epoch": 0, "block": 0, "taken": 0, "rows": None}
        # It must not know this object: a circle would keep the workers, who hear no signal, beyond the run's end.
        reader = Reader(data, seed, rank, processes, micro_batch, self.state)
        self.ends = reader.ends
        loader = DataLoader(
            Encoded(Crops(None, size, data.crop_scale, seed)),
            batch_sampler=reader,
            num_workers=data.workers,
            collate_fn=filled,
            pin_memory=pinned,
            worker_init_fn=deaf,
        )
        self.coming = iter(loader)

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        images, samples, broken = next(self.coming)
        self.state = self.ends.popleft()
        if not len(images):
            raise UserError(
                f"{len(broken)} images in a row cannot be read, the first {broken[0]}: is data.image right?"
            )
        return images, samples, broken


class Reader:
    """Micro-batches of encoded images with their (epoch, number), without end, from a state on."""

    def __init__(self, data: Data, seed: int, rank: int, processes: int, micro_batch: int, state: dict) -> None:
        self.data, self.seed, self.rank, self.processes, self.micro_batch = data, seed, rank, processes, micro_batch
        self.state = state
        self.ends: deque[dict] = deque()  # where each micro-batch ends that was given out
        self.rows, self.image = open_stream(data)
        if processes > 1:
            if rank == 0 and self.rows.num_shards % processes:
                print(
                    f"{data.path} has {self.rows.num_shards} shards, no multiple of {processes} processes: each "
                    "process reads all of them, and leaves what is the others'. Write them anew to read less.",
                    flush=True,
                )
            self.rows = split_dataset_by_node(self.rows, rank, processes)

    def __iter__(self) -> Iterator[list[tuple[Any, tuple[int, int]]]]:
        samples = self._samples()
        while True:
            items = [*islice(samples, self.micro_batch)]
            self.ends.append(items[-1][2])
            yield [(value, sample) for value, sample, _ in items]

    def _samples(self) -> Iterator[tuple[Any, tuple[int, int], dict]]:
        """(image, (epoch, number), state behind it), without end."""
        epoch, block, taken, rows_state = (self.state[key] for key in ("epoch", "block", "taken", "rows"))
        while True:
            rows = self.rows.shuffle(seed=sample_seed(self.seed, epoch, Draw.SHARDS) % 2**32, buffer_size=1)
            if rows_state is not None:
                rows.load_state_dict(rows_state)
            read = iter(rows)
            found = False
            while True:
                before = rows.state_dict()
                try:
                    values = [row[self.image] for _, row in zip(range(BLOCK), read, strict=False)]
                except (OSError, ValueError, datasets.exceptions.DatasetsError, tarfile.TarError) as error:
                    raise UserError(
                        f"{shard_in(error) or self.data.path} cannot be read ({type(error).__name__}: "
                        f"{str(error).splitlines()[0]}): bring it whole, or take it out of the data set."
                    ) from error
                if not values:
                    break
                found = True
                generator = torch.Generator().manual_seed(sample_seed(self.seed, epoch, Draw.BLOCKS - block))
                for place, at in enumerate(torch.randperm(len(values), generator=generator).tolist()):
                    if place >= taken:
                        number = (block * BLOCK + at) * self.processes + self.rank
                        yield (
                            values[at],
                            (epoch, number),
                            {"epoch": epoch, "block": block, "taken": place + 1, "rows": before},
                        )
                block, taken = block + 1, 0
            if not found and rows_state is None:
                raise UserError(
                    f"{self.data.path} has no images for process {self.rank} of {self.processes}: use fewer "
                    "processes, or more shards."
                )
            epoch, block, taken, rows_state = epoch + 1, 0, 0, None


class Encoded(Dataset):
    """Encoded images with their (epoch, number) → crops, the same, and what could not be read."""

    def __init__(self, crops: Crops) -> None:
        self.crops = crops

    def __getitems__(self, items: list[tuple[Any, tuple[int, int]]]) -> list[Item]:
        draws = self.crops.draws([sample for _, sample in items])
        return [self._item(*item, own) for item, own in zip(items, draws, strict=True)]

    def _item(self, value: Any, sample: tuple[int, int], draws: np.ndarray) -> Item:
        try:
            return self.crops.cut(value, draws), sample, []
        except Exception as error:  # PIL's readers raise almost anything on damaged files
            where = value.get("path") if isinstance(value, dict) else None
            return torch.zeros(0), sample, [f"{where or f'sample {sample}'}: {type(error).__name__}: {error}"]


def filled(items: list) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """A micro-batch; what cannot be read is replaced by the next that can. No images where none can."""
    broken = [line for _, _, lines in items for line in lines]
    whole = [item for item in items if item[0].numel()]
    if not whole:
        return torch.zeros(0), torch.zeros(0), broken
    kept = [whole[i % len(whole)] if not item[0].numel() else item for i, item in enumerate(items)]
    images, samples, _ = collate([(image, sample, []) for image, sample, _ in kept])
    return images, samples, broken


def shard_in(error: BaseException) -> str | None:
    """The file that a reader of `datasets` was at when it failed: its errors do not tell, its frames do."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for name in ("file", "tar_path"):
            if "datasets" in frame.f_code.co_filename and isinstance(frame.f_locals.get(name), str):
                return frame.f_locals[name]
    return None


def open_stream(data: Data) -> tuple[datasets.IterableDataset, str]:
    """The streamed split, images still encoded, and their column."""
    rows = load(data, data.split, streaming=True)
    if rows.features is None:
        rows = rows._resolve_features()
    image = image_column(rows, data)
    return rows.cast_column(image, datasets.Image(decode=False)).select_columns([image]), image


def images_in(data: Data) -> int:
    """How many images an epoch of the stream has."""
    if data.images:
        return data.images
    rows, _ = open_stream(data)
    split = (rows.info.splits or {}).get(data.split)
    if split is None or not split.num_examples:
        raise UserError(
            f"{data.path} does not tell how many images a stream of it has: give data.images, for the schedules."
        )
    return split.num_examples
