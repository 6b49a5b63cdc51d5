"""Random sparse network transformation: what goes, the course of lambda, what an update does."""

import math
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from states import Dense, state_of
from torch import nn

from data.errors import UserError
from data.loader import Batch
from pruning.dual import Curve, Cycles, Going, Ramp, Transformation, num_pruned
from pruning.masks import Masks
from train.engine import Engine
from train.objective import Objective
from train.optim import OptimizerConfig, build_optimizer, optimizer_state

STEADY = Cycles(Ramp(0.5, 1, 1), length=4)
"""lambda is 0.5 at every step"""


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32, 10),
        )


def batch() -> Batch:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(16, 1, 4, 4, generator=generator)
    return Batch(images, torch.randint(0, 10, (16,), generator=generator))


class Rig:
    """A small network in training, transformed for 10 % of its weights."""

    def __init__(self, cycles: Cycles, *, transforms: bool = True, **options: Any) -> None:
        self.engine = Engine(**options)
        self.model = network()
        prepared = self.engine.prepare(self.model, batch().images)
        self.optimizer = build_optimizer(self.model, OptimizerConfig(lr=0.1, weight_decay=0.0))
        self.going = Going.of(self.model, seed=5)
        self.sparsity = Transformation(self.going, 0.1, cycles, self.model, self.optimizer)
        used = self.sparsity if transforms else Dense()
        self.state = state_of(self.engine, prepared, self.optimizer, used, batch_size=16)

    def step(self) -> None:
        self.engine.backward(self.state, batch(), Objective(10))
        self.engine.update(self.state)
        self.state.step += 1


# ---- which weights go


@pytest.mark.parametrize(
    ("density", "size", "expected"),
    [
        (0.1, 10, 9),
        (0.1, 11, 10),  # ceil(9.9) = 10 = n - 1
        (0.1, 100, 90),
        (0.9, 30, 3),  # 0.1 of 30 is 3, and no rounding error more
        (0.7, 10, 3),
        (0.05, 10, 9),  # ceil(9.5) = 10 would leave none
        (0.001, 7, 6),
        (0.5, 3, 2),
        (1.0, 8, 0),
        (0.5, 1, 0),
    ],
)
def test_a_layer_loses_min_of_ceil_rn_and_n_less_one(
    density: float, size: int, expected: int
) -> None:
    assert num_pruned(density, size) == expected


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, math.nan])
def test_a_density_outside_is_refused(density: float) -> None:
    with pytest.raises(UserError, match="must be above 0 and at most 1"):
        num_pruned(density, 10)


def test_after_c_of_c_cycles_the_ratio_is_one_less_a_power() -> None:
    """Of 1000 weights at 4 %: half-way 1 - 0.04^(1/2) = 80 %; of 32 at 1/32 in 5 cycles, halves."""
    assert [num_pruned(0.04, 1000, Fraction(c, 2)) for c in (1, 2)] == [800, 960]
    assert num_pruned(0.49, 10, Fraction(1, 2)) == 3  # and no rounding error more
    assert [num_pruned(1 / 32, 32, Fraction(c, 5)) for c in range(1, 6)] == [16, 24, 28, 30, 31]


def test_p_grows_by_index() -> None:
    """What was chosen stays chosen, from cycle to cycle and from density to density."""
    going = Going.of(network(), seed=1)
    shares = [Fraction(c, 5) for c in range(1, 6)]
    nested = [going.kept(0.2, share) for share in shares] + [going.kept(0.1), going.kept(0.02)]
    for larger, smaller in pairwise(nested):
        assert larger & smaller == smaller
        assert smaller.kept < larger.kept
    for share, masks in zip(shares, nested, strict=False):
        for row in masks.table():
            assert row.size - row.kept == num_pruned(0.2, row.size, share)


def test_places_are_a_function_of_the_seed_alone() -> None:
    """Not of the weights, and not of torch's generators; another seed draws others."""
    torch.manual_seed(0)
    first = Going.of(network(0), seed=1).kept(0.3)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    assert Going.of(network(7), seed=1).kept(0.3) == first
    assert torch.equal(torch.random.get_rng_state(), before)
    assert Going.of(network(0), seed=2).kept(0.3) != first


def test_places_are_uniform() -> None:
    """Of 8 weights each goes in half of 2000 draws, within five standard deviations."""
    layer = nn.Sequential(nn.Linear(4, 2, bias=False))
    draws = [Going.of(layer, seed=seed).kept(0.5)["0.weight"] for seed in range(2000)]
    counts = torch.stack(draws).sum(0)
    assert (counts - 1000).abs().max() < 5 * math.sqrt(2000) / 2


