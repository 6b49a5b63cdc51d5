"""Selection on many ranks, each with its share, is selection on one."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from processes import run_ranks
from torch import Tensor

from pruning.allocate import keep_count, keep_counts, prune_fraction
from pruning.masks import Masks
from pruning.select import select_largest
from pruning.shares import cut, join
from train.engine import Engine
from train.ranks import ALONE, Ranks

Scores = dict[str, Tensor]


def by_sorting(scores: Scores, count: int, within: Scores | None) -> Scores:
    """One stable sort: larger first, then the earlier layer and index."""
    values = np.concatenate([s.double().numpy().ravel() for s in scores.values()])
    order = np.lexsort((np.arange(len(values)), -values))
    if within is not None:
        candidate = np.concatenate([within[name].numpy().ravel() for name in scores])
        order = order[candidate[order]]
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[order[:count].copy()] = True
    parts = chosen.split([s.numel() for s in scores.values()])
    return {name: p.view(s.shape) for (name, s), p in zip(scores.items(), parts, strict=True)}


def cases() -> Iterator[tuple[Scores, Scores | None, list[int]]]:
    """Scores of many kinds, candidates or none, and counts to select."""
    generator = torch.Generator().manual_seed(0)
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, float("inf"), -float("inf"), 1.0, -1.0])
    shapes = {"z": (7, 9), "empty": (0, 3), "s": (), "a": (4, 3, 3, 3), "b": (5,)}

    def signed(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator)

    kinds: list[Callable[[tuple[int, ...]], Tensor]] = [
        signed,
        lambda shape: signed(shape).abs(),
        lambda shape: signed(shape).bfloat16(),
        lambda shape: (signed(shape) * 2).round(),
        lambda shape: signed(shape) * 1e-44,
        lambda shape: special[torch.randint(0, 8, shape, generator=generator)],
        torch.zeros,
    ]
    for kind in kinds:
        scores = {name: kind(shape) for name, shape in shapes.items()}
        for density in (None, 0.6, 0.0):
            within = None
            if density is not None:
                drawn = {n: torch.rand(s.shape, generator=generator) for n, s in scores.items()}
                within = {n: value < density for n, value in drawn.items()}
            candidates = scores if within is None else within
            total = sum(t.numel() if within is None else int(t.sum()) for t in candidates.values())
            yield scores, within, sorted({0, min(1, total), total // 3, total // 2, total})


def uneven(scores: Scores, ranks: Ranks) -> Scores:
    """Other shares than `cut` gives, some of them empty: all of `z` is on the last rank."""
    shares = {}
    for index, (name, score) in enumerate(scores.items()):
        size = score.numel()
        inner = [size * (rank + index) // 7 % (size + 1) for rank in range(1, ranks.world_size)]
        ends = [0, *(sorted(inner) if index else [0] * len(inner)), size]
        shares[name] = score.flatten()[ends[ranks.rank] : ends[ranks.rank + 1]]
    return shares


def assert_equal(found: Masks | Scores, expected: Masks | Scores) -> None:
    assert list(found) == list(expected)
    for name, mask in found.items():
        assert torch.equal(mask, expected[name]), name


def ranks_select_as_one() -> None:
    engine = Engine()
    num_cases = 0
    for scores, within, counts in cases():
        for count in counts:
            expected = by_sorting(scores, count, within)
            candidates = None if within is None else Masks(within)
            assert_equal(keep_count(scores, count, candidates, engine), expected)
            parts = None if within is None else uneven(within, engine)
            found = select_largest(uneven(scores, engine), count, parts, engine)
            assert_equal(found, uneven(expected, engine))
            num_cases += 1
    assert num_cases >= 60
    engine.close()


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_with_shares_select_what_one_rank_selects(world_size: int) -> None:
    """Ties, both zeros, subnormals, infinities, bfloat16; empty layers, shares and candidates."""
    assert run_ranks(world_size, ranks_select_as_one) == [0] * world_size


def large_layers() -> Scores:
    """More than a sample holds: magnitudes, and values that tie."""
    generator = torch.Generator().manual_seed(1)
    drawn = {n: torch.randn(k, generator=generator) for n, k in [("b", 700_001), ("a", 500_000)]}
    return {"b": drawn["b"].abs(), "a": (drawn["a"] * 8).round() / 8}


def ranks_select_from_large_layers() -> None:
    engine = Engine()
    apart = engine.apart()
    scores = large_layers()
    masks = Masks({name: score > -0.5 for name, score in scores.items()})
    for scope in ("global", "layer"):
        for ranks in (engine, apart):
            found = prune_fraction(scores, masks, 0.3, scope, ranks)  # type: ignore[arg-type]
            assert_equal(found, prune_fraction(scores, masks, 0.3, scope))  # type: ignore[arg-type]
    for name, score in scores.items():
        expected = by_sorting({name: score}, 123_457, None)
        assert_equal(keep_counts({name: score}, {name: 123_457}, None, engine), expected)
    apart.close()
    engine.close()


def test_a_round_of_pruning_is_the_same_on_two_ranks() -> None:
    """Globally and by layer, in the default group and in one apart, beyond the sample's size."""
    assert run_ranks(2, ranks_select_from_large_layers) == [0, 0]


