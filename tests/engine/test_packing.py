"""Packing puts every set whole into one row, keeps sets apart, and finds everything again."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_dseq.engine.packing import attention_rule, chain, masked_values, pack, scatter_to_slots, slots_of

from ..tiny import lines_run

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(sizes=SIZES, usual=st.integers(8, 64), length=st.none() | st.integers(1, 200))
def test_every_set_lies_whole_in_one_row(sizes, usual, length):
    layout = pack(torch.tensor(sizes), usual, 96, length)
    taken = [slot for start, size in zip(layout.starts, sizes, strict=True) for slot in range(start, start + size)]
    assert len(set(taken)) == sum(sizes) and max(taken) < layout.slots and min(taken) >= 0
    for start, size in zip(layout.starts, sizes, strict=True):
        assert start // layout.length == (start + size - 1) // layout.length
    assert layout.rows >= 2 and layout.fill == sum(sizes) / layout.slots
    if layout.rows > 2:
        assert max(taken) // layout.length == layout.rows - 1  # no row is empty


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, length=st.integers(60, 150), seed=st.integers(0, 2**31))
def test_rows_are_at_most_a_third_more_than_needed(sizes, length, seed):
    layout = pack(sizes, length, 96, length)
    needed = -(-sum(sizes) // length)
    # first-fit decreasing never needs more than 11/9 of the best plus 6/9; the best is at least `needed`, and when
    # sets are larger than half a row, as many as there are of these
    best = max(needed, sum(2 * size > length for size in sizes))
    assert layout.rows <= max(2, 11 / 9 * 1.5 * best + 1)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**31), sets=st.integers(1, 20), n=st.integers(1, 40))
def test_unpacking_gives_back_what_was_packed(seed, sets, n):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(sets, n, generator=generator) < 0.5
    masks[:, 0] = True
    values = torch.randint(0, 10**6, (sets, n), generator=generator)
    layout = pack(masks.sum(1), n, 96)
    slots = slots_of(layout, masks)
    rows = scatter_to_slots(layout, slots, values, empty=-1)
    assert (rows == -1).sum() == layout.slots - masks.sum()
    assert torch.equal(rows[slots[masks]], values[masks])
    assert torch.equal(masked_values(masks, slots, int(masks.sum())), slots[masks])


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=12), seed=st.integers(0, 2**31))
def test_the_rule_is_own_set_and_rank_not_later(sizes, seed):
    layout = pack(torch.tensor(sizes), 16, 96)
    owner = [-1] * layout.slots
    for index, (start, size) in enumerate(zip(layout.starts, sizes, strict=True)):
        owner[start : start + size] = [index] * size
    rank = torch.randint(0, 3, (layout.slots,), generator=torch.Generator().manual_seed(seed))
    slots = slots_of(layout, torch.arange(max(sizes)) < torch.tensor(sizes)[:, None])
    plain, ranked = attention_rule(layout, slots), attention_rule(layout, slots, rank)
    assert plain.shape == (layout.rows, 1, layout.length, layout.length)
    assert ranked.any(-1).all()  # a query without keys would give NaN
    for row in range(layout.rows):
        for q in range(0, layout.length, 3):
            for k in range(layout.length):
                i, j = row * layout.length + q, row * layout.length + k
                assert plain[row, 0, q, k] == (owner[i] == owner[j])
                assert ranked[row, 0, q, k] == (owner[i] == owner[j] and rank[j] <= rank[i])


def test_the_length_that_costs_least_fills_the_rows():
    assert pack(torch.full((64,), 101), 197, 384).fill > 0.95  # one region of .51: 51 % of the ViT's own rows
    assert pack(torch.full((64,), 101), 197, 384, length=197).fill < 0.52
    generator = torch.Generator().manual_seed(0)
    assert pack(torch.randint(50, 140, (64,), generator=generator), 197, 384).fill > 0.95


def row_by_row(sizes, length):
    """First-fit decreasing as one would write it down: how many rows it takes."""
    left, rows = sorted(sizes, reverse=True), 0
    while left:
        free, rows, kept = length, rows + 1, []
        for size in left:
            if size <= free:
                free -= size
            else:
                kept.append(size)
        left = kept
    return rows


@settings(max_examples=100, deadline=None)
@given(sizes=SIZES, length=st.integers(60, 200))
def test_rows_made_at_once_are_those_made_one_by_one(sizes, length):
    assert pack(torch.tensor(sizes), length, 96, length).rows == max(2, row_by_row(sizes, length))


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES)
def test_a_chain_is_one_row_with_a_boundary_behind_each_set(sizes):
    layout = chain(torch.tensor(sizes))
    slots = slots_of(layout, torch.arange(max(sizes)) < torch.tensor(sizes)[:, None])
    rule = attention_rule(layout, slots)
    assert layout.rows == 1 and layout.slots % 256 == 0
    assert rule.ends.tolist()[:-1] == [0, *itertools.accumulate(sizes)] and rule.ends[-1] == layout.slots
    assert rule.longest >= max(rule.ends.diff())


def test_packing_costs_the_host_no_more_for_more_sets():
    """The Python that runs depends on how many sizes there are, not on how many sets."""
    few, many = (torch.arange(count) % 90 + 30 for count in (900, 9000))
    assert lines_run(lambda: pack(many, 197, 384)) < 1.5 * lines_run(lambda: pack(few, 197, 384))
