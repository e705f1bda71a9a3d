"""Fine-tune a backbone on labelled images: `accelerate launch train/finetune.py --model NAME --data NAME`.

Ends in a Hub-ready classifier. `--recipe` names whose settings are taken, `--help` lists every one. A run that was
stopped, killed or crashed goes on where it was when the same command is given again.
"""

import common.system.environment  # noqa: F401, I001  # before torch is loaded

import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from common.system import launch, machine
from common.run import results
from common.tuning.augment import Augmented, training_transform
from common.tuning.classifier import Described, describe
from common.data.digests import digests_of, duplicates
from common.tuning.export import Tuned, export
from common.tuning.log import TuningLog
from common.run.resume import RunCheckpoints
from common.labels.labelled import Labelled, open_labelled
from common.tuning.learner import Learner
from common.run.length import TIMED, WARM, Length
from common.data.order import DistributedBatchSampler
from common.data.unreadable import batches_of_all
from common.system.screen import Screen
from common.run.schedules import warmup_cosine
from common.tuning.scoring import right_answers
from common.system.signals import STOPPED, Stop
from common.tuning.settings import FREE, Tuning, parse

from timm_dseq import UserError
from timm_dseq.hub.load import data_config, load_backbone


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit code: 0 done, 1 something the message names is wrong, 2 misspelt, 75 stopped and saved."""
    try:
        return run(*parse(arguments))
    except UserError as error:
        print(f"finetune.py: {error}", file=sys.stderr)
        return 1


def run(config: Tuning, text: str) -> int:
    """One run for each seed, then the export."""
    results.check(config.results)
    accelerator = launch.accelerator(mixed_precision="bf16" if config.system.precision == "bf16" else "no")
    splits = [open_labelled(config.data, seed) for seed in config.seeds]
    look = cache(lambda: seen_twice(config, splits, accelerator))
    stop, tuned = Stop(), []
    for seed, labelled in zip(config.seeds, splits, strict=True):
        own = replace(config, seeds=[seed], output_dir=str(Path(config.output_dir) / f"seed-{seed}"))
        result = tune(own, text, labelled, look, accelerator, stop)
        if isinstance(result, int):
            return result
        tuned.append(result)
    twice = look()
    accelerator.wait_for_everyone()
    accelerator.end_training()  # the other processes end here, so that they do not wait for the export
    if accelerator.is_main_process:
        export(config, tuned, splits[0], twice)
    return 0


def seen_twice(config: Tuning, splits: list[Labelled], accelerator: Accelerator) -> dict[str, int]:
    """Test images that are also trained on, by any seed, and those that are twice in the test split.

    Every image is decoded on the way: one that cannot be is named before anything long begins.
    """
    folder = str(Path(config.output_dir) / "digests")
    tested = digests_of(splits[0].test, config.workers, folder, accelerator)
    trained = np.concatenate([digests_of(one.train, config.workers, folder, accelerator) for one in splits])
    return {"train_test": duplicates(trained, tested), "test_test": len(tested) - len(np.unique(tested, axis=0))}


def tune(
    config: Tuning,
    text: str,
    labelled: Labelled,
    look: Callable[[], dict[str, int]],
    accelerator: Accelerator,
    stop: Stop,
) -> Tuned | int:
    """Model, loop and judgement of one seed; an exit code where the run is not over."""
    seed, images = config.seeds[0], len(labelled.train)
    mixing = bool(config.augment.mixup or config.augment.cutmix)
    length = Length.of(config.optim, images, accelerator.num_processes, pairs=mixing)
    drop = {"drop_path_rate": config.optim.drop_path} if config.optim.drop_path else {}
    model, shown = load_backbone(
        config.model,
        config.img_size,
        random=config.random,
        seed=seed,
        num_classes=len(labelled.names),
        **{**drop, **config.args},
    )
    data = data_config(model)
    described = describe(model, shown, labelled.names, config.data.path, data)
    learner = Learner(model, config, len(labelled.names), accelerator)
    checkpoints = RunCheckpoints(config, text, accelerator, FREE)
    progress = checkpoints.find()
    checkpoints.resume(learner.saved, learner.optimizer, labelled.train.fingerprint())
    last = length.last(config.max_steps)
    if config.dry_run:
        last = progress.step + WARM + TIMED
    else:
        look()  # what is quick to find wrong has been looked for

    screen = Screen(last, progress.step, accelerator.is_main_process)
    screen.say(
        f"recipe {config.recipe}: {shown} on {config.data.path}, seed {seed}, {length.describe(progress.step)}, in "
        f"{config.output_dir}"
    )
    screen.say(machine.short_of_memory(config.workers, length.micro_batch * 4 * math.prod(data["input_size"])))
    log = TuningLog(config, accelerator, progress, screen)
    rank, processes = accelerator.process_index, accelerator.num_processes
    batches = batches_of_all(
        Augmented(labelled.train, training_transform(config.augment, data), seed),
        batch_sampler=DistributedBatchSampler(
            seed, images, length.batch, length.micro_batch, rank, processes, progress.samples
        ),
        num_workers=config.workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    started = 0.0
    for step in range(progress.step + 1, last + 1):
        if step == last - TIMED + 1:
            started = time.monotonic()
        lr = learning_rate(config, progress.samples, images, length.samples)
        figures = learner.step(batches, step, lr)
        progress.step, progress.samples = step, step * length.batch
        log.add(lr, figures, stop.asked)
        due = config.eval_every and step % config.eval_every == 0 and step < length.steps
        if due or checkpoints.due(step) or step == last or log.stopping:
            right = right_answers(learner.judged, labelled.test, data, accelerator, config.workers) if due else None
            log.flush({"accuracy": right.float().mean().item()} if due else None)
        if checkpoints.due(step) or step == last or log.stopping:
            checkpoints.save(learner.saved, learner.optimizer, progress)
        if log.stopping:
            break
        log.start_clock()
    screen.close()
    if config.dry_run:
        screen.say(length.estimate((time.monotonic() - started) / TIMED) + ", for each seed")
        return 0
    if progress.step < length.steps:
        screen.say(f"stopped after step {progress.step} and saved: the same command goes on from there")
        return STOPPED if log.stopping else 0
    return judge(learner, described, labelled, data, config, screen)


def learning_rate(config: Tuning, samples: int, epoch: int, total: int) -> float:
    """Of the head, after `samples` of `total` samples; epoch: samples in one."""
    optim = config.optim
    peak = optim.base_lr * optim.batch_size / 256
    return warmup_cosine(samples, total, optim.warmup_epochs * epoch, 0.0, peak, optim.lr_end)


def judge(
    learner: Learner, described: Described, labelled: Labelled, data: dict[str, Any], config: Tuning, screen: Screen
) -> Tuned:
    """The end of one seed's run."""
    right = right_answers(learner.judged, labelled.test, data, learner.accelerator, config.workers)
    screen.say(f"seed {config.seeds[0]}: {right.float().mean():.2%} of {len(right)} test images")
    weights = {name: tensor.detach().cpu().clone() for name, tensor in learner.judged.state_dict().items()}
    return Tuned(described, weights, right)


if __name__ == "__main__":
    launch.exit_with(main)
