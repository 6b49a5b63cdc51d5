"""Imports: masks and weights of other tools come in whole, or not at all, and run no code."""

import io
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import prune

from data.errors import UserError
from launch.cli import run_command
from pruning.importing import imported, read_state
from pruning.tickets import Ticket
from train.models import ModelSpec

SPEC = ModelSpec("cifar_resnet8", 10, 3, {"width": 4})
OPTIONS = ["--model", "cifar_resnet8", "--num-classes", "10", "--width", "4"]


def pruned_state(spec: ModelSpec = SPEC, *, seed: int = 1) -> dict[str, Tensor]:
    """The state dict of a network that torch pruned by magnitude, its first layer left dense."""
    model = spec.build(seed)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in layers[1:]:
        prune.l1_unstructured(layer, "weight", amount=0.5)
    return {name: value.clone() for name, value in model.state_dict().items()}


def run_import(*words: object) -> int:
    return run_command(["tickets", "import", *map(str, words)])


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(images)
    return found


# torch.nn.utils.prune --------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "of DDP"])
def test_a_network_that_torch_pruned_comes_in(suffix: str, prefix: str, tmp_path: Path) -> None:
    """Masks of the pruned layers, the weights before masking, and the rest."""
    state, file = pruned_state(), tmp_path / f"pruned.{suffix}"
    save: Callable[..., None] = torch.save if suffix == "pt" else safetensors.torch.save_file
    save({f"{prefix}{name}": value for name, value in state.items()}, file)
    parts = imported(str(file), "pruning", SPEC, step=7, level=3)
    assert parts.weights is not None
    assert (parts.step, parts.level) == (7, 3)
    assert "conv1.weight" not in parts.masks
    assert len(parts.masks) == 9
    for name, mask in parts.masks.items():
        assert torch.equal(mask, state[f"{name}_mask"].bool())
        assert torch.equal(parts.weights[name], state[f"{name}_orig"])
    assert torch.equal(parts.weights["fc.bias"], state["fc.bias"])
    assert parts.weights.keys() == SPEC.build().state_dict().keys()


