"""Weights in another basis: the matrices, the layers, and whole runs that train coefficients."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import safetensors
import safetensors.torch
import torch
from family import BASE as FAMILY
from family import DEEPER, IMP, Mistake, assert_goes_on_with_two_ranks, assert_refused, run
from scipy.fft import dctn
from scipy.linalg import qr
from scipy.special import ndtri
from tiny import TOML, facts, final_states, ticket_facts, write_config
from torch import Tensor, nn

from data.errors import UserError
from data.files import Folder
from data.order import random_bits, stream_seed
from launch.cli import run_command
from launch.config import read_config
from launch.parts import check_stages
from pruning.masks import prunable
from pruning.tickets import Ticket
from train.basis import BasisLayer, Side, orthonormal, take_basis, weights_of
from train.models import ModelConfig, ModelSpec

BASES = pytest.mark.parametrize("basis", ["dct", "random"])
SIDES: tuple[Side, ...] = ("outputs", "inputs")
BASE = TOML[: TOML.index("[[stages]]")].replace("3ep", "2ep")
DCT = ("--model.basis", "dct")


def coefficients(layer: nn.Module) -> nn.Parameter:
    """alpha of a layer."""
    return dict(layer.named_parameters())["weight"]


def cases() -> Iterator[tuple[nn.Module, Tensor]]:
    """Layers with what they read: convolutions, of groups, of single channels, in one dimension."""
    torch.manual_seed(0)
    images = torch.randn(3, 4, 9, 9)
    yield nn.Conv2d(4, 6, 3), images
    yield nn.Conv2d(4, 6, (1, 3), groups=2, bias=False), images
    yield nn.Conv2d(4, 8, 3, groups=4), images
    yield nn.Conv1d(4, 6, 5), images[..., 0]
    yield nn.Linear(7, 5), torch.randn(3, 7)


# The matrices ----------------------------------------------------------------------------


@BASES
@pytest.mark.parametrize("size", [1, 2, 3, 27, 300])
def test_the_matrices_are_orthonormal(basis: str, size: int) -> None:
    """In float64, columns and rows."""
    for side in SIDES:
        matrix = orthonormal(basis, side, size)
        assert matrix.dtype == torch.float64
        for product in (matrix.T @ matrix, matrix @ matrix.T):
            torch.testing.assert_close(product, torch.eye(size).double(), rtol=0, atol=1e-13)


def test_the_cosines_by_hand() -> None:
    """Of two places and of four: c = cos(pi / 8) and s = sin(pi / 8), over the square root of 2."""
    half = math.sqrt(0.5)
    c, s = (f(math.pi / 8) * half for f in (math.cos, math.sin))
    two = [[half, half], [half, -half]]
    four = [[0.5, c, 0.5, s], [0.5, s, -0.5, -c], [0.5, -s, -0.5, c], [0.5, -c, 0.5, -s]]
    for rows in (two, four):
        expected = torch.tensor(rows, dtype=torch.float64)
        torch.testing.assert_close(orthonormal("dct", "outputs", len(rows)), expected)


def test_coefficients_by_hand() -> None:
    """Of [[1, 2], [3, 4]]: half the sum, and half the differences of columns, of rows, of both."""
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    take_basis(nn.Sequential(layer), "dct")
    expected = torch.tensor([[5.0, -1.0], [-2.0, 0.0]])
    torch.testing.assert_close(coefficients(layer).detach(), expected)
    torch.testing.assert_close(layer.weight.detach(), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))


def test_coefficients_are_the_two_dimensional_dct_of_scipy() -> None:
    """Of the weight as a matrix of outputs and all else."""
    for layer, _ in cases():
        theta = coefficients(layer).detach().double().flatten(1)
        take_basis(nn.Sequential(layer), "dct")
        alpha = coefficients(layer).detach().double().flatten(1)
        expected = torch.from_numpy(dctn(theta.numpy(), norm="ortho"))
        torch.testing.assert_close(alpha, expected, rtol=0, atol=1e-6)


def test_random_matrices_are_a_function_of_side_and_size() -> None:
    """Not of torch's generators, and another for the other side."""
    torch.manual_seed(1)
    one = orthonormal("random", "outputs", 12)
    torch.manual_seed(2)
    assert torch.equal(one, orthonormal("random", "outputs", 12))
    assert (one - orthonormal("random", "inputs", 12)).abs().max() > 0.1