def test_min_takes_the_smallest_initial_weights() -> None:
    """By magnitude, ties by flat index, layer by layer."""
    layer = nn.Sequential(nn.Linear(4, 2, bias=False))
    weights = [[0.3, -0.1, 0.1, -0.9], [0.0, 0.2, -0.4, 0.1]]
    with torch.no_grad():
        layer[0].weight.copy_(torch.tensor(weights))  # type: ignore[operator]
    kept = Going.of(layer, pick="min", seed=0).kept(0.6)["0.weight"]  # ceil(0.4 * 8) = 4 go
    assert kept.tolist() == [[True, False, False, True], [False, True, True, False]]


def test_excluded_layers_stay_dense() -> None:
    kept = Going.of(network(), seed=0, exclude=["4"]).kept(0.1)
    assert list(kept) == ["0.weight"]
    with pytest.raises(UserError, match="exclude = 'fc' matches no"):
        Going.of(network(), seed=0, exclude=["fc"])


# ---- the course of lambda


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ("x", [0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1.0, 1.0, 1.0]),
        ("x^2", [0.0625, 0.0625, 0.25, 0.25, 0.5625, 0.5625, 1.0, 1.0, 1.0]),
        ("x^3", [0.015625, 0.015625, 0.125, 0.125, 0.421875, 0.421875, 1.0, 1.0, 1.0]),
    ],
)
def test_lambda_grows_by_steps_and_stays(curve: Curve, expected: list[float]) -> None:
    """c = 1/4, 1/2, 3/4, 1, every second step, and then the last lambda; by hand."""
    ramp = Ramp.within(8, interval=2, limit=1.0, increment=0.25, curve=curve)
    assert [ramp.at(step) for step in range(9)] == expected
    assert ramp.length == 7


def test_lambda_ends_at_the_first_value_that_is_not_below_the_limit() -> None:
    """Increments of 0.3 end at 1.2; squared, c = 1.5 is the first with c^2 above 2."""
    ramp = Ramp.within(4, interval=1, limit=1.0, increment=0.3, curve="x")
    assert [ramp.at(step) for step in range(6)] == pytest.approx([0.3, 0.6, 0.9, 1.2, 1.2, 1.2])
    squares = Ramp.within(9, interval=1, limit=2.0, increment=0.5, curve="x^2")
    assert [squares.at(step) for step in range(4)] == [0.25, 1.0, 2.25, 2.25]


def test_the_papers_ramps_take_the_papers_steps() -> None:
    """10,000 increments of 1e-4: 49,996 steps and 40,000 more; 5 cycles of 20,000."""
    once = Ramp.within(50_000, interval=5, limit=1.0, increment=1e-4, curve="x")
    assert (once.num_updates, once.length + 40_000) == (10_000, 89_996)
    cycle = Ramp.within(10_000, interval=1, limit=1.0, increment=1e-4, curve="x")
    assert Cycles(cycle, cycle.length + 10_000, 5).steps == 100_000


@pytest.mark.parametrize("curve", ["x", "x^2", "x^3"])
@pytest.mark.parametrize(("steps", "interval"), [(1, 1), (7, 1), (7, 3), (100, 5), (101, 5)])
def test_without_an_increment_the_ramp_takes_its_time(
    curve: Curve, steps: int, interval: int
) -> None:
    """The last lambda, which is the limit, comes in the last interval that begins within it."""
    ramp = Ramp.within(steps, interval=interval, limit=0.7, increment=None, curve=curve)
    assert ramp.length <= steps < ramp.length + interval
    assert ramp.at(steps) == pytest.approx(0.7)
    assert ramp.num_updates == 1 or ramp.at(ramp.length - 2) < 0.69


def test_a_ramp_that_takes_longer_is_refused() -> None:
    with pytest.raises(ValueError, match="after 100 increments, which take 199 steps of the 198"):
        Ramp.within(198, interval=2, limit=1.0, increment=0.01, curve="x")
    Ramp.within(199, interval=2, limit=1.0, increment=0.01, curve="x")


def test_lambda_begins_anew_in_each_cycle() -> None:
    cycles = Cycles(Ramp(0.5, 1, 2), length=3, number=2)
    assert [cycles.penalty_at(step) for step in range(6)] == [0.5, 1.0, 1.0, 0.5, 1.0, 1.0]
    assert [cycles.share_at(step) * 2 for step in range(7)] == [1, 1, 1, 2, 2, 2, 2]


# ---- an update


