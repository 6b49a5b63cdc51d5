"""State dicts in objects: safetensors files of 64 MiB, written by many ranks, read without pickle.

A file holds whole tensors in the order of their names, so equal weights are stored once: all
levels that are rewound to the same step share them.
"""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from data.errors import RunError
from pruning import document
from pruning.objects import Objects, require_memory
from pruning.packing import Shape, canonical
from train.ranks import ALONE, Ranks

_FILE_BYTES = 64 << 20


@dataclass(frozen=True)
class StoredTensor:
    """What a tensor must be."""

    dtype: str
    """as torch names it: float32, bfloat16, int64"""
    shape: Shape
    sha256: str
    """of its bytes, little-endian, in row-major order"""

    @classmethod
    def of(cls, tensor: Tensor) -> "StoredTensor":
        """What is told of a tensor."""
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        dtype = str(tensor.dtype).removeprefix("torch.")
        return cls(dtype, tuple(tensor.shape), hashlib.sha256(content.data).hexdigest())


@dataclass(frozen=True)
class WeightFile:
    """An object with some of the tensors."""

    sha256: str
    num_bytes: int
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class StoredWeights:
    """Where a state dict is, and what it must be: its part of a ticket's index."""

    tensors: dict[str, StoredTensor]
    """in the order of the state dict"""
    files: tuple[WeightFile, ...]

    @cached_property
    def digest(self) -> str:
        """The SHA-256 that names the state, wherever it is stored."""
        return weights_digest(self.tensors)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of every tensor of the state dict."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def objects(self) -> dict[str, int]:
        """The digests of the objects that hold it, with their bytes."""
        return {file.sha256: file.num_bytes for file in self.files}

    def read(self, objects: Objects) -> dict[str, Tensor]:
        """The state dict on the CPU, as `read_weights` gives it."""
        return read_weights(objects, self)

    def to_json(self) -> dict[str, Any]:
        """Their part of a ticket's index."""
        return {
            "tensors": {
                name: vars(t) | {"shape": list(t.shape)} for name, t in self.tensors.items()
            },
            "files": [vars(file) | {"tensors": list(file.tensors)} for file in self.files],
        }

    @classmethod
    def from_json(cls, value: Any) -> "StoredWeights":
        """Raises `ValueError` or `KeyError` where it is not what `to_json` gives."""
        fields = document.mapping(value, "weights")
        tensors = document.table(_tensor, fields["tensors"], "weights.tensors")
        stored = cls(
            tensors,
            tuple(map(_file, document.sequence(fields["files"], "weights.files"))),
        )
        if sorted(name for file in stored.files for name in file.tensors) != sorted(tensors):
            raise ValueError("the files of the weights do not hold each tensor once")
        return stored


def _tensor(value: Any, name: str) -> StoredTensor:
    row = document.mapping(value, name)
    return StoredTensor(
        document.text(row["dtype"], name),
        document.shape(row["shape"], name),
        document.digest(row["sha256"], name),
    )


def _file(value: Any) -> WeightFile:
    row = document.mapping(value, "a file")
    names = document.sequence(row["tensors"], "the tensors of a file")
    return WeightFile(
        document.digest(row["sha256"], "a file"),
        document.count(row["num_bytes"], "the bytes of a file"),
        tuple(document.text(name, "the name of a tensor") for name in names),
    )


def weights_digest(tensors: Mapping[str, StoredTensor]) -> str:
    """The SHA-256 over names, types, shapes and the digests of the tensors' bytes."""
    rows = {name: [t.dtype, list(t.shape), t.sha256] for name, t in tensors.items()}
    return hashlib.sha256(canonical(rows)).hexdigest()


def write_weights(
    objects: Objects, weights: Mapping[str, Tensor], ranks: Ranks = ALONE
) -> StoredWeights:
    """Stores a state dict that all ranks hold, each writing its share of the files."""
    groups = _groups(weights)

    def write() -> list[tuple[WeightFile, dict[str, StoredTensor]]]:
        own = groups[ranks.rank :: ranks.world_size]
        return [_write_file(objects, {name: weights[name] for name in names}) for names in own]

    written = ranks.together(write)
    in_order = [written[i % ranks.world_size][i // ranks.world_size] for i in range(len(groups))]
    tensors = {name: tensor for _, part in in_order for name, tensor in part.items()}
    return StoredWeights({name: tensors[name] for name in weights}, tuple(f for f, _ in in_order))


def _groups(weights: Mapping[str, Tensor]) -> list[list[str]]:
    """The names file by file: a file is full when it has `_FILE_BYTES`."""
    groups: list[list[str]] = []
    room = 0
    for name in sorted(weights):
        num_bytes = weights[name].numel() * weights[name].element_size()
        if not groups or num_bytes > room:
            groups.append([])
            room = _FILE_BYTES
        groups[-1].append(name)
        room -= num_bytes
    return groups


def _write_file(
    objects: Objects, weights: dict[str, Tensor]
) -> tuple[WeightFile, dict[str, StoredTensor]]:
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}
    content = safetensors.torch.save(plain, {"format": "tombola-weights"})
    file = WeightFile(objects.put(content), len(content), tuple(weights))
    return file, {name: StoredTensor.of(value) for name, value in plain.items()}


def read_weights(objects: Objects, stored: StoredWeights) -> dict[str, Tensor]:
    """The state dict on the CPU.

    Raises `RunError` naming the object that is missing or damaged, or where they do not fit into
    this machine's memory.
    """
    num_bytes = sum(file.num_bytes for file in stored.files)
    require_memory(num_bytes, f"weights of {num_bytes:,} bytes take as many")
    with ThreadPoolExecutor(objects.num_threads) as pool:
        parts = list(pool.map(lambda file: _read_file(objects, stored, file), stored.files))
    tensors = {name: tensor for part in parts for name, tensor in part.items()}
    return {name: tensors[name] for name in stored.tensors}


def _read_file(objects: Objects, stored: StoredWeights, file: WeightFile) -> dict[str, Tensor]:
    where = objects.file(file.sha256)
    try:
        tensors = safetensors.torch.load(objects.get(file.sha256, file.num_bytes))
    except RunError:
        raise
    except Exception as error:  # SafetensorError, and what torch makes of a hostile header
        problem, *_ = (str(error) or type(error).__name__).splitlines()
        raise RunError(f"{where}: damaged: {problem:.200}") from error
    for name in file.tensors:
        if name not in tensors or StoredTensor.of(tensors[name]) != stored.tensors[name]:
            raise RunError(f"{where}: damaged: {name} is not what the ticket tells")
    if len(tensors) > len(file.tensors):
        raise RunError(f"{where}: damaged: it holds tensors that the ticket does not tell of")
    return {name: tensors[name] for name in file.tensors}
