"""Work in other processes: all of it is done, whatever dies on the way, and nobody is left."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data.workers import Crashed, in_workers, num_cpus


def square(number: int) -> int:
    """A task."""
    return number * number


def die_at_seven(number: int) -> int:
    """A task that takes its process with it, if it is the seventh."""
    if number == 7:
        os.kill(os.getpid(), signal.SIGSEGV)
    return number


def leave_at(number: int) -> int:
    """A task that ends its process with an exit code of its own."""
    if number:
        os._exit(number)
    return number


def sign_in(folder: str) -> int:
    """A task that leaves a file named by its process."""
    (Path(folder) / str(os.getpid())).touch()
    return os.getpid()


def sign_in_and_wait(task: tuple[str, float]) -> int:
    """The same, and then it takes its time."""
    pid = sign_in(task[0])
    time.sleep(task[1])
    return pid


def fail_at_three(task: tuple[str, int]) -> int:
    """A task that fails, if it is the third."""
    sign_in(task[0])
    if task[1] == 3:
        raise ValueError("the third")
    return task[1]


class OddError(Exception):
    """An error that pickle cannot build again."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


def fail_oddly(folder: str) -> None:
    """A task whose error does not arrive."""
    sign_in(folder)
    raise OddError("one", "two")


def assert_nobody_is_left(folder: Path | None = None) -> None:
    """No process of those that were started runs, now or in a moment."""
    assert multiprocessing.active_children() == []
    if folder is not None:
        pids = [int(name) for name in os.listdir(folder)]
        assert pids
        for _ in range(200):  # the fork server buries its children a little later
            if not any(Path(f"/proc/{pid}").exists() for pid in pids):
                return
            time.sleep(0.05)
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.fixture(autouse=True)
def nobody_afterwards() -> Iterator[None]:
    """A test that fails leaves no process to the next one."""
    yield
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


@pytest.mark.parametrize(
    ("num_tasks", "num_workers"), [(0, 2), (1, 2), (2, 2), (3, 2), (20, 3), (5, 1), (4, None)]
)
def test_every_task_is_done_once(num_tasks: int, num_workers: int | None) -> None:
    """With its own result, whether there are fewer tasks than workers or many more."""
    found = list(in_workers(square, range(num_tasks), num_workers=num_workers))
    assert sorted(found) == [(index, index * index) for index in range(num_tasks)]
    assert_nobody_is_left()


def test_the_results_come_as_they_are_ready(tmp_path: Path) -> None:
    """A long task holds nobody up: the other worker does all the rest meanwhile."""
    tasks = [(str(tmp_path), 2.0 if index == 0 else 0.0) for index in range(6)]
    order = [index for index, _ in in_workers(sign_in_and_wait, tasks, num_workers=2)]
    assert order == [1, 2, 3, 4, 5, 0]


def test_a_worker_serves_many_tasks(tmp_path: Path) -> None:
    """No more processes are started than asked for, and none of them is this one."""
    found = dict(in_workers(sign_in, [str(tmp_path)] * 12, num_workers=2))
    assert len(found) == 12
    assert 1 <= len(set(found.values())) <= 2
    assert os.getpid() not in found.values()


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_a_task_that_crashes_is_known_and_the_rest_goes_on(num_workers: int) -> None:
    """By the signal that its process died of."""
    found = dict(in_workers(die_at_seven, range(10), num_workers=num_workers))
    assert found.pop(7) == Crashed(-signal.SIGSEGV)
    assert found == {index: index for index in range(10) if index != 7}
    assert_nobody_is_left()


def test_every_task_may_crash() -> None:
    """With an exit code of its own each; none of them hangs."""
    codes = [3, 4, 0, 5, 6, 7]
    found = dict(in_workers(leave_at, codes, num_workers=2))
    assert found == {i: Crashed(code) if code else 0 for i, code in enumerate(codes)}
    assert_nobody_is_left()


def test_a_crash_is_told_in_words() -> None:
    """The signal by its name."""
    assert str(Crashed(-9)) == "killed by SIGKILL"
    assert str(Crashed(-11)) == "killed by SIGSEGV"
    assert str(Crashed(3)) == "exit code 3"


def test_an_exception_is_raised_here_and_ends_the_workers(tmp_path: Path) -> None:
    """Of the type and with the message that it has there."""
    tasks = [(str(tmp_path), number) for number in range(8)]
    with pytest.raises(ValueError, match=r"^the third$"):
        list(in_workers(fail_at_three, tasks, num_workers=2))
    assert_nobody_is_left(tmp_path)


def test_an_exception_that_cannot_be_passed_on_ends_the_workers_too(tmp_path: Path) -> None:
    """Some error is raised, and nobody outlives it."""
    with pytest.raises(Exception, match=r"missing 1 required positional argument|one two"):
        list(in_workers(fail_oddly, [str(tmp_path)] * 3, num_workers=2))
    assert_nobody_is_left(tmp_path)


def test_leaving_the_iteration_ends_the_workers(tmp_path: Path) -> None:
    """Though they are in the middle of a task, or wait for one."""
    tasks = [(str(tmp_path), 0.0), *[(str(tmp_path), 600.0)] * 3]
    results = in_workers(sign_in_and_wait, tasks, num_workers=3)
    for index, _ in results:
        assert index == 0
        break
    assert isinstance(results, Iterator)
    results.close()  # type: ignore[attr-defined]
    assert_nobody_is_left(tmp_path)


def test_an_error_of_the_one_who_iterates_ends_the_workers(tmp_path: Path) -> None:
    """Ctrl-C among them."""

    def consume(results: Iterator[Any]) -> None:
        for _ in results:
            raise KeyboardInterrupt

    results = in_workers(
        sign_in_and_wait, [(str(tmp_path), 0.0)] * 2 + [(str(tmp_path), 600.0)] * 2
    )
    with pytest.raises(KeyboardInterrupt):
        consume(results)
    del results
    assert_nobody_is_left(tmp_path)


def test_the_cpus_are_those_that_this_process_may_use() -> None:
    """And not all that the machine has."""
    if sys.platform == "linux":
        assert num_cpus() == len(os.sched_getaffinity(0))
    assert num_cpus() >= 1