def test_random_matrices_are_those_that_tickets_are_of() -> None:
    """As docs/formats.md tells, by SciPy; and by their numbers, which may never change."""
    for side in SIDES:
        bits = random_bits(stream_seed(0, "basis", side, 20), np.arange(400))
        q, u = qr(ndtri((np.floor(bits / 2**11) + 0.5) / 2**53).reshape(20, 20))
        expected = torch.from_numpy(q * np.sign(np.diag(u)))
        torch.testing.assert_close(orthonormal("random", side, 20), expected, rtol=0, atol=1e-12)
    rows = [[-0.0786882806418, 0.9968992699815], [-0.9968992699815, -0.0786882806418]]
    golden = torch.tensor(rows, dtype=torch.float64)
    torch.testing.assert_close(orthonormal("random", "inputs", 2), golden, rtol=0, atol=1e-12)


def test_random_matrices_reflect_as_often_as_they_do_not() -> None:
    """As from the Haar measure; Q alone, as LAPACK has it, has one determinant for each size."""
    for even in (True, False):
        sizes = [size for size in range(2, 60) if (size % 2 == 0) is even]
        matrices = [orthonormal("random", side, size) for size in sizes for side in SIDES]
        num_turns = sum(float(torch.linalg.det(matrix)) > 0 for matrix in matrices)
        assert 0.25 < num_turns / len(matrices) < 0.75
    traces = [float(orthonormal("random", side, n).trace()) for n in range(5, 95) for side in SIDES]
    assert abs(sum(traces) / len(traces)) < 0.25  # mean 0, variance 1 each


# The layers ------------------------------------------------------------------------------


@BASES
def test_a_layer_computes_with_what_its_coefficients_stand_for(basis: str) -> None:
    """The same as before, to 1e-5, and its bias is left alone."""
    for layer, x in cases():
        before = copy.deepcopy(layer)
        take_basis(nn.Sequential(layer), basis)
        torch.testing.assert_close(layer(x), before(x), rtol=1e-5, atol=1e-5)
        alpha, theta = coefficients(layer), coefficients(before)
        assert alpha.shape == theta.shape
        assert (alpha - theta).abs().max() > 0.01
        assert isinstance(layer, type(before))


@BASES
def test_gradients_are_those_of_an_explicit_basis(basis: str) -> None:
    """B = L kron R as a matrix on the flattened coefficients, in float64."""
    for layer, x in cases():
        plain = copy.deepcopy(layer).double()
        take_basis(nn.Sequential(layer), basis)
        layer.double()(x.double()).square().sum().backward()
        alpha = coefficients(layer)
        explicit = alpha.detach().clone().requires_grad_()
        both = torch.kron(layer.get_buffer("left"), layer.get_buffer("right"))
        given = {"weight": (both @ explicit.flatten()).view(explicit.shape)}
        torch.func.functional_call(plain, given, (x.double(),)).square().sum().backward()
        torch.testing.assert_close(alpha.grad, explicit.grad, rtol=1e-9, atol=1e-9)


@BASES
@pytest.mark.parametrize(
    "name", ["cifar_resnet8", "test_convnext", "test_efficientnet", "test_vit"]
)
@torch.no_grad()
def test_a_network_begins_as_the_same_function(basis: str, name: str) -> None:
    """Depthwise convolutions, attention and all; with the names that it has without a basis."""
    spec = ModelSpec(name, 5, 3, {"basis": basis})
    model, plain = spec.build(3).eval(), spec.plain.build(3).eval()
    side = getattr(plain, "default_cfg", {}).get("input_size", (3, 16, 16))[-1]
    images = torch.randn(2, 3, side, side)
    torch.testing.assert_close(model(images), plain(images), rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert list(prunable(model)) == list(prunable(plain))
    weights = weights_of(model)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=1e-6)


@BASES
def test_weights_are_not_rounded_before_they_are_used(basis: str) -> None:
    """Under autocast theta is float32; the layer gives what one with that weight gives, in bf16."""
    for layer, x in cases():
        plain = copy.deepcopy(layer)
        take_basis(nn.Sequential(layer), basis)
        theta = layer.weight.detach()  # type: ignore[operator]
        plain.load_state_dict({**layer.state_dict(), "weight": theta})
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer.weight, theta)  # type: ignore[arg-type]
            found = layer(x)
            assert found.dtype == torch.bfloat16
            assert torch.equal(found, plain(x))


