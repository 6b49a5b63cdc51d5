"""The stages of a network, read from its module tree and never from its name.

A stage is a list of like blocks: a module whose children are of one class, have children of their
own, and are numbered (`0, 1, 2`, RegNet's `b1, b2, b3`). Of lists within lists (`stages` of a
ResNet holds one list a stage) the outer one is a stage if its blocks agree, from the second on, in
names and shapes; the first may change size or channels. So `stages` is not one, each of its lists
is, and neither are the branches inside of a block. A list of blocks of several classes is none: at
equal depth it is copied like stem and head.

This finds the stages of the CIFAR ResNets and VGGs, and of timm's ResNets and their relatives,
RegNet, ConvNeXt, MobileNet and EfficientNet, and the blocks of ViT and DeiT.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Size, nn

_NUMBERED = re.compile(r"(.*?)(\d+)")


@dataclass(frozen=True)
class Stage:
    """A list of like blocks."""

    name: str
    """of the module that holds them: layer1, s1, stages.0.blocks"""
    blocks: tuple[str, ...]
    """their names in it, in order: 0, 1, 2"""
    kind: str
    """the class of the blocks"""

    @property
    def num_blocks(self) -> int:
        """How many blocks it has."""
        return len(self.blocks)

    def prefix(self, block: int) -> str:
        """With what the names of a block's tensors begin: `layer1.2.`"""
        return f"{self.name}.{self.blocks[block]}."


def stages(model: nn.Module) -> list[Stage]:
    """The stages of a network, in the order of its modules; empty where it has none."""
    return [stage for name, child in model.named_children() for stage in _find(name, child)]


def described(found: Sequence[Stage]) -> str:
    """In one line: `layer1 3, layer2 4, layer3 6, layer4 3`."""
    return ", ".join(f"{stage.name} {stage.num_blocks}" for stage in found) or "none"


def _find(name: str, module: nn.Module) -> Iterator[Stage]:
    is_list = _is_list(module)
    if is_list and _agree(module):
        yield _stage(name, module)
        return
    inner = [one for n, child in module.named_children() for one in _find(f"{name}.{n}", child)]
    if is_list and not inner:
        yield _stage(name, module)  # unlike blocks, as in some of MobileNetV3's stages
    yield from inner


def _stage(name: str, module: nn.Module) -> Stage:
    *_, last = module.children()
    return Stage(name, tuple(n for n, _ in module.named_children()), type(last).__name__)


def _is_list(module: nn.Module) -> bool:
    """Whether the children are numbered blocks of one class."""
    children = dict(module.named_children())
    numbered = [_NUMBERED.fullmatch(name) for name in children]
    places = [(match[1], int(match[2])) for match in numbered if match]
    follow = all(b == (a[0], a[1] + 1) for a, b in pairwise(places))
    if len(places) < len(children) or not children or not follow:
        return False
    blocks = list(children.values())
    return len({type(block) for block in blocks}) == 1 and all(map(_is_block, blocks))


def _is_block(module: nn.Module) -> bool:
    has_parts = next(module.children(), None) is not None
    return has_parts and next(module.parameters(), None) is not None


def _agree(module: nn.Module) -> bool:
    """Whether all blocks but the first have tensors of the same names and shapes.

    Of two blocks, one of which may be a first, the second must have most of its shapes from it.
    """
    first, *rest = (_outline(child) for child in module.children())
    if len(rest) == 1:
        (second,) = rest
        return 2 * sum(first.get(name) == shape for name, shape in second.items()) > len(second)
    return all(one == rest[0] for one in rest)


def _outline(module: nn.Module) -> dict[str, Size]:
    """Names and shapes of what has a shape: counters have none."""
    return {name: value.shape for name, value in module.state_dict().items() if value.ndim}
