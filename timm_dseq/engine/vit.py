"""The parts of a timm ViT that the engine calls one by one: images (B, C, H, W) → tokens (B, prefix + h·w, D).

Prefix tokens (class, registers) come first, patches follow row by row. "Block" here is a transformer block.
"""

import inspect
from collections.abc import Iterable

import torch
from timm.layers import trunc_normal_
from timm.models import VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import UserError
from ..positions import sincos_positions
from .attention import Boundaries


def embed(model: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    """Prefix tokens, then patches, with their positions, as the first block takes them: (B, prefix + h·w, D)."""
    return model.norm_pre(model._pos_embed(model.patch_embed(images)))


def embed_patches(model: VisionTransformer, pixels: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """The same for some patches of each image: pixels (n, C, K·p, q), places (n, K) → (n, prefix + K, D).

    The prefix tokens of an encoder that was prepared have no position.
    """
    tokens = model.patch_embed.norm(model.patch_embed.proj(pixels).flatten(2).mT)
    positions = model.pos_embed[0, -model.patch_embed.num_patches :]
    prefix = [token for token in (model.cls_token, model.reg_token) if token is not None]
    prefix = [token.expand(len(tokens), -1, -1) for token in prefix]
    return model.norm_pre(torch.cat([*prefix, tokens + positions[patches]], dim=1))


def grid_of(model: VisionTransformer, images: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of patches that the model cuts such images into: (h, w)."""
    return model.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))


def final_norm(model: VisionTransformer) -> nn.Module:
    """The norm after the last block; a ViT made with `fc_norm=True` has it after the pooling."""
    return model.norm if any(True for _ in model.norm.parameters()) else model.fc_norm


def run_blocks(
    blocks: Iterable[nn.Module], tokens: torch.Tensor, rule: torch.Tensor | None = None, checkpointing: bool = False
) -> torch.Tensor:
    """Rows of tokens (R, L, D) through blocks: (R, L, D).

    rule: which key each query sees, (R, 1, L, L) bool, or `Boundaries`; None: all see all.
    """
    mask = _additive(rule, tokens)  # once, instead of in each block
    for block in blocks:
        if block._compiled_call_impl is not None:
            _mark_dynamic(tokens, mask)
        if checkpointing:
            tokens = checkpoint(block, tokens, mask, use_reentrant=False, preserve_rng_state=False)  # no dropout
        else:
            tokens = block(tokens, attn_mask=mask)
    return tokens


def _additive(rule: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor | None:
    """The rule as numbers to add to the attention scores, 0 or −inf, in the scores' precision."""
    if rule is None or isinstance(rule, Boundaries):
        return rule
    kind = tokens.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tokens.dtype
    return torch.zeros(rule.shape, dtype=dtype, device=rule.device).masked_fill_(~rule, float("-inf"))


def _mark_dynamic(tokens: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Tell compilers which sizes change from batch to batch: they would take those of the first batch as constants."""
    dynamic = {tokens: (0,)}  # unpacked images differ in their number alone
    if isinstance(mask, Boundaries):
        dynamic = {tokens: (1,), mask: (0,), mask.ends: (0,)}
    elif mask is not None:
        dynamic = {tokens: (0, 1), mask: (0, 2, 3)}
    for tensor, dims in dynamic.items():
        for dim in dims:
            torch._dynamo.maybe_mark_dynamic(tensor, dim)


def block_index(model: VisionTransformer, block: int | float) -> int:
    """The index of a transformer block: an integer is the index, a float a share of the depth (11/12 → 10 of 12)."""
    depth = len(model.blocks)
    if isinstance(block, bool) or not isinstance(block, (int, float)) or block != block:
        raise UserError(f"block={block!r}: give its index, a whole number, or a share of the depth, such as 11 / 12")
    if isinstance(block, int):
        if not 0 <= block < depth:
            raise UserError(f"block={block} is block {block}, but the ViT has blocks 0 to {depth - 1}")
        return block
    if not 0 < block <= 1 or not round(block * depth):
        raise UserError(
            f"block={block} is no share of the depth: give one of 1/{depth} to 1, or an index, 0 to {depth - 1}"
        )
    return round(block * depth) - 1


def full_precision(tensor: torch.Tensor) -> torch.Tensor:
    """float64 stays, everything else becomes float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def check_plain(model: nn.Module) -> None:
    """Refuse, by name, a model whose blocks and tokens are not those of a plain ViT."""
    if not isinstance(getattr(model, "_orig_mod", model), VisionTransformer):  # torch.compile wraps the model
        name = type(model).__name__
        raise UserError(f"{name} is no plain ViT: saliency needs timm's VisionTransformer (vit_…, deit_…, dseq_jepa_…)")


def check_packable(model: nn.Module) -> None:
    """Refuse, by name, an encoder that cannot run rows of several token sets."""
    name = type(model).__name__
    if not isinstance(model, VisionTransformer):
        raise UserError(f"{name} cannot be packed: pretraining needs one of timm's plain VisionTransformers")
    if model.pos_embed is None:
        raise UserError(f"this {name} has no position embedding (pos_embed='none'): create it with pos_embed='learn'")
    if not isinstance(model.patch_drop, nn.Identity):
        raise UserError(f"this {name} drops patches by itself: create it with patch_drop_rate=0")
    if any(isinstance(part, nn.Dropout) and part.p for part in model.modules()):
        raise UserError(f"this {name} has dropout, which pretraining does not take: create it with its rates at 0")
    for block in model.blocks:
        kind = type(block).__name__
        if not hasattr(block, "attn") or "attn_mask" not in inspect.signature(block.forward).parameters:
            raise UserError(f"{kind} does not attend by a mask, so this {name} cannot be packed: use block_fn=Block")
        if any(type(part).__name__ == "DropPath" for part in block.modules()):
            raise UserError(
                f"stochastic depth would drop rows of several images: create the {name} with drop_path_rate=0"
            )


def prepare_encoder(encoder: VisionTransformer, keep_weights: bool = False) -> None:
    """Make a ViT I-JEPA's encoder: fixed sin-cos positions, its initialisation, no head.

    Parameters that pretraining does not use are frozen.
    """
    encoder.reset_classifier(0)
    for unused in (encoder.attn_pool, encoder.fc_norm if final_norm(encoder) is encoder.norm else None):
        if unused is not None:
            unused.requires_grad_(False)
    if not keep_weights:
        init_weights(encoder, encoder.blocks)
        for token in (encoder.cls_token, encoder.reg_token):
            if token is not None:
                trunc_normal_(token, std=0.02)
    positions = sincos_positions(encoder.patch_embed.grid_size, encoder.embed_dim)
    with torch.no_grad():
        encoder.pos_embed.zero_()  # prefix tokens get no position
        encoder.pos_embed[:, encoder.pos_embed.shape[1] - len(positions) :] = positions
    encoder.pos_embed.requires_grad_(False)


@torch.no_grad()
def init_weights(model: nn.Module, blocks: nn.ModuleList) -> None:
    """I-JEPA's initialisation: truncated normal .02, zero biases.

    The last layers of the k-th block's attention and MLP are divided by √(2k).
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    for number, block in enumerate(blocks, 1):
        block.attn.proj.weight.div_((2 * number) ** 0.5)
        block.mlp.fc2.weight.div_((2 * number) ** 0.5)
