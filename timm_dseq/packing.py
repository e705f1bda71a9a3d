"""HOW: token sets of many sizes → full rows of one length with an attention rule that keeps them apart, and back.

The host decides from the sizes alone which set goes where; the device follows by cumulative sums, without being asked.
"""

from dataclasses import dataclass

import torch

STRIDE = 8  # row lengths are multiples of this: attention kernels want masks so aligned
LONGEST = 2.6  # times the longest of the sets or of the usual row


@dataclass(frozen=True)
class Layout:
    """Where S token sets lie in R rows of length L."""

    rows: int
    length: int
    sizes: list[int]  # of each set
    starts: list[int]  # first slot of each set, rows one after the other

    @property
    def slots(self) -> int:
        return self.rows * self.length

    @property
    def fill(self) -> float:
        return sum(self.sizes) / self.slots


def pack(sizes: list[int], usual: int, width: int, length: int | None = None) -> Layout:
    """Lay out sets of these sizes, in the row length that costs least (or the given one).

    usual: the row length of the ViT itself. width: channels D; a token costs 24·D² in the linear layers of a block and
    4·D·L in its attention, so rows of L cost L·(1 + L / 6D) each.
    """
    longest = max(sizes)
    if length is not None:
        return _fill_rows(sizes, max(length, longest))
    best, least = None, float("inf")
    first = _up(longest)
    for candidate in range(first, max(first, int(LONGEST * max(usual, longest))) + 1, STRIDE):
        price = 1 + candidate / (6 * width)
        if sum(sizes) * price >= least:  # full rows of this length would cost more, and so would all longer ones
            break
        layout = _fill_rows(sizes, candidate)
        if layout.slots * price < least:
            best, least = layout, layout.slots * price
    return best


def _up(size: int) -> int:
    return -(-size // STRIDE) * STRIDE


def _fill_rows(sizes: list[int], length: int) -> Layout:
    """Fill row after row, each time with the largest set that still fits: first-fit decreasing, by counting sizes."""
    waiting: dict[int, list[int]] = {}
    for index, size in enumerate(sizes):
        waiting.setdefault(size, []).append(index)
    present = sum(1 << size for size in waiting)  # bit s: a set of size s waits
    starts = [0] * len(sizes)
    row, used = 0, 0
    while present:
        size = (present & ((2 << (length - used)) - 1)).bit_length() - 1
        if size < 1:
            row, used = row + 1, 0
            continue
        sets = waiting[size]
        fits = min(len(sets), (length - used) // size)
        for _ in range(fits):
            starts[sets.pop()] = row * length + used
            used += size
        if not sets:
            present &= ~(1 << size)
    rows = max(row + 1, 2)  # compilers take a single row for a special case
    return Layout(rows, length, sizes, starts)


def place(layout: Layout, masks: torch.Tensor) -> torch.Tensor:
    """The slot of each member of each set: (S, N) bool → (S, N) int64; what is no member gets `layout.slots`."""
    starts = torch.tensor(layout.starts).to(masks.device, non_blocking=True)
    return torch.where(masks, starts[:, None] - 1 + masks.cumsum(1), layout.slots)


def spread(layout: Layout, slots: torch.Tensor, values: torch.Tensor, empty: int) -> torch.Tensor:
    """A table of the rows' slots: values (…) written at slots (…), `empty` elsewhere → (R·L,) int64."""
    table = torch.full((layout.slots + 1,), empty, dtype=torch.long, device=slots.device)
    return table.scatter(0, slots.flatten(), values.expand(slots.shape).flatten())[:-1]


def order_of(masks: torch.Tensor, values: torch.Tensor, total: int) -> torch.Tensor:
    """values[masks], in the order of `masks.nonzero()`, for a device that must not be asked how many: (total,)."""
    flat = masks.flatten()
    place = torch.where(flat, flat.cumsum(0) - 1, total)
    out = torch.zeros(total + 1, dtype=torch.long, device=masks.device)
    return out.scatter(0, place, values.expand(masks.shape).flatten())[:-1]


def attention_rule(layout: Layout, device: torch.device, rank: torch.Tensor | None = None) -> torch.Tensor:
    """Who sees whom: (R, 1, L, L) bool. A query sees keys of its own set with a rank not later than its own.

    rank (R·L,): of each slot; None: everything of one rank. Empty slots see each other, so that no row of attention is
    empty.
    """
    by_start = sorted(range(len(layout.starts)), key=layout.starts.__getitem__)
    owners, lengths, at = [], [], 0
    for index in by_start:
        start, size = layout.starts[index], layout.sizes[index]
        owners += [-1, index]
        lengths += [start - at, size]
        at = start + size
    owners.append(-1)
    lengths.append(layout.slots - at)
    owner = torch.repeat_interleave(torch.tensor(owners), torch.tensor(lengths)).to(device, non_blocking=True)
    owner = owner.view(layout.rows, 1, layout.length)
    rule = owner[:, :, :, None] == owner[:, :, None, :]
    if rank is not None:
        rank = rank.view(layout.rows, 1, layout.length)
        rule = rule & (rank[:, :, None, :] <= rank[:, :, :, None])
    return rule
