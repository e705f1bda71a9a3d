"""The ways to compute a step that the packed one is held against; both must give its loss on the same batch."""

import torch
from torch import nn
from torch.nn import functional as F

from timm_dseq.engine.jepa import DSeqJEPA
from timm_dseq.engine.plans import Plan
from timm_dseq.engine.target_blocks import Blocks, block_masks
from timm_dseq.engine.vit import embed, final_norm


class Dense:
    """The same method over N − 1 full copies of every image under masks."""

    def __init__(self, model: DSeqJEPA) -> None:
        self.model, self.copies = model, model.region_options["num_regions"] - 1

    def __call__(self, images: torch.Tensor, plan: Plan) -> torch.Tensor:
        model, copies = self.model, self.copies
        vit, predictor = model.student, model.predictor
        latents = model._latents(model._begin(model.target, images))
        b, n, _ = latents.shape
        image = plan.context_image[plan.target_context]
        seen = torch.ones(b * copies, n, dtype=torch.bool, device=images.device)
        target = torch.zeros_like(seen)
        row = image * copies + plan.step - 1
        seen[row], target[row] = plan.visible(), plan.targets

        tokens = embed(vit, images).repeat_interleave(copies, 0)
        keys = F.pad(seen, (1, 0), value=True)[:, None, None].expand(-1, 1, n + 1, -1)
        for block in vit.blocks:
            tokens = block(tokens, attn_mask=keys)
        tokens = predictor.embed(final_norm(vit)(tokens)[:, 1:])
        tokens = torch.where(target[:, :, None], predictor.mask_token, tokens) + predictor.positions
        keys = (seen | target)[:, None, None].expand(-1, 1, n, -1)
        for block in predictor.blocks:
            tokens = block(tokens, attn_mask=keys)
        predictions = predictor.project(predictor.norm(tokens))
        with torch.autocast(images.device.type, enabled=False):
            goal = latents.repeat_interleave(copies, 0)
            error = F.smooth_l1_loss(predictions.to(goal.dtype), goal, reduction="none").mean(2)
            return (error * target).sum() / target.sum()

    def work(self, images: int) -> dict[str, int]:
        """Tokens and pairs that are computed, as the engine's facts count them."""
        rows, n = images * self.copies, self.model.student.patch_embed.num_patches
        return {
            "encoder_tokens": rows * (n + 1),
            "encoder_pairs": rows * (n + 1) ** 2,
            "predictor_tokens": rows * n,
            "predictor_pairs": rows * n**2,
            "target_tokens": rows * n,
            "view_tokens": 0,
            "view_pairs": 0,
        }


class Stacked:
    """I-JEPA as usual: equal blocks gathered and stacked, no masks anywhere."""

    def __init__(self, model: DSeqJEPA) -> None:
        self.model = model

    def __call__(self, images: torch.Tensor, blocks: Blocks) -> torch.Tensor:
        model = self.model
        vit, predictor = model.student, model.predictor
        latents = model._latents(model._begin(model.target, images))
        b, _, dim = latents.shape
        seen = blocks.context.flatten(1).nonzero()[:, 1].view(b, -1)  # (B, K)
        targets = blocks.targets.flatten(2).nonzero()[:, 2].view(b, 4, -1)  # (B, 4, T)
        tokens = embed(vit, images)
        patches = tokens[:, 1:].gather(1, seen[:, :, None].expand(-1, -1, dim))
        tokens = vit.blocks(torch.cat([tokens[:, :1], patches], 1))
        tokens = predictor.embed(final_norm(vit)(tokens)[:, 1:]) + predictor.positions[seen]
        masks = predictor.mask_token + predictor.positions[targets]  # (B, 4, T, width)
        tokens = torch.cat([tokens[:, None].expand(-1, 4, -1, -1), masks], 2).flatten(0, 1)
        for block in predictor.blocks:
            tokens = block(tokens)
        predictions = predictor.project(predictor.norm(tokens[:, seen.shape[1] :]))
        goal = latents[:, None].expand(-1, 4, -1, -1).gather(2, targets[..., None].expand(-1, -1, -1, dim))
        with torch.autocast(images.device.type, enabled=False):
            return F.smooth_l1_loss(predictions.to(goal.dtype), goal.flatten(0, 1))


def equal_blocks(grid: tuple[int, int], batch: int, device: torch.device) -> Blocks:
    """Blocks of one size for every sample, as stacking needs them: contexts are cut to the smallest."""
    blocks = block_masks(grid, torch.arange(batch), target_scale=(0.18, 0.18), target_aspect=(1.0, 1.0))
    context = blocks.context.flatten(1)
    least = int(context.sum(1).min())
    context = context & (context.cumsum(1) <= least)
    return Blocks(context.view_as(blocks.context), blocks.targets, blocks.seeds).to(device)


def saved_bytes(run, model: nn.Module) -> int:
    """Activations kept for the backward pass, every storage once, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = run()
    total = sum(kept.values())
    del loss
    return total
