"""What dense libraries ask of a backbone, on our names: a pyramid of features and any input size, by timm and
transformers."""

import pytest
import timm
import torch

import timm_dseq

SIZE = (96, 160)
NAME = "dseq_jepa_vit_ti16"


def test_features_only_gives_maps_of_named_blocks_at_another_size():
    assert timm_dseq  # registers the names
    model = timm.create_model(
        NAME, pretrained=True, img_size=SIZE, features_only=True, out_indices=(3, 5, 7, 11)
    ).eval()
    assert model.feature_info.reduction() == [16] * 4 and model.feature_info.channels() == [192] * 4
    images = torch.randn(2, 3, *SIZE)
    maps = model(images)
    plain = timm.create_model(NAME, pretrained=True, img_size=SIZE).eval()
    expected = plain.forward_intermediates(images, indices=[3, 5, 7, 11], norm=False, intermediates_only=True)
    for ours, theirs in zip(maps, expected, strict=True):
        assert ours.shape == (2, 192, 6, 10)
        torch.testing.assert_close(ours, theirs)


def test_transformers_backbone_takes_our_name_and_any_size():
    transformers = pytest.importorskip("transformers")
    model = transformers.TimmBackbone.from_pretrained(NAME, out_indices=[3, 5, 7, 11], dynamic_img_size=True).eval()
    plain = timm.create_model(NAME, pretrained=True, dynamic_img_size=True).eval()
    for size in (SIZE, (128, 128)):
        images = torch.randn(1, 3, *size)
        maps = model(images).feature_maps
        expected = plain.forward_intermediates(images, indices=[3, 5, 7, 11], norm=False, intermediates_only=True)
        for ours, theirs in zip(maps, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert model.channels == [192] * 4
