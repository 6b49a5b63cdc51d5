"""Elastic tickets: a ticket of one depth becomes one of another, without any search.

Chen et al. 2021, The Elastic Lottery Ticket Hypothesis (2103.16547). The blocks of each stage of
the target are copies of blocks of the source, weights, statistics and masks alike. The first block
of a stage, which changes sizes, is copied onto the first and nowhere else; stem and head are
copied. The index formulas are the paper's. Where its scripts never come to (stretching beyond
twice the normal blocks, by a number that they do not divide, `append`), ours is the pattern of
less than twice, followed by whole repetitions.

An index map is a list with one source block for each block of the target: `[0, 1, 1, 2]`. The
paper writes the same as `0:0;1:1,2;2:3`, a source block and the target blocks it goes to.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from data.errors import UserError
from train.stages import Stage, described, stages

__all__ = [
    "DepthChange",
    "Order",
    "Stage",
    "format_map",
    "index_map",
    "parse_map",
    "stages",
    "transform",
]

Order = Literal["append", "interpolate"]
_NUMBER = re.compile(r"[0-9]{1,4}")


def index_map(num_source: int, num_target: int, order: Order) -> list[int]:
    """For each of `num_target` blocks of a stage the source block that it is a copy of.

    Stretching, `interpolate` repeats each normal block in place, the earliest ones once more often;
    `append` repeats the group of them (or its beginning, right after itself). Squeezing, `append`
    keeps the first blocks, and `interpolate` the first of each of `num_target - 1` equal runs, the
    later ones longer. Raises `UserError` where there is no block to repeat.
    """
    if num_source < 1 or num_target < 1:
        raise UserError(f"a stage has at least one block, not {min(num_source, num_target)}")
    source, target = num_source - 1, num_target - 1  # without the first
    if target > source == 0:
        raise UserError(
            f"a stage of 1 block cannot be stretched to {num_target}: its first block is never "
            "repeated, and it has no other"
        )
    if not target:
        return [0]
    if target < source:
        return [0, *(_squeezed(source, target) if order == "interpolate" else range(1, num_target))]
    return [0, *(_repeated if order == "interpolate" else _appended)(source, target)]


def _repeated(source: int, target: int) -> list[int]:
    whole, rest = divmod(target, source)
    return [block for block in range(1, source + 1) for _ in range(whole + (block <= rest))]


def _appended(source: int, target: int) -> list[int]:
    whole, rest = divmod(target, source)
    group, part = list(range(1, source + 1)), list(range(1, rest + 1))
    return [*part, *group, *group * (whole - 1)]


def _squeezed(source: int, target: int) -> list[int]:
    length, longer = divmod(source, target)
    first, kept = 1, []
    for run in range(1, target + 1):
        kept.append(first)
        first += length + (run > target - longer)
    return kept


# In the paper's notation -----------------------------------------------------------------


def format_map(maps: Sequence[Sequence[int]]) -> str:
    """Index maps, one a stage, in the paper's notation; once, where all stages have the same."""
    texts = [_format_stage(one) for one in maps]
    return texts[0] if len(set(texts)) == 1 else "|".join(texts)


def _format_stage(blocks: Sequence[int]) -> str:
    targets: dict[int, list[str]] = {}
    for target, source in enumerate(blocks):
        targets.setdefault(source, []).append(str(target))
    return ";".join(f"{source}:{','.join(targets[source])}" for source in sorted(targets))


def parse_map(text: str) -> list[list[int]]:
    """The index map of each stage that is written in `text`; a single one serves all stages.

    `0:0;1:1,2|0:0;1:1`: in stages parted by `|`, a source block and the target blocks it goes to.
    Raises `UserError` unless each target block is covered once, and block 0 goes onto 0 alone.
    """
    return [_parse_stage(part, text) for part in text.split("|")]


def _parse_stage(part: str, text: str) -> list[int]:
    where = f"map = {text!r}"
    origin: dict[int, int] = {}
    for entry in part.split(";"):
        source, _, targets = entry.partition(":")
        numbers = [source, *targets.split(",")]
        if not all(_NUMBER.fullmatch(number.strip()) for number in numbers):
            raise UserError(
                f"{where}: {entry.strip()!r} is not SOURCE:TARGET,TARGET; write it as "
                "0:0;1:1,2;2:3|0:0;1:1"
            )
        first, *rest = map(int, numbers)
        for target in rest:
            if target in origin:
                raise UserError(f"{where}: target block {target} is written twice in {part!r}")
            origin[target] = first
    for block, target in enumerate(sorted(origin)):
        if block != target:
            raise UserError(f"{where}: nothing goes to target block {block} in {part!r}")
    if [target for target, source in origin.items() if source == 0] != [0]:
        raise UserError(f"{where}: block 0 must go to block 0, and there alone: {part!r}")
    return [origin[target] for target in range(len(origin))]


# Moving a state --------------------------------------------------------------------------


class Shaped(Protocol):
    """A tensor, or what stands for one: all that is asked of a target is its shape."""

    @property
    def shape(self) -> Sequence[int]:
        """Sizes of the dimensions."""
        ...


