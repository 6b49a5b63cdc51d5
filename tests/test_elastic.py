"""From one depth to another: index maps, the paper's notation, and moving whole states."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from data.errors import UserError
from pruning.elastic import (
    DepthChange,
    Order,
    format_map,
    index_map,
    parse_map,
    stages,
    transform,
)
from pruning.masks import Masks
from train.models import ModelSpec

SIZES = st.integers(1, 40)
ORDERS: list[Order] = ["append", "interpolate"]
ORDER = st.sampled_from(ORDERS)


# ---- index maps


@pytest.mark.parametrize(
    ("source", "target", "order", "text"),
    [
        (5, 7, "append", "0:0;1:1,3;2:2,4;3:5;4:6"),  # ResNet-32 to 44
        (5, 7, "interpolate", "0:0;1:1,2;2:3,4;3:5;4:6"),
        (5, 3, "interpolate", "0:0;1:1;3:2"),  # ResNet-32 to 20
        (5, 3, "append", "0:0;1:1;2:2"),
        (2, 3, "append", "0:0;1:1,2"),  # ResNet-18 to 34
        (2, 4, "append", "0:0;1:1,2,3"),
        (2, 6, "interpolate", "0:0;1:1,2,3,4,5"),
        (3, 5, "append", "0:0;1:1,3;2:2,4"),  # whole repetitions of the group
        (3, 5, "interpolate", "0:0;1:1,2;2:3,4"),
        (4, 9, "append", "0:0;1:1,3,6;2:2,4,7;3:5,8"),  # 1 2, 1 2 3, 1 2 3: ours
        (4, 9, "interpolate", "0:0;1:1,2,3;2:4,5,6;3:7,8"),
        (6, 4, "interpolate", "0:0;1:1;2:2;4:3"),  # runs of 1, 2, 2
        (9, 1, "interpolate", "0:0"),
    ],
)
def test_the_papers_examples(source: int, target: int, order: Order, text: str) -> None:
    """Of section 3 and of the authors' scripts; and what they leave open, by hand."""
    blocks = index_map(source, target, order)
    assert format_map([blocks]) == text
    assert parse_map(text) == [blocks]


@given(SIZES, SIZES, ORDER)
def test_every_target_block_is_covered_and_block_0_stays(n: int, m: int, order: Order) -> None:
    """A source block for each target block; block 0 goes onto 0, and nowhere else."""
    if n == 1 < m:
        with pytest.raises(UserError, match="1 block cannot be stretched"):
            index_map(n, m, order)
        return
    blocks = index_map(n, m, order)
    assert len(blocks) == m
    assert [target for target, source in enumerate(blocks) if source == 0] == [0]
    assert all(0 <= source < n for source in blocks)


@given(SIZES, ORDER)
def test_at_equal_depth_nothing_changes(n: int, order: Order) -> None:
    assert index_map(n, n, order) == list(range(n))


@given(st.integers(2, 40), st.integers(0, 40), ORDER)
def test_stretching_uses_every_block_about_equally_often(n: int, more: int, order: Order) -> None:
    """Each normal block once or q times or once more, the earliest ones most often."""
    counts = Counter(index_map(n, n + more, order))
    times = [counts[block] for block in range(1, n)]
    assert sorted(times, reverse=True) == times
    assert times[0] - times[-1] <= 1


@given(st.integers(2, 40), st.integers(0, 40))
def test_interpolating_never_changes_the_order_of_blocks(n: int, more: int) -> None:
    blocks = index_map(n, n + more, "interpolate")
    assert blocks == sorted(blocks)


@given(SIZES, SIZES, ORDER)
def test_squeezing_keeps_blocks_in_their_order_and_none_twice(n: int, m: int, order: Order) -> None:
    blocks = index_map(max(n, m), min(n, m), order)
    assert blocks == sorted(set(blocks))


@given(st.integers(2, 20), st.integers(1, 6))
def test_squeezing_after_whole_repetitions_restores_the_source(n: int, times: int) -> None:
    """By interpolation. Where the blocks are repeated unequally often, the paper's formulas do
    not restore it: stretching gives the earlier blocks more copies, squeezing longer runs to the
    later ones."""
    m = 1 + (n - 1) * times
    there, back = index_map(n, m, "interpolate"), index_map(m, n, "interpolate")
    assert [there[block] for block in back] == list(range(n))


def test_unequal_repetitions_are_not_undone_by_squeezing() -> None:
    """ResNet-32 to 44 and back: 4 of 5 blocks are the source's, one is there twice."""
    there, back = index_map(5, 7, "interpolate"), index_map(7, 5, "interpolate")
    assert [there[block] for block in back] == [0, 1, 1, 2, 3]


