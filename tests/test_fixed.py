"""Masked weights, their gradients and their momentum are exactly zero after every update."""

import pytest
import torch
from states import state_of
from torch import Tensor, nn

from data.loader import Batch
from pruning.fixed import FixedMasks
from pruning.masks import Masks
from train.engine import Engine
from train.objective import Objective
from train.optim import OptimizerConfig, build_optimizer


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def half(model: nn.Module) -> Masks:
    generator = torch.Generator().manual_seed(1)
    return Masks(
        {n: torch.rand(m.shape, generator=generator) < 0.5 for n, m in Masks.ones(model).items()}
    )


def batch() -> Batch:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(16, 1, 4, 4, generator=generator)
    return Batch(images, torch.randint(0, 10, (16,), generator=generator))


@pytest.mark.parametrize("name", ["momentum", "sgd", "adamw", "lamb", "muon", "rmsprop", "lion"])
def test_nothing_masked_ever_moves(name: str) -> None:
    """With weight decay and momentum, under optimizers that work by entry and that do not."""
    engine = Engine()
    model = network()
    prepared = engine.prepare(model, batch().images)
    optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=0.01, weight_decay=0.1))
    masks = half(model)
    sparsity = FixedMasks(masks, model, optimizer)
    weights = dict(model.named_parameters())
    state = state_of(engine, prepared, optimizer, sparsity, batch_size=16)
    for _ in range(4):
        engine.backward(state, batch(), Objective(10))
        engine.update(state)
        for name_, mask in masks.items():
            weight = weights[name_]
            assert weight.grad is not None
            states = [v for v in optimizer.state[weight].values() if torch.is_tensor(v)]
            tensors = [weight, weight.grad, *(s for s in states if s.shape == weight.shape)]
            assert all(not tensor[~mask].any() for tensor in tensors)
            assert weight[mask].all()
    assert sparsity.density == masks.density


@pytest.mark.parametrize("name", ["momentum", "adamw", "lamb"])
def test_a_state_that_was_not_masked_is_masked_by_the_first_update(name: str) -> None:
    """As the dense training's optimizer has it at the step to which a ticket is rewound; and again
    where a checkpoint is loaded."""
    engine, model = Engine(), network()
    optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=0.01, weight_decay=0.1))
    dense = state_of(engine, model, optimizer, batch_size=16)
    engine.backward(dense, batch(), Objective(10))
    engine.update(dense)
    masks = half(model)
    sparsity = FixedMasks(masks, model, optimizer)
    state = state_of(engine, model, optimizer, sparsity, batch_size=16)
    weight, mask = model[0].weight, masks["0.weight"]
    for step in range(4):
        if step == 2:
            sparsity.load_state_dict(sparsity.state_dict())
            weight.data[~mask] = 1.0
        engine.backward(state, batch(), Objective(10))
        engine.update(state)
        states = [s for s in optimizer.state[weight].values() if torch.is_tensor(s)]
        assert not weight[~mask].any()
        assert all(not s[~mask].any() for s in states if s.shape == weight.shape)


def test_an_optimizer_that_keeps_zeros_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first update gradients alone are multiplied by the masks."""
    counts: dict[str, list[int]] = {}
    found: list[int] = []
    multiply = torch._foreach_mul_

    def counted(tensors: list[Tensor], factors: list[Tensor]) -> None:
        found.append(len(tensors))
        multiply(tensors, factors)

    monkeypatch.setattr(torch, "_foreach_mul_", counted)
    for name in ("momentum", "lamb"):
        engine, model = Engine(), network()
        optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=0.01))
        sparsity = FixedMasks(half(model), model, optimizer)
        state = state_of(engine, model, optimizer, sparsity, batch_size=16)
        for _ in range(2):
            engine.backward(state, batch(), Objective(10))
            found.clear()
            sparsity.before_update(0)
            sparsity.after_update(0)
        counts[name] = list(found)
    assert counts == {"momentum": [2], "lamb": [2, 2]}


def test_pruned_gradients_do_not_count_in_the_clip_norm() -> None:
    """Gradients are masked before clipping: the norm is that of the survivors."""
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 1.0]])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sparsity = FixedMasks(Masks({"weight": torch.tensor([[True, False]])}), model, optimizer)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    engine = Engine(clip=3.0)
    engine.update(state_of(engine, model, optimizer, sparsity))
    assert model.weight.tolist() == [[pytest.approx(-2.0), 0.0]]  # 1 - 3, not 1 - 3 * 3/5


def test_a_channels_last_model_is_masked_by_a_contiguous_mask() -> None:
    """The layout of a weight in memory has no say in which weights are kept."""
    model = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    mask = torch.zeros(4, 4, 3, 3, dtype=torch.bool)
    mask[1, 2, 0, 1] = True
    sparsity = FixedMasks(Masks({"weight": mask}), model, optimizer)
    model.weight.grad = torch.ones_like(model.weight)
    sparsity.before_update(0)
    assert model.weight.grad.nonzero().tolist() == [[1, 2, 0, 1]]
    assert model.weight.nonzero().tolist() == [[1, 2, 0, 1]]


def test_a_checkpoint_of_other_masks_is_refused() -> None:
    """Resume that forgets or redraws the mask cannot happen."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    saved = FixedMasks(half(model), model, optimizer).state_dict()
    with pytest.raises(ValueError, match="trained under other masks"):
        FixedMasks(Masks.ones(model), model, optimizer).load_state_dict(saved)


def test_a_dense_mask_costs_nothing() -> None:
    """Where all weights are kept, no tensor is multiplied."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    assert FixedMasks(Masks.ones(model), model, optimizer)._factors == {}
