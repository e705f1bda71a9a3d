"""Nobody breaks learning: two minutes of the recommended recipe on photos make a better encoder than a random one."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from common.pretraining.monitor.probes import knn
from PIL import Image

import timm_dseq  # noqa: F401  # registers the encoder

from ..runs import launch, log_of, said_of

DATA = Path(__file__).parents[4] / "shared" / "data"
SPEEDRUN = Path(__file__).parents[3] / "train" / "configs" / "speedrun.yaml"
MEAN, STD = (torch.tensor(x)[:, None, None] for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


def images_and_labels(split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Evenly spaced images of imagenette, (n, 3, 128, 128), and their classes."""
    table = pq.read_table(DATA / "imagenette128" / f"{split}.parquet")
    rows = table.take(np.linspace(0, len(table) - 1, count).astype(int)).to_pylist()
    images = [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")) for row in rows]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return (pixels / 255 - MEAN) / STD, torch.tensor([row["label"] for row in rows])


@torch.no_grad()
def accuracy(model: torch.nn.Module) -> float:
    """kNN on standardised features of 2,000 and 1,000 images."""
    (train_images, labels), (test_images, truth) = images_and_labels("train", 2000), images_and_labels("test", 1000)
    model.eval()
    learnt, tested = (torch.cat([model(part) for part in x.split(100)]) for x in (train_images, test_images))
    mean, std = learnt.mean(0), learnt.std(0)
    return knn((learnt - mean) / std, labels, (tested - mean) / std, truth)


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "photos").is_dir(), reason="needs the photos beside the project")
def test_two_minutes_of_the_recipe_raise_knn_by_five_points(tmp_path):
    torch.manual_seed(0)
    before = accuracy(timm.create_model("dseq_jepa_vit_ti16", img_size=128))
    output, photos = tmp_path / "run", DATA / "photos" / "train-00000.parquet"
    settings = {"output_dir": output, "data.path": photos, "max_steps": 120, "watch.probe_every": 0}
    words = [f"--config={SPEEDRUN}", *(f"--{name}={value}" for name, value in settings.items())]
    run = launch("pretrain", words, output)
    run.join(580)
    assert run.exitcode == 0, said_of(output).read_text()
    assert log_of(output)[-1]["loss"] < 3.6  # of 4.16, the logarithm of 64
    after = accuracy(timm.create_model(f"local-dir:{output / 'export'}", pretrained=True))
    assert after > before + 0.05, (before, after)
