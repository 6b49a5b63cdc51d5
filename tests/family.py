"""Runs of networks of one family that take a second a stage: what elastic tickets start from."""

from pathlib import Path

import pytest
from tiny import write_config

from launch.cli import run_command

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
