"""IN ORDER: regions or target blocks → a Plan, which says which patches are predicted from which.

The steps that follow do not know which method made the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..arguments import check_tensor
from ..errors import UserError
from ..host import to_device
from .regions import Regions
from .target_blocks import Blocks


@dataclass(frozen=True)
class Plan:
    """E contexts, each of one image, and P predictions, each from one context; N patches row by row.

    A token of rank r attends to tokens of its own context whose rank is not later, and a prediction of rank k sees the
    patches of its context with a rank below k. Everything of rank 0, predicted at rank 1, is plain attention.
    """

    contexts: torch.Tensor  # (E, N) bool
    context_image: torch.Tensor  # (E,)
    targets: torch.Tensor  # (P, N) bool
    target_context: torch.Tensor  # (P,)
    step: torch.Tensor  # (P,) number of the prediction in its image's sequence, from 1
    context_rank: torch.Tensor | None = None  # (E, N) int64, 0 where there is no context; None: 0 everywhere
    target_rank: torch.Tensor | None = None  # (P,) int64; None: 1 everywhere
    known_sizes: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None  # `sizes`, where the maker knows them

    def visible(self) -> torch.Tensor:
        """The patches that each prediction may see: (P, N) bool."""
        contexts = self.contexts.index_select(0, self.target_context)
        if self.context_rank is None:
            return contexts
        ranks = self.context_rank.index_select(0, self.target_context)
        return contexts & (ranks < self.target_rank[:, None])

    def ranks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The ranks of context patches (E, N), 0 outside, and of predictions (P,)."""
        if self.context_rank is None:
            return torch.zeros_like(self.contexts, dtype=torch.long), torch.ones_like(self.step)
        return self.context_rank, self.target_rank

    def target_image(self) -> torch.Tensor:
        """The image of each prediction: (P,)."""
        return self.context_image.index_select(0, self.target_context)

    @cached_property
    def sizes(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """On the host: patches of each context (E,), visible to each prediction (P,), and of its target (P,)."""
        if self.known_sizes is not None:
            return self.known_sizes
        counts = torch.cat([self.contexts.sum(1), self.visible().sum(1), self.targets.sum(1)]).cpu()
        e, p = len(self.contexts), len(self.targets)
        return counts[:e], counts[e : e + p], counts[e + p :]

    @staticmethod
    def cat(plans: Sequence[Plan]) -> Plan:
        """Several plans as one, in their order; images keep their numbers."""
        starts = [sum(len(plan.contexts) for plan in plans[:i]) for i in range(len(plans))]
        names = ("contexts", "context_image", "targets", "step")
        joined = {name: torch.cat([getattr(plan, name) for plan in plans]) for name in names}
        joined["target_context"] = torch.cat([p.target_context + start for p, start in zip(plans, starts, strict=True)])
        if any(plan.context_rank is not None for plan in plans):
            joined["context_rank"], joined["target_rank"] = (
                torch.cat(ranks) for ranks in zip(*(plan.ranks() for plan in plans), strict=True)
            )
        sizes = None
        if all(plan.known_sizes is not None for plan in plans):
            sizes = tuple(torch.cat(parts) for parts in zip(*(plan.known_sizes for plan in plans), strict=True))
        return Plan(known_sizes=sizes, **joined)


@torch.no_grad()
def plan_regions(
    regions: Regions,
    flat: bool = False,
    causal: bool = False,
    images: torch.Tensor | None = None,
    area: torch.Tensor | None = None,
) -> Plan:
    """Predict R_2 from R_1, R_3 from R_1 ∪ R_2, and so on, for the images given (default: all with two regions).

    flat: every region from R_1 alone. causal: one context R_1 … R_{N-1} in which a token sees its own region and those
    before. images (I,) and area (B, N), `regions.area`, are on the host; with them nothing is copied from the device.
    """
    if flat and causal:
        raise UserError("flat=True and causal=True exclude each other: with flat no context follows R_1. Leave one out")
    if not isinstance(regions, Regions):
        raise UserError(f"regions is a {type(regions).__name__}: give those of rank_regions")
    _check_area(area, regions.area.shape)
    area = regions.area.cpu() if area is None else area
    images = torch.arange(len(area)) if images is None else images
    present = area[images] > 0  # (I, N)
    images, present = images[present.sum(1) > 1], present[present.sum(1) > 1]
    area, n_regions = area[images], area.shape[1]
    number = present.cumsum(1) - 1  # (I, N): of a region in its image's sequence, 0 for R_1
    before = area.cumsum(1) - area  # (I, N): patches in the regions before it
    i, target = (present & (number > 0)).nonzero().unbind(1)
    step, target_sizes, views = number[i, target], area[i, target], before[i, target]
    if flat or causal:
        # the context ends with R_1, or with the last region but one
        last = (number == (0 if flat else number[:, -1:] - 1)).int().argmax(1)
        context, target_context, sizes = torch.arange(len(images)), i, area.cumsum(1).gather(1, last[:, None])[:, 0]
        views = sizes[i] if flat else views
    else:
        # the context ends before the target
        context, target_context, sizes, last = i, torch.arange(len(i)), views, target - 1
    device = regions.masks.device
    image, union_row = to_device(torch.stack([images[context], images[context] * n_regions + last]), device)
    target_row, target_context, step = to_device(
        torch.stack([images[i] * n_regions + target, target_context, step]), device
    )
    masks = regions.masks.flatten(2)  # (B, N, patches)
    contexts = (masks.cumsum(1) > 0).flatten(0, 1).index_select(0, union_row)
    context_rank = target_rank = None
    if causal:
        order = masks.any(2).cumsum(1) - 1  # (B, N): 0 for R_1
        context_rank = (masks * order[:, :, None]).sum(1).index_select(0, image) * contexts
        target_rank = step
    targets = masks.flatten(0, 1).index_select(0, target_row)
    return Plan(contexts, image, targets, target_context, step, context_rank, target_rank, (sizes, views, target_sizes))


@torch.no_grad()
def plan_blocks(blocks: Blocks, images: torch.Tensor | None = None, area: torch.Tensor | None = None) -> Plan:
    """Predict each target block from the one context block, for the images given (default: all that have a target).

    images (I,) and area (B, 1 + targets), `block_area(blocks)`, are on the host; with them nothing is copied from the
    device.
    """
    if not isinstance(blocks, Blocks):
        raise UserError(f"blocks is a {type(blocks).__name__}: give those of block_masks")
    _check_area(area, (len(blocks), 1 + blocks.targets.shape[1]))
    area = block_area(blocks).cpu() if area is None else area
    images = torch.arange(len(area)) if images is None else images
    present = (area[images, 1:] > 0) & (area[images, :1] > 0)  # (I, targets)
    images, present = images[present.any(1)], present[present.any(1)]
    i, target = present.nonzero().unbind(1)
    sizes, target_sizes, step = area[images, 0], area[images[i], 1 + target], present.cumsum(1)[i, target]
    device, n_targets = blocks.context.device, blocks.targets.shape[1]
    image = to_device(images, device)
    target_row, target_context, step = to_device(torch.stack([images[i] * n_targets + target, i, step]), device)
    contexts = blocks.context.flatten(1).index_select(0, image)
    targets = blocks.targets.flatten(2).flatten(0, 1).index_select(0, target_row)
    return Plan(contexts, image, targets, target_context, step, known_sizes=(sizes, sizes[i], target_sizes))


def _check_area(area: torch.Tensor | None, shape: Sequence[int]) -> None:
    if area is not None:
        check_tensor("area", area, shape, "that of this very batch", "int")


def block_area(blocks: Blocks) -> torch.Tensor:
    """Patches of the context block and of each target block: (B, 1 + targets)."""
    return torch.cat([blocks.context.sum((1, 2))[:, None], blocks.targets.sum((2, 3))], dim=1)
