"""Detection runs of a few seconds: settings, and processes."""

from pathlib import Path

from .runs import environments, launch, said_of

TINY = {
    "model": "dseq_jepa_vit_ti16",
    "random": "true",
    "args": '{"depth": 4}',
    "data.path": "scenes",
    "data.limit": 8,
    "detector.size": 64,
    "detector.window": 2,
    "detector.channels": 16,
    "detector.samples": 16,
    "detector.scale": "[0.5,1.5]",
    "optim.batch_size": 4,
    "optim.epochs": 5,  # 10 steps
    "optim.lr": 1e-3,
    "optim.warmup_epochs": 1,
    "workers": 0,
    "checkpoint.every": 3,
}


def options(output: Path, **settings) -> list[str]:
    """Arguments of a tiny run; `data__path` stands for data.path, None for the default."""
    own = {"output_dir": output, "results": output.parent / "results.jsonl"}
    chosen = {**TINY, **own, **{name.replace("__", "."): value for name, value in settings.items()}}
    return [f"--{name}={value}" for name, value in chosen.items() if value is not None]


def start(output: Path, environment: dict[str, str] | None = None, **settings):
    return launch("detect", options(output, **settings), output, environment)


def train(output: Path, **settings) -> tuple[int, str]:
    """A run from its start to its end: its exit code and all it said."""
    said_of(output).unlink(missing_ok=True)
    process = start(output, **settings)
    process.join(1800)
    return process.exitcode, said_of(output).read_text()


def train_together(output: Path, port: int, processes: int = 2, **settings) -> tuple[list[int], str]:
    """A run of several processes, as torchrun starts them."""
    runs = [start(output, environment, **settings) for environment in environments(port, processes)]
    for run in runs:
        run.join(1800)
    return [run.exitcode for run in runs], said_of(output).read_text()
