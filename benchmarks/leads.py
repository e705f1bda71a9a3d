"""Leads for a recipe that learns on a small budget: one loop, a few switches, budgets in CPU seconds.

    python benchmarks/leads.py OUTPUT --data ../shared/data --views 4x128@.15-1k16 --batch 64 --cpu 160

A group of views is NxPX@LO-HI[kK]: N crops of PX pixels that cover LO to HI of an image's area, of which K tokens are
encoded (random windows of 2×2 patches; all without k). Groups are joined by "+"; the first holds the global views.
The encoder is a ViT-Ti/16 at 128 px (64 patches). It learns that views of one image agree: each view's projection is
compared with the mean of the other views (InfoNCE), or invariance is paired with SIGReg or VISReg. Judged are kNN and
ridge regression on 4,000 training and 2,000 test images of Imagenette, whose labels nothing else reads.

Everything random is a function of (seed, step); a run that is killed goes on from its newest state.
"""

import argparse
import copy
import io
import json
import math
import os
import re
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import timm
import torch
from PIL import Image
from timm.layers import set_fused_attn
from torch import nn
from torch.nn import functional as F

import timm_dseq  # noqa: F401  # registers the encoder's name
from timm_dseq.engine.vit import prepare_encoder
from timm_dseq.positions import sincos_positions

