"""The random generators of a process as tensors of a fixed size, fit for a checkpoint."""

import random
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor


def kept_generators(device: torch.device) -> AbstractContextManager[None]:
    """A context that leaves torch's generators as they were, on the CPU and on the device."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The generators of Python, NumPy, torch on the CPU and, on CUDA, of the device."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": _optional(gauss),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy_position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def load_rng_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Puts back what `rng_state` gave; a state saved without CUDA leaves the device's as it is."""
    present, gauss = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss if present else None))
    keys = state["numpy"].numpy().astype(np.uint32)
    position, has_gauss = state["numpy_position"].tolist()
    np.random.set_state(("MT19937", keys, position, has_gauss, state["numpy_gauss"].item()))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _optional(value: float | None) -> Tensor:
    return torch.tensor([value is not None, value or 0.0], dtype=torch.float64)
