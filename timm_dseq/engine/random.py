"""Random numbers that are pure functions of a seed: seeds (B,) → uniform numbers (B, count).

A counter is hashed with the seed by integer arithmetic, so a sample draws the same numbers on every device and in every
batch.
"""

import torch

_LOW = 0xFFFFFFFF


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijective hash of 32-bit numbers held in int64. The multipliers are signed, so no product overflows."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _LOW
    x = x ^ (x >> 15)
    x = (x * (0x846CA68B - 2**32)) & _LOW
    return x ^ (x >> 16)


def uniform(seeds: torch.Tensor, count: int, stream: int = 0) -> torch.Tensor:
    """Uniform numbers in [0, 1), float32: (B, count). Different streams of one seed are independent."""
    seeds = seeds.long()
    key = _mix(_mix(_mix((seeds & _LOW) ^ 0x3C6EF372) ^ ((seeds >> 32) & _LOW)) ^ ((stream * 0x9E3779B1) & _LOW))
    counter = torch.arange(1, count + 1, device=seeds.device)
    bits = _mix(_mix((key[:, None] + counter * 0x9E3779B1) & _LOW) ^ key[:, None])
    return (bits >> 8).float() / 2**24


def hashed(columns: torch.Tensor) -> torch.Tensor:
    """Rows of integers (B, n) → 63 bits that depend on all numbers of the row and on their order: (B,) int64."""
    low = torch.full_like(columns[:, 0], 0x510E527F)
    high = torch.full_like(low, 0x1F83D9AB)
    for column in columns.long().unbind(1):
        for part in (column & _LOW, (column >> 32) & _LOW):
            low = _mix(low ^ part)
            high = _mix((high + low) & _LOW ^ part)
    return ((high & 0x7FFFFFFF) << 32) | low
