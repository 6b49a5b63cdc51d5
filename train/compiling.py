"""`torch.compile` for a network: in place, and with what it compiled before."""

import os
import tempfile
from pathlib import Path

from torch import nn

_CACHE = "TORCHINDUCTOR_CACHE_DIR"


def compile_in_place(model: nn.Module, *, cuda_graphs: bool = False) -> None:
    """Compiles a model, whose parameters keep their names, when it is first called.

    With `cuda_graphs` its kernels are replayed as CUDA graphs: for small networks, which a GPU
    computes faster than Python can ask for; on the CPU it changes nothing.
    """
    keep_kernels()
    model.compile(mode="reduce-overhead" if cuda_graphs else None)


def keep_kernels() -> None:
    """Has compiled kernels kept in the user's cache folder, unless the environment says where.

    torch keeps them in the folder for temporary files, which a cluster empties after each job, so
    that every attempt at a run would compile again.
    """
    torchs_own = str(Path(tempfile.gettempdir()) / "torchinductor_")  # which it may have set by now
    if not os.environ.get(_CACHE, torchs_own).startswith(torchs_own):
        return
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = home / "tombola" / "compiled"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError):
        return  # no such folder for this user, or no home: torch's own choice will do
    if os.access(folder, os.W_OK):
        os.environ[_CACHE] = str(folder)