def test_what_goes_gets_its_term_and_what_stays_none() -> None:
    """grad + lambda W on P, to rounding; bit for bit the loss's gradient everywhere else."""
    transformed, plain = Rig(STEADY), Rig(STEADY, transforms=False)
    kept = transformed.going.kept(0.1)
    weights = {name: p.detach().clone() for name, p in plain.model.named_parameters()}
    for rig in (transformed, plain):
        rig.step()
    for (name, moved), alone in zip(
        transformed.model.named_parameters(), plain.model.parameters(), strict=True
    ):
        assert moved.grad is not None
        assert alone.grad is not None
        stays = kept.get(name, torch.ones_like(moved, dtype=torch.bool))
        assert torch.equal(moved.grad[stays], alone.grad[stays])
        expected = alone.grad + 0.5 * weights[name]
        torch.testing.assert_close(moved.grad[~stays], expected[~stays], rtol=1e-6, atol=1e-7)
        assert bool((moved.grad != alone.grad)[~stays].all())


def term(**options: Any) -> dict[str, torch.Tensor]:
    """What the penalty adds to the gradients of one update."""
    rigs = [Rig(STEADY, **options), Rig(STEADY, transforms=False, **options)]
    for rig in rigs:
        rig.step()
    moved, alone = (dict(rig.model.named_parameters()) for rig in rigs)
    return {name: moved[name].grad - alone[name].grad for name in moved}  # type: ignore[operator]


def test_micro_batches_add_the_term_once() -> None:
    whole, parts = term(), term(micro_batch=4)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=1e-6)
    assert any(bool(value.any()) for value in whole.values())


def test_the_term_counts_in_the_norm_that_is_clipped() -> None:
    """The penalty comes before clipping: the norm of all gradients is the limit."""
    rig = Rig(Cycles(Ramp(100.0, 1, 1), length=4), clip=0.5)
    rig.step()
    norms = [p.grad.norm() for p in rig.model.parameters() if p.grad is not None]
    assert float(torch.stack(norms).norm()) == pytest.approx(0.5, rel=1e-4)


def test_nothing_is_masked_while_weights_are_going() -> None:
    rig = Rig(STEADY)
    rig.step()
    masks = rig.sparsity.masks
    assert rig.sparsity.density == masks.density == 1.0
    assert list(masks) == list(Masks.ones(rig.model))
    assert all(bool(weight.all()) for name, weight in rig.model.named_parameters() if name in masks)
    assert rig.sparsity.facts()["lambda"] == 0.5
    kept, weights = rig.going.kept(0.1), rig.model.state_dict()
    squares = sum(float(weights[name][~mask].square().sum()) for name, mask in kept.items())
    assert rig.sparsity.facts()["going_norm"] == pytest.approx(math.sqrt(squares))


def test_what_goes_decays_by_the_penalty_alone_where_no_loss_is() -> None:
    """With zero gradients and no momentum: W <- (1 - lr lambda) W on P, W on the rest."""
    rig = Rig(STEADY)
    before = {name: p.detach().clone() for name, p in rig.model.named_parameters()}
    for parameter in rig.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    rig.engine.update(rig.state)
    for name, mask in rig.going.kept(0.1).items():
        weight = dict(rig.model.named_parameters())[name]
        expected = torch.where(mask, before[name], before[name] * (1 - 0.1 * 0.5))
        torch.testing.assert_close(weight, expected)


def test_each_cycle_has_more_to_go_and_a_fresh_optimizer() -> None:
    """After the last step of a cycle nothing is left of the momentum."""
    rig = Rig(Cycles(Ramp(0.5, 1, 1), length=2, number=2))
    fresh = optimizer_state(rig.model, rig.optimizer)
    rig.step()
    assert rig.optimizer.state
    rig.step()
    assert optimizer_state(rig.model, rig.optimizer) == fresh
    first = rig.sparsity.facts()["going_norm"]
    rig.step()
    assert rig.sparsity.facts()["going_norm"] > first


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_a_resumed_transformation_is_the_uninterrupted_one(steps: int) -> None:
    """Before, at and after the end of a cycle; weights and momentum, bit for bit."""
    course = Cycles(Ramp(0.1, 1, 3), length=2, number=3)
    whole, first, resumed = Rig(course), Rig(course), Rig(course)
    for _ in range(6):
        whole.step()
    for _ in range(steps):
        first.step()
    resumed.state.load_state_dict(first.state.state_dict())
    for _ in range(6 - steps):
        resumed.step()
    for mine, theirs in zip(
        resumed.model.state_dict().values(), whole.model.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_a_checkpoint_for_other_masks_is_refused() -> None:
    rig = Rig(STEADY)
    saved = rig.sparsity.state_dict()
    rig.sparsity.load_state_dict(saved)
    other = Transformation(rig.going, 0.2, STEADY, rig.model, rig.optimizer)
    with pytest.raises(ValueError, match="other masks"):
        other.load_state_dict(saved)
