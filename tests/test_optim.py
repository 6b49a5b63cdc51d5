"""Optimizers by timm's names, grouped by module type, and their state by parameter name."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from train.nested import join_state, split_state
from train.optim import (
    OptimizerConfig,
    build_optimizer,
    known_optimizers,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)


class ScaleNorm(nn.Module):
    """A normalisation that torch does not know, recognised by its class name."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=1, keepdim=True) * self.gain.view(1, -1, 1, 1)


class Network(nn.Module):
    """A parameter of its own, convolutions, four kinds of normalisation, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 3, 1, 1))
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.batch = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.group = nn.GroupNorm(2, 4)
        self.own = ScaleNorm(4)
        self.layer = nn.LayerNorm(4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.own(self.group(self.conv2(self.batch(self.conv(x + self.token)))))
        scores: Tensor = self.fc(self.layer(x.mean((2, 3))))
        return scores


def network(seed: int = 0) -> Network:
    """A network whose weights are drawn from `seed`."""
    torch.manual_seed(seed)
    return Network()


def train(model: nn.Module, optimizer: Optimizer, *, steps: int, seed: int = 0) -> None:
    """Some updates on random images."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        images = torch.randn(8, 3, 6, 6, generator=generator)
        model(images).square().sum().backward()
        optimizer.step()


def decay_by_name(model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
    """The weight decay of every parameter, each of which is in exactly one group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [(names[p], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]]
    assert len(found) == len(dict(found))
    return dict(found)


def assert_equal_states(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal names, keys and values, bit for bit."""
    assert found["groups"] == expected["groups"]
    assert found["state"].keys() == expected["state"].keys()
    for name, values in expected["state"].items():
        assert found["state"][name].keys() == values.keys()
        for key, value in values.items():
            assert torch.equal(torch.as_tensor(found["state"][name][key]), torch.as_tensor(value))


# ---- groups


def test_normalisations_and_biases_decay_too_by_default() -> None:
    """One group with all of the parameters, as in the papers' recipes."""
    model = network()
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.01))
    assert len(optimizer.param_groups) == 1
    assert decay_by_name(model, optimizer) == {n: 0.01 for n, _ in model.named_parameters()}


def test_normalisations_and_biases_can_be_spared() -> None:
    """By module type: a token of four dimensions decays, a gain of one dimension does not."""
    model = network()
    config = OptimizerConfig(weight_decay=0.01, decay_norm_and_bias=False)
    assert decay_by_name(model, build_optimizer(model, config)) == {
        "token": 0.01,
        "conv.weight": 0.01,
        "conv.bias": 0.0,
        "batch.weight": 0.0,
        "batch.bias": 0.0,
        "conv2.weight": 0.01,
        "group.weight": 0.0,
        "group.bias": 0.0,
        "own.gain": 0.0,
        "layer.weight": 0.0,
        "layer.bias": 0.0,
        "fc.weight": 0.01,
        "fc.bias": 0.0,
    }


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm1d(4), nn.SyncBatchNorm(4), nn.InstanceNorm2d(4, affine=True), nn.RMSNorm(4)],
)
def test_every_normalisation_of_torch_is_spared(norm: nn.Module) -> None:
    """Those without the usual name included."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), norm)
    config = OptimizerConfig(weight_decay=0.01, decay_norm_and_bias=False)
    decays = decay_by_name(model, build_optimizer(model, config))
    assert {name for name, decay in decays.items() if decay} == {"0.weight"}
    assert len(decays) > 1


@pytest.mark.parametrize("decay_norm_and_bias", [True, False])
def test_frozen_parameters_are_left_out(decay_norm_and_bias: bool) -> None:
    """An optimizer that holds them would decay them."""
    model = network()
    model.conv.requires_grad_(False)
    model.batch.requires_grad_(False)
    config = OptimizerConfig(decay_norm_and_bias=decay_norm_and_bias)
    names = decay_by_name(model, build_optimizer(model, config)).keys()
    all_names = {name for name, _ in model.named_parameters()}
    assert names == all_names - {"conv.weight", "conv.bias", "batch.weight", "batch.bias"}


@pytest.mark.parametrize("spared", [False, True])
def test_a_spared_parameter_does_not_shrink(spared: bool) -> None:
    """With no gradient, one update multiplies by 1 - lr * decay, or leaves the value alone."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    nn.init.ones_(model[0].weight)
    config = OptimizerConfig(lr=0.5, weight_decay=0.5, decay_norm_and_bias=not spared)
    optimizer = build_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert model[0].weight.tolist() == [[0.75, 0.75], [0.75, 0.75]]
    assert model[1].weight.tolist() == ([1.0, 1.0] if spared else [0.75, 0.75])


