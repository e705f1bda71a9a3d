"""What the published protocols learn from: every epoch a crop and a flip of its own, through the frozen backbone."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from common.data.order import order, sample_seed
from common.labels.labelled import open_labelled
from common.labels.settings import Labels
from common.probing.feature_batches import LiveFeatures, RandomCrops
from common.probing.features import FrozenBackbone
from common.probing.heads import RECIPES, TOKENS, Grid, HeadTraining
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from timm_dseq import UserError
from timm_dseq.hub.load import data_config

from ..tunings import colours
from .test_features import by_hand, small

STEPS, BATCH, SEED = 20, 12, 3


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    return open_labelled(Labels(path=str(colours(tmp_path_factory.mktemp("data") / "colours")))).train


def probe_of(model, at_once=5, workers=0, processes=1):
    preprocessing = data_config(model)
    backbone = FrozenBackbone(model, preprocessing["mean"], preprocessing["std"])
    accelerator = Accelerator() if processes == 1 else SimpleNamespace(num_processes=processes, process_index=0)
    config = SimpleNamespace(heads=SimpleNamespace(at_once=at_once), workers=workers)
    return SimpleNamespace(
        backbone=backbone,
        layout=backbone.layout((3, 32, 32)),
        preprocessing=preprocessing,
        accelerator=accelerator,
        config=config,
    )


def live(probe, train, views):
    """Features of all of the training images."""
    training = HeadTraining(RECIPES["dseq"], views, SEED, np.arange(len(train)), None, BATCH, STEPS)
    return LiveFeatures(training, train, probe)


def picture_by_hand(train, epoch, index):
    """The sample's crop by PIL alone."""
    picture = train.picture(index)
    torch.manual_seed(sample_seed(SEED, epoch, index))
    top, left, height, width = RandomResizedCrop.get_params(picture, (0.08, 1.0), (3 / 4, 4 / 3))
    flip = torch.rand(1).item() < 0.5
    crop = picture.crop((left, top, left + width, top + height)).resize((32, 32), Image.Resampling.BICUBIC)
    crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop
    return torch.from_numpy(np.array(crop)).permute(2, 0, 1)


@torch.no_grad()
def batch_by_hand(train, model, step):
    """Tokens of the last four blocks, and labels, of one step of the run."""
    samples = [divmod(p, len(train)) for p in range(step * BATCH, (step + 1) * BATCH)]
    samples = [(epoch, int(order(SEED, epoch, len(train))[place])) for epoch, place in samples]
    pictures = torch.stack([picture_by_hand(train, *sample) for sample in samples])
    # the tests' normalisation is undone, for timm's of this model
    wanted = (pictures / 255.0 - 0.5) / 0.5
    mean, std = torch.tensor((0.4, 0.5, 0.6)).view(3, 1, 1), torch.tensor((0.2, 0.25, 0.3)).view(3, 1, 1)
    tokens = by_hand(model, (wanted * std + mean) * 255.0)[-4:]
    return tokens, torch.tensor([index % 3 for _, index in samples])


def test_twenty_live_steps_of_dseq_are_those_by_hand(train):
    model = small()
    feed = live(probe_of(model), train, ["mean", "mean4"])
    assert feed.micro_batch == 4  # the largest part of 12 that is not above 5
    specs = RECIPES["dseq"].heads(["mean", "mean4"])
    ours, theirs = (Grid(RECIPES["dseq"], specs, [48, 192], 3, SEED) for _ in range(2))
    batches = feed.batches(0)
    for step in range(STEPS):
        views, labels = next(batches)
        tokens, truth = batch_by_hand(train, model, step)
        means = torch.stack([t[:, 1:].mean(1) for t in tokens], 1)
        assert torch.equal(labels, truth)
        torch.testing.assert_close(views["mean"], means[:, -1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(views["mean4"], means.flatten(1), rtol=1e-5, atol=1e-5)
        ours.step(views, labels, step / 40)
        theirs.step({"mean": means[:, -1], "mean4": means.flatten(1)}, truth, step / 40)
    for one, other in zip(ours.heads.parameters(), theirs.heads.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_views_with_class_tokens_and_all_tokens(train):
    model = small()
    tokens, _ = batch_by_hand(train, model, 0)
    views, _ = next(live(probe_of(model), train, ["class4+mean"]).batches(0))
    expected = torch.cat([*(t[:, 0] for t in tokens), tokens[-1][:, 1:].mean(1)], 1)
    torch.testing.assert_close(views["class4+mean"], expected, rtol=1e-5, atol=1e-5)
    views, _ = next(live(probe_of(model), train, [TOKENS]).batches(0))
    torch.testing.assert_close(views[TOKENS], tokens[-1], rtol=1e-5, atol=1e-5)


def test_a_run_that_goes_on_sees_the_batches_it_would_have_seen(train):
    feed = live(probe_of(small()), train, ["mean"])
    batches = feed.batches(0)
    seen = [next(batches) for _ in range(9)]
    views, labels = next(feed.batches(8))
    assert torch.equal(views["mean"], seen[8][0]["mean"]) and torch.equal(labels, seen[8][1])
    other = next(live(probe_of(small(), workers=1, at_once=4), train, ["mean"]).batches(8))
    assert torch.equal(views["mean"], other[0]["mean"])


def test_crops_differ_between_epochs_and_half_are_flipped(train):
    crops = RandomCrops(train, (32, 32), "bicubic", SEED)
    assert not torch.equal(crops[0, 3][0], crops[1, 3][0])
    assert torch.equal(crops[1, 3][0], crops[1, 3][0])
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (64, 1))).convert("RGB")
    steep = SimpleNamespace(picture=lambda _: ramp, truth=train.truth)
    crops = RandomCrops(steep, (16, 16), "bicubic", SEED)
    flipped = sum(int(crops[epoch, 0][0][0, 8, 0] > crops[epoch, 0][0][0, 8, 15]) for epoch in range(400))
    assert 160 < flipped < 240


def test_a_batch_that_processes_cannot_share_is_refused(train):
    with pytest.raises(UserError, match=r"heads.batch_size=12 is no multiple of 5 processes"):
        live(probe_of(small(), processes=5), train, ["mean"])


def test_an_image_that_cannot_be_read_ends_a_live_run_with_its_name(train):
    rows = [dict(train.rows[i]) for i in range(BATCH)]
    rows[7]["image"] = {"bytes": rows[7]["image"]["bytes"][:50], "path": "photos/seven.png"}
    broken = replace(train, rows=rows, truth=train.truth[:BATCH])
    with pytest.raises(UserError, match=r"photos/seven.png \(row 7\).*mend or remove this image"):
        next(live(probe_of(small()), broken, ["mean"]).batches(0))


def test_features_that_are_not_finite_end_a_live_run(train):
    model = small()
    with torch.no_grad():
        model.norm.bias[0] = float("nan")
    with pytest.raises(UserError, match="the features are not finite"):
        next(live(probe_of(model), train, ["mean"]).batches(0))
