"""The ranks of a run, for code that they run together: who am I, what do the others have.

Everything here is collective: all ranks call it, in the same order. An error that one rank meets
is raised on all of them, so that nobody waits for a rank that has left.
"""

import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from data.errors import RunError

_PATIENCE = 12 * 3600.0
"""seconds"""
T = TypeVar("T")


class Ranks:
    """This rank among `world_size`; alone by default."""

    def __init__(
        self, rank: int = 0, world_size: int = 1, group: dist.ProcessGroup | None = None
    ) -> None:
        self.rank, self.world_size, self.is_main = rank, world_size, rank == 0
        self._group = group

    def apart(self, *, timeout: float = _PATIENCE) -> "Ranks":
        """The same ranks in a gloo group of their own, which waits for hours, or `timeout` seconds.

        What is called through it never mixes with what is called through another: for a thread
        beside the training, or where the others wait for long work of rank 0. To be closed.
        """
        if self.world_size == 1:
            return Ranks()
        group = dist.new_group(timeout=timedelta(seconds=timeout), backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        return Ranks(self.rank, self.world_size, group)

    def close(self) -> None:
        """Ends a group that was made by `apart`."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group; `None` is the default one, or that there is none."""
        return self._group

    def reduce(self, values: Tensor, op: Literal["sum", "min"] = "sum") -> Tensor:
        """The sum or the least of `values` over all ranks, elementwise."""
        if self.world_size > 1:
            values = values.clone()
            kind = dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MIN
            dist.all_reduce(values, kind, group=self._group)
        return values

    def gather(self, value: T) -> list[T]:
        """`value` of each rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def on_main(self, action: Callable[[], T], *, patient: bool = False) -> T:
        """What `action` gives on rank 0, on every rank.

        With `patient`, the other ranks wait for hours and not only for the group's timeout.
        """
        if patient:
            ranks = self.apart()
            try:
                return ranks.on_main(action)
            finally:
                ranks.close()
        outcome = self._attempt(action) if self.is_main else [None, None]
        if self.world_size > 1:
            device = torch.device("cpu")
            dist.broadcast_object_list(outcome, 0, group=self._group, device=device)
        return _result(outcome)  # type: ignore[no-any-return]

    def together(self, action: Callable[[], T]) -> list[T]:
        """What `action` gives on each rank, in rank order, on every rank."""
        outcomes = self.gather(self._attempt(action))
        failed = [outcome for outcome in outcomes if outcome[1] is not None]
        if failed:
            _result(failed[0])
        return [outcome[0] for outcome in outcomes]

    def require_same(self, value: str, what: str) -> None:
        """Raises `RunError` unless all ranks hold the same `value`."""
        values = self.gather(value)
        if len(set(values)) > 1:
            described = ", ".join(f"rank {rank}: {v[:12]}" for rank, v in enumerate(values))
            raise RunError(f"{what} differ between the ranks ({described}); the run stops here")

    def _attempt(self, action: Callable[[], Any]) -> list[Any]:
        """The result and no error, or none and the error, as the other ranks can be told it."""
        try:
            return [action(), None]
        except Exception as error:
            return [None, error if self.world_size == 1 else _told(error)]


ALONE = Ranks()


def _told(error: Exception) -> Exception:
    """The error, or a `RunError` with its text where it does not survive pickling."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RunError(f"{type(error).__name__}: {error}")
    return error


def _result(outcome: list[Any]) -> Any:
    result, error = outcome
    if error is not None:
        error.met_by_all = True  # so that one rank's message is enough
        raise error
    return result
