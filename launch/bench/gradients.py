"""Times of a step that does nothing but to sum gradients over the ranks, as one rank of them."""

import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from launch.bench.measure import interleaved, median_ratio
from pruning.allocate import keep_top
from pruning.masks import Masks
from pruning.scores import magnitude
from train.engine import Engine
from train.reduction import Reduction

DENSITIES = (1.0, 0.35, 0.2, 0.05, 0.02)
_ROUNDS = 9


def measure_gradients() -> dict[str, Any]:
    """Medians of interleaved steps on the gradients of ResNet-50 in fp32, and their ratios.

    By density the seconds of a step, and its ratio to plain DDP's, round by round; `floor`: of a
    step that sends nothing.
    """
    engine = Engine()
    torch.manual_seed(0)
    masks = {d: keep_top(magnitude(timm.create_model("resnet50")), d) for d in DENSITIES}
    plain = _wrapped(engine)
    ours = {density: _packing(engine, masks[density]) for density in DENSITIES}

    def floor() -> None:
        with plain.no_sync():
            _step(plain)

    works: list[Callable[[], object]] = [lambda: _step(plain), floor]
    works += [lambda wrapped=wrapped: _step(wrapped) for wrapped in ours.values()]  # type: ignore[misc]
    for _ in range(2):  # in which DDP settles its buckets
        for work in works:
            work()
    plain_seconds, floor_seconds, *seconds = interleaved(*works, rounds=_ROUNDS)
    engine.close()
    return {
        "plain DDP, seconds": statistics.median(plain_seconds),
        "nothing sent, seconds": statistics.median(floor_seconds),
        **{
            f"{density:.0%}, seconds": statistics.median(own)
            for density, own in zip(ours, seconds, strict=True)
        },
        **{
            f"{density:.0%}, of plain DDP": median_ratio(own, plain_seconds)
            for density, own in zip(ours, seconds, strict=True)
        },
    }


class _Gradients(nn.Module):
    """ResNet-50's parameters, with a backward pass that costs next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.network = timm.create_model("resnet50")
        self.given = [torch.randn_like(p) for p in self.network.parameters()]

    def forward(self) -> Tensor:
        pairs = zip(self.network.parameters(), self.given, strict=True)
        return torch.stack([torch.dot(p.flatten(), g.flatten()) for p, g in pairs]).sum()


def _wrapped(engine: Engine) -> DistributedDataParallel:
    model = _Gradients()
    model.to(engine.device)
    model.given = [given.to(engine.device) for given in model.given]
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def _packing(engine: Engine, masks: Masks) -> DistributedDataParallel:
    """The same, its gradients summed as the engine sums them under these masks."""
    wrapped = _wrapped(engine)
    reduction = Reduction(wrapped.module)
    wrapped.register_comm_hook(reduction, Reduction.sum)
    named = {f"network.{name}": mask for name, mask in masks.to(engine.device).items()}
    reduction.need(named)
    return wrapped


def _step(wrapped: DistributedDataParallel) -> None:
    wrapped.zero_grad(set_to_none=True)
    wrapped().backward()


if __name__ == "__main__":
    _result = measure_gradients()
    if os.environ["RANK"] == "0":
        Path(sys.argv[1]).write_text(json.dumps(_result))
