"""Attention within token sets that lie one behind the other in one long row, by a kernel that needs no mask.

timm's blocks pass their `attn_mask` on to `scaled_dot_product_attention`. In place of a mask they get `Boundaries`, a
tensor that answers this call with torch's kernel for sequences of many lengths. So the blocks stay timm's own.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


class Boundaries(torch.Tensor):
    """(S + 1,) int32: set s holds the row's tokens from boundary s up to boundary s + 1."""

    ends: torch.Tensor  # the same as a plain tensor, which compilers can follow
    longest: int  # no set has more tokens than this

    @staticmethod
    def of(ends: torch.Tensor, longest: int) -> Boundaries:
        """ends (S + 1,) int32, as boundaries."""
        global varlen_attn
        from torch.nn.attention.varlen import varlen_attn  # slow to import, and only needed here

        boundaries = ends.as_subclass(Boundaries)
        boundaries.ends, boundaries.longest = ends, longest
        return boundaries

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return attend(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: Boundaries, dropout_p: float = 0.0, is_causal=False
) -> torch.Tensor:
    """`scaled_dot_product_attention` within each set of the one row: q, k, v (1, heads, T, d) → (1, heads, T, d)."""
    longest, ends = attn_mask.longest, attn_mask.ends
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (T, heads, d)
    return varlen_attn(q, k, v, ends, ends, longest, longest).transpose(0, 1)[None]
