"""Bool tensors as one vector of bits, cut into chunks of a fixed size.

Eight weights a byte, the first in the lowest bit, each tensor in row-major order and from a new
byte on, the tensors in the order of their names. So the vector of equal masks is equal wherever
it is made, and any rank can make or read any part of it.
"""

import bisect
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CHUNK_BYTES = 128 << 10
"""1,048,576 weights"""
Shape = tuple[int, ...]


class Packing:
    """Where the bits of tensors of given shapes stand in the vector."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self.shapes = dict(shapes)
        self._names = sorted(self.shapes)
        self._stops: list[int] = []
        stop = 0
        for name in self._names:
            stop += (self.size(name) + 7) // 8
            self._stops.append(stop)
        self.num_bytes = stop
        self.num_chunks = -(-stop // CHUNK_BYTES)

    @classmethod
    def of(cls, masks: Mapping[str, Tensor]) -> "Packing":
        """The packing of these tensors."""
        return cls({name: tuple(mask.shape) for name, mask in masks.items()})

    def size(self, name: str) -> int:
        """How many weights a tensor has."""
        return math.prod(self.shapes[name])

    def span(self, name: str) -> tuple[int, int]:
        """The first byte of a tensor, and the one after its last."""
        place = bisect.bisect_left(self._names, name)
        return (self._stops[place - 1] if place else 0), self._stops[place]

    def chunk_span(self, index: int) -> tuple[int, int]:
        """The first byte of a chunk, and the one after its last."""
        start = index * CHUNK_BYTES
        return start, min(start + CHUNK_BYTES, self.num_bytes)

    def chunks_of(self, start: int, stop: int) -> range:
        """The chunks that hold the bytes `start` to `stop`."""
        return range(start // CHUNK_BYTES, -(-stop // CHUNK_BYTES) if stop > start else 0)

    def pack(self, masks: Mapping[str, Tensor], start: int, stop: int) -> NDArray[np.uint8]:
        """The bytes `start` to `stop` of the vector; only these weights are looked at."""
        packed = np.empty(stop - start, np.uint8)
        for name, first, last in self._pieces(start, stop):
            begin, _ = self.span(name)
            bits = masks[name].contiguous().view(-1)[8 * (first - begin) : 8 * (last - begin)]
            packed[first - start : last - start] = np.packbits(
                bits.cpu().numpy(), bitorder="little"
            )
        return packed

    def unpack(self, packed: NDArray[np.uint8], name: str) -> Tensor:
        """A tensor out of the whole vector. Raises `ValueError` for bits beyond its last weight."""
        start, stop = self.span(name)
        return unpack_bits(packed[start:stop], self.shapes[name])

    def chunk_digests(self, masks: Mapping[str, Tensor]) -> list[str]:
        """The SHA-256 of each chunk."""
        spans = (self.chunk_span(index) for index in range(self.num_chunks))
        return [hashlib.sha256(self.pack(masks, *span).data).hexdigest() for span in spans]

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """The tensors between two bytes: each with the part of it that lies there."""
        place = bisect.bisect_right(self._stops, start)
        while start < stop:
            last = min(stop, self._stops[place])
            if last > start:
                yield self._names[place], start, last
            start, place = last, place + 1


def masks_digest(shapes: Mapping[str, Shape], chunks: list[str]) -> str:
    """The SHA-256 that names masks: over names, shapes and the digests of the chunks."""
    tensors = {name: list(shape) for name, shape in shapes.items()}
    return hashlib.sha256(canonical({"tensors": tensors, "chunks": chunks})).hexdigest()


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
