"""WHERE: the tokens of a ViT after one transformer block (B, prefix + h·w, D) → saliency maps (B, h, w) in [0, 1].

Saliency is the similarity of a query to every patch, min-max normalised per image. `QUERIES`, at the end of this file,
lists all queries; a new one is a function here and a line there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import Attention
from timm.models import VisionTransformer

from ..arguments import check_grid, check_images, check_tensor
from ..errors import UserError
from .vit import block_index, check_plain, embed, final_norm, full_precision, grid_of

LIKE = 5  # patches of the border that a patch is compared with


@dataclass(frozen=True)
class Query:
    """A way to score patches: score(model, tokens (B, prefix + h·w, D), index of the block, (h, w)) → (B, h·w), salient
    ones high.

    The tokens are those that the transformer block returns, or receives, without the final norm.
    """

    score: Callable[[VisionTransformer, torch.Tensor, int, tuple[int, int]], torch.Tensor]
    needs_class_token: bool = False
    for_training: bool = True  # False: for analysis only, since it is slow or makes the host wait for the device
    reads_input: bool = False  # whether it reads the tokens that the block receives


AnyQuery = str | Query | Callable[[VisionTransformer, torch.Tensor], torch.Tensor]


def query_of(query: AnyQuery) -> Query:
    """The query of this name; or your own: a Query, or a function (model, tokens (B, prefix + n, D)) → (B, n)."""
    if isinstance(query, Query):
        return query
    if callable(query):
        return Query(partial(_asked, query))  # which can be pickled if the function can
    if not isinstance(query, str) or query not in QUERIES:
        raise UserError(f"query={query!r} is unknown: choose one of {', '.join(QUERIES)}, or give a function")
    return QUERIES[query]


def _asked(query: Callable, model: VisionTransformer, tokens: torch.Tensor, *_: Any) -> torch.Tensor:
    """What your own function says of tokens (B, prefix + n, D): (B, n)."""
    return query(model, tokens)


def check_query(model: VisionTransformer, query: AnyQuery, training: bool = False) -> None:
    """One line for a model that is no plain ViT, or a query that does not exist or that this model cannot answer.

    training: whether queries for analysis are refused, too.
    """
    check_plain(model)
    asked = query_of(query)
    if asked.needs_class_token and model.cls_token is None:
        others = " or ".join(f"query={name!r}" for name, other in QUERIES.items() if not other.needs_class_token)
        raise UserError(f"query={query!r} needs a class token, which this ViT lacks: use {others}")
    if training and not asked.for_training:
        others = ", ".join(name for name, other in QUERIES.items() if other.for_training)
        raise UserError(f"query={query!r} is for analysis: pretrain with one of {others}")


@torch.no_grad()
def saliency_map(
    model: VisionTransformer, images: torch.Tensor, query: AnyQuery = "cls_param", block: int | float = 11 / 12
) -> torch.Tensor:
    """Saliency of images (B, C, H, W), by one pass up to the transformer block `block`: (B, h, w).

    query: a name, or your own way to score patches (`query_of`).
    """
    check_query(model, query)
    index = block_index(model, block)
    check_images(model, images)
    tokens = embed(model, images)
    for layer in model.blocks[: index if query_of(query).reads_input else index + 1]:
        tokens = layer(tokens)
    return saliency_from_tokens(model, tokens, query, block, grid_of(model, images))


@torch.no_grad()
def saliency_from_tokens(
    model: VisionTransformer,
    tokens: torch.Tensor,
    query: AnyQuery = "cls_param",
    block: int | float = 11 / 12,
    grid: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Saliency from the tokens that a transformer block returned (`attention`: those that it receives): (B, h, w).

    tokens (B, prefix + h·w, D): without the final norm. grid (h, w): by default that of the model's own image size.
    """
    check_query(model, query)
    grid = grid or model.patch_embed.grid_size
    check_grid(grid)
    h, w = grid
    shape = (None, model.num_prefix_tokens + h * w, model.embed_dim)
    check_tensor("tokens", tokens, shape, f"(B, prefix + h·w, D) of a grid of {h}×{w}")
    with torch.autocast(tokens.device.type, enabled=False):
        scores = query_of(query).score(model, tokens, block_index(model, block), (h, w))
        check_tensor("the query's scores", scores, (len(tokens), h * w), "(B, h·w), salient ones high")
    return min_max(scores).view(-1, h, w)


