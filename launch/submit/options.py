"""The words after `tombola submit`."""

import re
from dataclasses import dataclass, fields
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from data.errors import UserError

Target = Literal["slurm", "kubernetes", "skypilot"]
Split = Literal["seeds", "stages", "controls"]
_BELONG: dict[str, tuple[Target, ...]] = {
    "time": ("slurm",),
    "partition": ("slurm",),
    "account": ("slurm",),
    "qos": ("slurm",),
    "cpus_per_node": ("slurm",),
    "setup": ("slurm", "skypilot"),
    "image": ("kubernetes", "skypilot"),
    "namespace": ("kubernetes",),
    "data_claim": ("kubernetes",),
    "runs_claim": ("kubernetes",),
    "accelerator": ("skypilot",),
    "cloud": ("skypilot",),
    "spot": ("skypilot",),
}
"""options that only some targets understand"""
_WORTH_IT = 300
"""seconds of a job's time in which it starts and gets something done"""


@dataclass(frozen=True)
class Submit:
    """What is to be started, and how."""

    config: Annotated[Positional[str], tyro.conf.arg(metavar="CONFIG")]
    """a TOML file"""
    to: Target
    """slurm: batch scripts; kubernetes: JobSets; skypilot: managed jobs on any cloud"""
    nodes: int = 1
    """machines of each job"""
    gpus_per_node: int = 8
    """0: one process a node, on its CPU"""
    split: tuple[Split, ...] = ()
    """what becomes jobs of their own: seeds, stages that do not need each other, controls; without
    it one job does all"""
    root: str = "runs"
    """folder or URL that holds the runs, as the nodes see it"""
    store: str | None = None
    """folder or URL of a ticket store, into which each job copies its run's tickets at its end"""
    grace: int = 300
    """seconds from the notice to the end of a job: longer than a step and a checkpoint take"""
    time: str = "24:00:00"
    """slurm: of a turn, HH:MM:SS or D-HH:MM:SS; what is not done by then goes on in another"""
    partition: str | None = None
    """slurm"""
    account: str | None = None
    """slurm"""
    qos: str | None = None
    """slurm"""
    cpus_per_node: int | None = None
    """slurm: cores of each node; without it nodes are taken whole"""
    setup: str | None = None
    """slurm, skypilot: a line of shell that comes first, such as 'source venv/bin/activate'"""
    image: str | None = None
    """kubernetes, skypilot: the container image (Dockerfile builds it)"""
    namespace: str = "default"
    """kubernetes"""
    data_claim: str | None = None
    """kubernetes: the volume claim that is mounted at /datasets, read-only"""
    runs_claim: str | None = None
    """kubernetes: the volume claim that is mounted at /runs; give --root /runs"""
    accelerator: str = "H100"
    """skypilot: the kind of GPU"""
    cloud: str | None = None
    """skypilot: aws, gcp, lambda/us-east-1 ... ; without it the cheapest that has them"""
    spot: bool = True
    """skypilot: machines that may be taken away at any time, for less"""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "jobs"
    """folder for the files, which lie in OUTPUT/NAME"""
    dry_run: bool = False
    """write the files, and hand nothing over"""

    def check(self) -> None:
        """Raises `UserError` for what cannot be, or belongs to another target."""
        for field in fields(self):
            given = getattr(self, field.name) != field.default
            targets = _BELONG.get(field.name, (self.to,))
            option = f"--{field.name.replace('_', '-')}"
            if given and self.to not in targets:
                raise UserError(f"{option}: is for --to {' or '.join(targets)}, not {self.to}")
        for name, least in (("nodes", 1), ("gpus_per_node", 0), ("grace", 10)):
            value = getattr(self, name)
            if value < least:
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option} {value}: must be at least {least}")
        if self.cpus_per_node is not None and self.cpus_per_node < 1:
            raise UserError(f"--cpus-per-node {self.cpus_per_node}: must be at least 1")
        if re.fullmatch(r"(\d+-)?\d+(:\d\d){1,2}", self.time) is None:
            raise UserError(f"--time {self.time}: must be HH:MM:SS or D-HH:MM:SS")
        if self.to == "slurm" and _seconds(self.time) < self.grace + _WORTH_IT:
            raise UserError(
                f"--time {self.time}: must be --grace {self.grace} and at least {_WORTH_IT} s "
                "more, or each turn of the job is told to save before it has done a step"
            )
        if self.to == "kubernetes" and self.image is None:
            raise UserError("--to kubernetes needs --image: build one from the Dockerfile")

    @property
    def run_words(self) -> tuple[str, ...]:
        """What every `tombola run` is told besides its configuration."""
        stored = () if self.store is None else ("--store", self.store)
        return ("--root", self.root, *stored)

    @property
    def num_processes(self) -> int:
        """The ranks of each node."""
        return max(1, self.gpus_per_node)


def _seconds(time: str) -> int:
    """A time as SLURM reads it: MM:SS, HH:MM:SS, D-HH:MM or D-HH:MM:SS."""
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if len(parts) == 2:
        parts = [*parts, 0] if days else [0, *parts]
    hours, minutes, seconds = parts
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
