"""Two nodes, joined by a link that may break: runs go on from what they saved, and nothing hangs.

Recovery times are printed (`pytest -s`), and never asserted.
"""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from nodes import Nodes, needs_nodes, nodes
from processes import tombola
from tiny import TOML, assert_same_run, final_states, write_config
from waiting import PATIENCE, seconds_until, wait_for

pytestmark = [pytest.mark.cluster, needs_nodes]
__all__ = ["nodes"]

LONGER = TOML.replace("rounds = 2", "rounds = 0").replace('total = "3ep"', 'total = "40ep"')
TIMEOUT = ["--train.timeout", "10"]
"""seconds after which a silent link is given up"""


def committed(root: Path) -> list[int]:
    """The steps of all whole checkpoints of a run's dense training."""
    found = root.glob("tiny/imp/level-00/checkpoints/step-*/manifest.json")
    return sorted(int(path.parent.name[5:]) for path in found)


def resumed(text: str) -> list[int]:
    """The steps at which the dense training went on."""
    return [int(step) for step in re.findall(r"imp/level-00: goes on at step (\d+)", text)]


def some_checkpoints(root: Path) -> int:
    """Waits for two whole checkpoints; the step of the newest."""
    wait_for(lambda: len(committed(root)) > 1, what="two checkpoints")
    return committed(root)[-1]


def test_two_nodes_find_the_tickets_of_one_node_with_two_ranks(
    nodes: Nodes, tmp_path: Path
) -> None:
    """The same ids, bits and metrics."""
    config = write_config(tmp_path)
    run = ["run", config, "--root"]
    assert tombola(*run, str(tmp_path / "one"), world_size=2) == [0, 0]
    agents = [nodes.launch(index, *run, str(tmp_path / "two")) for index in range(2)]
    assert [agent.wait(PATIENCE) for agent in agents] == [0, 0], nodes.output(0) + nodes.output(1)
    assert_same_run(tmp_path / "two" / "tiny", tmp_path / "one" / "tiny")
    assert not nodes.output(1), "only rank 0 speaks of what goes well"
    where = "2 ranks on 2 hosts: node0 (1), node1 (1); global batch 96, at most 48 a rank"
    assert nodes.output(0).startswith(where)


def test_packed_gradients_over_a_slow_link_change_no_bit(nodes: Nodes, tmp_path: Path) -> None:
    """At 100 Mbit/s, an IMP level at 5 % of the weights, summed with and without what is pruned.

    The bytes on the link are counted: nearly all of that level's gradients are saved.
    """
    nodes.shape(100)
    text = TOML.replace("rounds = 2", "rounds = 1").replace("fraction = 0.4", "fraction = 0.95")
    config = write_config(tmp_path, text.replace('["random"]', "[]").replace("= 4", "= 32", 1))
    states, sent = [], []
    for share in ("0", "0.4"):
        before = nodes.num_sent(1)
        words = ["run", config, "--root", str(tmp_path), "--name", share]
        agents = [nodes.launch(index, *words, "--train.pack-below", share) for index in range(2)]
        assert [agent.wait(PATIENCE) for agent in agents] == [0, 0], nodes.output(0)
        states.append(final_states(tmp_path / share))
        sent.append(nodes.num_sent(1) - before)
    assert states[0].keys() == states[1].keys()
    for level, tensors in states[0].items():
        assert all(torch.equal(value, states[1][level][name]) for name, value in tensors.items())
    gradients = 4 * sum(
        value.numel()
        for name, value in states[0]["imp/level-01/checkpoints"].items()
        if name.startswith("optimizer/state/")
    )
    steps = 34  # of level 1
    assert sent[0] > 2 * steps * gradients
    assert 0.8 * steps * gradients < sent[0] - sent[1] < steps * gradients


def test_a_killed_rank_is_started_again(nodes: Nodes, tmp_path: Path) -> None:
    """All ranks go on from the last checkpoint, and end where an undisturbed run does."""
    run = ["run", write_config(tmp_path, LONGER), "--root"]
    agents = [nodes.launch(index, *run, str(tmp_path)) for index in range(2)]
    saved = some_checkpoints(tmp_path)
    os.kill(nodes.ranks(1)[0], signal.SIGKILL)
    seconds = seconds_until(lambda: resumed(nodes.output(0)), what="a resume")
    print(f"a rank killed: training went on after {seconds:.1f} s")
    assert resumed(nodes.output(0))[0] >= saved
    assert [agent.wait(PATIENCE) for agent in agents] == [0, 0], nodes.output(0) + nodes.output(1)
    told = nodes.output(0) + nodes.output(1)
    assert told.count("was killed by SIGKILL") == 1
    assert told.count("another rank is gone") <= 1  # none where its agent ended it before
    assert "Traceback" not in told
    assert tombola(*run, str(tmp_path / "one"), world_size=2) == [0, 0]
    assert_same_run(tmp_path / "tiny", tmp_path / "one" / "tiny")


