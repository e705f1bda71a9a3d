"""Token merging, to compare with: a plain ViT → one that merges r pairs of like tokens in each block.

Bolya et al., "Token Merging: Your ViT But Faster" (2023), as they use it on trained models: bipartite soft matching on
the keys, attention and mean pooling proportional to how many patches a token stands for. Images (B, C, H, W) → (B, D).
"""

import torch
from timm.models import VisionTransformer
from torch import nn
from torch.nn import functional as F

from timm_dseq.engine.vit import embed
from timm_dseq.errors import UserError


class Merging(nn.Module):
    """The model with its mean over patches as feature, after r merges in each block."""

    def __init__(self, model: VisionTransformer, r: int) -> None:
        super().__init__()
        if model.num_prefix_tokens > 1 or model.global_pool != "avg":
            raise UserError("merging is compared for ViTs that average their patches, with a class token at most")
        self.model, self.r = model, r

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        model, prefix = self.model, self.model.num_prefix_tokens
        tokens = embed(model, images)
        size = tokens.new_ones(*tokens.shape[:2], 1)  # patches that a token stands for
        for block in model.blocks:
            changed, keys = attention(block.attn, block.norm1(tokens), size)
            tokens = tokens + block.drop_path1(block.ls1(changed))
            tokens, size = merged(tokens, size, keys, self.r, prefix)
            tokens = tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))
        weighted = (model.norm(tokens) * size)[:, prefix:].sum(1) / size[:, prefix:].sum(1)
        return model.head(model.fc_norm(weighted))


def attention(attn: nn.Module, tokens: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention that counts a key as often as it stands for patches: (B, L, D), and keys (B, L, d), mean over heads."""
    q, k, v = attn.qkv(tokens).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    seen = F.scaled_dot_product_attention(q, k, v, attn_mask=size.log().mT[:, None])
    return attn.proj(seen.transpose(1, 2).flatten(2)), k.mean(1)


def merged(
    tokens: torch.Tensor, size: torch.Tensor, keys: torch.Tensor, r: int, prefix: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every other token is joined to its likest of the others, the r best such pairs: (B, L − r, D), (B, L − r, 1)."""
    r = min(r, (tokens.shape[1] - prefix) // 2)
    if r <= 0:
        return tokens, size
    keys = F.normalize(keys, dim=-1)
    likeness = keys[:, ::2] @ keys[:, 1::2].mT
    likeness[:, :prefix] = -torch.inf  # the class token, if there is one, stays the first
    best, partner = likeness.max(-1)
    order = best.argsort(-1, descending=True)
    left = order[:, r:].sort(-1).values[..., None]
    joined = order[:, :r, None]
    partner = partner[..., None].gather(1, joined)

    def join(x: torch.Tensor) -> torch.Tensor:
        one, other = x[:, ::2], x[:, 1::2]
        wide = (-1, -1, x.shape[-1])
        other = other.scatter_add(1, partner.expand(wide), one.gather(1, joined.expand(wide)))
        return torch.cat([one.gather(1, left.expand(wide)), other], dim=1)

    total = join(size)
    return join(tokens * size) / total, total
