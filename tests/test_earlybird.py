"""Early-bird search: when a ticket is drawn, what the penalty adds, what a resume takes up."""

import math
from typing import Any

import pytest
import torch
from states import Dense, state_of
from torch import Tensor, nn

from data.errors import RunError
from data.loader import Batch
from pruning.channels import Channels
from pruning.earlybird import EarlyBird, Search, are_alike, differing
from train.engine import Engine
from train.objective import Objective
from train.optim import OptimizerConfig, build_optimizer


def mask(text: str) -> Tensor:
    return torch.tensor([letter == "x" for letter in text])


# ---- when masks are alike


def test_four_masks_are_not_enough() -> None:
    same = mask("xx........")
    assert not are_alike([same] * 4, 0.1)
    assert are_alike([same] * 5, 0.1)
    assert are_alike([same] * 5, 0.0)


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        (["xx........"] * 4, [0, 0, 0, 0]),
        (["xx........", "x.........", "xxx.......", "xx........"], [0, 1, 1, 0]),
        (["x.x.......", "xx........", "xx........", "xx........"], [2, 0, 0, 0]),
        (["..xx......", "xx........", "xx........", "xxx......x"], [4, 0, 0, 2]),
    ],
)
def test_the_newest_is_compared_with_each_of_the_others(
    others: list[str], expected: list[int]
) -> None:
    """Of 10 channels one may be in one of the masks only, at a distance of 0.1: that is at most."""
    masks = [mask(text) for text in (*others, "xx........")]
    assert differing(masks) == expected
    assert are_alike(masks, 0.1) is (max(expected) <= 1)
    assert are_alike(masks, 0.2) is (max(expected) <= 2)


def test_masks_that_drift_are_not_alike() -> None:
    """Each is within a tenth of the one before it, the last one 4 channels from the first."""
    drifting = [mask("." * n + "xx" + "." * (18 - n)) for n in range(5)]
    assert differing(drifting) == [4, 4, 4, 2]
    assert not are_alike(drifting, 0.1)
    assert are_alike(drifting, 0.2)


def test_a_distance_is_the_decimal_number_that_was_written() -> None:
    """0.29 of 100 channels are 29, though 0.29 * 100 is a little less in binary."""
    assert 0.29 * 100 < 29
    masks = [torch.arange(100) < 29] * 4 + [torch.zeros(100, dtype=torch.bool)]
    assert are_alike(masks, 0.29)
    assert not are_alike(masks, 0.28)


# ---- a search, look by look


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 10, 3, bias=False),
            nn.BatchNorm2d(10),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(40, 10),
        )


def batch() -> Batch:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(16, 1, 4, 4, generator=generator)
    return Batch(images, torch.randint(0, 10, (16,), generator=generator))


class Rig:
    """A network of ten channels, of which densities are drawn."""

    def __init__(self, *densities: float, searches: bool = True, **options: Any) -> None:
        chosen = {"interval": 1, "penalty": 0.5, **options.pop("search", {})}
        self.engine = Engine(**options)
        self.model = network()
        prepared = self.engine.prepare(self.model, batch().images)
        self.optimizer = build_optimizer(self.model, OptimizerConfig(lr=0.1, weight_decay=0.0))
        search = Search(Channels(network(), (1, 4, 4)), densities, **chosen)
        self.sparsity = EarlyBird(search, self.model, self.optimizer)
        used = self.sparsity if searches else Dense()
        self.state = state_of(self.engine, prepared, self.optimizer, used, batch_size=16)

    @property
    def scales(self) -> nn.Parameter:
        found: nn.Parameter = self.model[1].weight  # type: ignore[index, assignment]
        return found

    def look(self, best: str, step: int) -> None:
        """After `step` steps, the scales of these channels being the largest."""
        with torch.no_grad():
            self.scales.copy_(mask(best).float() + 0.1)
        self.sparsity.after_update(step - 1)

    def step(self) -> None:
        self.engine.backward(self.state, batch(), Objective(10))
        self.engine.update(self.state)
        self.state.step += 1


COURSE = ["xx........", "x.x.......", "x..x......", "x...x.....", "x....x....", "x.....x..."]


def test_a_density_is_drawn_at_the_fifth_of_five_masks_alike() -> None:
    """Two of ten channels, which change at first: with 0.1 the fifth after the last change."""
    rig = Rig(0.2)
    steps = [*COURSE[:3], *["xx........"] * 6]
    for number, best in enumerate(steps, 1):
        rig.look(best, number)
        assert rig.sparsity.drawn == ({} if number < 8 else {0.2: 8}), number


def test_a_loose_distance_draws_what_still_changes() -> None:
    """All are two channels apart: at 0.2 the fifth mask is the first that can be drawn."""
    for distance, expected in ((0.19, {}), (0.2, {0.2: 5})):
        rig = Rig(0.2, search={"distance": distance})
        for number, best in enumerate(COURSE[:5], 1):
            rig.look(best, number)
        assert rig.sparsity.drawn == expected


def test_looks_are_an_interval_apart() -> None:
    rig = Rig(0.2, search={"interval": 3})
    for step in range(1, 16):
        rig.look("xx........", step)
        assert rig.sparsity.drawn == ({} if step < 15 else {0.2: 15})


