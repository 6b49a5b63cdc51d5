"""How much a weight matters: `(model, batches, ...) -> {weight name: score}`, higher is kept."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import UserError
from data.loader import Batch
from pruning.masks import prunable
from train.ranks import ALONE, Ranks
from train.rng import kept_generators


def magnitude(
    model: nn.Module, batches: Iterable[Batch] | None = None, *, exclude: Iterable[str] = ()
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
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    device = next(iter(weights.values())).device
    totals = torch.zeros(2, dtype=torch.float64, device=device)  # loss, images
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    was_training = model.training
    model.train()
    with kept_generators(device):
        for images, labels in batches:
            loss = F.cross_entropy(model(images.float()), labels, reduction="sum")
            gradients = torch.autograd.grad(loss, list(weights.values()))
            for total, gradient in zip(sums.values(), gradients, strict=True):
                total += gradient
            totals += torch.stack([loss.detach().to(totals), totals.new_tensor(len(images))])
    model.train(was_training)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    loss_sum, count = ranks.reduce(totals).tolist()
    if not count or loss_sum != loss_sum or abs(loss_sum) == float("inf"):
        raise UserError(f"SNIP: the loss over {count:.0f} images is {loss_sum}; it must be finite")
    return {
        name: (weight.detach() * ranks.reduce(sums[name]) / count).abs().float()
        for name, weight in weights.items()
    }
