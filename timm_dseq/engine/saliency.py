"""WHERE: the tokens of a ViT after one transformer block (B, prefix + h·w, D) → saliency maps (B, h, w) in [0, 1].

Saliency is the similarity of a query to every patch, min-max normalised per image.
"""

import torch
from timm.layers import Attention
from timm.models import VisionTransformer

from ..errors import UserError
from .vit import block_index, check_plain, embed, final_norm, full_precision, grid_of

QUERIES = ("cls_param", "cls_out", "attention", "norm", "ncut")
TRAINING_QUERIES = ("cls_param", "cls_out", "norm")
_NEED_CLASS_TOKEN = ("cls_param", "cls_out", "attention")


def check_query(model: VisionTransformer, query: str) -> None:
    """One line for a model that is no plain ViT, or a query that does not exist or that this model cannot answer."""
    check_plain(model)
    if query not in QUERIES:
        raise UserError(f"query={query!r} is unknown: choose one of {', '.join(QUERIES)}")
    if query in _NEED_CLASS_TOKEN and model.cls_token is None:
        raise UserError(f"query={query!r} needs a class token, which this ViT lacks: use query='norm' or query='ncut'")


@torch.no_grad()
def saliency_map(
    model: VisionTransformer, images: torch.Tensor, query: str = "cls_param", block: int | float = 11 / 12
) -> torch.Tensor:
    """Saliency of images (B, C, H, W), by one pass up to the transformer block `block`: (B, h, w)."""
    check_query(model, query)
    index = block_index(model, block)
    tokens = embed(model, images)
    for layer in model.blocks[: index if query == "attention" else index + 1]:
        tokens = layer(tokens)
    return saliency_from_tokens(model, tokens, query, block, grid_of(model, images))


@torch.no_grad()
def saliency_from_tokens(
    model: VisionTransformer,
    tokens: torch.Tensor,
    query: str = "cls_param",
    block: int | float = 11 / 12,
    grid: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Saliency from the tokens that a transformer block returned (for `attention`: that it receives): (B, h, w).

    tokens (B, prefix + h·w, D): without the final norm. grid (h, w): by default that of the model's own image size.
    """
    check_query(model, query)
    with torch.autocast(tokens.device.type, enabled=False):
        if query == "norm":
            saliency = full_precision(tokens)[:, model.num_prefix_tokens :].norm(dim=-1)
        elif query == "attention":
            saliency = _class_attention(model, tokens, block_index(model, block))
        elif query == "ncut":
            saliency = _second_eigenvector(_normed(model, tokens)[:, model.num_prefix_tokens :])
        else:
            saliency = _similarity(model, tokens, query)
    h, w = grid or model.patch_embed.grid_size
    return min_max(saliency).view(-1, h, w)


def min_max(saliency: torch.Tensor) -> torch.Tensor:
    """Each map (B, n) stretched to [0, 1]: (B, n). A constant map becomes 0 everywhere."""
    low, high = saliency.aminmax(dim=1, keepdim=True)
    return (saliency - low) / torch.where(high == low, torch.ones_like(low), high - low)


def _normed(model: VisionTransformer, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens (B, L, D) after the model's final norm, in full precision."""
    norm = final_norm(model)
    dtype = next((p.dtype for p in norm.parameters()), full_precision(tokens).dtype)
    return full_precision(norm(tokens.to(dtype)))


def _similarity(model: VisionTransformer, tokens: torch.Tensor, query: str) -> torch.Tensor:
    """Class token · patches / √D, on the normed tokens: (B, n)."""
    normed = _normed(model, tokens)
    patches = normed[:, model.num_prefix_tokens :]
    token = normed[:, 0] if query == "cls_out" else model.cls_token[:, 0].to(normed.dtype).expand(len(normed), -1)
    return torch.einsum("bnd,bd->bn", patches, token) / tokens.shape[-1] ** 0.5


def _class_attention(model: VisionTransformer, tokens: torch.Tensor, index: int) -> torch.Tensor:
    """How much the class token attends to each patch in one transformer block, mean over heads: (B, n)."""
    block = model.blocks[index]
    attn = getattr(block, "attn", None)
    if not isinstance(attn, Attention):
        raise UserError(f"query='attention' cannot read {type(attn).__name__}: use query='cls_param'")
    normed = block.norm1(tokens.to(attn.qkv.weight.dtype))
    q, k, _ = attn.qkv(normed).unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(2)  # each (B, 1 + …, heads, d)
    q, k = full_precision(attn.q_norm(q)), full_precision(attn.k_norm(k))
    weights = torch.einsum("bhd,bnhd->bhn", q[:, 0], k).mul(attn.scale).softmax(-1)
    return weights.mean(1)[:, model.num_prefix_tokens :]


def _second_eigenvector(patches: torch.Tensor, threshold: float = 0.2, weak: float = 1e-5) -> torch.Tensor:
    """TokenCut: the second-smallest solution of (D − A) x = λ D x, its strongest patch positive: (B, n, D) → (B, n).

    Edges A are 1 where the cosine of two patches exceeds the threshold, and `weak` elsewhere. For analysis only: it is
    solved on the CPU in float64.
    """
    unit = torch.nn.functional.normalize(patches.cpu().double(), dim=-1)
    edges = torch.where(unit @ unit.mT > threshold, 1.0, weak).double()
    scale = edges.sum(-1).rsqrt()  # (B, n): D^-½
    laplacian = torch.eye(edges.shape[-1]).double() - scale[:, :, None] * edges * scale[:, None, :]
    second = torch.linalg.eigh(laplacian).eigenvectors[:, :, 1] * scale
    strongest = second.gather(1, second.abs().argmax(1, keepdim=True))
    return (second * strongest.sign()).to(patches)
