"""The commands on multi-prize tickets: export, verify, import and all other forms."""

import json
import re
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import safetensors.torch
import torch
from binary import IMAGES, SIGN, SPEC, assert_same_prize, logits, make_prize, opened
from family import BASE, IMP, run
from test_export import assert_equal, export, write_ticket
from torch import Tensor

from data.files import Folder
from launch.cli import run_command
from pruning import mpt
from pruning.exporting import Subnetwork
from pruning.importing import store_prize
from pruning.prizes import Prize
from pruning.tickets import Ticket
from train.models import ModelSpec

FORMS = pytest.mark.parametrize("explicit", [False, True], ids=["seed", "signs"])
SEARCH = """
[[stages]]
name = "mpt"
recipe = "multiprize"
density = 0.4
batchnorm = "learned"
train.total = "1ep"
"""


def write(folder: Path, prize: Prize, **config: Any) -> str:
    """A ticket in a new store, by its URL; its images are of 16x16."""
    return store_prize(prize, str(folder), config or {"image_shape": list(IMAGES)})


def tickets(*words: object) -> int:
    return run_command(["tickets", *map(str, words)])


def exported(url: str, file: Path, *options: object) -> bytes:
    """The content of the file that the command writes."""
    assert export(url, "--format", "mpt", "-o", file, *options) == 0
    return file.read_bytes()


# The file --------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("spec", [SPEC, SIGN], ids=["real", "binary"])
def test_a_ticket_goes_out_and_comes_back(
    spec: ModelSpec, explicit: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Export, verify, import, verify, export: the same file, and the same ticket."""
    prize, file = make_prize(spec, explicit=explicit), tmp_path / "first.mpt"
    url = write(tmp_path / "store", prize)
    content = exported(url, file)
    assert capsys.readouterr().out == f"{file}: {url} as mpt, {len(content):,} bytes\n"
    assert_same_prize(mpt.read(str(file)).prize, prize)
    assert tickets("verify", file) == 0
    found = capsys.readouterr().out
    assert found.startswith(f"{file}: whole: cifar_resnet8 at 3")
    assert ", the same logits" in found
    assert ("8 of 10 layers run as bits" in found) is (spec is SIGN)
    assert tickets("import", file, "--from", "mpt", "-o", tmp_path / "other") == 0
    told = capsys.readouterr().out
    assert re.search(r": density 3\d\.\d{4}%, binary weights, logits as the file tells\n$", told)
    second = Ticket.load(told.partition(": density")[0])
    assert second.id == Ticket.load(url).id
    assert second.config["imported"] == {"from": "mpt", "source": str(file)}
    assert tickets("verify", tmp_path / "other") == 0
    assert exported(f"{tmp_path}/other/{second.id}", tmp_path / "second.mpt") == content


def test_a_file_for_images_of_another_size_comes_back_for_them(tmp_path: Path) -> None:
    """`--image-size` goes before what the ticket tells, and the import keeps it."""
    known = {"image_shape": [3, 16, 16], "mean": [0.5] * 3, "std": [0.2] * 3, "resize": None}
    url = write(tmp_path / "store", make_prize(), preprocessing=known)
    assert opened(exported(url, tmp_path / "a.mpt"))[0]["image_shape"] == [3, 16, 16]
    content = exported(url, tmp_path / "b.mpt", "--image-size", 24)
    body, _ = opened(content)
    assert (body["image_shape"], body["preprocessing"]) == ([3, 24, 24], known)
    assert tickets("import", tmp_path / "b.mpt", "--from", "mpt", "-o", tmp_path / "other") == 0
    (place,) = (tmp_path / "other").glob("*.json")
    assert exported(str(place), tmp_path / "c.mpt") == content


@pytest.mark.parametrize("activation", ["relu", "sign"])
def test_a_ticket_of_a_run_is_exported_and_verified(activation: str, tmp_path: Path) -> None:
    """With the preprocessing and the metrics of the run; binary activations as bits too."""
    small = BASE.replace("cifar_resnet14", "cifar_resnet8")
    folder = run(tmp_path, f"{small}{SEARCH}model.activation = '{activation}'\n")
    level, file = folder / "mpt/level-00", tmp_path / "x.mpt"
    body, _ = opened(exported(str(level), file))
    ticket = Ticket.load(level)
    assert body["about"]["ticket"] == ticket.id
    assert body["about"]["place"] == "mpt/level-00"
    assert body["about"]["metrics"] == ticket.metrics
    assert body["image_shape"] == body["preprocessing"]["image_shape"] == [1, 8, 8]
    assert isinstance(body["seed"], int)
    assert_same_prize(mpt.read(str(file)).prize, Prize.of(ticket))
    assert tickets("verify", file, level) == 0
    assert exported(str(level), file, "--force", "--trained") == file.read_bytes()


def test_files_are_on_object_stores_too() -> None:
    url = store_prize(make_prize(), "memory://mpt/store", {"image_shape": list(IMAGES)})
    assert export(url, "--format", "mpt", "-o", "memory://mpt/x.mpt") == 0
    assert tickets("verify", "memory://mpt/x.mpt") == 0
    assert tickets("import", "memory://mpt/x.mpt", "--from", "mpt", "-o", "memory://mpt/two") == 0


# Verify ----------------------------------------------------------------------------------


def test_damage_is_one_line_and_an_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside files and tickets that are whole."""
    url = write(tmp_path / "store", make_prize())
    whole, bad = tmp_path / "whole.mpt", tmp_path / "bad.mpt"
    content = bytearray(exported(url, whole))
    content[-1] ^= 1
    bad.write_bytes(content)
    capsys.readouterr()
    assert tickets("verify", whole, bad, url, tmp_path / "none.mpt") == 1
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].startswith(f"{whole}: whole: ")
    assert lines[1].startswith(f"{bad}: damaged: ")
    assert lines[2] == f"{url}: whole"
    assert lines[3] == f"{tmp_path}/none.mpt: no such file"
    assert printed.err == "error: 2 of 4 tickets cannot be used\n"


