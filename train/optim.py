"""Optimizers through timm's factory, and their state by parameter name."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from data.errors import did_you_mean
from train.schedule import Schedule

NORMALISATIONS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_FUSED = (torch.optim.Adam, torch.optim.AdamW)
"""which update all parameters in one kernel on a GPU, and in fp16 do not wait for it; not SGD,
whose momentum would be whatever memory held where the first step of all overflows"""
_HOW = ("fused", "foreach", "capturable")
"""options that change how a step is done on this device, and not what it does"""
# Other packages, a second backward pass, or state that is more than tensors by parameter.
_NOT_HERE = ["bnb*", "fused*", "adahessian", "kron*"]


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights are updated."""

    name: str = "momentum"
    """any timm optimizer; note that timm's `sgd` is Nesterov's, `momentum` the papers'"""
    lr: float = 0.1
    """base learning rate, for the whole global batch"""
    momentum: float = 0.9
    """of optimizers that have one"""
    weight_decay: float = 1e-4
    """factor of the weights that is added to their gradients, or as the optimizer has it"""
    decay_norm_and_bias: bool = True
    """weight decay on normalisations and biases too, as in the papers' recipes"""

    def __post_init__(self) -> None:
        known = known_optimizers()
        if self.name not in known:
            near = did_you_mean(self.name, known)
            raise ValueError(f"name = {self.name!r} is no timm optimizer{near}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr = {self.lr}: must be above 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum = {self.momentum}: must be at least 0 and below 1")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay = {self.weight_decay}: must not be negative")


def known_optimizers() -> list[str]:
    """The names that `OptimizerConfig` takes."""
    return [str(name) for name in list_optimizers(exclude_filters=_NOT_HERE)]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> Optimizer:
    """A fresh optimizer over the trainable parameters of `model`, grouped by module type."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    seen: set[nn.Parameter] = set()  # a weight that two modules share is one parameter
    for module in model.modules():
        normalises = isinstance(module, NORMALISATIONS) or "Norm" in type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                spared = not config.decay_norm_and_bias and (normalises or name == "bias")
                (plain if spared else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}]
    if plain:
        groups.append({"params": plain, "weight_decay": 0.0})
    kind = get_optimizer_class(config.name, bind_defaults=False)
    on_gpu = all(parameter.is_cuda for parameter in seen)
    how: dict[str, Any] = {"fused": True} if on_gpu and kind in _FUSED else {}
    return create_optimizer_v2(
        groups,
        opt=config.name,
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        **how,
    )


def set_learning_rate(optimizer: Optimizer, schedule: Schedule, step: int, base: float) -> float:
    """Sets the rate of `step` in every group (times its `lr_scale`), and returns it."""
    rate = base * schedule(step)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    return rate


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's state by parameter name, so that it survives another order of parameters."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = {
        str(number): {k: v for k, v in group.items() if k not in _HOW and _is_saved(v)}
        for number, group in enumerate(optimizer.param_groups)
    }
    return {
        "state": {
            names[p]: dict(optimizer.state[p])
            for p in _parameters(optimizer)
            if p in optimizer.state
        },
        "groups": groups,
    }


def load_optimizer_state(model: nn.Module, optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Puts back what `optimizer_state` gave; later steps leave `saved` as it is.

    Raises `ValueError` where it belongs to other parameters or groups.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    index = {parameter: number for number, parameter in enumerate(_parameters(optimizer))}
    unknown = saved["state"].keys() - {names[parameter] for parameter in index}
    if unknown or len(saved["groups"]) != len(optimizer.param_groups):
        raise ValueError(f"optimizer state of another model: {', '.join(sorted(unknown)[:3])}")
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        values = {k: v for k, v in saved["groups"][str(number)].items() if k not in _HOW}
        groups.append({**group, **values, "params": [index[p] for p in group["params"]]})
    state = {
        number: {k: _own(v, p) for k, v in saved["state"][names[p]].items()}
        for p, number in index.items()
        if names[p] in saved["state"]
    }
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _is_saved(value: Any) -> bool:
    """Tensors and plain values; parameters and types are those of the fresh optimizer."""
    if isinstance(value, list | tuple):
        return all(isinstance(item, int | float | str) for item in value)
    return value is None or isinstance(value, Tensor | int | float | str)


def _own(value: Any, parameter: nn.Parameter) -> Any:
    """A copy, in the memory layout of the parameter where it has its shape."""
    if not isinstance(value, Tensor):
        return value
    if value.shape != parameter.shape:
        return value.clone()
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def _parameters(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]
