"""A run's folder belongs to one configuration, and to one process at a time."""

import fcntl
import os
import platform
import shlex
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import tomli_w
import torch

from data.errors import UserError
from launch.config import RunConfig, flat
from pruning.tickets import software_versions
from train.engine import Engine
from train.files import Folder

_MAY_CHANGE = ("checkpoint.", "log.")
"""sections that change how a run is watched and saved, but nothing that it computes"""


def claim(folder: Folder, config: RunConfig, engine: Engine) -> IO[str] | None:
    """Makes the folder this run's, and returns the lock that keeps other processes out (rank 0).

    Raises `UserError` where it belongs to another configuration, naming the differences, or where
    another process works in it.
    """
    held: list[IO[str]] = []

    def take() -> None:
        if folder.local_path is not None:
            held.append(_lock(folder.local_path))
        document = config.document()
        if folder.exists("config.toml"):
            _require_same(folder, document)
        folder.write("config.toml", tomli_w.dumps(document).encode())
        attempts = folder.read_json("environment.json") if folder.exists("environment.json") else []
        folder.write_json("environment.json", [*attempts, environment(engine)])

    engine.on_main(take)
    return held[0] if held else None


def environment(engine: Engine) -> dict[str, Any]:
    """What this attempt runs on."""
    gpu = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else None
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "versions": software_versions(),
        "commit": _commit(),
        "hardware": {
            "host": platform.node(),
            "cpu_count": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": gpu,
            "world_size": engine.world_size,
        },
    }


def _lock(folder: Path) -> IO[str]:
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a")  # noqa: SIM115 - held until the process ends
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"{folder}: another process is running in this folder; wait for it, or choose "
            "another --name"
        ) from None
    return file


def _require_same(folder: Folder, document: dict[str, Any]) -> None:
    before = flat(tomllib.loads(folder.read("config.toml").decode()))
    now = flat(document)
    differences = [
        f"{key} is {before.get(key, 'not set')!r} there and {now.get(key, 'not set')!r} here"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(_MAY_CHANGE)
    ]
    if differences:
        raise UserError(
            f"{folder} belongs to another configuration: {'; '.join(differences)}. Choose another "
            "--name, or go on there with its own config.toml"
        )


def _commit() -> str | None:
    """The git commit of this source tree, with `+` if changed; `None` for an installation."""
    source = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(source), "describe", "--always", "--abbrev=40", "--dirty=+"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() or None
