"""`tombola bench imp`: a sweep of digits against a peer's design, and where a level's time goes."""

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.files import Folder
from launch.bench import long_level, spans
from launch.bench.measure import interleaved, median_ratio, report
from launch.bench.peers.work import shipped
from launch.config import RunConfig
from launch.run import run_config
from pruning.store import TicketFolder

_LEVELS, _ROUNDS = 3, 3
_OVERRIDES: tuple[str, ...] = ()
_SHORT = long_level.Short.here
Reached = list[tuple[int, int, float]]
"""by level: weights kept, steps trained, accuracy on the test set"""


def bench_imp(*, as_json: bool) -> None:
    """The digits sweep by `tombola run` and by `launch.bench.peers.imp`, in turn; then the parts.

    Both train the network of digits-imp.toml without controls. A level's parts are the mean over
    the pruned levels of one more run of ours; those of ResNet-50 come from a few steps of IMP, and
    are multiplied to a level of ImageNet's length.
    """
    config = shipped("digits-imp", "imp", ["--stages.imp.rounds", str(_LEVELS), *_OVERRIDES])
    ours, peer = _Timed(lambda: _ours(config)), _Timed(lambda: _peer(config))
    our_seconds, peer_seconds = interleaved(ours, peer, rounds=_ROUNDS)
    with spans.watched() as levels:
        _ours(config)
    level = spans.mean_level(levels[1:])
    short = _SHORT()
    parts = long_level.measure_parts(short)
    products = long_level.extrapolated(parts)
    num_steps = sum(steps for _, steps, _ in ours.result)
    result: dict[str, Any] = {
        "work": f"digits, {_LEVELS} pruned levels, {num_steps:,} steps, {_ROUNDS} rounds",
        "seconds": statistics.median(our_seconds),
        "peer seconds": statistics.median(peer_seconds),
        "peer / ours": median_ratio(peer_seconds, our_seconds),
        "peer / ours, CPU": median_ratio(peer.cpu_seconds[1:], ours.cpu_seconds[1:]),
        "both trained": _compared(ours.result, peer.result),
        "a pruned level of digits": {
            **{name: _share(level.parts[name], level.seconds) for name in spans.SPANS},
            "the level": long_level.duration(level.seconds),
        },
        "share beside training, digits": level.beside_training,
        f"90 epochs of ImageNet ({short})": long_level.told(products),
        "share beside training, ImageNet": long_level.share_beside_training(products),
    }
    report(result, as_json=as_json)


class _Timed:
    """Work that takes down its CPU seconds, which other processes disturb less than wall time."""

    def __init__(self, work: Callable[[], Reached]) -> None:
        self._work = work
        self.cpu_seconds: list[float] = []
        self.result: Reached = []

    def __call__(self) -> None:
        started = time.process_time()
        self.result = self._work()
        self.cpu_seconds.append(time.process_time() - started)


def _ours(config: RunConfig) -> Reached:
    """What `tombola run` does, its table and plot included."""
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            run_config(config, root=folder)
        tickets = TicketFolder(Folder(folder) / config.settings.name).all()
    return [
        (one.stored_masks.num_kept, int(one.timing["steps"]), one.metrics["test"]["accuracy"])
        for one in sorted(tickets, key=lambda ticket: ticket.level)
    ]


def _peer(config: RunConfig) -> Reached:
    from launch.bench.peers import imp  # here: `python -m` shall find it not yet imported

    with tempfile.TemporaryDirectory() as folder:
        levels = imp.run_peer(imp.Sweep.of(config), Path(folder))
    return [(one.num_kept, one.num_steps, one.accuracy) for one in levels]


def _compared(ours: Reached, peer: Reached) -> dict[str, str]:
    pairs = enumerate(zip(ours, peer, strict=True))
    return {
        f"level {level}": (
            f"{steps} and {peer_steps} steps, {kept:,} and {peer_kept:,} weights, test accuracy "
            f"{accuracy:.4f} and {peer_accuracy:.4f}"
        )
        for level, ((kept, steps, accuracy), (peer_kept, peer_steps, peer_accuracy)) in pairs
    }


def _share(seconds: float, total: float) -> str:
    return f"{long_level.duration(seconds)} = {seconds / total:.2%}"
