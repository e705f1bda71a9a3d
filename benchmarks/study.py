"""The study: what learns on a small budget. Every row with several seeds on equally many images, judged on five tasks.

    python benchmarks/study.py OUT --data ../shared/data                        # hours; goes on where it was stopped
    python benchmarks/study.py OUT --data ../shared/data --init RUN/export      # not from random weights, from a run's
    python benchmarks/study.py OUT --table

A row is a few options of train/pretrain.py behind train/configs/speedrun.yaml; beside them stand LeJEPA's recipe
(leads.py), training with Imagenette's labels (train/finetune.py), a random encoder and pixels. Each run has one thread,
and its CPU seconds are counted, so that rows can be compared at equal cost, too. Judged is the mean of the target
encoder's patch tokens, standardised: kNN (k 20, T .07) and ridge regression on 4,000 and 2,000 images of Imagenette,
kNN on Stanford Cars, ridge regression of the count and the distance of objects in CLEVR-like renders; and how well the
saliency `border` finds the objects of 300 images of ECSSD (maxF).
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from leads import MEAN, SIDE, STD, Encoder, accuracy, decoded, labels_of
from timm.layers import set_fused_attn
from torch.nn import functional

import timm_dseq
from timm_dseq.hub.load import Pixels, load_backbone

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "train"))

from common.discovering.measures import max_f  # noqa: E402
from common.discovering.truth import read_mask  # noqa: E402

NAME = "dseq_jepa_vit_ti16"
START = {
    "model.predictor_width": 192,
    "model.predictor_depth": 4,
    "optim.momentum": 0.97,  # the runs are short, and the target is judged
    "optim.momentum_end": 0.99,
    "optim.regions": 1.0,
    "data.resident": "true",
    "system.precision": "bf16",
    "watch.probe_every": 0,
    "watch.pictures_every": 0,
    "checkpoint.every": 100_000,
}
BANDS = {"model.objective": "dseq", "model.query": "border", "model.regions": "bands", "model.num_regions": 4}
# The objectives of the paper by themselves: more and smaller steps, as their first fall is one of steps, not of images.
PAPER = {
    "model.objective": "dseq",
    "model.views": 0,
    "optim.batch_size": 16,
    "optim.regions": 0.0,
    "optim.regions_end": 1.0,
}
# The small example of Balestriero and LeCun: four crops, invariance and SIGReg.
LEJEPA = {"views": "4x128@.08-1", "loss": "sigreg", "factor": 0.02, "batch": 64, "lr": 2e-3}
SUPERVISED = {  # the ceiling: Imagenette's own training images, with their labels
    "model": NAME,
    "random": "true",
    "optim.batch_size": 64,
    "optim.base_lr": 2e-3,  # at batch 256
    "optim.layer_decay": 1.0,
    "optim.drop_path": 0.0,
    "augment.mixup": 0.0,
    "augment.cutmix": 0.0,
    "augment.crop_scale": "[0.15,1.0]",
    "system.precision": "bf16",
    "workers": 0,
}
ROWS = {
    "views": {},
    "views + I-JEPA": {"model.objective": "ijepa"},
    "views + DSeq, components": {"model.objective": "dseq", "model.query": "border"},
    "views + DSeq, bands": BANDS,
    "… random order": {**BANDS, "model.order": "random"},
    "… inverse order": {**BANDS, "model.order": "inverse"},
    "… uniform regions": {**BANDS, "model.regions": "uniform"},
    "DSeq alone, bands": {**BANDS, "model.views": 0},
    "I-JEPA alone": {"model.objective": "ijepa", "model.views": 0},
    "DSeq": PAPER,
    "DSeq, causal": {**PAPER, "model.objective": "dseq_causal"},
    "DSeq + contrastive": {**PAPER, "model.contrastive": "true"},
    "DSeq, bands": {**PAPER, **BANDS},
    "DSeq, bands, random order": {**PAPER, **BANDS, "model.order": "random"},
    "DSeq, bands, flat": {**PAPER, **BANDS, "model.flat": "true"},
    "DSeq, uniform": {**PAPER, "model.regions": "uniform"},
    "DSeq, alpha .15": {**PAPER, "model.min_area": 0.15},
    "DSeq, defect: contexts lag": {**PAPER, "defects": ("lag",)},
    "DSeq, defect: blind predictor": {**PAPER, "defects": ("blind",)},
    "I-JEPA, defect: blocks transposed": {**PAPER, "model.objective": "ijepa", "defects": ("transposed",)},
    "I-JEPA": {**PAPER, "model.objective": "ijepa"},
    "LeJEPA": LEJEPA,
    "labels": SUPERVISED,
    "labels, from the shipped weights": {**SUPERVISED, "random": "false", "optim.layer_decay": 0.75},
    "random encoder": None,
    "pixels": None,
}
TASKS = {
    "imagenette kNN": ("imagenette128", "label", "knn"),
    "imagenette ridge": ("imagenette128", "label", "ridge"),
    "cars kNN": ("stanford_cars128", "label", "knn"),
    "count": ("clevr_like", "label", "ridge"),
    "distance": ("clevr_like", "distance", "ridge"),
}
AT_MOST = {"train": 4000, "test": 2000}
OBJECTS = 300  # images of ECSSD


def trained(row: str, seed: int, folder: Path, options: argparse.Namespace) -> tuple[torch.nn.Module, float]:
    """The encoder that one run ends with, and the run's CPU seconds."""
    settings = ROWS[row]
    if settings is None:
        named = ("pixels", 32) if row == "pixels" else (NAME, SIDE)
        return load_backbone(*named, random=row != "pixels", seed=seed)[0], 0.0
    if row == "LeJEPA":
        program, words = "benchmarks/leads.py", [folder, f"--data={options.data}"]
        given = {"images": options.images, "seed": seed}
    elif row.startswith("labels"):
        program, words = "train/finetune.py", []
        data = options.data / "imagenette128"
        epochs = options.images / pq.ParquetFile(data / "train.parquet").metadata.num_rows
        given = {"data.path": data, "optim.epochs": epochs, "optim.warmup_epochs": epochs / 8, "seeds": f"[{seed}]"}
        given |= {"output_dir": folder, "results": folder / "results.jsonl"}
    else:
        program, words = "train/pretrain.py", [f"--config={ROOT / 'train/configs/speedrun.yaml'}"]
        settings = {**START, **settings}
        if defects := settings.pop("defects", ()):
            program, words = "benchmarks/defects.py", [*defects, "--", *words]
        given = {"data.path": options.data / "photos", "data.cache": options.output / "cache"}
        given |= {"optim.epochs": options.images / options.photos, "seed": seed, "output_dir": folder}
        given |= {"model.init": options.init, "optim.lr": 5e-4} if options.init else {}
    words += [f"--{name}={value}" for name, value in {**settings, **given}.items()]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with (folder.parent / f"{folder.name}.txt").open("w") as said:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, ROOT / program, *words]
        subprocess.run(command, check=True, stdout=said, stderr=subprocess.STDOUT, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if row != "LeJEPA":
        return load_backbone(str(folder / "export"))[0], cpu
    encoder = Encoder()
    encoder.load_state_dict(torch.load(folder / "state.pt", weights_only=True)["average"])
    return encoder.vit.eval(), cpu


@torch.no_grad()
def features(model: torch.nn.Module, pixels: np.ndarray) -> torch.Tensor:
    """Mean patch tokens of images (n, 3, 128, 128) uint8, or their pixels at 32×32: (n, D)."""
    parts = []
    for start in range(0, len(pixels), 100):
        images = torch.from_numpy(np.array(pixels[start : start + 100])).float() / 255
        if isinstance(model, Pixels):
            parts.append(functional.adaptive_avg_pool2d(images, 32).flatten(1))
            continue
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(model.forward_features((images - MEAN) / STD)[:, model.num_prefix_tokens :].float().mean(1))
    return torch.cat(parts)


def judged(model: torch.nn.Module, options: argparse.Namespace) -> dict[str, float]:
    """All tasks, for an encoder of images of 128 px."""
    found, seen = {}, {}
    for task, (name, column, how) in TASKS.items():
        sides = []
        for split, most in AT_MOST.items():
            file = options.data / name / f"{split}.parquet"
            if (name, split) not in seen:
                pixels = decoded(options.output, f"{name}-{split}", [file])
                seen[name, split] = features(model, pixels[:most] if name == "imagenette128" else pixels)
            learnt = seen[name, split]
            sides.append((learnt, labels_of(file, column)[: len(learnt)]))
        found[task] = round(accuracy(how, *sides), 2)
    if isinstance(model, Pixels):
        return found
    file = options.data / "ecssd" / "test.parquet"
    images = torch.from_numpy(np.array(decoded(options.output, "ecssd", [file])[100 : 100 + OBJECTS])).float() / 255
    maps = timm_dseq.saliency_map(model, (images - MEAN) / STD, "border")
    masks = pq.read_table(file, columns=["mask"]).slice(100, OBJECTS).column("mask").to_pylist()
    found["objects"] = round(max_f(maps, [torch.from_numpy(read_mask(mask) > 0) for mask in masks]), 2)
    return found


def table(lines: list[dict]) -> str:
    """Markdown: mean ± standard deviation over seeds."""
    names = [*TASKS, "objects"]
    rows = [f"| from | trained with | images | seeds | CPU s | {' | '.join(names)} |", "|---" * (len(names) + 5) + "|"]
    for kind in dict.fromkeys((line["start"], line["row"], line["images"]) for line in lines):
        own = [line for line in lines if (line["start"], line["row"], line["images"]) == kind]
        cells = [_spread([line["found"][name] for line in own if name in line["found"]]) for name in names]
        seconds = statistics.mean(line["cpu"] for line in own)
        start, row, images = kind
        rows.append(f"| {start} | {row} | {images:,} | {len(own)} | {seconds:.0f} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--data", type=Path, help="folder with photos/, imagenette128/ and the others")
    parser.add_argument("--init", help="a run's export, from which every row goes on (default: random weights)")
    parser.add_argument("--images", type=int, default=12_800, help="that each run is trained on")
    parser.add_argument("--photos", type=int, default=65_500, help="in the data set")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="print what is there, train nothing")
    options = parser.parse_args()
    results = options.output / "study.jsonl"
    start = "a run" if options.init else "random"
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    if options.table:
        print(table(lines))
        return
    torch.set_num_threads(1)
    set_fused_attn(False)
    options.output.mkdir(parents=True, exist_ok=True)
    decoded(options.output, "photos", sorted((options.data / "photos").glob("*.parquet")))  # no part of a run's cost
    for seed in options.seeds:
        for row in options.rows:
            about = {"row": row, "seed": seed, "images": options.images, "start": start}
            if any(about.items() <= line.items() for line in lines):
                continue
            folder = options.output / re.sub(r"\W+", "-", f"{start} {row} {seed} {options.images}")
            model, cpu = trained(row, seed, folder, options)
            line = {**about, "cpu": cpu, "found": judged(model, options)}
            lines.append(line)
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
