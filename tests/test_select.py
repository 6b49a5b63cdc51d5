"""`select_largest` against an independent sort, on every kind of float."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from pruning import keys, select
from pruning.select import select_largest

FLOAT32 = st.floats(width=32, allow_nan=False)  # infinities and subnormal numbers included
FLOAT16 = st.floats(width=16, allow_nan=False)
COMMON = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, float("inf"), -float("inf")])
# Chunks that cut a layer, samples that skip scores; or all in one.
SIZES = st.fixed_dictionaries(
    {
        "chunk": st.sampled_from([5, 1 << 20]),
        "sample": st.sampled_from([1, 4, 1 << 18]),
        "few": st.sampled_from([0, 1 << 18]),
    }
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@contextmanager
def with_sizes(chunk: int, sample: int = 1 << 18, few: int = 1 << 18) -> Iterator[None]:
    """Smaller chunks and samples, and fewer keys that are held, than is quick."""
    with mock.patch.object(keys, "_CHUNK", chunk):
        with mock.patch.multiple(select, _SAMPLE=sample, _FEW=few):
            yield


@st.composite
def layers(draw: st.DrawFn, dtypes: list[torch.dtype] = DTYPES) -> dict[str, Tensor]:
    """One to four layers of up to twelve scores, rich in ties, in an order that is not sorted."""
    names = draw(st.permutations(["d", "b", "c", "a"]))[: draw(st.integers(1, 4))]
    dtype = draw(st.sampled_from(dtypes))
    values = FLOAT32 if dtype == torch.float32 else FLOAT16
    lists = {name: draw(st.lists(values | COMMON, max_size=12)) for name in names}
    return {name: torch.tensor(scores, dtype=dtype) for name, scores in lists.items()}


def by_sorting(
    scores: dict[str, Tensor], count: int, within: dict[str, Tensor] | None = None
) -> dict[str, NDArray[np.bool_]]:
    """The same choice by one stable sort: larger first, then the earlier layer and index."""
    values = np.concatenate([s.double().numpy().ravel() for s in scores.values()])
    candidates = np.ones(len(values), dtype=bool)
    if within is not None:
        candidates = np.concatenate([within[name].numpy().ravel() for name in scores])
    order = np.lexsort((np.arange(len(values)), -values))
    chosen = np.zeros(len(values), dtype=bool)
    chosen[[i for i in order if candidates[i]][:count]] = True
    cuts = np.cumsum([s.numel() for s in scores.values()])[:-1]
    parts = np.split(chosen, cuts)
    return {
        name: part.reshape(tuple(scores[name].shape))
        for name, part in zip(scores, parts, strict=True)
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, NDArray[np.bool_]]) -> None:
    """Equal bits in an equal order of layers."""
    assert list(found) == list(expected)
    for name, mask in found.items():
        assert mask.dtype == torch.bool
        assert mask.tolist() == expected[name].tolist(), name


@given(data=st.data(), scores=layers(), sizes=SIZES)
@settings(max_examples=80)
def test_the_choice_is_that_of_a_stable_sort(
    data: st.DataObject, scores: dict[str, Tensor], sizes: dict[str, int]
) -> None:
    """Ties, signs, both zeros, infinities, subnormals; float32, float16, bfloat16; any chunk."""
    count = data.draw(st.integers(0, sum(s.numel() for s in scores.values())))
    with with_sizes(**sizes):
        assert_same(select_largest(scores, count), by_sorting(scores, count))


@given(data=st.data(), scores=layers(), sizes=SIZES)
@settings(max_examples=80)
def test_the_choice_within_candidates_is_that_of_a_stable_sort(
    data: st.DataObject, scores: dict[str, Tensor], sizes: dict[str, int]
) -> None:
    """Nothing outside is selected, however large its score."""
    within = {
        name: torch.tensor(
            data.draw(st.lists(st.booleans(), min_size=len(s), max_size=len(s))), dtype=torch.bool
        )
        for name, s in scores.items()
    }
    count = data.draw(st.integers(0, sum(int(mask.sum()) for mask in within.values())))
    with with_sizes(**sizes):
        assert_same(select_largest(scores, count, within), by_sorting(scores, count, within))


@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=30), data=st.data())
@settings(max_examples=80)
def test_scores_that_differ_in_one_bit_are_told_apart(bits: list[int], data: st.DataObject) -> None:
    """Any bit pattern of a float32 that is a number, and its neighbours in either half-word."""
    patterns = np.array(bits + [b ^ 1 for b in bits] + [b ^ (1 << 16) for b in bits], dtype="u4")
    values = patterns.view(np.float32)
    scores = {"w": torch.from_numpy(values[~np.isnan(values)].copy())}
    count = data.draw(st.integers(0, scores["w"].numel()))
    assert_same(select_largest(scores, count), by_sorting(scores, count))


def selected(values: list[float], count: int) -> list[int]:
    """The indices that are chosen of one layer."""
    return select_largest({"w": torch.tensor(values)}, count)["w"].nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("values", "count", "chosen"),
    [
        ([3, 1, 2, 5, 4, 0, 7, 6], 3, [3, 6, 7]),
        ([3, 1, 2, 5, 4, 0, 7, 6], 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        ([3, 1, 2, 5, 4, 0, 7, 6], 0, []),
        ([1, 1, 1, 1, 1, 1, 1, 1], 3, [0, 1, 2]),
        ([1, 2, 1, 2, 1, 2, 1, 2], 5, [0, 1, 3, 5, 7]),
        ([-1, -2, -3, -4, -5, -6, -7, -8], 2, [0, 1]),
        ([-1, 1, -1, 1, 0, 0, -1, 1], 4, [1, 3, 4, 7]),
        ([-0.0, 0.0, -0.0, 0.0, -1, -1, -1, -1], 3, [0, 1, 2]),
        ([1e-45, 0.0, -1e-45, 3e-45, 1e-45, 0, 0, 0], 3, [0, 3, 4]),
        ([float("inf"), 3.4e38, -float("inf"), float("inf"), 1, 0, -3.4e38, 2], 3, [0, 1, 3]),
        ([float("-inf")] * 8, 5, [0, 1, 2, 3, 4]),
    ],
)
def test_of_eight_weights_these_are_kept(
    values: list[float], count: int, chosen: list[int]
) -> None:
    """The truth table: largest first, ties by index, both zeros equal."""
    assert selected([float(v) for v in values], count) == chosen


def test_ties_break_by_layer_order_and_not_by_name() -> None:
    """The mapping's own order is the layers' order."""
    scores = {"z": torch.ones(2, 2), "a": torch.ones(3)}
    found = select_largest(scores, 5)
    assert found["z"].tolist() == [[True, True], [True, True]]
    assert found["a"].tolist() == [True, False, False]


def test_ties_break_by_index_and_not_by_place_in_memory() -> None:
    """A channels_last layer gives the same choice as a contiguous one."""
    generator = torch.Generator().manual_seed(0)
    score = torch.randint(0, 4, (3, 4, 2, 5), generator=generator).float()
    within = torch.rand(3, 4, 2, 5, generator=generator) < 0.7
    last = score.to(memory_format=torch.channels_last)
    assert last.stride() != score.stride()
    for count in (1, 17, 40, 60):
        expected = select_largest({"w": score}, count, {"w": within})["w"]
        assert torch.equal(select_largest({"w": last}, count, {"w": within})["w"], expected)
        other = within.to(memory_format=torch.channels_last)
        assert torch.equal(select_largest({"w": score}, count, {"w": other})["w"], expected)


def test_a_scalar_layer_and_an_empty_layer_take_part() -> None:
    """Shapes () and (0, 3) come back as they went in."""
    found = select_largest({"s": torch.tensor(2.0), "e": torch.ones(0, 3), "w": torch.ones(2)}, 2)
    assert found["s"].tolist() is True
    assert found["e"].shape == (0, 3)
    assert found["w"].tolist() == [True, False]


def test_scores_are_compared_in_float32() -> None:
    """A float64 beyond its precision is a tie, one beyond its range an infinity."""
    close = torch.tensor([1.0, 1.0 + 1e-12, 1.0 + 1e-6], dtype=torch.float64)
    assert select_largest({"w": close}, 2)["w"].tolist() == [True, False, True]
    large = torch.tensor([1e300, float("inf"), 1e301], dtype=torch.float64)
    assert select_largest({"w": large}, 2)["w"].tolist() == [True, True, False]


def test_the_scores_are_not_changed() -> None:
    """Not even a negative zero."""
    score = torch.tensor([-0.0, 1.0, -2.0])
    select_largest({"w": score}, 1)
    assert torch.signbit(score).tolist() == [True, False, True]
    assert score.tolist() == [0.0, 1.0, -2.0]


@pytest.mark.parametrize("size", [(1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_a_layer_larger_than_a_chunk_is_exact(size: int) -> None:
    """On both sides of the real boundary, with ties across it."""
    score = torch.zeros(size)
    score[-2:] = 1
    mask = select_largest({"w": score}, size - 1)["w"]
    assert int(mask.sum()) == size - 1
    assert not mask[-3]
    assert bool(mask[-2:].all())


def random_layers() -> Iterator[dict[str, Tensor]]:
    """Normal scores, and the same rounded to few values so that most of them tie."""
    generator = torch.Generator().manual_seed(0)
    scores = {
        name: torch.randn(n, 50, generator=generator)
        for name, n in [("c", 40), ("a", 3), ("b", 90)]
    }
    yield scores
    yield {name: (s * 4).round() for name, s in scores.items()}


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_thousands_of_scores_are_chosen_as_by_sorting(fraction: float) -> None:
    """6,650 scores in three layers, with chunks that cut them unevenly."""
    for scores in random_layers():
        count = round(6650 * fraction)
        with with_sizes(chunk=999):
            found = select_largest(scores, count)
        assert sum(int(mask.sum()) for mask in found.values()) == count
        assert_same(found, by_sorting(scores, count))


@pytest.mark.parametrize("stride_is_large", [True, False])
def test_a_sample_that_misleads_costs_time_only(stride_is_large: bool) -> None:
    """Every tenth score, which is all that the sample sees, is unlike the others."""
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(30_000, generator=generator)
    score[::10] += 5 if stride_is_large else -5
    scores = {"w": score}
    with with_sizes(chunk=999, sample=3000):
        for count in (1, 2000, 3000, 3001, 15_000, 29_999):
            assert_same(select_largest(scores, count), by_sorting(scores, count))


def test_tensors_are_handled_as_arrays_are() -> None:
    """What runs on a GPU, in NumPy's place: the same choice."""
    with mock.patch.object(keys, "_array", lambda tensor: tensor):
        for scores in random_layers():
            within = {name: score > -0.5 for name, score in scores.items()}
            for few in (0, 1 << 18):
                with with_sizes(chunk=999, sample=500, few=few):
                    assert_same(select_largest(scores, 3000), by_sorting(scores, 3000))
                    found = select_largest(scores, 1000, within)
                    assert_same(found, by_sorting(scores, 1000, within))


