"""The loop of the study: views are what their names say, and losses tell varied projections from collapsed ones."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import leads


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_views_are_named_in_words():
    assert leads.parse_views("1x128@.3-1+4x64@.05-.35k8") == [(1, 128, 0.3, 1.0, 0), (4, 64, 0.05, 0.35, 8)]
    with pytest.raises(SystemExit, match="no NxPX@LO-HI"):
        leads.parse_views("two crops")


def test_windows_are_whole_and_none_is_taken_twice():
    kept = leads.windows(50, 8, 16, generator())
    for cells in kept.tolist():
        assert len(set(cells)) == 16
        corners = {(cell // 16, cell % 8 // 2) for cell in cells}  # windows of 2×2 in a grid of 8
        assert len(corners) == 4
    assert len({tuple(cells) for cells in kept.tolist()}) == 50


def test_patches_that_are_drawn_alone_are_those_of_the_crop():
    pixels = torch.randint(0, 256, (3, 3, 128, 128), dtype=torch.uint8, generator=generator())
    group = (2, 128, 0.3, 1.0, 16)
    kept = leads.windows(6, 8, 16, generator(1))
    full = leads.crops(pixels, group, None, generator(2))
    alone = leads.crops(pixels, group, kept, generator(2))
    assert full.shape == (6, 3, 128, 128) and alone.shape == (6, 3, 256, 16)
    patches = full.unflatten(3, (8, 16)).unflatten(2, (8, 16)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # (6, 64, 3, …)
    wanted = patches.gather(1, kept[:, :, None, None, None].expand(-1, -1, 3, 16, 16))
    assert torch.allclose(alone.unflatten(2, (16, 16)).transpose(1, 2), wanted, atol=1e-6)


def test_an_encoder_of_all_patches_is_timms():
    torch.manual_seed(0)
    encoder = leads.Encoder().eval()
    images = torch.randn(2, 3, 128, 128, generator=generator())
    with torch.no_grad():
        assert torch.allclose(encoder(images), encoder.vit.forward_features(images), atol=1e-5)


@pytest.mark.parametrize("kind", ["nce", "sigreg", "visreg"])
def test_what_agrees_and_varies_costs_least(kind):
    z = torch.randn(256, 16, generator=generator())
    good = leads.loss_of(torch.stack([z, z]), 2, kind, 0.5, 0.2, generator())
    collapsed = leads.loss_of(torch.ones(2, 256, 16), 2, kind, 0.5, 0.2, generator())
    shuffled = leads.loss_of(torch.stack([z, z.roll(1, 0)]), 2, kind, 0.5, 0.2, generator())
    assert good < 0.5 * collapsed and good < 0.9 * shuffled


@pytest.mark.parametrize("term", [leads.sigreg, leads.visreg])
def test_a_normal_distribution_is_nearly_free(term):
    directions = torch.nn.functional.normalize(torch.randn(8, 64, generator=generator()), dim=0)
    z = torch.randn(2048, 8, generator=generator(1))
    costs = [term(x, directions).item() for x in (z, 2 * z, z + 1, z.exp())]
    assert min(costs[1:]) > 5 * costs[0]
