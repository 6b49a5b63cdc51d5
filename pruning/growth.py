"""The grown unit: a network one block deeper, that goes on from what a shallower one has learned.

Recursive growth (the juvenile state hypothesis, 2109.03862, Algorithm 2): theta' is added to theta,
and theta stays. `pruning.elastic` moves states between depths; here are the block that is new and
the masks of what is old. `pruning.growth_program` has the recursion.
"""

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from data.errors import UserError
from pruning.allocate import count_for, keep_counts
from pruning.elastic import DepthChange, transform
from pruning.masks import Masks, prunable
from pruning.scores import magnitude
from train.basis import LAYERS
from train.mlp import Unit
from train.models import ModelSpec
from train.ranks import ALONE, Ranks
from train.stages import stages

Insertion = Literal["literal", "preserving", "random"]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAST_OF_BRANCH = ("attn.proj", "mlp.fc2")
"""in a transformer's block, and the latter in ConvNeXt V2's"""


# Depths ----------------------------------------------------------------------------------


def grown_spec(spec: ModelSpec, grow: Sequence[str], num_growths: int) -> ModelSpec:
    """The network after `num_growths` blocks were added, at the ends of the stages `grow` in turn.

    Without `grow` it is the last stage that grows. Raises `UserError` where it has no such stage.
    """
    if not num_growths:
        return spec
    found = stages(spec.outline())
    names = [stage.name for stage in found]
    blocks = [stage.num_blocks for stage in found]
    turns = list(grow) or names[-1:]
    for name in turns:
        if name not in names:
            raise UserError(
                f"grow = {name!r}: no stage of {spec.name}, which has {', '.join(names)}"
            )
    if not turns:
        raise UserError(f"{spec.name} has no list of like blocks, to which one could be added")
    for growth in range(num_growths):
        blocks[names.index(turns[growth % len(turns)])] += 1
    return replace(spec, arguments={**spec.arguments, "blocks": blocks})


def growth_of(source: nn.Module, target: nn.Module) -> DepthChange:
    """The change from one network to a deeper one, whose further blocks are new.

    Raises `UserError` where the other tensors are not those of the source.
    """
    change = DepthChange.appending(stages(source), stages(target))
    transform(source.state_dict(), change, target.state_dict())
    return change


# The new block ---------------------------------------------------------------------------


def grown_state(
    weights: Mapping[str, Tensor],
    source: ModelSpec,
    target: ModelSpec,
    insertion: Insertion,
    seed: int,
) -> dict[str, Tensor]:
    """The state of the deeper network: the source's tensors where they belong, and new blocks.

    These are as the target has them when it is built from `seed`, changed by `insertion`.
    """
    model = target.build(seed)
    change = growth_of(source.outline(), model)
    insert(model, change, insertion)
    state = model.state_dict()
    return {**state, **transform(weights, change, state)}


@torch.no_grad()
def insert(model: nn.Module, change: DepthChange, insertion: Insertion) -> None:
    """Changes the new blocks of `model` in place, to what the insertion makes of fresh ones.

    `literal`: every convolution a Dirac kernel, every linear layer the identity, their biases 0.
    `preserving`: the block gives what it takes. `random`: as it is. Raises `UserError` where no
    way is known to make a block preserving.
    """
    blocks = [model.get_submodule(prefix.removesuffix(".")) for prefix in change.new_blocks]
    for block in blocks:
        if insertion == "literal":
            _make_literal(block)
        elif insertion == "preserving" and not _make_preserving(block):
            raise UserError(
                f"no preserving insertion is known for blocks {type(block).__name__}: choose "
                "insertion = 'literal' or 'random'"
            )


def _make_literal(block: nn.Module) -> None:
    for module in block.modules():
        if isinstance(module, _CONVOLUTIONS):
            nn.init.dirac_(module.weight, module.groups)
        elif isinstance(module, nn.Linear):
            nn.init.eye_(module.weight)
        if isinstance(module, LAYERS) and module.bias is not None:
            nn.init.zeros_(module.bias)