@pytest.mark.parametrize("lost", ["node", "agent"])
def test_a_lost_node_is_gone_without_and_taken_back(
    lost: str, nodes: Nodes, tmp_path: Path
) -> None:
    """With --nnodes 1:2 the other goes on alone, from the last checkpoint, in the same batches.

    A node whose agent alone is killed is lost as well: its ranks do not outlive it.
    """
    long = LONGER.replace('"40ep"', '"400ep"')
    run = ["run", write_config(tmp_path, long), "--root", str(tmp_path)]
    first = nodes.launch(0, *run, nodes="1:2")
    second = nodes.launch(1, *run, nodes="1:2")
    saved = some_checkpoints(tmp_path)
    if lost == "agent":
        second.kill()
        wait_for(lambda: not nodes.ranks(1), what="the end of its rank")
    else:
        nodes.kill(1)
    seconds = seconds_until(lambda: resumed(nodes.output(0)), what="a resume alone")
    print(f"{lost} lost: training went on without it after {seconds:.1f} s")
    assert resumed(nodes.output(0))[0] >= saved
    alone = "1 rank, 2 before: global batch, schedule and order of the samples stay; each rank"
    assert f"{alone} accumulates parts of 48 images" in nodes.output(0)
    back = nodes.launch(1, *run, nodes="1:2")
    seconds = seconds_until(lambda: len(resumed(nodes.output(0))) > 1, what="a resume of both")
    print(f"{lost} back: training went on with it {seconds:.1f} s after its start")
    first.terminate()
    assert [agent.wait(PATIENCE) for agent in (first, back)] == [75, 75], nodes.output(0)


def test_a_link_that_is_cut_for_a_moment_is_not_noticed(nodes: Nodes, tmp_path: Path) -> None:
    """The ranks wait, and go on where they were."""
    run = ["run", write_config(tmp_path, LONGER), "--root", str(tmp_path)]
    agents = [nodes.launch(index, *run) for index in range(2)]
    some_checkpoints(tmp_path)
    nodes.cut()
    time.sleep(3)
    nodes.heal()
    assert [agent.wait(PATIENCE) for agent in agents] == [0, 0], nodes.output(0) + nodes.output(1)
    assert not resumed(nodes.output(0))


def test_a_link_that_stays_cut_ends_the_run_within_its_timeout(
    nodes: Nodes, tmp_path: Path
) -> None:
    """With a fixed number of nodes; when it is back, the same commands go on."""
    run = ["run", write_config(tmp_path, LONGER), "--root", str(tmp_path), *TIMEOUT]
    run = ["--rdzv-conf", "join_timeout=20,read_timeout=15", *run]
    agents = [nodes.launch(index, *run) for index in range(2)]
    saved = some_checkpoints(tmp_path)
    nodes.cut()
    seconds = seconds_until(
        lambda: all(a.poll() is not None for a in agents), what="the end of both", seconds=300
    )
    print(f"a link cut for good, timeouts of 10 to 20 s: both nodes ended after {seconds:.1f} s")
    told = nodes.output(0) + nodes.output(1)
    assert [agent.returncode for agent in agents] == [1, 1], told
    assert told.count("the nodes are not together") == 2
    assert "Traceback" not in told, told
    nodes.heal()
    agents = [nodes.launch(index, *run) for index in range(2)]
    assert [agent.wait(PATIENCE) for agent in agents] == [0, 0], nodes.output(0) + nodes.output(1)
    assert resumed(nodes.output(0))[0] >= saved


def test_a_link_that_stays_cut_leaves_one_node_to_go_on(nodes: Nodes, tmp_path: Path) -> None:
    """With --nnodes 1:2: the one that hosts the rendezvous; the other ends."""
    run = ["run", write_config(tmp_path, LONGER), "--root", str(tmp_path), *TIMEOUT]
    run = ["--rdzv-conf", "read_timeout=15", *run]
    agents = [nodes.launch(index, *run, nodes="1:2") for index in range(2)]
    saved = some_checkpoints(tmp_path)
    nodes.cut()
    seconds = seconds_until(lambda: resumed(nodes.output(0)), what="a resume alone")
    print(f"a link cut for good: one node went on after {seconds:.1f} s")
    assert resumed(nodes.output(0))[0] >= saved
    assert agents[0].wait(PATIENCE) == 0, nodes.output(0)
    assert agents[1].wait(PATIENCE) == 1, nodes.output(1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_node_stops_both_with_the_state_saved(
    number: signal.Signals, nodes: Nodes, tmp_path: Path
) -> None:
    """Both end with 75, at the same step; the same commands go on, bit for bit."""
    run = ["run", write_config(tmp_path, LONGER), "--root"]
    agents = [nodes.launch(index, *run, str(tmp_path)) for index in range(2)]
    some_checkpoints(tmp_path)
    agents[1].send_signal(number)
    assert [agent.wait(PATIENCE) for agent in agents] == [75, 75], nodes.output(0) + nodes.output(1)
    told = nodes.output(0)
    step = int(re.findall(r"interrupted: saved at step (\d+)", told)[0])
    assert told.count("interrupted:") == 1
    agents = [nodes.launch(index, *run, str(tmp_path)) for index in range(2)]
    assert [agent.wait(PATIENCE) for agent in agents] == [0, 0], nodes.output(0) + nodes.output(1)
    assert resumed(nodes.output(0)) == [step]
    assert tombola(*run, str(tmp_path / "one"), world_size=2) == [0, 0]
    assert_same_run(tmp_path / "tiny", tmp_path / "one" / "tiny")


def test_the_users_mistake_is_told_once_a_node_and_not_tried_again(
    nodes: Nodes, tmp_path: Path
) -> None:
    """Exit code 2 on both nodes."""
    run = ["run", write_config(tmp_path), "--root", str(tmp_path), "--train.totl", "3ep"]
    agents = [nodes.launch(index, *run) for index in range(2)]
    assert [agent.wait(PATIENCE) for agent in agents] == [2, 2]
    mistake = "error: command line: unknown key 'train.totl'; did you mean 'train.total'?\n"
    assert nodes.output(0) == mistake
    assert nodes.output(1) == f"[rank 1, node1] {mistake}"
