"""What is known of a source of image files: each file's place, label and shape, read once.

Headers are scanned in parallel, and kept; a later start lists the files, compares their sizes and
times, and scans what is new or has changed. 1.28 million images take about 120 MB.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from data.scan import PROBLEMS

_FORMAT = "tombola-catalogue-1"
_ARRAYS = {
    "labels": np.int64,
    "shapes": np.int32,
    "num_bytes": np.int64,
    "problems": np.uint8,
    "file_bytes": np.int64,
    "file_times": np.int64,
    "file_of": np.int32,
    "offsets": np.int64,
}


class Names(Sequence[str]):
    """Many strings in one buffer: `names[i]` is text, `names.raw(i)` its UTF-8 bytes."""

    def __init__(self, buffer: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.buffer, self.ends = buffer, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Names":
        """Names that are packed into one string, in their order."""
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def raw(self, index: int) -> bytes:
        """The bytes of name number `index`."""
        start = int(self.ends[index - 1]) if index else 0
        return self.buffer[start : int(self.ends[index])].tobytes()

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.raw(index).decode("utf-8", "surrogateescape")

    def __len__(self) -> int:
        return len(self.ends)


@dataclass(frozen=True)
class Manifest:
    """The images of one split, in the order in which they are numbered.

    `labels: [N]`; `shapes: [N, 2]`, width and height as stored; `problems: [N]`, indices into
    `PROBLEMS`. Image i is the `num_bytes[i]` bytes from `offsets[i]` of file `file_of[i]`: a file
    of its own, or a shard.
    """

    names: Names
    labels: NDArray[np.int64]
    shapes: NDArray[np.int32]
    num_bytes: NDArray[np.int64]
    problems: NDArray[np.uint8]
    files: Names
    file_bytes: NDArray[np.int64]
    file_times: NDArray[np.int64]
    file_of: NDArray[np.int32]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def in_shards(self) -> bool:
        """Whether the images lie in shards, several in one file."""
        return self.files is not self.names

    def where(self, image: int) -> str:
        """How to name an image to a person: its path, or shard and name."""
        name = self.names.raw(image).decode("utf-8", "backslashreplace")
        return f"{self.files[int(self.file_of[image])]}:{name}" if self.in_shards else name

    def problem(self, image: int) -> str:
        """Why an image cannot be trained on; empty if it can."""
        return PROBLEMS[int(self.problems[image])]


@dataclass(frozen=True)
class Catalogue:
    """A source of image files: its classes in the order of their labels, and its splits."""

    root: str
    """folder or URL that the files' names start from"""
    classes: tuple[str, ...]
    splits: dict[str, Manifest]

    def to_bytes(self) -> bytes:
        """The catalogue as a safetensors file, without its root."""
        meta = {"format": _FORMAT, "classes": self.classes, "splits": list(self.splits)}
        tensors = {"meta": np.frombuffer(json.dumps(meta).encode(), np.uint8)}
        for split, manifest in self.splits.items():
            arrays = {name: getattr(manifest, name) for name in _ARRAYS}
            pools = {"names": manifest.names} | (
                {"files": manifest.files} if manifest.in_shards else {}
            )
            for name, pool in pools.items():
                arrays |= {f"{name}.buffer": pool.buffer, f"{name}.ends": pool.ends}
            tensors |= {f"{split}/{name}": array for name, array in arrays.items()}
        return bytes(save(tensors))

    @classmethod
    def from_bytes(cls, content: bytes, root: str) -> "Catalogue":
        """Reads what `to_bytes` wrote. Raises `ValueError` for anything else."""
        try:
            tensors = load(content)
            meta = json.loads(tensors["meta"].tobytes())
            if meta["format"] != _FORMAT:
                raise ValueError(f"format {meta['format']!r} is not {_FORMAT!r}")
            splits = {split: _read_manifest(tensors, split) for split in meta["splits"]}
            return cls(root, tuple(meta["classes"]), splits)
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"is no catalogue of images: {error}") from None


def _read_manifest(tensors: dict[str, NDArray[np.uint8]], split: str) -> Manifest:
    def pool(name: str) -> Names:
        return Names(tensors[f"{split}/{name}.buffer"], tensors[f"{split}/{name}.ends"])  # type: ignore[arg-type]

    arrays = {name: tensors[f"{split}/{name}"] for name in _ARRAYS}
    for name, kind in _ARRAYS.items():
        if arrays[name].dtype != kind:
            raise TypeError(f"{split}/{name} is {arrays[name].dtype}")
    names = pool("names")
    files = pool("files") if f"{split}/files.ends" in tensors else names
    return Manifest(names=names, files=files, **arrays)  # type: ignore[arg-type]


Progress = Callable[[str, int, int], None]
"""what is being done, how many are done, and of how many"""


def silent(what: str, done: int, total: int) -> None:
    """A `Progress` that shows nothing."""
