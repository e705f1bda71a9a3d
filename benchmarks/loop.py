"""The whole training loop against the bare step: what data, logging, checkpoints and probes cost, in one run.

    python benchmarks/loop.py                                                     # the demo's model on the CPU
    python benchmarks/loop.py --config train/configs/vit_b16_in1k.yaml --data.path FOLDER --optim.batch_size 256
    python benchmarks/loop.py --sizes ti16,b16 --data.path FOLDER --json loop.json        # those of step.py

Options are those of train/pretrain.py, and a few of its own. The same images, model and optimiser: first steps on one
batch that lies ready, then the loop of train/pretrain.py with its log, once from resident pixels and once from images
that are decoded whenever they are taken. On a CPU the loop has to share the cores with the decoding, so its rate is
held against 1 / (step time + decoding CPU time / cores).
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import measure  # before torch, whose threads and memory it sets
import torch
from common.data.decoded import Crops
from common.data.source import open_source
from common.pretraining import schedule
from common.pretraining.batches import open_batches
from common.pretraining.log import PretrainingLog
from common.pretraining.model import build
from common.pretraining.monitor.monitor import Monitor
from common.pretraining.precision import Precision, chosen
from common.pretraining.settings import Config, parse
from common.pretraining.training import Training
from common.pretraining.utilisation import Utilisation, matrix_rate
from common.run import checkpoints
from common.run.length import Length
from common.run.resume import Progress, RunCheckpoints
from common.system import launch
from common.system.screen import Screen

WARM, STEPS, PROFILED = 8, 12, 4
ROUNDS = {"cpu": 3, "cuda": 2}


class Timed:
    """Batches, and the seconds that the loop waits for them."""

    def __init__(self, batches: Iterator) -> None:
        self.batches, self.seconds = batches, 0.0

    def __iter__(self) -> Iterator:
        return self

    def __next__(self):
        begun = time.perf_counter()
        batch = next(self.batches)
        self.seconds += time.perf_counter() - begun
        return batch


class Loop:
    """The loop of one configuration, its data by one way or the other."""

    def __init__(self, config: Config, text: str, accelerator) -> None:
        self.config, self.text, self.accelerator, self.device = config, text, accelerator, accelerator.device
        self.source = open_source(config.data)
        self.length = Length.of(config.optim, len(self.source), 1)
        self.model = build(config)
        name, _ = chosen(config.system.precision, self.model, config.model.img_size, self.device)
        self.precision = Precision(name, self.device)
        self.training = Training(self.model, config, self.precision, accelerator)
        total = self.length.samples
        self.now = schedule.at(config, total // 2, len(self.source), total)  # half of the samples on regions
        self.progress, self.screen = Progress(), Screen(0, 0, False)
        self.log = PretrainingLog(config, accelerator, self.model, self.precision, self.progress, self.screen)
        self.rate = matrix_rate(self.device, self.precision.product_dtype)

    def batches(self, way: str) -> Timed:
        self.config.data.resident = way == "resident"
        return Timed(
            open_batches(
                self.config, self.training.framing, self.source, self.length, Progress(), self.accelerator, self.screen
            )
        )

    def step(self, batches: Iterator) -> None:
        """As train/pretrain.py takes it."""
        figures = self.training.step(batches, self.now, self.log.numbers)
        self.progress.step += 1
        self.progress.samples += self.length.batch
        self.log.add(self.now, figures, False)
        self.work = figures.work

    def seconds(self, batches: Iterator, count: int) -> float:
        return measure.seconds(lambda: self.step(batches), count, self.device)

    def row(self, name: str, spent: float, profile: measure.Profile | None, **more) -> dict:
        batch = self.length.batch
        flops = Utilisation(self.model).flops(batch, self.work)
        memory = torch.cuda.max_memory_allocated() / 2**20 if self.device.type == "cuda" else None
        return {
            "row": name,
            "device": self.device.type,
            "batch": batch,
            "images_per_second": batch / spent,
            "ms": spent * 1e3,
            "gflop": flops / batch / 1e9,
            "peak_share": flops / spent / self.rate,
            "waiting_share": profile.waiting(spent) if profile else None,
            "memory_mib": memory,
            **more,
        }


def measured(config: Config, text: str, ways: list[str], accelerator, extras: bool) -> tuple[list[dict], dict]:
    """Rows of one configuration: the bare step, and the loop each way; and what is to be known beside them."""
    loop = Loop(config, text, accelerator)
    batches, built = {}, {}
    for way in ways:
        begun = time.perf_counter()
        batches[way] = loop.batches(way)
        loop.seconds(batches[way], 1)
        built[way] = time.perf_counter() - begun
    ready = cycle(list(islice(batches[ways[0]], config.optim.accumulation)))
    crops = Crops(loop.source, loop.training.framing)

    def decode() -> float:
        begun = time.thread_time()  # of this thread: the loader's workers go on beside it
        for index in range(min(loop.length.batch, 256)):
            crops[0, index % len(loop.source)]
        return (time.thread_time() - begun) / min(loop.length.batch, 256)

    names = ["step", *ways]
    least, waited = dict.fromkeys(names, float("inf")), dict.fromkeys(ways, 0.0)
    decoding = float("inf")
    for _ in range(ROUNDS[loop.device.type]):  # in turns
        least["step"] = min(least["step"], loop.seconds(ready, STEPS))
        decoding = min(decoding, decode())
        for way in ways:
            loop.seconds(batches[way], WARM)  # uses up what the workers had ahead meanwhile
            batches[way].seconds = 0.0
            spent = loop.seconds(batches[way], STEPS)
            if spent < least[way]:
                least[way], waited[way] = spent, batches[way].seconds / STEPS / spent
    rows = []
    for name in names:
        feed = ready if name == "step" else batches[name]
        gpu = loop.device.type == "cuda"
        profile = measure.profiled(lambda feed=feed: loop.step(feed), PROFILED, loop.device) if gpu else None
        more = {} if name == "step" else {"data_share": waited[name], "first_batch_seconds": built[name]}
        rows.append(loop.row("step alone" if name == "step" else f"loop, {name}", least[name], profile, **more))
    about = {
        "precision": loop.precision.name,
        "attention": loop.training.attention,
        "matrix_tflops": loop.rate / 1e12,
        "workers": config.data.workers,
        "images": len(loop.source),
        "decoding_ms_an_image": decoding * 1e3,
    }
    if "decoded" in ways:
        expected = least["step"] + decoding * loop.length.batch / measure.cores()
        about["decoded_against_step_and_decoding"] = expected / least["decoded"]
    if extras:
        about |= beside(loop, least[ways[0]])
    return rows, about


def beside(loop: Loop, step: float) -> dict:
    """Seconds of a checkpoint and of a look at the target, and their shares of the run's time."""
    config = loop.config
    saved = RunCheckpoints(config, loop.text, loop.accelerator)
    saved.resume(loop.model, loop.training.optimizer, loop.source.fingerprint())
    begun = time.perf_counter()
    saved.save(loop.model, loop.training.optimizer, Progress(1, loop.length.batch))
    saving = time.perf_counter() - begun
    assert checkpoints.fault(saved.newest()) is None
    size = sum(file.stat().st_size for file in saved.newest().iterdir()) / 2**20
    found = {"checkpoint_seconds": saving, "checkpoint_mib": size}
    found["checkpoint_share"] = saving / (config.checkpoint.every * step)
    monitor = Monitor(config, loop.source, loop.accelerator, loop.training.wrapped, loop.precision, loop.screen)
    begun = time.perf_counter()
    monitor.measure(1)
    if every := config.watch.probe_every or config.watch.pictures_every:
        spent = time.perf_counter() - begun
        found |= {"look_seconds": spent, "look_share": spent / (every * step)}
    return found


