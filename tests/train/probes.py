"""Probes of a few seconds: settings, processes, and what is left of them."""

import contextlib
import io
import json
import shutil
from pathlib import Path

from .runs import environments, finished, launch, words

TINY = {
    "model": "vit_tiny_patch16_224",
    "img_size": 32,
    "random": "true",
    "args": '{"patch_size": 8, "depth": 5, "embed_dim": 48, "num_heads": 2}',
    "workers": 0,
    "cache.dtype": "float32",
    "heads.batch_size": 12,
    "heads.epochs": 2,
}


def options(folder: Path, data: Path | str, **settings) -> list[str]:
    """Arguments of a tiny probe; `heads__epochs` stands for heads.epochs, None for the default."""
    places = {"output_dir": folder / "heads", "cache.folder": folder / "features", "results": folder / "results.jsonl"}
    return words({**TINY, **places, "data.path": data}, settings)


def probe(folder: Path, data: Path | str, **settings) -> tuple[int, str]:
    """A probe in this process: its exit code and all it said."""
    from probe import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(options(folder, data, **settings))
    return code, said.getvalue()


def start(folder: Path, data: Path, environment: dict[str, str] | None = None, **settings):
    """A probe under way in a process of its own, which leaves its heads behind."""
    return launch("tests.train.probes", options(folder, data, **settings), folder, environment)


def probe_together(folder: Path, data: Path, port: int, processes: int = 2, **settings) -> tuple[list[int], str]:
    """A probe of several processes, as torchrun starts them."""
    running = [start(folder, data, environment, **settings) for environment in environments(port, processes)]
    return finished(running, folder)


def results_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def main(arguments: list[str]) -> int:
    """probe.py, but the heads' checkpoints stay."""
    import probe as script

    shutil.rmtree = lambda *_, **__: None
    return script.main(arguments)
