"""Detection runs of a few seconds: settings, and processes."""

from pathlib import Path

from .runs import environments, finished, launch, said_of, words

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
    return words({**TINY, **own}, settings)


def start(output: Path, environment: dict[str, str] | None = None, **settings):
    return launch("detect", options(output, **settings), output, environment)


def train(output: Path, **settings) -> tuple[int, str]:
    """A run from its start to its end: its exit code and all it said."""
    said_of(output).unlink(missing_ok=True)
    (code,), said = finished([start(output, **settings)], output, 1800)
    return code, said


def train_together(output: Path, port: int, processes: int = 2, **settings) -> tuple[list[int], str]:
    """A run of several processes, as torchrun starts them."""
    runs = [start(output, environment, **settings) for environment in environments(port, processes)]
    return finished(runs, output, 1800)
