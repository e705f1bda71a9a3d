"""One training run of a task: resumed from its newest checkpoint, trained, evaluated on the way."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

from ..data.order import DistributedBatchSampler
from ..data.unreadable import batches_of_all
from ..run.length import TIMED, WARM, Length
from ..run.resume import RunCheckpoints
from ..system.screen import Screen
from ..system.signals import Stop
from .log import SupervisedLog
from .settings import Settings
from .step import Batch, Training


class Task(Protocol):
    """What a task gives to its run."""

    title: str  # what is trained on what, in words
    model: nn.Module
    images: Dataset  # images[(epoch, index)]: a training sample, a pure function of the seed and these two
    collate: Callable[[Sequence], Any]  # samples → a batch; tensors in lists, tuples and dictionaries

    def loss(
        self, model: nn.Module, batch: Any, seeds: torch.Tensor, first: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss summed over the images, (), and its parts. `model` is `self.model`, wrapped for several processes.

        seeds (B,): all that is random about a sample comes from its own. first: the number in the run of the first
        sample. A loss that is not a sum over images depends on how a batch is dealt to processes and rounds; then the
        task's documents have to say so.
        """

    def evaluate(self) -> dict[str, float]:
        """Figures on the evaluation images, by name. All processes call it; each evaluates its share."""

    def fingerprint(self) -> str:
        """Of the training images and their annotations."""


class SupervisedRun:
    """A run of the task, which goes on from its newest checkpoint."""

    def __init__(
        self,
        task: Task,
        training: Training,
        length: Length,
        config: Settings,
        text: str,
        accelerator: Accelerator,
        free: tuple[str, ...],
        remark: str | None = None,
    ) -> None:
        """text: the settings as YAML. free: those that may differ when it is resumed. remark: a line to say as training
        begins."""
        self.task, self.training, self.length = task, training, length
        self.config, self.accelerator, self.remark = config, accelerator, remark
        self.epoch = len(task.images)
        self.checkpoints = RunCheckpoints(config, text, accelerator, free)
        self.progress = self.checkpoints.find()
        self.checkpoints.resume(training.saved, training.optimizer, task.fingerprint())

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.progress.step >= self.length.steps

    def dry_run(self, of: str = "") -> None:
        """Run some steps and say how long the run would take. Nothing is written. of: what takes as long, in words."""
        last = self.progress.step + WARM + TIMED
        screen = self.screen(last)
        for step in self.steps(last, SupervisedLog(self.config, self.accelerator, self.progress, screen)):
            if step == last - TIMED:
                begun = time.monotonic()
        screen.close()
        screen.say(self.length.estimate((time.monotonic() - begun) / TIMED) + of)

    def train(self, stop: Stop) -> bool:
        """Train up to the end, to max_steps, or until a signal asks to stop. Returns whether one did."""
        last, every = self.length.last(self.config.max_steps), self.config.eval_every
        screen = self.screen(last)
        log = SupervisedLog(self.config, self.accelerator, self.progress, screen)
        for step in self.steps(last, log, stop):
            evaluating = every and step % every == 0 and step < self.length.steps
            saving = self.checkpoints.due(step) or step == last
            if evaluating or saving or log.stopping:
                log.flush(self.task.evaluate() if evaluating else None)
            if saving or log.stopping:  # the line that was just written may say so
                self.checkpoints.save(self.training.saved, self.training.optimizer, self.progress)
            if log.stopping:
                break
        screen.close()
        if not self.finished:
            screen.say(f"stopped after step {self.progress.step} and saved: the same command goes on from there")
        return log.stopping

    def steps(self, last: int, log: SupervisedLog, stop: Stop | None = None) -> Iterator[int]:
        """Train up to this step; yields the number of each step when it is done and in the log."""
        batches = self.batches()
        for step in range(self.progress.step + 1, last + 1):
            log.start_clock()
            lr = self.config.optim.learning_rate(self.progress.samples, self.epoch, self.length.samples)
            figures = self.training.step(batches, step, lr)
            self.progress.step, self.progress.samples = step, step * self.length.batch
            log.add(lr, figures, stop is not None and stop.asked)
            yield step
        log.flush()

    def batches(self) -> Iterator[Batch]:
        """This process's micro-batches from where the run is, without end."""
        rank, processes, length = self.accelerator.process_index, self.accelerator.num_processes, self.length
        sampler = DistributedBatchSampler(
            self.config.seed, self.epoch, length.batch, length.micro_batch, rank, processes, self.progress.samples
        )
        return batches_of_all(
            _Keyed(self.task.images),
            partial(_collate, self.task.collate),
            batch_sampler=sampler,
            num_workers=self.config.workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def screen(self, last: int) -> Screen:
        """The progress bar, and under it what is trained."""
        screen = Screen(last, self.progress.step, self.accelerator.is_main_process)
        screen.say(f"{self.task.title}, {self.length.describe(self.progress.step)}, in {self.config.output_dir}")
        screen.say(self.remark)
        return screen


class _Keyed(Dataset):
    """Samples with their keys."""

    def __init__(self, images: Dataset) -> None:
        self.images = images

    def __getitem__(self, key: tuple[int, int]) -> tuple[tuple[int, int], Any]:
        return key, self.images[key]


def _collate(collate: Callable[[Sequence], Any], items: list) -> Batch:
    keys, samples = zip(*items, strict=True)
    return torch.tensor(keys), collate(samples)
