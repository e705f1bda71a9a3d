"""DSeq-JEPA backbones for timm: the `dseq_jepa_vit_*` entry points and their pretrained configurations.

Paper: DSeq-JEPA: Discriminative Sequential Joint-Embedding Predictive Architecture, https://arxiv.org/abs/2511.17354

Each model is timm's `VisionTransformer` with a class token that carries no position, the mean of the patch tokens as
its feature, and the final norm before the mean. Images (B, C, H, W) go in, features (B, D) or logits come out.
"""

import torch
from timm.layers import trunc_normal_
from timm.models import VisionTransformer
from torch import nn

from .positions import sincos_positions

__all__ = ["DSeqVisionTransformer"]


class DSeqVisionTransformer(VisionTransformer):
    """timm's ViT; only the weights it starts from differ: I-JEPA's, with sin-cos positions of the grid it is built at.

    Positions stay trainable, as everywhere in timm; pretraining freezes them.
    """

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        super().init_weights(mode, needs_reset)
        if (mode or self.weight_init_mode) not in ("", "reset"):  # the caller asked for one of timm's own schemes
            return
        if self.pos_embed is not None:
            positions = sincos_positions(self.patch_embed.grid_size, self.embed_dim, self.pos_embed.device)
            with torch.no_grad():
                self.pos_embed[:, self.pos_embed.shape[1] - len(positions) :] = positions.to(self.pos_embed.dtype)
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.patch_embed.proj.weight, std=0.02)
        if self.patch_embed.proj.bias is not None:
            nn.init.zeros_(self.patch_embed.proj.bias)
        if not self.fix_init:  # else timm has already divided
            self.fix_init_weight()
