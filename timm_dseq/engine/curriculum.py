"""The plan of one batch: regions for the images whose coin and map allow it, random target blocks for the others.

The host needs a few numbers for it: the areas of regions and blocks, and the coins. Their copy starts when the regions
are ranked and is read when the rest of the target's pass is queued, so the device has work meanwhile. It is the only
copy from the device in a step.
"""

import torch

from ..errors import UserError
from ..host import Fetch
from .plans import Plan, block_area, plan_blocks, plan_regions
from .regions import Regions
from .target_blocks import Blocks


class Choice:
    """Whether each image of a batch is trained on its regions or on target blocks."""

    @torch.no_grad()
    def __init__(
        self,
        regions: Regions | None,
        coins: torch.Tensor | None,
        blocks: Blocks,
        device: torch.device,
        fetch: torch.Tensor | None = None,
    ) -> None:
        """regions: None for target blocks alone. coins (B,) bool: None for regions wherever there are at least two.

        fetch: more numbers on the device that the caller wants on the host; the same copy brings them.
        """
        self.regions, self.blocks = regions, blocks.to(device)
        self._numbers = {"blocks": block_area(blocks)}
        if regions is not None:
            self._numbers["regions"] = regions.area
            self._numbers["coins"] = torch.ones(len(blocks), dtype=torch.bool) if coins is None else coins
        if fetch is not None:
            self._numbers["fetched"] = fetch
        self._on_device = [name for name, tensor in self._numbers.items() if tensor.device.type != "cpu"]
        self._copy = Fetch(*(self._numbers[name] for name in self._on_device)) if self._on_device else None

    @torch.no_grad()
    def plan(self, flat: bool = False, causal: bool = False) -> tuple[Plan, dict]:
        """The plan, and facts about it: regions found, share of images on regions; `fetched`, now on the host."""
        if self._copy is not None:
            self._numbers |= zip(self._on_device, self._copy.read(), strict=True)
        area = self._numbers.get("regions")
        count = len(self._numbers["blocks"])
        on_regions = torch.zeros(count, dtype=torch.bool)
        if area is not None:
            on_regions = self._numbers["coins"] & ((area > 0).sum(1) > 1)
        parts = []
        if on_regions.any():
            parts.append(plan_regions(self.regions, flat, causal, on_regions.nonzero()[:, 0], area))
        if not on_regions.all():
            parts.append(plan_blocks(self.blocks, (~on_regions).nonzero()[:, 0], self._numbers["blocks"]))
        plan = Plan.cat(parts)
        if not len(plan.targets):
            h, w = self.blocks.context.shape[1:]
            raise UserError(f"nothing to predict: a grid of {h}×{w} patches is too small for blocks; use larger images")
        facts = {"region_share": on_regions.float().mean().item(), "fetched": self._numbers.get("fetched")}
        return plan, {**facts, **region_facts(area)}


def region_facts(area: torch.Tensor | None) -> dict:
    """Regions without the remainder: mean per image, images with 0, 1, …; mean share of the image of each region.

    area (B, N): patches of each region, on the host.
    """
    if area is None:
        return {"regions_found": 0.0, "region_counts": [], "region_area": []}
    count = (area[:, :-1] > 0).sum(1)
    return {
        "regions_found": count.float().mean().item(),
        "region_counts": torch.bincount(count, minlength=area.shape[1]).tolist(),
        "region_area": (area.float().mean(0) / area.sum(1).max()).tolist(),
    }
