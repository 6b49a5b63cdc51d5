"""Random weights by a seed: signs, magnitudes, and their variance."""

import math

import pytest
import torch

from pruning.philox import signs
from pruning.random_weights import Init, RandomWeights, Scaled, random_signs

SHAPE = (64, 32, 3, 3)
FAN_IN = 32 * 9


@pytest.mark.parametrize("init", ["signed_constant", "kaiming_normal"])
@pytest.mark.parametrize(("scaled", "share"), [("none", 1.0), ("density", 0.2), ("biprop", 0.8)])
def test_the_variance_is_two_over_the_fan_in(init: Init, scaled: Scaled, share: float) -> None:
    """Of all inputs; of the kept ones; or, as the authors have it, of the pruned ones."""
    weight = RandomWeights(3, init, scaled).weight(SHAPE, 0, 0.2)
    assert float(weight.square().mean()) == pytest.approx(2 / (FAN_IN * share), rel=0.03)


def test_signs_are_those_of_the_generator() -> None:
    """Bit i is the sign of weight i in row-major order, whatever the magnitudes are."""
    positive = torch.from_numpy(signs(math.prod(SHAPE), seed=3, layer=5)).view(SHAPE)
    for init in ("signed_constant", "kaiming_normal"):
        weight = RandomWeights(3, init).weight(SHAPE, 5, 1.0)  # type: ignore[arg-type]
        assert torch.equal(weight > 0, positive)
    assert torch.equal(random_signs(SHAPE, seed=3, layer=5) > 0, positive)


def test_a_signed_constant_has_one_magnitude() -> None:
    weight = RandomWeights(3).weight(SHAPE, 0, 1.0)
    assert weight.abs().unique().tolist() == pytest.approx([math.sqrt(2 / FAN_IN)])


def test_a_normal_weight_is_normal() -> None:
    """Its quantiles of magnitude are those of the half-normal distribution."""
    weight = RandomWeights(3, "kaiming_normal").weight((512, 512), 0, 1.0) * math.sqrt(512 / 2)
    for deviations, share in ((0.5, 0.3829), (1.0, 0.6827), (2.0, 0.9545)):
        assert float((weight.abs() < deviations).float().mean()) == pytest.approx(share, abs=0.004)


def test_scores_are_uniform_and_signed() -> None:
    scores = RandomWeights(3).scores(SHAPE, 0) * math.sqrt(FAN_IN)
    assert float(scores.abs().max()) <= 1
    assert float(scores.mean()) == pytest.approx(0, abs=0.02)
    assert float(scores.square().mean()) == pytest.approx(1 / 3, abs=0.01)


def test_layers_and_seeds_differ() -> None:
    one = RandomWeights(3).weight(SHAPE, 0, 1.0)
    for other in (RandomWeights(3).weight(SHAPE, 1, 1.0), RandomWeights(4).weight(SHAPE, 0, 1.0)):
        assert 0.45 < float((one == other).float().mean()) < 0.55