def refused(message: str, ranks: Ranks, scores: Scores, count: int, **options: Scores) -> None:
    with pytest.raises(ValueError, match=message):
        select_largest(scores, count, ranks=ranks, **options)
    ranks.require_same("still in step", "the ranks")


def ranks_refuse_together() -> None:
    engine = Engine()
    last = engine.rank == engine.world_size - 1
    scores = {"conv": torch.ones(8), "fc.weight": torch.ones(5)}
    odd = {"conv": torch.ones(8), "fc.weight": torch.tensor([1.0, float("nan"), 0, 0, 0])}
    for count in (0, 1, 20):
        refused(r"the score of fc\.weight is not a n", engine, odd if last else scores, count)
    refused("cannot select 27 of 26 scores", engine, scores, 27)
    refused("cannot select -1 of 26 scores", engine, scores, -1)
    half = {name: torch.arange(s.numel()) % 2 == 0 for name, s in scores.items()}
    refused("cannot select 17 of 14 scores", engine, scores, 17, within=half)
    refused("different counts", engine, scores, 3 + last)
    refused("among different layers", engine, {"conv": scores["conv"]} if last else scores, 3)
    wrong = {"conv": half["conv"][:7], "fc.weight": half["fc.weight"]} if last else half
    refused("the candidates of conv have the shape", engine, scores, 3, within=wrong)
    engine.close()


def test_what_one_rank_must_refuse_all_refuse() -> None:
    """A NaN on one rank, an impossible count, other requests; nobody is left waiting."""
    assert run_ranks(2, ranks_refuse_together) == [0, 0]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_shares_are_whole_bytes_and_cover_each_tensor_once(world_size: int) -> None:
    """In rank order, also where there are fewer bytes than ranks, whatever the layout."""
    last = torch.randn(3, 4, 2, 5).to(memory_format=torch.channels_last)
    tensors = {"w": last, "e": torch.ones(0, 2), "s": torch.tensor(3.0), "v": torch.randn(1003)}
    shares = [cut(tensors, Ranks(rank, world_size)) for rank in range(world_size)]
    for name, tensor in tensors.items():
        parts = [share[name] for share in shares]
        assert torch.equal(torch.cat(parts), tensor.flatten())
        ends = np.cumsum([part.numel() for part in parts])
        assert all(end % 8 == 0 or end == tensor.numel() for end in ends)


def test_joining_alone_gives_the_whole_back() -> None:
    """Shapes included."""
    masks = {"w": torch.rand(3, 7) < 0.5, "e": torch.ones(0, 2, dtype=torch.bool)}
    assert_equal(join(cut(masks, ALONE), masks, ALONE), masks)
