"""Runs that kill themselves at a chosen point, as a machine might."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from processes import command

KILLED = -signal.SIGKILL


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_run(words: list[str], point: str, count: int) -> None:
    """Runs a command in a process that kills itself when it is at `point` for time `count`."""
    from torch.distributed.checkpoint.filesystem import FileSystem

    from data.files import Folder, Journal
    from pruning import connectivity, connectivity_program, dual_program
    from pruning.store import TicketFolder
    from train import checkpoint
    from train.engine import Engine
    from train.session import Session

    left = [count]

    def reached() -> bool:
        left[0] -= 1
        return left[0] == 0

    def after(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapper(*arguments: Any, **options: Any) -> Any:
            result = original(*arguments, **options)
            if reached():
                die()
            return result

        setattr(owner, name, wrapper)

    def torn_line(self: Journal, record: dict[str, Any]) -> None:
        if reached():
            assert self._file is not None
            self._file.write(b'{"event": "train", "sta')
            self._file.flush()
            die()
        whole_line(self, record)

    def no_manifest(self: Folder, name: str, document: Any) -> None:
        if name == "manifest.json" and reached():
            die()
        write_json(self, name, document)

    def no_ticket(self: TicketFolder, ticket: Any) -> None:
        if reached():
            die()
        write_ticket(self, ticket)

    @contextlib.contextmanager
    def half_a_shard(self: Any, path: Any, mode: str) -> Iterator[Any]:
        with create_stream(self, path, mode) as stream:
            yield stream
        if mode == "wb" and str(path).endswith(".distcp") and reached():
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    def no_folder(self: Folder, name: str = "") -> None:
        remove(self, name)
        if name == "manifest.json" and reached():
            die()

    saving = threading.Event()

    def no_manifest_yet(self: Folder, name: str, document: Any) -> None:
        if name == "manifest.json" and reached():
            saving.set()
            threading.Event().wait(60)
        write_json(self, name, document)

    def third_step(self: Engine, state: Any) -> None:
        update(self, state)
        if saving.is_set():
            steps.append(state.step)
        if len(steps) == 3:
            die()

    def no_evaluation(self: Session, model: Any) -> Any:
        if reached():
            die()
        return evaluate(self, model)

    evaluate = Session.evaluate
    steps: list[int] = []
    update, remove, create_stream = Engine.update, Folder.remove, FileSystem.create_stream
    whole_line, write_json, write_ticket = Journal.append, Folder.write_json, TicketFolder.write
    if point == "a step":
        after(Engine, "update")
    elif point == "a save, before its shards":
        after(checkpoint.Checkpoints, "_ready")
    elif point == "a save, before its manifest":
        Folder.write_json = no_manifest  # type: ignore[method-assign]
    elif point == "a deletion":
        after(checkpoint.Checkpoints, "_delete")
    elif point == "a shard, half of it on the disk":
        FileSystem.create_stream = half_a_shard  # type: ignore[method-assign]
    elif point == "a deletion, half way":
        Folder.remove = no_folder  # type: ignore[method-assign]
    elif point == "the third step beside a save":
        Folder.write_json = no_manifest_yet  # type: ignore[method-assign]
        Engine.update = third_step  # type: ignore[method-assign]
    elif point == "a line of metrics":
        Journal.append = torn_line  # type: ignore[method-assign]
    elif point == "the end of a level, before its ticket":
        TicketFolder.write = no_ticket  # type: ignore[method-assign]
    elif point == "a line, at a point of it":
        after(connectivity, "recalibrate")
    elif point == "a line, before its result":
        after(connectivity_program._Connectivity, "_record")
    elif point == "a line, after its result":
        after(connectivity_program, "write_result")
    elif point == "a transformation, before its training":
        after(dual_program._Dual, "_transformed")
    elif point == "the end of a phase, before its evaluation":
        Session.evaluate = no_evaluation  # type: ignore[method-assign]
    elif point == "two levels":
        after(TicketFolder, "write")
    command(words)
