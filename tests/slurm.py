"""A real SLURM of two nodes on this machine: one controller, two slurmd, in network namespaces."""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
from nodes import Nodes, why_no_nodes
from waiting import PATIENCE, seconds_until, wait_for

_TOOLS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged")
_LOW = "PriorityTier=1 PreemptMode=REQUEUE GraceTime=20"
_CONF = """
ClusterName=tombola
SlurmctldHost=node0({address0})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={state}/munge.sock
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=5
ReturnToService=2
JobRequeue=1
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldTimeout=30
SlurmdTimeout=30
MessageTimeout=20
StateSaveLocation={state}/saved
SlurmdSpoolDir={state}/spool.%n
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/slurmd.%n.pid
SlurmctldLogFile={state}/slurmctld.log
SlurmdLogFile={state}/slurmd.%n.log
NodeName=node0 NodeAddr={address0} CPUs=2 RealMemory=4000 State=UNKNOWN
NodeName=node1 NodeAddr={address1} CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=60 State=UP {low}
PartitionName=high Nodes=ALL MaxTime=60 State=UP PriorityTier=10
"""


def why_no_slurm() -> str | None:
    """Why this machine cannot have a SLURM of its own; `None` where it can."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    return why_no_nodes() or (f"not installed: {', '.join(missing)}" if missing else None)


needs_slurm = pytest.mark.skipif(why_no_slurm() is not None, reason=str(why_no_slurm()))


class Slurm:
    """SLURM on two nodes; its commands are given on the first."""

    def __init__(self, nodes: Nodes, folder: Path) -> None:
        self.nodes, self.folder = nodes, folder
        # Of its own: the paths of sockets, with which SLURM speaks, have 108 letters at most.
        self.state = Path(tempfile.mkdtemp(prefix="slurm-"))
        self._munged: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        for name in ("saved", "spool.node0", "spool.node1"):
            (self.state / name).mkdir(parents=True)
        addresses = {f"address{index}": self.nodes.address(index) for index in range(2)}
        (self.state / "slurm.conf").write_text(
            _CONF.format(state=self.state, low=_LOW, **addresses)
        )
        key = self.state / "munge.key"
        key.write_bytes(os.urandom(64))
        key.chmod(0o400)
        self._munged = subprocess.Popen(
            [
                *("munged", "--foreground", "--force", f"--key-file={key}", "--num-threads=2"),
                f"--socket={self.state}/munge.sock",
                f"--pid-file={self.state}/munged.pid",
                f"--log-file={self.state}/munged.log",
                f"--seed-file={self.state}/munge.seed",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for((self.state / "munge.sock").exists, what="munge")
        self.nodes.start(0, "slurmctld", "-D", "-c", **self.environment)
        for index in range(2):
            self.start_node(index)
        wait_for(self._is_ready, what="both nodes idle")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._munged is not None
        for index in range(2):
            self.nodes.kill(index)
        self._munged.terminate()
        self._munged.wait(PATIENCE)
        shutil.rmtree(self.state, ignore_errors=True)

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.state / "slurm.conf")}

    def start_node(self, index: int) -> None:
        """Starts what runs jobs on a node."""
        self.nodes.start(index, "slurmd", "-D", "-N", f"node{index}", **self.environment)

    def run(self, *words: str) -> str:
        """What a command of SLURM says; fails where it fails."""
        done = self._done(*words)
        assert not done.returncode, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def _done(self, *words: str) -> subprocess.CompletedProcess[str]:
        inside = ["nsenter", f"--net=/run/netns/{self.nodes.names[0]}"]
        environment = os.environ | self.environment | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*inside, *words], env=environment, capture_output=True, text=True, timeout=PATIENCE
        )

    def state_of(self, job: str) -> str:
        """What SLURM says of a job: PENDING, RUNNING, COMPLETED ..., of all tasks of an array."""
        told = self.run("scontrol", "show", "job", job)
        return " ".join(sorted(set(re.findall(r"JobState=(\w+)", told))))

    def await_state(self, job: str, state: str) -> float:
        """Waits until a job is in a state; the seconds that it took."""

        def is_there() -> bool:
            now = self.state_of(job)
            if now == "PENDING" and state != "PENDING":  # requeued jobs wait two minutes, else
                # It may have begun in between, and then there is nothing to shorten.
                self._done("scontrol", "update", f"JobId={job}", "StartTime=now")
            return now == state

        return seconds_until(is_there, what=f"job {job} {state}")

    def _is_ready(self) -> bool:
        return self.run("sinfo", "-h", "-N", "-o", "%N %t", "-p", "low").count("idle") == 2
