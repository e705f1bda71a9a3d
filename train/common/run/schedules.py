"""Schedules: values that change over a run, as pure functions of the share of it that is done, 0 to 1."""

import math


def linear(done: float, start: float, end: float) -> float:
    """Straight from start to end."""
    return start + (end - start) * min(done, 1.0)


def cosine(done: float, start: float, end: float) -> float:
    """Half a cosine from start to end."""
    return end + (start - end) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def warmup_cosine(samples: int, total: int, warmup: float, start: float, peak: float, end: float) -> float:
    """Linear from start to peak over the warm-up, then a cosine to the end."""
    if samples < warmup:
        return linear(samples / warmup, start, peak)
    return cosine((samples - warmup) / max(1.0, total - warmup), peak, end)
