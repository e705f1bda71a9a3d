"""Who predicts what from whom: contexts, targets, steps and ranks of every kind of plan."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_dseq.engine.plans import Plan, plan_blocks, plan_regions
from timm_dseq.engine.regions import rank_regions
from timm_dseq.engine.target_blocks import block_masks
from timm_dseq.errors import UserError

from ..tiny import PLANS, islands, plan


def check_sound(a_plan):
    """Nothing empty, nothing seen that is predicted, sizes as counted."""
    visible = a_plan.visible()
    assert a_plan.contexts.any(1).all() and visible.any(1).all() and a_plan.targets.any(1).all()
    assert not (visible & a_plan.targets).any()
    counted = [masks.sum(1).tolist() for masks in (a_plan.contexts, visible, a_plan.targets)]
    assert [list(sizes) for sizes in a_plan.sizes] == counted


def check_sequence(a_plan):
    """Each step of an image sees all the step before saw, and what it predicted; the last leaves nothing over."""
    check_sound(a_plan)
    visible, image = a_plan.visible(), a_plan.context_image[a_plan.target_context]
    for i in image.unique():
        seen, target, step = (x[image == i] for x in (visible, a_plan.targets, a_plan.step))
        assert step.tolist() == list(range(1, len(step) + 1))
        for k in range(1, len(step)):
            assert torch.equal(seen[k], seen[k - 1] | target[k - 1])
        assert (seen[-1] | target[-1]).all()


def check_blocks_plan(a_plan, blocks):
    """One context an image, the same for all its targets, just as the blocks say."""
    check_sound(a_plan)
    assert torch.equal(a_plan.contexts, blocks.context.flatten(1)[a_plan.context_image])
    image = a_plan.context_image[a_plan.target_context]
    for p in range(len(a_plan.targets)):
        own = blocks.targets[image[p]].flatten(1)
        own = own[own.any(1)]
        assert torch.equal(a_plan.targets[p], own[a_plan.step[p] - 1])


def maps_of(count, h, w, seed):
    return islands(count, h, w, torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(h=st.integers(3, 12), w=st.integers(3, 12), seed=st.integers(0, 2**31), n=st.integers(2, 7))
def test_region_plans_grow_and_leave_nothing_over(h, w, seed, n):
    regions = rank_regions(maps_of(4, h, w, seed), num_regions=n)
    plain, causal = plan_regions(regions), plan_regions(regions, causal=True)
    for a_plan in (plain, causal):
        check_sequence(a_plan)
    assert torch.equal(plain.visible(), causal.visible()) and torch.equal(plain.targets, causal.targets)
    assert len(causal.contexts) == len(causal.context_image.unique())


@settings(max_examples=40, deadline=None)
@given(h=st.integers(6, 16), w=st.integers(6, 16), seed=st.integers(0, 2**60))
def test_block_plans_are_the_blocks(h, w, seed):
    blocks = block_masks((h, w), seed + torch.arange(5))
    check_blocks_plan(plan_blocks(blocks), blocks)


def test_flat_plans_see_the_first_region_only():
    maps = maps_of(6, 9, 9, 0)
    regions = rank_regions(maps, min_area=0.01)
    assert (regions.count > 1).any()
    flat, full = plan_regions(regions, flat=True), plan_regions(regions)
    check_sound(flat)
    image = flat.context_image[flat.target_context]
    assert torch.equal(flat.visible(), regions.masks[:, 0].flatten(1)[image])
    assert torch.equal(flat.targets, full.targets) and torch.equal(flat.step, full.step)


def test_a_plan_that_is_flat_and_causal_is_refused():
    with pytest.raises(UserError, match="flat=True and causal=True exclude each other"):
        plan_regions(rank_regions(maps_of(2, 6, 6, 0)), flat=True, causal=True)


@pytest.mark.parametrize("kind", PLANS)
def test_joined_plans_hold_their_parts(kind):
    a, b = plan(kind, 4, (7, 9), seed=1), plan("causal", 4, (7, 9), seed=2)
    both = Plan.cat([a, b])
    check_sound(both)
    assert torch.equal(both.visible(), torch.cat([a.visible(), b.visible()]))
    assert torch.equal(both.targets, torch.cat([a.targets, b.targets]))
    images = [p.context_image[p.target_context] for p in (a, b, both)]
    assert torch.equal(images[2], torch.cat(images[:2]))


def test_a_map_without_regions_makes_no_step():
    maps = torch.stack([torch.zeros(6, 6), torch.full((6, 6), torch.nan), torch.eye(6)])
    a_plan = plan_regions(rank_regions(maps, min_area=0))
    assert a_plan.context_image.tolist() == [2] and a_plan.step.tolist() == [1]
    nothing = plan_regions(rank_regions(maps[:2]))
    assert nothing.contexts.shape == (0, 36) and nothing.targets.shape == (0, 36)


def test_a_sequence_that_stops_early_never_predicts_the_remainder():
    maps = maps_of(8, 12, 12, 3)
    full, short = rank_regions(maps, min_area=0.01), rank_regions(maps, min_area=0.01, stop_after=2)
    assert (full.count > 2).any()
    a_plan = plan_regions(short)
    check_sound(a_plan)
    image = a_plan.context_image[a_plan.target_context]
    assert image.tolist() == (full.count >= 2).nonzero().flatten().tolist() and (a_plan.step == 1).all()
    assert torch.equal(a_plan.targets, full.masks[image, 1].flatten(1))


def test_sizes_are_counted_for_a_plan_made_by_hand():
    masks = torch.eye(4, dtype=torch.bool)
    index = torch.arange(2)
    check_sound(Plan(masks[:2], index, masks[2:], index, index + 1))
