"""Fine-tune a backbone on labelled images: `accelerate launch train/finetune.py --model NAME --data NAME`.

Ends in a Hub-ready classifier. `--recipe` names whose settings are the defaults, `--help` lists every setting. A run
that was stopped, killed or crashed resumes when the same command is given again.
"""

import common.system.environment  # noqa: F401, I001  # before torch is loaded

from dataclasses import replace
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from common.data.digests import digests_of, duplicates
from common.labels.labelled import Labelled, open_labelled
from common.run import results
from common.run.lock import locked
from common.system import launch
from common.system.signals import STOPPED, Stop
from common.tuning.export import export
from common.tuning.run import seed_run
from common.tuning.settings import Tuning, fitted, parse


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
        task, training = seed_run(own, text, labelled, accelerator)
        if config.dry_run:
            training.dry_run(", for each seed")
            return 0
        counts = counts or count_duplicates(config, splits, accelerator)  # slow: it comes after all quick checks
        stop = stop or Stop()
        stopped = training.train(stop)
        if not training.finished:
            return STOPPED if stopped else 0
        finished.append(task.result())
        del task, training  # their memory is free for the next one
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


if __name__ == "__main__":
    launch.exit_with(main)