def test_a_stage_has_a_block() -> None:
    with pytest.raises(UserError, match="at least one block, not 0"):
        index_map(0, 3, "append")


# ---- the notation


@given(st.lists(st.tuples(st.integers(2, 9), SIZES, ORDER), min_size=1, max_size=5))
def test_what_is_written_reads_the_same(rows: list[tuple[int, int, Order]]) -> None:
    """A map a stage; one alone where all stages have the same."""
    maps = [index_map(*row) for row in rows]
    read = parse_map(format_map(maps))
    assert read * (len(maps) if len(read) == 1 else 1) == maps


def test_a_network_is_written_stage_by_stage() -> None:
    """ResNet-18 to ResNet-34, as the authors write it."""
    text = "0:0;1:1,2|0:0;1:1,2,3|0:0;1:1,2,3,4,5|0:0;1:1,2"
    maps = [index_map(2, m, "append") for m in (3, 4, 6, 3)]
    assert format_map(maps) == text
    assert parse_map(text) == maps


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is not SOURCE:TARGET"),
        ("0:0;1", "'1' is not SOURCE:TARGET"),
        ("0:0;1:x", "'1:x' is not SOURCE:TARGET"),
        ("0:0;1:-1", "'1:-1' is not SOURCE:TARGET"),
        ("0:0|", "is not SOURCE:TARGET"),
        ("0:0;1:1;2:1", "target block 1 is written twice"),
        ("0:0;1:2", "nothing goes to target block 1"),
        ("0:0,1", "block 0 must go to block 0, and there alone"),
        ("0:1;1:0", "block 0 must go to block 0, and there alone"),
        ("1:0,1", "block 0 must go to block 0, and there alone"),
    ],
)
def test_a_wrong_map_is_one_line(text: str, problem: str) -> None:
    with pytest.raises(UserError, match="map = ") as caught:
        parse_map(text)
    assert problem in str(caught.value)


# ---- whole states


def network(name: str, seed: int = 0, **arguments: Any) -> dict[str, Tensor]:
    """A state of which every tensor is random, statistics and counters too."""
    state = ModelSpec(name, 10, 3, arguments).build(seed).state_dict()
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.rand(value.shape, generator=generator)
        if value.is_floating_point()
        else torch.randint(0, 99, value.shape, generator=generator)
        for key, value in state.items()
    }


def change(source: str, target: str, order: Order = "append", **options: Any) -> DepthChange:
    found = [stages(ModelSpec(name, 10, 3).outline()) for name in (source, target)]
    return DepthChange.between(found[0], found[1], order, **options)


def outline(name: str, **arguments: Any) -> dict[str, Tensor]:
    return dict(ModelSpec(name, 10, 3, arguments).outline().state_dict())


