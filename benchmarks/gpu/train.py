"""Train for so many minutes on a machine that is bare and rented by the minute, and carry away all it takes to go on.

    python benchmarks/gpu/train.py --minutes 12 --out out -- --config CONFIG --data.path pack         # the first time
    python benchmarks/gpu/train.py --minutes 12 --out out --from PARTS -- --data.path pack            # the next

What follows `--` are options of train/pretrain.py. The first time some steps are measured, half-way through the
curriculum, and the run gets as many epochs as it can train in --visits times --minutes, so that its schedules end with
the last visit; its warm-up keeps its share. (With --optim.epochs nothing is measured.) Behind the time given, less what
saving takes, the run is asked to stop: it saves, its target encoder is exported, and both are cut into parts of less
than 16 MiB in out/parts. The next time the settings are those of the first, and the run goes on from the very step:
give only what has moved.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "train"), str(ROOT), str(Path(__file__).parent)]

import parts  # noqa: E402
from common.data.source import open_source  # noqa: E402
from common.data.stream import images_in  # noqa: E402
from common.pretraining.export import export  # noqa: E402
from common.pretraining.settings import parse  # noqa: E402
from common.run import checkpoints  # noqa: E402
from common.run.log import records  # noqa: E402
from common.system.screen import Screen  # noqa: E402
from common.system.signals import STOPPED  # noqa: E402

from timm_dseq import UserError  # noqa: E402

MEASURED, WARM = 40, 20  # steps that are measured, and those of them that are left out
STARTING, SAVING = 25.0, 15.0  # seconds before the first step, and behind the last one
SECONDS_A_GIB = 15.0  # that saving, hashing and cutting a state take, besides
USED = 0.93  # share of the time for steps that is planned with: probes and checkpoints take the rest
BETWEEN = 60.0  # seconds of work that a machine that vanishes may take with it


def pretrain(options: list[str], said: Path, until: float | None = None) -> int:
    """train/pretrain.py in a process of its own, asked to stop at a moment; its exit code."""
    command = [sys.executable, str(ROOT / "train" / "pretrain.py"), *options]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with said.open("a") as file:
        environment = {**os.environ, "PYTHONPATH": path}
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            return process.wait(None if until is None else max(1.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            return process.wait()


def measured(options: list[str], out: Path) -> tuple[float, float]:
    """Seconds of a step half-way through the curriculum, and GiB of a checkpoint."""
    config, _ = parse(options)
    folder = out / "measured"
    shutil.rmtree(folder, ignore_errors=True)
    middle = (config.optim.regions + config.optim.regions_end) / 2
    more = [f"--optim.regions={middle}", f"--optim.regions_end={middle}", "--watch.probe_every=0"]
    more += ["--watch.pictures_every=0", f"--output_dir={folder}", f"--max_steps={MEASURED}"]
    if config.data.resident == "auto" and not config.data.streaming:
        more.append("--data.resident=true")  # so few steps would not ask for it, as the run will
    if code := pretrain([*options, *more], out / "said.txt"):
        raise parts.PartsError(f"the measured steps ended with exit code {code}: see {out / 'said.txt'}.")
    spent = [line["seconds"] for line in records(folder / "log.jsonl")][WARM:]
    size = size_of(checkpoints.steps(folder / "checkpoints")[-1])
    shutil.rmtree(folder)
    return sum(spent) / len(spent), size


def epochs(options: list[str], seconds_a_step: float, seconds: float) -> list[str]:
    """Options of a run that trains for so many seconds of steps."""
    config, _ = parse(options)
    images = images_in(config.data) if config.data.streaming else len(open_source(config.data))
    length = seconds / seconds_a_step * config.optim.batch_size / images
    warm = length * config.optim.warmup_epochs / config.optim.epochs
    return [f"--optim.epochs={length:.4f}", f"--optim.warmup_epochs={warm:.4f}"]


def spelt(options: list[str]) -> list[str]:
    """`--name value` as `--name=value`."""
    words: list[str] = []
    for word in options:
        if words and not word.startswith("--") and "=" not in words[-1]:
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def size_of(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.iterdir()) / 2**30


def saving(gib: float) -> float:
    return SAVING + SECONDS_A_GIB * gib


def carried(run: Path, out: Path) -> list[list[Path]]:
    """Cut what is worth keeping of a run, the export first, then the state to go on from."""
    newest = checkpoints.steps(run / "checkpoints")[-1]
    left_out = {"checkpoints", "trackers", "measured"}
    small = [path.name for path in sorted(run.iterdir()) if path.name not in left_out | {"export"}]
    small = [name for name in small if not name.startswith("earlier-")]
    # what else an export holds stands in the state
    export = [f"export/{name}" for name in ("config.json", "README.md", "model.safetensors")]
    bundles = {
        "export": [*small, *(name for name in export if (run / name).exists())],
        "state": [f"checkpoints/{newest.name}"],
    }
    return parts.split(run, bundles, out / "parts", {"step": checkpoints.number(newest)})


def train(args: argparse.Namespace, options: list[str]) -> int:
    started = time.monotonic()
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    run, said = out / "run", out / "said.txt"
    if run.exists():
        raise parts.PartsError(f"{run} exists: name another --out, or remove it.")
    if args.parts:
        parts.join(args.parts, run)
        newest = checkpoints.steps(run / "checkpoints")[-1]
        done, gib = checkpoints.number(newest), size_of(newest)
        spent = [line["seconds"] for line in records(run / "log.jsonl")][-MEASURED:]
        step_seconds = sum(spent) / len(spent)
        # the settings as they are: the run's own file is written anew
        shutil.copy(run / "config.yaml", out / "settings.yaml")
        options = [f"--config={out / 'settings.yaml'}", *options]
    else:
        done, step_seconds, gib = 0, 1.0, 0.5
        if not any(word.startswith("--optim.epochs") for word in options):
            step_seconds, gib = measured(options, out)
            left = started + 60 * args.minutes - time.monotonic() - STARTING - saving(gib)
            others = (args.visits - 1) * (60 * args.minutes - STARTING - saving(gib))
            if left < 10 * step_seconds:
                raise parts.PartsError(
                    f"--minutes {args.minutes:g} leave {max(0, left):.0f} s to train behind the measured steps, of "
                    f"{step_seconds:.2f} s each: give more."
                )
            options = [*options, *epochs(options, step_seconds, USED * (left + others))]
    last = done + args.steps if args.steps else "null"
    every = max(1, int(BETWEEN / step_seconds))
    # before options that are given, but behind a file of settings, which would set them back
    files = [word for word in options if word.startswith("--config=")]
    given = [word for word in options if word not in files]
    ours = [f"--checkpoint.every={every}", "--checkpoint.keep=1"]
    theirs = ["--resume=auto", f"--output_dir={run}", f"--max_steps={last}"]
    code = pretrain([*files, *ours, *given, *theirs], said, started + 60 * args.minutes - saving(gib))
    saved = checkpoints.steps(run / "checkpoints")
    if not saved:
        raise parts.PartsError(f"nothing was saved, the run ended with exit code {code}: see {said}.")
    if code != 0:
        config, _ = parse([f"--config={run / 'config.yaml'}"])
        export(config, saved[-1], Screen(0, 0, False))
    shutil.copy(said, run / "said.txt")
    fetches = carried(run, out)
    report(run, out, fetches, STOPPED if args.steps and not code else code, time.monotonic() - started)
    return 0 if code in (0, STOPPED) else code


def report(run: Path, out: Path, fetches: list[list[Path]], code: int, seconds: float) -> None:
    lines = records(run / "log.jsonl")
    speed = sorted(line["images_per_second"] for line in lines[-100:])[len(lines[-100:]) // 2]
    last = lines[-1]
    ended = {0: "done", STOPPED: "to be gone on with"}.get(code, f"ended with exit code {code}, see said.txt")
    print(f"step {last['step']}, {last['samples']:,} images, loss {last['loss']}, {speed:.0f} images/s; {ended}")
    print(f"{seconds:.0f} s in all; export, log and state are in {out / 'parts'}, to be fetched {len(fetches)} times:")
    for fetch in fetches:
        size = sum(path.stat().st_size for path in fetch) / 2**20
        print(f"  {fetch[0].parent.name}: {len(fetch)} files, {size:.1f} MiB")
    print(f"and {out / 'parts' / parts.MANIFEST}. To go on, copy all to a folder and give --from FOLDER", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="of this visit, all in all")
    parser.add_argument("--visits", type=int, default=1, help="of so many minutes that the schedules are made for")
    parser.add_argument("--steps", type=int, help="stop after so many steps, for a rehearsal")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--from", dest="parts", type=Path, metavar="PARTS", help="go on from the parts in this folder")
    parser.add_argument("options", nargs="*", help="of train/pretrain.py, behind --")
    args = parser.parse_args(arguments)
    try:
        return train(args, spelt(args.options))
    except (parts.PartsError, UserError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
