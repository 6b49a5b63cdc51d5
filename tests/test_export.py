"""Exports: other tools read the same network from each form, and a file is whole or not there."""

import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import safetensors
import safetensors.torch
import torch
from binary import make_prize
from tiny import final_states, write_config
from torch import Tensor, nn
from torch.nn.utils import prune

from data.errors import RunError, UserError
from data.files import Folder
from launch.cli import run_command
from pruning import onnx_model
from pruning.allocate import keep_top
from pruning.exporting import Subnetwork
from pruning.importing import Imported, store, store_prize
from pruning.n_of_m import n_of_m
from pruning.onnx_model import to_onnx
from pruning.scores import magnitude
from pruning.store import TicketStore
from pruning.tickets import Ticket
from train.checkpoint import Checkpoints
from train.models import ModelSpec
from train.ranks import ALONE

CIFAR = ModelSpec("cifar_resnet8", 10, 1, {"width": 4})
TIMM = ModelSpec("test_resnet", 7, 3)
SPECS = pytest.mark.parametrize("spec", [CIFAR, TIMM], ids=["cifar", "timm"])


def network(spec: ModelSpec) -> nn.Module:
    """With running statistics that are not those of a fresh network."""
    model = spec.build(seed=1)
    generator = torch.Generator().manual_seed(2)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model


def write_ticket(
    folder: Path | str, spec: ModelSpec = CIFAR, *, weights: bool = True, pattern: bool = False
) -> str:
    """A ticket of step 20 in a new store, by its URL; at 25 %, or 2:4."""
    model = network(spec)
    return store(
        Imported(
            model=spec,
            masks=n_of_m(magnitude(model)) if pattern else keep_top(magnitude(model), 0.25),
            weights=model.state_dict() if weights else None,
            step=20,
            level=2,
            origin="pruning",
            source="a test",
        ),
        str(folder),
    )


def export(*words: object) -> int:
    return run_command(["export", *map(str, words)])


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(images)
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@SPECS
@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_a_state_dict_is_that_of_the_masked_network(
    form: str, spec: ModelSpec, tmp_path: Path
) -> None:
    """Loaded without pickle into a fresh network: what `build_model` gives, zeros included."""
    url, file = write_ticket(tmp_path / "store", spec), tmp_path / "out/network.file"
    assert export(url, "--format", form, "-o", file) == 0
    load: dict[str, Callable[[Path], dict[str, Tensor]]] = {
        "torch": lambda path: torch.load(path, weights_only=True),
        "safetensors": safetensors.torch.load_file,
    }
    state = load[form](file)
    ticket = Ticket.load(url)
    assert type(state) is dict
    assert_equal(state, dict(ticket.build_model().state_dict()))
    spec.build().load_state_dict(state)
    assert sum(int(state[n].count_nonzero()) for n in ticket.masks) == ticket.masks.kept


def test_safetensors_say_where_they_come_from(tmp_path: Path) -> None:
    """Ticket, model, density and step in the header."""
    url, file = write_ticket(tmp_path / "store"), tmp_path / "network.safetensors"
    export(url, "--format", "safetensors", "-o", file)
    ticket = Ticket.load(url)
    with safetensors.safe_open(file, "pt") as opened:
        facts = opened.metadata()
    assert facts["ticket"] == ticket.id
    assert ModelSpec(**json.loads(facts["model"])) == CIFAR
    assert float(facts["density"]) == ticket.density
    assert (facts["weights"], facts["format"]) == ("step 20", "pt")


