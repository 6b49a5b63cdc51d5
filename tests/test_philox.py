"""Philox 4x32-10 against its published answers and against itself in plain integers."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pruning.philox import philox4x32, signs, uniforms, words

WORD = st.integers(0, 2**32 - 1)


def block_of(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """Ten rounds by Python's integers, as the paper has them."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def word_of(place: int, *, seed: int, layer: int, stream: int) -> int:
    """The word at a place of a sequence."""
    block = place // 4
    counter = (block % 2**32, block // 2**32, stream, 0)
    return block_of(counter, (seed, layer))[place % 4]


def hexadecimal(numbers: NDArray[np.uint32] | list[int]) -> str:
    """As the known answers are written."""
    return " ".join(f"{int(number):08x}" for number in numbers)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([2**32 - 1] * 4, (2**32 - 1, 2**32 - 1), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_known_answers_of_random123(
    counter: list[int], key: tuple[int, int], answer: str
) -> None:
    """For `philox4x32` with ten rounds; the test's own integers give them too."""
    assert hexadecimal(philox4x32(np.array([counter], np.uint32), key)[0]) == answer
    c0, c1, c2, c3 = counter
    assert hexadecimal(block_of((c0, c1, c2, c3), key)) == answer


@given(counters=st.lists(st.tuples(WORD, WORD, WORD, WORD), max_size=5), key=st.tuples(WORD, WORD))
def test_each_block_is_that_of_plain_integers(
    counters: list[tuple[int, int, int, int]], key: tuple[int, int]
) -> None:
    """Whatever blocks stand beside it; the counters are left as they are."""
    blocks = np.array(counters, np.uint32).reshape(-1, 4)
    found = philox4x32(blocks, key)
    assert found.dtype == np.uint32
    assert found.tolist() == [block_of(counter, key) for counter in counters]
    assert blocks.tolist() == [list(counter) for counter in counters]


@pytest.mark.parametrize("start", [0, 1, 7, 2**34 - 6, 2**34 + 5, 2**66 - 11])
def test_words_count_their_blocks_in_64_bits(start: int) -> None:
    """On both sides of the place where the low half of the block's number is full."""
    found = words(11, seed=5, layer=3, stream=2, start=start)
    places = range(start, start + 11)
    assert found.tolist() == [word_of(place, seed=5, layer=3, stream=2) for place in places]


LONG = 100_003  # more than three chunks of blocks


@given(start=st.integers(0, LONG), length=st.integers(0, LONG))
@settings(max_examples=40)
def test_a_part_of_a_sequence_is_the_same_part_of_a_longer_one(start: int, length: int) -> None:
    """For words and for signs, wherever the part begins within a block or a word."""
    stop = min(start + length, LONG)
    whole = words(LONG, seed=1, layer=2, stream=0)
    part = words(stop - start, seed=1, layer=2, stream=0, start=start)
    assert np.array_equal(part, whole[start:stop])
    bits = signs(LONG, seed=1, layer=2)
    assert np.array_equal(signs(stop - start, seed=1, layer=2, start=start), bits[start:stop])


def test_a_sign_is_a_bit_of_a_word_the_lowest_first() -> None:
    """Weight i has bit i % 32 of word i // 32 of stream 0, by the test's own integers."""
    found = signs(1003, seed=20260, layer=17)
    assert found.dtype == np.bool_
    made = [word_of(place, seed=20260, layer=17, stream=0) for place in range(32)]
    assert found.tolist() == [bool(made[i // 32] >> i % 32 & 1) for i in range(1003)]


def test_signs_are_what_they_were_in_the_first_release() -> None:
    """A million of them, and the first forty to be seen."""
    found = signs(1_000_000, seed=20260, layer=17)
    assert (
        "".join("-+"[int(sign)] for sign in found[:40])
        == "+++--+-+-+-+++--++++++-+---++++-++--+---"
    )
    assert (
        hashlib.sha256(np.packbits(found, bitorder="little").tobytes()).hexdigest()
        == "047082247c6705ff1dc6bacc2de8036c4df99f730e1feccdb27afe0154780d1f"
    )


def test_signs_are_balanced() -> None:
    """Within four standard deviations of a half, over all and at each bit of a word."""
    found = signs(32 * 40_000, seed=0, layer=0).reshape(-1, 32)
    assert abs(found.mean() - 0.5) < 4 * 0.5 / found.size**0.5
    assert (np.abs(found.mean(axis=0) - 0.5) < 4 * 0.5 / len(found) ** 0.5).all()


def test_sequences_of_other_seeds_layers_and_streams_are_unlike() -> None:
    """Two of them agree in a word no more often than by chance, which is never here."""
    names = [(s, la, st) for s in (0, 1, 2**32 - 1) for la in (0, 1, 7) for st in (0, 1, 2)]
    found = [words(100, seed=s, layer=la, stream=st) for s, la, st in names]
    for index, one in enumerate(found):
        assert all((one != other).all() for other in found[:index])


def test_uniforms_are_words_that_never_reach_an_end() -> None:
    """Exactly (word + 0.5) / 2^32; the ends of the interval are out of reach of any word."""
    found = uniforms(100_000, seed=4, layer=1, stream=3)
    assert found.dtype == np.float64
    made = words(100_000, seed=4, layer=1, stream=3)
    assert [value * 2**32 - 0.5 for value in found[:1000].tolist()] == made[:1000].tolist()
    assert abs(found.mean() - 0.5) < 4 * (1 / 12) ** 0.5 / len(found) ** 0.5
    assert 0 < (0 + 0.5) / 2**32 < (2**32 - 1 + 0.5) / 2**32 < 1


def test_nothing_asked_for_is_an_empty_array() -> None:
    """Of the right type."""
    assert words(0, seed=0, layer=0, stream=0, start=2**66).dtype == np.uint32
    assert signs(0, seed=0, layer=0, start=5).shape == (0,)
    assert uniforms(0, seed=0, layer=0, stream=0).shape == (0,)


@pytest.mark.parametrize("name", ["seed", "layer", "stream"])
@pytest.mark.parametrize("value", [-1, 2**32])
def test_a_number_that_is_no_word_is_refused_by_name(name: str, value: int) -> None:
    """With the range that is allowed."""
    numbers = {"seed": 0, "layer": 0, "stream": 0, name: value}
    with pytest.raises(ValueError, match=rf"{name} is {value}: expected a number in \[0, 2\^32\)"):
        words(1, **numbers)


@pytest.mark.parametrize(("count", "start"), [(-1, 0), (1, -1), (1, 2**66), (5, 2**66 - 4)])
def test_words_outside_a_sequence_are_refused(count: int, start: int) -> None:
    """A count or a place below zero, or beyond the last of 2^66 words."""
    with pytest.raises(ValueError, match=f"{count} words from word {start} on"):
        words(count, seed=0, layer=0, stream=0, start=start)


@pytest.mark.parametrize(("count", "start"), [(-1, 0), (-1, 40), (1, -1)])
def test_signs_of_a_negative_place_are_refused(count: int, start: int) -> None:
    """Rather than taken from another word."""
    with pytest.raises(ValueError, match="neither may be negative"):
        signs(count, seed=0, layer=0, start=start)


def test_other_shapes_than_blocks_are_refused() -> None:
    """And a key that is too wide."""
    with pytest.raises(ValueError, match=r"counters have the shape \(4,\), not \[N, 4\]"):
        philox4x32(np.zeros(4, np.uint32), (0, 0))
    with pytest.raises(ValueError, match=r"key\[1\] is 4294967296"):
        philox4x32(np.zeros((1, 4), np.uint32), (0, 2**32))
