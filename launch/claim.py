"""A run's folder belongs to one configuration, and each part to one process at a time."""

import contextlib
import os
import platform
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence, Set
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w
import torch

from data.errors import UserError
from data.files import Folder
from data.record import Record, differences
from launch.config import RunConfig, flat, parse_document
from launch.hosts import ranks_before
from launch.locks import busy_stages, folder_lock, unit_lock
from pruning.sources import RECORD
from train.engine import Engine
from train.metrics import is_journal
from train.versions import software_versions

MAY_CHANGE = (
    "checkpoint.",
    "log.",
    "data.root",
    "data.eval_batch_size",
    "data.manifest",
    "data.on_bad",
    "data.prefetch",
    "data.threads",
    "train.micro_batch",
    "train.pack_below",
    "train.timeout",
)
"""keys that change how a run is watched, saved and spread over devices, but not what it computes
beyond the order of sums"""
_NO_RESULTS = ("config.toml", "data.json", "manifests", "tensorboard")
"""what a run writes before it has anything to lose, beside the files of each process"""


class Claim(NamedTuple):
    """What a process is told that has claimed a run, or a part of it."""

    ranks_before: list[int]
    """the numbers of ranks of the attempts at it so far"""
    is_guarded: bool
    """whether locks keep other processes out"""


@contextlib.contextmanager
def claimed(
    folder: Folder, config: RunConfig, engine: Engine, units: Sequence[str], *, part: str = ""
) -> Iterator[Claim]:
    """A context in which these units of a run are this process's, and locked against others.

    `part` names its files. Raises `UserError` where the folder holds results of another
    configuration, naming the differences (a stage without results that nobody is at may still
    change, come or go), or where another process is at one of the units (found out where there are
    locks only).
    """
    held = contextlib.ExitStack()

    def take() -> Claim:
        locks = [held.enter_context(unit_lock(folder, unit)) for unit in units]
        with folder_lock(folder):
            require_same(folder, config, busy=busy_stages(folder, units))
            folder.write("config.toml", tomli_w.dumps(config.document()).encode())
            return Claim(_attempt(folder, engine, part), all(locks))

    with held:
        yield engine.on_main(take, patient=True)


def _attempt(folder: Folder, engine: Engine, part: str) -> list[int]:
    """Records this attempt, and gives the numbers of ranks of those before it.

    Each part has a file of its own, which nobody else writes. It also tells with how many ranks the
    run had begun when the part did, so that what comes of the part does not depend on what others
    record later.
    """
    name = f"environment-{part}.json" if part else "environment.json"
    own, before = _attempts(folder, name), ranks_before(attempts(folder))
    if own and before and isinstance(own[0].get("begun_with"), int):
        before[0] = own[0]["begun_with"]
    begun_with = before[0] if before else engine.world_size
    folder.write_json(name, [*own, {**environment(engine), "begun_with": begun_with}])
    return before


def attempts(folder: Folder) -> list[dict[str, Any]]:
    """The attempts at a run, and at parts of it, as `environment` tells of them, in the order in
    which they began."""
    names = filter(_tells_attempts, folder.names())
    found = [attempt for name in names for attempt in _attempts(folder, name)]
    return sorted(found, key=lambda attempt: str(attempt.get("started")))


def num_devices(known: list[dict[str, Any]]) -> int:
    """On how many GPUs, or processes without one, the last of these attempts trained a run."""
    return (ranks_before(known) or [1])[-1]


def _tells_attempts(name: str) -> bool:
    return name.startswith("environment") and name.endswith(".json")


def claim_data(folder: Folder, stage: str, record: Record, engine: Engine) -> None:
    """Records what data a stage has, `data.json`; once it has results, they must be those again.

    Raises `UserError` saying what differs.
    """

    def claim() -> None:
        with folder_lock(folder):
            write()

    def write() -> None:
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
    return any(
        _stage_has_results(folder, name)
        for name in folder.names()
        if not (name in _NO_RESULTS or name.startswith(".") or is_journal(name))
        and not _tells_attempts(name)
    )


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


def _attempts(folder: Folder, name: str) -> list[dict[str, Any]]:
    """The earlier attempts that a file tells of; a damaged list is no reason not to go on."""
    try:
        found = folder.read_json(name)
    except (FileNotFoundError, ValueError):
        return []
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def require_same(
    folder: Folder,
    config: RunConfig,
    *,
    busy: Set[str] = frozenset(),
    apart: Set[str] = frozenset(),
) -> None:
    """Raises `UserError` where the folder holds results of another configuration.

    Or where other processes are about to write some: `busy` are the stages that they are at. Of the
    keys that set it `apart` nothing is said.
    """
    if not folder.exists("config.toml") or not (busy or _has_results(folder)):
        return
    before = flat(read_run(folder).document())
    now = flat(config.document())
    differences = [
        f"{key} is {before.get(key, 'not set')!r} there and {now.get(key, 'not set')!r} here"
        for key in sorted((before.keys() | now.keys()) - apart)
        if _compared(key, before) != _compared(key, now)
        and not key.startswith(MAY_CHANGE)
        and _is_settled(folder, key, busy)
    ]
    if differences:
        raise UserError(
            f"{folder} belongs to another configuration: {'; '.join(differences)}. Choose another "
            "--name, or go on there with its own config.toml"
        )


def _is_settled(folder: Folder, key: str, busy: Set[str]) -> bool:
    """Whether a setting has results: one of a stage's own, once that stage has any, or is busy."""
    section, _, rest = key.partition(".")
    stage = rest.partition(".")[0]
    return section != "stages" or stage in busy or _stage_has_results(folder, stage)


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
