"""SET, RigL and gradual magnitude pruning: truth tables by hand, and what holds at every update."""

import math
from typing import Any

import pytest
import torch
from states import state_of
from torch import Tensor, nn

from data.errors import RunError
from data.loader import Batch
from data.order import random_permutation, stream_seed
from pruning.allocate import random_masks
from pruning.dynamic import SET, ChangingMasks, GradualMagnitude, RigL
from pruning.fixed import FixedMasks
from pruning.masks import Masks
from pruning.rewiring import Ramp, Rewiring, drop_smallest, grow_largest, grow_random
from train.engine import Engine
from train.nested import join_state, split_state
from train.objective import Objective
from train.optim import OptimizerConfig, build_optimizer, load_optimizer_state, optimizer_state

EVERY_2 = Rewiring(interval=2, fraction=0.5, until=9)


def bits(text: str) -> Tensor:
    return torch.tensor([character == "1" for character in text])


def shown(mask: Tensor) -> str:
    return "".join("1" if kept else "0" for kept in mask.flatten().tolist())


# ---- what is dropped and grown


@pytest.mark.parametrize(
    ("weights", "mask", "count", "left"),
    [
        ([0.1, -0.4, 0.0, 0.3, -0.2, 0.0], "110110", 0, "110110"),
        ([0.1, -0.4, 0.0, 0.3, -0.2, 0.0], "110110", 1, "010110"),
        ([0.1, -0.4, 0.0, 0.3, -0.2, 0.0], "110110", 3, "010000"),
        ([0.5, -0.5, 9.9, 0.5, -0.5, 9.9], "110110", 2, "110000"),  # ties: the later go
        ([0.0, 0.0, 9.9, 0.3, 0.0, 9.9], "110110", 2, "100100"),  # active zeros count as well
    ],
)
def test_the_smallest_active_weights_are_dropped(
    weights: list[float], mask: str, count: int, left: str
) -> None:
    assert shown(drop_smallest(torch.tensor(weights), bits(mask), count)) == left


@pytest.mark.parametrize(
    ("gradients", "kept", "count", "grown"),
    [
        ([9.0, 0.1, -0.3, 0.2, -9.0, 0.0], "100010", 0, "100010"),
        ([9.0, 0.1, -0.3, 0.2, -9.0, 0.0], "100010", 1, "101010"),
        ([9.0, 0.1, -0.3, 0.2, -9.0, 0.0], "100010", 3, "111110"),
        ([9.0, 0.2, -0.2, 0.2, -9.0, 0.2], "100010", 2, "111010"),  # ties: the first grow
        ([0.0, 0.0, 0.0, 0.0, 0.0, 0.0], "100010", 1, "110010"),
    ],
)
def test_the_largest_dense_gradients_elsewhere_grow(
    gradients: list[float], kept: str, count: int, grown: str
) -> None:
    assert shown(grow_largest(torch.tensor(gradients), bits(kept), count)) == grown


def test_random_growth_takes_the_first_free_places_of_a_permutation() -> None:
    """Of the inactive ones in flat order; another seed takes others."""
    kept = bits("1001000010").view(2, 5)
    free = [1, 2, 4, 5, 6, 7, 9]
    expected = kept.flatten().clone()
    expected[[free[place] for place in random_permutation(5, 7)[:3]]] = True
    assert torch.equal(grow_random(kept, 3, 5), expected.view(2, 5))
    assert len({shown(grow_random(kept, 3, seed)) for seed in range(9)}) > 1
    assert shown(grow_random(kept, 0, 5)) == shown(kept)


def test_random_growth_is_uniform() -> None:
    """Each of 20 places about as often: 5 of them, 2000 times."""
    kept = torch.zeros(20, dtype=torch.bool)
    times = torch.stack([grow_random(kept, 5, seed) for seed in range(2000)]).sum(0)
    assert int(times.sum()) == 10_000
    assert times.sub(500).abs().max() < 5 * math.sqrt(500 * 0.75)


# ---- schedules


