"""N:M masks: of every m weights in a row along a layer's inputs, n are kept.

Mishra et al. 2021 (2104.08378, section 3): 2:4 is what NVIDIA's sparse tensor cores compute with.
The row goes along the input dimension, the second of a weight `[out, in, ...]`: of a convolution,
the input channels at one place of the kernel.
"""

import math
import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from data.errors import UserError
from data.order import random_permutation, stream_seed
from pruning.densities import Shapes
from pruning.masks import Masks

Misfits = Literal["refuse", "dense"]


class Pattern(NamedTuple):
    """`n` of every `m` weights."""

    n: int
    m: int

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Reads `"2:4"`. Raises `ValueError`."""
        match = re.fullmatch(r"(\d+):(\d+)", text.strip())
        if match is None or not 0 < int(match[1]) < int(match[2]):
            raise ValueError(f"{text!r} is no pattern: write '2:4' for two of every four weights")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape has whole groups."""
        return shape[1] % self.m == 0

    def require_fit(self, shapes: Shapes) -> None:
        """Raises `UserError` naming the first layer without whole groups."""
        for name, shape in shapes.items():
            if not self.fits(shape):
                raise UserError(
                    f"pattern = '{self}': {name} of {shape} has {shape[1]} inputs, not a multiple "
                    f"of {self.m}: exclude it, or set misfits = 'dense' to leave such layers dense"
                )

    def counts(self, shapes: Shapes) -> dict[str, int]:
        """How many weights each layer keeps; one without whole groups keeps all."""
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        return {
            name: size * self.n // self.m if self.fits(shapes[name]) else size
            for name, size in sizes.items()
        }


def n_of_m(
    scores: Mapping[str, Tensor],
    n: int = 2,
    m: int = 4,
    *,
    misfits: Misfits = "refuse",
    within: Masks | None = None,
) -> Masks:
    """Masks of the `n` largest scores of every `m` in a row along the inputs, ties by index.

    `scores`: `[out, in, ...]` of any float type; `misfits`: whether a layer whose inputs are no
    multiple of `m` is refused (`UserError`) or stays dense; `within`: what is left, at least `n` in
    each group. Raises `ValueError` for a score that is NaN.
    """
    pattern = Pattern(n, m)
    if misfits == "refuse":
        pattern.require_fit({name: tuple(score.shape) for name, score in scores.items()})
    masks: dict[str, Tensor] = {}
    for name, score in scores.items():
        if bool(score.isnan().any()):
            raise ValueError(f"a score of {name} is NaN")
        if not pattern.fits(tuple(score.shape)):
            masks[name] = torch.ones_like(score, dtype=torch.bool)
            continue
        if within is not None:
            score = score.masked_fill(~within[name].to(score.device), -math.inf)
        masks[name] = _largest(score, pattern)
    return Masks(masks)


def _largest(score: Tensor, pattern: Pattern) -> Tensor:
    by_input = score.movedim(1, -1)  # [out, ..., in]
    groups = by_input.reshape(-1, pattern.m)
    kept = groups.argsort(dim=1, descending=True, stable=True)[:, : pattern.n]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, kept, True)
    return mask.view(by_input.shape).movedim(-1, 1).contiguous()


def random_n_of_m(shapes: Shapes, n: int, m: int, seed: int, *, misfits: Misfits) -> Masks:
    """Masks of `n` of every `m` weights at random places; equal on every machine."""
    scores = {
        name: torch.from_numpy(
            random_permutation(stream_seed(seed, name), math.prod(shape)).astype("float64")
        ).view(shape)
        for name, shape in shapes.items()
    }
    return n_of_m(scores, n, m, misfits=misfits)
