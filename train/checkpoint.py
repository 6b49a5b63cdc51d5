"""Checkpoints: a folder a step, valid only when whole.

Tensors go through torch.distributed.checkpoint, each rank writing its part; everything else is
JSON in `manifest.json`, which names the SHA-256 of every file and is written last. A folder
without its manifest, or with a file that does not match it, is not a checkpoint.

A save stops the training for as long as its state takes to be copied in host memory; a thread
writes the copy, and the ranks' threads agree through a process group of their own.
"""

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

from torch import Tensor

from data.errors import RunError
from data.files import Folder
from train.duration import check_durations
from train.manifest import MANIFEST, read_manifest, write_manifest
from train.nested import join_state, split_state
from train.ranks import Ranks
from train.safe_dcp import read_tensors, write_tensors
from train.staging import Background, Staging

_GRACE = 30.0
"""seconds that a training which failed gives to a save that is under way"""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state of a training is saved, and how many are kept."""

    every: str | None = None
    """save each time this long has been trained: 1000it, 1ep"""
    minutes: float = 10.0
    """save when this many minutes have passed since the last"""
    keep: int = 2
    """how many of these to keep; the one at the rewind step and at the end always stay"""
    asynchronous: bool = True
    """go on training while a copy of the state is written; false where host memory has no room
    for the copy"""
    timeout: float = 1800.0
    """seconds after which a save that is not committed ends the run"""

    def __post_init__(self) -> None:
        check_durations(self, "every")
        if not self.minutes > 0:
            raise ValueError(f"minutes = {self.minutes}: must be above 0")
        if self.keep < 1:
            raise ValueError(f"keep = {self.keep}: must be at least 1")
        if not 0 < self.timeout <= threading.TIMEOUT_MAX:
            raise ValueError(f"timeout = {self.timeout}: must be above 0, and finite")


class _Save(NamedTuple):
    """What one rank saves."""

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]
    kept: bool


class Checkpoints:
    """The checkpoints of one training, in `folder/step-00001000/`; all ranks call it together.

    A context that ends when the last save is committed. When the training has failed, a save that
    is under way is given half a minute.
    """

    def __init__(
        self,
        folder: Folder,
        ranks: Ranks,
        *,
        keep: int,
        asynchronous: bool = True,
        timeout: float = CheckpointConfig.timeout,
        say: Callable[[str], None] = print,
    ) -> None:
        self.folder = folder
        self._ranks, self._keep, self._asynchronous, self._say = ranks, keep, asynchronous, say
        self._timeout = timeout
        self._savers: Ranks | None = None
        self._saving: int | None = None
        self._staging, self._background = Staging(), Background()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self._give_up()
            return
        self.wait()
        if self._savers is not None:
            self._savers.close()
            self._savers = None

    def save(self, step: int, state: dict[str, Any], *, kept: bool = False) -> None:
        """Saves `state` (nested dicts of tensors and JSON values) as it is now.

        Returns when it is copied, and the save before it committed; `wait` tells when this one
        is. `kept` protects it from rolling deletion. A valid checkpoint of that step is left as it
        is, what an interrupted save left there is removed first. Raises what hindered the save
        before: `OSError` or `RunError` where it cannot be written; the earlier checkpoints stay.
        """
        self.wait()
        if self._savers is None:
            self._savers = self._ranks.apart(timeout=self._timeout)
        savers, self._saving = self._savers, step
        tensors, values = split_state(state)
        if not self._asynchronous:
            self._write(savers, _Save(step, tensors, values, kept))
            return
        copied = _Save(step, self._staging.copy(tensors), copy.deepcopy(values), kept)
        self._background.start(lambda: self._write(savers, copied))

    def wait(self) -> None:
        """Waits until every save is committed. Raises, on all ranks, what hindered it.

        `RunError` where it takes longer than `timeout`, on this rank or on another.
        """
        if not self._background.wait(self._timeout):
            raise self._late(f"not committed after {self._timeout:g} s")

    def _late(self, problem: object) -> RunError:
        problem = " ".join(str(problem).split())
        where = f"{self.folder}/{_name(self._saving or 0)}"
        return RunError(
            f"{where}: the save of step {self._saving} hangs, or lost a rank: {problem}. See that "
            "the storage answers on all ranks, or raise checkpoint.timeout; then run again"
        )

    def latest(self, *, at_most: int | None = None) -> int | None:
        """The step of the newest valid checkpoint, up to a step; says which ones are damaged."""
        newest = self._newest(at_most)
        return None if newest is None else newest[0]

    def load_latest(self, *, at_most: int | None = None) -> tuple[int, dict[str, Any]] | None:
        """The step and the state of the checkpoint that `latest` finds, its files checked once."""
        newest = self._newest(at_most)
        return None if newest is None else (newest[0], self._read(*newest))

    def load(self, step: int, *, skip: tuple[str, ...] = ()) -> dict[str, Any]:
        """The state saved at `step`, tensors on the CPU, of other ranks' states only this rank's.

        Tensors whose names begin as `skip` says are left out. Raises `RunError` where it is missing
        or damaged.
        """
        self.wait()
        try:
            manifest = self._ranks.on_main(
                lambda: read_manifest(self.folder / _name(step), step), patient=True
            )
        except ValueError as error:
            raise self._damaged(step, error) from error
        return self._read(step, manifest, skip)

    # Writing, in the thread --------------------------------------------------------------

    def _write(self, savers: Ranks, save: _Save) -> None:
        """Commits a checkpoint, or raises on all ranks what one rank met."""
        try:
            self._commit(savers, save)
        except RuntimeError as error:
            if savers.world_size == 1 or getattr(error, "met_by_all", False):
                raise
            raise self._late(error) from error  # the group's own

    def _commit(self, savers: Ranks, save: _Save) -> None:
        target = self.folder / _name(save.step)
        if savers.on_main(lambda: self._ready(save.step)):
            return
        write_tensors(save.tensors, target.location, savers, is_local=target.is_local)

        def own_digests() -> dict[str, str]:
            own = [name for name in target.names() if name.startswith(f"__{savers.rank}_")]
            return {name: target.digest(name) for name in own}

        digests = savers.together(own_digests)
        all_values = _merge(savers.gather(save.values))

        def commit() -> None:
            write_manifest(
                target,
                {
                    "step": save.step,
                    "kept": save.kept,
                    "world_size": savers.world_size,
                    "files": {**_merge(digests), ".metadata": target.digest(".metadata")},
                    "values": all_values,
                },
            )
            self.folder.sync()
            self._delete_old()

        savers.on_main(commit)

    def _give_up(self) -> None:
        try:
            done = self._background.wait(_GRACE)
        except Exception as error:
            self._say(f"the checkpoint that was under way is lost: {error}")
        else:
            if not done:
                self._say("the checkpoint that was under way is given up")

    # Reading -----------------------------------------------------------------------------

    def _newest(self, at_most: int | None) -> tuple[int, dict[str, Any]] | None:
        """Step and manifest of the newest valid checkpoint."""
        self.wait()

        def find() -> tuple[tuple[int, dict[str, Any]] | None, list[str]]:
            skipped: list[str] = []
            steps = [step for step in self._steps() if at_most is None or step <= at_most]
            for step in reversed(steps):
                try:
                    return (step, read_manifest(self.folder / _name(step), step)), skipped
                except ValueError as error:
                    skipped.append(f"{self.folder}/{_name(step)}: {error}")
            return None, skipped

        newest, skipped = self._ranks.on_main(find, patient=True)
        for what in skipped:
            self._say(f"damaged checkpoint passed over: {what}")
        return newest

    def _read(
        self, step: int, manifest: dict[str, Any], skip: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        target, world_size = self.folder / _name(step), manifest["world_size"]
        others = tuple(f"ranks/{r}/" for r in range(world_size) if r != self._ranks.rank)
        try:
            tensors = read_tensors(target.location, is_local=target.is_local, skip=(*others, *skip))
        except ValueError as error:
            raise self._damaged(step, error) from error
        return join_state(tensors, manifest["values"])

    def _damaged(self, step: int, error: ValueError) -> RunError:
        return RunError(f"{self.folder / _name(step)}: damaged checkpoint: {error}")

    # The folder --------------------------------------------------------------------------

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
            read_manifest(self.folder / _name(step), step)
        except ValueError:
            self._delete(step)
            return False
        return True

    def _delete(self, step: int) -> None:
        target = self.folder / _name(step)
        target.remove(MANIFEST)  # the mark first: half a checkpoint is never taken for a whole one
        target.remove()

    def _delete_old(self) -> None:
        rolling = []
        for step in self._steps():
            try:
                manifest = (self.folder / _name(step)).read_json(MANIFEST)
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


def _merge(values: list[dict[str, Any]]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for part in reversed(values):  # rank 0's where several ranks hold the same path
        merged.update(part)
    return merged
