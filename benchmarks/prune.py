"""Accuracy against speed when a ViT drops patches, beside dropping at random, keeping the centre, and merging (ToMe).

    python benchmarks/prune.py choose dseq_jepa_vit_ti16 --data ../shared/data/imagenette128 --test 1000
    python benchmarks/prune.py curve dseq_jepa_vit_ti16 --data ../shared/data/imagenette128 --json docs/runs/prune.json
    python benchmarks/prune.py speed vit_base_patch16_224 vit_small_patch16_224
    python benchmarks/prune.py draw docs/runs/prune.json > docs/pruning.svg

choose: every query and several blocks, keep 0.7. curve: the default query, and its rivals. The classifier is logistic
regression on features of the unpruned model; nothing is trained on pruned ones. speed: random weights, keep 0.7.
A speed is a ratio to the unpruned model, the two measured in turns; on a CPU it is of CPU time on one thread, so that
other work on the machine changes it little.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import measure
import numpy as np
import timm
import torch
from common.classifiers import Regression
from common.data.digests import Pictures
from common.data.source import Source
from common.labels.labelled import open_full
from common.labels.settings import Labels
from common.probing.feature_cache import eval_transform
from common.run.results import interval
from rich.progress import track
from tome import Merging
from torch import nn

from timm_dseq import prune
from timm_dseq.engine.saliency import QUERIES
from timm_dseq.hub.load import data_config, load_backbone

BATCH, TIMED, ROUNDS = 64, 8, 7
KEEPS, BLOCKS = (0.9, 0.8, 0.7, 0.6, 0.5), (1, 3, 6)
MERGED = (0.02, 0.04, 0.06, 0.08, 0.1)


def at_random(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Scores (B, n) that mean nothing."""
    return torch.rand(len(tokens), tokens.shape[1] - model.num_prefix_tokens)