def options_of(size: measure.Size, device: torch.device) -> list[str]:
    """A size of step.py, as options of train/pretrain.py."""
    width, depth = size.predictor
    return [
        f"--model.name={size.name}",
        f"--model.img_size={size.img_size}",
        "--model.args={}",
        f"--model.predictor_width={width}",
        f"--model.predictor_depth={depth}",
        f"--optim.batch_size={size.batch[device.type]}",
        f"--data.workers={measure.cores()}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", help="sizes of step.py, by commas (default: the model that the options name)")
    parser.add_argument("--ways", default="resident,decoded")
    parser.add_argument("--no-extras", action="store_true", help="leave out the checkpoint and the probes")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, even where there is a GPU")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no size after so many seconds")
    parser.add_argument("--json", type=Path)
    args, rest = parser.parse_known_args()
    accelerator = launch.accelerator(cpu=args.cpu)
    record = {"made_by": "benchmarks/loop.py", **measure.environment(accelerator.device)}
    record |= {"settings": sys.argv[1:], "sizes": {}, "rows": []}
    begun = time.perf_counter()
    for name in args.sizes.split(",") if args.sizes else [""]:
        if time.perf_counter() - begun > args.seconds:
            print(f"{name}: not measured, the time is over")
            continue
        torch._dynamo.reset()
        size = options_of(measure.SIZES[name], accelerator.device) if name else []
        config, text = parse([*size, *rest])
        with tempfile.TemporaryDirectory() as config.output_dir:
            rows, about = measured(config, text, args.ways.split(","), accelerator, not args.no_extras)
        accelerator.free_memory()
        name = name or config.model.name
        record["sizes"][name] = about
        record["rows"] += [{"size": name, **row} for row in rows]
        record["goals"] = measure.judged(record["rows"])
        measure.write(args.json, record)
        where = f"{accelerator.device} with {measure.cores()} cores"
        print(f"{config.model.name} at {config.model.img_size} px on {config.data.path}, on {where}")
        measure.print_rows([{**row, "size": name if args.sizes else ""} for row in rows])
        for key, value in about.items():
            print(f"       {key.replace('_', ' ')}: {f'{value:.4g}' if isinstance(value, float) else value}")
        waits = [f"{row['row'][6:]} {row['data_share']:.1%}" for row in rows if "data_share" in row]
        print(f"       share of the loop's time in which it waits for a batch: {', '.join(waits)}\n", flush=True)


if __name__ == "__main__":
    main()
