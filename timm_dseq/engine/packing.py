"""HOW: token sets of many sizes → full rows of one length, with an attention rule that keeps the sets apart.

The host decides from the sizes alone where each set lies. The device computes the slot of each token by cumulative
sums, so nothing is copied back.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from ..host import to_device
from .attention import Boundaries
from .plans import Plan

STRIDE = 8  # row lengths are multiples of this, as attention kernels want masks aligned
LONGEST = 2.6  # rows are at most this many times as long as the longest set or the usual row
NEAR = 1.02  # the search ends at a layout that costs at most this much more than longer rows would, were they full
TOTAL = 256  # the length of the one row of `chain` is a multiple of this, so that few lengths occur


@dataclass(frozen=True)
class Layout:
    """Where S token sets lie in R rows of L slots."""

    rows: int
    length: int
    sizes: np.ndarray  # (S,) of each set
    starts: np.ndarray  # (S,) first slot of each set, rows one after the other
    varlen: bool = False  # one long row whose sets the attention kernel keeps apart, without a mask

    @property
    def slots(self) -> int:
        """R · L."""
        return self.rows * self.length

    @property
    def fill(self) -> float:
        """Share of the slots that hold a token."""
        return int(self.sizes.sum()) / self.slots

    def facts(self, name: str) -> dict[str, float]:
        """What a transformer computes: tokens, pairs of tokens that may attend to each other, the rows' fill."""
        tokens, pairs = int(self.sizes.sum()), int((self.sizes**2).sum())
        return {f"{name}_tokens": tokens, f"{name}_pairs": pairs, f"{name}_fill": self.fill}


def pack_contexts(
    tokens: torch.Tensor, plan: Plan, prefix: int, varlen: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Layout]:
    """Rows of a plan's contexts, each with the prefix tokens of its image; tokens (B, prefix + N, D) → (R, L, D).

    Also returned: their attention rule; the slot of each context patch, (E, N); the layout.
    """
    length, dim = tokens.shape[1:]
    sizes = prefix + plan.sizes[0]
    one_row = varlen and plan.context_rank is None  # its kernel knows no ranks
    layout = chain(sizes) if one_row else pack(sizes, length, dim)
    slots = slots_of(layout, F.pad(plan.contexts, (prefix, 0), value=True))  # (E, prefix + N)
    source = plan.context_image[:, None] * length + torch.arange(length, device=slots.device)
    source = scatter_to_slots(layout, slots, source, empty=0)
    rank = None
    if plan.context_rank is not None:
        rank = scatter_to_slots(layout, slots, F.pad(plan.context_rank, (prefix, 0)), empty=0)
    rows = tokens.flatten(0, 1).index_select(0, source).view(layout.rows, layout.length, dim)
    return rows, attention_rule(layout, slots, rank), slots[:, prefix:], layout


def pack(sizes: torch.Tensor, usual: int, width: int, length: int | None = None) -> Layout:
    """Lay out sets of these sizes (S,), in the row length that costs least (or the given one).

    usual: the row length of the ViT itself. width: channels D; a token costs 24·D² in the linear layers of a block and
    4·D·L in its attention, so rows of L cost L·(1 + L / 6D) each.
    """
    sizes = np.asarray(sizes)
    present, counts = np.unique(sizes, return_counts=True)
    waiting = dict(zip(present.tolist(), counts.tolist(), strict=True))
    longest, total = int(present[-1]), int(sizes.sum())
    if length is None:
        best, least = [], float("inf")
        first = _up(longest, STRIDE)
        for candidate in range(first, max(first, int(LONGEST * max(usual, longest))) + 1, STRIDE):
            price = 1 + candidate / (6 * width)
            if least <= NEAR * total * price:  # even full rows of this length, or longer ones, would hardly cost less
                break
            kinds = _fill_rows(waiting, candidate)
            cost = sum(repeats for _, repeats in kinds) * candidate * price
            if cost < least:
                best, least, length = kinds, cost, candidate
    else:
        length = max(length, longest)
        best = _fill_rows(waiting, length)
    rows = max(sum(repeats for _, repeats in best), 2)  # compilers specialise on a size of 1
    return Layout(rows, length, sizes, _starts(sizes, best, length))


def chain(sizes: torch.Tensor) -> Layout:
    """One row with sets of these sizes (S,) one behind the other, for a kernel that needs no mask."""
    sizes = np.asarray(sizes)
    ends = sizes.cumsum()
    return Layout(1, _up(int(ends[-1]), TOTAL), sizes, ends - sizes, varlen=True)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