def near_centre(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Scores (B, n): how near a patch is to the middle, of a square image."""
    side = round((tokens.shape[1] - model.num_prefix_tokens) ** 0.5)
    place = torch.arange(side) - (side - 1) / 2
    return -(place[:, None] ** 2 + place**2).flatten().expand(len(tokens), -1)


class Judge:
    """Images of one size and a classifier of the unpruned model's features: which test images a model gets right."""

    def __init__(self, name: str, size: int, options: argparse.Namespace) -> None:
        self.model, _ = load_backbone(name, size)
        self.model.eval()
        self.about = data_config(self.model)
        labelled = open_full(Labels(path=options.data))
        images, truth = self._images(labelled.train, options.train)
        self.head = Regression(self.features(self.model, images), truth, len(labelled.names))
        self.head.fit(options.c)
        self.images, self.truth = self._images(labelled.test, options.test)

    def _images(self, source: Source, wanted: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 (n, 3, S, S) and labels (n,): all images, or about as many as are wanted, evenly spaced."""
        rows = range(0, len(source), max(1, len(source) // (wanted or len(source))))
        pictures = Pictures(source, eval_transform(self.about))
        images = np.stack([pictures[row][1] for row in track(rows, f"{source.name}: reading")])
        return torch.from_numpy(images), source.truth[list(rows)]

    @torch.no_grad()
    def features(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """Pooled features (n, D) of uint8 images."""
        mean, std = (torch.tensor(self.about[key])[:, None, None] for key in ("mean", "std"))
        parts = track(images.split(BATCH), "features")
        return torch.cat([model((part.float() / 255 - mean) / std) for part in parts])

    def right(self, model: nn.Module) -> torch.Tensor:
        """Which test images are classified correctly: (n,) float64."""
        torch.manual_seed(0)
        return (self.head.predict(self.features(model, self.images)) == self.truth).double()


def ratio(model: nn.Module, other: nn.Module, images: torch.Tensor) -> float:
    """How many times as many images a second the other model computes: the median over rounds, in turns."""
    clock = time.perf_counter if images.is_cuda else time.process_time

    @torch.no_grad()
    def spent(one: nn.Module) -> float:
        measure.sync(images.device)
        begun = clock()
        one(images)
        measure.sync(images.device)
        return clock() - begun

    spent(model), spent(other)
    return statistics.median(spent(model) / spent(other) for _ in range(ROUNDS))


def rivals(model: nn.Module, options: argparse.Namespace) -> Iterator[tuple[str, str, Callable[[], nn.Module]]]:
    """Method, setting, and how the model is made."""
    for method, query in (("salient", None), ("random", at_random), ("centre", near_centre)):
        chosen = {"query": query} if query else {}
        for keep in options.keeps:
            yield method, f"keep {keep:g}", lambda keep=keep, chosen=chosen: prune(model, keep, options.block, **chosen)
    for share in options.merges:
        r = max(1, round(share * model.patch_embed.num_patches))
        yield "merging", f"r {r}", lambda r=r: Merging(model, r)


def curve(options: argparse.Namespace) -> list[dict]:
    """Accuracy and speed of all methods, at each image size."""
    rows = []
    for size in options.img_size:
        judge = Judge(options.models[0], size, options)
        unpruned, some = judge.right(judge.model), torch.randn(TIMED, 3, size, size)
        rows.append({"size": size, "method": "unpruned", "setting": "", "speed": 1.0, **accuracy(unpruned)})
        print(f"{size} px, {len(unpruned)} test images, unpruned: {rows[-1]['accuracy']:.2f} %", flush=True)
        for method, setting, make in rivals(judge.model, options):
            model = make()
            right = judge.right(model)
            row = {"size": size, "method": method, "setting": setting, "speed": ratio(judge.model, model, some)}
            rows.append(row | accuracy(right, unpruned))
            show(rows[-1])
            measure.write(options.json, {**measure.environment(some.device), "rows": rows})
    return rows


def accuracy(right: torch.Tensor, unpruned: torch.Tensor | None = None) -> dict:
    """In per cent; against the unpruned model with the 95 % interval over test images, in pairs."""
    found = {"accuracy": 100 * right.mean().item(), "images": len(right)}
    if unpruned is not None:
        found["lost"] = 100 * (unpruned - right).mean().item()
        found["interval"] = [100 * bound for bound in interval(unpruned - right)]
    return found


def show(row: dict) -> None:
    low, high = row["interval"]
    speed = f"{row['speed']:.2f}×" if "speed" in row else ""
    print(
        f"{row['size']} px  {row['method']:10} {row['setting']:9} {speed:6} "
        f"{row['accuracy']:.2f} %, lost {row['lost']:.2f} [{low:.2f}, {high:.2f}]",
        flush=True,
    )


def choose(options: argparse.Namespace) -> list[dict]:
    """Accuracy by query and block, keep 0.7."""
    judge, rows = Judge(options.models[0], options.img_size[0], options), []
    unpruned = judge.right(judge.model)
    print(f"{len(unpruned)} test images, unpruned: {100 * unpruned.mean():.2f} %", flush=True)
    for block in options.blocks:
        queries = {name: name for name, query in QUERIES.items() if query.for_training}
        queries |= {"random": at_random, "centre": near_centre}
        queries["attention"] = lambda model, tokens, block=block: QUERIES["attention"].score(model, tokens, block)
        for name, query in queries.items():
            right = judge.right(prune(judge.model, options.keep, block, query))
            row = {"size": options.img_size[0], "method": name, "setting": f"block {block}"}
            rows.append(row | accuracy(right, unpruned))
            show(rows[-1])
            measure.write(options.json, {"keep": options.keep, "rows": rows})
    return rows


def speed(options: argparse.Namespace) -> list[dict]:
    """Speed of models with random weights, by the query."""
    rows = []
    for name in options.models:
        model = timm.create_model(name).eval()
        images = torch.randn(options.batch, *model.pretrained_cfg["input_size"])
        for query in [name for name, query in QUERIES.items() if query.for_training]:
            found = ratio(model, prune(model, options.keep, options.block, query), images)
            rows.append({"model": name, "query": query, "keep": options.keep, "speed": found})
            print(f"{name}, keep {options.keep}, {query}: {found:.3f}× images/s", flush=True)
            measure.write(options.json, {**measure.environment(images.device), "rows": rows})
    return rows


METHODS = {"salient": "#e66100", "random": "#1a85ff", "centre": "#009e73", "merging": "#5d3a9b"}
WIDE, HIGH, LEFT, TOP = 430, 270, 46, 34  # a panel, and where its axes begin


def draw(options: argparse.Namespace) -> None:
    """Print the curves of a file as SVG, a panel for each image size."""
    rows = json.loads(Path(options.models[0]).read_text())["rows"]
    sizes = sorted({row["size"] for row in rows})
    parts = [panel([row for row in rows if row["size"] == size], at * WIDE) for at, size in enumerate(sizes)]
    box = f'viewBox="0 0 {WIDE * len(sizes)} {HIGH}" font-family="sans-serif" font-size="12" fill="#444"'
    print(f'<svg xmlns="http://www.w3.org/2000/svg" {box}>')
    print(f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>')


def panel(rows: list[dict], x0: float) -> str:
    """Accuracy over speed; each method's line begins at the unpruned model."""
    first, *others = rows
    slow, fast = min(row["speed"] for row in rows) - 0.02, max(row["speed"] for row in rows) + 0.02
    low = math.floor(min(row["accuracy"] for row in rows) / 5) * 5
    high = math.ceil(max(row["accuracy"] for row in rows) / 5) * 5

    def place(row: dict) -> tuple[float, float]:
        right, up = (row["speed"] - slow) / (fast - slow), (row["accuracy"] - low) / (high - low)
        return x0 + LEFT + right * (WIDE - LEFT - 14), TOP + (1 - up) * (HIGH - TOP - 40)

    title = f"{first['size']} px: top-1 % over images/s, {first['images']:,} images"
    drawn = [f'<text x="{x0 + LEFT}" y="18" font-weight="bold">{title}</text>']
    for y in range(low, high + 1, 5):
        x, height = place({"speed": slow, "accuracy": y})
        drawn.append(f'<line x1="{x:.1f}" x2="{x0 + WIDE - 14}" y1="{height:.1f}" y2="{height:.1f}" stroke="#ddd"/>')
        drawn.append(f'<text x="{x - 6:.1f}" y="{height + 4:.1f}" text-anchor="end">{y}</text>')
    for tenth in range(10, math.floor(fast * 10) + 1, 2):
        x, height = place({"speed": tenth / 10, "accuracy": low})
        drawn.append(f'<text x="{x:.1f}" y="{height + 16:.1f}" text-anchor="middle">{tenth / 10:.1f}×</text>')
    for at, (method, colour) in enumerate(METHODS.items()):
        line = [place(row) for row in (first, *(row for row in others if row["method"] == method))]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in line]
        where = f'x="{x0 + LEFT + at * 92}" y="{HIGH - 6}"'
        drawn.append(f'<text {where} fill="{colour}" font-weight="bold">{method}</text>')
    return "".join(drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("choose", "curve", "speed", "draw"))
    parser.add_argument("models", nargs="+", help="names; of draw, a file of curve")
    parser.add_argument("--data", help="labelled images")
    parser.add_argument("--img_size", type=int, nargs="+", default=[128, 224])
    parser.add_argument("--train", type=int, help="images to train on (default: all)")
    parser.add_argument("--test", type=int, help="images to test on (default: all)")
    parser.add_argument("--c", type=float, default=10.0, help="C of the logistic regression")
    parser.add_argument("--keeps", type=float, nargs="+", default=KEEPS, help="of curve")
    parser.add_argument(
        "--merges", type=float, nargs="+", default=MERGED, help="of curve: shares of the patches, a block"
    )
    parser.add_argument("--keep", type=float, default=0.7, help="of choose and speed")
    parser.add_argument("--block", type=float, default=1 / 3)
    parser.add_argument("--blocks", type=int, nargs="+", default=BLOCKS, help="of choose")
    parser.add_argument("--batch", type=int, default=4, help="of speed")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    {"choose": choose, "curve": curve, "speed": speed, "draw": draw}[options.part](options)


if __name__ == "__main__":
    main()
