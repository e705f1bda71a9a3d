"""What this machine offers a process: cores, loader workers, memory, and /dev/shm, which carries their batches."""

import os
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import psutil
import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

MOST = 16  # loader workers of a process, unless more are asked for
_AHEAD = 2  # batches that each worker makes in advance
_SHARED = Path("/dev/shm")


def workers(asked: int | None) -> int:
    """Loader workers of this process: as many as are asked for, or its share of the cores."""
    if asked is not None:
        return asked
    return max(1, min(MOST, _cores() // _processes()))


def launcher() -> str | None:
    """The launcher that started this process, if any. `accelerate launch` starts several processes by torchrun."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    return "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in os.environ else None


def processes_asked() -> int:
    """Processes that `accelerate launch` was told to start. With --cpu it starts one, without a word."""
    if launcher() != "accelerate launch":
        return 1
    try:
        words = [*psutil.Process(os.getppid()).cmdline(), ""]
    except psutil.Error:
        return 1
    given = [value for word, value in pairwise(words) if word in ("--num_processes", "--num-processes")]
    given += [word.partition("=")[2] for word in words if word.startswith(("--num_processes=", "--num-processes="))]
    return int(given[-1]) if given and given[-1].isdecimal() else 1


def threads() -> int | None:
    """Threads of this process on a CPU: its share of the cores; None to leave their number as it is.

    Launchers set OMP_NUM_THREADS=1 where it is not set. Any other number was set by the user, and stays.
    """
    if not launcher() or os.environ.get("OMP_NUM_THREADS") != "1":
        return None
    # of physical cores: two threads on one are slower than one
    return max(1, min(_cores(), psutil.cpu_count(logical=False) or _cores()) // _processes())


def short_of_memory(workers: int, batch: int) -> str | None:
    """A warning if the workers' batches, of so many bytes each, do not fit /dev/shm: containers often have 64 MiB."""
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
    """Peak memory so far, in MiB: of the GPU, or of the process (0 on Windows, which does not count it)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if resource is None:
        return 0.0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2**20 if sys.platform == "darwin" else most / 2**10


def free_memory() -> int:
    """Bytes of the host's memory that are free or can be freed, within the limit of a container."""
    free = psutil.virtual_memory().available
    for names in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:
            limit, used = (int(Path("/sys/fs/cgroup", name).read_text(encoding="utf-8")) for name in names)
        except (OSError, ValueError):  # no such group, or "max"
            continue
        free = min(free, max(0, limit - used))
    return free


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processes() -> int:
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))
