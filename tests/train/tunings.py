"""Fine-tuning runs of a few seconds: a tiny data set, settings, and processes."""

import io
import random
from pathlib import Path

import datasets
from PIL import Image

from .runs import environments, finished, launch, said_of, words

NAMES = ["red", "green", "blue"]
TINY = {
    "model": "dseq_jepa_vit_ti16",
    "img_size": 32,
    "random": "true",
    "optim.batch_size": 8,
    "optim.epochs": 2.5,  # 20 steps
    "optim.warmup_epochs": 0.5,
    "optim.base_lr": 0.01,
    "workers": 0,
    "checkpoint.every": 3,
}


def colours(folder: Path, train: int = 64, test: int = 24, shuffled: bool = False) -> Path:
    """Parquet files of noisy images in which one colour is strongest: that is the class, unless they are shuffled."""
    folder.mkdir(exist_ok=True)
    draw = random.Random(0)
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    for split, count in (("train", train), ("test", test)):
        rows = {"image": [], "label": [i % 3 for i in range(count)]}
        for label in rows["label"]:
            pixels = [draw.randrange(120) + 100 * (at % 3 == label) for at in range(40 * 40 * 3)]
            encoded = io.BytesIO()
            Image.frombytes("RGB", (40, 40), bytes(pixels)).save(encoded, "PNG")
            rows["image"].append({"bytes": encoded.getvalue(), "path": None})
        if shuffled:
            draw.shuffle(rows["label"])
        datasets.Dataset.from_dict(rows, features=kinds).to_parquet(folder / f"{split}.parquet")
    return folder


def options(output: Path, data: Path, **settings) -> list[str]:
    """Arguments of a tiny run; `optim__ema` stands for optim.ema, None for the default."""
    own = {"data.path": data, "output_dir": output, "results": output.parent / "results.jsonl"}
    return words({**TINY, **own}, settings)


def start(output: Path, data: Path, environment: dict[str, str] | None = None, **settings):
    return launch("finetune", options(output, data, **settings), output, environment)


def tune(output: Path, data: Path, **settings) -> tuple[int, str]:
    """A run from its start to its end: its exit code and all it said."""
    said_of(output).unlink(missing_ok=True)
    (code,), said = finished([start(output, data, **settings)], output)
    return code, said


def tune_together(output: Path, data: Path, port: int, processes: int = 2, **settings) -> tuple[list[int], str]:
    """A run of several processes, as torchrun starts them."""
    runs = [start(output, data, environment, **settings) for environment in environments(port, processes)]
    return finished(runs, output)
