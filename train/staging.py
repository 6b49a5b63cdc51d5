"""What lets a training go on while its state is saved: a copy in host memory, and a thread."""

import threading
from collections.abc import Callable

import torch
from torch import Tensor


class Staging:
    """Host memory for a copy of tensors, which each copy uses again: pinned for those on CUDA."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are now, on the CPU, until the next call; waits for the GPU once."""
        self._buffers = {name: self._buffer(name, tensor) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            self._buffers[name].copy_(tensor, non_blocking=True)
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return dict(self._buffers)

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        found = self._buffers.get(name)
        if found is not None and _layout(found) == _layout(tensor):
            return found
        return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.shape, tensor.stride()


class Background:
    """One piece of work at a time beside the caller, in a thread that no process waits for."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._done.set()
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begins `work`; what was begun before must have been waited for."""
        done = threading.Event()

        def run() -> None:
            try:
                work()
            except BaseException as error:  # DCP's own is no Exception
                self._error = error
            finally:
                done.set()

        assert self._done.is_set()
        assert self._error is None
        threading.Thread(target=run, name="checkpoint", daemon=True).start()
        self._done = done

    def wait(self, seconds: float | None = None) -> bool:
        """Waits until the work is done, or for that long: whether it is done.

        Raises what went wrong in it, once. An interrupted call can be repeated, which that of
        `Thread.join` cannot on Python 3.11.
        """
        if not self._done.wait(seconds):
            return False
        error, self._error = self._error, None
        if error is not None:
            raise error
        return True
