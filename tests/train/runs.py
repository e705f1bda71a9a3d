"""Training runs of a few seconds: settings, processes that can be killed, and what is left of them."""

import contextlib
import importlib
import json
import multiprocessing
import os
from pathlib import Path

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
    chosen = {**TINY, **{name.replace("__", "."): value for name, value in settings.items()}}
    return [f"--{name}={value}" for name, value in {**chosen, "output_dir": output}.items()]


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
    process = start(output, **settings)
    process.join(300)
    return process.exitcode, said_of(output).read_text()


def train_together(output: Path, port: int, processes: int = 2, **settings) -> tuple[list[int], str]:
    """A run of several processes, as accelerate or torchrun starts them."""
    runs = [start(output, environment, **settings) for environment in environments(port, processes)]
    for run in runs:
        run.join(300)
    return [run.exitcode for run in runs], said_of(output).read_text()


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
