"""Training under masks that do not change."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pruning.masks import Masks

_KEEP_ZEROS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
"""optimizers under which a weight stays zero that is zero, with its state and its gradient"""


class FixedMasks:
    """A `Sparsity`: after every update, masked weights and their optimizer state are exactly zero.

    Gradients are masked before clipping, so that pruned entries do not count in the norm. After an
    update weights and optimizer state are projected: after the first one where the optimizer keeps
    zeros from then on, after each where it may mix entries (Muon). The forward pass and the
    parameters stay untouched. An infinite gradient stays non-finite (as after an overflow in fp16,
    when no step is taken), but one that several ranks have not told each other of.
    """

    def __init__(self, masks: Masks, model: nn.Module, optimizer: Optimizer) -> None:
        masks.project_(model)
        self._optimizer = optimizer
        self._named = dict(model.named_parameters())
        self._hold(masks)

    @torch.no_grad()
    def _hold(self, masks: Masks) -> None:
        """Keeps to these masks from now on; moves nothing by itself."""
        self._is_zero = False  # what is pruned, in weights and optimizer state
        self.masks = masks
        self.density = masks.density
        self._digest = masks.digest()
        # Factors of 0 and 1 in the layout of each weight, where anything is pruned at all: one
        # fused multiplication for all layers, and none for a dense network.
        self._factors = {
            self._named[name]: torch.empty_like(self._named[name]).copy_(mask)
            for name, mask in masks.items()
            if not bool(mask.all())
        }

    def gradient_masks(self, step: int) -> Masks:
        """Of pruned weights it needs no gradients."""
        return self.masks

    @torch.no_grad()
    def before_update(self, step: int) -> bool:
        """Masks the gradients; never vetoes."""
        _multiply([(w.grad, factor) for w, factor in self._factors.items() if w.grad is not None])
        return True

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """Zeroes pruned weights, and every optimizer state of a weight's shape."""
        if self._is_zero:
            return
        self._is_zero = type(self._optimizer) in _KEEP_ZEROS
        pairs: list[tuple[Tensor, Tensor]] = []
        for weight, factor in self._factors.items():
            pairs.append((weight, factor))
            for value in self._optimizer.state.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    pairs.append((value, factor))
        _multiply(pairs)

    def facts(self) -> dict[str, float]:
        """None: nothing changes."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The masks' digest: they belong to the ticket, and do not change."""
        return {"digest": self._digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises `ValueError` where the checkpoint was trained under other masks."""
        if state["digest"] != self._digest:
            raise ValueError("the checkpoint was trained under other masks")
        self._is_zero = False


def _multiply(pairs: list[tuple[Tensor, Tensor]]) -> None:
    if pairs:
        torch._foreach_mul_([value for value, _ in pairs], [factor for _, factor in pairs])
