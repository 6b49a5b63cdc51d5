"""Work in other processes that survives the death of one of them.

A decoder may crash on a malformed file, and take its process with it. Here the task at which a
worker died is known, another worker takes its place, and the rest goes on.
"""

import contextlib
import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

# Forking a process that runs CUDA or other threads may hang: a server forks for us.
_CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Crashed:
    """The worker died at this task: `exit_code` as of `Process`, negative for a signal."""

    exit_code: int

    def __str__(self) -> str:
        if self.exit_code < 0:
            return f"killed by {signal.Signals(-self.exit_code).name}"
        return f"exit code {self.exit_code}"


def num_cpus() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def in_workers(
    function: Callable[[T], R], tasks: Sequence[T], *, num_workers: int | None = None
) -> Iterator[tuple[int, R | Crashed]]:
    """`(index, function(tasks[index]))` of every task, in the order in which they end.

    `function` is found by its name, in a module. What it raises is raised here. However the
    iteration ends, no worker outlives it.
    """
    limit = num_cpus() if num_workers is None else num_workers
    waiting = iter(range(len(tasks)))
    busy: dict[Connection, _Worker] = {}
    try:
        for index in itertools.islice(waiting, limit):
            _give(_Worker.start(function), index, tasks, busy)
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                worker = busy.pop(connection)
                index, outcome, alive = worker.take()
                following = next(waiting, None)
                if following is not None:
                    successor = worker if alive else _Worker.start(function)
                    _give(successor, following, tasks, busy)
                else:
                    worker.end()
                yield index, outcome
    finally:
        for worker in busy.values():
            worker.end()


@dataclass
class _Worker:
    process: Any
    connection: Connection
    index: int = -1

    @classmethod
    def start(cls, function: Callable[[Any], Any]) -> "_Worker":
        ours, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(target=_serve, args=(theirs, function), daemon=True)
        process.start()
        theirs.close()  # so that the worker's death is the end of the pipe
        return cls(process, ours)

    def take(self) -> tuple[int, Any, bool]:
        """The task's index, what came of it, and whether the worker can go on."""
        try:
            failed, outcome = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return self.index, Crashed(int(self.process.exitcode)), False
        except BaseException:  # an answer that cannot be unpickled
            self.end()
            raise
        if failed:
            self.end()
            raise outcome
        return self.index, outcome, True

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


def _give(
    worker: _Worker, index: int, tasks: Sequence[Any], busy: dict[Connection, _Worker]
) -> None:
    worker.index = index
    busy[worker.connection] = worker
    # A worker that is dead already is noticed when its answer is waited for.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        worker.connection.send(tasks[index])


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while True:
        try:
            task = connection.recv()
        except (EOFError, ConnectionResetError):  # the parent is gone
            return
        try:
            outcome = (False, function(task))
        except Exception as error:
            outcome = (True, error)
        with contextlib.suppress(BrokenPipeError):
            connection.send(outcome)
