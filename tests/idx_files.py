"""MNIST-like idx files as their format's description has them."""

import gzip
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[np.uint8]]


def idx_bytes(array: NDArray[np.uint8]) -> bytes:
    """An array as the format's description has it."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


def write(folder: Path, arrays: Arrays, *, dot: str = "-", packed: bool = False) -> None:
    """The four files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        content = idx_bytes(array)
        path = folder / f"{name}{dot}idx{array.ndim}-ubyte"
        if packed:
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
        else:
            path.write_bytes(content)


def write_idx(folder: Path, num_classes: int) -> None:
    """96 training and 24 test images of 8x8, of that many classes."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, num in (("train", 96), ("t10k", 24)):
        arrays[f"{part}-images"] = rng.integers(0, 256, (num, 8, 8), dtype=np.uint8)
        arrays[f"{part}-labels"] = (np.arange(num) % num_classes).astype(np.uint8)
    write(folder, arrays)
