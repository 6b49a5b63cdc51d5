"""Runs functions in fresh processes, as the ranks of a process group: quick, and safe to kill.

The processes come from a fork server that has imported torch and the project once.
"""

import itertools
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from waiting import PATIENCE

_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PORTS = itertools.cycle(range(10_000 + 1000 * _WORKER, 11_000 + 1000 * _WORKER))
"""of this process of pytest, below those that the kernel gives away"""
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["launch.run", "launch.cli", "sklearn.datasets", "matplotlib.figure"]
)


def free_port() -> int:
    """A port on which a server can listen.

    Not one that the kernel chooses: between its choice and its use it would give it to others.
    """
    for port in _PORTS:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("all ports are taken")


def run_ranks(world_size: int, target: Callable[..., None], *arguments: Any) -> list[int]:
    """Runs `target(*arguments)` on every rank; the exit codes, negative for a signal.

    When a rank fails, the others get five seconds to notice, and are ended then.
    """
    port = free_port()
    processes = [
        _CONTEXT.Process(target=_as_rank, args=(rank, world_size, port, target, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    limit = PATIENCE
    for _ in processes:
        for process in processes:
            process.join(limit / world_size)
        if any(process.exitcode not in (None, 0) for process in processes):
            limit = 5
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return [int(process.exitcode or 0) for process in processes]


def _as_rank(
    rank: int, world_size: int, port: int, target: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    import torch

    if world_size > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
    torch.set_num_threads(1)
    target(*arguments)


def command(words: list[str], output: str | None = None) -> None:
    """Runs a `tombola` command in this process, and ends it with the command's exit code."""
    from launch.cli import run_command

    if output is not None:
        file = open(f"{output}.{os.environ.get('RANK', '0')}", "w")  # noqa: SIM115
        sys.stdout = sys.stderr = file
    code = run_command(words)
    sys.stdout.flush()
    os._exit(code)


def tombola(*words: str, world_size: int = 1, output: Path | None = None) -> list[int]:
    """The exit codes of `tombola WORDS...` on that many ranks."""
    return run_ranks(world_size, command, list(words), None if output is None else str(output))
