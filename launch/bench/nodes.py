"""Two nodes on one machine: network namespaces with hostnames of their own, joined by one link."""

import os
import shutil
import signal
import subprocess
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from data.errors import RunError

_SUBNET = "10.77.0"
_PORT = "29500"


def why_no_nodes() -> str | None:
    """Why this machine cannot have two nodes; `None` where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    tools = ("bash", "ip", "nsenter", "tc", "unshare")
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    probe = f"tombola-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


class Nodes:
    """Two nodes, 0 and 1; the interface of each is `v0`, its address ends in 1 and 2."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = [f"tombola{os.getpid()}-{index}" for index in range(2)]
        self._files: list[IO[str]] = []
        self._started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        for name in self.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        first, second = self.names
        ip("link", "add", "v0", "netns", first, "type", "veth", "peer", "v0", "netns", second)
        for index, name in enumerate(self.names):
            ip("-n", name, "addr", "add", f"{self.address(index)}/24", "dev", "v0")
            ip("-n", name, "link", "set", "v0", "up")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for index, name in enumerate(self.names):
            self.kill(index)
            ip("netns", "del", name)
        for process in self._started:
            process.wait(10)
        for file in self._files:
            file.close()

    @staticmethod
    def address(index: int) -> str:
        return f"{_SUBNET}.{index + 1}"

    def start(self, index: int, *words: str, **environment: str) -> subprocess.Popen[str]:
        """Starts a command on a node; what it says goes to `output(index)`."""
        name = self.names[index]
        inside = ["nsenter", f"--net=/run/netns/{name}", "unshare", "--uts"]
        hostname = ["bash", "-c", 'hostname "$0"; exec "$@"', f"node{index}"]
        file = open(self.folder / f"node{index}.txt", "a")  # noqa: SIM115 - closed at the end
        self._files.append(file)
        process = subprocess.Popen(
            [*inside, *hostname, *words],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._started.append(process)
        return process

    def run_ranks(self, *words: str, **environment: str) -> None:
        """Runs a command as a rank on each node. Raises `RunError` with its last words."""
        shared = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        shared |= {"MASTER_ADDR": self.address(0), "MASTER_PORT": _PORT}
        ranks = [
            self.start(index, *words, RANK=str(index), **shared, **environment)
            for index in range(2)
        ]
        failed = [index for index, rank in enumerate(ranks) if rank.wait()]
        if failed:
            told = self.output(failed[0])[-2000:]
            raise RunError(f"{' '.join(words)} failed on node {failed[0]}:\n{told}")

    def output(self, index: int) -> str:
        """All that was said on a node."""
        return (self.folder / f"node{index}.txt").read_text()

    def kill(self, index: int) -> None:
        """Ends all that runs on a node at once, as a power cut does."""
        for pid in self.pids(index):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def shape(self, megabits: float | None) -> None:
        """Lets no more than so many megabits a second through, each way; `None`: what it can."""
        for name in self.names:
            device = ("dev", "v0", "root")
            _run("tc", "-n", name, "qdisc", "del", *device, check=False)
            if megabits is not None:
                # What may pass at once: a large link needs more, or it stays below its rate.
                burst = f"{max(0.5, megabits / 2500):g}mb"
                rate = ("rate", f"{megabits:g}mbit", "burst", burst, "latency", "40ms")
                _run("tc", "-n", name, "qdisc", "add", *device, "tbf", *rate)

    def pids(self, index: int) -> list[int]:
        """The processes in a node's namespace, all of which were started here."""
        command = ["ip", "netns", "pids", self.names[index]]
        told = subprocess.run(command, capture_output=True, text=True, check=True)
        return [int(word) for word in told.stdout.split()]


def ip(*words: str) -> None:
    """Runs `ip WORDS...`. Raises where it fails."""
    _run("ip", *words)


def _run(*words: str, check: bool = True) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if check and done.returncode:
        raise RunError(f"{' '.join(words)}: {done.stderr.strip()}")
