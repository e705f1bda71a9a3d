"""The recipes' first 20 steps equal a loop written by hand, from the augmentation to the weights."""

import io
import math
import random

import datasets
import numpy as np
import pytest
import timm
import torch
from common.data.order import order, sample_seed
from PIL import Image, ImageOps
from timm.data import create_transform

import timm_dseq  # noqa: F401
from timm_dseq.engine.random import uniform

from ..runs import log_of, tensors_of
from ..tunings import colours, tune

pytestmark = pytest.mark.xdist_group("tunings")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# As published. The learning rates are for a batch of 256, to which the rate of a run is proportional.
PUBLISHED = {
    "mae": {"lr": 5e-4, "decay": 0.65, "drop": 0.1, "erase": 0.25, "mixup": 0.8, "cutmix": 1.0},
    "ijepa": {"lr": 3e-5 / 2, "decay": 0.75, "drop": 0.0, "erase": 0.0, "mixup": 0.0, "cutmix": 0.0},
}
BATCH, EPOCHS, WARMUP, IMAGES, CLASSES, LAYERS = 64, 20, 5, 64, 3, 12  # 20 steps, one an epoch
SETTINGS = {"optim__batch_size": BATCH, "optim__epochs": EPOCHS, "optim__warmup_epochs": WARMUP}


def draw_from(seed):
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def images_of(rows, recipe, epoch_and_index):
    """One batch, augmented by timm's own transform."""
    transform = create_transform(
        32, is_training=True, color_jitter=None, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic",
        re_prob=recipe["erase"], re_mode="pixel", mean=MEAN, std=STD,
    )  # fmt: skip
    images, labels = [], []
    for epoch, index in epoch_and_index:
        picture = Image.open(io.BytesIO(rows[index]["image"]["bytes"])).convert("RGB")
        draw_from(sample_seed(0, epoch, index))
        images.append(transform(picture))
        labels.append(rows[index]["label"])
    return torch.stack(images), torch.tensor(labels)


def mixed(images, labels, recipe, step):
    """Neighbours 2i and 2i + 1 are mixed; each 32 images share a draw."""
    soft = torch.full((len(labels), CLASSES), 0.1 / CLASSES)
    soft[torch.arange(len(labels)), labels] += 0.9
    if not recipe["mixup"]:
        return images, soft
    out, targets = images.clone(), soft.clone()
    for start in range(0, len(images), 32):
        draw_from(sample_seed(0, (step * BATCH + start) // 32, -4))
        np.random.rand()  # whether to mix at all: always
        cut = np.random.rand() < 0.5
        lam = float(np.random.beta(1.0, 1.0) if cut else np.random.beta(0.8, 0.8))
        if cut:
            side = int(32 * math.sqrt(1 - lam))
            y, x = np.random.randint(0, 32), np.random.randint(0, 32)
            top, left = max(y - side // 2, 0), max(x - side // 2, 0)
            bottom, right = min(y + (side + 1) // 2, 32), min(x + (side + 1) // 2, 32)
            lam = 1 - (bottom - top) * (right - left) / 32**2
        for i in range(start, start + 32):
            other = i + 1 if i % 2 == 0 else i - 1
            if cut:
                out[i, :, top:bottom, left:right] = images[other, :, top:bottom, left:right]
            else:
                out[i] = lam * images[i] + (1 - lam) * images[other]
            targets[i] = lam * soft[i] + (1 - lam) * soft[other]
    return out, targets


def logits_of(model, images, recipe, seeds):
    """The ViT, block by block, with its drop path: branch j of 2 · blocks lives at the rate of its block."""
    rates = [recipe["drop"] * i / (LAYERS - 1) for i in range(LAYERS) for _ in range(2)]
    rates = [rate for rate in rates if rate]
    coins = uniform(torch.tensor(seeds), max(1, len(rates)), stream=2)
    place = 0

    def kept(branch, block):
        nonlocal place
        rate = recipe["drop"] * block / (LAYERS - 1)
        if not rate:
            return branch
        factors = (coins[:, place] >= torch.tensor(rate)).float() / (1 - rate)
        place += 1
        return branch * factors[:, None, None]

    x = model.patch_embed(images) + model.pos_embed
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1)
    for i, block in enumerate(model.blocks):
        x = x + kept(block.attn(block.norm1(x)), i)
        x = x + kept(block.mlp(block.norm2(x)), i)
    return model.head(model.norm(x)[:, 1:].mean(1))


def layer_of(name):
    """0 for what embeds, then the blocks (the final norm goes with the last), then the head."""
    if name.startswith("head"):
        return LAYERS + 1
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return LAYERS if name.startswith("norm") else 0


def reference(rows, recipe):
    """The losses and learning rates, and the weights after 20 steps."""
    torch.manual_seed(0)
    model = timm.create_model("dseq_jepa_vit_ti16", img_size=32, num_classes=CLASSES)
    timm.layers.trunc_normal_(model.head.weight, std=2e-5)
    torch.nn.init.zeros_(model.head.bias)
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    losses, rates = [], []
    for step in range(20):
        numbers = range(step * BATCH, (step + 1) * BATCH)
        samples = [(n // IMAGES, int(order(0, n // IMAGES, IMAGES)[n % IMAGES])) for n in numbers]
        images, targets = mixed(*images_of(rows, recipe, samples), recipe, step)
        logits = logits_of(model, images, recipe, [sample_seed(0, *sample) for sample in samples])
        loss = -(targets * (logits - logits.logsumexp(1, keepdim=True))).sum(1).mean()
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        peak = recipe["lr"] * BATCH / 256
        lr = peak * step / WARMUP
        if step >= WARMUP:
            lr = 1e-6 + (peak - 1e-6) * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (EPOCHS - WARMUP)))
        rates.append(lr)
        with torch.no_grad():
            for name, p in model.named_parameters():
                own = lr * recipe["decay"] ** (LAYERS + 1 - layer_of(name))
                spared = p.ndim == 1 or name in ("cls_token", "pos_embed")
                mean, square = moments[name]
                mean.mul_(0.9).add_(0.1 * p.grad)
                square.mul_(0.999).add_(0.001 * p.grad**2)
                p.mul_(1 - own * (0.0 if spared else 0.05))
                p.sub_(own * (mean / (1 - 0.9 ** (step + 1))) / ((square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8))
    return losses, rates, model.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_first_20_steps_equal_a_loop_written_by_hand(name, tmp_path, monkeypatch):
    black = ImageOps.posterize
    monkeypatch.setattr(
        ImageOps, "posterize", lambda image, bits: black(image, bits) if bits else Image.new(image.mode, image.size)
    )
    data = colours(tmp_path / "colours")
    settings = {**SETTINGS, "optim__base_lr": None}
    code, said = tune(tmp_path / "run", data, recipe=name, **settings)
    assert code == 0, said
    rows = datasets.load_dataset("parquet", data_files=str(data / "train.parquet"), split="train")
    losses, rates, weights = reference(rows.cast_column("image", datasets.Image(decode=False)), PUBLISHED[name])
    log = log_of(tmp_path / "run" / "seed-0")
    assert [line["loss"] for line in log] == pytest.approx(losses, rel=1e-5)
    assert [line["lr"] for line in log] == pytest.approx(rates, rel=1e-9)
    ours = tensors_of(tmp_path / "run" / "seed-0")
    for key, tensor in weights.items():
        torch.testing.assert_close(ours[f"model: model.{key}"], tensor, rtol=0, atol=1e-6, msg=key)
