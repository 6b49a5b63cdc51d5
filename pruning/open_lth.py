"""The layout of open_lth (github.com/facebookresearch/open_lth): its files, and its names as ours.

A level's folder, `<hash>/replicate_1/level_3/main/`, holds `mask.pth`, a dict from the name of each
convolution's and linear layer's weight to an int tensor of its shape, and the state dicts
`model_ep<E>_it<I>.pth` at E epochs and I iterations: the first is what the level was trained from.

Its networks, their names and ours:

- `cifar_resnet_20`: `conv`, `bn`, `blocks.3.bn1`, `blocks.3.shortcut.0`, `fc`; `cifar_resnet20`
- `cifar_vgg_16`: `layers.4.conv`, `layers.4.bn` (pooling counts), `fc`; `cifar_vgg16`
- `imagenet_resnet_50`: torchvision's and timm's after `model.`; `resnet50`

Its LeNets (`fc_layers.0`) have no counterpart here. Its VGGs have biases before the batch
normalisation; they go into the running mean, and the network computes the same.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from data.errors import UserError
from data.files import Folder

MASK = "mask.pth"
_WEIGHTS = re.compile(r"model_ep(\d{1,9})_it(\d{1,9})\.pth")
_LEVEL = re.compile(r"level_(\d{1,9})")


def find_start(folder: Folder, step: int | None) -> tuple[str | None, int]:
    """The name of the earliest state dict in a level's folder, and its step, else `step` or 0.

    Raises `UserError` for a state after a number of epochs where `step` does not say which it is.
    """
    found = [match for name in folder.names() if (match := _WEIGHTS.fullmatch(name))]
    if not found:
        return None, step or 0
    start = min(found, key=lambda match: (int(match[1]), int(match[2])))
    if step is None and int(start[1]):
        raise UserError(
            f"{folder}/{start[0]}: the number of steps in an epoch is not known here: give the "
            "step of these weights as --step"
        )
    return start[0], int(start[2]) if step is None else step


def find_level(folder: Folder) -> int:
    """The level that the path of a level's folder names, else 0."""
    found = _LEVEL.findall(folder.location)
    return int(found[-1]) if found else 0


def renamed(state: Mapping[str, Tensor], file: str) -> dict[str, Tensor]:
    """Masks or weights of an open_lth network under the names of the same network here.

    Raises `UserError` where the names are those of none of its networks, or of a LeNet.
    """
    if any(name.startswith("fc_layers.") for name in state):
        raise UserError(f"{file}: open_lth's LeNets have no counterpart among the models here")
    if all(name.startswith("model.") for name in state):
        return {name.removeprefix("model."): value for name, value in state.items()}
    if any(name.startswith("blocks.") for name in state):
        return _renamed_resnet(state, file)
    if any(name.startswith("layers.") for name in state):
        return _renamed_vgg(state)
    names = ", ".join(list(state)[:3])
    raise UserError(f"{file}: {names} ... are not the names of a network of open_lth")


def _renamed_resnet(state: Mapping[str, Tensor], file: str) -> dict[str, Tensor]:
    """Blocks are counted through in open_lth, and within three stages of equal length here."""
    blocks = _indices(state, "blocks")
    per_stage, left = divmod(len(blocks), 3)
    if left or not blocks or blocks != list(range(len(blocks))):
        raise UserError(f"{file}: {len(blocks)} blocks are not three stages of equal length")
    renamed = {}
    for name, value in state.items():
        match = re.fullmatch(r"blocks\.(\d{1,9})\.(.+)", name)
        if match:
            stage, block = divmod(int(match[1]), per_stage)
            inner = re.sub(r"^bn(\d)\.", r"norm\1.", match[2])
            renamed[f"stages.{stage}.{block}.{inner}"] = value
        else:
            renamed[re.sub(r"^bn\.", "norm1.", re.sub(r"^conv\.", "conv1.", name))] = value
    return renamed


def _renamed_vgg(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A pooling layer, which has no name in the state, ends a stage."""
    places: dict[int, str] = {}
    stage, unit = 0, 0
    for index in _indices(state, "layers"):
        if places and index - 1 not in places:
            stage, unit = stage + 1, 0
        places[index] = f"stages.{stage}.{unit}"
        unit += 1
    renamed = {}
    for name, value in _without_biases(state).items():
        match = re.fullmatch(r"layers\.(\d{1,9})\.(conv|bn)\.(.+)", name)
        if match:
            part = 0 if match[2] == "conv" else 1
            renamed[f"{places[int(match[1])]}.{part}.{match[3]}"] = value
        else:
            renamed[name] = value
    return renamed


def _without_biases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same network without its convolutions' biases: batch normalisation subtracts them."""
    folded = dict(state)
    for name in state:
        mean = re.sub(r"\.conv\.bias$", ".bn.running_mean", name)
        if mean != name and mean in state and state[mean].shape == state[name].shape:
            folded[mean] = state[mean] - folded.pop(name)
    return folded


def _indices(state: Mapping[str, Tensor], prefix: str) -> list[int]:
    matches = (re.match(rf"{prefix}\.(\d{{1,9}})\.", name) for name in state)
    return sorted({int(match[1]) for match in matches if match})
