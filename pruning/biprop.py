"""The layout of biprop (github.com/chrundle/biprop), the authors' code for multi-prize tickets.

A state dict has for each convolution, the classifier among them, its random weight and its scores
(`layer1.0.conv1.weight`, `layer1.0.conv1.scores`, of one shape), and the usual tensors of batch
normalisations, without `weight` and `bias` where these are not learned. Masks are not saved: they
follow from the scores and from the fraction that is kept, which is no part of the file. Names
differ between its networks and those here, the order of layers does not: by that they are matched.

Of n weights biprop keeps n - int((1 - k) n) in floating point, for some k one more than exact
numbers give; so it is done here. Its gain divides by int(k n), which is one off at times: here it
is the mean of what is kept.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from data.errors import UserError
from pruning.choosing import choose
from pruning.masks import prunable
from pruning.multiprize import gain_of, signed
from pruning.prizes import Prize, PrizeLayer
from train.models import ModelSpec

_SCORES = ".scores"
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def prize_of(state: Mapping[str, Tensor], model: ModelSpec, density: float, file: str) -> Prize:
    """The network in a state dict of biprop, as that of `model`, keeping `density` of each layer.

    Raises `UserError` where it does not fit the network.
    """
    network = model.build()
    weights = prunable(network)
    theirs = [name.removesuffix(_SCORES) for name in state if name.endswith(_SCORES)]
    _require_as_many(file, "layers with scores", theirs, list(weights))
    _require_known(file, state, theirs)
    layers = {}
    for index, (name, source) in enumerate(zip(weights, theirs, strict=True)):
        scores = _fitted(state, f"{source}{_SCORES}", weights[name], file)
        weight = _fitted(state, f"{source}.weight", weights[name], file)
        mask = choose({name: scores}, {name: _num_kept(density, scores.numel())})[name]
        gain = float(gain_of(weight, signed(weight, mask)))
        layers[name] = PrizeLayer(mask, (weight >= 0)[mask], gain, index)
    rest = {name: value for name, value in network.state_dict().items() if name not in layers}
    rest |= _statistics(state, network, file)
    for name in rest:
        if name.endswith(".bias") and f"{name.removesuffix('bias')}weight" in layers:
            rest[name] = torch.zeros_like(rest[name])
    return Prize(model, layers, rest, None)


def _num_kept(density: float, size: int) -> int:
    """As the authors' code has it. Raises `UserError` outside (0, 1]."""
    if not 0 < density <= 1:
        raise UserError(f"--density {density}: must be above 0 and at most 1")
    return max(1, size - int((1 - density) * size))


def _normalisations(state: Mapping[str, Tensor]) -> list[str]:
    """The names of the layers that have statistics, in their order."""
    return [n.removesuffix(".running_mean") for n in state if n.endswith(".running_mean")]


def _statistics(state: Mapping[str, Tensor], network: nn.Module, file: str) -> dict[str, Tensor]:
    """The tensors of the normalisations, under their names here."""
    ours = {n: one for n, one in network.named_modules() if isinstance(one, nn.BatchNorm2d)}
    theirs = _normalisations(state)
    _require_as_many(file, "batch normalisations", theirs, list(ours))
    found: dict[str, Tensor] = {}
    for (name, layer), source in zip(ours.items(), theirs, strict=True):
        for key, value in layer.state_dict().items():
            if key in _STATISTICS or f"{source}.{key}" in state:
                found[f"{name}.{key}"] = _fitted(state, f"{source}.{key}", value, file)
            else:  # not learned
                found[f"{name}.{key}"] = torch.full_like(value, float(key == "weight"))
    return found


def _require_as_many(file: str, what: str, theirs: Sequence[str], ours: Sequence[str]) -> None:
    if not theirs or len(theirs) != len(ours):
        raise UserError(
            f"{file}: {len(theirs)} {what}, the network has {len(ours)}: is it another --model, "
            "or not of biprop?"
        )


def _require_known(file: str, state: Mapping[str, Tensor], scored: Sequence[str]) -> None:
    """Raises `UserError` for a tensor that would be left out, as a bias or a dense layer's."""
    known = {f"{layer}.{key}" for layer in scored for key in ("weight", "scores")}
    normalisations = set(_normalisations(state))
    for name in state:
        if name not in known and name.rpartition(".")[0] not in normalisations:
            raise UserError(f"{file}: {name}: not of a network whose layers all have scores")


def _fitted(state: Mapping[str, Tensor], name: str, like: Tensor, file: str) -> Tensor:
    """A tensor in the shape and type of ours; a 1x1 convolution may stand for a linear layer."""
    if name not in state:
        raise UserError(f"{file}: {name} is missing")
    value = state[name]
    if value.shape != like.shape and value.shape != (*like.shape, 1, 1):
        raise UserError(
            f"{file}: {name}: {tuple(value.shape)}, the network: {tuple(like.shape)}; is it "
            "another --model, --num-classes, --in-chans or --width?"
        )
    if value.is_floating_point() and not bool(value.isfinite().all()):
        raise UserError(f"{file}: {name} is not finite")
    return value.view(like.shape).to(like.dtype)
