"""The coding of masks: exact, near the entropy, and closed to whatever it would not write."""

import hashlib
import math
import tracemalloc
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pruning import mask_codec
from pruning.mask_codec import decode, encode

Mask = NDArray[np.bool_]
# Bits a lane and steps: the usual ones, and such that few weights make many lanes.
LANES = st.sampled_from([(8000, 1 << 16), (64, 1 << 16), (8000, 7), (8, 1)])


def random_mask(size: int, kept: int, seed: int = 0) -> Mask:
    """`kept` of `size` weights, anywhere."""
    mask = np.arange(size) < kept
    np.random.default_rng(seed).shuffle(mask)
    return mask


def spread(size: int) -> Mask:
    """About a fifth of the weights, chosen by arithmetic that is the same everywhere."""
    return np.array([(i * i * 2654435761 >> 7) % 1009 < 202 for i in range(size)])


def entropy_bytes(size: int, kept: int) -> float:
    """n H(k), in bytes."""
    counts = [count for count in (kept, size - kept) if count]
    return sum(count * math.log2(size / count) for count in counts) / 8


def read_by_the_book(content: bytes, size: int, kept: int, lanes: int) -> list[bool]:
    """A reader in plain integers, written from the module's specification of the coding."""
    total, lowest, num_bytes = 1 << 20, 1 << 24, -(-size // 8)
    ones = [bin(byte).count("1") for byte in range(256)]
    often = [1 + (total - 256) * kept**j * (size - kept) ** (8 - j) // size**8 for j in ones]
    often[0 if 2 * kept <= size else 255] += total - sum(often)
    symbols = [byte for byte in range(256) for _ in range(often[byte])]
    below = [sum(often[:byte]) for byte in range(256)]
    x = [int.from_bytes(content[7 * i : 7 * i + 7], "little") for i in range(lanes)]
    place, packed = 7 * lanes, 0
    for i in range(num_bytes):
        lane = i % lanes
        rest = x[lane] % total
        byte = symbols[rest]
        x[lane] = often[byte] * (x[lane] // total) + rest - below[byte]
        if x[lane] < lowest:
            x[lane] = 2**32 * x[lane] + int.from_bytes(content[place : place + 4], "little")
            place += 4
        packed |= byte << 8 * i
    assert x == [lowest] * lanes
    assert place == len(content)
    return [bool(packed >> i & 1) for i in range(size)]


@given(data=st.data(), size=st.integers(1, 5000), seed=st.integers(0, 2**32), lanes=LANES)
@settings(max_examples=100)
def test_a_mask_comes_back(
    data: st.DataObject, size: int, seed: int, lanes: tuple[int, int]
) -> None:
    """Of any size and any density, over one lane or as many as there are bytes."""
    mask = random_mask(size, data.draw(st.integers(0, size)), seed)
    with mock.patch.multiple(mask_codec, _LANE_BITS=lanes[0], _MOST_STEPS=lanes[1]):
        content = encode(mask)
        found = decode(content, size=size, kept=int(mask.sum()))
    assert found.dtype == np.bool_
    assert np.array_equal(found, mask)


@given(bits=st.lists(st.booleans(), max_size=40))
@settings(max_examples=100)
def test_a_small_mask_comes_back(bits: list[bool]) -> None:
    """Of forty weights or fewer, down to none."""
    mask = np.array(bits, bool)
    assert decode(encode(mask), size=len(bits), kept=sum(bits)).tolist() == bits


@pytest.mark.parametrize("size", [0, 1, 8, 1001])
def test_a_mask_that_keeps_all_or_nothing_takes_no_bytes(size: int) -> None:
    """The count tells all; a byte more is refused."""
    for mask in (np.zeros(size, bool), np.ones(size, bool)):
        kept = int(mask.sum())
        assert encode(mask) == b""
        assert np.array_equal(decode(b"", size=size, kept=kept), mask)
        with pytest.raises(ValueError, match=f"1 bytes for a mask that keeps {kept} of {size}"):
            decode(b"\0", size=size, kept=kept)


@pytest.mark.parametrize("kept", [1, 999_999, 500_000])
def test_a_mask_unlike_any_random_one_comes_back(kept: int) -> None:
    """All kept weights come first: bytes that the model holds for all but impossible."""
    mask = np.arange(1_000_003) < kept
    assert np.array_equal(decode(encode(mask), size=len(mask), kept=kept), mask)


@pytest.mark.parametrize("density", [0.01, 0.05, 0.2, 0.5, 0.9])
def test_a_million_weights_take_a_hundredth_more_than_their_entropy(density: float) -> None:
    """Kept independently of each other."""
    mask = np.random.default_rng(0).random(1_000_000) < density
    kept = int(mask.sum())
    content = encode(mask)
    assert len(content) <= 1.01 * entropy_bytes(mask.size, kept)
    assert np.array_equal(decode(content, size=mask.size, kept=kept), mask)


@pytest.mark.parametrize("kept", [1, 10, 1000])
def test_a_small_layer_takes_a_state_more_than_its_entropy(kept: int) -> None:
    """2,304 weights: 7 bytes, and what the last word has left."""
    assert len(encode(random_mask(2304, kept))) <= entropy_bytes(2304, kept) + 7 + 4


def test_a_layer_is_read_by_the_book() -> None:
    """By an independent reader: nine lanes, of which the last step fills two."""
    mask = spread(100_019)
    content = encode(mask)
    kept = int(mask.sum())
    assert read_by_the_book(content, mask.size, kept, lanes=9) == mask.tolist()


def test_the_content_is_what_it_was_in_the_first_release() -> None:
    """A file's bytes must not change while its digest stands elsewhere."""
    content = encode(spread(100_019))
    assert len(content) == 9_199
    assert (
        hashlib.sha256(content).hexdigest()
        == "81e589e14c4189f063a4d252994fa5050c0499aa6b1cbefe0c60ed618571dbf1"
    )


@pytest.mark.parametrize(
    ("size", "kept", "lanes"),
    [
        (8, 1, 1),
        (524_288, 1, 1),
        (524_289, 1, 2),
        (20_000, 100, 1),
        (100_000, 10_000, 5),
        (2_359_296, 471_859, 212),
        (2_359_296, 1_179_648, 294),
        (11_200_000, 112_000, 109),
    ],
)
def test_lanes_follow_from_size_and_count(size: int, kept: int, lanes: int) -> None:
    """As the format says: one for 8,000 bits of entropy, none with more than 65,536 bytes."""
    assert mask_codec._num_lanes(size, kept) == lanes
    assert mask_codec._num_lanes(size, size - kept) == lanes


@pytest.mark.parametrize("kept", [1, 7, 300, 50_000, 99_996, 100_002])
def test_every_byte_can_be_written(kept: int) -> None:
    """The frequencies are positive, alike for bytes of as many ones, and fill the total."""
    frequencies, starts = mask_codec._model(100_003, kept)
    assert frequencies.min() >= 1
    assert frequencies.sum() == 1 << 20
    assert starts.tolist() == [int(frequencies[:byte].sum()) for byte in range(256)]
    assert frequencies[0b1000_0001] == frequencies[0b0001_1000]


SMALL = random_mask(203, 60)
WIDE = random_mask(40_001, 9000, seed=1)


@pytest.mark.parametrize("mask", [SMALL, WIDE], ids=["one lane", "three lanes"])
def test_content_that_is_cut_or_extended_is_refused(mask: Mask) -> None:
    """By any number of bytes at the end, or by a word within."""
    content, kept = encode(mask), int(mask.sum())
    num_bytes = len(content)
    wrong = [content[:stop] for stop in {0, 1, *range(num_bytes - 9, num_bytes)}]
    wrong += [content + bytes(extra) for extra in (1, 2, 3, 4, 7, 8, 1 << 20)]
    wrong += [content[:21] + content[25:], content[:21] + bytes(4) + content[21:]]
    for other in wrong:
        with pytest.raises(ValueError, match=r"\w"):
            decode(other, size=mask.size, kept=kept)


def test_a_flipped_bit_is_refused_or_gives_another_mask() -> None:
    """Another of as many weights, which is the one that has this content: a digest finds it."""
    content, kept = encode(SMALL), int(SMALL.sum())
    num_refused = 0
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            found = decode(bytes(flipped), size=SMALL.size, kept=kept)
        except ValueError:
            num_refused += 1
        else:
            assert not np.array_equal(found, SMALL)
            assert encode(found) == bytes(flipped)
    assert num_refused > 7.9 * len(content)


@pytest.mark.parametrize(("size", "kept"), [(203, 59), (203, 61), (202, 60), (204, 60), (5, 3)])
def test_content_is_refused_for_another_size_or_count(size: int, kept: int) -> None:
    """Each gives other frequencies."""
    with pytest.raises(ValueError, match=r"\w"):
        decode(encode(SMALL), size=size, kept=kept)


@pytest.mark.parametrize(("size", "kept"), [(10, 11), (10, -1), (-1, 0), (-8, -8)])
def test_a_count_that_a_mask_cannot_have_is_refused(size: int, kept: int) -> None:
    """With both numbers."""
    with pytest.raises(ValueError, match=f"a mask cannot keep {kept} of {size} weights"):
        decode(b"", size=size, kept=kept)


def coded_as(packed: list[int], size: int, kept: int) -> bytes:
    """What a dishonest writer makes of the bytes of a packed mask."""
    mask = np.unpackbits(np.array(packed, np.uint8), bitorder="little").view(np.bool_)
    model, lanes = mask_codec._model(size, kept), mask_codec._num_lanes(size, kept)
    with mock.patch.multiple(mask_codec, _model=lambda *_: model, _num_lanes=lambda *_: lanes):
        return encode(mask)


def test_bits_beyond_the_last_weight_are_refused() -> None:
    """Though the coding is sound and the count within the mask is right."""
    assert decode(coded_as([0b111, 0b11], 11, 5), size=11, kept=5).sum() == 5
    with pytest.raises(ValueError, match="bits beyond the last weight"):
        decode(coded_as([0b111, 0b1011], 11, 5), size=11, kept=5)


def test_another_count_than_announced_is_refused() -> None:
    """Though the coding is sound."""
    with pytest.raises(ValueError, match="the mask keeps 6 weights, not 5"):
        decode(coded_as([0b1111, 0b11], 11, 5), size=11, kept=5)


def test_a_state_that_no_writer_leaves_is_refused() -> None:
    """One below the least."""
    with pytest.raises(ValueError, match="a state is below 16777216"):
        decode(bytes(7), size=11, kept=5)


@given(data=st.data(), size=st.integers(1, 300), content=st.binary(max_size=100))
@settings(max_examples=300)
def test_hostile_bytes_raise_nothing_but_value_errors(
    data: st.DataObject, size: int, content: bytes
) -> None:
    """What is read after all is what would be written."""
    kept = data.draw(st.integers(0, size))
    try:
        found = decode(content, size=size, kept=kept)
    except ValueError:
        return
    assert encode(found) == content


@pytest.mark.parametrize("density", [0.0001, 0.2, 0.9])
def test_random_words_of_the_right_length_are_refused(density: float) -> None:
    """For many lanes, from which words are taken until none is left."""
    generator = np.random.default_rng(3)
    size = 100_003
    kept = round(size * density)
    length = len(encode(random_mask(size, kept)))
    for extra in (0, 0, 0, -400, 4000):
        content = generator.bytes(max(length + extra, length % 4 + 8))
        with pytest.raises(ValueError, match=r"\w"):
            decode(content, size=size, kept=kept)


def test_hostile_content_takes_no_memory() -> None:
    """Too short a content for the size it claims, or too long a one, is refused at once."""
    tracemalloc.start()
    long = bytes(1 << 24)
    before = tracemalloc.get_traced_memory()[0]
    for content, size, kept in [(bytes(100), 10**13, 10**12), (b"", 10**13, 1), (long, 99, 5)]:
        with pytest.raises(ValueError, match="bytes cannot hold"):
            decode(content, size=size, kept=kept)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("mask", [np.zeros((2, 3), bool), np.zeros(3, np.uint8)])
def test_only_flat_masks_are_written(mask: Mask) -> None:
    """Others are flattened or compared by who has them."""
    with pytest.raises(ValueError, match=r"not \[size\] bool"):
        encode(mask)
