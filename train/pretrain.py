"""Pretrain a ViT with DSeq-JEPA: `accelerate launch train/pretrain.py`.

With nothing else, a tiny model on scenes drawn on the spot, in minutes on a laptop. `--config train/configs/….yaml` for
the paper's rows, `--help` for every setting. A run that was stopped, killed or crashed resumes when the same command is
given again.
"""

import common.system.environment  # noqa: F401, I001  # before torch is loaded


from accelerate import Accelerator
from common.data.source import open_source
from common.data.stream import images_in
from common.pretraining import schedule
from common.pretraining.batches import open_batches
from common.pretraining.dry_run import dry_run, length_in_minutes
from common.pretraining.export import check_exportable, export
from common.pretraining.log import PretrainingLog, available
from common.pretraining.model import build
from common.pretraining.monitor.monitor import Monitor
from common.pretraining.precision import choose_precision
from common.pretraining.settings import ADDED, AUTOMATIC, Config, free, parse
from common.pretraining.training import Training
from common.run.length import Length
from common.run.lock import locked
from common.run.resume import Progress, RunCheckpoints
from common.system import launch
from common.system.screen import Screen
from common.system.signals import STOPPED, Stop

from timm_dseq.hub.push import check_pushable


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit code: 0 done, 1 something the message names is wrong, 2 misspelt, 75 stopped and saved."""
    return launch.answer("pretrain.py", lambda: parse(arguments), run)


def run(config: Config, text: str) -> int:
    """The run, alone in its folder."""
    accelerator = launch.accelerator(
        log_with=available(config.watch.trackers), project_dir=f"{config.output_dir}/trackers"
    )
    with locked(config.output_dir, accelerator, wanted=not config.dry_run):
        return train(config, text, accelerator)


def train(config: Config, text: str, accelerator: Accelerator) -> int:
    """Data, model, loop, export."""
    if config.hub.push_to and accelerator.is_main_process:
        check_pushable(config.hub.push_to)
    checkpoints = RunCheckpoints(config, text, accelerator, free(config), AUTOMATIC, ADDED)
    progress = checkpoints.find()
    source = None if config.data.streaming else open_source(config.data)
    images = images_in(config.data) if source is None else len(source)
    length, in_minutes = Length.of(config.optim, images, accelerator.num_processes), None
    model = build(config)
    check_exportable(config, model.student)
    precision, why = choose_precision(config, model, progress, accelerator)
    if config.minutes:
        length, in_minutes = length_in_minutes(config, source, images, progress, precision, accelerator)
    last = length.last(config.max_steps)
    training = Training(model, config, precision, accelerator)
    checkpoints.resume(model, training.optimizer, source.fingerprint() if source else f"a stream of {images}")

    screen = Screen(last, progress.step, accelerator.is_main_process)
    screen.say(headline(config, training, length, progress))
    screen.say(f"on {launch.described(accelerator)}, {why}; attention: {training.attention}")
    screen.say(in_minutes)
    batches = open_batches(config, training.framing, source, length, progress, accelerator, screen)
    if config.dry_run:
        dry_run(training, batches, images, length, screen)
        return 0
    if progress.step >= last:
        screen.say(f"nothing is left to train up to step {last}: what step {progress.step} holds is exported")
    monitor = Monitor(config, source, accelerator, training.wrapped, precision, screen)
    log = PretrainingLog(config, accelerator, model, precision, progress, screen)
    before = monitor.measure(0) if progress.step == 0 else {}

    stop = Stop()
    log.start_clock()
    for step in range(progress.step + 1, last + 1):
        now = schedule.at(config, progress.samples, images, length.samples)
        figures = training.step(batches, now, log.numbers)
        progress.step, progress.samples = step, step * length.batch
        log.add(now, figures, stop.asked)
        measuring, saving = monitor.due(step) or step == length.steps, checkpoints.due(step) or step == last
        if step == 1 or measuring or saving or log.stopping:
            log.flush({**(before if step == 1 else {}), **(monitor.measure(step) if measuring else {})})
        if saving or log.stopping:  # the line that was just written may say so
            checkpoints.save(model, training.optimizer, progress, batches.state if source is None else None)
        if log.stopping:
            break
        log.start_clock()
    screen.close()
    if progress.step < last:
        screen.say(f"stopped after step {progress.step} and saved: the same command goes on from there")
        return STOPPED

    accelerator.wait_for_everyone()
    accelerator.end_training()  # the other processes end here, so that they do not wait for the export
    if accelerator.is_main_process:
        export(config, checkpoints.newest(), screen)
    return 0


def headline(config: Config, training: Training, length: Length, progress: Progress) -> str:
    """What is trained, on what, for how long."""
    size = sum(parameter.numel() for parameter in training.model.student.parameters()) / 1e6
    return (
        f"{config.model.objective}: {config.model.name} ({size:.1f} M parameters) at {config.model.img_size} px on "
        f"{config.data.path}, {length.describe(progress.step)}, in {config.output_dir}"
    )


if __name__ == "__main__":
    launch.exit_with(main)
