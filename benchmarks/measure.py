"""What benchmarks share: clocks, a profile of the device, the sizes, the goals, and one JSON file a run."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "train"), str(ROOT)]

import common.system.environment  # noqa: E402, F401  # before torch is loaded
import torch  # noqa: E402
from common.data.settings import Data  # noqa: E402
from common.pretraining.settings import Config, Model, Optim, System  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

KERNELS = 25  # of a profile that are kept


@dataclass(frozen=True)
class Size:
    """A model that figures are given for."""

    name: str
    img_size: int
    predictor: tuple[int, int]  # width, depth
    batch: dict[str, int]  # by the kind of device

    def config(self, batch: int, precision: str, **data: Any) -> Config:
        width, depth = self.predictor
        return Config(
            data=Data(**data),
            model=Model(name=self.name, img_size=self.img_size, predictor_width=width, predictor_depth=depth),
            optim=Optim(batch_size=batch),
            system=System(precision=precision),
        )


SIZES = {
    "b16": Size("dseq_jepa_vit_b16", 224, (384, 6), {"cuda": 256, "cpu": 4}),
    "l16": Size("dseq_jepa_vit_l16", 224, (384, 12), {"cuda": 128, "cpu": 2}),
    "ti16": Size("dseq_jepa_vit_ti16", 112, (192, 4), {"cuda": 2048, "cpu": 32}),
    "s16": Size("dseq_jepa_vit_s16", 128, (384, 6), {"cuda": 1024, "cpu": 16}),
}


@dataclass(frozen=True)
class Goal:
    """A figure that a row of results is to reach on one H100."""

    size: str
    row: str  # which of the size's rows
    figure: str
    least: float | None = None
    most: float | None = None

    def judge(self, rows: Iterable[dict]) -> dict:
        """What was found, and whether it is enough: "met", "not met" or "not measured"."""
        mine = [row for row in rows if row["size"] == self.size and row["row"] == self.row and on_cuda(row)]
        found = next((row[self.figure] for row in mine if row.get(self.figure) is not None), None)
        verdict = "not measured"
        if found is not None:
            enough = found >= self.least if self.least is not None else found <= self.most
            verdict = "met" if enough else "not met"
        return {"goal": str(self), "found": found, "verdict": verdict}

    def __str__(self) -> str:
        bound = f"≥ {self.least:,}" if self.least is not None else f"≤ {self.most}"
        return f"{self.size}, {self.row}: {self.figure.replace('_', ' ')} {bound}"


MAIN = "dseq, two regions"
GOALS = [
    Goal("b16", MAIN, "images_per_second", 2000),
    Goal("b16", MAIN, "images_per_second", 2500),
    Goal("b16", MAIN, "peak_share", 0.45),
    Goal("l16", MAIN, "peak_share", 0.5),
    Goal("ti16", "loop, resident", "images_per_second", 20_000),
    Goal("ti16", "loop, resident", "waiting_share", most=0.1),
]


def on_cuda(row: dict) -> bool:
    return row.get("device") == "cuda"


def judged(rows: Iterable[dict]) -> list[dict]:
    rows = list(rows)
    return [goal.judge(rows) for goal in GOALS]


def print_goals(goals: list[dict]) -> None:
    print("goals on one H100:")
    for goal in goals:
        found = "" if goal["found"] is None else f" (found {goal['found']:,.3g})"
        print(f"  {goal['verdict']:14}{goal['goal']}{found}")


def environment(device: torch.device) -> dict[str, Any]:
    """Where figures were measured."""
    names = ("torch", "timm", "accelerate", "datasets", "triton")
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    found = {"versions": versions, "commit": commit(), "cores": cores(), "device": device.type}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": properties.total_memory / 2**30,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    else:
        found |= {"name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    return found


def commit() -> str | None:
    """Of the working tree; None where it was copied without its history."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(step: Callable[[], Any], count: int, device: torch.device) -> float:
    """Of one call, the device's work included."""
    sync(device)
    begun = time.perf_counter()
    for _ in range(count):
        step()
    sync(device)
    return (time.perf_counter() - begun) / count


@dataclass(frozen=True)
class Profile:
    """What the device did in one step."""

    busy: float | None  # seconds in which at least one kernel ran; None on a CPU
    kernels: list[dict]  # the longest, with their milliseconds and calls

    def waiting(self, wall: float) -> float | None:
        """The share of a step of `wall` seconds, timed without the profiler, in which the device waits."""
        return None if self.busy is None else max(0.0, 1 - self.busy / wall)


def profiled(step: Callable[[], Any], count: int, device: torch.device) -> Profile:
    """A profile of some steps; on a CPU it names operations instead of kernels."""
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]) as profiler:
        seconds(step, count, device)
    spans, by_name = [], {}
    for event in profiler.events():
        if gpu != (event.device_type == torch.autograd.DeviceType.CUDA):
            continue
        spent = event.time_range.elapsed_us() if gpu else event.self_cpu_time_total
        if gpu:
            spans.append((event.time_range.start, event.time_range.end))
        total, calls = by_name.get(event.name, (0.0, 0))
        by_name[event.name] = (total + spent, calls + 1)
    longest = sorted(by_name.items(), key=lambda item: -item[1][0])[:KERNELS]
    kernels = [{"name": name, "ms": total / count / 1e3, "calls": calls / count} for name, (total, calls) in longest]
    return Profile(covered(spans) / count / 1e6 if gpu else None, kernels)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals: kernels may overlap."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def write(path: Path | None, record: dict) -> None:
    """One JSON file, whole at any moment."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(record, indent=1))
    fresh.replace(path)


def print_rows(rows: list[dict]) -> None:
    """A table that a person can read."""
    print(f"{'':6}{'':36}{'images/s':>10}{'ms':>9}{'GFLOP/img':>11}{'of peak':>9}{'waits':>8}{'GiB':>7}{'fill':>13}")
    for row in rows:
        if "error" in row:
            print(f"{row['size']:6}{row['row']:36}{row['error']}")
            continue
        line = f"{row['size']:6}{row['row']:36}{row['images_per_second']:10,.1f}{row['ms']:9.1f}"
        for name, width, form in (("gflop", 11, ".1f"), ("peak_share", 9, ".1%"), ("waiting_share", 8, ".1%")):
            line += f"{'–' if row.get(name) is None else format(row[name], form):>{width}}"
        line += f"{row['memory_mib'] / 2**10:7.2f}" if row.get("memory_mib") else f"{'–':>7}"
        print(line + (f"{' / '.join(f'{f:.2f}' for f in row['fill']):>13}" if row.get("fill") else ""), flush=True)
