"""What this machine has for the loader's workers: cores, and memory in which they hand batches over."""

import os
import shutil
from pathlib import Path

MOST = 16  # workers of a process, where nobody asks for more
_AHEAD = 2  # batches that each worker makes before they are asked for
_SHARED = Path("/dev/shm")


def workers(asked: int | None) -> int:
    """Loader workers of this process: what is asked for, or its share of the cores."""
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST, cores // _processes()))


def short_of_memory(workers: int, batch: int) -> str | None:
    """A line where batches of so many bytes do not fit /dev/shm, as in a container that was given 64 MiB of it."""
    if not workers or not _SHARED.is_dir():
        return None
    need, free = workers * _AHEAD * batch * _processes(), shutil.disk_usage(_SHARED).free
    if need <= free:
        return None
    return (
        f"{workers} loader workers of each process may fill {need / 2**20:.0f} MiB of {_SHARED}, which has "
        f"{free / 2**20:.0f} free: a worker that dies of a bus error needs fewer of them (workers), or more of it "
        f"(docker run --shm-size={-(-need // 2**30)}g, or --ipc=host)."
    )


def _processes() -> int:
    """Of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))
