"""The order of samples, and every random draw about a sample, as pure functions of a seed.

Nothing here holds a generator. A permutation or an augmentation draw is a hash of
(seed, epoch, sample), so that a resume at any step, on any number of ranks, sees exactly what
an uninterrupted run sees. The hash is SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), written out
here because NumPy and torch promise no stable streams across their releases.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from data.errors import UserError

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def stream_seed(seed: int, *labels: str | int) -> int:
    """A seed of its own for each purpose: 63 bits, equal on every machine and rank.

    `stream_seed(0, "imp", "order", 3)` and `stream_seed(0, "imp", "order", 4)` are unrelated.
    """
    text = "/".join([str(seed), *map(str, labels)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def random_bits(seed: int, counters: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 random bits for each counter, of the shape of `counters`."""
    with np.errstate(over="ignore"):
        state = np.uint64(seed) + (counters.astype(np.uint64) + np.uint64(1)) * _GAMMA
        state = (state ^ (state >> np.uint64(30))) * _MIX_1
        state = (state ^ (state >> np.uint64(27))) * _MIX_2
        return np.asarray(state ^ (state >> np.uint64(31)))


def random_permutation(seed: int, size: int) -> NDArray[np.int64]:
    """A uniformly random order of `0 .. size-1`."""
    return np.argsort(random_bits(seed, np.arange(size)), kind="stable").astype(np.int64)


def random_choice(seed: int, size: int, count: int) -> NDArray[np.int64]:
    """The first `count` of `random_permutation(seed, size)`, in ascending order and without a sort.

    Raises `ValueError` for more than `size`.
    """
    if not 0 <= count <= size:
        raise ValueError(f"cannot choose {count} of {size}")
    if count == 0:
        return np.empty(0, np.int64)
    bits = random_bits(seed, np.arange(size))
    last = np.partition(bits, count - 1)[count - 1]
    chosen = bits < last
    ties = np.flatnonzero(bits == last)  # more than one in 10^5 draws of 25 M at most
    chosen[ties[: count - int(np.count_nonzero(chosen))]] = True
    return np.flatnonzero(chosen)


def sample_uniforms(
    seed: int, epoch: int, samples: NDArray[np.int64], num_draws: int
) -> NDArray[np.float64]:
    """`[len(samples), num_draws]` numbers in [0, 1), those of one sample in one epoch per row."""
    epoch_seed = stream_seed(seed, "augment", epoch)
    counters = samples[:, None] * num_draws + np.arange(num_draws)
    bits = random_bits(epoch_seed, counters) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


class SampleOrder:
    """The order of samples as a pure function of (seed, epoch).

    Each epoch is a new permutation, cut into `steps_per_epoch` global batches of `batch_size`;
    the incomplete batch at the end is left out. The number of ranks decides who reads which
    part of a global batch, and nothing else.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int) -> None:
        if not 0 < batch_size <= num_samples:
            raise UserError(
                f"data.batch_size = {batch_size}: must be between 1 and the {num_samples} "
                "training images"
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = num_samples // batch_size
        self._cached: tuple[int, NDArray[np.int64]] | None = None

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """The samples of an epoch in their order: `[num_samples] int64`."""
        if self._cached is None or self._cached[0] != epoch:
            seed = stream_seed(self.seed, "order", epoch)
            self._cached = epoch, random_permutation(seed, self.num_samples)
        return self._cached[1]

    def batch(self, epoch: int, step: int, rank: int = 0, world_size: int = 1) -> NDArray[np.int64]:
        """A rank's share of the global batch at `step` of `epoch`: `int64` sample indices.

        The shares are contiguous, differ in size by at most one and, joined in rank order, are
        the global batch. Raises `IndexError` for a step beyond the epoch.
        """
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} of an epoch of {self.steps_per_epoch} steps")
        first = step * self.batch_size + self.batch_size * rank // world_size
        last = step * self.batch_size + self.batch_size * (rank + 1) // world_size
        return self.permutation(epoch)[first:last].copy()


def shard(num_samples: int, batch_size: int, rank: int, world_size: int) -> Iterator[slice]:
    """A rank's batches of an evaluation: every sample once over all ranks, none padded."""
    first = num_samples * rank // world_size
    last = num_samples * (rank + 1) // world_size
    for start in range(first, last, batch_size):
        yield slice(start, min(start + batch_size, last))
