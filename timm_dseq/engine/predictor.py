"""The narrow transformer that predicts latents: encoded context tokens (S, D) and a plan → predictions (T, D)."""

from functools import partial

import torch
from timm.layers import trunc_normal_
from timm.models.vision_transformer import Block
from torch import nn

from ..errors import UserError
from ..positions import sincos_positions
from .packing import Layout, attention_rule, chain, masked_values, pack, scatter_to_slots, slots_of
from .plans import Plan
from .vit import init_weights, run_blocks


class Predictor(nn.Module):
    """Linear in, mask tokens at the target patches, transformer blocks, norm, linear out.

    Each prediction has a token set of its own: the context patches that it may see, and its mask tokens.
    """

    def __init__(self, grid: tuple[int, int], embed_dim: int, num_heads: int, width: int = 384, depth: int = 6) -> None:
        super().__init__()
        if width % num_heads or width % 4:
            raise UserError(f"predictor_width={width} must be a multiple of 4 and of the encoder's {num_heads} heads")
        self.width = width
        self.grad_checkpointing = False
        self.varlen = False  # one long row and a kernel that keeps sets apart, instead of rows and a mask
        self.embed = nn.Linear(embed_dim, width)
        self.mask_token = nn.Parameter(torch.empty(1, width))
        self.register_buffer("positions", sincos_positions(grid, width), persistent=False)  # (N, width)
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(Block(width, num_heads, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        self.norm = norm(width)
        self.project = nn.Linear(width, embed_dim)
        init_weights(self, self.blocks)
        trunc_normal_(self.mask_token, std=0.02)

    def forward(self, tokens: torch.Tensor, slots: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, Layout]:
        """Predict every target of the plan from its visible patches.

        tokens (S, D): the encoder's, in any order. slots (E, N): the row of `tokens` that holds each context patch.
        Returns predictions (T, D) in the order of `plan.targets.nonzero()`, and the layout of the rows.
        """
        visible, targets = plan.visible(), plan.targets
        _, view_sizes, target_sizes = plan.sizes
        sizes = view_sizes + target_sizes
        layout = chain(sizes) if self.varlen else pack(sizes, len(self.positions) + 1, self.width)
        patch = torch.arange(targets.shape[1], device=targets.device)
        slot = slots_of(layout, visible | targets)  # (P, N)
        # rows of `_table`, whose last is the mask token
        source = torch.where(visible, slots.index_select(0, plan.target_context), len(tokens))
        source = scatter_to_slots(layout, slot, source, empty=len(tokens))
        position = scatter_to_slots(layout, slot, patch, empty=0)

        rows = self._table(tokens).index_select(0, source) + self.positions.index_select(0, position)
        rows = rows.view(layout.rows, layout.length, self.width)
        rows = run_blocks(self.blocks, rows, attention_rule(layout, slot), self.grad_checkpointing)
        target_slots = masked_values(targets, slot, int(target_sizes.sum()))
        predictions = self.project(self.norm(rows.flatten(0, 1).index_select(0, target_slots)))
        return predictions, layout

    def _table(self, tokens: torch.Tensor) -> torch.Tensor:
        """Every encoded token, then the mask token: (S + 1, width)."""
        return torch.cat([self.embed(tokens), self.mask_token])
