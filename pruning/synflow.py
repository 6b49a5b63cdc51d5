"""SynFlow: pruning by the flow of synapses, in many steps and without any data.

Tanaka et al. 2020 (2006.05467). R is the sum of the outputs for an image of ones, of the network
with the absolute values of its parameters, normalisations in evaluation mode; a weight's score is
`|dR/dtheta * theta|`. Pruned at once by it layers would vanish; in n steps, with the scores
computed anew before each, they do not (Theorem 3).

R is a product over the layers, which leaves the range of float16 at once and that of float32 in
deep networks: all is computed in float64, whatever the training computes in.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from data.errors import UserError
from data.loader import Batch
from pruning.allocate import keep_count, keep_counts
from pruning.masks import Masks, prunable
from pruning.scoring import require_scores, undisturbed
from train.ranks import ALONE, Ranks

Narrow = Callable[[dict[str, Tensor], Masks], Masks]
"""scores and what is left -> what stays of it"""
_ROOT = 1 / 8


def synflow(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    *,
    image_shape: Sequence[int] | None = None,
    exclude: Iterable[str] = (),
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """`|dR/dtheta * theta|` once, as float64 of the shape of each prunable weight; needs no data.

    `image_shape`: `(C, H, W)` of the image of ones; without it, that of the first of the batches.
    The mean over the ranks, the same on each. Raises `UserError` where a score is not finite, or
    those of a layer are all zero.
    """
    if image_shape is None:
        image_shape = next(iter(batches or ())).images.shape[1:]
    scores = _evaluated(model, image_shape, Masks.ones(model, exclude), ranks)
    require_scores("SynFlow", scores)
    return scores


def synflow_masks(
    model: nn.Module,
    image_shape: Sequence[int],
    kept: int | Mapping[str, int],
    *,
    iterations: int = 100,
    exclude: Iterable[str] = (),
    ranks: Ranks = ALONE,
) -> Masks:
    """Masks of exactly `kept` weights, over all layers or of each, after so many iterations.

    Algorithm 1: iteration i of n keeps the density rho ** (i / n) of the weights, or of each layer
    its own rho ** (i / n), among those that are left. `image_shape`: `(C, H, W)`. Raises
    `UserError` as `synflow`, and where so few weights are left that nothing flows.
    """
    sizes = {name: weight.numel() for name, weight in prunable(model, exclude).items()}

    def narrowing(step: int) -> Narrow:
        if isinstance(kept, Mapping):
            counts = {n: _at(step, iterations, kept[n], size) for n, size in sizes.items()}
            return lambda scores, left: keep_counts(scores, counts, left, ranks)
        count = _at(step, iterations, kept, sum(sizes.values()))
        return lambda scores, left: keep_count(scores, count, left, ranks)

    steps = [narrowing(step) for step in range(1, iterations + 1)]
    return synflow_narrowed(model, image_shape, steps, exclude=exclude, ranks=ranks)


def synflow_narrowed(
    model: nn.Module,
    image_shape: Sequence[int],
    steps: Sequence[Narrow],
    *,
    exclude: Iterable[str] = (),
    ranks: Ranks = ALONE,
) -> Masks:
    """What is left after `steps`, each of which sees the scores of what the one before left.

    They see float32, in the same order as the scores. Raises as `synflow_masks`.
    """
    masks = Masks.ones(model, exclude)
    for step, narrow in enumerate(steps):
        scores = _evaluated(model, image_shape, masks, ranks)
        if step == 0:
            require_scores("SynFlow", scores)
        elif not any(bool(score.any()) for score in scores.values()):
            raise UserError(
                f"SynFlow: with {masks.kept} of {masks.size} weights left, after {step} of "
                f"{len(steps)} iterations, nothing flows through the network: keep more"
            )
        # Roots keep the order, and bring what float64 holds into the range of float32.
        masks = narrow({name: score.pow(_ROOT).float() for name, score in scores.items()}, masks)
    return masks


def _at(step: int, steps: int, kept: int, size: int) -> int:
    """How many of `size` weights are left after a step, the last of which leaves `kept`."""
    if step == steps or not kept:
        return kept
    share: float = (kept / size) ** (step / steps)
    return max(kept, round(size * share))


def _evaluated(
    model: nn.Module, image_shape: Sequence[int], masks: Masks, ranks: Ranks
) -> dict[str, Tensor]:
    """The scores of the masked network; the model itself is not touched."""
    parameters = {n: p.detach().double().abs_() for n, p in model.named_parameters()}
    for name, mask in masks.items():
        parameters[name].mul_(mask).requires_grad_()
    buffers = {n: b.double() if b.is_floating_point() else b for n, b in model.named_buffers()}
    weights = [parameters[name] for name in masks]
    image = torch.ones(1, *image_shape, dtype=torch.float64, device=weights[0].device)
    with undisturbed(model, training=False):
        flow = functional_call(model, {**parameters, **buffers}, (image,)).sum()
        gradients = torch.autograd.grad(flow, weights, materialize_grads=True)
    scores = {
        name: (gradient * weight.detach()).abs()
        for name, gradient, weight in zip(masks, gradients, weights, strict=True)
    }
    if ranks.world_size > 1:  # kernels of GPUs may differ in the last bit, and choose otherwise
        scores = {name: ranks.reduce(s) / ranks.world_size for name, s in scores.items()}
    return scores
