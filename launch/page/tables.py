"""The tables of the page: the runs, methods at like densities, settings that differ, machines."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tomli_w

from launch.comparison import Row
from launch.page.figure import Cell, as_csv
from launch.page.lineage import Lineage
from launch.page.results import Results
from launch.variants import Variant, differing
from pruning.cost import Cost

_METHODS = (
    *("method", "configuration", "density", "kept", "runs", "accuracy", "spread", "steps"),
    *("search steps", "device-hours"),
)
_COSTS = Cost._fields[1:]
_TICKETS = (
    *("run", "ticket", "made of", "method", "control", "level", "density", "accuracy", "steps"),
    *("search steps", *_COSTS, "id", "parent"),
)


@dataclass(frozen=True)
class RunLine:
    """A run among the others."""

    run: Results
    num_finished: int
    """tickets"""
    last_attempt: str
    """when it began"""
    hardware: str
    software: str


def run_lines(runs: Sequence[Results]) -> list[RunLine]:
    """A line a run."""
    found = []
    for run in runs:
        last = run.attempts[-1] if run.attempts else {}
        versions = _mapping(last.get("versions"))
        found.append(
            RunLine(
                run,
                num_finished=len(run.tickets),
                last_attempt=_minute(last),
                hardware=_hardware(last),
                software=", ".join(f"{name} {version}" for name, version in versions.items()),
            )
        )
    return found


def kind_of_devices(runs: Sequence[Results]) -> str:
    """What hours of devices are hours of."""
    attempts = [attempt for run in runs for attempt in run.attempts]
    on_gpus = any(_mapping(attempt.get("hardware")).get("gpu") for attempt in attempts)
    return "GPU-hours" if on_gpus else "process-hours (no GPU)"


def differences(found: Sequence[Variant]) -> list[tuple[str, list[str]]]:
    """The settings in which configurations differ, with the value of each."""
    return [
        (key, ["-" if value is None else str(value) for value in values])
        for key, values in differing(found).items()
    ]


def configuration(variant: Variant) -> str:
    """The configuration of a variant's first run, as its file."""
    return tomli_w.dumps(variant.configs[0].document())


def methods_csv(found: Sequence[Row]) -> str:
    """The table of methods as a file."""
    rows: list[list[Cell]] = []
    for row in found:
        what: list[Cell] = [row.name, row.variant, row.density, row.kept, len(row.accuracies)]
        rows.append([*what, row.mean, row.spread, row.steps, row.search_steps, row.hours])
    return as_csv(_METHODS, rows)


def tickets_csv(found: Sequence[Lineage]) -> str:
    """The tickets of all runs as a file, with what an image costs in each."""
    rows: list[list[Cell]] = []
    for lineage in found:
        for row in lineage.rows:
            ticket = row.ticket
            what: list[Cell] = [lineage.run.name, ticket.place, row.parent, ticket.method]
            what += [int(ticket.control), ticket.level, ticket.density, row.accuracy]
            costs = [None] * len(_COSTS) if row.cost is None else row.cost[1:]
            rows.append([*what, row.steps, row.search_steps, *costs, ticket.id, ticket.parent])
    return as_csv(_TICKETS, rows)


def attempt_lines(run: Results) -> list[dict[str, str]]:
    """The attempts at a run: when, where, with what."""
    return [
        {
            "started": _minute(attempt),
            "hardware": _hardware(attempt),
            "commit": str(attempt.get("commit") or "not from a git checkout"),
            "command": _command(str(attempt.get("command", ""))),
        }
        for attempt in run.attempts
    ]


def _hardware(attempt: dict[str, Any]) -> str:
    hardware = _mapping(attempt.get("hardware"))
    count = hardware.get("world_size", 1)
    device = hardware.get("gpu") or f"CPU process ({hardware.get('threads', '?')} threads)"
    return f"{count} x {device} on {hardware.get('host', '?')}"


def _minute(attempt: dict[str, Any]) -> str:
    """When an attempt began: `2026-01-31 09:30`, UTC."""
    return str(attempt.get("started", ""))[:16].replace("T", " ")


def _command(command: str) -> str:
    """Its program by its name alone: a folder of somebody's machine says nothing."""
    try:
        program, *rest = shlex.split(command)
    except ValueError:
        return command
    return shlex.join([program.rpartition("/")[2], *rest])


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
