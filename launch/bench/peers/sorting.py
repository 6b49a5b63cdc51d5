"""A layer that sorts its scores in each forward pass: biprop's design, written by us."""

from typing import Any

import torch
from torch import Tensor, nn

from pruning.masks import prunable


def sort_mask(scores: Tensor, density: float) -> Tensor:
    """Zeros and ones of the shape of `scores`: ones for the highest, found by a sort of all."""
    order = scores.detach().flatten().sort().indices
    mask = torch.zeros_like(scores).flatten()
    mask[order[int((1 - density) * scores.numel()) :]] = 1
    return mask.view_as(scores)


class _Sorted(torch.autograd.Function):
    """The weight that is used; the scores' gradient is that of the weight times the random one."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, random: Tensor, density: float) -> Tensor:
        mask = sort_mask(scores, density)
        ctx.save_for_backward(random)
        return random.sign() * mask * ((random.abs() * mask).sum() / mask.sum())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (random,) = ctx.saved_tensors
        return gradient * random, None, None


class SortLayer(nn.Module):
    """Mixed into a layer by `score_by_sorting`: sorts its scores whenever its weight is asked for.

    `scores` has the shape of `random`.
    """

    scores: nn.Parameter
    random: Tensor
    density: float

    @property
    def weight(self) -> Tensor:
        used: Tensor = _Sorted.apply(self.scores.abs(), self.random, self.density)
        return used


def score_by_sorting(model: nn.Module, density: float) -> None:
    """Makes every convolution and linear layer a `SortLayer`, in place, scores and weights drawn.

    A bias becomes zero, and stays so.
    """
    for name, weight in prunable(model).items():
        layer: Any = model.get_submodule(name.rpartition(".")[0])
        scores, random = torch.empty_like(weight), torch.empty_like(weight)
        nn.init.kaiming_uniform_(scores, a=5**0.5)
        nn.init.kaiming_normal_(random)
        del layer.weight
        if layer.bias is not None:
            nn.init.zeros_(layer.bias).requires_grad_(False)
        layer.__class__ = type(f"Sort{type(layer).__name__}", (SortLayer, type(layer)), {})
        layer.scores, layer.density = nn.Parameter(scores.detach()), density
        layer.register_buffer("random", random.detach())