MEMORY = """
import torch
from pruning.select import select_largest

def kib(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

size = 1 << 26
scores = {"a": torch.empty(size // 2).normal_(), "b": torch.empty(size // 2).normal_()}
select_largest({"a": scores["a"][:1000]}, 10)
before = kib("VmRSS")
mask = select_largest(scores, size // 5)
print((kib("VmHWM") - before) * 1024 / size)
assert sum(int(torch.count_nonzero(m)) for m in mask.values()) == size // 5
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_selection_needs_little_more_memory_than_its_result() -> None:
    """64 million scores: the result takes a byte each, all else less than half a byte."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0.9 < float(done.stdout) < 1.5


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_a_score_that_is_not_a_number_is_refused(dtype: torch.dtype, count: int) -> None:
    """By the name of its layer, whatever the count."""
    scores = {"a": torch.ones(2, dtype=dtype), "fc.weight": torch.ones(2, dtype=dtype)}
    scores["fc.weight"][1] = float("nan")
    with pytest.raises(ValueError, match=r"the score of fc\.weight is not a number"):
        select_largest(scores, count)


@pytest.mark.parametrize("count", [-1, 6])
def test_a_count_that_cannot_be_met_is_refused(count: int) -> None:
    """With the number asked for and the number there."""
    with pytest.raises(ValueError, match=f"cannot select {count} of 5 scores"):
        select_largest({"a": torch.ones(2), "b": torch.ones(3)}, count)


def test_only_candidates_count_as_available() -> None:
    """Two of four are candidates, so that three cannot be met."""
    within = {"a": torch.tensor([True, False, True, False])}
    with pytest.raises(ValueError, match="cannot select 3 of 2 scores"):
        select_largest({"a": torch.ones(4)}, 3, within)
