"""Checkpoints: a folder a step, valid only when whole.

Tensors go through torch.distributed.checkpoint, each rank writing its part; everything else is
JSON in `manifest.json`, which names the SHA-256 of every file and is written last. A folder
without its manifest, or with a file that does not match it, is not a checkpoint.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from data.errors import RunError
from data.files import Folder
from train.duration import check_durations
from train.engine import Engine
from train.safe_dcp import read_tensors, write_tensors

_FORMAT = 1
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state of a training is saved, and how many are kept."""

    every: str | None = None
    """save each time this long has been trained: 1000it, 1ep"""
    minutes: float = 10.0
    """save when this many minutes have passed since the last"""
    keep: int = 2
    """how many of these to keep; the one at the rewind step and at the end always stay"""

    def __post_init__(self) -> None:
        check_durations(self, "every")
        if not self.minutes > 0:
            raise ValueError(f"minutes = {self.minutes}: must be above 0")
        if self.keep < 1:
            raise ValueError(f"keep = {self.keep}: must be at least 1")


class Checkpoints:
    """The checkpoints of one training, in `folder/step-00001000/`."""

    def __init__(
        self, folder: Folder, engine: Engine, *, keep: int, say: Callable[[str], None] = print
    ) -> None:
        self.folder = folder
        self._engine, self._keep, self._say = engine, keep, say

    def save(self, step: int, state: dict[str, Any], *, kept: bool = False) -> None:
        """Saves `state` (nested dicts of tensors and JSON values); called by all ranks.

        `kept` protects it from rolling deletion. A valid checkpoint of that step is left as it is,
        what an interrupted save left there is removed first. Raises `OSError` where it cannot be
        written; the earlier checkpoints stay.
        """
        engine = self._engine
        target = self.folder / _name(step)
        if engine.on_main(lambda: self._ready(step)):
            return
        tensors, values = split_state(state)
        alone = engine.world_size == 1
        write_tensors(tensors, target.location, is_local=target.is_local, alone=alone)
        own = {n: target.digest(n) for n in target.names() if n.startswith(f"__{engine.rank}_")}
        files = {n: digest for part in engine.gather(own) for n, digest in part.items()}
        all_values = _merge(engine.gather(values))

        def commit() -> None:
            manifest: dict[str, Any] = {
                "format": _FORMAT,
                "step": step,
                "kept": kept,
                "world_size": engine.world_size,
                "files": {**files, ".metadata": target.digest(".metadata")},
                "values": all_values,
            }
            target.write_json(_MANIFEST, {**manifest, "sha256": _digest(manifest)})
            self._delete_old()

        engine.on_main(commit)

    def latest(self, *, at_most: int | None = None) -> int | None:
        """The step of the newest valid checkpoint, up to a step; says which ones are damaged."""

        def find() -> tuple[int | None, list[str]]:
            skipped = []
            steps = [step for step in self._steps() if at_most is None or step <= at_most]
            for step in reversed(steps):
                try:
                    self._verify(step)
                except ValueError as error:
                    skipped.append(f"{self.folder}/{_name(step)}: {error}")
                else:
                    return step, skipped
            return None, skipped

        step, skipped = self._engine.on_main(find)
        for what in skipped:
            self._say(f"damaged checkpoint passed over: {what}")
        return step

    def load(self, step: int) -> dict[str, Any]:
        """The state saved at `step`, tensors on the CPU, of other ranks' states only this rank's.

        Raises `RunError` where it is missing or damaged.
        """
        target = self.folder / _name(step)
        try:
            manifest = self._engine.on_main(lambda: self._verify(step))
            others = tuple(
                f"ranks/{rank}/"
                for rank in range(manifest["world_size"])
                if rank != self._engine.rank
            )
            tensors = read_tensors(target.location, is_local=target.is_local, skip=others)
        except ValueError as error:
            raise RunError(f"{target}: damaged checkpoint: {error}") from error
        return join_state(tensors, manifest["values"])

    def _steps(self) -> list[int]:
        """The steps of all that looks like a checkpoint, ascending, whole or not."""
        names = [n for n in self.folder.names() if n.startswith("step-") and n[5:].isdigit()]
        return sorted(int(n[5:]) for n in names)

    def _ready(self, step: int) -> bool:
        """Whether a valid checkpoint of `step` is there; else makes room for one."""
        target = self.folder / _name(step)
        if not target.exists():
            return False
        try:
            self._verify(step)
        except ValueError:
            self._delete(step)
            return False
        return True

    def _delete(self, step: int) -> None:
        target = self.folder / _name(step)
        target.remove(_MANIFEST)  # the mark first: half a checkpoint is never taken for a whole one
        target.remove()

    def _verify(self, step: int) -> dict[str, Any]:
        """The manifest of a whole checkpoint. Raises `ValueError` naming what is wrong."""
        target = self.folder / _name(step)
        try:
            manifest: dict[str, Any] = target.read_json(_MANIFEST)
        except FileNotFoundError:
            raise ValueError("not whole: a save was interrupted") from None
        if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
            raise ValueError(f"{_MANIFEST}: not of format {_FORMAT}")
        digest = manifest.pop("sha256", None)
        if digest != _digest(manifest):
            raise ValueError(f"{_MANIFEST} does not match its checksum")
        for name, digest in manifest["files"].items():
            if "/" in name or not target.exists(name):
                raise ValueError(f"{name} is missing")
            if target.digest(name) != digest:
                raise ValueError(f"{name} does not match its checksum")
        return manifest

    def _delete_old(self) -> None:
        rolling = []
        for step in self._steps():
            try:
                manifest = (self.folder / _name(step)).read_json(_MANIFEST)
            except FileNotFoundError:
                self._delete(step)  # what an interrupted save left
            except (OSError, ValueError):
                continue  # unreadable just now, or damaged: it may be one that is kept
            else:
                if isinstance(manifest, dict) and manifest.get("kept") is False:
                    rolling.append(step)
        for step in rolling[: -self._keep]:
            self._delete(step)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def split_state(
    state: dict[str, Any], prefix: str = ""
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Nested dicts into tensors and JSON values, each by its path `a/b/c`."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for key, value in state.items():
        path = f"{prefix}{key}"
        if isinstance(value, Tensor):
            tensors[path] = value.detach()
        elif isinstance(value, dict) and value:
            inner_tensors, inner_values = split_state(value, f"{path}/")
            tensors.update(inner_tensors)
            values.update(inner_values)
        else:
            values[path] = value
    return tensors, values


def join_state(tensors: dict[str, Tensor], values: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `split_state`."""
    state: dict[str, Any] = {}
    for path, value in {**values, **tensors}.items():
        *parents, leaf = path.split("/")
        inner = state
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[leaf] = value
    return state


def _merge(values: list[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for part in reversed(values):  # rank 0's where several ranks hold the same path
        merged.update(part)
    return merged
