"""The order of samples is a pure function of (seed, epoch), the same for ever."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import UserError
from data.order import (
    SampleOrder,
    random_bits,
    random_choice,
    random_permutation,
    sample_uniforms,
    shard,
    stream_seed,
)


def test_random_bits_is_the_published_splitmix64() -> None:
    """Counter i gives output i of the reference generator of Steele, Lea and Flood."""
    assert random_bits(1234567, np.arange(5)).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert random_bits(0, np.arange(3)).tolist() == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


def test_random_bits_takes_the_largest_seed_and_any_shape_of_counters() -> None:
    """A 63-bit seed and a counter beyond 2^32 wrap around silently; the shape is kept."""
    far = random_bits(2**63 - 1, np.array([[2**40], [2**40]]))
    assert far.tolist() == [[2590900773057808528], [2590900773057808528]]
    assert far.dtype == np.uint64


def test_stream_seed_is_pinned_for_ever() -> None:
    """Other numbers here would silently reorder the data of every run that is resumed."""
    assert stream_seed(0) == 2033344993903900207
    assert stream_seed(0, "order", 0) == 3991725939186754870
    assert stream_seed(0, "imp", "order", 3) == 8355350113114815684


def test_stream_seeds_of_different_purposes_differ_and_fit_in_63_bits() -> None:
    """Seed, label, index and the depth of the labels all count."""
    seeds = {stream_seed(seed, name, k) for seed in range(5) for name in "ab" for k in range(5)}
    seeds |= {stream_seed(seed, name) for seed in range(5) for name in "ab"}
    assert len(seeds) == 5 * 2 * 5 + 5 * 2
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**61  # the upper bits are used


def test_the_permutation_is_pinned_for_ever() -> None:
    """Ten samples in three epochs, computed by hand-written integer arithmetic."""
    assert random_permutation(0, 10).tolist() == [2, 4, 6, 8, 5, 1, 7, 0, 9, 3]
    order = SampleOrder(10, 4, seed=0)
    assert order.permutation(0).tolist() == [2, 9, 3, 7, 4, 0, 6, 5, 8, 1]
    assert order.permutation(1).tolist() == [8, 2, 3, 7, 1, 5, 4, 9, 0, 6]
    assert SampleOrder(10, 4, seed=1).permutation(0).tolist() == [7, 3, 1, 9, 2, 8, 4, 6, 0, 5]
    assert order.permutation(0).tolist() == [2, 9, 3, 7, 4, 0, 6, 5, 8, 1]  # after another epoch


@pytest.mark.parametrize(("size", "count"), [(10, 0), (10, 3), (10, 10), (1000, 1), (1000, 411)])
def test_a_choice_is_the_beginning_of_the_permutation(size: int, count: int) -> None:
    """Without a sort of all, and in ascending order."""
    expected = sorted(random_permutation(7, size)[:count].tolist())
    assert random_choice(7, size, count).tolist() == expected


def test_more_than_there_are_cannot_be_chosen() -> None:
    with pytest.raises(ValueError, match="cannot choose 11 of 10"):
        random_choice(0, 10, 11)


def test_a_batch_is_a_pinned_slice_of_the_permutation() -> None:
    """Batch 1 of size 4 is samples 4 to 7 of the epoch; two ranks take half each."""
    order = SampleOrder(10, 4, seed=0)
    assert order.batch(0, 1).tolist() == [4, 0, 6, 5]
    assert order.batch(0, 1, rank=0, world_size=2).tolist() == [4, 0]
    assert order.batch(0, 1, rank=1, world_size=2).tolist() == [6, 5]
    assert order.batch(0, 1).dtype == np.int64


@pytest.mark.parametrize("size", [1, 2, 17, 1000])
@pytest.mark.parametrize("epoch", [0, 1, 89])
def test_each_epoch_is_a_permutation(size: int, epoch: int) -> None:
    """Every sample exactly once."""
    permutation = SampleOrder(size, 1, seed=3).permutation(epoch)
    assert sorted(permutation.tolist()) == list(range(size))


@pytest.mark.parametrize(("size", "batch_size", "num_steps"), [(12, 4, 3), (14, 4, 3), (5, 5, 1)])
def test_the_batches_partition_the_epoch(size: int, batch_size: int, num_steps: int) -> None:
    """The batches in order are the permutation without its incomplete end."""
    order = SampleOrder(size, batch_size, seed=5)
    assert order.steps_per_epoch == num_steps
    joined = np.concatenate([order.batch(2, step) for step in range(num_steps)])
    assert joined.tolist() == order.permutation(2)[: num_steps * batch_size].tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_the_ranks_shares_join_to_the_global_batch(world_size: int) -> None:
    """The number of ranks decides who reads a sample, and nothing else."""
    order = SampleOrder(50, 16, seed=1)
    for epoch in range(2):
        for step in range(3):
            shares = [order.batch(epoch, step, rank, world_size) for rank in range(world_size)]
            assert np.concatenate(shares).tolist() == order.batch(epoch, step).tolist()
            sizes = [len(share) for share in shares]
            assert max(sizes) - min(sizes) <= 1


def test_every_seed_and_every_epoch_has_an_order_of_its_own() -> None:
    """Four seeds by four epochs give sixteen orders, and asking again gives the same."""

    def orders() -> list[tuple[int, ...]]:
        return [
            tuple(SampleOrder(100, 10, seed).permutation(epoch).tolist())
            for seed in range(4)
            for epoch in range(4)
        ]

    assert len(set(orders())) == 16
    assert orders() == orders()


def test_the_batch_size_does_not_change_the_order() -> None:
    """The permutation depends on the seed and the epoch alone."""
    small, large = SampleOrder(60, 4, seed=9), SampleOrder(60, 20, seed=9)
    assert small.permutation(3).tolist() == large.permutation(3).tolist()


def test_every_sample_comes_first_equally_often() -> None:
    """Over 2,000 epochs of five samples each place holds each sample 400 +- 80 times (4.5 sd)."""
    order = SampleOrder(5, 1, seed=0)
    counts = np.zeros((5, 5), dtype=np.int64)
    for epoch in range(2000):
        counts[np.arange(5), order.permutation(epoch)] += 1
    assert np.abs(counts - 400).max() < 80


@pytest.mark.parametrize("batch_size", [0, -4, 11])
def test_an_impossible_batch_size_is_named(batch_size: int) -> None:
    """The message holds the key, the value and the range."""
    with pytest.raises(UserError, match=rf"data\.batch_size = {batch_size}: .* 1 and the 10 "):
        SampleOrder(10, batch_size, seed=0)


@pytest.mark.parametrize("step", [-1, 3, 100])
def test_a_step_beyond_the_epoch_is_an_error(step: int) -> None:
    """An epoch of three steps has steps 0, 1 and 2."""
    with pytest.raises(IndexError, match=rf"step {step} of an epoch of 3 steps"):
        SampleOrder(10, 3, seed=0).batch(0, step)


@given(size=st.integers(0, 60), batch_size=st.integers(1, 20), world_size=st.integers(1, 9))
@settings(max_examples=100)
def test_sharding_shows_every_sample_once(size: int, batch_size: int, world_size: int) -> None:
    """None twice, none left out, none padded, for any size, batch and number of ranks."""
    seen: list[int] = []
    for rank in range(world_size):
        for part in shard(size, batch_size, rank, world_size):
            samples = list(range(size))[part]
            assert 1 <= len(samples) <= batch_size
            assert len(samples) == part.stop - part.start
            seen += samples
    assert seen == list(range(size))


def test_the_shards_of_ten_samples_on_three_ranks_are_these() -> None:
    """Contiguous, of nearly equal size, the incomplete batch last."""
    assert [list(shard(10, 3, rank, 3)) for rank in range(3)] == [
        [slice(0, 3)],
        [slice(3, 6)],
        [slice(6, 9), slice(9, 10)],
    ]


def test_the_draws_of_a_sample_are_pinned_for_ever() -> None:
    """Other numbers here would change every augmented image of a resumed run."""
    assert sample_uniforms(0, 0, np.array([0]), 3).tolist() == [
        [0.0677405885416722, 0.5628662016089587, 0.41236940191570004]
    ]
    assert sample_uniforms(7, 2, np.array([5]), 3).tolist() == [
        [0.12820264563277228, 0.7782249684041523, 0.8873499311598788]
    ]


def test_a_samples_draws_do_not_depend_on_its_batch() -> None:
    """Alone, in another order or among others, a sample draws the same numbers."""
    together = sample_uniforms(3, 1, np.arange(40), 2)
    for batch in ([7], [39, 7, 0], list(range(39, -1, -1))):
        assert sample_uniforms(3, 1, np.array(batch), 2).tolist() == together[batch].tolist()


def test_samples_epochs_and_seeds_draw_different_numbers() -> None:
    """No two of 2 x 2 x 50 x 3 draws are equal."""
    draws = [sample_uniforms(s, e, np.arange(50), 3) for s in range(2) for e in range(2)]
    assert len(np.unique(np.stack(draws))) == 2 * 2 * 50 * 3


def test_draws_lie_in_the_half_open_unit_interval_and_are_uniform() -> None:
    """60,000 draws: ten bins of 6,000 +- 367 (5 sd), no correlation between neighbours."""
    draws = sample_uniforms(0, 0, np.arange(20000), 3)
    assert draws.shape == (20000, 3)
    assert draws.dtype == np.float64
    assert draws.min() >= 0
    assert draws.max() < 1
    counts, _ = np.histogram(draws, bins=10, range=(0, 1))
    assert np.abs(counts - 6000).max() < 367
    correlations = np.corrcoef(draws.T)[np.triu_indices(3, 1)]
    assert np.abs(correlations).max() < 0.04


def test_the_largest_draw_is_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """All bits set give 1 - 2^-53, and not 1."""
    monkeypatch.setattr(
        "data.order.random_bits", lambda seed, counters: np.full(counters.shape, 2**64 - 1, "u8")
    )
    assert sample_uniforms(0, 0, np.array([0]), 1).tolist() == [[1 - 2.0**-53]]
