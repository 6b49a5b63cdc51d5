"""How much a weight matters: `(model, batches, ...) -> {weight name: score}`, higher is kept."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import UserError
from data.loader import Batch
from pruning.masks import prunable
from pruning.scoring import undisturbed
from pruning.synflow import synflow as synflow
from train.ranks import ALONE, Ranks

Images = Literal["none", "batches", "classes"]


@dataclass(frozen=True)
class Score:
    """A score as recipes name it."""

    of: Callable[..., dict[str, Tensor]]
    """`(model, batches, *, exclude, ranks)` gives float32 or float64 of the shape of each prunable
    weight, the same on all ranks"""
    images: Images = "batches"
    """which it sees: none, the first global batches, or as many of each class"""


def magnitude(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    *,
    exclude: Iterable[str] = (),
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """The absolute value of each prunable weight, as float32 of its shape; needs no data."""
    return {name: w.detach().abs().float() for name, w in prunable(model, exclude).items()}


def snip(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    exclude: Iterable[str] = (),
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """Connection sensitivity `|theta * dL/dtheta|`, not normalised, as float32 of each shape.

    Lee et al. 2019 (1810.02340, equation 4). L is the mean cross-entropy over the batches of all
    ranks, the same number on each, in training mode and float32; buffers and random generators are
    left as they were. Raises `UserError` where there is no image, or the loss is not finite.
    """
    weights = prunable(model, exclude)
    with undisturbed(model, training=True):
        gradient, _ = _gradient("SNIP", model, batches, weights, ranks)
    return {name: (w.detach() * gradient[name]).abs().float() for name, w in weights.items()}


def grasp(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    exclude: Iterable[str] = (),
    ranks: Ranks = ALONE,
    temperature: float = 200.0,
) -> dict[str, Tensor]:
    """What a weight does for the flow of gradients, `theta * (H g)`, signed, float32.

    Wang et al. 2020 (2002.07376, Algorithm 1) have S = -theta * (H g) and remove the *highest*
    signed S, so that what is returned is -S: higher is kept. g and H are of the mean
    cross-entropy with logits / `temperature`, over the prunable weights and the batches of all
    ranks, which are gone through twice; else as `snip`, and with the same dropout in both passes.
    Raises `UserError` also for a network that has no second derivatives.
    """
    weights, batches = prunable(model, exclude), list(batches)
    with undisturbed(model, training=True):
        gradient, count = _gradient("GraSP", model, batches, weights, ranks, temperature)
    with undisturbed(model, training=True):
        products = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        for batch in batches:
            loss = _loss_sum(model, batch, temperature)
            own = _derivatives(loss, weights.values(), create_graph=True)
            dots = [(g * gradient[name]).sum() for name, g in zip(weights, own, strict=True)]
            second = _second(torch.stack(dots).sum(), weights.values())
            for total, product in zip(products.values(), second, strict=True):
                total += product
    return {
        name: (weight.detach() * ranks.reduce(products[name]) / count).float()
        for name, weight in weights.items()
    }


def _gradient(
    method: str,
    model: nn.Module,
    batches: Iterable[Batch],
    weights: dict[str, nn.Parameter],
    ranks: Ranks,
    temperature: float = 1.0,
) -> tuple[dict[str, Tensor], float]:
    """dL/dtheta of the mean loss over the images of all ranks, and how many these are."""
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    device = next(iter(weights.values())).device
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # loss, images
    for batch in batches:
        loss = _loss_sum(model, batch, temperature)
        for total, gradient in zip(
            sums.values(), _derivatives(loss, weights.values()), strict=True
        ):
            total += gradient
        totals += torch.stack([loss.detach().to(totals), totals.new_tensor(len(batch.images))])
    loss_sum, count = ranks.reduce(totals).tolist()
    if not count or not math.isfinite(loss_sum):
        raise UserError(
            f"{method}: the loss over {count:.0f} images is {loss_sum}, and must be finite: take "
            "other images or weights, or a score without images"
        )
    return {name: ranks.reduce(total) / count for name, total in sums.items()}, count


def _loss_sum(model: nn.Module, batch: Batch, temperature: float) -> Tensor:
    logits = model(batch.images.float()) / temperature
    return F.cross_entropy(logits, batch.labels, reduction="sum")


def _derivatives(
    value: Tensor, weights: Iterable[nn.Parameter], *, create_graph: bool = False
) -> Sequence[Tensor]:
    """Of weights on which the value does not depend: zeros."""
    return torch.autograd.grad(
        value, list(weights), create_graph=create_graph, materialize_grads=True
    )


def _second(value: Tensor, weights: Iterable[nn.Parameter]) -> Sequence[Tensor]:
    """Raises `UserError` for a network whose gradients have no derivative in torch."""
    try:
        return _derivatives(value, weights)
    except RuntimeError as error:
        if "is not implemented" not in str(error):
            raise
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"GraSP: the network has no second derivative ({reason}); take another score or model"
        ) from None


SCORES: dict[str, Score] = {
    "magnitude": Score(magnitude, "none"),
    "snip": Score(snip),
    "grasp": Score(grasp, "classes"),
}
"""what a stage may rank weights by at once; SynFlow, which iterates, is in `pruning.synflow`"""