def test_the_matrices_go_where_the_network_goes_and_into_no_state_dict() -> None:
    """Layers of like size have one matrix between them."""
    model = ModelSpec("cifar_resnet8", 10, 1, {"basis": "dct"}).build()
    one, other = (model.get_submodule(f"stages.0.0.conv{n}") for n in (1, 2))
    assert one.get_buffer("left") is other.get_buffer("left")
    assert not [name for name in model.state_dict() if name.endswith(("left", "right"))]
    moved = copy.deepcopy(model).to("meta")
    assert all(value.is_meta for value in (*moved.parameters(), *moved.buffers()))
    assert copy.deepcopy(model).double()(torch.zeros(2, 1, 8, 8).double()).dtype == torch.float64
    assert one.get_buffer("left").dtype == torch.float32


def test_an_outline_has_no_memory_for_the_matrices() -> None:
    """And gives the shapes of logits."""
    outline = ModelSpec("resnet50", 1000, 3, {"basis": "random"}).outline()
    assert all(value.is_meta for value in (*outline.parameters(), *outline.buffers()))
    assert outline.eval()(torch.zeros(2, 3, 64, 64, device="meta")).shape == (2, 1000)


def test_a_weight_that_two_layers_share_stays_one() -> None:
    """Its coefficients are taken once."""
    first, second = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
    second.weight = first.weight
    theta = first.weight.detach().clone()
    model = nn.Sequential(first, second)
    take_basis(model, "dct")
    assert list(prunable(model)) == ["0.weight"]
    for layer in (first, second):
        torch.testing.assert_close(layer.weight.detach(), theta, rtol=0, atol=1e-6)


def test_a_compiled_network_is_one_graph() -> None:
    model = ModelSpec("cifar_resnet8", 10, 1, {"basis": "dct", "width": 4}).build().eval()
    images = torch.randn(2, 1, 8, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images), model(images))


# Whole runs ------------------------------------------------------------------------------


def test_the_identity_is_iterative_magnitude_pruning_bit_for_bit(tmp_path: Path) -> None:
    """The same ids, masks, weights, metrics and checkpoints; only the settings say what was set."""
    folders = []
    for name, options in {"plain": (), "identity": ("--model.basis", "identity")}.items():
        (tmp_path / name).mkdir()
        short = ("--train.total", "1ep", "--stages.imp.rounds", "1")
        folders.append(run(tmp_path / name, TOML, *short, *options))
    plain, identity = map(ticket_facts, folders)
    for tickets, chosen in ((plain, None), (identity, "identity")):
        for document in tickets.values():
            assert document["config"]["settings"]["model"].pop("basis") == chosen
    assert identity == plain
    assert facts(folders[1]) == facts(folders[0])
    expected, found = map(final_states, folders)
    assert found.keys() == expected.keys()
    for level, tensors in expected.items():
        assert all(torch.equal(found[level][name], value) for name, value in tensors.items())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """IMP on the coefficients of a random basis."""
    return run(tmp_path_factory.mktemp("basis"), TOML, "--model.basis", "random")


def trained(run: Path, level: str) -> nn.Module:
    """The network of a level at the end of its training, in evaluation mode."""
    tensors = final_states(run)[f"imp/{level}/checkpoints"]
    model = Ticket.load(run / f"imp/{level}").model.build()
    model.load_state_dict({key: tensors[f"model/{key}"] for key in model.state_dict()})
    return model.eval()


def test_coefficients_are_pruned_and_weights_are_dense(finished: Path) -> None:
    """Pruned coefficients are zero at the end of each training; no weight is."""
    for level in ("level-00", "level-01", "level-02", "level-02-random"):
        ticket, model = Ticket.load(finished / f"imp/{level}"), trained(finished, level)
        assert ticket.model.arguments["basis"] == "random"
        alpha, theta = model.state_dict(), weights_of(model)
        for key, mask in ticket.masks.items():
            assert not alpha[key][~mask].any()
            assert int(theta[key].count_nonzero()) == mask.numel()


def test_a_level_keeps_the_largest_coefficients_of_the_one_before(finished: Path) -> None:
    """Against an independent sort over all layers."""
    final, masks = (
        trained(finished, "level-00").state_dict(),
        Ticket.load(finished / "imp/level-01"),
    )
    scores = torch.cat([final[name].abs().flatten() for name in masks.masks])
    kept = scores.sort(descending=True, stable=True).indices[: masks.masks.kept].sort().values
    chosen = torch.cat([mask.flatten() for mask in masks.masks.values()]).nonzero().flatten()
    assert torch.equal(chosen, kept)


