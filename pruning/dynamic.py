"""Training under masks that change while it goes on: SET, RigL and gradual magnitude pruning.

Between two changes all of them are `FixedMasks`. A change is the same on every rank, which is
checked; its masks are in every checkpoint. "After t steps" counts optimizer steps and vetoed ones.

Choices where the papers leave them open, or differ from their code:

- SET and RigL count what they move as floor(share * nnz), and let what was just dropped be chosen
  again, as RigL's reference does (Algorithm 1: growth is among all that is not kept). It then was
  never gone: weight and optimizer state stay. So there is always enough to grow, and a dense layer
  stays as it is.
- Nothing changes at step 0, where the reference's counter would already let it: the first change
  is after dT steps, on weights that were trained. A vetoed step counts as one of the training's, as
  in Algorithm 1; the reference does not count it.
- What SET grows starts at zero, as in RigL's reference; the authors draw small random weights.
- Ties are kept, and grown, in the order of the flat index.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from data.order import stream_seed
from pruning.allocate import exact, keep_count, keep_counts
from pruning.fixed import FixedMasks
from pruning.masks import Masks
from pruning.packing import pack_bits, unpack_bits
from pruning.rewiring import Ramp, Rewiring, drop_smallest, grow_largest, grow_random
from train.ranks import ALONE, Ranks
from train.watch import diverged


class ChangingMasks(FixedMasks):
    """Fixed masks that are exchanged now and then, and therefore saved."""

    def __init__(
        self, masks: Masks, model: nn.Module, optimizer: Optimizer, *, ranks: Ranks = ALONE
    ) -> None:
        super().__init__(masks, model, optimizer)
        self._ranks = ranks

    def _change(self, step: int, choose: Callable[[], Masks]) -> None:
        """Takes other masks: what they drop and grow is zero, and its gradient and optimizer state.

        Raises `RunError` on all ranks where they choose different masks, or a weight is NaN.
        """
        try:
            masks = choose()
        except ValueError as error:  # a NaN
            raise diverged(step, error) from error
        self._hold(masks)
        self._ranks.require_same(self._digest, f"the masks after {step} steps")
        FixedMasks.before_update(self, step)
        FixedMasks.after_update(self, step)

    def state_dict(self) -> dict[str, Any]:
        """The masks, eight weights a byte, and their digest."""
        return {"digest": self._digest, "masks": _packed(self.masks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the masks of a checkpoint, whose weights are loaded already.

        Raises `ValueError` where they are of other weights, or damaged.
        """
        self._hold(self._unpacked(state["masks"]))
        if state["digest"] != self._digest:
            raise ValueError("the checkpoint's masks are not those that it was trained under")

    def _unpacked(self, packed: Mapping[str, Tensor]) -> Masks:
        if packed.keys() != self.masks.keys():
            raise ValueError("the checkpoint has masks of other weights")
        return Masks(
            {
                name: unpack_bits(packed[name].cpu().numpy(), tuple(mask.shape)).to(mask.device)
                for name, mask in self.masks.items()
            }
        )