def test_json_tells_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = write(tmp_path / "store", make_prize())
    whole, bad = tmp_path / "whole.mpt", tmp_path / "bad.mpt"
    bad.write_bytes(exported(url, whole)[:-1])
    capsys.readouterr()
    assert tickets("verify", whole, "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["ticket"], row["problem"]) == (str(whole), None)
    assert "the same logits" in row["found"]
    assert tickets("verify", whole, bad, "--json") == 1
    rows = json.loads(capsys.readouterr().out)
    assert [row["ticket"] for row in rows] == [str(whole), str(bad)]
    assert "damaged: " in rows[1]["problem"]


def test_binary_activations_are_verified_as_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of such a network alone; were the packed layers wrong, it would be told."""
    one, other = (write(tmp_path / "store", make_prize(spec)) for spec in (SIGN, SPEC))
    exported(one, tmp_path / "sign.mpt")
    exported(other, tmp_path / "real.mpt")
    assert tickets("verify", tmp_path / "sign.mpt") == 0
    monkeypatch.setattr(mpt, "packed_model", lambda prize, images: lambda _: torch.zeros(2, 10))
    assert tickets("verify", tmp_path / "real.mpt") == 0
    capsys.readouterr()
    assert tickets("verify", tmp_path / "sign.mpt") == 1
    assert "its network gives other logits when it runs as bits" in capsys.readouterr().out


# What is refused -------------------------------------------------------------------------


def assert_one_line(capsys: pytest.CaptureFixture[str], told: str) -> None:
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert told in printed


def test_another_ticket_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of weights that were trained, without weights, and of real ones: nothing is written."""
    file = tmp_path / "x.mpt"
    url = write_ticket(tmp_path / "store")
    assert export(url, "--format", "mpt", "-o", file) == 2
    assert_one_line(capsys, "has no binary weights, which an .mpt file is for")
    url = write_ticket(tmp_path / "masks", weights=False)
    assert export(url, "--format", "mpt", "-o", file) == 2
    assert_one_line(capsys, "has no weights to start from")
    folder = run(tmp_path, BASE + IMP + SEARCH + 'weights = "float"\n')
    for level in ("imp/level-01", "mpt/level-00"):
        assert export(folder / level, "--format", "mpt", "-o", file) == 2
        assert_one_line(capsys, "has no binary weights")
    assert not file.exists()


@pytest.mark.parametrize(
    ("config", "options", "told"),
    [
        ({"x": 1}, [], "tell the side of its images with --image-size"),
        ({"preprocessing": [3]}, [], "tell the side of its images with --image-size"),
        ({"preprocessing": {}}, ["--image-size", "0"], "--image-size 0: must be at least 1"),
        ({"preprocessing": {"image_shape": "x"}}, [], "not of type list; choose an --image-size"),
        ({"preprocessing": {"image_shape": [1, 8, 8]}}, [], "not of 3 channels"),
        ({"image_shape": [3, 0, 8]}, [], "not of 3 channels, height and width"),
        ({"image_shape": [3, 8, 8]}, ["--image-size", "5000"], "larger than 4,194,304 values"),
    ],
)
def test_images_that_are_not_known_or_impossible_are_one_line(
    config: dict[str, Any],
    options: list[str],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = write(tmp_path / "store", make_prize(), **config)
    assert export(url, "--format", "mpt", "-o", tmp_path / "x.mpt", *options) == 2
    assert_one_line(capsys, told)
    assert not (tmp_path / "x.mpt").exists()


def spoiled(prize: Prize, name: str, value: float) -> Prize:
    prize.rest[name].fill_(value)
    return prize


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("norm1.running_var", float("nan"), "norm1.running_var is not finite"),
        ("norm1.bias", float("inf"), "norm1.bias is not finite"),
        ("norm1.running_var", -1.0, "logits is not finite"),
        ("fc.bias", 1.0, "the bias of fc.weight is not zero"),
    ],
)
def test_no_file_is_written_that_would_not_be_read(
    name: str, value: float, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a search that diverged, or a ticket of someone: one line."""
    url = write(tmp_path / "store", spoiled(make_prize(), name, value))
    assert export(url, "--format", "mpt", "-o", tmp_path / "x.mpt") == 1
    assert_one_line(capsys, f"{told}: nothing was written")
    assert not (tmp_path / "x.mpt").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--model", "cifar_resnet8"], "--from mpt: the file tells model, classes and all"),
        (["--num-classes", "10"], "the file tells model, classes and all"),
        (["--width", "4"], "the file tells model, classes and all"),
        (["--norm", "batch"], "the file tells model, classes and all"),
        (["--activation", "sign"], "the file tells model, classes and all"),
        (["--density", "0.3"], "--density 0.3: goes with --from biprop"),
        (["--step", "3"], "--step: not with --from mpt"),
        (["--level", "3"], "--level: not with --from mpt"),
    ],
)
def test_an_option_that_the_file_decides_is_one_line(
    options: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = write(tmp_path / "store", make_prize())
    exported(url, tmp_path / "x.mpt")
    capsys.readouterr()
    words = (tmp_path / "x.mpt", "--from", "mpt", *options, "-o", tmp_path / "other")
    assert tickets("import", *words) == 2
    assert_one_line(capsys, told)
    assert not (tmp_path / "other").exists()


def test_a_damaged_file_is_not_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor one that is missing, or of something else; nothing is stored."""
    url = write(tmp_path / "store", make_prize())
    content = exported(url, tmp_path / "x.mpt")
    (tmp_path / "x.mpt").write_bytes(content[: len(content) // 2])
    capsys.readouterr()
    words = ("--from", "mpt", "-o", tmp_path / "other")
    assert tickets("import", tmp_path / "x.mpt", *words) == 1
    assert_one_line(capsys, f"{tmp_path}/x.mpt: damaged: ")
    assert tickets("import", tmp_path / "y.mpt", *words) == 2
    assert_one_line(capsys, "y.mpt: no such file")
    assert export(url, "--format", "safetensors", "-o", tmp_path / "z") == 0
    assert tickets("import", tmp_path / "z", *words) == 1
    assert_one_line(capsys, "z: damaged: no file of a multi-prize ticket")
    assert not (tmp_path / "other").exists()


# Other forms -----------------------------------------------------------------------------


def signed_weights(prize: Prize) -> dict[str, Tensor]:
    """gain * sign, and 0 where it is pruned."""
    layers = prize.layers.items()
    return {name: layer.binary * torch.tensor(layer.gain) for name, layer in layers}


@FORMS
@pytest.mark.parametrize("trained", [[], ["--trained"]], ids=["at k", "trained"])
def test_other_forms_hold_gain_times_sign_times_mask(
    trained: list[str], explicit: bool, tmp_path: Path
) -> None:
    """As a state dict in either form, and as torch prunes; `--trained` gives the same, masked."""
    prize = make_prize(explicit=explicit)
    url = write(tmp_path / "store", prize)
    for form in ("torch", "safetensors", "pruning"):
        assert export(url, "--format", form, "-o", tmp_path / form, *trained) == 0
    expected = {**prize.rest, **signed_weights(prize)}
    assert_equal(torch.load(tmp_path / "torch", weights_only=True), expected)
    assert_equal(safetensors.torch.load_file(tmp_path / "safetensors"), expected)
    state = torch.load(tmp_path / "pruning", weights_only=True)
    for name, layer in prize.layers.items():
        assert torch.equal(state[f"{name}_mask"].bool(), layer.mask)
        assert torch.equal(state[f"{name}_orig"] * layer.mask, expected[name])
        assert state[f"{name}_orig"].abs().unique().tolist()[-1] == layer.gain


@pytest.mark.parametrize("spec", [SPEC, SIGN], ids=["real", "binary"])
def test_onnx_gives_the_same_logits(spec: ModelSpec, tmp_path: Path) -> None:
    url = write(tmp_path / "store", make_prize(spec))
    file = tmp_path / "x.onnx"
    assert export(url, "--format", "onnx", "--image-size", 16, "-o", file) == 0
    images = torch.randn(3, *IMAGES, generator=torch.Generator().manual_seed(1))
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"images": images.numpy()})
    expected = logits(Ticket.load(url).build_model(), images)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


def test_what_it_was_trained_to_is_what_it_is(tmp_path: Path) -> None:
    """A ticket of a store has no training behind it, and needs none."""
    ticket = Ticket.load(write(tmp_path / "store", make_prize()))
    trained = Subnetwork.at_end(ticket, Folder(tmp_path))
    assert_equal(trained.weights, ticket.build_model().state_dict())
    assert trained.facts()["weights"] == "trained"


def test_a_store_copies_and_collects_such_tickets(tmp_path: Path) -> None:
    """Their objects, stored signs among them, go along and are not taken for garbage."""
    urls = [write(tmp_path / "one", make_prize(explicit=flag)) for flag in (False, True)]
    for url in urls:
        assert tickets("copy", url, tmp_path / "two") == 0
    assert tickets("gc", tmp_path / "two", "--hours", 0) == 0
    assert tickets("verify", tmp_path / "two") == 0
    for url, explicit in zip(urls, (False, True), strict=True):
        copied = Ticket.load(f"{tmp_path}/two/{Ticket.load(url).id}")
        assert_same_prize(Prize.of(copied), make_prize(explicit=explicit))


def test_level_and_metrics_come_along(tmp_path: Path) -> None:
    """So that a ticket has its id again, and a store shows what it reached."""
    about = {"level": 2, "metrics": {"test": {"accuracy": 0.75}}}
    config = {"image_shape": [3, 16, 16]}
    url = store_prize(make_prize(), str(tmp_path / "store"), config, about)
    exported(url, tmp_path / "x.mpt")
    assert tickets("import", tmp_path / "x.mpt", "--from", "mpt", "-o", tmp_path / "other") == 0
    found = Ticket.load(f"{tmp_path}/other/{Ticket.load(url).id}")
    assert (found.level, found.metrics) == (2, about["metrics"])
