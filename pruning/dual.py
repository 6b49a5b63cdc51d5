"""Random sparse network transformation (RST): weights for a structure that was drawn at random.

Bai et al. 2022 (2203.04248), "Dual Lottery Ticket Hypothesis". Where iterative pruning looks for a
structure that fits the weights, RST moves the weights until they fit a structure: those that will
go are drawn to zero by a penalty that grows, while all are trained, so that the rest takes over.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from data.errors import UserError
from data.order import random_permutation, stream_seed
from pruning.allocate import exact
from pruning.masks import Masks, prunable
from train.optim import load_optimizer_state, optimizer_state

Pick = Literal["random", "min"]
Curve = Literal["x", "x^2", "x^3"]
_POWERS: dict[Curve, int] = {"x": 1, "x^2": 2, "x^3": 3}
_DIGITS = 6  # a rounding error of the ratio is not one weight more


# Which weights will go ------------------------------------------------------------------------


def num_pruned(density: float, size: int, share: Fraction = Fraction(1)) -> int:
    """How many of a layer's weights will go: min(ceil(r n), n - 1), r = 1 - density.

    After a `share` c / C of the cycles the ratio is 1 - (1 - r)^(c / C). Raises `UserError` for a
    density outside (0, 1].
    """
    if not 0 < density <= 1:
        raise UserError(f"density = {density}: must be above 0 and at most 1")
    if share == 1:
        wanted = math.ceil((1 - exact(density)) * size)
    else:
        wanted = math.ceil(round((1 - density ** float(share)) * size, _DIGITS))
    return min(wanted, size - 1)


class Going:
    """In which order the weights of each layer go: the first ones at a density are P.

    What goes at a density goes at every lower one too, so that P grows from cycle to cycle.
    """

    def __init__(self, orders: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._orders, self._shapes = dict(orders), dict(shapes)

    @classmethod
    def of(
        cls, model: nn.Module, *, pick: Pick = "random", seed: int, exclude: Iterable[str] = ()
    ) -> "Going":
        """Drawn from `seed`, or, as the ablation `min`, the smallest weights of `model` first.

        Equal on every machine (`random`). Ties go by flat index. Raises `UserError` as `prunable`.
        """
        orders, shapes = {}, {}
        for name, weight in prunable(model, exclude).items():
            flat = weight.detach().cpu().flatten()
            if pick == "min":
                orders[name] = flat.abs().argsort(stable=True)
            else:
                places = random_permutation(stream_seed(seed, name), flat.numel())
                orders[name] = torch.from_numpy(places)
            shapes[name] = tuple(weight.shape)
        return cls(orders, shapes)

    def kept(self, density: float, share: Fraction = Fraction(1)) -> Masks:
        """The masks of what stays, on the CPU: all but P after a `share` of the cycles."""
        masks = {}
        for name, order in self._orders.items():
            mask = torch.ones(order.numel(), dtype=torch.bool)
            mask[order[: num_pruned(density, order.numel(), share)]] = False
            masks[name] = mask.view(self._shapes[name])
        return Masks(masks)


# How strongly they are drawn to zero ----------------------------------------------------------


@dataclass(frozen=True)
class Ramp:
    """lambda as a function of the step: c grows by `increment` at the first step and then at
    every `interval`-th, `num_updates` times; lambda is c, c^2 or c^3."""

    increment: float
    interval: int
    num_updates: int
    curve: Curve = "x"

    @classmethod
    def within(
        cls, steps: int, *, interval: int, limit: float, increment: float | None, curve: Curve
    ) -> "Ramp":
        """The ramp to the first lambda that is at least `limit`, in at most `steps` steps.

        Without an increment, the one that takes all of them. Raises `ValueError` where a given one
        takes longer.
        """
        power = _POWERS[curve]
        if increment is None:
            num_updates = (steps - 1) // interval + 1
            return cls(limit ** (1 / power) / num_updates, interval, num_updates, curve)
        step, goal = exact(increment), exact(limit)
        num_updates = max(1, math.floor(limit ** (1 / power) / increment) - 1)
        while (num_updates * step) ** power < goal:
            num_updates += 1
        ramp = cls(increment, interval, num_updates, curve)
        if ramp.length > steps:
            raise ValueError(
                f"increment = {increment}: lambda reaches limit = {limit} after {num_updates} "
                f"increments, which take {ramp.length} steps of the {steps} of the ramp: take a "
                "larger one, a longer ramp or a shorter interval"
            )
        return ramp

    @property
    def length(self) -> int:
        """The number of steps up to the first with the last lambda, that one included."""
        return (self.num_updates - 1) * self.interval + 1

    def at(self, step: int) -> float:
        """lambda at a step of the cycle, counted from 0."""
        count = min(step // self.interval + 1, self.num_updates)
        return float((count * self.increment) ** _POWERS[self.curve])


@dataclass(frozen=True)
class Cycles:
    """The course of a transformation: `number` times a ramp and a time at its last lambda."""

    ramp: Ramp
    length: int
    """steps of a cycle: of its ramp, and at the last lambda"""
    number: int = 1

    @property
    def steps(self) -> int:
        """Of all cycles."""
        return self.length * self.number

    def penalty_at(self, step: int) -> float:
        """lambda, which begins anew in each cycle."""
        return self.ramp.at(step % self.length)

    def share_at(self, step: int) -> Fraction:
        """Of the cycles, the one of `step` included: how far P has grown."""
        return Fraction(min(step // self.length + 1, self.number), self.number)


class Transformation:
    """A `Sparsity` that masks nothing: it adds lambda * W to the gradients of what will go.

    That is lambda / 2 * ||W_P||^2 on top of the loss, once an optimizer step, on the gradients of
    the whole global batch, before they are clipped. The gradients of what stays are not touched.
    After each cycle the optimizer is a fresh one. All of it is a function of the step.
    """

    density = 1.0
    """nothing is masked yet"""

    def __init__(
        self,
        going: Going,
        density: float,
        cycles: Cycles,
        model: nn.Module,
        optimizer: Optimizer,
    ) -> None:
        self._going, self._density, self._cycles = going, density, cycles
        self._model, self._optimizer = model, optimizer
        self._fresh = optimizer_state(model, optimizer)
        self._digest = going.kept(density).digest()
        self._share, self._penalty = Fraction(0), 0.0
        self._factors: dict[nn.Parameter, Tensor] = {}

    @property
    def masks(self) -> Masks:
        """All ones, while the weights that will go are still there."""
        named = dict(self._model.named_parameters())
        kept = self._going.kept(1.0)
        return kept.to(next(iter(named.values())).device)

    def gradient_masks(self, step: int) -> Mapping[str, Tensor]:
        """All: what will go is trained until it is gone."""
        return {}

    @torch.no_grad()
    def before_update(self, step: int) -> bool:
        """Adds the penalty's gradient; never vetoes."""
        self._grow(self._cycles.share_at(step))
        self._penalty = self._cycles.penalty_at(step)
        moved = [(w.grad, w, factor) for w, factor in self._factors.items() if w.grad is not None]
        if moved:
            gradients, weights, factors = map(list, zip(*moved, strict=True))
            torch._foreach_addcmul_(gradients, weights, factors, self._penalty)
        return True

    def _grow(self, share: Fraction) -> None:
        """Has P as it is after a share of the cycles, as factors 1 in the layout of each weight."""
        if share == self._share:
            return
        named = dict(self._model.named_parameters())
        self._factors = {
            named[name]: torch.empty_like(named[name]).copy_(~mask)
            for name, mask in self._going.kept(self._density, share).items()
            if not bool(mask.all())
        }
        self._share = share

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """At the end of a cycle begins the optimizer anew."""
        if (step + 1) % self._cycles.length == 0:
            load_optimizer_state(self._model, self._optimizer, self._fresh)

    @torch.no_grad()
    def facts(self) -> dict[str, float]:
        """`lambda` of the last step, and `going_norm`: ||W_P|| after it."""
        squares = [(weight * factor).square().sum() for weight, factor in self._factors.items()]
        norm = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
        return {"lambda": self._penalty, "going_norm": norm}

    def state_dict(self) -> dict[str, Any]:
        """The digest of the masks to come: all else is a function of the step."""
        return {"digest": self._digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises `ValueError` where the checkpoint was transformed for other masks."""
        if state["digest"] != self._digest:
            raise ValueError("the checkpoint was transformed for other masks")
