"""`tombola bench scores`: choosing weights by scores, against a sort in every forward pass."""

import statistics
from typing import Any

import torch
from torch import Tensor, nn

from launch.bench.measure import interleaved, median_ratio, report
from launch.bench.networks import Size, scores_of
from launch.bench.peers.sorting import sort_mask
from pruning.choosing import choose
from pruning.multiprize import score, scored_layers

_DENSITY, _ROUNDS = 0.2, 3
_SIZE: Size = "wide_resnet50_2"
Layers = dict[str, Tensor]


def bench_scores(*, as_json: bool) -> None:
    """The layers of a WideResNet-50-2, of each a fifth is kept; once for a training step.

    `selection` is what finds the masks. `step` is all that a step does between scores and
    convolutions and back: masks, gains, binary weights, and the gradient of the scores. The
    reference does as biprop's code does: it sorts every layer's scores in each forward pass, so
    that micro-batches and evaluations cost it as much again.
    """
    scores = scores_of(_SIZE)
    generator = torch.Generator(next(iter(scores.values())).device).manual_seed(1)
    drawn = {
        name: torch.empty_like(value).normal_(generator=generator) for name, value in scores.items()
    }
    ours, theirs = _Ours(scores, drawn), _Biprop(scores, drawn)
    works = (
        lambda: choose(scores, _DENSITY),
        lambda: [sort_mask(value, _DENSITY) for value in scores.values()],
        ours.step,
        theirs.step,
    )
    chosen, by_sort, our_step, their_step = interleaved(*works, rounds=_ROUNDS)
    total = sum(value.numel() for value in scores.values())
    result: dict[str, Any] = {
        "work": f"{_SIZE}, {total / 1e6:.1f}M scores in {len(scores)} layers, density {_DENSITY}",
        "selection seconds": statistics.median(chosen),
        "sort seconds": statistics.median(by_sort),
        "sort / selection": median_ratio(by_sort, chosen),
        "step seconds": statistics.median(our_step),
        "biprop step seconds": statistics.median(their_step),
        "biprop step / step": median_ratio(their_step, our_step),
        "differing weights (ties)": _num_differing(ours, theirs),
    }
    report(result, as_json=as_json)


class _Ours:
    """Layers as `pruning.multiprize` has them, without convolutions."""

    def __init__(self, scores: Layers, weights: Layers) -> None:
        network = nn.ModuleList()
        for value in scores.values():
            linear = nn.Linear(1, 1, bias=False, device=value.device)
            linear.weight = nn.Parameter(torch.empty_like(value))
            network.append(linear)
        score(network)
        self.layers = scored_layers(network)
        drawn = zip(self.layers.values(), weights.values(), scores.values(), strict=True)
        for layer, weight, value in drawn:
            layer.draw(weight)
            layer.scores.data.copy_(value)
        self.upstream = [torch.ones_like(value) for value in scores.values()]
        self.used: list[Tensor] = []

    def step(self) -> None:
        masks = choose({name: layer.scores for name, layer in self.layers.items()}, _DENSITY)
        self.used = []
        for (name, layer), gradient in zip(self.layers.items(), self.upstream, strict=True):
            layer.keep(masks[name])
            layer.scores.grad = None
            layer.weight.backward(gradient)
            self.used.append(layer.binary)


class _Biprop:
    """The way of the authors' code: a function that sorts in each forward pass."""

    def __init__(self, scores: Layers, weights: Layers) -> None:
        self.scores = [value.clone().requires_grad_() for value in scores.values()]
        self.weights = list(weights.values())
        self.upstream = [torch.ones_like(value) for value in scores.values()]
        self.used: list[Tensor] = []

    def step(self) -> None:
        self.used = []
        for scores, weight, gradient in zip(self.scores, self.weights, self.upstream, strict=True):
            scores.grad = None
            with torch.no_grad():
                mask = sort_mask(scores.abs(), _DENSITY)
                used = weight.sign() * mask * ((weight.abs() * mask).sum() / mask.sum())
            scores.grad = gradient * weight * scores.sign()
            self.used.append(used)


def _num_differing(ours: _Ours, theirs: _Biprop) -> int:
    """How many weights the two ways choose otherwise: where scores are tied."""
    pairs = zip(ours.used, theirs.used, strict=True)
    return sum(int(((one != 0) != (other != 0)).sum()) for one, other in pairs)
