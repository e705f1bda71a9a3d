"""The whole training loop against the bare step: what data, logging, checkpoints and probes cost, in one run.

    python benchmarks/loop.py                                                     # the demo's model on the CPU
    python benchmarks/loop.py --config train/configs/vit_b16_in1k.yaml --data.path FOLDER --optim.batch_size 256

The same images, model and optimiser: first steps on one batch that lies ready, then the loop of train/pretrain.py with
its loader. On a CPU the loop has to share the cores with the decoding, so its rate is held against
1 / (step time + decoding CPU time / cores).
"""

import os
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

import pretrain  # before torch, whose threads it sets
import torch
from accelerate import Accelerator
from common import checkpoints, schedules
from common.config import parse
from common.data import Crops, open_source
from common.keeper import Done, Keeper
from common.length import Length
from common.model import build, optimizer_of
from common.record import Screen
from common.watch import Watch

WARM, STEPS, ROUNDS = 8, 12, 4


def main() -> None:
    config, text = parse(sys.argv[1:])
    config.output_dir = tempfile.mkdtemp()
    accelerator = Accelerator(mixed_precision="bf16" if config.system.precision == "bf16" else "no")
    source = open_source(config.data)
    length = Length.of(config.optim, len(source), 1)
    model = build(config)
    whole = accelerator.prepare(model)
    optimizer = optimizer_of(model, config.optim)
    now = schedules.at(config, length.samples // 2, len(source), length.samples)  # half of the samples on regions
    loader = pretrain.batches_from(config, source, length, Done(), accelerator)
    ready = list(islice(loader, config.optim.accumulation))

    def step(batches) -> None:
        pretrain.train_step(whole, model, optimizer, batches, now, config, accelerator)

    def seconds(batches, count: int) -> float:
        _sync(accelerator.device)
        begun = time.perf_counter()
        for _ in range(count):
            step(batches)
        _sync(accelerator.device)
        return (time.perf_counter() - begun) / count

    crops = Crops(source, config.model.img_size, config.data.crop_scale, config.seed)

    def decode() -> float:
        begun = time.thread_time()  # of this thread: the loader's workers go on beside it
        for index in range(config.optim.batch_size):
            crops[0, index % len(source)]
        return time.thread_time() - begun

    bare = loop = decoding = float("inf")
    for _ in range(ROUNDS):  # in turns
        bare = min(bare, seconds(cycle(ready), STEPS))
        decoding = min(decoding, decode())
        seconds(loader, WARM)  # uses up what the workers had ahead meanwhile
        loop = min(loop, seconds(loader, STEPS))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    batch = config.optim.batch_size
    print(f"{config.model.name} at {config.model.img_size} px on {accelerator.device}, batch {batch}, {cores} cores")
    print(f"bare step {bare * 1e3:.0f} ms, {batch / bare:.1f} images/s")
    print(f"loop      {loop * 1e3:.0f} ms, {batch / loop:.1f} images/s, {bare / loop:.2f} of the bare step's rate")
    print(f"decoding  {decoding * 1e3:.0f} ms of CPU time a batch; loop against step + decoding / cores: ", end="")
    print(f"{(bare + decoding / cores) / loop:.2f}")

    keeper = Keeper(config, text, source.fingerprint(), accelerator)
    begun = time.perf_counter()
    keeper.save(model, optimizer, Done(1, batch), None)
    saving = time.perf_counter() - begun
    assert checkpoints.fault(keeper.newest()) is None
    size = sum(file.stat().st_size for file in keeper.newest().iterdir()) / 2**20
    print(f"checkpoint of {size:.0f} MiB: {_share(saving, config.checkpoint.every, loop)}")

    watch = Watch(config, accelerator, whole, Screen(0, 0, False))
    begun = time.perf_counter()
    watch.look(1)
    if every := config.watch.probe_every or config.watch.pictures_every:
        print(f"probes and pictures: {_share(time.perf_counter() - begun, every, loop)}")


def _share(spent: float, every: int, step: float) -> str:
    return f"{spent:.2f} s, {spent / (every * step):.2%} of the time at one in {every} steps"


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