def test_a_tied_weight_is_updated_once() -> None:
    """It is one parameter, though two modules hold it."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    nn.init.ones_(model[0].weight)
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.5, weight_decay=0.0))
    model[0].weight.grad = torch.ones(2, 2)
    optimizer.step()
    assert model[0].weight.tolist() == [[0.5, 0.5], [0.5, 0.5]]


# ---- names and values


@pytest.mark.parametrize(("name", "nesterov"), [("momentum", False), ("sgd", True)])
def test_momentum_is_the_papers_and_sgd_nesterovs(name: str, nesterov: bool) -> None:
    """Both are torch's SGD, with every number of the configuration."""
    config = OptimizerConfig(name, lr=0.4, momentum=0.8, weight_decay=2e-4)
    optimizer = build_optimizer(network(), config)
    assert type(optimizer) is SGD
    (group,) = optimizer.param_groups
    values = (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"])
    assert values == (0.4, 0.8, 2e-4, nesterov)


def test_adamw_is_torchs() -> None:
    """A name without a momentum takes the rest of the configuration."""
    config = OptimizerConfig("adamw", lr=1e-3, weight_decay=0.05)
    optimizer = build_optimizer(network(), config)
    assert type(optimizer) is AdamW
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (
        1e-3,
        0.05,
    )


@pytest.mark.parametrize("name", ["lamb", "lars", "lion", "muon", "rmsproptf"])
def test_other_timm_optimizers_train(name: str) -> None:
    """Built by name, they move the convolution's weights."""
    model = network()
    before = model.conv.weight.detach().clone()
    train(model, build_optimizer(model, OptimizerConfig(name, lr=0.01)), steps=2)
    assert not torch.equal(model.conv.weight, before)
    assert bool(model.conv.weight.isfinite().all())


def test_momentum_follows_the_papers_equation() -> None:
    """v = m v + g + d w, w = w - r v, by hand for two updates of a weight 1 with gradient 1."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    config = OptimizerConfig("momentum", lr=0.5, momentum=0.5, weight_decay=0.5)
    optimizer = build_optimizer(model, config)
    found = []
    for _ in range(2):
        model.weight.grad = torch.ones(1, 1)
        optimizer.step()
        found.append(model.weight.item())
    # v = 1.5, w = 0.25; v = 0.75 + 1 + 0.125 = 1.875, w = 0.25 - 0.9375
    assert found == [0.25, -0.6875]


@pytest.mark.parametrize(
    ("name", "near"), [("momentm", "momentum"), ("adamww", "adamw"), ("SGD", None)]
)
def test_an_unknown_optimizer_has_a_near_miss(name: str, near: str | None) -> None:
    """Where there is one."""
    with pytest.raises(ValueError, match=f"^name = '{name}' is no timm optimizer") as caught:
        OptimizerConfig(name)
    if near is not None:
        assert str(caught.value).endswith(f"; did you mean '{near}'?")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0}, r"lr = 0\.0: must be above 0"),
        ({"lr": -0.1}, r"lr = -0\.1: must be above 0"),
        ({"momentum": 1.0}, r"momentum = 1\.0: must be at least 0 and below 1"),
        ({"momentum": -0.5}, r"momentum = -0\.5: must be at least 0 and below 1"),
        ({"weight_decay": -1e-4}, r"weight_decay = -0\.0001: must not be negative"),
    ],
)
def test_a_value_out_of_range_is_named(arguments: dict[str, Any], message: str) -> None:
    """With the value and the range."""
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**arguments)


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_a_value_that_is_not_a_number_is_refused(name: str) -> None:
    """TOML knows nan."""
    arguments: dict[str, Any] = {name: float("nan")}
    with pytest.raises(ValueError, match=name):
        OptimizerConfig(**arguments)


def test_the_learning_rate_is_set_in_every_group() -> None:
    """The base rate times the schedule's factor at that step, which is also given back."""
    optimizer = build_optimizer(network(), OptimizerConfig(decay_norm_and_bias=False))
    assert set_learning_rate(optimizer, lambda step: step / 4, 2, base=0.5) == 0.25
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


# ---- state by name

CONFIGS = [
    OptimizerConfig("momentum", lr=0.05),
    OptimizerConfig("momentum", lr=0.05, decay_norm_and_bias=False),
    OptimizerConfig("adamw", lr=0.01),
    OptimizerConfig("adamw", lr=0.01, decay_norm_and_bias=False),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_restored_optimizer_continues_bit_for_bit(config: OptimizerConfig) -> None:
    """Three and two updates, with a restart between them, equal five."""
    whole = network()
    train(whole, build_optimizer(whole, config), steps=5)

    first = network()
    optimizer = build_optimizer(first, config)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, 3, 6, 6, generator=generator) for _ in range(5)]

    def updates(model: nn.Module, optimizer: Optimizer, images: list[Tensor]) -> None:
        for batch in images:
            optimizer.zero_grad()
            model(batch).square().sum().backward()
            optimizer.step()

    updates(first, optimizer, batches[:3])
    saved = copy.deepcopy(optimizer_state(first, optimizer))
    second = network(seed=9)
    second.load_state_dict(first.state_dict())
    restored = build_optimizer(second, config)
    load_optimizer_state(second, restored, saved)
    assert_equal_states(optimizer_state(second, restored), saved)
    updates(second, restored, batches[3:])
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_the_state_is_keyed_by_name_and_has_what_the_optimizer_keeps() -> None:
    """One buffer per parameter for momentum; two moments and a count for AdamW."""
    for name, keys in (("momentum", {"momentum_buffer"}), ("adamw", {"step", "exp_avg"})):
        model = network()
        optimizer = build_optimizer(model, OptimizerConfig(name, lr=0.01))
        train(model, optimizer, steps=1)
        saved = optimizer_state(model, optimizer)
        assert saved["state"].keys() == {name for name, _ in model.named_parameters()}
        assert saved["state"]["conv.weight"].keys() >= keys
        assert all("params" not in group for group in saved["groups"].values())


