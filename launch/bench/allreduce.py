"""`tombola bench allreduce`: gradients over a link, with those of pruned weights and without.

On one machine two nodes are made, in network namespaces, whose link is slowed down; under torchrun
(`torchrun ... -m launch bench allreduce`) the ranks' own links are measured as they are.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from data.errors import UserError
from launch.bench.gradients import measure_gradients
from launch.bench.measure import report
from launch.bench.nodes import Nodes, why_no_nodes
from pruning.tickets import Ticket
from train.safe_dcp import read_tensors

_LINKS = {"unshaped": None, "10 Gbit/s": 10_000.0, "1 Gbit/s": 1_000.0}
"""megabits a second"""
_LEVEL = """
[data]
source = "digits"
batch_size = 64
augment = false
[model]
name = "cifar_resnet18"
[train]
total = "40it"
evaluate = "40it"
[log]
every = 5
[[stages]]
name = "imp"
recipe = "imp"
rounds = 1
prune_fraction = 0.95
"""
"""a level at 5 % of a network of CIFAR's size, after one as short of the dense network"""


def bench_allreduce(*, as_json: bool) -> None:
    """ResNet-50's gradients in fp32 over links of several rates, and a level of IMP over 1 Gbit/s.

    The ratios are of times: of a step that does nothing but to sum gradients, plain and at several
    densities; and of the steps of a whole level at 5 %. Raises `UserError` where there can be no
    two nodes.
    """
    if "RANK" in os.environ:
        rank = int(os.environ["RANK"])
        result: dict[str, Any] = {"ranks": int(os.environ["WORLD_SIZE"]), **measure_gradients()}
        if rank == 0:
            report(result, as_json=as_json)
        return
    why = why_no_nodes()
    if why is not None:
        raise UserError(
            f"bench allreduce: {why}; to measure links that you have: torchrun --nnodes ... "
            "-m launch bench allreduce"
        )
    result = {}
    with tempfile.TemporaryDirectory() as folder, Nodes(Path(folder)) as nodes:
        for link, megabits in _LINKS.items():
            nodes.shape(megabits)
            result[link] = _measured(nodes)
        result["cifar_resnet18 on digits at 5 %, 1 Gbit/s"] = _level(nodes)
    report(result, as_json=as_json)


def _measured(nodes: Nodes) -> dict[str, Any]:
    """What a rank on each node measures."""
    output = nodes.folder / "gradients.json"
    nodes.run_ranks(sys.executable, "-m", "launch.bench.gradients", str(output))
    told: dict[str, Any] = json.loads(output.read_text())
    return told


def _level(nodes: Nodes) -> dict[str, Any]:
    """A level of IMP, with plain DDP and without what is pruned: the ratio of its times a step."""
    config = nodes.folder / "level.toml"
    config.write_text(_LEVEL)
    rates, states = {}, {}
    for name, share in (("plain DDP", "0"), ("packed", "0.4")):
        words = ("-m", "launch", "run", str(config), "--root", str(nodes.folder), "--name", name)
        nodes.run_ranks(sys.executable, *words, "--train.pack_below", share)
        level = nodes.folder / name / "imp/level-01"
        rates[name] = Ticket.load(level).timing["images_per_second"]
        (last,) = level.glob("checkpoints/step-*")
        states[name] = read_tensors(str(last), is_local=True)
    plain, packed = states.values()
    same = all(torch.equal(value, packed[key]) for key, value in plain.items())
    return {
        **{f"{name}, images/s": rate for name, rate in rates.items()},
        "of plain DDP": rates["plain DDP"] / rates["packed"],
        "weights": "equal, bit for bit" if same else "not equal",
    }
