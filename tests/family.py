"""Runs of networks of one family that take a second a stage: what elastic tickets start from."""

from pathlib import Path

from tiny import write_config

from launch.cli import run_command

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
