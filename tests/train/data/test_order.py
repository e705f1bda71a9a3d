"""A sample is a function of seed, epoch and index; the order of a run is one of seed and samples seen."""

from itertools import islice

import torch
from common.data.order import DistributedBatchSampler, order, sample_seed, sample_seeds, samples_at, seeded, view_seeds
from hypothesis import given
from hypothesis import strategies as st

sizes = st.sampled_from([(1, 1), (2, 1), (1, 4), (2, 2), (4, 2)])


def sample_at(seed: int, position: int, length: int) -> tuple[int, int]:
    """Sample number `position` of a run over `length` images, by the definition: (epoch, index)."""
    epoch, at = divmod(position, length)
    return epoch, int(order(seed, epoch, length)[at])


def test_an_epoch_holds_every_image_once_and_epochs_differ():
    first, second = order(0, 0, 101), order(0, 1, 101)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(101))
    assert not torch.equal(first, second)
    assert not torch.equal(first, order(1, 0, 101))
    assert [sample_at(0, 101 + i, 101) for i in range(3)] == [(1, int(second[i])) for i in range(3)]


def test_each_view_of_a_sample_has_a_seed_of_its_own_and_the_first_is_the_samples():
    samples = torch.tensor([[0, 5], [1, 5], [0, 6]])
    seeds = view_seeds(3, samples, 4)
    assert torch.equal(seeds[::4], sample_seeds(3, samples)) and len(seeds.unique()) == 12
    assert torch.equal(view_seeds(3, samples[1:2], 2), seeds[4:6])


@given(sizes, st.integers(5, 60), st.integers(0, 5), st.integers(0, 10))
def test_a_step_holds_the_same_samples_however_it_is_dealt(dealt, length, seed, done):
    processes, rounds = dealt
    micro_batch, batch = 3, 3 * processes * rounds
    shares = [
        DistributedBatchSampler(seed, length, batch, micro_batch, rank, processes, done * batch)
        for rank in range(processes)
    ]
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


@given(st.integers(0, 5), st.integers(0, 500), st.integers(1, 90), st.integers(1, 40))
def test_samples_in_a_row_are_those_of_each_position(seed, position, count, length):
    found = samples_at(seed, position, count, length)
    assert found.shape == (count, 2) and found.dtype == torch.int64
    assert [tuple(sample) for sample in found.tolist()] == [sample_at(seed, position + i, length) for i in range(count)]


def test_tensors_of_a_share_are_its_lists():
    lists, tensors = (DistributedBatchSampler(3, 20, 12, 3, 1, 2, 24) for _ in range(2))
    for samples, tensor in islice(zip(lists, tensors.tensors(), strict=False), 12):
        assert samples == [tuple(sample) for sample in tensor.tolist()]


def test_seeds_of_a_batch_do_not_collide_and_no_samples_depend_on_another():
    samples = torch.cartesian_prod(torch.arange(40), torch.arange(5000))
    seeds = torch.cat([sample_seeds(seed, samples) for seed in (0, 1, -1, 2**40)])
    assert len(seeds.unique()) == 4 * 200_000
    assert seeds.dtype == torch.int64 and seeds.min() >= 0
    assert torch.equal(sample_seeds(0, samples[777:778]), seeds[777:778])
    assert torch.equal(sample_seeds(0, samples.flip(0)), seeds[:200_000].flip(0))
    assert not torch.isin(sample_seeds(0, samples.flip(1))[1:5000], seeds[1:5000]).any()  # epoch and index differ


@given(*[st.integers(-(2**63), 2**63 - 1)] * 3)
def test_seeds_take_any_numbers_and_tell_them_apart(seed, epoch, index):
    sample = torch.tensor([[epoch, index]])
    (found,) = sample_seeds(seed, sample).tolist()
    assert 0 <= found < 2**63
    for other in (sample ^ torch.tensor([[1, 0]]), sample ^ torch.tensor([[0, -(2**63)]])):
        assert found != int(sample_seeds(seed, other))
    assert found != int(sample_seeds(seed ^ 1, sample))


def test_every_bit_of_a_seed_is_as_often_set_as_not():
    seeds = sample_seeds(0, torch.cartesian_prod(torch.arange(4), torch.arange(10_000)))
    bits = (seeds[:, None] >> torch.arange(63)) & 1
    assert ((bits.double().mean(0) - 0.5).abs() < 0.02).all()
