"""Bool tensors as bits, each tensor cut into chunks of a fixed size.

Eight weights a byte, the first in the lowest bit, in row-major order; a tensor's chunks hold no
other tensor's bits. What a chunk holds depends on nothing but the mask: any rank can make or read
any of them, and equal masks have equal chunks wherever they are made.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CHUNK_BYTES = 128 << 10
"""1,048,576 weights"""
SHARD_BYTES = 8 * CHUNK_BYTES
SHARD_CHUNKS = 256
Shape = tuple[int, ...]


class Chunk(NamedTuple):
    """A part of a tensor's packed bits."""

    name: str
    start: int
    """the first byte"""
    stop: int
    """the byte after the last"""


class Packing:
    """How the bits of tensors of given shapes are cut."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self.shapes = dict(shapes)
        self.chunks: list[Chunk] = []
        """by the names of the tensors, then by their place in it"""
        self._first: dict[str, int] = {}
        self._starts: dict[str, int] = {}
        total = 0
        for name in sorted(self.shapes):
            self._first[name], self._starts[name] = len(self.chunks), total
            num_bytes = self.num_bytes(name)
            total += num_bytes
            for start in range(0, num_bytes, CHUNK_BYTES):
                self.chunks.append(Chunk(name, start, min(start + CHUNK_BYTES, num_bytes)))

    @classmethod
    def of(cls, masks: Mapping[str, Tensor]) -> "Packing":
        """The packing of these tensors."""
        return cls({name: tuple(mask.shape) for name, mask in masks.items()})

    def size(self, name: str) -> int:
        """How many weights a tensor has."""
        return math.prod(self.shapes[name])

    def num_bytes(self, name: str) -> int:
        """How many bytes its bits take."""
        return (self.size(name) + 7) // 8

    def start(self, name: str) -> int:
        """How many bytes stand before those of a tensor, by the order of the names."""
        return self._starts[name]

    def chunks_of(self, name: str, start: int = 0, stop: int | None = None) -> range:
        """The numbers of the chunks that hold the bytes `start` to `stop` of a tensor."""
        stop = self.num_bytes(name) if stop is None else stop
        if stop <= start:
            return range(0)
        first = self._first[name]
        return range(first + start // CHUNK_BYTES, first - (-stop // CHUNK_BYTES))

    @cached_property
    def shards(self) -> list[range]:
        """Which chunks lie in one file: until it holds `SHARD_BYTES` or `SHARD_CHUNKS`."""
        shards: list[range] = []
        first, num_bytes = 0, 0
        for index, chunk in enumerate(self.chunks):
            length = chunk.stop - chunk.start
            if num_bytes + length > SHARD_BYTES or index - first == SHARD_CHUNKS:
                shards.append(range(first, index))
                first, num_bytes = index, 0
            num_bytes += length
        return shards + ([range(first, len(self.chunks))] if self.chunks else [])

    def pack(self, masks: Mapping[str, Tensor], index: int) -> NDArray[np.uint8]:
        """The bits of a chunk; only these weights are looked at."""
        name, start, stop = self.chunks[index]
        bits = masks[name].contiguous().view(-1)[8 * start : 8 * stop]
        return np.packbits(bits.cpu().numpy(), bitorder="little")

    def digests(self, masks: Mapping[str, Tensor]) -> list[str]:
        """The SHA-256 of each chunk."""
        numbers = range(len(self.chunks))
        return [hashlib.sha256(self.pack(masks, index).data).hexdigest() for index in numbers]

    def digest(self, chunks: Sequence[str]) -> str:
        """The SHA-256 that names masks, by the digests of their chunks."""
        tensors = {
            name: {"shape": list(shape), "chunks": [chunks[i] for i in self.chunks_of(name)]}
            for name, shape in self.shapes.items()
        }
        return hashlib.sha256(canonical(tensors)).hexdigest()


def canonical(document: Any) -> bytes:
    """A JSON document in the one form that is hashed: sorted keys, no spaces, ASCII."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def pack_bits(mask: Tensor) -> bytes:
    """Eight weights a byte, the first in the lowest bit, in row-major order."""
    return np.packbits(mask.cpu().contiguous().numpy(), axis=None, bitorder="little").tobytes()


def unpack_bits(packed: bytes | NDArray[np.uint8], shape: Shape) -> Tensor:
    """The inverse of `pack_bits`. Raises `ValueError` for a wrong length or stray bits."""
    count = math.prod(shape)
    data = np.frombuffer(packed, np.uint8)
    if len(data) != (count + 7) // 8:
        raise ValueError(f"{len(data)} bytes for {count} weights")
    if count % 8 and data[-1] >> count % 8:
        raise ValueError("bits beyond the last weight")
    bits = np.unpackbits(data, count=count, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).view(shape)
