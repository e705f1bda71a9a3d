"""What probing costs beside the backbone, on one machine in one run.

    python benchmarks/probe.py cached                       # heads on 1.28 M × 3072 stored features (8 GB of disk)
    python benchmarks/probe.py extraction --model vit_small_patch16_224 --images 512
    python benchmarks/probe.py grid --model vit_base_patch16_224 --batch 32

cached: the rate on features in a mapped file against the same in memory, and the memory beyond the mapped file.
extraction: against the forward pass alone, of images that are decoded already and of JPEGs. grid: the 52 heads of
`dinov2` with the backbone running, against one head. On a CPU the loader shares the cores with the backbone.
"""

import argparse
import io
import os
import random
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

from accelerate import Accelerator
from common.data.digests import weights_digest
from common.data.source import Source
from common.probing.feature_batches import LiveFeatures, StoredFeatures
from common.probing.feature_cache import CachedFeatures, cached_features, eval_transform
from common.probing.features import FrozenBackbone, RowLayout
from common.probing.heads import RECIPES, Grid, HeadTraining, Recipe
from common.probing.settings import Cache

from timm_dseq.hub.load import data_config, load_backbone

CLASSES, WARM, STEPS, ROUNDS = 1000, 10, 200, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("cached", "extraction", "grid"))
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--rows", type=int, default=1_280_000)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="of the grid")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    settings = parser.parse_args()
    {"cached": cached, "extraction": extraction, "grid": grid}[settings.part](settings)


def cached(settings: argparse.Namespace) -> None:
    """Heads of dseq on stored features: a mapped file against memory."""
    device = Accelerator().device
    layout, count = RowLayout((("mean", 4, 768),)), settings.rows
    labels = torch.randint(CLASSES, (count,))
    with tempfile.NamedTemporaryFile(dir=settings.folder, suffix=".bin") as file:
        block = np.random.default_rng(0).normal(size=(4096, layout.width)).astype(np.float16)
        for start in range(0, count, len(block)):
            file.write(block[: count - start].tobytes())
        file.flush()
        mapped = np.memmap(file.name, np.float16, "r", shape=(count, layout.width))
        inside = np.array(mapped[: min(count, 65_536)])
        rates = {"in memory": 0.0, "mapped": 0.0}
        before, most = anonymous_memory(), 0.0
        for _ in range(ROUNDS):  # in turns
            for name, rows in (("in memory", inside), ("mapped", mapped)):
                rate, memory = cached_rate(rows, labels[: len(rows)], layout, device)
                rates[name], most = max(rates[name], rate), max(most, memory - before)
    recipe = RECIPES["dseq"]
    steps = recipe.length(count, recipe.batch_size, None)
    print(f"{count:,} × {layout.width} float16 features ({count * layout.width * 2 / 2**30:.1f} GiB), {device}")
    for name, rate in rates.items():
        print(f"{name:<10} {rate:.1f} steps/s of {recipe.batch_size}")
    print(f"mapped / in memory: {rates['mapped'] / rates['in memory']:.2f}; memory beyond the file {most:.2f} GiB")
    print(f"the whole probe ({steps:,} steps) from {STEPS} steps: {steps / rates['mapped'] / 3600:.2f} h")


def cached_rate(rows: np.ndarray, labels: torch.Tensor, layout: RowLayout, device: torch.device) -> tuple[float, float]:
    """Steps a second, and the memory that is in use meanwhile."""
    recipe = RECIPES["dseq"]
    cache = CachedFeatures(rows, np.zeros((0, 16), np.uint8), labels, layout)
    training = training_of(recipe, ["mean4"], len(rows), recipe.batch_size, random.randrange(1 << 30))
    heads = Grid(recipe, training.heads, [layout.width], CLASSES, 0).to(device)
    batches = StoredFeatures(training, cache, device).batches(0)
    for views, truth in islice(batches, WARM):
        heads.step(views, truth, 0.0)
    wait(device)
    begun = time.perf_counter()
    for views, truth in islice(batches, STEPS):
        heads.step(views, truth, 0.0)
    wait(device)
    spent = time.perf_counter() - begun
    memory = anonymous_memory()
    batches.close()
    return STEPS / spent, memory


def training_of(recipe: Recipe, views: list[str], images: int, batch: int, seed: int = 0) -> HeadTraining:
    return HeadTraining(recipe, views, seed, np.arange(images), None, batch, STEPS)


