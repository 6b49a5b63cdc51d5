"""A run's folder belongs to one configuration, and to one process at a time."""

import contextlib
import fcntl
import os
import platform
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import tomli_w
import torch

from data.errors import UserError
from data.files import Folder
from data.record import Record, differences
from launch.config import RunConfig, flat, parse_document
from pruning.sources import RECORD
from train.engine import Engine
from train.versions import software_versions

_MAY_CHANGE = (
    "checkpoint.",
    "log.",
    "data.root",
    "data.eval_batch_size",
    "data.manifest",
    "data.on_bad",
    "data.prefetch",
    "data.threads",
    "train.micro_batch",
    "train.timeout",
)
"""keys that change how a run is watched, saved and spread over devices, but not what it computes"""
_NO_RESULTS = {
    "config.toml",
    "data.json",
    "environment.json",
    "manifests",
    "metrics.jsonl",
    "tensorboard",
    ".lock",
}
"""what a run writes before it has anything to lose"""


@contextlib.contextmanager
def claimed(folder: Folder, config: RunConfig, engine: Engine) -> Iterator[None]:
    """A context in which the folder is this run's, and locked against other processes.

    Raises `UserError` where it holds results of another configuration, naming the differences (a
    stage without results may still change, come or go), or where another process works in it
    (found out on a local disk only).
    """
    held: list[IO[str]] = []

    def take() -> None:
        if folder.local_path is not None:
            held.append(_lock(folder.local_path))
        require_same(folder, config)
        folder.write("config.toml", tomli_w.dumps(config.document()).encode())
        folder.write_json("environment.json", [*_attempts(folder), environment(engine)])

    try:
        engine.on_main(take)
        yield
    finally:
        for lock in held:
            lock.close()


def claim_data(folder: Folder, stage: str, record: Record, engine: Engine) -> None:
    """Records what data a stage has, `data.json`; once it has results, they must be those again.

    Raises `UserError` saying what differs.
    """

    def claim() -> None:
        records = folder.read_json("data.json") if folder.exists("data.json") else {}
        if stage in records and _stage_has_results(folder, stage):
            require_data(folder, stage, record)
        elif records.get(stage) != record:
            folder.write_json("data.json", {**records, stage: record})

    engine.on_main(claim)


def require_data(folder: Folder, stage: str, record: Record) -> None:
    """Raises `UserError` saying how the data differ from those that a stage was trained on."""
    differing = differences(folder.read_json("data.json")[stage], record)
    if differing:
        raise UserError(
            f"{folder} was begun on other data: {differing}. Mend data.root, or choose another "
            "--name"
        )


def _has_results(folder: Folder) -> bool:
    """Whether there is anything to lose."""
    return any(_stage_has_results(folder, n) for n in set(folder.names()) - _NO_RESULTS)


def read_run(folder: Folder) -> RunConfig:
    """The configuration of a run, read like any: options added since have their defaults.

    Raises `UserError` where it is damaged.
    """
    where = f"{folder}/config.toml"
    try:
        return parse_document(tomllib.loads(folder.read("config.toml").decode()), where)
    except (ValueError, UserError) as error:
        raise UserError(f"{where}: damaged, or of another version: {error}") from None


def stage_names(folder: Folder) -> list[str]:
    """The stages of a run in their order. Raises as `read_run` does."""
    return [stage.name for stage in read_run(folder).stages]


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


def _attempts(folder: Folder) -> list[Any]:
    """The earlier attempts at this run; a damaged list is no reason not to go on."""
    try:
        found = folder.read_json("environment.json")
    except (FileNotFoundError, ValueError):
        return []
    return found if isinstance(found, list) else []


def require_same(folder: Folder, config: RunConfig) -> None:
    """Raises `UserError` where the folder holds results of another configuration."""
    if not folder.exists("config.toml") or not _has_results(folder):
        return
    before = flat(read_run(folder).document())
    now = flat(config.document())
    differences = [
        f"{key} is {before.get(key, 'not set')!r} there and {now.get(key, 'not set')!r} here"
        for key in sorted(before.keys() | now.keys())
        if _compared(key, before) != _compared(key, now)
        and not key.startswith(_MAY_CHANGE)
        and _is_settled(folder, key)
    ]
    if differences:
        raise UserError(
            f"{folder} belongs to another configuration: {'; '.join(differences)}. Choose another "
            "--name, or go on there with its own config.toml"
        )


def _is_settled(folder: Folder, key: str) -> bool:
    """Whether a setting has results: one of a stage's own, once that stage has any."""
    section, _, rest = key.partition(".")
    return section != "stages" or _stage_has_results(folder, rest.partition(".")[0])


def _stage_has_results(folder: Folder, stage: str) -> bool:
    """Whether a stage has anything to lose; that it has found its tickets is nothing yet."""
    return bool(set((folder / stage).names()) - {RECORD})


def _compared(key: str, settings: dict[str, Any]) -> Any:
    """A setting as far as it may not change: of KIND:PATH, the place may."""
    value = settings.get(key)
    return str(value).partition(":")[0] if key.endswith("data.source") else value


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
