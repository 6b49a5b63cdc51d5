"""Two nodes on one machine, as the tests of clusters use them."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.bench import nodes as two
from launch.bench.nodes import ip, why_no_nodes

_PORT = 29400

needs_nodes = pytest.mark.skipif(why_no_nodes() is not None, reason=str(why_no_nodes()))


class Nodes(two.Nodes):
    """Nodes that run `tombola launch`, and a link that can be cut."""

    def launch(
        self, index: int, *words: str, nodes: str = "2", **environment: str
    ) -> subprocess.Popen[str]:
        """Starts `tombola launch` on a node, one rank on each."""
        return self.start(
            index,
            *(sys.executable, "-m", "launch", "launch", "--nnodes", nodes),
            *("--nproc-per-node", "1", "--rdzv-endpoint", f"{self.address(0)}:{_PORT}"),
            *words,
            **environment,
        )

    def ranks(self, index: int) -> list[int]:
        """The processes of the ranks on a node: the children of its agent."""
        found = []
        for pid in self.pids(index):
            try:
                environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError):  # it has ended
                continue
            if any(entry.startswith(b"LOCAL_RANK=") for entry in environ):
                found.append(pid)
        return found

    def num_sent(self, index: int) -> int:
        """The bytes that a node has sent over the link."""
        told = subprocess.run(
            ["ip", "-n", self.names[index], "-s", "-j", "link", "show", "v0"],
            capture_output=True,
            check=True,
        )
        return int(json.loads(told.stdout)[0]["stats64"]["tx"]["bytes"])

    def cut(self) -> None:
        """Takes the link away; the nodes hear nothing any more, not even that it is gone."""
        ip("-n", self.names[1], "link", "set", "v0", "down")

    def heal(self) -> None:
        """Brings the link back."""
        ip("-n", self.names[1], "link", "set", "v0", "up")


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    """Two nodes for one test."""
    with Nodes(tmp_path) as made:
        yield made