def _make_preserving(block: nn.Module) -> bool:
    """Whether it is known how the block adds nothing, or is the identity; then it is so."""
    if isinstance(block, Unit):  # after an activation its own changes nothing: ReLU, sign
        _make_literal(block)
        return True
    if callable(zero := getattr(block, "zero_init_last", None)):
        zero()
        return True
    scales = [p for name, p in block.named_parameters() if name.rpartition(".")[2] == "gamma"]
    parts = dict(block.named_modules())
    lasts = [parts[name] for name in _LAST_OF_BRANCH if name in parts]
    for parameter in scales or [p for last in lasts for p in last.parameters()]:
        nn.init.zeros_(parameter)
    return bool(scales or lasts)


@torch.no_grad()
def change_of_logits(
    source: ModelSpec, target: ModelSpec, shape: tuple[int, int, int], seed: int
) -> float:
    """By how much a preserving insertion changes a logit, relative to the largest: at most.

    Of networks that are built from `seed`, in evaluation mode and float64, on two random images of
    `shape`.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    images = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    before = source.build(seed)
    after = target.build(seed + 1)
    state = grown_state(before.state_dict(), source, target, "preserving", seed + 1)
    after.load_state_dict(state)
    here, there = (model.double().eval()(images) for model in (before, after))
    return float((there - here).abs().max() / here.abs().max().clamp(min=1e-30))


# Masks -----------------------------------------------------------------------------------


def prunable_at(model: nn.Module, exclude: Iterable[str]) -> dict[str, nn.Parameter]:
    """`prunable` at one depth, which patterns of `exclude` may be about deeper ones than."""
    layers = [name for name, module in model.named_modules() if isinstance(module, LAYERS)]
    return prunable(model, [one for one in exclude if fnmatch.filter(layers, one)])


def grown_masks(
    masks: Masks, source: nn.Module, target: nn.Module, exclude: Sequence[str]
) -> Masks:
    """Masks of the deeper network in its layer order: the old ones stay, new layers are dense."""
    change, weights = growth_of(source, target), prunable_at(target, exclude)
    moved = transform(masks, change, weights)
    dense = {n: torch.ones(w.shape, dtype=torch.bool) for n, w in weights.items() if n not in moved}
    return Masks({name: {**moved, **dense}[name] for name in weights})


def require_counts(model: nn.Module, density: float, exclude: Sequence[str]) -> None:
    """Raises `UserError` where a layer would keep none of its weights."""
    for name, weight in prunable_at(model, exclude).items():
        if not count_for(density, weight.numel()):
            layer = name.rpartition(".")[0]
            raise UserError(
                f"density = {density} keeps none of the {weight.numel()} weights of {name}: keep "
                f"more, or leave it dense with exclude = {layer!r}"
            )


def prune_new(
    model: nn.Module,
    frozen: Masks,
    density: float,
    exclude: Sequence[str] = (),
    ranks: Ranks = ALONE,
) -> Masks:
    """Masks of the network: `frozen` where they are, and of each other layer the largest weights.

    Each of these keeps `density` of its weights: the target is absolute, and what was pruned to it
    stays as it is, however often this is repeated.
    """
    weights = prunable_at(model, exclude)
    scores = {name: score for name, score in magnitude(model).items() if name in weights}
    new = {name: score for name, score in scores.items() if name not in frozen}
    counts = {name: count_for(density, score.numel()) for name, score in new.items()}
    chosen = keep_counts(new, counts, ranks=ranks).to("cpu") if new else {}
    return Masks({name: {**frozen, **chosen}[name] for name in weights})


def kept_ratio(masks: Masks, model: nn.Module) -> float:
    """The kept share of all weights that could be pruned, those of excluded layers included."""
    size = sum(math.prod(weight.shape) for weight in prunable(model).values())
    return (masks.kept + size - masks.size) / size
