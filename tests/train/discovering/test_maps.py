"""Maps: one pass gives what `saliency_map` gives for each query; priors by their definitions."""

import numpy as np
import pytest
import torch
from common.discovering.maps import brightness, prior_maps, query_maps

from timm_dseq import saliency_map
from timm_dseq.engine.saliency import QUERIES

from ...tiny import encoder


@pytest.mark.parametrize("block", [0, 1, 11 / 12])
def test_one_pass_for_all_queries_is_a_pass_for_each(block):
    torch.manual_seed(0)
    model, images = encoder((40, 72)).eval(), torch.randn(3, 3, 40, 72)
    maps = query_maps(model, images, [*QUERIES], block)
    for query in QUERIES:
        torch.testing.assert_close(maps[query], saliency_map(model, images, query, block), rtol=0, atol=1e-6)


def test_priors_are_distances_of_colours_and_of_the_middle():
    images = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    maps = prior_maps(images, (3, 4))
    for i, image in enumerate(images.permute(0, 2, 3, 1).double().numpy()):
        patches = image.reshape(3, 8, 4, 8, 3).mean((1, 3))
        border = np.array([patches[y, x] for y in range(3) for x in range(4) if y in (0, 2) or x in (0, 3)]).mean(0)
        for name, colour in (("colour − border", border), ("colour − mean", image.mean((0, 1)))):
            far = np.sqrt(((image - colour) ** 2).sum(2)).reshape(3, 8, 4, 8).mean((1, 3))
            far = (far - far.min()) / (far.max() - far.min())
            np.testing.assert_allclose(maps[name][i].numpy(), far, atol=1e-5)
    assert maps["centre"][0].argmax() in (5, 6) and torch.equal(maps["centre"][0], maps["centre"][1])


def test_brightness_is_the_correlation_with_it():
    draw = torch.Generator().manual_seed(0)
    images, maps = torch.rand(3, 3, 16, 16, generator=draw), torch.rand(3, 4, 4, generator=draw)
    for image, one, found in zip(images, maps, brightness(images, maps), strict=True):
        grey = image.mean(0).view(4, 4, 4, 4).mean((1, 3)).flatten()
        assert float(found) == pytest.approx(abs(np.corrcoef(grey, one.flatten())[0, 1]), abs=1e-5)