def test_the_share_that_rigl_moves_falls_by_a_cosine() -> None:
    """alpha at 0, half of it half way, nothing at T_end; and then nothing is due."""
    rewiring = Rewiring(interval=100, fraction=0.3, until=900)
    found = [rewiring.cosine(step) for step in (0, 300, 450, 600, 900)]
    assert found == pytest.approx([0.3, 0.225, 0.15, 0.075, 0.0])
    due = [step for step in range(2000) if rewiring.is_due(step)]
    assert due == [100, 200, 300, 400, 500, 600, 700, 800]


def test_gradual_pruning_follows_the_cubic() -> None:
    """From 1 to 0.2 between steps 10 and 50: 0.2 + 0.8 (1 - x)^3 of 1000."""
    ramp = Ramp(interval=10, start=10, stop=50, final={"w": 200})
    due = [step for step in range(100) if ramp.is_due(step)]
    assert due == [10, 20, 30, 40, 50]
    counts = [ramp.count(step, 200, 1000) for step in due]
    assert counts == [1000, 538, 300, 213, 200]  # 0.5375, 0.3, 0.2125


def test_gradual_pruning_ends_exactly_where_it_should() -> None:
    """Also where the ramp is no multiple of the interval, and from another density than 1."""
    ramp = Ramp(interval=4, start=3, stop=13, final=50, initial=0.6)
    assert [step for step in range(30) if ramp.is_due(step)] == [3, 7, 11, 13]
    assert [ramp.count(step, 50, 100) for step in (3, 7, 11, 13, 20)] == [60, 52, 50, 50, 50]
    assert ramp.count(3, 70, 100) == 70  # a layer that keeps more than the ramp begins with


# ---- updates by hand


class Bench:
    """One layer of eight weights, whose gradients are given; plain SGD with momentum."""

    def __init__(self, weights: list[float], engine: Engine | None = None) -> None:
        self.model = nn.Linear(8, 1, bias=False)
        self.model.weight.data = torch.tensor([weights])
        self.weight = self.model.weight
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5, momentum=0.9)
        self.engine = engine or Engine()
        self.sparsity: Any = None
        self.state: Any = None

    def under(self, kind: Any, mask: str, **options: Any) -> "Bench":
        masks = Masks({"weight": bits(mask).view(1, 8)})
        self.sparsity = kind(masks, self.model, self.optimizer, **options)
        self.state = state_of(self.engine, self.model, self.optimizer, self.sparsity)
        return self

    def step(self, gradients: list[float]) -> None:
        """One update as `fit` does it."""
        self.weight.grad = torch.tensor([gradients])
        self.state.scaler.scale(torch.zeros(()))  # as a backward pass would
        self.engine.update(self.state)
        self.state.step += 1

    @property
    def mask(self) -> str:
        return shown(self.sparsity.masks["weight"])

    @property
    def momentum(self) -> list[float]:
        return self.optimizer.state[self.weight]["momentum_buffer"].flatten().tolist()


START = [0.8, 0.1, 0.6, 0.2, 9.0, 9.0, 9.0, 9.0]
"""of which the first four are active"""
NOTHING = [0.0] * 8


