"""The plan of one batch: regions for the images whose coin and map allow it, random blocks for the others.

The numbers that decide are asked for as soon as the regions are found, and read when the rest of the target's pass has
been given to the device: it works on while they travel. They are the one copy from the device in a step.
"""

import torch

from ..errors import UserError
from ..host import Fetch
from .plans import Plan, block_area, plan_blocks, plan_regions
from .regions import Regions
from .target_blocks import Blocks


class Choice:
    """Regions or blocks, for each image of a batch."""

    @torch.no_grad()
    def __init__(
        self,
        regions: Regions | None,
        coins: torch.Tensor | None,
        blocks: Blocks,
        device: torch.device,
        also: torch.Tensor | None = None,
    ) -> None:
        """regions: None for blocks alone. coins (B,) bool: None for regions wherever there are two.

        also: numbers on the device that the caller wants on the host; they travel along.
        """
        self.regions, self.blocks = regions, blocks.to(device)
        self._numbers = {"blocks": block_area(blocks)}
        if regions is not None:
            self._numbers["regions"] = regions.area
            self._numbers["coins"] = torch.ones(len(blocks), dtype=torch.bool) if coins is None else coins
        if also is not None:
            self._numbers["also"] = also
        self._far = [name for name, tensor in self._numbers.items() if tensor.device.type != "cpu"]
        self._fetch = Fetch(*(self._numbers[name] for name in self._far)) if self._far else None

    @torch.no_grad()
    def plan(self, flat: bool = False, causal: bool = False) -> tuple[Plan, dict]:
        """The plan, and what it is made of: regions found, images on regions; `fetched` is what came along."""
        if self._fetch is not None:
            self._numbers |= zip(self._far, self._fetch.read(), strict=True)
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
        facts = {"region_share": on_regions.float().mean().item(), "fetched": self._numbers.get("also")}
        return plan, {**facts, **_found(area)}


def _found(area: torch.Tensor | None) -> dict:
    """How many regions the images have, the remainder not among them, and how large the k-th is on average."""
    if area is None:
        return {"regions_found": 0.0, "region_counts": [], "region_area": []}
    found = (area[:, :-1] > 0).sum(1)
    return {
        "regions_found": found.float().mean().item(),
        "region_counts": torch.bincount(found, minlength=area.shape[1]).tolist(),
        "region_area": (area.float().mean(0) / area.sum(1).max()).tolist(),
    }