def extraction(settings: argparse.Namespace) -> None:
    """The cache's writing against the forward pass alone."""
    accelerator = Accelerator()
    model, preprocessing = backbone(settings.model, accelerator)
    size = preprocessing["input_size"]
    ready = torch.randint(256, (settings.batch, *size), dtype=torch.uint8, device=accelerator.device)
    pictures = {"decoded": decoded(settings.images, size), "JPEG": jpegs(settings.images)}
    transform = eval_transform(preprocessing)
    best = dict.fromkeys(("forward", "decoding", "decoded", "JPEG"), 0.0)
    for turn in range(ROUNDS):
        batches = settings.images // settings.batch
        best["forward"] = max(best["forward"], batches * settings.batch / seconds(forward, model, ready, batches))
        source = pictures["JPEG"]
        spent = seconds(lambda source=source: [transform(source.picture(i)) for i in range(len(source))])
        cores = min(max(settings.workers, 1), os.cpu_count())
        best["decoding"] = max(best["decoding"], settings.images / spent * cores)
        for name, source in pictures.items():
            with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
                cache = Cache(folder, "float16", settings.batch)
                weights = weights_digest(model.model)
                workers = 0 if name == "decoded" else settings.workers
                arguments = (source, None, model, preprocessing, cache, weights, accelerator, workers)
                spent = seconds(cached_features, *arguments)
            best[name] = max(best[name], settings.images / spent)
        print(f"round {turn + 1}: " + ", ".join(f"{name} {rate:.1f}" for name, rate in best.items()), flush=True)
    slower = min(best["forward"], best["decoding"])
    print(f"{settings.model}, {accelerator.device}, {settings.workers} workers; images/s: {best}")
    print(f"decoded images / forward alone: {best['decoded'] / best['forward']:.2f}")
    print(f"JPEGs / slower of decoding and forward: {best['JPEG'] / slower:.2f}")
    both = 1 / (1 / best["forward"] + 1 / best["decoding"])
    print(f"JPEGs / both on the same cores: {best['JPEG'] / both:.2f}")


def grid(settings: argparse.Namespace) -> None:
    """A step of the dinov2 grid against one of a single head, backbone running on crops of JPEGs."""
    accelerator = Accelerator()
    model, preprocessing = backbone(settings.model, accelerator)
    config = SimpleNamespace(heads=SimpleNamespace(at_once=settings.batch), workers=settings.workers)
    layout = model.layout(preprocessing["input_size"])
    probe = SimpleNamespace(
        backbone=model, layout=layout, preprocessing=preprocessing, accelerator=accelerator, config=config
    )
    source, recipe = jpegs(settings.images), RECIPES["dinov2"]
    grids = {"52 heads": recipe.heads(layout.available(*recipe.views)), "one head": recipe.heads(["mean"])[:1]}
    best = dict.fromkeys(grids, float("inf"))
    for _ in range(ROUNDS):
        for name, specs in grids.items():
            views = list(dict.fromkeys(spec.view for spec in specs))
            live = LiveFeatures(training_of(recipe, views, len(source), settings.batch), source, probe)
            heads = Grid(recipe, specs, [live.width(spec.view) for spec in specs], CLASSES, 0).to(accelerator.device)
            batches = live.batches(0)
            for features, labels in islice(batches, 1):
                heads.step(features, labels, 0.0)
            best[name] = min(best[name], seconds(grid_steps, heads, batches, settings.steps) / settings.steps)
            batches.close()
    print(f"{settings.model}, batch {settings.batch}, {accelerator.device}")
    print(", ".join(f"{name} {spent:.2f} s a step" for name, spent in best.items()))
    print(f"52 heads / one head: {best['52 heads'] / best['one head']:.3f}")


def grid_steps(heads: Grid, batches, count: int) -> None:
    for features, labels in islice(batches, count):
        heads.step(features, labels, 0.0)


def forward(model: FrozenBackbone, ready: torch.Tensor, count: int) -> None:
    for _ in range(count):
        model.features(ready)


def backbone(name: str, accelerator: Accelerator) -> tuple[FrozenBackbone, dict]:
    model, _ = load_backbone(name, random=True)
    preprocessing = data_config(model)
    return FrozenBackbone(model, preprocessing["mean"], preprocessing["std"]).to(accelerator.device), preprocessing


def decoded(count: int, size: tuple[int, ...]) -> Source:
    """Images that need no decoding and no resizing but the transform's own."""
    side = round(size[1] / 0.9)
    draw = np.random.default_rng(0)
    rows = [{"image": Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8))} for _ in range(count)]
    return Source("decoded", rows, "image", "label", CLASSES, torch.randint(CLASSES, (count,)))


def jpegs(count: int) -> Source:
    """JPEGs of ImageNet's usual size, 500 × 375."""
    draw = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (38, 50, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        rows.append({"image": {"bytes": file.getvalue(), "path": None}})
    return Source("JPEGs", rows, "image", "label", CLASSES, torch.randint(CLASSES, (count,)))


def anonymous_memory() -> float:
    """Memory of this process that no file stands behind, in GiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 2**20
    return float("nan")


def seconds(call, *arguments) -> float:
    begun = time.perf_counter()
    call(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