@pytest.mark.parametrize("spec", [SPEC, ModelSpec("test_resnet", 7, 3)], ids=["cifar", "timm"])
def test_what_is_exported_comes_back(
    spec: ModelSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Import, export as pruning, import again: equal masks, weights and network."""
    torch.save(pruned_state(spec), tmp_path / "first.pt")
    width = ["--width", "4"] if spec is SPEC else []
    tickets = []
    for name in ("first", "second"):
        options = ["--model", spec.name, "--num-classes", spec.num_classes, *width]
        words = [tmp_path / f"{name}.pt", "--from", "pruning", *options, "--step", 7, "--level", 3]
        assert run_command([*map(str, ("tickets", "import", *words, "-o", tmp_path / name))]) == 0
        url = capsys.readouterr().out.rpartition(": level 3, density")[0]
        tickets.append(Ticket.load(url))
        file = str(tmp_path / "second.pt")
        run_command(["export", url, "--format", "pruning", "-o", file, "--force"])
        capsys.readouterr()
    first, second = tickets
    assert (first.masks, first.model, first.step, first.level) == (second.masks, spec, 7, 3)
    assert 0 < first.density < 1
    states = [ticket.build_model().state_dict() for ticket in tickets]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_other_number_types_become_the_networks(tmp_path: Path) -> None:
    """Weights in float64 and float16, masks of integers and booleans."""
    state = pruned_state()
    types = [torch.float64, torch.float16, torch.uint8, torch.bool]
    for name, kind in zip(
        ["fc.weight_orig", "norm1.weight", *_masks(state)[:2]], types, strict=True
    ):
        state[name] = state[name].to(kind)
    torch.save(state, tmp_path / "pruned.pt")
    weights = imported(str(tmp_path / "pruned.pt"), "pruning", SPEC).weights
    assert weights is not None
    expected = SPEC.build().state_dict()
    assert {name: v.dtype for name, v in weights.items()} == {
        name: v.dtype for name, v in expected.items()
    }


def _masks(state: dict[str, Tensor]) -> list[str]:
    return [name for name in state if name.endswith("_mask")]


def _changed(**changes: Any) -> Callable[[dict[str, Tensor]], None]:
    """Sets or, for `None`, removes entries; `__` stands for a dot."""

    def change(state: dict[str, Tensor]) -> None:
        for key, value in changes.items():
            name = key.replace("__", ".")
            if value is None:
                del state[name]
            else:
                state[name] = value

    return change


WRONG: list[tuple[Callable[[dict[str, Tensor]], None], str]] = [
    (_changed(fc__weight_mask=torch.ones(10, 17)), r"fc.weight: \(10, 17\), .*\(10, 16\)"),
    (_changed(fc__weight_mask=torch.full((10, 16), 0.5)), "fc.weight: .*other than 0 and 1"),
    (_changed(fc__weight_mask=torch.full((10, 16), 2)), "fc.weight: .*other than 0 and 1"),
    (_changed(fc__weight_mask=torch.full((10, 16), torch.nan)), "other than 0 and 1"),
    (_changed(fc__weight_mask=torch.ones(1).expand(10, 16)), "'fc.weight_mask' is not a plain"),
    (_changed(fc__weight_mask=torch.ones(10, 16).to_sparse()), "'fc.weight_mask' is not a plain"),
    (_changed(fc__weight_mask=torch.ones(10, 16, device="meta")), "is not a plain"),
    (_changed(fc__weight_mask=torch.ones(10, 16, dtype=torch.complex64)), "is not a plain"),
    (_changed(fc__weight_mask=None), "fc.weight has only one of fc.weight_orig and"),
    (_changed(fc__weight_orig=None), "fc.weight has only one of fc.weight_orig and"),
    (_changed(fc__weight_orig=torch.ones(3, 16)), r"fc.weight: \(3, 16\)"),
    (_changed(fc__bias=None), "no fc.bias, which the network has"),
    (_changed(fc__bias=torch.zeros(10, dtype=torch.int64)), "fc.bias: torch.int64"),
    (_changed(extra=torch.ones(2)), "extra: the network has no such weight"),
    (
        _changed(head__weight_mask=torch.ones(2), head__weight_orig=torch.ones(2)),
        "mask of head.weight: the network prunes no such weight",
    ),
    (
        _changed(fc__bias=None, fc__bias_mask=torch.ones(10), fc__bias_orig=torch.ones(10)),
        "mask of fc.bias: the network prunes no such weight; did you mean 'fc.weight'",
    ),
]


@pytest.mark.parametrize(("change", "told"), WRONG)
def test_what_does_not_fit_is_one_line(
    change: Callable[[dict[str, Tensor]], None],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Shapes, values, kinds and names: exit code 2, the file is named, nothing is stored."""
    state = pruned_state()
    change(state)
    file = tmp_path / "pruned.pt"
    torch.save(state, file)
    assert run_import(file, "--from", "pruning", *OPTIONS, "-o", tmp_path / "store") == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert printed.startswith(f"error: {file}: ")
    assert re.search(told, printed)
    assert not (tmp_path / "store").exists()


# Foreign files ---------------------------------------------------------------------------


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def _pickled(value: Any) -> bytes:
    return pickle.dumps(value)


def _pickled_as_torch_does(value: Any) -> bytes:
    return pickle.dumps(value, protocol=2)


def _saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _saved_before_zip(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


@pytest.mark.parametrize("write", [_pickled, _pickled_as_torch_does, _saved, _saved_before_zip])
@pytest.mark.parametrize("name", ["pruned.pt", "mask.pth", "model_ep0_it0.pth"])
def test_no_code_in_a_file_is_run(
    name: str,
    write: Callable[[Any], bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A pickle that would run a function is refused in one line; the function is not run."""
    trap, origin = tmp_path / "trap", "pruning" if name == "pruned.pt" else "open-lth"
    (tmp_path / "main").mkdir()
    torch.save(open_lth_masks(), tmp_path / "main/mask.pth")
    file = tmp_path / "main" / name
    file.write_bytes(write({"fc.weight": Bomb(trap)}))
    source = file if origin == "pruning" else file.parent
    assert run_import(source, "--from", origin, *OPTIONS, "-o", tmp_path / "store") == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert printed.startswith(f"error: {file}: refused: not tensors alone")
    assert not trap.exists()
    pickle.loads(_pickled(Bomb(trap)))
    assert trap.exists(), "the trap works"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00",
        b"PK\x03\x04",
        b"\x80\x02}q",
        b"x" * 1000,
        _saved([1, 2]),
        _saved({}),
        _saved(3),
    ],
)
@pytest.mark.parametrize("name", ["file.pt", "file.safetensors"])
def test_a_file_without_tensors_is_refused(content: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: refused"):
        read_state(str(tmp_path / name))


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    """At any place."""
    content = _saved(pruned_state())
    for length in range(0, len(content), len(content) // 40):
        (tmp_path / "file.pt").write_bytes(content[:length])
        with pytest.raises(UserError, match="refused"):
            read_state(str(tmp_path / "file.pt"))


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"model": {"a": torch.ones(1)}, "epoch": 3}, "'model' is not a plain tensor"),
        ({"state_dict": {"a": 3}, "epoch": 3}, "'a' is not a plain tensor"),
        ({"state_dict": {}, "epoch": 3}, "not a dict of tensors by name"),
        ({3: torch.ones(1)}, "3 is not a plain tensor"),
        (OrderedDict(a=None), "'a' is not a plain tensor"),
    ],
)
def test_a_checkpoint_is_no_state_dict(value: Any, told: str, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "file.pt")
    with pytest.raises(UserError, match=told):
        read_state(str(tmp_path / "file.pt"))


def test_the_state_dict_in_a_checkpoint_is_read(tmp_path: Path) -> None:
    """Where it stands under that name, as many training scripts save it."""
    torch.save({"state_dict": {"module.a": torch.ones(1)}, "epoch": 3}, tmp_path / "file.pt")
    assert read_state(str(tmp_path / "file.pt")) == {"a": torch.ones(1)}


def test_a_state_dict_without_masks_is_refused(tmp_path: Path) -> None:
    torch.save(SPEC.build().state_dict(), tmp_path / "dense.pt")
    with pytest.raises(UserError, match=r"dense.pt: no masks: .* was prune.remove called"):
        imported(str(tmp_path / "dense.pt"), "pruning", SPEC)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["missing.pt", "--from", "pruning", *OPTIONS], "missing.pt: no such file"),
        ([".", "--from", "pruning", *OPTIONS], ".: no such file"),
        ([".", "--from", "open-lth", *OPTIONS], "./mask.pth: no such file"),
        (["x", "--from", "keras", *OPTIONS], "keras"),
        (["x", "--from", "pruning", "--model", "cifar_resnet8"], "--num-classes"),
        (["x", "--from", "pruning", *OPTIONS, "--model", "resnet_18"], "did you mean 'resnet18'"),
        (["x", "--from", "pruning", *OPTIONS, "--num-classes", "0"], "--num-classes 0"),
        (["x", "--from", "pruning", *OPTIONS, "--in-chans", "0"], "--in-chans 0"),
        (["x", "--from", "pruning", *OPTIONS, "--step", "-1"], "--step -1"),
        (["x", "--from", "pruning", *OPTIONS, "--width", "0"], "width = 0"),
    ],
)
def test_a_wrong_argument_is_one_line(
    words: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_import(*words, "-o", tmp_path / "store") == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert told in printed


# open_lth --------------------------------------------------------------------------------


class OpenLthVgg(nn.Module):
    """cifar_vgg_11 by the names of open_lth, with its convolutions' biases; channels are small."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for factor in (1, None, 2, None, 4, 4, None, 8, 8, None, 8, 8):
            if factor is None:
                layers.append(nn.MaxPool2d(2))
                continue
            out = factor * width
            unit = OrderedDict(
                conv=nn.Conv2d(channels, out, 3, padding=1), bn=nn.BatchNorm2d(out), relu=nn.ReLU()
            )
            layers.append(nn.Sequential(unit))
            channels = out
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc(self.layers(x).mean((2, 3)))
        return found


class OpenLthBlock(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        stride = 1 if channels == out else 2
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if channels != out:
            self.shortcut.append(nn.Conv2d(channels, out, 1, 2, bias=False))
            self.shortcut.append(nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        found: Tensor = (out + self.shortcut(x)).relu()
        return found


class OpenLthResNet(nn.Module):
    """cifar_resnet_{6n+2} by the names of open_lth."""

    def __init__(self, num_blocks: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        sizes = [width * factor for factor in (1, 2, 4) for _ in range(num_blocks)]
        pairs = zip([width, *sizes], sizes, strict=False)
        self.blocks = nn.Sequential(*(OpenLthBlock(*pair) for pair in pairs))
        self.fc = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc(self.blocks(self.bn(self.conv(x)).relu()).mean((2, 3)))
        return found


class OpenLthImageNet(nn.Module):
    """Torchvision's ResNet-18 inside `model`."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torchvision.models.resnet18(num_classes=10)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.model(x)
        return found


def random_masks(model: nn.Module) -> dict[str, Tensor]:
    """What `mask.pth` holds: 0 and 1 as int32, for each convolution and linear layer."""
    return {
        f"{name}.weight": (torch.rand(layer.weight.shape) < 0.5).int()
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    }


def open_lth_masks() -> dict[str, Tensor]:
    return random_masks(OpenLthResNet(1, 4))


def trained_a_little(model: nn.Module) -> nn.Module:
    """With running statistics and affine factors that are not those of a fresh network."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.running_mean, module.running_var, module.weight, module.bias):
                assert value is not None
                nn.init.uniform_(value, 0.5, 1.5)
    return model


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (lambda: OpenLthResNet(3, 4), ModelSpec("cifar_resnet20", 10, 3, {"width": 4})),
        (lambda: OpenLthVgg(4), ModelSpec("cifar_vgg11", 10, 3, {"width": 4})),
        (OpenLthImageNet, ModelSpec("resnet18", 10, 3)),
    ],
    ids=["resnet", "vgg", "imagenet"],
)
def test_a_network_of_open_lth_computes_the_same_here(
    theirs: Callable[[], nn.Module], ours: ModelSpec, tmp_path: Path
) -> None:
    """Masks and weights under their names and in their files; logits in eval mode agree."""
    torch.manual_seed(0)
    model = trained_a_little(theirs())
    masks = random_masks(model)
    for name, mask in masks.items():
        model.get_parameter(name).data *= mask
    folder = tmp_path / "lottery_0a1b/replicate_1/level_3/main"
    folder.mkdir(parents=True)
    torch.save(masks, folder / "mask.pth")
    torch.save(model.state_dict(), folder / "model_ep0_it40.pth")
    torch.save(theirs().state_dict(), folder / "model_ep160_it0.pth")
    parts = imported(str(folder), "open-lth", ours)
    assert (parts.step, parts.level) == (40, 3)
    assert parts.masks.kept == sum(int(mask.sum()) for mask in masks.values())
    assert parts.masks.size == sum(mask.numel() for mask in masks.values())
    assert parts.weights is not None
    network = ours.build()
    network.load_state_dict(parts.weights)
    images = torch.randn(3, 3, 32, 32)
    expected = logits(model, images)
    torch.testing.assert_close(logits(network, images), expected, rtol=1e-4, atol=1e-5)
    parts.masks.project_(network)  # the weights are pruned already: nothing changes
    torch.testing.assert_close(logits(network, images), expected, rtol=1e-4, atol=1e-5)


def test_timm_and_torchvision_name_resnets_alike() -> None:
    """... which the import of open_lth's ImageNet networks relies on."""
    for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"):
        with torch.device("meta"):
            theirs = torchvision.models.get_model(name).state_dict()
            ours = timm.create_model(name).state_dict()
        assert {n: v.shape for n, v in ours.items()} == {n: v.shape for n, v in theirs.items()}


@pytest.fixture
def level(tmp_path: Path) -> Path:
    """A level's folder with masks alone."""
    folder = tmp_path / "main"
    folder.mkdir()
    torch.save(open_lth_masks(), folder / "mask.pth")
    return folder


def test_masks_alone_are_a_ticket_without_weights(
    level: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the folder or by the file; said in the output."""
    for source in (level, level / "mask.pth"):
        assert run_import(source, "--from", "open-lth", *OPTIONS, "-o", level / "store") == 0
        told = capsys.readouterr().out
        assert told.endswith(", masks alone\n")
    ticket = Ticket.load(told.rpartition(": level 0")[0])
    with pytest.raises(UserError, match="no weights"):
        ticket.weights()


def test_weights_after_epochs_need_their_step(level: Path) -> None:
    """The length of an epoch stands in no file; the earliest state is taken, by number."""
    for epochs in (2, 10):
        torch.save(OpenLthResNet(1, 4).state_dict(), level / f"model_ep{epochs}_it0.pth")
    with pytest.raises(UserError, match=r"model_ep2_it0.pth: .* give the step .* as --step"):
        imported(str(level), "open-lth", SPEC)
    assert imported(str(level), "open-lth", SPEC, step=782, level=4).step == 782


@pytest.mark.parametrize(
    ("masks", "told"),
    [
        ({"fc_layers.0.weight": torch.ones(2)}, "LeNets have no counterpart"),
        ({"conv1.weight": torch.ones(2)}, "conv1.weight ... are not the names of a network of"),
        ({"blocks.0.conv1.weight": torch.ones(2)}, "1 blocks are not three stages"),
        ({"blocks.9999999999.conv1.weight": torch.ones(2)}, "0 blocks are not three stages"),
        ({"layers.0.conv.weight": torch.ones(2)}, "mask of stages.0.0.0.weight: the network"),
        (random_masks(OpenLthResNet(1, 8)), "is it another --model, .*--width"),
        (random_masks(OpenLthResNet(2, 4)), "mask of stages.0.1.conv1.weight: the network"),
        ({**open_lth_masks(), "fc.weight": torch.full((10, 16), 3)}, "other than 0 and 1"),
        (
            {n: m for n, m in open_lth_masks().items() if n != "fc.weight"},
            "no mask of fc.weight, which the network has",
        ),
    ],
)
def test_masks_of_another_network_are_refused(
    masks: dict[str, Tensor], told: str, tmp_path: Path
) -> None:
    torch.save(masks, tmp_path / "mask.pth")
    with pytest.raises(UserError, match=told):
        imported(str(tmp_path), "open-lth", SPEC)


def test_an_archive_that_swells_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.save stores its records as they are; a deflated one may hide gigabytes."""
    content = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_saved(pruned_state()))) as plain:
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as packed:
            for name in plain.namelist():
                packed.writestr(name, plain.read(name))
    (tmp_path / "a.pt").write_bytes(content.getvalue())
    monkeypatch.setattr(torch, "load", lambda *words, **options: pytest.fail("it was read"))
    with pytest.raises(UserError, match=r"a\.pt: refused: .*its records are compressed"):
        read_state(str(tmp_path / "a.pt"))


def test_a_ticket_is_not_imported_into_a_run(tmp_path: Path) -> None:
    """A run keeps its own tickets."""
    (tmp_path / "config.toml").write_text("")
    safetensors.torch.save_file(pruned_state(), tmp_path / "a.safetensors")
    words = ["--from", "pruning", "--model", SPEC.name, "--num-classes", SPEC.num_classes]
    words += ["--in-chans", SPEC.in_chans, "--width", 4]
    assert run_import(tmp_path / "a.safetensors", *words, "-o", tmp_path) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "config.toml"]
