"""What scores have in common: the network left as it was, and scores that tell weights apart."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from data.errors import UserError
from train.rng import kept_generators


@contextlib.contextmanager
def undisturbed(model: nn.Module, *, training: bool) -> Iterator[None]:
    """In training or evaluation mode, in full float32, without compilation; all is put back.

    That is modes of modules, buffers, and torch's generators. Compiled networks have no second
    derivatives, and fused attention neither, so that both are left out.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    device = next(model.parameters()).device
    model.train(training)
    try:
        with kept_generators(device), _eager(), _full_float32(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])


def _eager() -> contextlib.AbstractContextManager[Any]:
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """Without TensorFloat-32 in convolutions, which torch allows unless it is told otherwise."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def require_scores(method: str, scores: Mapping[str, Tensor]) -> None:
    """Raises `UserError`, beginning with the method, unless scores tell the weights apart.

    Each must be finite, and in each layer one must not be zero: zeros alone would be chosen by
    their places.
    """
    told = torch.stack(
        [
            torch.stack([score.isfinite().all(), score.count_nonzero() > 0])
            for score in scores.values()
        ]
    )
    for name, (finite, any_) in zip(scores, told.tolist(), strict=True):
        if not finite:
            raise UserError(
                f"{method}: a score of {name} is not finite: the weights or their gradients are "
                "too large; take another score or other weights"
            )
        if not any_:
            raise UserError(
                f"{method}: all scores of {name} are zero: no gradient reaches it (as behind gates "
                "that saturate, or normalisations that begin with zero, which model.zero_init_last "
                "= false prevents), or its weights are zero; exclude it, take another score, or "
                "weights that were trained for some steps"
            )
