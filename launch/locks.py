"""Locks in a run's folder: what one process does, no other does at the same time.

They hold on a local disk and on shared file systems that know `flock`. On an object store, and on a
file system without locks (Lustre without `-o flock`, some NFS), nothing keeps others out.
"""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from typing import IO

from data.errors import UserError
from data.files import Folder

LONG = 60.0
"""seconds: more than a process takes to die, or to write what it holds the folder's lock for"""
_SHORT = 1.0
"""seconds: more than `busy_stages` holds the lock of a unit"""
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
_UNIT = ".lock-"


@contextlib.contextmanager
def unit_lock(folder: Folder, unit: str) -> Iterator[bool]:
    """A context in which no other process does this unit of a run, `STAGE.WHAT`.

    Gives whether it is so: not where nothing locks. Raises `UserError` where another process is at
    it. A process that was started anew waits for a while: it may meet its dying self.
    """
    restarts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    is_anew = any(os.environ.get(name, "0") != "0" for name in restarts)
    with _locked(folder, _UNIT + unit, patience=LONG if is_anew else _SHORT) as is_locked:
        yield is_locked


@contextlib.contextmanager
def folder_lock(folder: Folder) -> Iterator[None]:
    """A context for changing what all processes of a run share; raises as `unit_lock` does."""
    with _locked(folder, ".lock", patience=LONG):
        yield


def busy_stages(folder: Folder, own: Sequence[str]) -> set[str]:
    """The stages that other processes are at just now; `own` are the units of this one."""
    if folder.local_path is None:
        return set()
    units = [name.removeprefix(_UNIT) for name in folder.names() if name.startswith(_UNIT)]
    others = [unit for unit in units if unit not in own]
    return {unit.partition(".")[0] for unit in others if _is_held(folder, unit)}


@contextlib.contextmanager
def _locked(folder: Folder, name: str, *, patience: float) -> Iterator[bool]:
    if folder.local_path is None:
        yield False
        return
    folder.local_path.mkdir(parents=True, exist_ok=True)
    with open(folder.local_path / name, "a") as file:
        until = time.monotonic() + patience
        while (taken := _take(file)) is False:
            if time.monotonic() >= until:
                raise UserError(
                    f"{folder}: another process is running in this folder{_doing(name)}; wait for "
                    "it, or choose another --name"
                )
            time.sleep(0.2)
        yield taken is True


def _doing(name: str) -> str:
    """What a process does that holds the lock of this name."""
    stage, _, what = name.removeprefix(_UNIT).partition(".")
    return f", at {stage}:{what}" if name.startswith(_UNIT) else ""


def _is_held(folder: Folder, unit: str) -> bool:
    assert folder.local_path is not None
    with open(folder.local_path / f"{_UNIT}{unit}", "a") as file:
        return _take(file) is False


def _take(file: IO[str]) -> bool | None:
    """Takes the lock of an open file, until it is closed; whether it was free.

    `None` where the file system knows no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True