class _Rewired(ChangingMasks):
    """Masks of a constant number of weights in each layer, that move."""

    def __init__(
        self,
        masks: Masks,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        rewiring: Rewiring,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(masks, model, optimizer, ranks=ranks)
        self._rewiring = rewiring
        self._kept = {row.name: row.kept for row in masks.table() if row.kept < row.size}
        self._remember(masks)

    def _remember(self, ever: Masks) -> None:
        self._ever, self._explored = ever, ever.density

    def _rewire(
        self, step: int, share: Callable[[int], int], grow: Callable[[str, Tensor, int], Tensor]
    ) -> None:
        """Of each layer's n weights the `share(n)` smallest are dropped, and as many grown."""

        def choose() -> Masks:
            masks = dict(self.masks)
            for name, num_kept in self._kept.items():
                count = share(num_kept)
                kept = drop_smallest(self._named[name], masks[name], count)
                masks[name] = grow(name, kept, count)
            return Masks(masks)

        self._change(step, choose)
        self._remember(Masks({name: self._ever[name] | m for name, m in self.masks.items()}))

    def facts(self) -> dict[str, float]:
        """The share of the weights that were ever active: R_s (ITOP, 2102.02887)."""
        return {"explored": self._explored}

    def state_dict(self) -> dict[str, Any]:
        """The masks, and which weights were ever active."""
        return {**super().state_dict(), "ever": _packed(self._ever)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._remember(self._unpacked(state["ever"]))


class SET(_Rewired):
    """Sparse evolutionary training, Mocanu et al. 2018 (1707.04780).

    After every dT steps zeta of each layer's weights, the smallest, give way to as many others,
    drawn at random by seed, layer and step.
    """

    def __init__(
        self,
        masks: Masks,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        rewiring: Rewiring,
        seed: int,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(masks, model, optimizer, rewiring=rewiring, ranks=ranks)
        self._seed, self._zeta = seed, exact(rewiring.fraction)

    def after_update(self, step: int) -> None:
        """Zeroes what is pruned; rewires where that is due."""
        super().after_update(step)
        done = step + 1
        if self._rewiring.is_due(done):
            self._rewire(
                done,
                lambda num_kept: math.floor(self._zeta * num_kept),
                lambda name, kept, count: grow_random(
                    kept, count, stream_seed(self._seed, name, done)
                ),
            )


class RigL(_Rewired):
    """Evci et al. 2020 (1911.11134): what grows are the largest gradients of inactive weights.

    A step that rewires is no optimizer step. Where the gradients are not finite, as after an
    overflow in fp16, it is put off to the next step.
    """

    _put_off = False

    def gradient_masks(self, step: int) -> Masks:
        """All gradients are needed where it rewires."""
        return Masks({}) if self._is_due(step) else self.masks

    def _is_due(self, step: int) -> bool:
        put_off = self._put_off and step < self._rewiring.until
        return bool(self._kept) and (self._rewiring.is_due(step) or put_off)

    def before_update(self, step: int) -> bool:
        """Rewires by the dense gradients, and vetoes the step, where that is due; masks them."""
        due = self._is_due(step)
        self._put_off = due and not self._all_finite()
        if not due or self._put_off:
            return super().before_update(step)
        share = self._rewiring.cosine(step)
        self._rewire(step, lambda num_kept: math.floor(share * num_kept), self._grow)
        return False

    def _grow(self, name: str, kept: Tensor, count: int) -> Tensor:
        weight = self._named[name]
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        return grow_largest(gradient, kept, count)

    def _all_finite(self) -> bool:
        """Whether all gradients are, on all ranks."""
        gradients = [self._named[name].grad for name in self._kept]
        known = [gradient.isfinite().all() for gradient in gradients if gradient is not None]
        if not known:
            return True
        return bool(self._ranks.reduce(torch.stack(known).all().int(), "min"))

    def state_dict(self) -> dict[str, Any]:
        """The masks, which weights were ever active, and whether a change is put off."""
        return {**super().state_dict(), "put_off": self._put_off}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        super().load_state_dict(state)
        self._put_off = bool(state["put_off"])


class GradualMagnitude(ChangingMasks):
    """Gradual magnitude pruning, Zhu and Gupta 2017 (1710.01878): what is pruned stays so."""

    def __init__(
        self,
        masks: Masks,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        ramp: Ramp,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(masks, model, optimizer, ranks=ranks)
        self._ramp = ramp
        if ramp.is_due(0):
            self._change(0, lambda: self._pruned(0))

    def after_update(self, step: int) -> None:
        """Zeroes what is pruned; prunes more where that is due."""
        super().after_update(step)
        if self._ramp.is_due(step + 1):
            self._change(step + 1, lambda: self._pruned(step + 1))

    def _pruned(self, step: int) -> Masks:
        """The largest weights among those that are left."""
        scores = {name: self._named[name].detach().abs().float() for name in self.masks}
        final = self._ramp.final
        if isinstance(final, int):
            return keep_count(
                scores, self._ramp.count(step, final, self.masks.size), within=self.masks
            )
        counts = {
            name: self._ramp.count(step, final[name], score.numel())
            for name, score in scores.items()
        }
        return keep_counts(scores, counts, within=self.masks)


def _packed(masks: Masks) -> dict[str, Tensor]:
    return {
        name: torch.frombuffer(bytearray(pack_bits(mask)), dtype=torch.uint8)
        for name, mask in masks.items()
    }