@dataclass(frozen=True)
class DepthChange:
    """From which tensor of one network each tensor of another depth comes."""

    source: tuple[Stage, ...]
    target: tuple[Stage, ...]
    maps: tuple[tuple[int, ...], ...]
    """an index map a stage; further blocks of the target's stage are new"""

    @classmethod
    def between(
        cls,
        source: Sequence[Stage],
        target: Sequence[Stage],
        order: Order = "append",
        maps: Sequence[Sequence[int]] | None = None,
    ) -> "DepthChange":
        """The change from the stages of one network to those of another, by `order` or by `maps`.

        Raises `UserError` where they are of different families, or the maps do not fit them.
        """
        pairs = _paired(source, target)
        if maps is None:
            found = [_between(a, b, order) for a, b in pairs]
        else:
            found = [list(one) for one in (list(maps) * len(pairs) if len(maps) == 1 else maps)]
            _require_fit("|".join(map(_format_stage, maps)), found, pairs)
        return cls(tuple(source), tuple(target), tuple(map(tuple, found)))

    @classmethod
    def appending(cls, source: Sequence[Stage], target: Sequence[Stage]) -> "DepthChange":
        """The change that leaves every block where it is; what the target has more is new.

        Raises `UserError` where they are of different families, or the target has fewer.
        """
        for one, other in _paired(source, target):
            if other.blocks[: one.num_blocks] != one.blocks:
                raise UserError(f"{other.name} does not begin with the blocks of {one.name}")
        kept = tuple(tuple(range(stage.num_blocks)) for stage in source)
        return cls(tuple(source), tuple(target), kept)

    @property
    def new_blocks(self) -> list[str]:
        """With what the names of the tensors of the new blocks begin."""
        return [
            here.prefix(block)
            for here, blocks in zip(self.target, self.maps, strict=True)
            for block in range(len(blocks), here.num_blocks)
        ]

    def is_new(self, name: str) -> bool:
        """Whether a target tensor belongs to a block that comes from none."""
        return name.startswith(tuple(self.new_blocks))

    @property
    def replicates(self) -> bool:
        """Whether any block of the target is a further copy of one that is there already."""
        return any(len(set(blocks)) < len(blocks) for blocks in self.maps)

    def origin(self, name: str) -> str:
        """The source tensor that the target tensor `name` is a copy of, unless it is new."""
        for stage, here, blocks in zip(self.source, self.target, self.maps, strict=True):
            for target, block in enumerate(blocks):
                if name.startswith(here.prefix(target)):
                    return stage.prefix(block) + name.removeprefix(here.prefix(target))
        return name

    def is_replica(self, name: str) -> bool:
        """Whether a target tensor belongs to a further copy of a block, not to the first."""
        for here, blocks in zip(self.target, self.maps, strict=True):
            for target, block in enumerate(blocks):
                if name.startswith(here.prefix(target)):
                    return block in blocks[:target]
        return False

    def is_dropped(self, name: str) -> bool:
        """Whether a source tensor belongs to a block that goes nowhere."""
        return any(
            name.startswith(stage.prefix(block))
            for stage, blocks in zip(self.source, self.maps, strict=True)
            for block in range(stage.num_blocks)
            if block not in blocks
        )


def _paired(source: Sequence[Stage], target: Sequence[Stage]) -> list[tuple[Stage, Stage]]:
    """The stages of two networks side by side. Raises `UserError` if these are not alike."""
    if not source or not target:
        raise UserError("no list of like blocks, whose number could change")
    if len(source) != len(target):
        raise UserError(
            f"another number of stages: {described(source)} there, {described(target)} here"
        )
    pairs = list(zip(source, target, strict=True))
    for one, other in pairs:
        if one.kind != other.kind:
            raise UserError(
                f"{one.name} has blocks {one.kind} there, {other.name} {other.kind} here"
            )
    return pairs


def _between(source: Stage, target: Stage, order: Order) -> list[int]:
    try:
        return index_map(source.num_blocks, target.num_blocks, order)
    except UserError as error:
        raise UserError(f"{target.name}: {error}") from None


def _require_fit(
    text: str, maps: Sequence[Sequence[int]], pairs: Sequence[tuple[Stage, Stage]]
) -> None:
    if len(maps) != len(pairs):
        raise UserError(f"map = {text!r}: is of {len(maps)} stages, the networks have {len(pairs)}")
    for blocks, (source, target) in zip(maps, pairs, strict=True):
        if len(blocks) != target.num_blocks:
            raise UserError(
                f"map = {text!r}: covers {len(blocks)} blocks, {target.name} has "
                f"{target.num_blocks}"
            )
        if max(blocks) >= source.num_blocks:
            raise UserError(
                f"map = {text!r}: takes block {max(blocks)}, {source.name} has blocks 0 to "
                f"{source.num_blocks - 1}"
            )


def transform(
    tensors: Mapping[str, Tensor], change: DepthChange, target: Mapping[str, Shaped]
) -> dict[str, Tensor]:
    """A state of the target network from one of the source: weights and buffers, or masks.

    `target` holds the names that it must have, with their shapes; those of new blocks are left
    out. Every tensor is a copy of its own. Raises `UserError` naming what the source does not have,
    has left over, or has in another shape.
    """
    origins = {name: change.origin(name) for name in target if not change.is_new(name)}
    for name, origin in origins.items():
        if origin not in tensors:
            raise UserError(f"nothing to make {name} from: the source has no {origin}")
        there, here = tuple(tensors[origin].shape), tuple(target[name].shape)
        if there != here:
            raise UserError(f"{name} is of another shape: {_size(there)} there, {_size(here)} here")
    used = set(origins.values())
    left = [name for name in tensors if name not in used and not change.is_dropped(name)]
    if left:
        raise UserError(f"{left[0]} of the source has no place in the target")
    return {name: tensors[origin].clone() for name, origin in origins.items()}


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"