def test_the_state_survives_another_order_of_parameters() -> None:
    """What belongs to `b` goes to `b`, though the shapes would allow a mix-up."""

    def layers(*names: str) -> nn.ModuleDict:
        return nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in names})

    one, other = layers("a", "b"), layers("b", "a")
    first = build_optimizer(one, OptimizerConfig())
    for value, layer in enumerate(one.values(), start=1):
        layer.weight.grad = torch.full((2, 2), float(value))
    for layer in one.values():
        nn.init.zeros_(layer.weight)
    first.step()
    second = build_optimizer(other, OptimizerConfig())
    load_optimizer_state(other, second, optimizer_state(one, first))
    buffers = {n: second.state[layer.weight]["momentum_buffer"] for n, layer in other.items()}
    assert buffers["a"].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert buffers["b"].tolist() == [[2.0, 2.0], [2.0, 2.0]]


def test_a_fresh_optimizer_has_no_state_and_restores_as_fresh() -> None:
    """Loading an empty state empties an optimizer that had one, and restores its rate."""
    model = network()
    fresh = build_optimizer(model, OptimizerConfig(lr=0.1))
    saved = optimizer_state(model, fresh)
    assert saved["state"] == {}
    assert [group["lr"] for group in saved["groups"].values()] == [0.1]
    used = build_optimizer(model, OptimizerConfig(lr=0.3))
    train(model, used, steps=1)
    assert optimizer_state(model, used)["state"]
    load_optimizer_state(model, used, saved)
    assert_equal_states(optimizer_state(model, used), saved)