def test_the_network_of_a_ticket_is_rebuilt_from_its_index(finished: Path) -> None:
    """It has coefficients to train, and gives the logits of the weights that they stand for."""
    ticket = Ticket.load(finished / "imp/level-02")
    model, plain = ticket.build_model().eval(), ticket.model.plain.build().eval()
    assert isinstance(model.get_submodule("conv1"), BasisLayer)
    plain.load_state_dict(weights_of(model))
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(model(images), plain(images))


def test_a_killed_run_goes_on_with_two_ranks(tmp_path: Path) -> None:
    """In the middle of its second level, with an average of the coefficients beside them."""
    text = TOML.replace('name = "cifar_resnet8"', 'name = "cifar_resnet8"\nbasis = "dct"')
    text = text.replace('total = "3ep"', 'total = "1ep"\nema = 0.9')
    text = text.replace('controls = ["random"]\n', "")
    assert_goes_on_with_two_ranks(text, tmp_path, step=17)


OTHERS = {
    "snip": 'recipe = "initial"\nscore = "snip"\ndensity = 0.3\n',
    "grasp": 'recipe = "initial"\nscore = "grasp"\nsamples_per_class = 2\ndensity = 0.3\n',
    "rigl": 'recipe = "dynamic"\nmethod = "rigl"\ninterval = "3it"\ndensity = 0.3\n',
    "dual": 'recipe = "dual"\ndensity = 0.3\ntransform.ramp = "6it"\ntransform.stabilise = "2it"\n',
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_methods_choose_among_coefficients(name: str, tmp_path: Path) -> None:
    """Exact counts, and zeros among the coefficients of the last checkpoint."""
    text = f'{BASE}[[stages]]\nname = "{name}"\n{OTHERS[name]}'
    folder = run(tmp_path, text, "--train.total", "1ep", *DCT)
    ticket = Ticket.load(folder / f"{name}/level-00")
    final = final_states(folder)[f"{name}/level-00/checkpoints"]
    assert ticket.model.basis == "dct"
    assert ticket.density == pytest.approx(0.3, abs=1e-3)
    for key, mask in ticket.masks.items():
        assert not final[f"model/{key}"][~mask].any()
        assert final[f"model/{key}"].any()


def test_a_ticket_is_stretched_within_its_basis(tmp_path: Path) -> None:
    """Like layers have like bases."""
    options = (*DCT, "--train.total", "1ep", "--stages.imp.rounds", "1")
    folder = run(tmp_path, FAMILY + IMP + DEEPER, *options)
    ticket = Ticket.load(folder / "deeper/level-01")
    assert ticket.model.arguments == {"width": 4, "basis": "dct"}


# Exports ---------------------------------------------------------------------------------


def export(*words: object) -> int:
    return run_command(["export", *map(str, words)])


@pytest.mark.parametrize("end", [False, True], ids=["start", "end"])
@torch.no_grad()
def test_an_export_holds_weights_and_not_coefficients(
    end: bool, finished: Path, tmp_path: Path
) -> None:
    """Into the network without a basis, with its logits; the metadata name the basis."""
    level = finished / "imp/level-02"
    ticket, images = Ticket.load(level), torch.randn(4, 1, 8, 8)
    model = trained(finished, "level-02") if end else ticket.build_model().eval()
    loads: dict[str, Callable[[Path], dict[str, Tensor]]] = {
        "torch": torch.load,
        "safetensors": safetensors.torch.load_file,
    }
    for form, load in loads.items():
        file = tmp_path / f"network.{form}"
        option = ["--trained"] if end else []
        assert export(level, "--format", form, "-o", file, *option) == 0
        plain = ModelSpec("cifar_resnet8", 10, 1, {"width": 4}).build()
        plain.load_state_dict(load(file))
        assert torch.equal(plain.eval()(images), model(images))
    with safetensors.safe_open(tmp_path / "network.safetensors", "pt") as opened:
        told = opened.metadata()
    assert ModelSpec(**json.loads(told["model"])) == ticket.model.plain
    assert (told["basis"], float(told["density"])) == ("random", ticket.density)


def test_onnxruntime_gives_the_logits_of_the_coefficients(finished: Path, tmp_path: Path) -> None:
    level, file = finished / "imp/level-01", tmp_path / "network.onnx"
    assert export(level, "--format", "onnx", "--image-size", "8", "-o", file) == 0
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    images = torch.randn(4, 1, 8, 8)
    (found,) = session.run(["logits"], {"images": images.numpy()})
    with torch.no_grad():
        expected = Ticket.load(level).build_model().eval()(images)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
    assert session.get_modelmeta().custom_metadata_map["basis"] == "random"


def test_masks_of_coefficients_are_not_exported_as_masks_of_weights(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pruned.pt"
    assert export(finished / "imp/level-01", "--format", "pruning", "-o", file) == 2
    told = capsys.readouterr().err
    assert "its masks are of coefficients in the basis 'random'" in told
    assert told.count("\n") == 1
    assert not file.exists()


def test_a_ticket_shows_its_basis(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["tickets", "show", str(finished / "imp/level-01")]) == 0
    assert "cifar_resnet8, width 4, basis random, 10 classes" in capsys.readouterr().out
    assert run_command(["tickets", "verify", str(finished)]) == 0


def test_masks_in_different_bases_are_not_compared(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = run(tmp_path, TOML, "--train.total", "7it", "--stages.imp.rounds", "0", *DCT)
    capsys.readouterr()
    words = ["tickets", "diff", str(finished / "imp/level-00"), str(other / "imp/level-00")]
    assert run_command(words) == 2
    told = capsys.readouterr().err
    assert "different bases (random, dct)" in told
    assert told.count("\n") == 1


# Refusals --------------------------------------------------------------------------------

MULTIPRIZE = '[[stages]]\nname = "mpt"\nrecipe = "multiprize"\n'
SYNFLOW = '[[stages]]\nname = "syn"\nrecipe = "initial"\nscore = "synflow"\ndensity = 0.5\n'
PATTERN = '[[stages]]\nname = "two"\nrecipe = "initial"\nscore = "snip"\npattern = "2:4"\n'
MISTAKES: list[Mistake] = [
    (IMP, ("--model.basis", "dtc"), "model.basis = 'dtc': is not known; did you mean 'dct'?"),
    (MULTIPRIZE, DCT, "stages.mpt: model.basis = 'dct': binary weights are chosen as they are"),
    (SYNFLOW, DCT, "stages.syn: model.basis = 'dct': SynFlow needs weights of one sign"),
    (PATTERN, DCT, "stages.two: model.basis = 'dct': the zeros of a pattern would be coefficients"),
    (
        IMP + DEEPER + 'model.basis = "dct"\n',
        (),
        "cannot become one of cifar_resnet20: its model.basis is 'identity', this stage's 'dct'",
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_one_clear_line(
    mistake: Mistake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(mistake, tmp_path, capsys)


@pytest.mark.parametrize("text", [SYNFLOW, PATTERN, MULTIPRIZE])
def test_the_identity_is_no_basis_to_refuse(text: str, tmp_path: Path) -> None:
    options = ("--model.basis", "identity", "--model.width", "16")
    check_stages(read_config(write_config(tmp_path, BASE + text), options), Folder(tmp_path))


def test_a_side_that_is_too_large_is_one_line() -> None:
    """timm's VGG has a convolution of 512 channels and 7x7 places."""
    told = r"layer pre_logits.fc1 has 25,088 inputs, .* at most 16,384"
    with pytest.raises(UserError, match=told):
        ModelSpec("vgg11", 10, 3, {"basis": "dct"}).outline()


@pytest.mark.parametrize("basis", ["fourier", ["dct"], None, 1])
def test_a_ticket_in_an_unknown_basis_is_refused(basis: object) -> None:
    with pytest.raises(ValueError, match=r"basis = .*: must be one of identity, dct, random"):
        ModelSpec("cifar_resnet8", 10, 3, {"basis": basis})


def test_a_specification_names_the_basis_only_where_there_is_one() -> None:
    """So that a ticket of weights has the id that it always had."""
    configs = [
        ModelConfig("cifar_resnet8"),
        ModelConfig("cifar_resnet8", basis="identity"),
        ModelConfig("cifar_resnet8", basis="dct"),
    ]
    specs = [ModelSpec.of(config, num_classes=10, in_chans=1) for config in configs]
    assert [spec.arguments for spec in specs] == [{}, {}, {"basis": "dct"}]
    assert [spec.basis for spec in specs] == [None, None, "dct"]
    assert specs[2].plain == specs[0]
