"""Pretrain a ViT with DSeq-JEPA: `accelerate launch train/pretrain.py`.

With nothing else, a tiny model on scenes drawn on the spot, in minutes on a laptop. `--config train/configs/….yaml` for
the paper's rows, `--help` for every setting. A run that was stopped, killed or crashed goes on where it was when the
same command is given again.
"""

import common.system.environment  # noqa: F401, I001  # before torch is loaded

import sys
from collections.abc import Iterator
from dataclasses import asdict

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from common.system import launch, machine
from common.pretraining import schedule
from common.pretraining.settings import AUTOMATIC, FREE, Config, parse
from common.system.command_line import flat
from common.data.source import Crops, Source, collate, open_source, readable
from common.pretraining.dry_run import dry_run
from common.pretraining.export import check_exportable, finish
from common.run.resume import Done, Keeper
from common.run.length import Length
from common.pretraining.model import build
from common.data.order import Share
from common.data.pixels import Place
from common.pretraining.precision import Precision, chosen
from common.pretraining.log import Recorder, available
from common.system.screen import Screen
from common.data.resident import Resident
from common.pretraining.resident import squares
from common.system.signals import STOPPED, Interrupted, Stop, deaf, interruptible
from common.data.stream import Stream, images_in
from common.pretraining.training import Training
from common.pretraining.monitor.monitor import Watch
from torch.utils.data import DataLoader

from timm_dseq import DSeqJEPA, UserError


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit code: 0 done, 1 something the message names is wrong, 2 misspelt, 75 stopped and saved."""
    try:
        config, text = parse(arguments)
        interruptible()
        return run(config, text)
    except UserError as error:
        print(f"pretrain.py: {error}", file=sys.stderr)
        return 1
    except Interrupted:
        print("pretrain.py: stopped amid its preparations: the same command goes on.", file=sys.stderr)
        return STOPPED


def run(config: Config, text: str) -> int:
    """Data, model, loop, hand-over."""
    accelerator = launch.accelerator(
        log_with=available(config.watch.trackers), project_dir=f"{config.output_dir}/trackers"
    )
    keeper = Keeper(config, text, accelerator, FREE, AUTOMATIC)
    done = keeper.find()
    source = None if config.data.streaming else open_source(config.data)
    images = images_in(config.data) if source is None else len(source)
    length = Length.of(config.optim, images, accelerator.num_processes)
    model = build(config)
    check_exportable(config, model.student)
    why = decide(done, config, model, accelerator)
    precision = Precision(done.chosen["precision"], accelerator.device)
    training = Training(model, config, precision, accelerator)
    keeper.resume(model, training.optimizer, source.fingerprint() if source else f"a stream of {images}")
    if config.watch.trackers and not config.dry_run:
        accelerator.init_trackers(config.watch.project, {name: str(x) for name, x in flat(asdict(config)).items()})
    last = min(length.steps, config.max_steps or length.steps)
    pixels, kept = None, ""
    if done.step < last:
        pixels, kept = squares(done, config, source, length, accelerator)

    screen = Screen(last, done.step, accelerator.is_main_process)
    size = sum(parameter.numel() for parameter in model.student.parameters()) / 1e6
    screen.say(
        f"{config.model.objective}: {config.model.name} ({size:.1f} M parameters) at {config.model.img_size} px on "
        f"{config.data.path}, {length.describe(done.step)}, in {config.output_dir}"
    )
    screen.say(f"on {launch.described(accelerator)}, {why}; attention: {training.attention}")
    if done.step >= last and not config.dry_run:
        screen.say(f"nothing is left to train up to step {last}: what step {done.step} holds is exported")
    watch = Watch(config, accelerator, training.whole, precision, screen)
    recorder = Recorder(config, accelerator, model, precision, done, screen)
    before = {f"{name}_before": found for name, found in watch.look(0).items()} if done.step == 0 else {}
    batches = batches_from(config, source, pixels, length, done, accelerator)
    screen.say(batches.describe() if isinstance(batches, Resident) else kept)
    handed_over = 0 if pixels else length.micro_batch * 3 * config.model.img_size**2
    if line := machine.short_of_memory(config.data.workers, handed_over):
        screen.say(line)
    if config.dry_run:
        dry_run(training, batches, images, length, screen)
        return 0
    stop = Stop()
    recorder.begin()
    for step in range(done.step + 1, last + 1):
        now = schedule.at(config, done.samples, images, length.samples)
        figures = training.step(batches, now, recorder.numbers)
        done.step, done.samples = step, step * length.batch
        recorder.add(done, now, figures, stop.asked)
        look = watch.due(step) or step == length.steps
        if step == 1 or look or keeper.due(step) or step == last or recorder.stopping:
            recorder.flush({**(before if step == 1 else {}), **(watch.look(step) if look else {})})
        if keeper.due(step) or step == last or recorder.stopping:
            keeper.save(model, training.optimizer, done, batches.state if source is None else None)
        if recorder.stopping:
            break
        recorder.begin()
    screen.close()
    if done.step < last:
        screen.say(f"stopped after step {done.step} and saved: the same command goes on from there")
        return STOPPED
    accelerator.wait_for_everyone()
    accelerator.end_training()  # nobody waits for the hand-over, however long it takes
    if accelerator.is_main_process:
        finish(config, keeper.newest(), screen)
    return 0


def decide(done: Done, config: Config, model: DSeqJEPA, accelerator: Accelerator) -> str:
    """What settings that are `auto` become, once for the whole run: into `done.chosen`; and why, in words."""
    if "precision" in done.chosen:
        return f"precision {done.chosen['precision']} as the run began"
    found: list = [None]
    if accelerator.is_main_process:
        found = [chosen(config.system.precision, model, config.model.img_size, accelerator.device)]
    broadcast_object_list(found)
    done.chosen["precision"], why = found[0]
    return f"precision {done.chosen['precision']}: {why}"


def batches_from(
    config: Config,
    source: Source | None,
    pixels: Place | None,
    length: Length,
    done: Done,
    accelerator: Accelerator,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[str]]]:
    """This process's micro-batches behind those that are done, without end: images, (epoch, index), what is broken."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    size, scale = config.model.img_size, config.data.crop_scale
    pinned = accelerator.device.type == "cuda"
    if source is None:
        state = done.streams[rank] if done.streams else None
        return Stream(config.data, size, config.seed, rank, processes, length.micro_batch, state, pinned)
    share = Share(config.seed, len(source), length.batch, length.micro_batch, rank, processes, done.samples)
    if pixels:
        return Resident(pixels, source, size, scale, config.seed, share, accelerator.device)
    crops = Crops(source, size, scale, config.seed)
    return readable(
        DataLoader(
            crops,
            batch_sampler=share,
            num_workers=config.data.workers,
            collate_fn=collate,
            pin_memory=pinned,
            worker_init_fn=deaf,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
