"""`tombola bench checkpoint`: how long a save stops the training, asynchronous and synchronous."""

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch

from data.files import Folder
from launch.bench.measure import median_ratio, report, wait_for_device
from train.checkpoint import Checkpoints
from train.engine import Engine
from train.nested import split_state
from train.optim import OptimizerConfig, build_optimizer, optimizer_state

ROUNDS = 9


def bench_checkpoint(*, as_json: bool) -> None:
    """Saves ResNet-50 and its momentum in the folder for temporary files, on any number of ranks.

    In each round one asynchronous save, one synchronous save and one `torch.save` with fsync by
    rank 0, the order turned round with every round. An asynchronous save blocks until the state
    is copied, and is committed later.
    """
    engine = Engine()
    state = _state(engine)
    num_bytes = sum(t.numel() * t.element_size() for t in split_state(state)[0].values())
    with _folder(engine) as folder:
        seconds = _measure(engine, state, folder)
    if engine.is_main:
        blocked, written = seconds["blocked"], seconds["synchronous"]
        result = {
            "work": f"resnet50 and momentum, {num_bytes / 1e6:.0f} MB, {engine.world_size} ranks, "
            f"{ROUNDS} rounds",
            "asynchronous blocks s": statistics.median(blocked),
            "committed after s": statistics.median(seconds["committed"]),
            "synchronous s": statistics.median(written),
            "torch.save, fsync s": statistics.median(seconds["torch.save"]),
            "blocks / synchronous": median_ratio(blocked, written),
            "blocks / torch.save": median_ratio(blocked, seconds["torch.save"]),
        }
        report(result, as_json=as_json)
    engine.close()


def _state(engine: Engine) -> dict[str, Any]:
    model = timm.create_model("resnet50").to(engine.device)
    optimizer = build_optimizer(model, OptimizerConfig())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer_state(model, optimizer)}


@contextlib.contextmanager
def _folder(engine: Engine) -> Iterator[Path]:
    """A temporary folder that all ranks see; they share a machine."""
    with contextlib.ExitStack() as stack:
        made = engine.on_main(lambda: stack.enter_context(tempfile.TemporaryDirectory()))
        yield Path(made)
        engine.gather(None)  # nobody writes any more


def _measure(engine: Engine, state: dict[str, Any], folder: Path) -> dict[str, list[float]]:
    """Seconds of each round, after one uncounted round."""
    kinds = ("blocked", "committed", "synchronous", "torch.save")
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    beside = Checkpoints(Folder(folder / "asynchronous"), engine, keep=1)
    waiting = Checkpoints(Folder(folder / "synchronous"), engine, keep=1, asynchronous=False)

    def save_beside(step: int) -> dict[str, float]:
        blocked = _seconds(engine, lambda: beside.save(step, state))
        return {"blocked": blocked, "committed": blocked + _timed(beside.wait)}

    def save_waiting(step: int) -> dict[str, float]:
        return {"synchronous": _seconds(engine, lambda: waiting.save(step, state))}

    def save_plainly(step: int) -> dict[str, float]:
        path = folder / "plain.pt"
        return {"torch.save": _seconds(engine, lambda: _torch_save(engine, state, path))}

    ways = (save_beside, save_waiting, save_plainly)
    with beside, waiting:
        for step in range(ROUNDS + 1):
            for way in reversed(ways) if step % 2 else ways:
                for kind, value in way(step).items():
                    seconds[kind] += [value] if step else []
    return seconds


def _torch_save(engine: Engine, state: dict[str, Any], path: Path) -> None:
    if engine.is_main:
        with open(path, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())


def _seconds(engine: Engine, work: Callable[[], object]) -> float:
    """Of `work` that all ranks begin together."""
    wait_for_device()
    engine.gather(None)
    return _timed(work)


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
