"""Order and randomness of a data set of n numbered images: the number of samples seen decides both.

Sample p of a run is image `order(seed, epoch, n)[p % n]` of epoch p // n. Its crop, the choice between regions and
blocks, and its blocks are drawn from a seed made of (seed, epoch, index). Batches run across the ends of epochs: none
is shortened or padded. The number of workers and processes, and restarts, change nothing.
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
    """Values in the place of an image's index in `sample_seed`, for draws that belong to no single image.

    They never change: another value would change every run that is resumed.
    """

    ORDER = -1  # the order of an epoch's images
    SHARDS = -2  # the order of a stream's shards
    BLOCKS = -3  # the order within a stream's blocks: -3, -4, … one for each; the draws below are not pretraining's
    MIXING = -4  # mixup and cutmix of a group of images
    DROPOUT = -5  # dropout, and whatever else a model draws in training
    SUBSET = -6  # the images of a subset
    VTAB = -7  # the 1,000 images of VTAB-1k


class RandomStream(IntEnum):
    """Independent sequences of random numbers of one seed, for `uniform`. The engine's blocks and orders take
    0, its windows 5."""

    COINS = 1  # regions or blocks
    DROP_PATH = 2
    CROPS = 3
    COLOURS = 4  # and flips


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """63 random bits for one image in one epoch."""
    digest = hashlib.blake2b(struct.pack("<3q", seed, epoch, index), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def sample_seeds(seed: int, samples: torch.Tensor) -> torch.Tensor:
    """63 random bits for each (epoch, index) of samples (B, 2): (B,) int64. A sample's bits do not depend on others."""
    return hashed(torch.cat([torch.full_like(samples[:, :1], seed), samples], dim=1))


def view_seeds(seed: int, samples: torch.Tensor, views: int) -> torch.Tensor:
    """63 random bits for each view of samples (B, 2), those of a sample side by side: (B·V,) int64.

    The first view's are `sample_seeds`, so what a sample is without views does not change.
    """
    first = sample_seeds(seed, samples)
    others = torch.arange(1, views, device=first.device).repeat(len(first))
    others = hashed(torch.stack([first.repeat_interleave(views - 1), others], dim=1))
    return torch.cat([first[:, None], others.view(len(first), views - 1)], dim=1).flatten()


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def order(seed: int, epoch: int, length: int) -> torch.Tensor:
    """The indices of an epoch's images, in their random order: (length,) int64."""
    generator = torch.Generator().manual_seed(sample_seed(seed, epoch, Draw.ORDER))
    return torch.randperm(length, generator=generator)


def samples_at(seed: int, position: int, count: int, length: int) -> torch.Tensor:
    """`count` samples of the run from number `position` on: (epoch, index), (count, 2) int64."""
    parts = []
    while count:
        epoch, place = divmod(position, length)
        indices = order(seed, epoch, length)[place : place + count]
        parts.append(torch.stack([torch.full_like(indices, epoch), indices], dim=1))
        position, count = position + len(indices), count - len(indices)
    return torch.cat(parts)


class DistributedBatchSampler(Sampler[list[tuple[int, int]]]):
    """One process's micro-batches, from a number of samples seen on, without end: lists of (epoch, index).

    Step s of a run is made of samples [s·B, (s+1)·B) of the run's order. They are cut into as many slices as there are
    accumulation rounds, and each slice into as many parts as there are processes: a step's samples depend on neither.
    """

    def __init__(
        self, seed: int, length: int, batch: int, micro_batch: int, rank: int, processes: int, start: int = 0
    ) -> None:
        """length: images in an epoch. batch: B. start: samples that the whole run has seen."""
        self.seed, self.length, self.batch, self.micro_batch = seed, length, batch, micro_batch
        self.rank, self.processes, self.start = rank, processes, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return ([*map(tuple, samples.tolist())] for samples in self.tensors())

    def tensors(self) -> Iterator[torch.Tensor]:
        """The same as tensors (micro_batch, 2) int64."""
        slice_length = self.micro_batch * self.processes
        step = self.start
        while True:
            for slice_start in range(step, step + self.batch, slice_length):
                position = slice_start + self.rank * self.micro_batch
                yield samples_at(self.seed, position, self.micro_batch, self.length)
            step += self.batch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's random numbers on the CPU come from this seed within the block; its generator is restored behind it."""
    with _one_at_a_time, torch.random.fork_rng(devices=[]):  # threads share torch's generator
        torch.random.default_generator.manual_seed(seed)
        yield
