"""How much a weight matters: `(model, batches, ...) -> {weight name: score}`, higher is kept."""

from collections.abc import Iterable

from torch import Tensor, nn

from data.loader import Batch
from pruning.masks import prunable


def magnitude(
    model: nn.Module, batches: Iterable[Batch] | None = None, *, exclude: Iterable[str] = ()
) -> dict[str, Tensor]:
    """The absolute value of each prunable weight, as float32 of its shape; needs no data."""
    return {name: w.detach().abs().float() for name, w in prunable(model, exclude).items()}