@SPECS
def test_torch_prunes_the_same_network(spec: ModelSpec, tmp_path: Path) -> None:
    """Loads into a model prepared by prune.identity; after prune.remove it is `build_model`."""
    url, file = write_ticket(tmp_path / "store", spec), tmp_path / "network.pt"
    assert export(url, "--format", "pruning", "-o", file) == 0
    state, ticket = torch.load(file, weights_only=True), Ticket.load(url)
    model = spec.build()
    names = [name.removesuffix(".weight_mask") for name in state if name.endswith("_mask")]
    for name in names:
        prune.identity(model.get_submodule(name), "weight")
    model.load_state_dict(state)
    assert_equal({f"{n}.weight": state[f"{n}.weight_mask"].bool() for n in names}, {**ticket.masks})
    dense = {f"{n}.weight": state[f"{n}.weight_orig"] for n in names}
    assert_equal(dense, {name: ticket.weights()[name] for name in dense})
    images = torch.randn(2, spec.in_chans, 32, 32)
    expected = logits(ticket.build_model(), images)
    assert torch.equal(logits(model, images), expected)
    for name in names:
        prune.remove(model.get_submodule(name), "weight")
    assert_equal(dict(model.state_dict()), dict(ticket.build_model().state_dict()))


@pytest.mark.parametrize(("spec", "side"), [(CIFAR, 32), (TIMM, 160)], ids=["cifar", "timm"])
def test_onnxruntime_gives_the_same_logits(spec: ModelSpec, side: int, tmp_path: Path) -> None:
    """For any batch, of images of the size that the network is for; metadata name the ticket."""
    url, file = write_ticket(tmp_path / "store", spec), tmp_path / "network.onnx"
    assert export(url, "--format", "onnx", "-o", file) == 0
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", spec.in_chans, side, side]
    ticket = Ticket.load(url)
    for batch_size in (1, 2, 5):
        images = torch.randn(batch_size, spec.in_chans, side, side)
        (found,) = session.run(["logits"], {"images": images.numpy()})
        expected = logits(ticket.build_model(), images)
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
    assert session.get_modelmeta().custom_metadata_map["ticket"] == ticket.id


class Drifting(nn.Module):
    """Does not give the same logits twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 4 * 4, 2)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        found: Tensor = self.fc(x.flatten(1)) + self.calls
        return found


def test_other_logits_than_torchs_are_refused() -> None:
    with pytest.raises(RunError, match=r"logits differ from torch's by .*: nothing was written"):
        to_onnx(Drifting(), in_chans=3, image_size=4, facts={})


def test_a_network_beyond_protobuf_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_model, "_LARGEST", 1000)
    with pytest.raises(UserError, match="an ONNX file holds at most 1,000"):
        to_onnx(CIFAR.build(), in_chans=1, facts={})


def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """... in one line, and nothing is written."""
    find = importlib.util.find_spec
    monkeypatch.setattr(onnx_model, "find_spec", lambda n: None if n == "onnxscript" else find(n))
    url, file = write_ticket(tmp_path / "store"), tmp_path / "network.onnx"
    assert export(url, "--format", "onnx", "-o", file) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ONNX export needs onnxscript: pip install 'tombola[onnx]'")
    assert told.count("\n") == 1
    assert not file.exists()


# Trained weights -------------------------------------------------------------------------


def save(level: Path, step: int, state: dict[str, Any]) -> None:
    checkpoints = Checkpoints(Folder(level / "checkpoints"), ALONE, keep=1)
    checkpoints.save(step, state, kept=True)
    checkpoints.wait()


def test_trained_weights_are_those_of_the_last_checkpoint(tmp_path: Path) -> None:
    """The newest one's, and their moving average where there is one; pruned weights stay zero."""
    ticket = Ticket.load(write_ticket(tmp_path / "store"))
    states = [dict(CIFAR.build(seed).state_dict()) for seed in range(4)]
    save(tmp_path, 20, {"model": states[0], "ema": {}})
    save(tmp_path, 30, {"model": states[1], "ema": {}})
    trained = Subnetwork.at_end(ticket, Folder(tmp_path))
    assert_equal(trained.weights, states[1])
    assert trained.facts()["weights"] == "trained"
    weights = dict(trained.build_model().named_parameters())
    assert all(not weights[name][~mask].any() for name, mask in ticket.masks.items())
    save(tmp_path, 40, {"model": states[2], "ema": states[3]})
    assert_equal(Subnetwork.at_end(ticket, Folder(tmp_path)).weights, states[3])