def test_each_density_is_drawn_by_itself_and_once() -> None:
    """The best channel stays from the start on, the second best from the third look on."""
    rig = Rig(0.2, 0.1)
    with torch.no_grad():
        for number in range(1, 12):
            values = torch.full((10,), 0.1)
            values[0], values[min(number, 3)] = 2.0, 1.0
            rig.scales.copy_(values)
            rig.sparsity.after_update(number - 1)
            expected = {} if number < 5 else {0.1: 5} if number < 7 else {0.1: 5, 0.2: 7}
            assert rig.sparsity.drawn == expected


def test_negative_scales_count_by_their_size() -> None:
    rig = Rig(0.1)
    with torch.no_grad():
        for number in range(1, 6):
            rig.scales.fill_(0.5)
            rig.scales[3] = (-1) ** number
            rig.sparsity.after_update(number - 1)
    assert rig.sparsity.drawn == {0.1: 5}


def test_facts_are_the_largest_distances() -> None:
    """None before there are two masks."""
    rig = Rig(0.2, 0.5)
    assert rig.sparsity.facts() == {}
    rig.look("xx........", 1)
    assert rig.sparsity.facts() == {}
    rig.look("..x...x...", 2)
    assert rig.sparsity.facts() == {"distance_0.2": 0.4, "distance_0.5": 0.2}
    assert rig.sparsity.distances(0.2) == [0.4]
    rig.look("..x...x...", 3)
    assert rig.sparsity.distances(0.2) == [0.4, 0.0]


def test_a_density_of_weights_is_looked_at_as_one() -> None:
    """A channel takes 9 + 2 + 40 of 510 weights: 0.25 is two channels."""
    rig = Rig(0.25, search={"of": "weights"})
    rig.look("xx........", 1)
    assert int(rig.sparsity.state_dict()["queues"]["0.25"].sum()) == 2


def test_scales_that_are_not_finite_end_the_run() -> None:
    rig = Rig(0.2)
    with torch.no_grad():
        rig.scales[3] = math.nan
    with pytest.raises(RunError, match=r"after 4 steps 1.weight is not finite; .*Lower optim"):
        rig.sparsity.after_update(3)


def test_less_than_a_channel_a_layer_is_refused() -> None:
    """What was enough at first may be none later: of a density of weights it depends on which."""
    with pytest.raises(RunError, match=r"after 3 steps density = 0.04 keeps 0 of 10 .* --name"):
        Rig(0.04).sparsity.after_update(2)


def test_nothing_is_masked_while_it_is_searched() -> None:
    rig = Rig(0.2)
    for _ in range(6):
        rig.step()
    assert (dict(rig.sparsity.masks), rig.sparsity.density) == ({}, 1.0)
    assert all(bool(parameter.all()) for parameter in rig.model.parameters())


# ---- the penalty


def gradients(**options: Any) -> list[dict[str, Tensor]]:
    """Of one update, with the penalty and without."""
    found = []
    for searches in (True, False):
        rig = Rig(0.2, searches=searches, **options)
        with torch.no_grad():
            rig.scales.copy_(torch.tensor([1.0, -1.0, 0.0, 2.0, -0.5, 1.0, 1.0, 1.0, 1.0, 0.0]))
        rig.step()
        found.append({name: p.grad.clone() for name, p in rig.model.named_parameters()})  # type: ignore[union-attr]
    return found


def test_the_penalty_is_lambda_times_the_sign_of_the_scales() -> None:
    """Nothing at zero; bit for bit the loss's gradient of all other parameters."""
    moved, alone = gradients()
    signs = torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    assert torch.equal(moved["1.weight"], alone["1.weight"] + 0.5 * signs)
    for name in moved.keys() - {"1.weight"}:
        assert torch.equal(moved[name], alone[name]), name


def test_micro_batches_add_the_penalty_once() -> None:
    moved, alone = gradients(micro_batch=4)
    term = moved["1.weight"] - alone["1.weight"]
    expected = 0.5 * torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    torch.testing.assert_close(term, expected, rtol=0, atol=1e-6)


def test_the_penalty_counts_in_the_norm_that_is_clipped() -> None:
    moved, _ = gradients(clip=0.25, search={"penalty": 100.0})
    norms = torch.stack([gradient.norm() for gradient in moved.values()])
    assert float(norms.norm()) == pytest.approx(0.25, rel=1e-4)


# ---- what a resume takes up


@pytest.mark.parametrize("steps", [0, 1, 4, 7, 9])
def test_a_resumed_search_is_the_uninterrupted_one(steps: int) -> None:
    """Before its first look, with less than five masks, with five, and with one drawn."""
    options: dict[str, Any] = {"search": {"distance": 0.1, "penalty": 0.01}}
    whole, first, resumed = (Rig(0.5, 0.2, **options) for _ in range(3))
    for _ in range(12):
        whole.step()
    assert whole.sparsity.drawn
    for _ in range(steps):
        first.step()
    resumed.state.load_state_dict(first.state.state_dict())
    for _ in range(12 - steps):
        resumed.step()
    assert resumed.sparsity.drawn == whole.sparsity.drawn
    assert resumed.sparsity.facts() == whole.sparsity.facts()
    for name, expected in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], expected)
