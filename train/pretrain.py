"""Pretrain a ViT with DSeq-JEPA: `accelerate launch train/pretrain.py`.

With nothing else, a tiny model on scenes drawn on the spot, in minutes on a laptop. `--config train/configs/….yaml` for
the paper's rows, `--help` for every setting. A run that was stopped, killed or crashed goes on where it was when the
same command is given again.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

# Read when torch is loaded: threads of OpenMP that spin while they wait take the cores of the loader's workers.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from accelerate import Accelerator
from common import schedules
from common.config import Config, flat, parse
from common.data import Crops, Source, collate, normalised, open_source
from common.finish import finish
from common.keeper import Done, Keeper
from common.length import Length
from common.model import build, optimizer_of
from common.order import Share, sample_seed
from common.record import Figures, Recorder, Screen, available
from common.stop import STOPPED, Stop, deaf
from common.stream import Stream, images_in
from common.update import update
from common.watch import Watch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from timm_dseq import DSeqJEPA, UserError, block_masks
from timm_dseq.draws import uniform


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit code: 0 done, 1 something the message names is wrong, 2 misspelt, 75 stopped and saved."""
    try:
        return run(*parse(arguments))
    except UserError as error:
        print(f"pretrain.py: {error}", file=sys.stderr)
        return 1


def run(config: Config, text: str) -> int:
    """Data, model, loop, hand-over."""
    accelerator = Accelerator(
        mixed_precision="bf16" if config.system.precision == "bf16" else "no",
        log_with=available(config.watch.trackers),
        project_dir=f"{config.output_dir}/trackers",
    )
    source = None if config.data.streaming else open_source(config.data)
    images = images_in(config) if source is None else len(source)
    length = Length.of(config.optim, images, accelerator.num_processes)
    model = build(config)
    whole = spread(model, config, accelerator)
    optimizer = optimizer_of(model, config.optim)
    keeper = Keeper(config, text, source.fingerprint() if source else f"a stream of {images}", accelerator)
    done = keeper.resume(model, optimizer)
    if config.watch.trackers and not config.dry_run:
        accelerator.init_trackers(config.watch.project, {name: str(x) for name, x in flat(asdict(config)).items()})
    last = min(length.steps, config.max_steps or length.steps)
    if config.dry_run:
        last = min(last, done.step + 2)

    screen = Screen(last, done.step, accelerator.is_main_process)
    size = sum(parameter.numel() for parameter in model.student.parameters()) / 1e6
    screen.say(
        f"{config.model.objective}: {config.model.name} ({size:.1f} M parameters) at {config.model.img_size} px on "
        f"{config.data.path}, {length.describe(done.step)}, in {config.output_dir}"
    )
    if done.step >= last and not config.dry_run:
        screen.say(f"nothing is left to train up to step {last}: what step {done.step} holds is exported")
    watch = Watch(config, accelerator, whole, screen)
    recorder = Recorder(config, accelerator, model, done, screen)
    before = {f"{name}_before": found for name, found in watch.look(0).items()} if done.step == 0 else {}
    batches = batches_from(config, source, length, done, accelerator)
    stop = Stop()
    started = time.monotonic()
    recorder.begin()
    for step in range(done.step + 1, last + 1):
        now = schedules.at(config, done.samples, images, length.samples)
        figures = train_step(whole, model, optimizer, batches, now, config, accelerator)
        done.step, done.samples = step, step * length.batch
        recorder.add(done, now, figures, stop.asked)
        look = watch.due(step) or step == length.steps
        if step == 1 or look or keeper.due(step) or step == last or recorder.stopping:
            recorder.flush({**(before if step == 1 else {}), **(watch.look(step) if look else {})})
        if keeper.due(step) or step == last or recorder.stopping:
            keeper.save(model, optimizer, done, batches.state if source is None else None)
        if recorder.stopping:
            break
        recorder.begin()
    screen.close()
    if config.dry_run:
        screen.say(length.estimate((time.monotonic() - started) / 2))
        return 0
    if done.step < last:
        screen.say(f"stopped after step {done.step} and saved: the same command goes on from there")
        return STOPPED
    if accelerator.is_main_process:
        finish(config, keeper.newest(), screen)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


def train_step(
    whole: torch.nn.Module,
    model: DSeqJEPA,
    optimizer: torch.optim.Optimizer,
    batches: Iterator,
    now: schedules.Now,
    config: Config,
    accelerator: Accelerator,
) -> Figures:
    """One optimiser step over all processes and accumulation rounds; nothing waits for the device.

    The backward runs on sums, and gradients are divided once by the number of target tokens of the whole batch: how it
    is dealt to processes and rounds changes nothing.
    """
    figures = Figures()
    for last_round in [False] * (config.optim.accumulation - 1) + [True]:
        images, samples, broken = next(batches)
        seeds = torch.tensor([sample_seed(config.seed, *sample) for sample in samples.tolist()])
        coins = uniform(seeds, 1, stream=1)[:, 0] < now.regions
        inputs = normalised(images.to(accelerator.device, non_blocking=True), config)
        blocks = block_masks(model.student.patch_embed.grid_size, seeds.to(accelerator.device))
        with gathering(whole, last_round), accelerator.autocast():
            loss, facts = whole(inputs, coins, blocks)
            (loss * facts["weight"]).backward()
        figures.add(loss, facts, samples, broken)

    for group in optimizer.param_groups:
        group["lr"] = now.lr
        group["weight_decay"] = now.weight_decay if group["decays"] else 0.0
    figures.gradient_norm = update(whole.parameters(), optimizer, figures.weight, config.optim.clip)
    model.update_target(now.momentum)
    return figures


def spread(model: DSeqJEPA, config: Config, accelerator: Accelerator) -> torch.nn.Module:
    """The model over all processes: whole in each (DDP), or sharded (FSDP2)."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        raise UserError("FSDP is a setting of this script: launch without --use_fsdp, and give --system.fsdp=true.")
    if not config.system.fsdp or accelerator.num_processes == 1:
        return accelerator.prepare(model)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    model.to(accelerator.device)
    for block in (*model.student.blocks, *model.target.blocks, *model.predictor.blocks):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@contextmanager
def gathering(whole: torch.nn.Module, now: bool) -> Iterator[None]:
    """Gradients meet over the processes in the last round of a step only."""
    if isinstance(whole, FSDPModule):
        whole.set_requires_gradient_sync(now)
    elif isinstance(whole, DistributedDataParallel) and not now:
        with whole.no_sync():
            yield
        return
    yield


def batches_from(
    config: Config, source: Source | None, length: Length, done: Done, accelerator: Accelerator
) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[str]]]:
    """This process's micro-batches behind those that are done, without end: images, (epoch, index), what is broken."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    if source is None:
        state = done.streams[rank] if done.streams else None
        return Stream(config, rank, processes, length.micro_batch, state)
    share = Share(config.seed, len(source), length.batch, length.micro_batch, rank, processes, done.samples)
    crops = Crops(source, config.model.img_size, config.data.crop_scale, config.seed)
    pinned = accelerator.device.type == "cuda"
    return iter(
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
