"""Which way learns fastest? Several recipes at once on one GPU, for as long each, judged on labelled images at once.

    python benchmarks/gpu/ways.py --photos pack --judge nette --seconds 50 --out out \\
        "optim.lr=1e-3" "optim.lr=2e-3" "model.view_share=0.25" "model.view_share=0.5 model.views=4"

Each way is options of train/pretrain.py behind train/configs/speedrun.yaml, in a process of its own. All begin to train
when the last one is ready, and end when the time is over: learning rate and target follow the clock, so each schedule
is whole. Judged are kNN (k 20, T .07) and ridge regression on standardised features, of the target and the student, on
`train` and `test` images of --judge (Parquet of image and label). Rehearsed on a CPU by --seconds 5 and a small batch.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "train"), str(ROOT), str(ROOT / "benchmarks")]

import common.system.environment  # noqa: E402, F401  # before torch is loaded

WARM, SHARE = 6, 0.05  # steps before the clock starts; share of the time in which the learning rate rises
READY = 120.0  # seconds in which the slowest way has to be ready


def train(options: list[str], seconds: float, photos: str, judge: Path, gate: Path, count: int, folder: Path) -> dict:
    """One way: trained by the clock, then judged."""
    import torch
    from common.data.source import open_source
    from common.pretraining.batches import open_batches
    from common.pretraining.model import build
    from common.pretraining.precision import Precision, chosen
    from common.pretraining.schedule import Now
    from common.pretraining.settings import parse
    from common.pretraining.training import Training
    from common.run.length import Length
    from common.run.resume import Progress
    from common.system import launch
    from common.system.screen import Screen

    accelerator = launch.accelerator()
    ours = [f"--data.path={photos}", f"--data.cache={folder.parent / 'cache'}", "--data.resident=true"]
    config, _ = parse([f"--config={ROOT / 'train/configs/speedrun.yaml'}", *ours, f"--output_dir={folder}", *options])
    model = build(config)
    name, _ = chosen(config.system.precision, model, config.model.img_size, accelerator.device)
    training = Training(model, config, Precision(name, accelerator.device), accelerator)
    source = open_source(config.data)
    length = Length.of(config.optim, len(source), 1)
    batches = open_batches(config, training.framing, source, length, Progress(), accelerator, Screen(0, 0, False))
    still = Now(lr=1e-6, weight_decay=config.optim.weight_decay, momentum=1.0, regions=0.0)
    for _ in range(WARM):
        figures = training.step(batches, still)
    launch.wait(accelerator.device)
    (gate / folder.name).touch()
    waited = time.monotonic()
    while len(list(gate.iterdir())) < count and time.monotonic() - waited < READY:
        time.sleep(0.02)
    begun, steps = time.monotonic(), 0
    while (at := (time.monotonic() - begun) / seconds) < 1:
        falling = (1 + math.cos(math.pi * at)) / 2
        momentum = config.optim.momentum + (config.optim.momentum_end - config.optim.momentum) * at
        rate = config.optim.lr * falling * min(1.0, at / SHARE)
        figures = training.step(batches, Now(rate, config.optim.weight_decay, momentum, config.optim.regions_end))
        steps += 1
        if steps % 8 == 0:
            launch.wait(accelerator.device)  # or the host would run ahead of the clock
    launch.wait(accelerator.device)
    images = steps * config.optim.batch_size
    found = {"options": options, "images": images, "images_per_second": images / (time.monotonic() - begun)}
    found |= {"loss": (figures.loss / figures.count).item(), "memory_gib": _memory()}
    torch.set_grad_enabled(False)
    return {**found, **judged(model, judge)}


def _memory() -> float:
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def judged(model, judge: Path) -> dict[str, dict[str, float]]:
    """kNN and ridge of both encoders, in %."""
    import numpy as np
    import pyarrow.parquet as pq
    import torch
    from common.data.crops import normalised
    from leads import accuracy

    from timm_dseq.images import decode

    device = next(model.parameters()).device
    sides = {}
    for split in ("train", "test"):
        table = pq.read_table(judge / f"{split}.parquet", columns=["image", "label"])
        size = model.student.patch_embed.img_size
        pictures = [np.asarray(decode(row).resize(size[::-1])) for row in table.column("image").to_pylist()]
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        sides[split] = pixels, torch.tensor(table.column("label").to_pylist())
    found = {}
    for name in ("target", "student"):
        encoder, features = getattr(model, name).eval(), {}
        for split, (pixels, labels) in sides.items():
            parts = []
            for part in pixels.split(200):
                with torch.autocast(device.type, torch.bfloat16):
                    tokens = encoder.forward_features(normalised(part.to(device), torch.float32))
                parts.append(tokens[:, encoder.num_prefix_tokens :].float().mean(1).cpu())
            features[split] = torch.cat(parts), labels
        found[name] = {how: round(accuracy(how, *features.values()), 2) for how in ("knn", "ridge")}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="+", help="options of train/pretrain.py without their dashes, in one word")
    parser.add_argument("--photos", required=True)
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=50)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    gate = args.out / "gate"
    if args.one is not None:
        options = [f"--{word}" for word in args.ways[args.one].split()]
        folder = args.out / f"way-{args.one}"
        found = train(options, args.seconds, args.photos, args.judge, gate, len(args.ways), folder)
        (args.out / f"way-{args.one}.json").write_text(json.dumps(found))
        return 0
    gate.mkdir(parents=True, exist_ok=True)
    for mark in gate.iterdir():
        mark.unlink()
    threads = str(max(1, len(os.sched_getaffinity(0)) // len(args.ways)))
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": path}
    running = []
    for number in range(len(args.ways)):
        with (args.out / f"way-{number}.log").open("w") as log:
            command = [sys.executable, __file__, *sys.argv[1:], f"--one={number}"]
            running.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
        if not number:
            time.sleep(1)  # the first one builds the file of pixels, the others wait for it
    for number, process in enumerate(running):
        process.wait()
        file = args.out / f"way-{number}.json"
        if process.returncode or not file.exists():
            print(f"{args.ways[number]}: exit code {process.returncode}, see {args.out / f'way-{number}.log'}")
            continue
        found = json.loads(file.read_text())
        print(
            f"{args.ways[number]}: {found['images']:,} images, {found['images_per_second']:.0f}/s, loss "
            f"{found['loss']:.3f}, target {found['target']}, student {found['student']}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