SIDE, PATCH, GRID = 128, 16, 8
MEAN, STD = (torch.tensor(x)[:, None, None] for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
Group = tuple[int, int, float, float, int]  # crops, pixels, least and greatest area, tokens that are encoded (0: all)


def parse_views(text: str) -> list[Group]:
    """The groups of views that a word names."""
    found = []
    for part in text.split("+"):
        match = re.fullmatch(r"(\d+)x(\d+)@([\d.]+)-([\d.]+)(?:k(\d+))?", part)
        if not match:
            raise SystemExit(f"leads.py: --views {part} is no NxPX@LO-HI[kK]")
        count, size, low, high, keep = match.groups()
        found.append((int(count), int(size), float(low), float(high), int(keep or 0)))
    return found


def decoded(folder: Path, name: str, files: list[Path]) -> np.ndarray:
    """All images of Parquet files as one mapped array (n, 3, 128, 128) uint8, made once."""
    path = folder / f"{name}.npy"
    if not path.exists():
        rows = sum(pq.ParquetFile(file).metadata.num_rows for file in files)
        part = path.with_suffix(".part")
        pixels = np.lib.format.open_memmap(part, "w+", np.uint8, (rows, 3, SIDE, SIDE))
        at = 0
        for file in files:
            for batch in pq.ParquetFile(file).iter_batches(512, columns=["image"]):
                for row in batch.column("image").to_pylist():
                    image = Image.open(io.BytesIO(row["bytes"])).convert("RGB")
                    pixels[at] = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
                    at += 1
        pixels.flush()
        os.replace(part, path)
    return np.load(path, mmap_mode="r")


def labels_of(file: Path, column: str = "label") -> torch.Tensor:
    """(n,) int64."""
    return torch.tensor(pq.read_table(file, columns=[column]).column(column).to_pylist())


def windows(count: int, grid: int, keep: int, generator: torch.Generator) -> torch.Tensor:
    """`keep` patches of a grid in random windows of 2×2, none twice: (count, keep) int64."""
    half = grid // 2
    order = torch.rand(count, half * half, generator=generator).argsort(1)
    row, column = order // half * 2, order % half * 2
    cells = torch.stack([(row + i) * grid + column + j for i in (0, 1) for j in (0, 1)], -1)
    return cells.flatten(1)[:, :keep]


def crops(pixels: torch.Tensor, group: Group, kept: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
    """uint8 (B, 3, S, S) → the group's N random crops of each, half of them flipped: (N·B, 3, PX, PX) in [0, 1].

    With kept (N·B, K) only those patches are drawn, one below the other: (N·B, 3, K·16, 16).
    """
    count, size, low, high, _ = group
    b = len(pixels)
    area = torch.empty(b, count).uniform_(low, high, generator=generator)
    ratio = torch.empty(b, count).uniform_(math.log(3 / 4), math.log(4 / 3), generator=generator).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    draws = torch.rand(3, b, count, generator=generator)
    left, top = draws[0] * (1 - width), draws[1] * (1 - height)
    line = ((torch.arange(size) + 0.5) / size).expand(b, count, -1)
    x = torch.where(draws[2, :, :, None] < 0.5, 1 - line, line) * width[..., None] + left[..., None]  # (B, N, PX)
    y = line * height[..., None] + top[..., None]
    if kept is None:
        x, y = x[:, :, None, :], y[:, :, :, None]
    else:
        where, inside = kept.view(count, b, -1).transpose(0, 1), torch.arange(PATCH)  # (B, N, K), (16,)
        across, down = (
            values.gather(2, (cells[..., None] * PATCH + inside).flatten(2)).unflatten(2, (-1, PATCH))
            for values, cells in ((x, where % (size // PATCH)), (y, where // (size // PATCH)))
        )  # each (B, N, K, 16)
        x = across[:, :, :, None, :].expand(-1, -1, -1, PATCH, -1).flatten(2, 3)
        y = down.flatten(2)[..., None]
    places = torch.stack(torch.broadcast_tensors(x, y), -1) * 2 - 1
    drawn = F.grid_sample(
        pixels.float() / 255, places.flatten(1, 2), "bilinear", padding_mode="border", align_corners=False
    )
    return drawn.unflatten(2, (count, -1)).permute(2, 0, 1, 3, 4).flatten(0, 1)


def coloured(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Brightness, contrast and saturation ± .5, hue ± .1 (of 4 in 5 images), grey (1 in 5), solarised (1 in 10);
    then normalised: (n, 3, H, W) in [0, 1] → the same shape."""
    n = len(images)
    draws = torch.rand(7, n, generator=generator)
    on = (draws[0] < 0.8).float()
    brightness, contrast, saturation = 1 + on * 0.5 * (2 * draws[1:4] - 1)
    saturation = torch.where(draws[5] < 0.2, 0.0, saturation)
    angle = on * 0.2 * math.pi * (2 * draws[4] - 1)
    turn = torch.zeros(n, 3, 3)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = angle.cos() * saturation
    turn[:, 1, 2], turn[:, 2, 1] = -angle.sin() * saturation, angle.sin() * saturation
    matrix = torch.linalg.inv(YIQ) @ turn @ YIQ * (brightness * contrast)[:, None, None]
    level = images.mean((1, 2, 3)) * brightness * (1 - contrast)
    images = torch.baddbmm(level[:, None, None], matrix, images.flatten(2)).view_as(images).clamp_(0, 1)
    solarised = torch.where(images > 0.5, 1 - images, images)
    return (torch.where(draws[6, :, None, None, None] < 0.1, solarised, images) - MEAN) / STD


class Encoder(nn.Module):
    """The ViT, called on some patches of an image: images, or only their patches, → class token and patches."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = timm.create_model("dseq_jepa_vit_ti16", img_size=SIDE, num_classes=0)
        prepare_encoder(self.vit)
        full = sincos_positions((GRID, GRID), self.vit.embed_dim).T.view(1, -1, GRID, GRID)
        self.positions = {g: F.interpolate(full, size=(g, g), mode="bilinear")[0].flatten(1).T for g in range(2, 9)}

    def forward(self, images: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
        """(B, 3, PX, PX), or (B, 3, K·16, 16) with the K patches' places in the grid → (B, 1 + K, D), normed."""
        tokens = self.vit.patch_embed.proj(images).flatten(2).mT
        places = self.positions[GRID][kept] if kept is not None else self.positions[images.shape[-1] // PATCH]
        tokens = torch.cat([self.vit.cls_token.expand(len(tokens), -1, -1), tokens + places], 1)
        return self.vit.norm(self.vit.blocks(tokens))


def projector(width: int, hidden: int = 1024, out: int = 64) -> nn.Sequential:
    """(B, width) → (B, out)."""
    layers: list[nn.Module] = []
    for inputs in (width, hidden):
        layers += [nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, out))


def info_nce(views: torch.Tensor, count_global: int, temperature: float) -> torch.Tensor:
    """Each view (V, B, P) finds the mean of the global ones (but itself) among those of other images, and is found."""
    views = F.normalize(views, dim=-1)
    loss, own = torch.zeros(()), torch.arange(views.shape[1])
    for v in range(len(views)):
        others = [g for g in range(count_global) if g != v] or [w for w in range(len(views)) if w != v]
        logits = views[v] @ F.normalize(views[others].mean(0), dim=-1).T / temperature
        loss = loss + (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    return loss / len(views)


def sigreg(z: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Epps and Pulley's distance of z (B, P) to the standard normal distribution, mean over directions (P, M)."""
    t = torch.linspace(0, 3, 17)
    weight = torch.full((17,), 2 * 3 / 16)
    weight[[0, -1]] /= 2
    normal = torch.exp(-t * t / 2)
    x = (z @ directions)[..., None] * t
    error = (x.cos().mean(0) - normal).square() + x.sin().mean(0).square()
    return (error @ (weight * normal)).mean() * len(z)


def visreg(z: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Centre, scale, and sliced Wasserstein distance of z (B, P) to the standard normal distribution."""
    mean, std = z.mean(0), z.std(0)
    x = ((z - mean) / (std.detach() + 1e-4) @ directions).sort(0).values
    quantiles = torch.special.ndtri(torch.arange(1, len(z) + 1) / (len(z) + 1))
    return mean.square().mean() + (1 - std).square().mean() + (x - quantiles[:, None]).square().mean()


def loss_of(
    views: torch.Tensor, count_global: int, kind: str, factor: float, temperature: float, generator: torch.Generator
) -> torch.Tensor:
    """Of projected views (V, B, P), the global ones first."""
    if kind == "nce":
        return info_nce(views, count_global, temperature)
    compared = views if count_global > 1 else views[1:]
    invariance = (compared - views[:count_global].mean(0)).square().mean()
    directions = F.normalize(torch.randn(views.shape[2], 256, generator=generator), dim=0)
    term = {"sigreg": sigreg, "visreg": visreg}[kind]
    return (1 - factor) * invariance + factor * torch.stack([term(view, directions) for view in views]).mean()


def accuracy(how: str, train: tuple, test: tuple) -> float:
    """In %, of features (n, D) standardised, with labels (n,)."""
    (learnt, labels), (tested, truth) = train, test
    mean, std, classes = learnt.mean(0), learnt.std(0) + 1e-6, int(labels.max()) + 1
    learnt, tested = (learnt - mean) / std, (tested - mean) / std
    if how == "knn":
        near, which = (F.normalize(tested, dim=1) @ F.normalize(learnt, dim=1).T).topk(20)
        scores = torch.zeros(len(tested), classes).scatter_add(1, labels[which], (near / 0.07).exp())
    else:
        learnt, tested = (F.pad(x.double(), (0, 1), value=1.0) for x in (learnt, tested))
        gram = learnt.T @ learnt + 100 * torch.eye(learnt.shape[1], dtype=torch.float64)
        scores = tested @ torch.linalg.solve(gram, learnt.T @ (2.0 * F.one_hot(labels, classes) - 1).double())
    return 100 * (scores.argmax(1) == truth).float().mean().item()


@torch.no_grad()
def judged(encoder: Encoder, train: tuple, test: tuple) -> dict[str, float]:
    """kNN (k = 20, T = .07) and ridge (alpha 100) on standardised means of patch tokens, in %; RankMe."""
    encoder.eval()
    means = []
    for pixels, _ in (train, test):
        parts = []
        for start in range(0, len(pixels), 100):
            images = torch.from_numpy(np.array(pixels[start : start + 100])).float() / 255
            with torch.autocast("cpu", torch.bfloat16):
                parts.append(encoder((images - MEAN) / STD)[:, 1:].float().mean(1))
        means.append(torch.cat(parts))
    encoder.train()
    (learnt, tested), (_, labels), (_, truth) = means, train, test
    values = torch.linalg.svdvals(learnt - learnt.mean(0))
    share = values / values.sum()
    sides = (learnt, labels), (tested, truth)
    return {
        "knn": round(accuracy("knn", *sides), 2),
        "ridge": round(accuracy("ridge", *sides), 2),
        "rank_me": round(torch.special.entr(share).sum().exp().item(), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder of the run: state.pt, log.jsonl")
    parser.add_argument("--data", type=Path, required=True, help="folder with photos/ and imagenette128/ in Parquet")
    parser.add_argument("--views", default="4x128@.15-1k16")
    parser.add_argument("--loss", choices=["nce", "sigreg", "visreg"], default="nce")
    parser.add_argument("--factor", type=float, default=0.02, help="of SIGReg or VISReg, 1 - factor of invariance")
    parser.add_argument("--temperature", type=float, default=0.2, help="of InfoNCE")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.97, help="of the weights that are judged, at its end")
    parser.add_argument("--cpu", type=float, default=160, help="CPU seconds of training")
    parser.add_argument("--images", type=int, help="train on so many images instead")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    set_fused_attn(False)  # explicit attention is faster in bf16 on CPUs
    options.output.mkdir(parents=True, exist_ok=True)
    cache = options.output.parent
    photos = decoded(cache, "photos", sorted((options.data / "photos").glob("*.parquet")))
    nette = [options.data / "imagenette128" / f"{split}.parquet" for split in ("train", "test")]
    train, test = (
        (decoded(cache, f"imagenette128-{file.stem}", [file])[:count], labels_of(file)[:count])
        for file, count in zip(nette, (4000, 2000), strict=True)
    )

    groups = parse_views(options.views)
    encoder = Encoder()
    model = nn.ModuleDict({"encoder": encoder, "projector": projector(2 * encoder.vit.embed_dim)})
    average = copy.deepcopy(encoder).requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1 and p is not encoder.vit.cls_token]
    others = [p for p in trained if p.ndim == 1 or p is encoder.vit.cls_token]
    parts = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(parts, lr=options.lr, betas=(0.9, 0.95), fused=True)
    done = {"step": 0, "cpu": 0.0, "tokens": 0}
    state = options.output / "state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["done"]
    before, begun, written = done["cpu"], time.process_time(), time.monotonic()

    def finished() -> bool:
        if options.images:
            return done["step"] * options.batch >= options.images
        return done["cpu"] >= options.cpu

    while not finished():
        epoch, at = divmod(done["step"], len(photos) // options.batch)
        order = np.random.default_rng((options.seed, epoch)).permutation(len(photos))
        chosen = np.sort(order[at * options.batch : (at + 1) * options.batch])
        pixels, generator = torch.from_numpy(photos[chosen]), torch.Generator()
        generator.manual_seed(options.seed * 10**7 + done["step"])
        projected = []
        for group in groups:
            count, size, _, _, keep = group
            kept = windows(count * len(pixels), size // PATCH, keep, generator) if keep else None
            images = coloured(crops(pixels, group, kept, generator), generator)
            with torch.autocast("cpu", torch.bfloat16):
                tokens = encoder(images, kept)
            done["tokens"] += tokens.shape[0] * tokens.shape[1]
            pooled = torch.cat([tokens[:, 1:].float().mean(1), tokens[:, 0].float()], 1)
            with torch.autocast("cpu", torch.bfloat16):  # the statistics of each view by itself
                projected += [model["projector"](view).float() for view in pooled.chunk(count)]
        loss = loss_of(
            torch.stack(projected), groups[0][0], options.loss, options.factor, options.temperature, generator
        )
        for part in optimizer.param_groups:
            part["lr"] = options.lr * min(1.0, (done["step"] + 1) / 20)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        momentum = min(options.ema, 1 - 0.2 / (1 + done["step"] / 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(encoder.parameters()), 1 - momentum)
        done["step"] += 1
        done["cpu"] = before + time.process_time() - begun
        if time.monotonic() - written > 60 or finished():
            written = time.monotonic()
            line = {**done, "images": done["step"] * options.batch, "loss": round(loss.item(), 4)}
            with (options.output / "log.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            saved = {"model": model.state_dict(), "average": average.state_dict(), "done": done}
            torch.save({**saved, "optimizer": optimizer.state_dict()}, state.with_suffix(".new"))
            os.replace(state.with_suffix(".new"), state)
            print(line, flush=True)
    found = {**done, "images": done["step"] * options.batch, **judged(average, train, test)}
    (options.output / "result.json").write_text(json.dumps({**vars(options), **found}, default=str, indent=1))
    print(found)


if __name__ == "__main__":
    main()
