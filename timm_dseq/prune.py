"""Token pruning at inference: a plain ViT → a copy that drops its least salient patches before one of its blocks.

Images (B, C, H, W) of n patches go in. The blocks before `block` see all of them; that one and those after it see the
prefix tokens (class, registers) and the round(keep · n) most salient patches, in their order.
"""

from copy import deepcopy
from functools import cache
from numbers import Real

import torch
from timm.models import VisionTransformer, checkpoint

from .arguments import check_tensor
from .engine.saliency import QUERIES, AnyQuery, Query, check_query, query_of
from .engine.vit import block_index, embed, grid_of
from .errors import UserError


def prune(
    model: VisionTransformer, keep: float = 0.7, block: int | float = 1 / 3, query: AnyQuery = "norm"
) -> VisionTransformer:
    """A copy of the model that computes with a share `keep` of its patches from the transformer block `block` on.

    block: its index, or a share of the depth (1/3 → 3 of 12). query: how patches are scored, of the tokens that enter
    this block, by name or by your own function (model, tokens (B, prefix + n, D)) → (B, n).

    The copy has weights of its own under the same names. It is the same kind of model but for two methods:
    `forward_features` returns the prefix tokens and the kept patches (B, prefix + count, D), which every pooling and
    head takes, and `forward_intermediates` is refused, since there are no full maps.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps the model
    check_query(model, query)
    if isinstance(model, Pruned):
        raise UserError("this model is pruned already: prune the one that it was made from")
    if not isinstance(keep, Real) or not 0 < keep <= 1:
        raise UserError(f"keep={keep!r} is no share of the patches: give a number above 0, at most 1")
    asked = query_of(query)
    if not asked.for_training or asked.reads_input:
        others = ", ".join(name for name, other in QUERIES.items() if other.for_training)
        raise UserError(f"query={query!r} is for analysis: prune by one of {others}, or by a function")
    index = block_index(model, block)
    pruned = deepcopy(model)
    pruned.__class__ = _pruned_kind(type(model))
    pruned.prune_at, pruned.prune_keep, pruned.prune_query = index, float(keep), asked
    return pruned


@cache
def _pruned_kind(kind: type[VisionTransformer]) -> type[VisionTransformer]:
    """The class of pruned models of this class."""
    return type(f"Pruned{kind.__name__}", (Pruned, kind), {})


def _empty(kind: type[VisionTransformer]) -> VisionTransformer:
    """What a pickle fills: a pruned model of this class without anything in it."""
    pruned = _pruned_kind(kind)
    return pruned.__new__(pruned)


class Pruned(VisionTransformer):
    """What a pruned ViT does in another way than the class that it is mixed into."""

    prune_at: int  # the first block that sees the kept patches only
    prune_keep: float
    prune_query: Query

    def __reduce__(self) -> tuple:
        """No module holds the class that is mixed, so a pickle names the one that it is made from."""
        return _empty, (type(self).__bases__[1],), self.__dict__

    def forward_features(
        self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        """Images (B, C, H, W) → prefix tokens and kept patches, through the final norm: (B, prefix + count, D)."""
        if attn_mask is not None or is_causal:
            raise UserError("a pruned ViT takes no attn_mask, since its tokens become fewer: mask the unpruned one")
        grid = grid_of(self, x)
        tokens = embed(self, x)
        for index, block in enumerate(self.blocks):
            if index == self.prune_at:
                tokens = self._keep_salient(tokens, grid)
            tokens = checkpoint(block, tokens) if self.grad_checkpointing else block(tokens)
        return self.norm(tokens)

    def forward_intermediates(self, *_, **__):
        raise UserError("a pruned ViT has no maps of all patches: use the model that it was made from")

    def _keep_salient(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Tokens (B, prefix + n, D) → the prefix tokens and the most salient patches: (B, prefix + count, D)."""
        prefix, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
        n = patches.shape[1]
        count = max(1, int(self.prune_keep * n + 0.5))
        if count == n:
            return tokens
        with torch.autocast(tokens.device.type, enabled=False):
            scores = self.prune_query.score(self, tokens.detach(), self.prune_at, grid)
            check_tensor("the query's scores", scores, (None, n), "(B, n), salient ones high")
            # the host waits for the device to look at values, and no graph of a compiler holds such a look
            in_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
            if not in_graph and self.prune_query not in QUERIES.values() and scores.isnan().any():
                raise UserError("the query's scores hold NaN, which has no order: check your query")
        kept = scores.topk(count, dim=1).indices.sort(dim=1).values
        return torch.cat([prefix, patches.gather(1, kept[:, :, None].expand(-1, -1, patches.shape[2]))], dim=1)
