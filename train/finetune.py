"""Fine-tune a backbone on labelled images: `accelerate launch train/finetune.py --model NAME --data NAME`.

Ends in a Hub-ready classifier. `--recipe` names whose settings are the defaults, `--help` lists every setting. A run
that was stopped, killed or crashed resumes when the same command is given again.
"""

import common.system.environment  # noqa: F401, I001  # before torch is loaded

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from common.data.digests import digests_of, duplicates, labels_digest
from common.data.order import DistributedBatchSampler
from common.data.unreadable import batches_of_all
from common.labels.labelled import Labelled, open_labelled
from common.run import results
from common.run.length import TIMED, WARM, Length
from common.run.lock import locked
from common.run.resume import RunCheckpoints
from common.run.schedules import warmup_cosine
from common.salient_crop import check_crop
from common.system import launch, machine
from common.system.screen import Screen
from common.system.signals import STOPPED, Stop
from common.tuning.augment import AugmentedImages, training_transform
from common.tuning.classifier import describe
from common.tuning.evaluation import correct_answers
from common.tuning.export import SeedResult, export
from common.tuning.log import TuningLog
from common.tuning.settings import FREE, Tuning, fitted, parse
from common.tuning.training import Batch, ClassifierTraining

from torch.nn.modules.batchnorm import _BatchNorm

