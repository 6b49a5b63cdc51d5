"""Runs of networks of one family that take a second a stage: what elastic tickets start from."""

from pathlib import Path

import pytest
from killing import KILLED, killed_run
from processes import run_ranks, tombola
from tiny import assert_same_run, write_config

from launch.cli import run_command
from pruning.tickets import Ticket

Mistake = tuple[str, tuple[str, ...], str]
"""stages, options, and what the one line says"""
BASE = """
name = "tiny"
seed = 3
[data]
batch_size = 96
[model]
name = "cifar_resnet14"
width = 4
[train]
total = "2ep"
[optimizer]
lr = 0.1
[schedule]
name = "linear"
[checkpoint]
every = "8it"
[log]
every = 5
"""
IMP = """
[[stages]]
name = "imp"
recipe = "imp"
rounds = 2
prune_fraction = 0.4
rewind = "5it"
"""
DEEPER = """
[[stages]]
name = "deeper"
recipe = "elastic"
ticket = "imp"
model.name = "cifar_resnet20"
"""
SHALLOWER = """
[[stages]]
name = "shallower"
recipe = "elastic"
ticket = "imp"
levels = [0, 2]
order = "interpolate"
model.name = "cifar_resnet8"
"""


def run(folder: Path, text: str, *overrides: str) -> Path:
    words = ["run", write_config(folder, text), "--root", str(folder), *overrides]
    assert run_command(words) == 0
    return folder / "tiny"


def assert_refused(
    mistake: Mistake, folder: Path, capsys: pytest.CaptureFixture[str], base: str = BASE
) -> None:
    """The run ends with one line that says what is wrong, before anything is written."""
    text, options, expected = mistake
    words = ["run", write_config(folder, base + text), "--root", str(folder), *options]
    assert run_command(words) == 2
    printed = capsys.readouterr()
    assert expected in printed.err, printed.err
    assert printed.err.count("\n") == 1
    assert not (folder / "tiny").exists()


def assert_refused_by_data(
    text: str, expected: str, folder: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    """The same for what only the data tell: the run is begun, and nothing of the stage."""
    words = ["run", write_config(folder, text), "--root", str(folder)]
    assert run_command(words) == 2
    printed = capsys.readouterr().err
    assert expected in printed
    assert printed.count("\n") == 1
    assert not (folder / "tiny" / stage).exists()


def assert_goes_on_with_two_ranks(text: str, folder: Path, *, step: int) -> None:
    """A run killed on both ranks at a step and run again is the uninterrupted one, bit for bit."""
    runs = []
    for name in ("whole", "killed"):
        root = folder / name
        root.mkdir()
        words = ["run", write_config(root, text), "--root", str(root)]
        if name == "killed":
            assert run_ranks(2, killed_run, words, "a step", step) == [KILLED] * 2
        assert tombola(*words, world_size=2) == [0, 0]
        runs.append(root / "tiny")
    assert_same_run(runs[1], runs[0])


def assert_same_masks_on_two_ranks(text: str, folder: Path, ticket: str, *words: str) -> None:
    """One rank and two end with the same masks."""
    digests = []
    for world_size in (1, 2):
        root = folder / str(world_size)
        root.mkdir()
        command = ["run", write_config(root, text), "--root", str(root), *words]
        assert tombola(*command, world_size=world_size) == [0] * world_size
        digests.append(Ticket.load(root / "tiny" / ticket).masks.digest())
    assert digests[0] == digests[1]
