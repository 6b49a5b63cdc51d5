"""Scores of the shapes of real networks, for benchmarks that need no training."""

from typing import Literal

import timm
import torch
from torch import Tensor

from pruning.masks import prunable

Size = Literal["resnet50", "wide_resnet50_2", "1G"]
DEFAULT: tuple[Size, ...] = ("resnet50", "wide_resnet50_2")
ROUNDS = {"resnet50": 9, "wide_resnet50_2": 5, "1G": 1}
"""of a benchmark with work of that size"""
_BILLION = "vit_giant_patch14_clip_224"


def scores_of(size: Size) -> dict[str, Tensor]:
    """Magnitudes of a normal distribution, scaled by each layer's fan-in; float32."""
    with torch.device("meta"):
        model = timm.create_model(_BILLION if size == "1G" else size)
        shapes = {n: w.shape for n, w in prunable(model).items()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    scores = {}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=generator, device=device)
        scores[name] = drawn.abs_().mul_((2 / shape[1:].numel()) ** 0.5)
    return scores
