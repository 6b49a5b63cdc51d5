"""Random words that are a pure function of their place: Philox 4x32 with 10 rounds.

A file that leaves its signs out names the seed they are made from. Hence they must be the same on
every machine and in every release, which no library promises of its own generator.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3",
https://doi.org/10.1145/2063384.2063405.

A block is four words of 32 bits (c0, c1, c2, c3). With the key (k0, k1), a round makes of it

    (high(M1 c2) ^ c1 ^ k0,  low(M1 c2),  high(M0 c0) ^ c3 ^ k1,  low(M0 c0))

where high and low are the halves of the 64-bit product, M0 = 0xD2511F53 and M1 = 0xCD9E8D57. After
each round, 0x9E3779B9 is added to k0 and 0xBB67AE85 to k1, modulo 2^32.

The sequence of (seed, layer, stream) has the key (seed, layer). Its words 4b to 4b + 3 are, in
order, what ten rounds make of (b modulo 2^32, b // 2^32, stream, 0).
"""

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_CHUNK = 1 << 13  # blocks: what a round reads and writes, half a MiB, stays in a core's cache
_LIMIT = 1 << 66  # words of a sequence: its blocks are counted in 64 bits
_SIGN_STREAM = 0


def philox4x32(counters: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """What ten rounds make of each block.

    counters: [N, 4] uint32; result: [N, 4] uint32. Raises `ValueError` for another shape and for
    a key that is not two words of 32 bits.
    """
    if counters.ndim != 2 or counters.shape[1] != 4:
        raise ValueError(f"counters have the shape {counters.shape}, not [N, 4]")
    _check_word("key[0]", key[0])
    _check_word("key[1]", key[1])
    blocks = np.empty(counters.shape, np.uint32)
    for start in range(0, len(counters), _CHUNK):
        part = slice(start, start + _CHUNK)
        _encrypt(counters[part], key, blocks[part])
    return blocks


def words(count: int, *, seed: int, layer: int, stream: int, start: int = 0) -> NDArray[np.uint32]:
    """The words `start` to `start + count - 1` of a sequence, [count] uint32.

    Raises `ValueError` for a seed, layer or stream outside [0, 2^32), and where the words asked
    for are not among the sequence's 2^66.
    """
    for name, value in {"seed": seed, "layer": layer, "stream": stream}.items():
        _check_word(name, value)
    if count < 0 or start < 0 or start + count > _LIMIT:
        raise ValueError(f"{count} words from word {start} on: not within [0, 2^66)")
    found = np.empty(count, np.uint32)
    done, block, skipped = 0, start // 4, start % 4
    while done < count:
        num_blocks = min(_CHUNK, -(-(skipped + count - done) // 4))
        made = philox4x32(_counters(block, num_blocks, stream), (seed, layer)).reshape(-1)
        part = made[skipped : skipped + count - done]
        found[done : done + len(part)] = part
        done, block, skipped = done + len(part), block + num_blocks, 0
    return found


def signs(count: int, *, seed: int, layer: int, start: int = 0) -> NDArray[np.bool_]:
    """The signs of the weights `start` to `start + count - 1` in row-major order, [count] bool.

    `True` is +1. The sign of weight i is bit i % 32, from the lowest, of word i // 32 of stream 0.
    Raises `ValueError` as `words` does.
    """
    if count < 0 or start < 0:
        raise ValueError(f"{count} signs from weight {start} on: neither may be negative")
    first, skipped = divmod(start, 32)
    num_words = -(-(skipped + count) // 32)
    made = words(num_words, seed=seed, layer=layer, stream=_SIGN_STREAM, start=first)
    packed = made.astype("<u4", copy=False).view(np.uint8)
    bits = np.unpackbits(packed, count=skipped + count, bitorder="little")
    return bits[skipped:].view(np.bool_)


def uniforms(count: int, *, seed: int, layer: int, stream: int) -> NDArray[np.float64]:
    """The first numbers of a sequence in the open interval (0, 1), [count] float64.

    Each is exactly (word + 0.5) / 2^32. Raises `ValueError` as `words` does.
    """
    numbers = words(count, seed=seed, layer=layer, stream=stream).astype(np.float64)
    numbers += 0.5
    numbers /= 2.0**32
    return numbers


def _counters(first: int, count: int, stream: int) -> NDArray[np.uint32]:
    """The counters of the blocks from number `first` on, [count, 4]."""
    block = np.uint64(first) + np.arange(count, dtype=np.uint64)
    counters = np.zeros((count, 4), np.uint32)
    counters[:, 0] = block & _LOW
    counters[:, 1] = block >> _HALF
    counters[:, 2] = stream
    return counters


def _encrypt(
    counters: NDArray[np.uint32], key: tuple[int, int], blocks: NDArray[np.uint32]
) -> None:
    """Writes what ten rounds make of `counters` into `blocks`, both [N, 4]."""
    # [2, N]: (c0, c2), which are multiplied, and (c1, c3), which are not. 64 bits wide, as the
    # products are, for NumPy has no multiplication that widens.
    even = counters[:, 0::2].T.astype(np.uint64, order="C")
    odd = counters[:, 1::2].T.astype(np.uint64, order="C")
    product = np.empty_like(even)
    for number in range(_ROUNDS):
        keys = [
            [(word + number * increment) % 2**32]
            for word, increment in zip(key, _INCREMENTS, strict=True)
        ]
        np.multiply(even, _MULTIPLIERS, out=product)
        swapped = product[::-1]
        np.right_shift(swapped, _HALF, out=even)
        even ^= odd
        even ^= np.array(keys, np.uint64)
        np.bitwise_and(swapped, _LOW, out=odd)
    blocks[:, 0::2] = even.T
    blocks[:, 1::2] = odd.T


def _check_word(name: str, value: int) -> None:
    if not 0 <= value < 2**32:
        raise ValueError(f"{name} is {value}: expected a number in [0, 2^32)")
