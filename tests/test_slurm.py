"""Batch scripts as `tombola submit` writes them, on a real SLURM of two nodes."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from nodes import Nodes, nodes
from processes import tombola
from slurm import Slurm, needs_slurm
from test_cluster import LONGER, resumed, some_checkpoints
from test_parts import TREE
from tiny import assert_same_run, write_config
from waiting import seconds_until, wait_for

from pruning.store import open_store
from pruning.tickets import Ticket

pytestmark = [pytest.mark.cluster, needs_slurm]
__all__ = ["nodes"]


@pytest.fixture
def slurm(nodes: Nodes, tmp_path: Path) -> Iterator[Slurm]:
    """A SLURM for one test."""
    with Slurm(nodes, tmp_path) as started:
        yield started


def submitted(slurm: Slurm, text: str, *options: str) -> list[str]:
    """The ids of the jobs that `tombola submit` hands over, one a wave."""
    root = slurm.folder
    # No virtual environment is activated in a batch script: the setup line has to find one.
    setup = f"export PATH={Path(sys.executable).parent}:$PATH"
    words = [
        *(sys.executable, "-m", "launch", "submit", write_config(root, text), "--to", "slurm"),
        *("--nodes", "2", "--gpus-per-node", "0", "--cpus-per-node", "1", "--time", "00:30:00"),
        *("--root", str(root), "-o", str(root / "jobs"), "--setup", setup, *options),
    ]
    told = slurm.run(*words)
    return re.findall(r"^(\d+)$", told, re.MULTILINE)


def log_of(slurm: Slurm, job: str) -> str:
    """What a job wrote, in all its turns."""
    return "".join(path.read_text() for path in slurm.folder.glob(f"jobs/tiny/*-{job}*.log"))


def test_a_rendered_script_runs_to_its_end(slurm: Slurm, tmp_path: Path) -> None:
    """On two nodes: the same tickets as two ranks of one."""
    (job,) = submitted(slurm, LONGER)
    slurm.await_state(job, "COMPLETED")
    config = write_config(tmp_path, LONGER)
    assert tombola("run", config, "--root", str(tmp_path / "one"), world_size=2) == [0, 0]
    assert_same_run(tmp_path / "tiny", tmp_path / "one" / "tiny")
    assert "2 ranks on 2 hosts: node0 (1), node1 (1)" in log_of(slurm, job)


@pytest.mark.parametrize("how", ["requeue", "notice", "preemption"])
def test_a_job_that_must_go_saves_and_goes_on(how: str, slurm: Slurm, tmp_path: Path) -> None:
    """Requeued by hand, near its time limit, or for a job of a higher partition."""
    (job,) = submitted(slurm, LONGER)
    some_checkpoints(tmp_path)
    if how == "requeue":
        slurm.run("scontrol", "requeue", job)
    elif how == "notice":
        slurm.run("scancel", "--signal=USR1", "--batch", job)
    else:
        script = tmp_path / "high.sbatch"
        script.write_text("#!/bin/bash\nsleep 2\n")
        options = ["--partition=high", "--nodes=2", "--exclusive", f"--output={tmp_path}/high.log"]
        slurm.run("sbatch", *options, str(script))
    seconds = seconds_until(lambda: "interrupted: saved" in log_of(slurm, job), what="a save")
    print(f"{how}: saved after {seconds:.1f} s")
    step = int(re.findall(r"saved at step (\d+)", log_of(slurm, job))[0])
    slurm.await_state(job, "COMPLETED")
    assert resumed(log_of(slurm, job)) == [step]
    assert "turn 1" in log_of(slurm, job)
    assert "Traceback" not in log_of(slurm, job)


def test_the_time_limit_is_seen_coming(slurm: Slurm, tmp_path: Path) -> None:
    """The script's own signal, before a limit of one minute."""
    (job,) = submitted(slurm, LONGER.replace('"40ep"', '"400ep"'), "--grace", "40")
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    wait_for(lambda: "USR1: the ranks save" in log_of(slurm, job), what="a notice")
    wait_for(lambda: "turn 1" in log_of(slurm, job) or slurm.state_of(job) == "PENDING")
    assert "ended with 75" in log_of(slurm, job)


def test_a_cancelled_job_stays_cancelled_and_a_mistake_ends_one(
    slurm: Slurm, tmp_path: Path
) -> None:
    """What a cancelled job has saved is another's to go on with; a mistake is told once, with 2."""
    (job,) = submitted(slurm, LONGER)
    some_checkpoints(tmp_path)
    slurm.run("scancel", job)
    slurm.await_state(job, "CANCELLED")
    other = LONGER.replace("lr = 0.1", "lr = 0.2")
    (second,) = submitted(slurm, other)
    slurm.await_state(second, "FAILED")
    told = log_of(slurm, second)
    assert "ended with 2" in told
    assert told.count("belongs to another configuration: optimizer.lr is 0.1 there") == 1


def test_an_array_of_branches_fills_one_store(slurm: Slurm, tmp_path: Path) -> None:
    """Tickets first; then controls and elastic targets, side by side; and controls of these."""
    store = tmp_path / "store"
    options = ["--split", "stages", "controls", "--store", str(store), "--nodes", "1"]
    jobs = submitted(slurm, TREE, *options)
    assert len(jobs) == 3
    slurm.await_state(jobs[-1], "COMPLETED")
    logs = "".join(path.read_text() for path in tmp_path.glob("jobs/tiny/*.log"))
    config = write_config(tmp_path, TREE)
    assert tombola("run", config, "--root", str(tmp_path / "one")) == [0], logs
    places = (tmp_path / "one" / "tiny").glob("*/*/ticket.json")
    expected = {Ticket.load(path).id for path in places}
    assert {ticket.id for ticket in open_store(str(store)).all()} == expected
    assert {path.parent.name for path in tmp_path.glob("tiny/*/*/ticket.json")} == {
        path.parent.name for path in (tmp_path / "one" / "tiny").glob("*/*/ticket.json")
    }
    assert os.listdir(tmp_path / "tiny").count("metrics.jsonl") == 0
