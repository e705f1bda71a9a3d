"""Order and randomness of map-style data: the number of samples seen says everything.

Sample number p of a run is image `order(seed, p // n)[p % n]` of epoch p // n; its crop, coin and blocks are drawn from
the seed that (seed, epoch, index) give. No batch is cut at the end of an epoch, none is padded, and neither workers,
processes nor restarts change what a sample is.
"""

import hashlib
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import lru_cache
from threading import Lock

import torch
from torch.utils.data import Sampler

from timm_dseq.engine.random import hashed

_one_at_a_time = Lock()


class Draw(IntEnum):
    """What takes an image's index in `sample_seed` for a draw that belongs to no single image.

    The numbers stay: another one would change every run that is resumed.
    """

    ORDER = -1  # of the images of an epoch
    SHARDS = -2  # their order in a stream
    MIXING = -4  # mixup and cutmix of a group of images
    DROPOUT = -5  # and all else that a model draws in training
    SUBSET = -6
    VTAB = -7  # the 1,000 images of VTAB-1k
    BLOCKS = -3  # of a stream: -3, -4, … for one block after another; pretraining draws nothing else there


class RandomStream(IntEnum):
    """Sequences of random numbers that belong to one seed, for `uniform`. The engine's blocks and orders have 0."""

    COINS = 1  # regions or blocks
    DROP_PATH = 2
    CROPS = 3
    COLOURS = 4  # and flips


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """63 random bits for one image in one epoch."""
    digest = hashlib.blake2b(struct.pack("<3q", seed, epoch, index), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def sample_seeds(seed: int, samples: torch.Tensor) -> torch.Tensor:
    """63 random bits for each (epoch, index) of samples (B, 2): (B,) int64. No sample's depend on another's."""
    return hashed(torch.cat([torch.full_like(samples[:, :1], seed), samples], dim=1))


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def order(seed: int, epoch: int, length: int) -> torch.Tensor:
    """The images of one epoch in their order: (length,) int64."""
    generator = torch.Generator().manual_seed(sample_seed(seed, epoch, Draw.ORDER))
    return torch.randperm(length, generator=generator)


def samples_at(seed: int, position: int, count: int, length: int) -> torch.Tensor:
    """So many samples in a row from number `position` on: (epoch, index), (count, 2) int64."""
    parts = []
    while count:
        epoch, place = divmod(position, length)
        indices = order(seed, epoch, length)[place : place + count]
        parts.append(torch.stack([torch.full_like(indices, epoch), indices], dim=1))
        position, count = position + len(indices), count - len(indices)
    return torch.cat(parts)


class Share(Sampler[list[tuple[int, int]]]):
    """The micro-batches of one process, from a number of samples seen on: lists of (epoch, index), or tensors.

    A step of the whole run takes `batch` samples in a row; they are dealt to accumulation rounds first, then to
    processes, so that the samples of a step do not depend on either.
    """

    def __init__(
        self, seed: int, length: int, batch: int, micro_batch: int, rank: int, processes: int, start: int = 0
    ) -> None:
        self.seed, self.length, self.batch, self.micro_batch = seed, length, batch, micro_batch
        self.rank, self.processes = rank, processes
        self.start = start  # samples the whole run has seen

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return ([*map(tuple, samples.tolist())] for samples in self.tensors())

    def tensors(self) -> Iterator[torch.Tensor]:
        """The same as (B, 2) int64."""
        together = self.micro_batch * self.processes
        first = self.start
        while True:
            for round_start in range(first, first + self.batch, together):
                own = round_start + self.rank * self.micro_batch
                yield samples_at(self.seed, own, self.micro_batch, self.length)
            first += self.batch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """What torch draws inside comes from the seed, whatever was drawn before; afterwards all is as it was."""
    with _one_at_a_time, torch.random.fork_rng(devices=[]):  # threads share torch's generator
        torch.random.default_generator.manual_seed(seed)
        yield
