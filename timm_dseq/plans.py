"""IN ORDER: regions or blocks → a Plan, which says which patches are seen together and which are predicted from them.

Nothing after this step knows which method made the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from .blocks import Blocks
from .regions import Regions


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
    step: torch.Tensor  # (P,) place in the image's sequence, from 1
    context_rank: torch.Tensor | None = None  # (E, N) int64, 0 where there is no context; None: 0 everywhere
    target_rank: torch.Tensor | None = None  # (P,) int64; None: 1 everywhere
    known_sizes: tuple[list[int], list[int], list[int]] | None = None  # what `sizes` gives, where the host knows it

    def visible(self) -> torch.Tensor:
        """The patches that each prediction may see: (P, N) bool."""
        contexts = self.contexts.index_select(0, self.target_context)
        if self.context_rank is None:
            return contexts
        ranks = self.context_rank.index_select(0, self.target_context)
        return contexts & (ranks < self.target_rank[:, None])

    @cached_property
    def sizes(self) -> tuple[list[int], list[int], list[int]]:
        """Patches of each context, of each prediction's view, and of each prediction's target, on the host."""
        if self.known_sizes is not None:
            return self.known_sizes
        counts = torch.cat([self.contexts.sum(1), self.visible().sum(1), self.targets.sum(1)]).tolist()
        e, p = len(self.contexts), len(self.targets)
        return counts[:e], counts[e : e + p], counts[e + p :]

    @staticmethod
    def cat(plans: Sequence[Plan]) -> Plan:
        """One plan that holds several, in their order; images keep their numbers."""
        starts = [sum(len(plan.contexts) for plan in plans[:i]) for i in range(len(plans))]
        names = ("contexts", "context_image", "targets", "step")
        joined = {name: torch.cat([getattr(plan, name) for plan in plans]) for name in names}
        joined["target_context"] = torch.cat([p.target_context + start for p, start in zip(plans, starts, strict=True)])
        if any(plan.context_rank is not None for plan in plans):
            plain = [plan.context_rank is None for plan in plans]
            joined["context_rank"] = torch.cat(
                [
                    p.contexts.long() * 0 if is_plain else p.context_rank
                    for p, is_plain in zip(plans, plain, strict=True)
                ]
            )
            joined["target_rank"] = torch.cat(
                [
                    torch.ones_like(p.step) if is_plain else p.target_rank
                    for p, is_plain in zip(plans, plain, strict=True)
                ]
            )
        sizes = None
        if all(plan.known_sizes is not None for plan in plans):
            sizes = tuple([size for plan in plans for size in plan.known_sizes[i]] for i in range(3))
        return Plan(known_sizes=sizes, **joined)


@torch.no_grad()
def plan_regions(
    regions: Regions,
    flat: bool = False,
    causal: bool = False,
    images: Sequence[int] | None = None,
    area: Sequence[Sequence[int]] | None = None,
) -> Plan:
    """Predict R_2 from R_1, R_3 from R_1 ∪ R_2, and so on, for the images given (default: all that have such a step).

    flat: every region from R_1 alone. causal: one context R_1 … R_{N-1} in which a token sees its own region and those
    before. `area` spares a copy to the host where `regions.area` is already there.
    """
    if flat and causal:
        raise ValueError("flat and causal exclude each other: with flat, nothing follows R_1")
    area = regions.area.tolist() if area is None else area  # the one copy from the device
    n_regions = regions.masks.shape[1]
    contexts, predictions = [], []  # (image, last region seen), (context, region, step)
    seen_sizes, view_sizes, target_sizes = [], [], []
    for image in range(len(area)) if images is None else images:
        present = [(place, size) for place, size in enumerate(area[image]) if size]
        seen = 0
        for step, ((place, size), (target, target_size)) in enumerate(pairwise(present), 1):
            if step == 1 or not flat:
                seen += size
            if step == 1 or not (flat or causal):
                contexts.append((image, place))
                seen_sizes.append(0)
            if causal:
                contexts[-1] = (image, place)
            if not flat or step == 1:
                seen_sizes[-1] = seen
            predictions.append((len(contexts) - 1, image * n_regions + target, step))
            view_sizes.append(seen)
            target_sizes.append(target_size)
    device = regions.masks.device
    masks = regions.masks.flatten(2)  # (B, R, N)
    image, place = _columns(contexts, 2, device)
    target_context, target, step = _columns(predictions, 3, device)
    union = masks.cumsum(1) > 0
    row = image * n_regions + place
    contexts = union.flatten(0, 1).index_select(0, row)
    context_rank = target_rank = None
    if causal:
        order = masks.any(2).cumsum(1) - 1  # (B, R): 0 for R_1
        context_rank = (masks * order[:, :, None]).sum(1).index_select(0, image) * contexts
        target_rank = step
    sizes = (seen_sizes, view_sizes, target_sizes)
    targets = masks.flatten(0, 1).index_select(0, target)
    return Plan(contexts, image, targets, target_context, step, context_rank, target_rank, sizes)


@torch.no_grad()
def plan_blocks(
    blocks: Blocks, images: Sequence[int] | None = None, area: Sequence[Sequence[int]] | None = None
) -> Plan:
    """Predict each target block from the one context, for the images given (default: all that have such a step).

    `area` spares a copy to the host where `block_area(blocks)` is already there.
    """
    area = block_area(blocks).tolist() if area is None else area
    n_targets = blocks.targets.shape[1]
    context_rows, predictions = [], []
    seen_sizes, view_sizes, target_sizes = [], [], []
    for image in range(len(area)) if images is None else images:
        seen, *sizes = area[image]
        present = [(place, size) for place, size in enumerate(sizes) if size and seen]
        if present:
            seen_sizes.append(seen)
            context_rows.append((image,))
        for step, (place, size) in enumerate(present, 1):
            predictions.append((len(context_rows) - 1, image * n_targets + place, step))
            view_sizes.append(seen)
            target_sizes.append(size)
    device = blocks.context.device
    (image,) = _columns(context_rows, 1, device)
    target_context, target, step = _columns(predictions, 3, device)
    contexts = blocks.context.flatten(1).index_select(0, image)
    targets = blocks.targets.flatten(2).flatten(0, 1).index_select(0, target)
    sizes = (seen_sizes, view_sizes, target_sizes)
    return Plan(contexts, image, targets, target_context, step, known_sizes=sizes)


def block_area(blocks: Blocks) -> torch.Tensor:
    """Patches of the context and of each target: (B, 1 + targets)."""
    return torch.cat([blocks.context.sum((1, 2))[:, None], blocks.targets.sum((2, 3))], dim=1)


def _columns(rows: list[tuple[int, ...]], width: int, device: torch.device) -> torch.Tensor:
    """A host table as one tensor of columns on the device: (width, rows)."""
    table = torch.tensor(rows, dtype=torch.long).view(-1, width).T.contiguous()
    return table.to(device, non_blocking=True)
