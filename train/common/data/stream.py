"""Batches of random crops from a stream: shards of a data set, read one after another, uint8.

The order is a function of seed, epoch, shards and number of processes: `datasets` shuffles the shards, and samples are
shuffled here in blocks of 512. A checkpoint keeps the state of the data set before the current block, and how many
samples of the block were used. On resume the block is read again and those samples are skipped.
"""

import traceback
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import Dataset

from timm_dseq import UserError
from timm_dseq.images import UnreadableImage

from .decoded import Batch, Crops, Item, collate
from .framing import Draws, Framing
from .loading import loaded
from .opening import of_the_hub, one_line, open_rows
from .order import Draw, sample_seed
from .settings import Data
from .unreadable import none_readable

BLOCK = 512  # samples of one process that are shuffled together


class Stream:
    """This process's endless micro-batches. `state` is the position behind the last one that was taken.

    This process reads the rows, in their order; the loader's workers decode and crop.
    """

    def __init__(
        self,
        data: Data,
        framing: Framing,
        rank: int,
        processes: int,
        micro_batch: int,
        state: dict | None = None,
        pinned: bool = False,
    ) -> None:
        """state: the position to go on from. pinned: batches in pinned memory."""
        self.state = state or {"epoch": 0, "block": 0, "taken": 0, "rows": None}
        # The reader holds no reference to this object: in a cycle, the loader's workers would outlive the run.
        reader = Reader(data, framing.seed, rank, processes, micro_batch, self.state)
        self.positions = reader.positions
        self.batches = loaded(
            EncodedCrops(Crops(None, framing)),
            batch_sampler=reader,
            num_workers=data.workers,
            collate_fn=collate_readable,
            pin_memory=pinned,
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        pixels, samples, broken = next(self.batches)
        self.state = self.positions.popleft()
        if not pixels:
            raise none_readable(len(broken), broken[0])
        return pixels, samples, broken


class Reader:
    """Endless micro-batches of (encoded image, (epoch, number)), from a position on."""

    def __init__(self, data: Data, seed: int, rank: int, processes: int, micro_batch: int, state: dict) -> None:
        self.data, self.seed, self.rank, self.processes, self.micro_batch = data, seed, rank, processes, micro_batch
        self.state = state
        self.positions: deque[dict] = deque()  # behind each micro-batch that was handed to the loader
        self.rows, self.image, _ = open_rows(data, data.split, streaming=True, labels=False)
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
            batch = [*islice(samples, self.micro_batch)]
            self.positions.append(batch[-1][2])
            yield [(value, sample) for value, sample, _ in batch]

    def _samples(self) -> Iterator[tuple[Any, tuple[int, int], dict]]:
        """(encoded image, (epoch, number), the position behind it), without end."""
        epoch, block, taken, rows_state = (self.state[key] for key in ("epoch", "block", "taken", "rows"))
        while True:
            rows = self.rows.shuffle(seed=sample_seed(self.seed, epoch, Draw.SHARDS) % 2**32, buffer_size=1)
            if rows_state is not None:
                rows.load_state_dict(rows_state)
            read = iter(rows)
            empty = rows_state is None
            while True:
                before = rows.state_dict()
                values = self._values(read)
                if not values:
                    break
                empty = False
                generator = torch.Generator().manual_seed(sample_seed(self.seed, epoch, Draw.BLOCKS - block))
                for place, at in enumerate(torch.randperm(len(values), generator=generator).tolist()):
                    if place >= taken:
                        sample = epoch, (block * BLOCK + at) * self.processes + self.rank
                        position = {"epoch": epoch, "block": block, "taken": place + 1, "rows": before}
                        yield values[at], sample, position
                block, taken = block + 1, 0
            if empty:
                raise UserError(
                    f"{self.data.path} has no images for process {self.rank} of {self.processes}: use fewer "
                    "processes, or more shards."
                )
            epoch, block, taken, rows_state = epoch + 1, 0, 0, None

    def _values(self, rows: Iterator[dict[str, Any]]) -> list[Any]:
        """The encoded images of the next block; fewer, or none, at the end of an epoch."""
        try:
            return [self._held(row[self.image]) for row in islice(rows, BLOCK)]
        except Exception as error:  # readers of files and network clients raise almost anything
            raise UserError(
                f"{shard_in(error) or self.data.path} cannot be read ({one_line(error)}): bring it whole, or take it "
                "out of the data set."
            ) from error

    def _held(self, value: Any) -> Any:
        """An encoded image; of a data set of others no file of this machine that it may name instead."""
        if of_the_hub(self.data.path) and isinstance(value, dict) and not value["bytes"]:
            return None
        return value


class EncodedCrops(Dataset):
    """(encoded image, (epoch, number)) → pixels, (epoch, number), broken images; no pixels if it is broken."""

    def __init__(self, crops: Crops) -> None:
        self.crops = crops

    def __getitems__(self, items: list[tuple[Any, tuple[int, int]]]) -> list[Item]:
        draws = self.crops.draws([sample for _, sample in items])
        return [self._item(value, sample, own) for (value, sample), own in zip(items, draws, strict=True)]

    def _item(self, value: Any, sample: tuple[int, int], draws: Draws) -> Item:
        try:
            return self.crops.crop(value, draws), sample, []
        except UnreadableImage as error:
            path = value.get("path") if isinstance(value, dict) else None
            return {}, sample, [f"{path or f'sample {sample}'}: {error}"]


def collate_readable(items: list[Item]) -> Batch:
    """One batch, each broken image replaced by the next of the batch that is not; no pixels where all are broken."""
    broken = [line for _, _, lines in items for line in lines]
    readable = [item for item in items if item[0]]
    if not readable:
        return {}, torch.zeros(0), broken
    kept = [item if item[0] else readable[at % len(readable)] for at, item in enumerate(items)]
    pixels, samples, _ = collate([(own, sample, []) for own, sample, _ in kept])
    return pixels, samples, broken


def shard_in(error: BaseException) -> str | None:
    """The file that a reader of `datasets` had open when it failed; only the frames of its traceback know it."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for name in ("file", "tar_path"):
            if "datasets" in frame.f_code.co_filename and isinstance(frame.f_locals.get(name), str):
                return frame.f_locals[name]
    return None


def images_in(data: Data) -> int:
    """How many images an epoch of the stream has."""
    if data.images:
        return data.images
    rows, _, _ = open_rows(data, data.split, streaming=True, labels=False)
    split = (rows.info.splits or {}).get(data.split)
    if split is None or not split.num_examples:
        raise UserError(
            f"{data.path} does not tell how many images a stream of it has: give data.images, for the schedules."
        )
    return split.num_examples
