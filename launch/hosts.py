"""On how many ranks a run goes on, and what stays as it was when that number changes."""

import platform
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from launch.config import RunConfig, Stage
from train.engine import Engine


class Host(NamedTuple):
    """Where a rank is."""

    name: str
    gpu: str | None


def hosts_of(engine: Engine) -> list[Host]:
    """Where each rank is; all ranks call it."""
    gpu = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else None
    return engine.gather(Host(platform.node(), gpu))


def ranks_before(attempts: Sequence[Any]) -> list[int]:
    """The numbers of ranks of a run's attempts so far, as far as they are told."""
    counts = []
    for attempt in attempts:
        try:
            counts.append(int(attempt["hardware"]["world_size"]))
        except (KeyError, TypeError, ValueError):
            continue
    return counts


def micro_batch(stage: Stage, world_size: int, before: Sequence[int]) -> int | None:
    """Most images per rank and forward pass: as many as each rank had when the run began.

    On fewer ranks each share is accumulated from parts of that size: what fitted into the memory
    still does, and batch normalisation sees batches of the same images.
    """
    chosen = stage.settings.train.micro_batch
    if chosen is not None or not before or before[0] <= world_size:
        return chosen
    return -(-stage.settings.data.batch_size // before[0])


def told(config: RunConfig, hosts: Sequence[Host], before: Sequence[int]) -> list[str]:
    """What a person wants to know of the ranks: where they are, and what they changed from."""
    world_size, batch_size = len(hosts), config.settings.data.batch_size
    lines = []
    if world_size > 1:
        each = [
            f"{name} ({count}{f' x {gpu}' if gpu else ''})"
            for (name, gpu), count in Counter(hosts).items()
        ]
        share = -(-batch_size // world_size)
        lines.append(
            f"{world_size} ranks on {len(each)} host{'s' if len(each) > 1 else ''}: "
            f"{', '.join(each)}; global batch {batch_size:,}, at most {share:,} a rank"
        )
    if before and before[-1] != world_size:
        line = (
            f"{world_size} rank{'s' if world_size > 1 else ''}, {before[-1]} before: global batch, "
            "schedule and order of the samples stay"
        )
        most = micro_batch(config.stages[0], world_size, before)
        if most is not None:
            line += f"; each rank accumulates parts of {most:,} images"
        lines.append(line)
    return lines
