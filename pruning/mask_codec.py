"""A layer's mask as few bytes: near n H(k), where n weights are kept independently at density k.

Interleaved range variants of asymmetric numeral systems (rANS): Duda 2013, "Asymmetric numeral
systems", https://arxiv.org/abs/1311.2540; Giesen 2014, "Interleaved entropy coders",
https://arxiv.org/abs/1402.3392. All of the format follows; every division rounds down.

The reader knows `size`, the number of weights, and `kept`, how many are `True`. If `kept` is 0 or
`size`, the content is empty. Else the symbols are the bytes of the packed mask: eight weights a
byte, the first in the lowest bit, zeros after the last weight.

Model. M = 2^20. A byte b with j ones has the frequency

    F(b) = 1 + (M - 256) kept^j (size - kept)^(8 - j) / size^8

in exact integers. What is then missing from the sum M is added to F(0) where 2 kept <= size, to
F(255) otherwise. C(b) is the sum of F over the bytes below b.

Lanes. With log(m) the greatest integer for which 2^log(m) <= size^256 / m^256, the number of
lanes is the larger of

    (kept log(kept) + (size - kept) log(size - kept)) / 256 / 8000
    (the number of bytes + 65535) / 65536

Byte i of the packed mask is of lane i mod lanes; the bytes of one value of i / lanes are a step.

Coding. Each lane has a state x, 2^24 <= x < 2^56. To read a byte, let r = x mod M: the byte is
the b for which C(b) <= r < C(b) + F(b), and x becomes F(b) (x / M) + r - C(b). If it is then below
2^24, x becomes 2^32 x + w, where w is the next word. After its last byte a lane's state is 2^24
and no word is left. To write, begin there and go from the last byte to the first: if
x >= 2^36 F(b), write the word x mod 2^32 and divide x by 2^32; then x becomes
M (x / F(b)) + x mod F(b) + C(b).

Content. The states with which reading begins, by lane, 7 bytes each; then the words of 4 bytes in
the order in which they are read: by step, within a step by lane. Both are little-endian. Exactly
one content gives a mask, and nothing else is read.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_TOTAL_BITS = 20  # 16 would cost 0.7 % at density 0.01, where most bytes have the least frequency
_TOTAL = 1 << _TOTAL_BITS
_PLACE = np.uint64(_TOTAL - 1)
_TOTAL_SHIFT = np.uint64(_TOTAL_BITS)
_LOWEST_BITS = 24  # no more than the total's 20 would cost 0.05 %
_LOWEST = np.uint64(1 << _LOWEST_BITS)
_STATE_BYTES = 7
_WORD_BITS = 32
_WORD_SHIFT = np.uint64(_WORD_BITS)
_WORD_BYTES = 4
_LANE_BITS = 8000  # of entropy: the 40 bits that a lane costs on average are 0.5 % of it
_LOG_SCALE = 256
_MOST_STEPS = 1 << 16  # for a step takes microseconds, however few weights are kept


class _Model(NamedTuple):
    """What both directions know of the bytes, by the byte: [256] uint64."""

    frequencies: NDArray[np.uint64]
    starts: NDArray[np.uint64]
    """the sum of the frequencies of the bytes below"""


def encode(mask: NDArray[np.bool_]) -> bytes:
    """The content that tells a mask to those who know its size and how many it keeps.

    mask: [size] bool. Raises `ValueError` for another shape or dtype.
    """
    if mask.ndim != 1 or mask.dtype != np.bool_:
        raise ValueError(f"a mask of shape {mask.shape} and dtype {mask.dtype}, not [size] bool")
    kept = int(np.count_nonzero(mask))
    if kept in (0, mask.size):
        return b""
    packed = np.packbits(mask, bitorder="little")
    model = _model(mask.size, kept)
    num_lanes = _num_lanes(mask.size, kept)
    limits = model.frequencies << np.uint64(_LOWEST_BITS + _WORD_BITS - _TOTAL_BITS)
    gains = np.uint64(_TOTAL) - model.frequencies
    states = np.full(num_lanes, _LOWEST, np.uint64)
    words: list[bytes] = []
    for start in reversed(range(0, len(packed), num_lanes)):
        step = packed[start : start + num_lanes]
        state = states[: len(step)]
        full = (state >= limits.take(step)).nonzero()[0]
        if len(full):
            overflow = state[full]
            words.append(overflow.astype("<u4").tobytes())  # the low halves
            state[full] = overflow >> _WORD_SHIFT
        # M (x / F) + x mod F = x + (x / F) (M - F)
        quotient = state // model.frequencies.take(step)
        state += quotient * gains.take(step) + model.starts.take(step)
    heads = states.astype("<u8").view(np.uint8).reshape(num_lanes, 8)[:, :_STATE_BYTES]
    return heads.tobytes() + b"".join(reversed(words))


def decode(content: bytes, *, size: int, kept: int) -> NDArray[np.bool_]:
    """The mask of `size` weights, [size] bool, of which `kept` are `True`.

    Raises `ValueError` for all that `encode` does not make of such a mask.
    """
    if not 0 <= kept <= size:
        raise ValueError(f"a mask cannot keep {kept} of {size} weights")
    if kept in (0, size):
        if content:
            raise ValueError(f"{len(content)} bytes for a mask that keeps {kept} of {size}")
        return np.full(size, kept > 0)
    packed = _read(content, size=size, kept=kept)
    if size % 8 and packed[-1] >> size % 8:
        raise ValueError("bits beyond the last weight")
    mask = np.unpackbits(packed, count=size, bitorder="little").view(np.bool_)
    found = int(np.count_nonzero(mask))
    if found != kept:
        raise ValueError(f"the mask keeps {found} weights, not {kept}")
    return mask


def _read(content: bytes, *, size: int, kept: int) -> NDArray[np.uint8]:
    """The bytes of the packed mask. Raises `ValueError` where states or words are amiss."""
    num_lanes, num_bytes = _num_lanes(size, kept), (size + 7) // 8
    states, words = _split(content, num_lanes, num_bytes)
    model = _model(size, kept)
    symbols = np.repeat(np.arange(256, dtype=np.uint8), model.frequencies.astype(np.int64))
    packed = np.empty(num_bytes, np.uint8)
    num_read = 0
    for start in range(0, num_bytes, num_lanes):
        step = packed[start : start + num_lanes]
        state = states[: len(step)]
        place = state & _PLACE
        step[:] = symbols[place]
        state >>= _TOTAL_SHIFT
        state *= model.frequencies.take(step)
        state += place - model.starts.take(step)
        low = (state < _LOWEST).nonzero()[0]
        if len(low):
            new = words[num_read : num_read + len(low)]
            if len(new) < len(low):
                raise ValueError("the content ends before the mask does")
            state[low] = state[low] << _WORD_SHIFT | new
            num_read += len(low)
    if num_read < len(words):
        raise ValueError(f"{_WORD_BYTES * (len(words) - num_read)} bytes after the mask's end")
    if (states != _LOWEST).any():
        raise ValueError("the mask's end is not where its coding began")
    return packed


def _split(
    content: bytes, num_lanes: int, num_bytes: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    """The lanes' states and the words. Raises `ValueError` where they cannot be that."""
    length = len(content) - _STATE_BYTES * num_lanes
    # A byte takes at most one word.
    if not 0 <= length <= _WORD_BYTES * num_bytes or length % _WORD_BYTES:
        raise ValueError(f"{len(content)} bytes cannot hold {num_lanes} states and their words")
    states = np.zeros((num_lanes, 8), np.uint8)
    heads = np.frombuffer(content, np.uint8, count=_STATE_BYTES * num_lanes)
    states[:, :_STATE_BYTES] = heads.reshape(num_lanes, _STATE_BYTES)
    numbers = states.view("<u8").reshape(num_lanes).astype(np.uint64)
    if (numbers < _LOWEST).any():
        raise ValueError(f"a state is below {_LOWEST}")
    return numbers, np.frombuffer(content, "<u4", offset=_STATE_BYTES * num_lanes)


def _model(size: int, kept: int) -> _Model:
    """How often each byte is expected, in parts of 2^20."""
    by_ones = [
        1 + (_TOTAL - 256) * kept**ones * (size - kept) ** (8 - ones) // size**8
        for ones in range(9)
    ]
    frequencies = np.array([by_ones[byte.bit_count()] for byte in range(256)], np.uint64)
    missing = _TOTAL - int(frequencies.sum())
    frequencies[0 if 2 * kept <= size else 255] += np.uint64(missing)
    return _Model(frequencies, np.cumsum(frequencies) - frequencies)


def _num_lanes(size: int, kept: int) -> int:
    """One for each 8000 bits of entropy, and enough that no lane has more than 65,536 bytes.

    By integers only, so that it is the same everywhere.
    """
    entropy = 0
    for count in (kept, size - kept):
        log = (size**_LOG_SCALE // count**_LOG_SCALE).bit_length() - 1
        entropy += count * log
    num_bytes = (size + 7) // 8
    return max(entropy // _LOG_SCALE // _LANE_BITS, -(-num_bytes // _MOST_STEPS))
