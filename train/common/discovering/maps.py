"""WHERE: images → maps (B, h, w) in [0, 1] on the grid of patches: a model's queries, and priors that know no model."""

from collections.abc import Sequence

import torch
from timm.models import VisionTransformer
from torch.nn import functional as F

from timm_dseq import UserError
from timm_dseq.engine.saliency import min_max, query_of, saliency_from_tokens
from timm_dseq.engine.vit import block_index, embed, grid_of

SIGMA = 0.3  # of the centre prior, as a share of the image's sides
PRIORS = ("centre", "colour − border", "colour − mean")
CONSTANT = "constant"  # a prior, too: the whole image is object
RECTANGLES = "rectangles"  # that cut the image into equal regions, which follow no map
Maps = dict[str, torch.Tensor]  # name → (B, h, w)


@torch.no_grad()
def query_maps(model: VisionTransformer, images: torch.Tensor, queries: Sequence[str], block: int | float) -> Maps:
    """What `saliency_map` gives for each query, of normalised images (B, 3, H, W), by one pass for all of them."""
    index, grid = block_index(model, block), grid_of(model, images)
    received = embed(model, images)
    for layer in model.blocks[:index]:
        received = layer(received)
    returned = model.blocks[index](received)
    maps = {}
    for query in queries:
        tokens = received if query_of(query).reads_input else returned
        maps[query] = saliency_from_tokens(model, tokens, query, block, grid).float()
        if not maps[query].isfinite().all():
            raise UserError(f"the saliency {query} is not finite: check the weights.")
    return maps


def prior_maps(images: torch.Tensor, grid: tuple[int, int]) -> Maps:
    """Of images (B, 3, H, W) in [0, 1]:

    centre: a Gaussian in the middle; colour: how far the colours of a patch are from the mean of the image's border, or
    from the mean of the image, the mean over its pixels.
    """
    centre = centre_prior(grid).to(images.device).expand(len(images), -1, -1)
    colours = border_colour(images, grid), images.mean((2, 3), keepdim=True)
    return dict(zip(PRIORS, (centre, *(_contrast(images, colour, grid) for colour in colours)), strict=True))


def centre_prior(grid: tuple[int, int]) -> torch.Tensor:
    """A Gaussian in the middle: (h, w)."""
    y, x = ((torch.arange(size) + 0.5) / size - 0.5 for size in grid)
    return torch.exp(-(y[:, None] ** 2 + x**2) / (2 * SIGMA**2))


def border_colour(images: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The mean colour of the outermost patches: (B, 3, H, W) → (B, 3, 1, 1)."""
    patches = F.adaptive_avg_pool2d(images, grid)
    border = torch.ones(grid, dtype=torch.bool, device=images.device)
    border[1:-1, 1:-1] = False
    return patches[:, :, border].mean(2)[:, :, None, None]


def _contrast(images: torch.Tensor, colour: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    far = F.adaptive_avg_pool2d((images - colour).norm(dim=1, keepdim=True), grid)
    return min_max(far.flatten(1)).view(-1, *grid)


def brightness(images: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """The absolute correlation of each map (B, h, w) with the brightness of its image (B, 3, H, W): (B,), 0 to 1."""
    grey = F.adaptive_avg_pool2d(images.mean(1, keepdim=True), maps.shape[1:]).flatten(1)
    both = [F.normalize(x - x.mean(1, keepdim=True), dim=1) for x in (grey, maps.flatten(1))]
    return (both[0] * both[1]).sum(1).abs()
