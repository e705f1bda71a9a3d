"""Training runs of a few seconds: settings, processes that can be killed, and what is left of them."""

import contextlib
import importlib
import json
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

CLOCKS = ("seconds", "images_per_second", "mfu", "memory_mib")
TINY = {
    "model.img_size": 48,
    "model.args": '{"patch_size": 8, "depth": 2}',
    "model.predictor_width": 48,
    "model.predictor_depth": 1,
    "optim.batch_size": 8,
    "optim.epochs": 0.02,  # 20 steps
    "optim.warmup_epochs": 0.005,
    "optim.regions": 0.5,
    "optim.momentum": 0.9,
    "data.workers": 0,
    "data.resident": "false",
    "system.precision": "no",
    "checkpoint.every": 3,
    "watch.probe_every": 7,
    "watch.probe_images": 16,
    "watch.pictures_every": 0,
}

# One process with everything imported, of which each run is a fork: starting a run takes no time.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.train.runs", "pretrain", "finetune", "detect", "segment"])


def options(output: Path, **settings) -> list[str]:
    """Arguments of a tiny run; `model__name` stands for model.name."""
    return words({**TINY, "output_dir": output}, settings)


def words(usual: dict, settings: dict) -> list[str]:
    """Arguments of a program: the usual ones but where a setting is another; `optim__lr` stands for optim.lr, None for
    the program's default."""
    chosen = {**usual, **{name.replace("__", "."): value for name, value in settings.items()}}
    return [f"--{name}={value}" for name, value in chosen.items() if value is not None]


def child(script: str, arguments: list[str], said: Path, environment: dict[str, str]) -> None:
    os.environ |= environment
    # Loader workers are to start as in a user's process; the forkserver would hand its own way down.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    import datasets
    import torch

    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1  # it waits 5 s at each end of a stream, for pyarrow's threads
    torch.set_num_threads(1)
    with said.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = importlib.import_module(script).main(arguments)
    os._exit(code)


def launch(
    script: str, arguments: list[str], output: Path, environment: dict[str, str] | None = None
) -> multiprocessing.Process:
    """A script under way in a process of its own; what it says goes beside its output."""
    output.parent.mkdir(parents=True, exist_ok=True)
    process = FORKS.Process(target=child, args=(script, arguments, said_of(output), environment or {}))
    process.start()
    return process


def start(output: Path, environment: dict[str, str] | None = None, **settings) -> multiprocessing.Process:
    """A pretraining run under way."""
    return launch("pretrain", options(output, **settings), output, environment)


def train(output: Path, **settings) -> tuple[int, str]:
    """A run from its start to its end: its exit code and all it said."""
    output.parent.mkdir(parents=True, exist_ok=True)
    said_of(output).unlink(missing_ok=True)
    (code,), said = finished([start(output, **settings)], output)
    return code, said


def train_together(output: Path, port: int, processes: int = 2, **settings) -> tuple[list[int], str]:
    """A run of several processes, as accelerate or torchrun starts them."""
    return finished([start(output, place, **settings) for place in environments(port, processes)], output)


def finished(processes: list[multiprocessing.Process], output: Path, seconds: float = 300) -> tuple[list[int], str]:
    """The exit codes of a run's processes, which may take so long, and all they said."""
    for process in processes:
        process.join(seconds)
    return [process.exitcode for process in processes], said_of(output).read_text()


def killed_until_it_ends(
    begin: Callable[[], multiprocessing.Process], draw: random.Random, least: float, most: float
) -> int:
    """Start a run again and again, each time killed after some seconds, until one ends; how many were killed."""
    kills = 0
    while True:
        process = begin()
        process.join(draw.uniform(least, most))
        if process.exitcode is not None:
            assert process.exitcode == 0
            return kills
        process.kill()
        process.join()
        kills += 1


def wait_for_steps(process: multiprocessing.Process, output: Path, steps: int) -> None:
    """Until the run's log has so many lines."""
    log = output / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < steps:
        assert process.is_alive(), process.exitcode
        time.sleep(0.01)


def environments(port: int, processes: int) -> list[dict[str, str]]:
    """What torchrun tells each of its processes."""
    return [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
        }
        for rank in range(processes)
    ]


def said_of(output: Path) -> Path:
    return output.with_name(output.name + ".said")


def log_of(output: Path) -> list[dict]:
    """The log without clocks."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


def tensors_of(output: Path) -> dict:
    """Every tensor of the newest checkpoint."""
    newest = max((output / "checkpoints").glob("step-*"))
    return {
        f"{file}: {name}": tensor
        for file in ("model", "optimizer")
        for name, tensor in load_file(newest / f"{file}.safetensors").items()
    }


def assert_same_run(output: Path, other: Path) -> None:
    """Two runs have the same log, and the same bits in their newest checkpoints."""
    for ours, theirs in zip(log_of(output), log_of(other), strict=True):
        assert ours == theirs, (ours, theirs)
    assert_same_tensors(tensors_of(output), tensors_of(other))


def assert_same_export(output: Path, other: Path) -> None:
    """Two runs have exported the same bits."""
    assert_same_tensors(*(load_file(run / "export" / "model.safetensors") for run in (output, other)))


def assert_same_tensors(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    differing = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not differing, differing
