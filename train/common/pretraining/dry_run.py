"""What a run will take: time and memory of steps at both ends of its schedules, and of the largest plan.

Or the other way round: how many steps a run may take that has some minutes.
"""

import time
from collections.abc import Iterator
from dataclasses import replace

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from timm_dseq import UserError, plan_regions
from timm_dseq.engine.regions import Regions

from ..data.source import Source
from ..run.length import TIMED, WARM, Length, duration
from ..run.resume import Progress
from ..system.launch import wait
from ..system.machine import memory
from ..system.screen import Screen
from . import schedule
from .batches import open_batches
from .model import build
from .precision import Precision
from .settings import Config
from .training import Batch, Training

_TO_TRAIN = 0.95  # of the time that is left; probes, checkpoints and the export take the rest


def dry_run(training: Training, batches: Iterator[Batch], images: int, length: Length, screen: Screen) -> None:
    """Measure, and say it on the screen. images: in an epoch. Nothing is written; the weights are spoilt."""
    spent, with_regions = [], training.model.with_regions
    for end, samples in (("start", 0), ("end", length.samples - 1)):
        now = schedule.at(training.config, samples, images, length.samples)
        seconds, most = measured(training, batches, now)
        spent.append(seconds)
        curriculum = f" (lambda {now.regions:.2f})" if with_regions else ""
        screen.say(
            f"dry run, {end} of the run{curriculum}: {seconds:.3g} s a step, {length.batch / seconds:.0f} images/s, "
            f"{most / 2**10:.1f} GiB at most"
        )
    largest_plan = ""
    if with_regions:
        largest_plan = (
            f"with {training.model.region_options['num_regions']} equal regions in all images it would take "
            f"{largest(training, length.micro_batch) / 2**10:.1f} GiB; "
        )
    total = duration(length.steps * sum(spent) / len(spent))
    screen.say(f"dry run: {largest_plan}the whole run of {length.steps} steps would take about {total}")


def length_in_minutes(
    config: Config,
    source: Source | None,
    images: int,
    progress: Progress,
    precision: Precision,
    accelerator: Accelerator,
) -> tuple[Length, str]:
    """As many steps as fit into config.minutes of wall time, and why. All processes have to call it.

    They are chosen as the run begins, and kept in `progress.chosen`. A model of its own is trained to see how long a
    step takes, so that the run's is untouched; first on images that are decoded, then as the run will get them.
    """
    length, why = Length.of(config.optim, images, accelerator.num_processes), "as the run began"
    if "steps" not in progress.chosen:
        wanted = False if source is None else config.data.resident
        for resident in dict.fromkeys((False, wanted)):
            trial = replace(config, data=replace(config.data, resident=resident), max_steps=None)
            own = Progress(chosen=dict(progress.chosen))
            training = Training(build(trial), trial, precision, accelerator)
            silent = Screen(1, 0, shown=False)
            batches = open_batches(trial, training.framing, source, length, own, accelerator, silent)
            moments = [schedule.at(trial, samples, images, length.samples) for samples in (0, length.samples - 1)]
            seconds = sum(measured(training, batches, now)[0] for now in moments) / len(moments)
            left = 60 * config.minutes - (time.time() - psutil.Process().create_time())
            answer = [(int(_TO_TRAIN * left / seconds), f"{seconds:.3g} s a step")]
            broadcast_object_list(answer)
            steps, why = answer[0]
            if steps < 1:
                raise UserError(f"minutes={config.minutes:g} is over before the first step ({why}): give more.")
            length = replace(length, steps=steps)
            del batches, training
        if source is not None:
            progress.chosen["resident"] = own.chosen["resident"]
        progress.chosen["steps"] = length.steps
    length = replace(length, steps=progress.chosen["steps"])
    return length, f"{config.minutes:g} minutes are {length.steps} steps, {length.samples / images:.3g} epochs: {why}"


def measured(training: Training, batches: Iterator[Batch], now: schedule.Now) -> tuple[float, float]:
    """Seconds of a step at one moment of the schedules, and peak memory in MiB."""
    device = training.accelerator.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for step in range(WARM + TIMED):
        if step == WARM:
            wait(device)
            begun = time.perf_counter()
        training.step(batches, now)
    wait(device)
    return (time.perf_counter() - begun) / TIMED, memory()


def largest(training: Training, images: int) -> float:
    """Peak memory in MiB of a micro-batch whose images all have the most regions, of equal size."""
    model, device = training.model, training.accelerator.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    regions = equal_regions(model.student.patch_embed.grid_size, model.region_options["num_regions"], images, device)
    height, width = model.student.patch_embed.img_size
    pixels = torch.zeros(images, 3, height, width, dtype=training.precision.dtype)
    with training.precision.autocast():
        predictions = training.wrapped(pixels.to(device), plan=plan_regions(regions))
        predictions.float().square().mean().backward()
    model.zero_grad(set_to_none=True)
    return memory()


def equal_regions(grid: tuple[int, int], count: int, images: int, device: torch.device) -> Regions:
    """The same equal bands of patches, which cover the grid, for every image."""
    h, w = grid
    band = torch.arange(h * w, device=device) * count // (h * w)
    masks = (band == torch.arange(count, device=device)[:, None]).view(1, count, h, w).expand(images, -1, -1, -1)
    area = masks.sum((2, 3))
    return Regions(masks, torch.full_like(area[:, 0], count - 1), area, torch.ones_like(area, dtype=torch.float32))
