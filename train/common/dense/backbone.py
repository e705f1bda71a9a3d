"""A plain ViT of timm as a dense backbone: images (B, 3, H, W) of any size → maps (B, D, h, w) of some blocks.

An image is padded with zeros to whole patches, and the positions are resampled to its grid.
"""

import inspect
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from timm.layers import Format, PatchEmbed
from timm.models import VisionTransformer
from torch import nn

from timm_dseq import UserError
from timm_dseq.engine.vit import embed, final_norm, grid_of, run_blocks
from timm_dseq.hub.load import load_backbone

from .windows import attend_in_windows


class DenseBackbone(nn.Module):
    """`backbone(images)`: {block's index: its map (B, D, h, w)} for each tap."""

    def __init__(
        self,
        vit: VisionTransformer,
        taps: Sequence[int],
        window: int | None = None,
        everywhere: Sequence[int] | None = None,
        norm: bool = False,
    ) -> None:
        """taps: indices of the blocks whose maps are given. norm: whether maps pass the ViT's final norm.

        window: largest side of a window in patches, None for global attention. everywhere: blocks that attend to the
        whole map nevertheless (default: the taps). What the maps do not depend on is frozen.
        """
        super().__init__()
        self.vit, self.taps, self.window, self.norm = any_size(vit), sorted(set(taps)), window, norm
        self.everywhere = set(self.taps if everywhere is None else everywhere)
        self.patch, self.dim = vit.patch_embed.feat_ratio(), vit.embed_dim  # pixels of a patch's side, D
        self.checkpointing = False
        unused = [vit.head, vit.attn_pool, vit.norm, vit.fc_norm, *vit.blocks[self.taps[-1] + 1 :]]
        for module in unused:
            if module is not None and not (norm and module is final_norm(vit)):
                module.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> dict[int, torch.Tensor]:
        grid = grid_of(self.vit, images)
        tokens, maps = embed(self.vit, images), {}
        for (windowed, tap), run in groupby(range(self.taps[-1] + 1), self._kind):
            run = list(run)
            blocks = self.vit.blocks[run[0] : run[-1] + 1]
            if windowed:
                tokens = attend_in_windows(blocks, tokens, grid, self.window, self.checkpointing)
            else:
                tokens = run_blocks(blocks, tokens, checkpointing=self.checkpointing)
            if run[-1] == tap:
                maps[tap] = self._map(tokens, grid)
        return maps

    def _kind(self, index: int) -> tuple[bool, int]:
        """Blocks one after the other with the same answer run together: whether in windows, and up to which tap."""
        windowed = self.window is not None and index not in self.everywhere
        return windowed, next(tap for tap in self.taps if tap >= index)

    def _map(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(B, prefix + h·w, D) → (B, D, h, w)."""
        patches = (final_norm(self.vit)(tokens) if self.norm else tokens)[:, self.vit.num_prefix_tokens :]
        return patches.mT.unflatten(2, grid)


def backbone_of(model: nn.Module) -> DenseBackbone:
    """The dense backbone that is a part of the model."""
    return next(module for module in model.modules() if isinstance(module, DenseBackbone))


def load_dense(
    name: str, taps: Sequence[float], *, random: bool = False, seed: int = 0, args: dict[str, Any], **options: Any
) -> tuple[DenseBackbone, str]:
    """The backbone, its ViT by any of the names that `load_backbone` knows, and its name for tables.

    taps: shares of the depth. args: of timm.create_model. options: further arguments of DenseBackbone.
    """
    model, shown = load_backbone(name, random=random, seed=seed, **args)
    check(model, shown)
    return DenseBackbone(model, [at_depth(share, len(model.blocks)) for share in taps], **options), shown


def at_depth(share: float, depth: int) -> int:
    """The index of the block behind which this share of the depth is done."""
    return max(0, round(share * depth) - 1)


def check(model: nn.Module, shown: str) -> None:
    """Refuse, in one line, what is no plain ViT."""
    if not isinstance(model, VisionTransformer) or type(model.patch_embed) is not PatchEmbed:
        raise UserError(
            f"model={shown} is no plain ViT: dense tasks need timm's VisionTransformer (vit_…, deit_…, dseq_jepa_…)."
        )
    if not isinstance(model.patch_drop, nn.Identity):
        raise UserError(f"model={shown} drops patches by itself: leave args.patch_drop_rate out.")
    for block in model.blocks:
        if "attn_mask" not in inspect.signature(block.forward).parameters:
            raise UserError(f"model={shown}: its {type(block).__name__} takes no mask, so it cannot attend in windows.")


def any_size(vit: VisionTransformer) -> VisionTransformer:
    """The ViT as timm makes it with dynamic_img_size and dynamic_img_pad."""
    vit.dynamic_img_size = True
    patches = vit.patch_embed
    patches.strict_img_size, patches.dynamic_img_pad = False, True
    patches.flatten, patches.output_fmt = False, Format.NHWC
    return vit