@pytest.mark.parametrize("steps", [(), (20,)], ids=["none", "step k alone"])
def test_without_its_last_checkpoint_nothing_is_exported(
    steps: tuple[int, ...], tmp_path: Path
) -> None:
    """No checkpoint, or only that of step k: one line."""
    for step in steps:
        save(tmp_path, step, {"model": dict(CIFAR.build().state_dict()), "ema": {}})
    ticket = Ticket.load(write_ticket(tmp_path / "store"))
    with pytest.raises(UserError, match="no checkpoint of the end of the training"):
        Subnetwork.at_end(ticket, Folder(tmp_path))


def test_a_damaged_last_checkpoint_is_not_replaced_by_an_older_one(tmp_path: Path) -> None:
    ticket = Ticket.load(write_ticket(tmp_path / "store"))
    for step in (30, 40):
        save(tmp_path, step, {"model": dict(CIFAR.build().state_dict()), "ema": {}})
    (tmp_path / "checkpoints/step-00000040/manifest.json").write_text("{}")
    with pytest.raises(RunError, match="step-00000040: damaged"):
        Subnetwork.at_end(ticket, Folder(tmp_path))


def test_a_level_of_a_run_is_exported_with_what_it_was_trained_to(tmp_path: Path) -> None:
    """The command on a real run: the final checkpoint's weights, not those of step k."""
    words = ["run", write_config(tmp_path), "--root", str(tmp_path), "--stages.imp.rounds", "1"]
    assert run_command(words) == 0
    level, file = tmp_path / "tiny/imp/level-01", tmp_path / "trained.pt"
    assert export(level, "--format", "torch", "-o", file, "--trained") == 0
    state = torch.load(file, weights_only=True)
    final = final_states(tmp_path / "tiny")["imp/level-01/checkpoints"]
    assert_equal(state, {name: final[f"model/{name}"] for name in state})
    assert export(level, "--format", "torch", "-o", file, "--force") == 0
    at_k = Ticket.load(level).build_model().state_dict()
    assert_equal(torch.load(file, weights_only=True), dict(at_k))


# The file --------------------------------------------------------------------------------


def test_an_existing_file_is_replaced_only_by_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, file = write_ticket(tmp_path / "store"), tmp_path / "network.pt"
    file.write_bytes(b"mine")
    assert export(url, "--format", "torch", "-o", file) == 2
    assert capsys.readouterr().err == f"error: {file}: is there already; --force replaces it\n"
    assert file.read_bytes() == b"mine"
    assert export(url, "--format", "torch", "-o", file, "--force") == 0
    assert torch.load(file, weights_only=True)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["network.pt"]