from timm_dseq.hub.load import data_config, load_backbone


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit code: 0 done, 1 something the message names is wrong, 2 misspelt, 75 stopped and saved."""
    return launch.answer("finetune.py", lambda: parse(arguments), run)


def run(config: Tuning, text: str) -> int:
    """All of it, alone in its folder. text: the settings as YAML."""
    results.check(config.results)
    accelerator = launch.accelerator(mixed_precision="bf16" if config.system.precision == "bf16" else "no")
    with locked(config.output_dir, accelerator, wanted=not config.dry_run):
        return train_and_export(config, text, accelerator)


def train_and_export(config: Tuning, text: str, accelerator: Accelerator) -> int:
    """One run for each seed, then the export."""
    splits = [open_labelled(config.data, seed) for seed in config.seeds]
    config, said = fitted(config, min(len(labelled.train) for labelled in splits), accelerator.num_processes)
    if accelerator.is_main_process and said:
        print("\n".join(said), flush=True)
    stop, finished, counts = None, [], None
    for seed, labelled in zip(config.seeds, splits, strict=True):
        own = replace(config, seeds=[seed], output_dir=str(Path(config.output_dir) / f"seed-{seed}"))
        seed_run = SeedRun(own, text, labelled, accelerator)
        if config.dry_run:
            seed_run.dry_run()
            return 0
        counts = counts or count_duplicates(config, splits, accelerator)  # slow: it comes after all quick checks
        stop = stop or Stop()
        stopped = seed_run.train(stop)
        if not seed_run.finished:
            return STOPPED if stopped else 0
        finished.append(seed_run.test())
        del seed_run  # its memory is free for the next one
    accelerator.wait_for_everyone()
    accelerator.end_training()  # the other processes end here, so that they do not wait for the export
    if accelerator.is_main_process:
        export(config, finished, splits[0], counts)
    return 0


def count_duplicates(config: Tuning, splits: list[Labelled], accelerator: Accelerator) -> dict[str, int]:
    """Test images that any seed also trains on, pixel for pixel, and images that are twice in the test split.

    Every image is decoded for it, so an image that cannot be read is named before the first step.
    """
    folder = str(Path(config.output_dir) / "digests")
    test = digests_of(splits[0].test, config.workers, folder, accelerator)
    train = np.concatenate([digests_of(one.train, config.workers, folder, accelerator) for one in splits])
    return {"train_test": duplicates(train, test), "test_test": len(test) - len(np.unique(test, axis=0))}


class SeedRun:
    """The run of one seed, which `config` names: built, resumed from its newest checkpoint, trained, tested."""

    def __init__(self, config: Tuning, text: str, labelled: Labelled, accelerator: Accelerator) -> None:
        """Everything that is quick to check is checked here."""
        self.config, self.labelled, self.accelerator, self.seed = config, labelled, accelerator, config.seeds[0]
        mixing = bool(config.augment.mixup or config.augment.cutmix)
        self.length = Length.of(config.optim, len(labelled.train), accelerator.num_processes, pairs=mixing)
        drop = {"drop_path_rate": config.optim.drop_path} if config.optim.drop_path else {}
        args = {**drop, **config.args, "num_classes": len(labelled.names)}
        model, self.backbone = load_backbone(
            config.model, config.img_size, random=config.random, seed=self.seed, **args
        )
        if config.salient_crop:
            check_crop(model, config.salient_crop)
        self.preprocessing = data_config(model)
        self.description = describe(model, self.backbone, labelled.names, config.data.path, self.preprocessing)
        self.training = ClassifierTraining(model, config, len(labelled.names), accelerator)
        mixes = any(isinstance(part, _BatchNorm) for part in model.modules())  # the images of a round
        free = tuple(name for name in FREE if not (mixes and name == "optim.accumulation"))
        self.checkpoints = RunCheckpoints(config, text, accelerator, free)
        self.progress = self.checkpoints.find()
        fingerprint = f"{labelled.train.fingerprint()} {labels_digest(labelled.train)}"
        self.checkpoints.resume(self.training.checkpointed, self.training.optimizer, fingerprint)

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.progress.step >= self.length.steps

    def dry_run(self) -> None:
        """Run some steps and say how long the run would take. Nothing is written."""
        last = self.progress.step + WARM + TIMED
        screen = self.screen(last)
        for step in self.steps(last, TuningLog(self.config, self.accelerator, self.progress, screen)):
            if step == last - TIMED:
                begun = time.monotonic()
        screen.close()
        screen.say(self.length.estimate((time.monotonic() - begun) / TIMED) + ", for each seed")

    def train(self, stop: Stop) -> bool:
        """Train up to the end, to max_steps, or until a signal asks to stop. Returns whether one did."""
        last, every = self.length.last(self.config.max_steps), self.config.eval_every
        screen = self.screen(last)
        log = TuningLog(self.config, self.accelerator, self.progress, screen)
        for step in self.steps(last, log, stop):
            testing = every and step % every == 0 and step < self.length.steps
            saving = self.checkpoints.due(step) or step == last
            if testing or saving or log.stopping:
                log.flush({"accuracy": self.correct().float().mean().item()} if testing else None)
            if saving or log.stopping:  # the line that was just written may say so
                self.checkpoints.save(self.training.checkpointed, self.training.optimizer, self.progress)
            if log.stopping:
                break
        screen.close()
        if not self.finished:
            screen.say(f"stopped after step {self.progress.step} and saved: the same command goes on from there")
        return log.stopping

    def steps(self, last: int, log: TuningLog, stop: Stop | None = None) -> Iterator[int]:
        """Train up to this step; yields the number of each step when it is done and in the log."""
        batches = self.batches()
        for step in range(self.progress.step + 1, last + 1):
            log.start_clock()
            lr = learning_rate(self.config, self.progress.samples, len(self.labelled.train), self.length.samples)
            figures = self.training.step(batches, step, lr)
            self.progress.step, self.progress.samples = step, step * self.length.batch
            log.add(lr, figures, stop is not None and stop.asked)
            yield step
        log.flush()

    def batches(self) -> Iterator[Batch]:
        """This process's micro-batches from where the run is, without end."""
        rank, processes, length = self.accelerator.process_index, self.accelerator.num_processes, self.length
        transform, train = training_transform(self.config.augment, self.preprocessing), self.labelled.train
        sampler = DistributedBatchSampler(
            self.seed, len(train), length.batch, length.micro_batch, rank, processes, self.progress.samples
        )
        return batches_of_all(
            AugmentedImages(train, transform, self.seed),
            batch_sampler=sampler,
            num_workers=self.config.workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def screen(self, last: int) -> Screen:
        """The progress bar, and under it what is trained."""
        screen = Screen(last, self.progress.step, self.accelerator.is_main_process)
        screen.say(
            f"recipe {self.config.recipe}: {self.backbone} on {self.config.data.path}, seed {self.seed}, "
            f"{self.length.describe(self.progress.step)}, in {self.config.output_dir}"
        )
        batch = self.length.micro_batch * 4 * math.prod(self.preprocessing["input_size"])
        screen.say(machine.short_of_memory(self.config.workers, batch))
        return screen

    def correct(self, salient_crop: str | None = None) -> torch.Tensor:
        """Which test images are classified correctly: (n,) bool. salient_crop: a query, with it also seen closer."""
        tested, workers = self.training.tested, self.config.workers
        return correct_answers(tested, self.labelled.test, self.preprocessing, self.accelerator, workers, salient_crop)

    def test(self) -> SeedResult:
        """The classifier as it is now, and what it says of the test images."""
        correct = self.correct()
        if self.accelerator.is_main_process:
            print(f"seed {self.seed}: {correct.float().mean():.2%} of {len(correct)} test images", flush=True)
        weights = {name: tensor.detach().cpu().clone() for name, tensor in self.training.tested.state_dict().items()}
        closer = self.correct(self.config.salient_crop) if self.config.salient_crop else None
        return SeedResult(self.description, weights, correct, closer)


def learning_rate(config: Tuning, samples: int, epoch: int, total: int) -> float:
    """The head's, after `samples` of `total` samples. epoch: samples in one."""
    optim = config.optim
    peak = optim.base_lr * optim.batch_size / 256
    return warmup_cosine(samples, total, optim.warmup_epochs * epoch, 0.0, peak, optim.lr_end)


if __name__ == "__main__":
    launch.exit_with(main)