Kind = tuple[list[tuple[int, int]], int]  # (size, how many) of the sets in a row; how many rows are filled like this


def _fill_rows(waiting: dict[int, int], length: int) -> list[Kind]:
    """Fill row after row, each time with the largest set that still fits: first-fit decreasing.

    waiting: size → how many sets of it have no row yet. Rows that are filled alike are made at once, so the work grows
    with the number of sizes, not of sets.
    """
    waiting, kinds = dict(waiting), []
    present = sum(1 << size for size in waiting)  # bit s: a set of size s waits
    while present:
        row, free, left = [], length, present
        while (size := (left & ((2 << free) - 1)).bit_length() - 1) > 0:
            fits = min(waiting[size], free // size)
            row.append((size, fits))
            free -= fits * size
            left &= ~(1 << size)
        repeats = min(waiting[size] // fits for size, fits in row)
        for size, fits in row:
            waiting[size] -= repeats * fits
            if not waiting[size]:
                present &= ~(1 << size)
        kinds.append((row, repeats))
    return kinds


def _starts(sizes: np.ndarray, kinds: list[Kind], length: int) -> np.ndarray:
    """The first slot of each set: (S,). Sets of one size keep their order."""
    by_size: dict[int, list[np.ndarray]] = {}
    row = 0
    for sets, repeats in kinds:
        first = (row + np.arange(repeats)[:, None]) * length
        for size, fits in sets:
            by_size.setdefault(size, []).append((first + np.arange(fits) * size).ravel())
            first = first + fits * size
        row += repeats
    starts = np.empty(len(sizes), dtype=np.int64)
    starts[np.argsort(sizes, kind="stable")] = np.concatenate(
        [slots for size in sorted(by_size) for slots in by_size[size]]
    )
    return starts


def slots_of(layout: Layout, masks: torch.Tensor) -> torch.Tensor:
    """The slot of each member of each set: (S, N) bool → (S, N) int64; what is no member gets `layout.slots`."""
    starts = to_device(torch.from_numpy(layout.starts), masks.device)
    return torch.where(masks, starts[:, None] - 1 + masks.cumsum(1), layout.slots)


def scatter_to_slots(layout: Layout, slots: torch.Tensor, values: torch.Tensor, empty: int) -> torch.Tensor:
    """Values (…) written to their slots (…), `empty` in all others: (R·L,) int64."""
    table = torch.full((layout.slots + 1,), empty, dtype=torch.long, device=slots.device)
    return table.scatter(0, slots.flatten(), values.expand(slots.shape).flatten())[:-1]


def masked_values(masks: torch.Tensor, values: torch.Tensor, total: int) -> torch.Tensor:
    """values[masks], in the order of `masks.nonzero()`: (total,). The total is known, so the host does not wait."""
    flat = masks.flatten()
    row = torch.where(flat, flat.cumsum(0) - 1, total)
    out = torch.zeros(total + 1, dtype=torch.long, device=masks.device)
    return out.scatter(0, row, values.expand(masks.shape).flatten())[:-1]


def attention_rule(layout: Layout, slots: torch.Tensor, rank: torch.Tensor | None = None) -> torch.Tensor:
    """Who sees whom: a query sees keys of its own set with a rank not later than its own.

    slots (S, N): those of the sets' members, by `slots_of`. rank (R·L,): of each slot; None: everything of one rank.
    Returns (R, 1, L, L) bool; where the kernel itself keeps the sets of a row apart, their `Boundaries`. Empty slots
    see each other, so that no row of attention is empty.
    """
    if layout.varlen:
        ends = np.append(layout.starts, [int(layout.sizes.sum()), layout.slots])  # the empty slots are the last set
        longest = max(slots.shape[1], TOTAL)  # the same for every batch, so that no compiled graph is made again
        return Boundaries.of(to_device(torch.from_numpy(ends.astype(np.int32)), slots.device), longest)
    sets = torch.arange(len(slots), device=slots.device)[:, None]
    owner = scatter_to_slots(layout, slots, sets, empty=-1).view(layout.rows, 1, layout.length)
    rule = owner[:, :, :, None] == owner[:, :, None, :]
    if rank is not None:
        rank = rank.view(layout.rows, 1, layout.length)
        rule = rule & (rank[:, :, None, :] <= rank[:, :, :, None])
    return rule
