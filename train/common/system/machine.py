"""What this machine has for a process: threads, loader workers, memory, and /dev/shm, through which batches come."""

import os
import shutil
import sys
from pathlib import Path

import psutil
import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

MOST = 16  # workers of a process, where nobody asks for more
_AHEAD = 2  # batches that each worker makes before they are asked for
_SHARED = Path("/dev/shm")


def workers(asked: int | None) -> int:
    """Loader workers of this process: what is asked for, or its share of the cores."""
    if asked is not None:
        return asked
    return max(1, min(MOST, _cores() // _processes()))


def launcher() -> str | None:
    """What started this process, if a launcher did: `accelerate launch` starts several processes by torchrun."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    return "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in os.environ else None


def threads() -> int | None:
    """Threads of this process on a CPU: its share of the cores where a launcher gave it one; None: as they are.

    accelerate and torchrun set OMP_NUM_THREADS=1 unless it is set. Any other number is a user's own.
    """
    if not launcher() or os.environ.get("OMP_NUM_THREADS") != "1":
        return None
    # two threads of one core get in each other's way
    return max(1, min(_cores(), psutil.cpu_count(logical=False) or _cores()) // _processes())


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


def memory() -> float:
    """Most memory that was in use so far, in MiB: of the GPU, or of the process (0 on Windows, which does not tell)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if resource is None:
        return 0.0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2**20 if sys.platform == "darwin" else most / 2**10


def free_memory() -> int:
    """Bytes of the host's memory that are free, or may become so, within the limit of a container."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for names in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:
            limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in names)
        except (OSError, ValueError):  # no such group, or "max"
            continue
        free = min(free, max(0, limit - used))
    return free


def _cores() -> int:
    """Of this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processes() -> int:
    """Of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))
