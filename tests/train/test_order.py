"""A sample is a function of seed, epoch and index; the order of a run is one of seed and samples seen."""

from itertools import islice

import torch
from common.order import Share, order, sample_at, sample_seed, seeded
from hypothesis import given
from hypothesis import strategies as st

sizes = st.sampled_from([(1, 1), (2, 1), (1, 4), (2, 2), (4, 2)])


def test_an_epoch_holds_every_image_once_and_epochs_differ():
    first, second = order(0, 0, 101), order(0, 1, 101)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(101))
    assert not torch.equal(first, second)
    assert not torch.equal(first, order(1, 0, 101))
    assert [sample_at(0, 101 + i, 101) for i in range(3)] == [(1, int(second[i])) for i in range(3)]


@given(sizes, st.integers(5, 60), st.integers(0, 5), st.integers(0, 10))
def test_a_step_holds_the_same_samples_however_it_is_dealt(dealt, length, seed, done):
    processes, rounds = dealt
    micro_batch, batch = 3, 3 * processes * rounds
    shares = [Share(seed, length, batch, micro_batch, rank, processes, done * batch) for rank in range(processes)]
    steps = [list(islice(share, 2 * rounds)) for share in shares]
    for step in range(2):
        mine = [sample for s in steps for micro in s[step * rounds : (step + 1) * rounds] for sample in micro]
        start = (done + step) * batch
        assert sorted(mine) == sorted(sample_at(seed, start + i, length) for i in range(batch))


def test_seeds_of_samples_do_not_collide():
    seeds = {sample_seed(seed, epoch, index) for seed in range(3) for epoch in range(20) for index in range(300)}
    assert len(seeds) == 3 * 20 * 300
    assert min(seeds) >= 0 and max(seeds) < 2**63


def test_seeded_draws_are_the_seeds_own_and_leave_no_trace():
    torch.manual_seed(1)
    with seeded(5):
        inside = torch.rand(3)
    after = torch.rand(3)
    torch.manual_seed(1)
    torch.testing.assert_close(torch.rand(3), after)
    torch.manual_seed(2)
    with seeded(5):
        torch.testing.assert_close(torch.rand(3), inside)
