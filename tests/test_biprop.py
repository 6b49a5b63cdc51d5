"""Networks of the authors' code for multi-prize tickets: they come in and compute the same."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from binary import logits
from torch import Tensor, nn

from data.errors import UserError
from launch.cli import run_command
from pruning.biprop import prize_of
from pruning.prizes import Prize
from pruning.tickets import Ticket
from train.models import ModelSpec

CIFAR = ModelSpec("cifar_resnet8", 10, 3, {"width": 4})
SIGN = ModelSpec("cifar_resnet8", 10, 3, {"width": 4, "activation": "sign"})
IMAGENET = ModelSpec("resnet18", 6, 3, {"width": 8})
OPTIONS = ["--model", "cifar_resnet8", "--num-classes", "10", "--width", "4"]


# Their networks, written anew ------------------------------------------------------------


class Scored(nn.Conv2d):
    """A convolution that has scores beside its weight; nothing tells which it keeps but a rate."""

    def __init__(
        self, ins: int, outs: int, size: int, stride: int = 1, padding: int = 0, *, rate: float
    ) -> None:
        super().__init__(ins, outs, size, stride, padding, bias=False)
        self.scores = nn.Parameter(torch.randn_like(self.weight))
        self.rate = rate

    def used(self) -> Tensor:
        """The sorted scores' upper part, alpha the mean of what is kept."""
        order = self.scores.abs().flatten().argsort()
        mask = torch.ones(self.scores.numel())
        mask[order[: int((1 - self.rate) * self.scores.numel())]] = 0
        mask = mask.view_as(self.weight)
        alpha = (self.weight.abs() * mask).sum() / mask.count_nonzero()
        return alpha * mask * self.weight.sign()

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.used(), None, self.stride, self.padding)


class Block(nn.Module):
    """Two convolutions and a shortcut that is called `shortcut` or `downsample`."""

    def __init__(self, ins: int, outs: int, stride: int, make: "Make", shortcut: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = make.conv(ins, outs, 3, stride, 1), make.norm(outs)
        self.conv2, self.bn2 = make.conv(outs, outs, 3, 1, 1), make.norm(outs)
        straight = stride == 1 and ins == outs
        self.name, self.act = shortcut, make.act
        parts = [] if straight else [make.conv(ins, outs, 1, stride), make.norm(outs)]
        self.add_module(shortcut, nn.Sequential(*parts))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        summed: Tensor = self.act(out + self.get_submodule(self.name)(x))
        return summed


class Make:
    """Layers of one network."""

    def __init__(self, rate: float, affine: bool, act: Callable[[Tensor], Tensor] = F.relu) -> None:
        self.rate, self.affine, self.act = rate, affine, act

    def conv(self, *words: int) -> Scored:
        return Scored(*words, rate=self.rate)

    def norm(self, channels: int) -> nn.BatchNorm2d:
        """With statistics, and weights if it has any, that are not those of a fresh one."""
        layer = nn.BatchNorm2d(channels, affine=self.affine)
        for name, value in layer.state_dict().items():
            if value.is_floating_point():
                centred = name in ("running_mean", "bias")
                value.copy_(torch.rand(value.shape) + (-0.5 if centred else 0.5))
        return layer


class Theirs(nn.Module):
    """A ResNet of basic blocks whose classifier is a 1x1 convolution."""

    def __init__(
        self, make: Make, widths: list[int], blocks: int, classes: int, **kind: Any
    ) -> None:
        super().__init__()
        self.is_large = kind.get("large", False)
        ins, *kernel = (64, 7, 2, 3) if self.is_large else (widths[0], 3, 1, 1)
        self.conv1, self.bn1, self.act = make.conv(3, ins, *kernel), make.norm(ins), make.act
        for number, width in enumerate(widths):
            units = []
            for place in range(blocks):
                stride = 2 if number and not place else 1
                name = "downsample" if self.is_large else "shortcut"
                units.append(Block(ins, width, stride, make, name))
                ins = width
            self.add_module(f"layer{number + 1}", nn.Sequential(*units))
        self.depth = len(widths)
        self.fc = make.conv(ins, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, 2, 1) if self.is_large else x
        for number in range(self.depth):
            x = self.get_submodule(f"layer{number + 1}")(x)
        found: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1))
        return found.flatten(1)


def theirs(spec: ModelSpec = CIFAR, *, rate: float = 0.3, affine: bool = False) -> nn.Module:
    """The network of theirs that corresponds to one here."""
    torch.manual_seed(5)
    if spec is IMAGENET:
        return Theirs(Make(rate, affine), [8, 16, 32, 64], 2, 6, large=True).eval()
    act = torch.sign if spec is SIGN else F.relu
    return Theirs(Make(rate, affine, act), [4, 8, 16], 1, 10).eval()


