"""A run of IMP on digits that takes a second: what the tests of whole runs start from."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pruning.tickets import Ticket
from train.safe_dcp import read_tensors

TOML = """
name = "tiny"
seed = 3
[data]
batch_size = 96
[model]
name = "cifar_resnet8"
width = 4
[train]
total = "3ep"
evaluate = "13it"
[optimizer]
lr = 0.1
[schedule]
name = "linear"
[checkpoint]
every = "8it"
[log]
every = 5
[[stages]]
name = "imp"
recipe = "imp"
rounds = 2
prune_fraction = 0.4
rewind = "5it"
controls = ["random"]
"""


def write_config(folder: Path, text: str = TOML) -> str:
    """Writes the configuration and returns its path."""
    path = folder / "tiny.toml"
    path.write_text(text)
    return str(path)


def facts(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the machine and the hour."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "timing"} for line in lines]


def ticket_facts(run: Path) -> dict[str, dict[str, Any]]:
    """Every ticket.json by its folder, without timing."""
    found = {}
    for path in sorted(run.glob("*/*/ticket.json")):
        document = Ticket.load(path).summary()
        document.pop("timing")
        found[str(path.parent.relative_to(run))] = document
    return found


def final_states(run: Path) -> dict[str, dict[str, Tensor]]:
    """All tensors of the last checkpoint of every level."""
    found = {}
    for folder in sorted(run.glob("*/*/checkpoints")):
        last = sorted(folder.glob("step-*/manifest.json"))[-1].parent
        found[str(folder.relative_to(run))] = read_tensors(str(last), is_local=True)
    return found


def assert_same_run(run: Path, reference: Path) -> None:
    """Weights, optimizer, masks, random states and metrics are equal, bit for bit."""
    assert facts(run) == facts(reference)
    assert ticket_facts(run) == ticket_facts(reference)
    states, expected = final_states(run), final_states(reference)
    assert states.keys() == expected.keys()
    for level, tensors in expected.items():
        assert states[level].keys() == tensors.keys()
        different = [n for n, value in tensors.items() if not torch.equal(states[level][n], value)]
        assert not different, (level, different[:3])
