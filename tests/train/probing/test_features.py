"""What probes read of a backbone is what its blocks, its norm and its tokens say; rows and views are cut right."""

import pytest
import timm
import torch
from common.probing.features import FrozenBackbone, RowLayout, is_vit

from timm_dseq.hub.load import data_config, load_backbone

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
SMALL = {"patch_size": 8, "depth": 5, "embed_dim": 48, "num_heads": 2, "img_size": 32, "num_classes": 0}


def small(**args):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **SMALL, **args).eval()


def images(count=3, size=32):
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def normalised(pictures):
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
    return (pictures / 255.0 - mean) / std


def by_hand(model, pictures):
    """Tokens of every block through the final norm."""
    tokens = model._pos_embed(model.patch_embed(normalised(pictures)))
    found = []
    for block in model.blocks:
        tokens = tokens + block.attn(block.norm1(tokens))
        tokens = tokens + block.mlp(block.norm2(tokens))
        found.append(model.norm(tokens))
    return found


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
        {"no_embed_class": True, "global_pool": "avg", "fc_norm": False},
        {"reg_tokens": 2, "no_embed_class": True},
        {"class_token": False, "reg_tokens": 2, "no_embed_class": True, "global_pool": "avg", "fc_norm": False},
    ],
)
@torch.no_grad()
def test_features_are_the_last_blocks_means_and_class_tokens(args):
    model = small(**args)
    found = FrozenBackbone(model, MEAN, STD).features(images())
    expected = by_hand(model, images())[-4:]
    prefix = model.num_prefix_tokens
    torch.testing.assert_close(found["mean"], torch.stack([t[:, prefix:].mean(1) for t in expected], 1))
    assert ("class" in found) == (model.cls_token is not None)
    if "class" in found:
        torch.testing.assert_close(found["class"], torch.stack([t[:, 0] for t in expected], 1))
    tokens = FrozenBackbone(model, MEAN, STD).tokens(images())
    last = expected[-1]
    own = last[:, prefix:] if model.cls_token is None else torch.cat([last[:, :1], last[:, prefix:]], 1)
    torch.testing.assert_close(tokens, own)


@torch.no_grad()
def test_a_model_that_pools_before_its_norm_is_normalised_behind_the_mean():
    model = small(global_pool="avg", fc_norm=True)
    torch.nn.init.normal_(model.fc_norm.weight)
    found = FrozenBackbone(model, MEAN, STD).features(images())["mean"][:, -1]
    torch.testing.assert_close(found, model(normalised(images())))


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224", "mixer_s32_224"])
@torch.no_grad()
def test_a_backbone_that_is_no_vit_gives_its_pooled_pre_logits(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval()
    frozen = FrozenBackbone(model, MEAN, STD)
    assert not is_vit(model)
    found = frozen.features(images(2, 224))
    pooled = model.forward_head(model.forward_features(normalised(images(2, 224))), pre_logits=True)
    assert list(found) == ["pooled"] and torch.equal(found["pooled"][:, 0], pooled)
    tokens = frozen.tokens(images(2, 224))
    assert tokens.ndim == 3 and tokens.shape[2] == model.num_features and tokens.shape[1] > 1


def test_a_frozen_backbone_has_no_gradient_and_no_dropout():
    frozen = FrozenBackbone(small(drop_path_rate=0.5, proj_drop_rate=0.5), MEAN, STD)
    first, second = frozen.features(images()), frozen.features(images())
    assert torch.equal(first["mean"], second["mean"]) and not first["mean"].requires_grad


def test_views_are_the_right_columns_of_a_row():
    layout = RowLayout((("mean", 4, 3), ("class", 4, 3)))
    features = {"mean": torch.arange(24.0).view(2, 4, 3), "class": 100 + torch.arange(24.0).view(2, 4, 3)}
    rows = layout.rows(features)
    assert rows.shape == (2, layout.width) == (2, 24)
    back = layout.features(rows)
    assert all(torch.equal(back[name], features[name]) for name in features)
    assert layout.view(rows, "mean")[0].tolist() == [9, 10, 11]
    assert layout.view(rows, "class")[0].tolist() == [109, 110, 111]
    assert torch.equal(layout.view(rows, "mean4"), features["mean"].flatten(1))
    assert layout.view(rows, "class4+mean")[0].tolist() == [*range(100, 112), 9, 10, 11]
    span = layout.span(["class4+mean"])
    assert torch.equal(layout.view(rows[:, span], "class4+mean", span.start), layout.view(rows, "class4+mean"))
    assert layout.width_of("class4+mean") == 15
    assert layout.available("mean", "class4+mean") == ["mean", "class4+mean"]
    assert RowLayout((("mean", 4, 3),)).available("mean", "class", "class+mean") == ["mean"]
    assert RowLayout((("pooled", 1, 3),)).available("mean", "class") == ["pooled"]


def test_pixels_are_a_backbone_to_compare_with():
    model, name = load_backbone("pixels", 16)
    preprocessing = data_config(model)
    assert name == "raw pixels" and preprocessing["input_size"] == (3, 16, 16)
    found = FrozenBackbone(model, MEAN, STD).features(images(2, 16))["pooled"]
    torch.testing.assert_close(found[:, 0], normalised(images(2, 16)).flatten(1))