def test_only_parameters_that_had_a_gradient_have_state() -> None:
    """And a partial state is restored as it was."""
    model = network()
    optimizer = build_optimizer(model, OptimizerConfig())
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    optimizer.step()
    saved = optimizer_state(model, optimizer)
    assert list(saved["state"]) == ["fc.weight"]
    other = network()
    restored = build_optimizer(other, OptimizerConfig())
    load_optimizer_state(other, restored, saved)
    assert_equal_states(optimizer_state(other, restored), saved)


def test_how_a_step_is_done_is_the_device_s_affair() -> None:
    """A state saved where updates are fused goes on where they are not, and the other way round."""
    model = Network()
    for fused, other in ((True, False), (False, True)):
        optimizers = [SGD(model.parameters(), 0.1, momentum=0.9, fused=f) for f in (fused, other)]
        saved = optimizer_state(model, optimizers[0])
        assert "fused" not in saved["groups"]["0"]
        older = {**saved, "groups": {"0": {**saved["groups"]["0"], "fused": fused}}}
        load_optimizer_state(model, optimizers[1], older)
        assert optimizers[1].param_groups[0]["fused"] is other


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_updates_are_fused_on_a_gpu(name: str) -> None:
    optimizer = build_optimizer(nn.Linear(4, 4).cuda(), OptimizerConfig(name=name))
    assert optimizer.param_groups[0]["fused"] is True


def test_another_number_of_groups_is_an_error() -> None:
    """A state without spared parameters does not fit an optimizer that has some."""
    model = network()
    one = build_optimizer(model, OptimizerConfig())
    two = build_optimizer(model, OptimizerConfig(decay_norm_and_bias=False))
    with pytest.raises(ValueError, match="optimizer state of another model"):
        load_optimizer_state(model, two, optimizer_state(model, one))


LAYOUTS = ["channels_last", "contiguous"]


@pytest.mark.parametrize("name", ["momentum", "adamw"])
@pytest.mark.parametrize("saved_layout", LAYOUTS)
def test_restored_state_has_the_memory_layout_of_its_parameter(
    name: str, saved_layout: str
) -> None:
    """A channels_last model, also where the checkpoint had lost the layout."""
    config = OptimizerConfig(name, lr=0.01)
    model = network().to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, config)
    train(model, optimizer, steps=1)
    saved = copy.deepcopy(optimizer_state(model, optimizer))
    if saved_layout == "contiguous":
        for values in saved["state"].values():
            values |= {key: value.contiguous() for key, value in values.items()}
    other = network().to(memory_format=torch.channels_last)
    restored = build_optimizer(other, config)
    load_optimizer_state(other, restored, saved)
    weight = other.conv.weight
    assert weight.stride() == (27, 1, 9, 3)
    tensors = [v for v in restored.state[weight].values() if v.shape == weight.shape]
    assert tensors
    assert all(value.stride() == weight.stride() for value in tensors)
    assert_equal_states(optimizer_state(other, restored), saved)


def test_training_on_does_not_change_the_state_that_was_loaded() -> None:
    """One state kept from step k can be loaded at each level."""
    model = network()
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.05))
    train(model, optimizer, steps=1)
    saved = copy.deepcopy(optimizer_state(model, optimizer))
    before = copy.deepcopy(saved)
    load_optimizer_state(model, optimizer, saved)
    train(model, optimizer, steps=1)
    assert_equal_states(saved, before)


@pytest.mark.parametrize("name", known_optimizers())
def test_every_optimizer_that_is_offered_can_be_saved(name: str) -> None:
    """Its state is tensors and JSON, and after a load the next steps are the same, bit for bit."""
    config = OptimizerConfig(name, lr=0.01)
    model = network()
    optimizer = build_optimizer(model, config)
    train(model, optimizer, steps=2)
    tensors, values = split_state(optimizer_state(model, optimizer))
    saved = join_state(
        {key: value.clone() for key, value in tensors.items()}, json.loads(json.dumps(values))
    )
    other = network()
    other.load_state_dict(model.state_dict())
    restored = build_optimizer(other, config)
    load_optimizer_state(other, restored, saved)
    train(model, optimizer, steps=2)
    train(other, restored, steps=2)
    weights = other.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