def test_rigl_by_hand() -> None:
    """After two steps half of four weights' f(t) go, by dense gradients, and no step is taken."""
    rewiring = Rewiring(interval=2, fraction=0.6, until=1000)
    bench = Bench(START).under(RigL, "11110000", rewiring=rewiring)
    bench.step([0.0, 0.0, 0.2, 0.0, 5.0, 5.0, 5.0, 5.0])
    bench.step(NOTHING)
    assert bench.mask == "11110000"
    before = bench.weight.detach().clone()
    assert before.tolist()[0] == pytest.approx([0.8, 0.1, 0.41, 0.2, 0.0, 0.0, 0.0, 0.0])
    bench.step([7.0, 0.5, 7.0, 0.4, 0.1, -0.6, 0.3, 0.55])
    # 0.6 * 4 = 2.4: two go, 0.1 and 0.2; of what is not kept 0.6 and 0.55 are the largest.
    assert bench.mask == "10100101"
    assert bench.weight.tolist()[0] == pytest.approx([0.8, 0, 0.41, 0, 0, 0, 0, 0])
    assert bench.momentum == pytest.approx([0, 0, 0.18, 0, 0, 0, 0, 0])  # 0.9 * 0.2, as before
    assert bench.weight.grad is not None
    assert not bench.weight.grad[0, [1, 3, 4, 6]].any()
    assert bench.state.step == 3
    bench.step([0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    assert bench.weight.tolist()[0][5] == pytest.approx(-0.5)


def test_what_was_dropped_may_grow_at_once_and_was_never_gone() -> None:
    """As in the reference: its weight and its momentum are what they were."""
    bench = Bench(START).under(RigL, "11110000", rewiring=Rewiring(2, 0.6, 1000))
    bench.step([0.0, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    bench.step([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    weight, momentum = float(bench.weight[0, 1].detach()), bench.momentum[1]
    assert weight != 0
    assert momentum != 0
    bench.step([0.0, 9.0, 0.0, 0.0, 0.0, 0.0, 8.0, 0.0])
    assert bench.mask == "11100010"
    assert (float(bench.weight[0, 1].detach()), bench.momentum[1]) == (weight, momentum)


def test_set_by_hand() -> None:
    """The step is taken first; then half of four weights go, and two places are drawn."""
    bench = Bench(START).under(SET, "11110000", rewiring=EVERY_2, seed=3)
    bench.step([0.0, 0.0, 0.2, 0.0, 5.0, 5.0, 5.0, 5.0])
    bench.step(NOTHING)
    free = [1, 3, 4, 5, 6, 7]
    drawn = [free[place] for place in random_permutation(stream_seed(3, "weight", 2), 6)[:2]]
    expected = "".join("1" if place in (0, 2, *drawn) else "0" for place in range(8))
    assert bench.mask == expected
    for place in range(8):
        if place not in (0, 2):
            was_active = place in (1, 3) and place in drawn
            assert bool(bench.weight[0, place] != 0) is was_active
    assert not any(bench.momentum[place] for place in range(8) if place != 2)


def test_set_moves_an_exact_share() -> None:
    """0.3 of ten is three, though the float nearest to 0.3 is a little less."""
    model = nn.Linear(20, 1, bias=False)
    model.weight.data = torch.arange(1.0, 21.0).view(1, 20)
    masks = Masks({"weight": bits("1" * 10 + "0" * 10).view(1, 20)})
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sparsity = SET(masks, model, optimizer, rewiring=Rewiring(1, 0.3, 9), seed=0)
    sparsity.after_update(0)
    free = [0, 1, 2, *range(10, 20)]  # the three smallest are free at once
    drawn = [free[place] for place in random_permutation(stream_seed(0, "weight", 1), 13)[:3]]
    expected = ["1" if place in (*range(3, 10), *drawn) else "0" for place in range(20)]
    assert shown(sparsity.masks["weight"]) == "".join(expected)


def test_gradual_pruning_by_hand() -> None:
    """Eight weights to two in three prunings, the smallest of those that are left."""
    bench = Bench([0.8, 0.1, 0.6, 0.2, 0.5, 0.3, 0.4, 0.7])
    bench.under(GradualMagnitude, "11111111", ramp=Ramp(2, 2, 6, {"weight": 2}))
    seen = []
    for _ in range(7):
        bench.step(NOTHING)
        seen.append(bench.mask)
    dense, some, end = "11111111", "10100001", "10000001"
    assert seen == [dense, dense, dense, some, some, end, end]  # 2 + 6 / 8 = 2.75 at step 4
    assert bench.sparsity.density == 0.25


def test_gradual_pruning_from_the_start() -> None:
    """With `start` 0 and a density below 1 the initial weights are pruned."""
    bench = Bench([0.8, 0.1, 0.6, 0.2, 0.5, 0.3, 0.4, 0.7])
    bench.under(GradualMagnitude, "11111111", ramp=Ramp(2, 0, 6, 2, initial=0.5))
    assert bench.mask == "10101001"
    assert shown(bench.weight.detach() != 0) == bench.mask


def test_a_global_ramp_ranks_over_all_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 4, bias=False))
    model[0].weight.data = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    model[1].weight.data = torch.tensor([[0.4], [0.3], [0.2], [2.5]])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sparsity = GradualMagnitude(Masks.ones(model), model, optimizer, ramp=Ramp(1, 1, 2, 4))
    sparsity.after_update(0)
    sparsity.after_update(1)
    assert [shown(mask) for mask in sparsity.masks.values()] == ["1110", "0001"]


def test_the_rate_of_exploration_by_hand() -> None:
    """Four of eight at first; each of two changes tries one more weight."""
    rewiring = Rewiring(interval=1, fraction=0.5, until=1_000_000)
    bench = Bench(START).under(RigL, "11110000", rewiring=rewiring)
    assert bench.sparsity.facts() == {"explored": 0.5}
    bench.step(NOTHING)
    bench.step([9.0, 0.0, 9.0, 0.0, 2.0, 1.0, 0.0, 0.0])  # f(1) is a little below a half
    assert bench.mask == "10111000"
    assert bench.sparsity.facts() == {"explored": 5 / 8}
    bench.step([9.0, 0.0, 9.0, 0.0, 0.0, 0.0, 3.0, 0.0])
    assert bench.mask == "10110010"
    assert bench.sparsity.facts() == {"explored": 6 / 8}


def test_a_dense_layer_and_a_share_of_nothing_stay() -> None:
    """Floor(0.5 * 1) of one weight is none; of a dense layer nothing is free."""
    for mask in ("10000000", "11111111"):
        bench = Bench(START).under(RigL, mask, rewiring=EVERY_2)
        for _ in range(4):
            bench.step([1.0] * 8)
        assert bench.mask == mask
        bench = Bench(START).under(SET, mask, rewiring=EVERY_2, seed=0)
        for _ in range(4):
            bench.step([1.0] * 8)
        assert bench.mask == mask


def test_a_dense_network_loses_no_step_to_rigl() -> None:
    """Where no layer is pruned nothing is rewired, and nothing vetoed."""
    bench = Bench(START).under(RigL, "11111111", rewiring=EVERY_2)
    for step in range(1, 5):
        bench.step([1.0, *NOTHING[1:]])
        assert bench.momentum[0] == pytest.approx(sum(0.9**k for k in range(step)))


def test_more_active_than_inactive_weights_can_be_moved() -> None:
    """Seven of eight: three go, and three of the four that are not kept grow."""
    bench = Bench(START).under(RigL, "11111110", rewiring=Rewiring(1, 0.5, 1000))
    bench.step(NOTHING)
    bench.step([0.0] * 7 + [1.0])
    assert bench.mask.count("1") == 7
    assert bench.mask[7] == "1"


# ---- gradients that are not finite


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_rigl_puts_a_change_off_after_an_overflow(bad: float) -> None:
    """No optimizer step, no growth by infinity; the change comes with the next finite gradient."""
    engine = Engine(precision="fp16")
    bench = Bench(START, engine).under(RigL, "11110000", rewiring=Rewiring(2, 0.6, 1000))
    scale = 65536.0
    bench.step(NOTHING)
    bench.step(NOTHING)
    before = bench.weight.detach().clone()
    bench.step([0.0, 0.0, 0.0, 0.0, bad, 0.0, 0.0, 0.0])
    assert bench.mask == "11110000"
    assert torch.equal(bench.weight, before)
    assert bench.sparsity.state_dict()["put_off"]
    assert not bench.sparsity.gradient_masks(3), "the change to come needs all gradients"
    assert bench.state.scaler.get_scale() == scale / 2
    bench.step([0.0, 0.0, 0.0, 0.0, 0.0, 3 * scale, 0.0, 2 * scale])
    assert bench.mask == "10100101"
    assert not bench.sparsity.state_dict()["put_off"]
    assert torch.equal(bench.weight[0, [0, 2]], before[0, [0, 2]])
    bench.step([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 9 * scale, 0.0])  # the next one on time
    assert bench.mask == "11100010"


def test_what_was_put_off_ends_with_the_schedule() -> None:
    """A change that would come at T_end or later never comes."""
    bench = Bench(START).under(RigL, "11110000", rewiring=Rewiring(2, 0.6, 3))
    bench.step(NOTHING)
    bench.step(NOTHING)
    bench.sparsity.before_update(2)
    bench.weight.grad = torch.full((1, 8), math.inf)
    assert bench.sparsity.before_update(2)
    bench.weight.grad = torch.ones(1, 8)
    assert bench.sparsity.before_update(3)
    assert not bench.sparsity.state_dict()["put_off"]


@pytest.mark.parametrize("kind", ["set", "gmp"])
def test_weights_that_are_no_numbers_end_the_run(kind: str) -> None:
    bench = Bench(START)
    if kind == "set":
        bench.under(SET, "11110000", rewiring=EVERY_2, seed=0)
    else:
        bench.under(GradualMagnitude, "11111111", ramp=Ramp(1, 1, 2, 2))
    bench.weight.data[0, 0] = math.nan
    with pytest.raises(RunError, match=r"after 2 steps .*Lower optimizer.lr"):
        bench.sparsity.after_update(1)


# ---- whole networks


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(16, 1, 4, 4, generator=generator)
    return Batch(images, torch.randint(0, 10, (16,), generator=generator))


def make(kind: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> ChangingMasks:
    """A sparsity that changes its masks every third step, 30 % of 72 and of 320 weights."""
    shapes = {name: tuple(mask.shape) for name, mask in Masks.ones(model).items()}
    counts = {"0.weight": 22, "4.weight": 96}
    masks, rewiring = random_masks(shapes, counts, seed=1), Rewiring(3, 0.4, 12)
    if kind == "set":
        return SET(masks, model, optimizer, rewiring=rewiring, seed=2)
    if kind == "rigl":
        return RigL(masks, model, optimizer, rewiring=rewiring)
    ramp = Ramp(3, 3, 9, counts)
    return GradualMagnitude(Masks.ones(model), model, optimizer, ramp=ramp)


KINDS = ["set", "rigl", "gmp"]


@pytest.mark.parametrize("name", ["momentum", "adamw", "muon", "lamb"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_masked_ever_moves(kind: str, name: str) -> None:
    """After every update weights, gradients and optimizer state outside the masks are zero.

    What grows is zero too, and every layer has exactly its count.
    """
    engine, model = Engine(micro_batch=6), network()
    prepared = engine.prepare(model, batch(0).images)
    optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=0.01, weight_decay=0.1))
    sparsity = make(kind, model, optimizer)
    weights = dict(model.named_parameters())
    state = state_of(engine, prepared, optimizer, sparsity, batch_size=16)
    digests = []
    for step in range(12):
        before = dict(sparsity.masks)
        engine.backward(state, batch(step), Objective(10))
        engine.update(state)
        state.step += 1
        digests.append(sparsity.masks.digest())
        for layer, mask in sparsity.masks.items():
            weight = weights[layer]
            assert weight.grad is not None
            states = [v for v in optimizer.state[weight].values() if torch.is_tensor(v)]
            tensors = [weight, *(s for s in states if s.shape == weight.shape)]
            assert all(not tensor[~mask].any() for tensor in [*tensors, weight.grad])
            assert all(not tensor[mask & ~before[layer]].any() for tensor in tensors)
    kept = [row.kept for row in sparsity.masks.table()]
    assert kept == [22, 96]
    changes = [step + 1 for step in range(1, 12) if digests[step] != digests[step - 1]]
    assert changes == {"set": [3, 6, 9], "rigl": [4, 7, 10], "gmp": [6, 9]}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_between_changes_it_is_fixed_masks(kind: str) -> None:
    """The same trajectory, bit for bit, up to the first change."""
    finals = []
    for fixed in (False, True):
        engine, model = Engine(clip=0.5), network()
        prepared = engine.prepare(model, batch(0).images)
        optimizer = build_optimizer(model, OptimizerConfig(lr=0.1))
        sparsity: Any = make(kind, model, optimizer)
        if fixed:
            sparsity = FixedMasks(sparsity.masks, model, optimizer)
        state = state_of(engine, prepared, optimizer, sparsity, batch_size=16)
        for step in range(2):
            engine.backward(state, batch(step), Objective(10))
            engine.update(state)
            state.step += 1
        finals.append(model.state_dict())
    assert all(torch.equal(value, finals[1][name]) for name, value in finals[0].items())


def test_rigl_takes_no_step_when_it_rewires() -> None:
    """What is kept does not move, and neither does what has no mask; the step counts."""
    engine, model = Engine(), network()
    prepared = engine.prepare(model, batch(0).images)
    optimizer = build_optimizer(model, OptimizerConfig(name="adamw", lr=0.01))
    sparsity = make("rigl", model, optimizer)
    state = state_of(engine, prepared, optimizer, sparsity, batch_size=16)
    moved = []
    for step in range(12):
        before = model.get_parameter("4.bias").detach().clone()
        engine.backward(state, batch(step), Objective(10))
        engine.update(state)
        state.step += 1
        moved.append(not torch.equal(before, model.get_parameter("4.bias")))
    assert [step for step, did in enumerate(moved) if not did] == [3, 6, 9]
    assert state.step == 12
    assert int(optimizer.state[model.get_parameter("4.bias")]["step"]) == 9


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_comes_back_whole(kind: str) -> None:
    """Through what a checkpoint holds: tensors of bytes, and JSON; then it goes on as it would."""
    runs = []
    for stop in (12, 5):
        engine, model = Engine(), network()
        prepared = engine.prepare(model, batch(0).images)
        optimizer = build_optimizer(model, OptimizerConfig(name="adamw", lr=0.01))
        sparsity = make(kind, model, optimizer)
        state = state_of(engine, prepared, optimizer, sparsity, batch_size=16)
        for step in range(12):
            if step == stop:
                tensors, values = split_state(sparsity.state_dict())
                assert {tensor.dtype for tensor in tensors.values()} == {torch.uint8}
                assert tensors["masks/0.weight"].numel() == 9
                saved = {n: v.clone() for n, v in model.state_dict().items()}
                moments = optimizer_state(model, optimizer)
                model = network()
                prepared = engine.prepare(model, batch(0).images)
                optimizer = build_optimizer(model, OptimizerConfig(name="adamw", lr=0.01))
                sparsity = make(kind, model, optimizer)
                model.load_state_dict(saved)
                load_optimizer_state(model, optimizer, moments)
                sparsity.load_state_dict(join_state(tensors, values))
                state = state_of(engine, prepared, optimizer, sparsity, batch_size=16)
                state.step = stop
            engine.backward(state, batch(step), Objective(10))
            engine.update(state)
            state.step += 1
        runs.append((model.state_dict(), sparsity.masks.digest(), sparsity.facts()))
    assert runs[0][1:] == runs[1][1:]
    assert all(torch.equal(value, runs[1][0][name]) for name, value in runs[0][0].items())


def test_a_change_that_is_put_off_outlives_a_checkpoint() -> None:
    """It comes in the first step after the resume, though that is none on which one is due."""
    bench = Bench(START).under(RigL, "11110000", rewiring=Rewiring(2, 0.6, 1000))
    bench.weight.grad = torch.full((1, 8), math.inf)
    assert bench.sparsity.before_update(2)
    resumed = Bench(START).under(RigL, "11110000", rewiring=Rewiring(2, 0.6, 1000))
    resumed.sparsity.load_state_dict(bench.sparsity.state_dict())
    resumed.weight.grad = torch.ones(1, 8)
    assert not resumed.sparsity.before_update(3)
    assert resumed.sparsity.before_update(5)


def test_damaged_masks_of_a_checkpoint_are_refused() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sparsity = make("set", model, optimizer)
    saved = sparsity.state_dict()
    sparsity.load_state_dict(saved)
    with pytest.raises(ValueError, match="not those that it was trained under"):
        sparsity.load_state_dict({**saved, "digest": "0" * 64})
    with pytest.raises(ValueError, match="masks of other weights"):
        sparsity.load_state_dict({**saved, "masks": {}})
    short = {name: packed[1:] for name, packed in saved["masks"].items()}
    with pytest.raises(ValueError, match="8 bytes for 72 weights"):
        sparsity.load_state_dict({**saved, "masks": short})