def min_max(saliency: torch.Tensor) -> torch.Tensor:
    """Each map (B, n) stretched to [0, 1]: (B, n). A constant map becomes 0 everywhere."""
    low, high = saliency.aminmax(dim=1, keepdim=True)
    return (saliency - low) / torch.where(high == low, torch.ones_like(low), high - low)


def _patches(model: VisionTransformer, tokens: torch.Tensor) -> torch.Tensor:
    """The patch tokens of all tokens (B, prefix + n, D): (B, n, D)."""
    return tokens[:, model.num_prefix_tokens :]


def _normed(model: VisionTransformer, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens (B, L, D) after the model's final norm, in full precision."""
    norm = final_norm(model)
    dtype = next((p.dtype for p in norm.parameters()), full_precision(tokens).dtype)
    return full_precision(norm(tokens.to(dtype)))


def _class_similarity(model: VisionTransformer, normed: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """query (B, D) · patches / √D, of normed tokens (B, prefix + n, D): (B, n)."""
    return torch.einsum("bnd,bd->bn", _patches(model, normed), query) / normed.shape[-1] ** 0.5


def _class_parameter(model: VisionTransformer, tokens: torch.Tensor, *_: Any) -> torch.Tensor:
    """The paper's query: the class token as it enters the model, a parameter."""
    normed = _normed(model, tokens)
    return _class_similarity(model, normed, model.cls_token[:, 0].to(normed.dtype).expand(normed.shape[0], -1))


def _class_output(model: VisionTransformer, tokens: torch.Tensor, *_: Any) -> torch.Tensor:
    """The class token as it leaves the transformer block."""
    normed = _normed(model, tokens)
    return _class_similarity(model, normed, normed[:, 0])


def _patch_norm(model: VisionTransformer, tokens: torch.Tensor, *_: Any) -> torch.Tensor:
    """The length of every patch token, without the final norm."""
    return _patches(model, full_precision(tokens)).norm(dim=-1)


def _class_attention(model: VisionTransformer, tokens: torch.Tensor, index: int, *_: Any) -> torch.Tensor:
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


def _unlike_the_border(
    model: VisionTransformer, tokens: torch.Tensor, _index: int, grid: tuple[int, int]
) -> torch.Tensor:
    """How little a patch is like those of the border that it is most like, since objects seldom lie there: minus the
    mean of its greatest cosines, each token without the mean of its image."""
    h, w = grid
    patches = _patches(model, _normed(model, tokens))
    unit = torch.nn.functional.normalize(patches - patches.mean(1, keepdim=True), dim=-1)
    border = _border(h, w, tokens.device)
    likeness = unit @ unit.index_select(1, border).mT  # (B, n, patches of the border)
    return -likeness.topk(min(LIKE, len(border)), dim=2).values.mean(2)


def _border(h: int, w: int, device: torch.device) -> torch.Tensor:
    """The patches of the border of a grid, ascending: made on the device, and of a length that compilers know."""
    if min(h, w) < 3:
        return torch.arange(h * w, device=device)
    rows = torch.arange(w, (h - 1) * w, w, device=device)  # where those between the first and the last begin
    sides = torch.stack([rows, rows + w - 1], dim=1).flatten()
    return torch.cat([torch.arange(w, device=device), sides, torch.arange((h - 1) * w, h * w, device=device)])


def _normalised_cut(model: VisionTransformer, tokens: torch.Tensor, *_: Any) -> torch.Tensor:
    """TokenCut on the normed patch tokens."""
    return _second_eigenvector(_patches(model, _normed(model, tokens)))


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


QUERIES: dict[str, Query] = {
    "cls_param": Query(_class_parameter, needs_class_token=True),
    "cls_out": Query(_class_output, needs_class_token=True),
    "attention": Query(_class_attention, needs_class_token=True, for_training=False, reads_input=True),
    "norm": Query(_patch_norm),
    "border": Query(_unlike_the_border),
    "ncut": Query(_normalised_cut, for_training=False),
}