def state_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def run_import(*words: object) -> int:
    return run_command(["tickets", "import", *map(str, words)])


def imported(file: Path, capsys: pytest.CaptureFixture[str], *options: object) -> Ticket:
    """The ticket that the command makes of a file."""
    store = file.parent / "store"
    words = [file, "--from", "biprop", *OPTIONS, *options, "-o", store]
    assert run_import(*words) == 0
    return Ticket.load(capsys.readouterr().out.partition(": density")[0])


# What comes in ---------------------------------------------------------------------------


def test_the_layout_is_that_of_their_code() -> None:
    """The names that their state dicts have, and none for masks, alphas or rates."""
    state = state_of(theirs())
    for name in ("conv1", "layer1.0.conv1", "layer2.0.shortcut.0", "fc"):
        assert state[f"{name}.weight"].shape == state[f"{name}.scores"].shape
    assert {"bn1.running_mean", "layer3.0.shortcut.1.running_var"} <= state.keys()
    assert "bn1.weight" not in state
    assert "bn1.weight" in state_of(theirs(affine=True))
    assert state["fc.weight"].shape == (10, 16, 1, 1)


@pytest.mark.parametrize("affine", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("rate", [0.2, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("spec", [CIFAR, SIGN, IMAGENET], ids=["cifar", "sign", "imagenet"])
def test_an_imported_network_gives_their_logits(spec: ModelSpec, rate: float, affine: bool) -> None:
    """With normalisations learned or not; every weight is gain * sign * mask as theirs is."""
    network = theirs(spec, rate=rate, affine=affine)
    prize = prize_of(state_of(network), spec, rate, "file")
    scored = [layer for layer in network.modules() if isinstance(layer, Scored)]
    for layer, found in zip(scored, prize.layers.values(), strict=True):
        used = layer.used().view(found.shape)
        torch.testing.assert_close(found.binary * found.gain, used, rtol=1e-6, atol=0)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    expected = logits(network.double(), images.double())
    found_logits = logits(prize.build_model().double(), images.double())
    torch.testing.assert_close(found_logits, expected, rtol=1e-5, atol=1e-6)
    assert expected.std(0).max() > 0


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.3, 0.6, 0.7, 0.8, 0.9])
def test_as_many_weights_are_kept_as_by_their_code(rate: float) -> None:
    """n - int((1 - k) n) in floating point: for some k one more than exact numbers give."""
    prize = prize_of(state_of(theirs(rate=rate)), CIFAR, rate, "file")
    for layer in prize.layers.values():
        size = layer.mask.numel()
        assert layer.kept == size - int((1 - rate) * size)


@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "of DataParallel"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["state dict", "checkpoint"])
def test_a_file_comes_in_by_the_command(
    wrapped: bool, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they save it, in a checkpoint; signs are stored, and the store is whole."""
    network, file = theirs(affine=True), tmp_path / "model_best.pth"
    state = {f"{prefix}{name}": value for name, value in state_of(network).items()}
    torch.save({"epoch": 3, "arch": "x", "state_dict": state} if wrapped else state, file)
    ticket = imported(file, capsys, "--density", "0.3")
    assert (ticket.method, ticket.level, ticket.step) == ("multiprize", 0, 0)
    assert ticket.config == {"imported": {"from": "biprop", "source": str(file)}}
    prize = Prize.of(ticket)
    assert prize.seed is None
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(
        logits(prize.build_model(), images), logits(network, images), rtol=1e-4, atol=1e-4
    )
    assert run_command(["tickets", "verify", str(tmp_path / "store")]) == 0


def test_binary_activations_are_chosen_by_an_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file does not tell them; with them it is another network, which is verified as bits."""
    torch.save(state_of(theirs(SIGN, affine=True)), tmp_path / "x.pth")
    ticket = imported(tmp_path / "x.pth", capsys, "--density", "0.3", "--activation", "sign")
    assert ticket.model == SIGN
    file = tmp_path / "x.mpt"
    words = ["export", f"{tmp_path}/store/{ticket.id}", "--format", "mpt", "-o", str(file)]
    assert run_command(words) == 2
    assert "tell the side of its images with --image-size" in capsys.readouterr().err
    assert run_command([*words, "--image-size", "32"]) == 0
    assert run_command(["tickets", "verify", str(file)]) == 0


def test_a_bias_that_a_linear_layer_has_here_is_zero() -> None:
    prize = prize_of(state_of(theirs()), CIFAR, 0.3, "file")
    assert not prize.rest["fc.bias"].any()


# What does not ---------------------------------------------------------------------------


def changed(**changes: Any) -> Callable[[dict[str, Tensor]], None]:
    """Sets or, for `None`, removes entries; `__` stands for a dot."""

    def change(state: dict[str, Tensor]) -> None:
        for key, value in changes.items():
            name = key.replace("__", ".")
            if value is None:
                del state[name]
            else:
                state[name] = value

    return change


NAN = torch.full((4, 3, 3, 3), torch.nan)
WRONG: list[tuple[Callable[[dict[str, Tensor]], None], str]] = [
    (changed(fc__scores=None), "9 layers with scores, the network has 10"),
    (changed(fc__weight=None), "fc.weight is missing"),
    (changed(conv1__scores=torch.ones(4, 1, 3, 3)), r"conv1.scores: \(4, 1, 3, 3\), the network"),
    (changed(fc__weight=torch.ones(10, 17, 1, 1)), r"fc.weight: \(10, 17, 1, 1\), the network"),
    (changed(conv1__scores=NAN), "conv1.scores is not finite"),
    (changed(conv1__weight=NAN), "conv1.weight is not finite"),
    (changed(bn1__running_var=torch.full((4,), torch.inf)), "bn1.running_var is not finite"),
    (changed(bn1__running_mean=None), "bn1.running_var: not of a network whose layers"),
    (changed(bn1__running_var=None), "bn1.running_var is missing"),
    (changed(bn1__running_var=torch.ones(5)), r"bn1.running_var: \(5,\), the network: \(4,\)"),
    (changed(fc__bias=torch.ones(10)), "fc.bias: not of a network whose layers all have scores"),
    (changed(dense__weight=torch.ones(3)), "dense.weight: not of a network whose layers all"),
    (changed(more__scores=torch.ones(3)), "11 layers with scores, the network has 10"),
    (lambda state: state.clear(), "refused: not a dict of tensors by name"),
]


@pytest.mark.parametrize(("change", "told"), WRONG)
def test_what_does_not_fit_is_one_line(
    change: Callable[[dict[str, Tensor]], None],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2, the file is named, nothing is stored."""
    state, file = state_of(theirs()), tmp_path / "x.pth"
    change(state)
    torch.save(state, file)
    words = [file, "--from", "biprop", *OPTIONS, "--density", "0.3", "-o", tmp_path / "store"]
    assert run_import(*words) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert printed.startswith(f"error: {file}: ")
    assert re.search(told, printed)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (OPTIONS, "--from biprop: needs --density"),
        ([*OPTIONS, "--density", "0"], "--density 0.0: must be above 0 and at most 1"),
        ([*OPTIONS, "--density", "1.5"], "--density 1.5: must be above 0 and at most 1"),
        ([*OPTIONS, "--density", "nan"], "--density nan: must be above 0 and at most 1"),
        ([*OPTIONS, "--density", "-0.3"], "--density -0.3: must be above 0 and at most 1"),
        (["--density", "0.3"], "--from biprop: needs --model and --num-classes"),
        ([*OPTIONS, "--density", "0.3", "--step", "3"], "--step: not with --from biprop"),
        ([*OPTIONS, "--density", "0.3", "--level", "3"], "--level: not with --from biprop"),
        (
            ["--model", "cifar_resnet14", "--num-classes", "10", "--width", "4", "--density", "1"],
            "10 layers with scores, the network has 16",
        ),
        (
            ["--model", "cifar_resnet8", "--num-classes", "10", "--density", "0.3"],
            "is it another --model, --num-classes, --in-chans or --width?",
        ),
        (
            [*OPTIONS, "--density", "0.3", "--norm", "group"],
            "9 batch normalisations, the network has 0",
        ),
        ([*OPTIONS, "--density", "0.3", "--activation", "tanh"], "activation = 'tanh'"),
    ],
)
def test_a_wrong_option_is_one_line(
    options: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.pth"
    torch.save(state_of(theirs()), file)
    assert run_import(file, "--from", "biprop", *options, "-o", tmp_path / "store") == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert told in printed
    assert not (tmp_path / "store").exists()


def test_a_density_that_leaves_nothing_keeps_one_weight() -> None:
    """Of each layer, as the tickets here do; no gain is of nothing."""
    prize = prize_of(state_of(theirs()), CIFAR, 1e-20, "file")
    assert {layer.kept for layer in prize.layers.values()} == {1}
    assert all(layer.gain > 0 for layer in prize.layers.values())


def test_an_impossible_density_is_refused_by_the_library_too() -> None:
    for density in (0.0, 1.5, float("nan")):
        with pytest.raises(UserError, match="must be above 0 and at most 1"):
            prize_of(state_of(theirs()), CIFAR, density, "file")