def test_a_ticket_is_exported_from_and_to_an_object_store() -> None:
    url = write_ticket("memory://shared/store")
    assert export(url, "--format", "torch", "-o", "memory://exports/network.pt") == 0
    assert export(url, "--format", "torch", "-o", "memory://top.pt") == 0
    assert Folder("memory://exports").read("network.pt") == Folder("memory://").read("top.pt")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--format", "torch", "-o", "x.pt", "--image-size", "8"], "--image-size 8: .* onnx"),
        (["--format", "onnx", "-o", "x.onnx", "--image-size", "0"], "--image-size 0: must be at"),
        (["--format", "torch", "-o", "folder"], "-o folder: is a folder"),
        (["--format", "torch", "-o", "x/"], "-o x/: is a folder"),
        (["--format", "keras", "-o", "x"], "keras"),
        (["-o", "x"], "--format"),
        (["--format", "torch"], "-o"),
        (["--format", "torch", "-o", "x", "--trained"], "no checkpoint of the end"),
        (["--format", "torch", "-o", "nowhere://x/y"], "cannot be opened"),
    ],
)
def test_a_wrong_argument_is_one_line(
    words: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2, and nothing is written."""
    url = write_ticket(tmp_path / "store")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert export(url, *words) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert re.search(told, printed)
    assert {path.name for path in tmp_path.iterdir()} == {"store", "folder"}


def test_images_that_the_network_does_not_take_are_one_line() -> None:
    """A transformer is for one size."""
    spec = ModelSpec("test_vit", 5, 3)
    with pytest.raises(UserError, match=r"does not take images of 3x50x50: .*--image-size"):
        to_onnx(spec.build(), in_chans=3, image_size=50, facts={})


def test_a_ticket_without_weights_says_how_to_export_the_trained_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = write_ticket(tmp_path / "store", weights=False)
    assert export(url, "--format", "torch", "-o", tmp_path / "x") == 2
    assert "--trained exports what it was trained to" in capsys.readouterr().err


def test_no_ticket_is_one_line(tmp_path: Path) -> None:
    assert export(tmp_path, "--format", "torch", "-o", tmp_path / "x") == 2


# The page --------------------------------------------------------------------------------

PAGE = Path(__file__).parent.parent / "docs/export.md"


def test_the_page_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands on a ticket, and then its code, in the files' own folder."""
    url, prize = write_ticket(tmp_path / "store"), make_prize()
    binary = store_prize(prize, str(tmp_path / "store"), {"image_shape": [3, 16, 16]})
    page = PAGE.read_text().replace("runs/digits-imp/imp/level-07", url)
    page = page.replace("runs/digits-multiprize/mpt-1-32/level-00", binary)
    pattern = write_ticket(tmp_path / "store", ModelSpec("cifar_resnet8", 10, 4), pattern=True)
    page = page.replace("runs/digits-2-4/initial/level-00", pattern).replace(" --trained -o", " -o")
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^tombola (export .*|tickets .*\.mpt\b.*)$", page, re.MULTILINE)
    assert [run_command(command.split()) for command in commands] == [0] * 8
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (of_the_file,) = [block for block in blocks if "ticket.mpt" in block]
    (of_pattern,) = [block for block in blocks if "2-4.safetensors" in block]
    blocks = [block for block in blocks if block not in (of_the_file, of_pattern)]
    expected = Ticket.load(url).build_model()
    images = torch.randn(2, 1, 8, 8)
    for block in blocks:
        names: dict[str, Any] = {}
        exec(block, names)
        if "model" in names:
            assert torch.equal(logits(names["model"], images), logits(expected, images))
    assert len(blocks) == 4
    assert names["model"].fc.weight_mask.any()
    exec(of_the_file, names)
    assert torch.equal(names["logits"], logits(prize.build_model(), torch.zeros(5, 3, 16, 16)))
    exec(of_pattern, names)
    loaded = names["model"].to("cpu", torch.float32)
    images = torch.randn(2, 4, 8, 8)
    expected = Ticket.load(pattern).build_model()
    torch.testing.assert_close(logits(loaded, images), logits(expected, images), rtol=0.1, atol=0.1)


def test_a_ticket_that_does_not_fit_its_model_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A ticket may be anyone's: nothing is built of it before its shapes are compared."""
    ticket = Ticket.load(write_ticket(tmp_path / "store"))
    other = replace(ticket, model=ModelSpec("cifar_resnet8", 1 << 24, 1, {"width": 4}))
    TicketStore(Folder(tmp_path / "other")).add(other)
    words = ["export", str(tmp_path / f"other/{other.id}"), "--format", "torch"]
    assert run_command([*words, "-o", str(tmp_path / "x.pt")]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ticket ")
    assert printed.count("\n") == 1


def test_a_run_is_exported_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the other commands take it: RUN/STAGE/LEVEL under --root, or the sparsest of the run."""
    (tmp_path / "runs").mkdir()
    root = str(tmp_path / "runs")
    words = ["run", write_config(tmp_path), "--root", root, "--stages.imp.rounds", "1"]
    assert run_command(words) == 0
    for place in ("tiny", "tiny/imp/level-01"):
        form = ["--format", "torch", "--trained", "--force", "-o", str(tmp_path / "x.pt")]
        assert run_command(["export", place, "--root", root, *form]) == 0
    capsys.readouterr()
    level = tmp_path / "runs/tiny/imp/level-01"
    (level / "masks.json").write_text("{")
    (level / "ticket.json").unlink()
    assert run_command(words) == 1
    told = capsys.readouterr().err
    assert "masks.json: damaged" in told
    assert told.endswith(f"remove {level} to train that level again\n")