@pytest.mark.parametrize(
    "name",
    [
        "cifar_resnet20",
        "cifar_vgg16",
        "resnet18",
        "regnetx_002",
        "convnext_atto",
        "mobilenetv2_035",
        "mobilenetv3_small_050",
        "vit_tiny_patch16_224",
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_at_equal_depth_a_state_is_moved_bit_for_bit(name: str, order: Order) -> None:
    """Weights, statistics, counters and masks; and every tensor is a copy of its own."""
    state = network(name)
    moved = transform(state, change(name, name, order), outline(name))
    assert list(moved) == list(state)
    assert all(torch.equal(moved[key], value) for key, value in state.items())
    assert not {t.data_ptr() for t in moved.values()} & {t.data_ptr() for t in state.values()}


def test_at_equal_depth_the_logits_are_equal_bit_for_bit() -> None:
    """... of the masked network."""
    spec = ModelSpec("cifar_resnet20", 10, 3, {"width": 4})
    source, target = spec.build(1), spec.build(2)
    masks = Masks({n: w > 0 for n, w in source.named_parameters() if w.ndim > 1})
    same = change("cifar_resnet20", "cifar_resnet20", "interpolate")
    target.load_state_dict(transform(source.state_dict(), same, target.state_dict()))
    moved = Masks(transform(masks, same, {name: masks[name] for name in masks}))
    masks.project_(source)
    moved.project_(target)
    images = torch.rand(4, 3, 8, 8)
    assert moved.digest() == masks.digest()
    assert torch.equal(source.eval()(images), target.eval()(images))


def test_blocks_are_copied_as_the_map_says() -> None:
    """ResNet-32 to 44: `0:0;1:1,3;2:2,4;3:5;4:6` in each stage; stem and head as they are."""
    state = network("cifar_resnet32")
    moved = transform(state, change("cifar_resnet32", "cifar_resnet44"), outline("cifar_resnet44"))
    for name, value in moved.items():
        parts = name.split(".")
        if parts[0] == "stages":
            parts[2] = "0121234"[int(parts[2])]
        assert torch.equal(value, state[".".join(parts)])
    assert len(moved) == len(outline("cifar_resnet44"))


def test_squeezing_leaves_blocks_out() -> None:
    """ResNet-32 to 20 by interpolation: blocks 0, 1 and 3."""
    state = network("cifar_resnet32")
    squeezed = change("cifar_resnet32", "cifar_resnet20", "interpolate")
    moved = transform(state, squeezed, outline("cifar_resnet20"))
    key = "stages.1.{}.norm2.running_var"
    assert [torch.equal(moved[key.format(t)], state[key.format(s)]) for t, s in ((1, 1), (2, 3))]
    assert not squeezed.replicates


@pytest.mark.parametrize(
    ("source", "target", "weights"),
    [
        ("resnet18", "resnet34", "layer3.5.conv2.weight"),
        ("resnet50", "resnet101", "layer3.22.conv3.weight"),
        ("convnext_atto", "convnext_nano", None),
        ("vit_tiny_patch16_224", "vit_small_patch16_224", None),
    ],
)
def test_families_of_timm(source: str, target: str, weights: str | None) -> None:
    """A deeper network of the same widths takes a state, one of other widths names a tensor."""
    here, there = outline(target), outline(source)
    if weights is None:
        with pytest.raises(UserError, match="is of another shape: "):
            transform(there, change(source, target), here)
    else:
        assert transform(there, change(source, target), here)[weights].shape == here[weights].shape


def test_replicas_are_all_copies_but_the_first() -> None:
    stretched = change("cifar_resnet14", "cifar_resnet20")
    assert stretched.replicates
    kinds = [stretched.is_replica(f"stages.1.{block}.conv1.weight") for block in range(3)]
    assert kinds == [False, False, True]
    assert not stretched.is_replica("fc.weight")


def test_more_than_nine_blocks_are_told_apart() -> None:
    """`layer3.1.` is not the beginning of `layer3.12.`."""
    stretched = change("resnet50", "resnet101", "interpolate")
    assert stretched.origin("layer3.12.conv1.weight") == "layer3.3.conv1.weight"
    assert stretched.origin("layer3.1.conv1.weight") == "layer3.1.conv1.weight"


def test_what_does_not_fit_is_named() -> None:
    """A tensor that is missing, left over, or of another shape."""
    same, here = change("cifar_resnet14", "cifar_resnet14"), outline("cifar_resnet14")
    state = network("cifar_resnet14")
    lacking = {key: value for key, value in state.items() if key != "stages.1.1.norm1.bias"}
    with pytest.raises(UserError, match=r"to make stages\.1\.1\.norm1\.bias from"):
        transform(lacking, same, here)
    with pytest.raises(UserError, match=r"stages\.0\.1\.scale of the source has no place"):
        transform({**state, "stages.0.1.scale": torch.ones(1)}, same, here)
    wide = network("cifar_resnet14", width=8)
    with pytest.raises(UserError, match=r"conv1\.weight is of another shape: 8x3x3x3 there, 16x3"):
        transform(wide, same, here)


@pytest.mark.parametrize(
    ("source", "target", "problem"),
    [
        ("resnet18", "cifar_resnet20", "another number of stages: layer1 2, .* there, stages.0 3"),
        ("resnet34", "resnet50", "layer1 has blocks BasicBlock there, layer1 Bottleneck here"),
        ("vgg16", "vgg19", "no list of like blocks"),
        (
            "cifar_resnet8",
            "cifar_resnet14",
            r"stages\.0: a stage of 1 block cannot be stretched to 2",
        ),
    ],
)
def test_another_family_is_one_line(source: str, target: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        change(source, target)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("0:0;1:1", "covers 2 blocks, stages.0 has 3"),
        ("0:0;1:1;2:2", "takes block 2, stages.0 has blocks 0 to 1"),
        ("0:0;1:1,2|0:0;1:1,2", "is of 2 stages, the networks have 3"),
    ],
)
def test_a_map_of_another_network_is_one_line(text: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        change("cifar_resnet14", "cifar_resnet20", maps=parse_map(text))


def test_one_map_serves_all_stages() -> None:
    maps = parse_map("0:0;1:1,2")
    assert change("cifar_resnet14", "cifar_resnet20", maps=maps).maps == ((0, 1, 1),) * 3
