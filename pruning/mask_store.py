"""Masks in objects: bit-packed, compressed chunk by chunk, written and read by many ranks.

Eight chunks make a shard, an object of its own: where the bits stand does not depend on how many
ranks write, so equal masks are stored once. Each rank writes its share of the shards, and reads
its share, or only the byte ranges of the weights that it needs.
"""

import hashlib
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import safetensors.numpy
import zstandard
from numpy.typing import NDArray
from torch import Tensor

from data.errors import RunError
from pruning import document
from pruning.masks import Masks
from pruning.objects import Objects, require_memory
from pruning.packing import CHUNK_BYTES, Packing, Shape, masks_digest, unpack_bits
from train.ranks import ALONE, Ranks

CHUNKS_PER_SHARD = 8
_MOST_SHARD_BYTES = 2 * CHUNKS_PER_SHARD * CHUNK_BYTES
_LEVEL = 1
_THREADS = 8


@dataclass(frozen=True)
class Shard:
    """An object with the compressed chunks of a part of the masks."""

    sha256: str
    num_bytes: int
    chunks: tuple[tuple[int, int], ...]
    """offset and length of each in the file"""


@dataclass(frozen=True)
class StoredMasks:
    """Where masks are, and what they must be: their part of a ticket's index."""

    shapes: dict[str, Shape]
    """in layer order"""
    kept: dict[str, int]
    chunks: tuple[str, ...]
    """SHA-256 of each packed chunk"""
    shards: tuple[Shard, ...]

    @cached_property
    def packing(self) -> Packing:
        return Packing(self.shapes)

    @cached_property
    def digest(self) -> str:
        """As `Masks.digest`."""
        return masks_digest(self.shapes, list(self.chunks))

    @property
    def num_kept(self) -> int:
        return sum(self.kept.values())

    @property
    def size(self) -> int:
        return sum(map(self.packing.size, self.shapes))

    def to_json(self) -> dict[str, Any]:
        return {
            "tensors": {
                name: {"shape": list(shape), "kept": self.kept[name]}
                for name, shape in self.shapes.items()
            },
            "chunks": list(self.chunks),
            "shards": [asdict(shard) for shard in self.shards],
        }

    @classmethod
    def from_json(cls, value: Any) -> "StoredMasks":
        """Raises `ValueError` or `KeyError` where it is not what `to_json` gives."""
        fields = document.mapping(value, "masks")
        rows = document.table(document.mapping, fields["tensors"], "masks.tensors")
        shapes = {name: document.shape(row["shape"], name) for name, row in rows.items()}
        stored = cls(
            shapes=shapes,
            kept={
                name: document.count(row["kept"], name, math.prod(shapes[name]))
                for name, row in rows.items()
            },
            chunks=document.digests(fields["chunks"], "a chunk"),
            shards=tuple(map(_shard, document.sequence(fields["shards"], "shards"))),
        )
        num_chunks = stored.packing.num_chunks
        lengths = [len(shard.chunks) for shard in stored.shards]
        full, rest = divmod(num_chunks, CHUNKS_PER_SHARD)
        if len(stored.chunks) != num_chunks or lengths != [CHUNKS_PER_SHARD] * full + [rest] * (
            rest > 0
        ):
            raise ValueError(f"chunks and shards do not fit the shapes, which need {num_chunks}")
        return stored


def _shard(value: Any) -> Shard:
    fields = document.mapping(value, "a shard")
    num_bytes = document.count(fields["num_bytes"], "the bytes of a shard", _MOST_SHARD_BYTES)
    chunks = []
    for pair in document.sequence(fields["chunks"], "the chunks of a shard"):
        offset, length = document.counts(pair, "a chunk's place")
        if offset + length > num_bytes:
            raise ValueError("a chunk lies outside of its shard")
        chunks.append((offset, length))
    return Shard(document.digest(fields["sha256"], "a shard"), num_bytes, tuple(chunks))


# Writing ------------------------------------------------------------------------------------


def write_masks(objects: Objects, masks: Masks, ranks: Ranks = ALONE) -> StoredMasks:
    """Stores masks that all ranks hold, each writing its share of the shards."""
    packing = Packing.of(masks)
    num_shards = -(-packing.num_chunks // CHUNKS_PER_SHARD)

    def write() -> list[tuple[list[str], Shard]]:
        own = range(ranks.rank, num_shards, ranks.world_size)
        return [_write_shard(objects, masks, packing, index) for index in own]

    written = ranks.together(write)
    in_order = [written[i % ranks.world_size][i // ranks.world_size] for i in range(num_shards)]
    return StoredMasks(
        packing.shapes,
        {name: int(mask.sum()) for name, mask in masks.items()},
        tuple(digest for digests, _ in in_order for digest in digests),
        tuple(shard for _, shard in in_order),
    )


def _write_shard(
    objects: Objects, masks: Masks, packing: Packing, index: int
) -> tuple[list[str], Shard]:
    """Writes one shard; gives the digests of its chunks as well."""
    compressor = zstandard.ZstdCompressor(level=_LEVEL)
    digests, parts = [], {}
    first = index * CHUNKS_PER_SHARD
    for chunk in range(first, min(first + CHUNKS_PER_SHARD, packing.num_chunks)):
        packed = packing.pack(masks, *packing.chunk_span(chunk))
        digests.append(hashlib.sha256(packed.data).hexdigest())
        parts[str(chunk - first)] = np.frombuffer(compressor.compress(packed.data), np.uint8)
    content = safetensors.numpy.save(parts, {"format": "tombola-masks"})
    offset = len(content) - sum(map(len, parts.values()))
    places = []
    for part in parts.values():
        places.append((offset, len(part)))
        offset += len(part)
    return digests, Shard(objects.put(content), len(content), tuple(places))


# Reading ------------------------------------------------------------------------------------


def read_masks(objects: Objects, stored: StoredMasks, ranks: Ranks = ALONE) -> Masks:
    """The masks, on every rank; each reads its share of the shards, and they tell one another.

    Raises `RunError` naming the object that is missing or damaged, or where they do not fit into
    this machine's memory.
    """
    packing = stored.packing
    require_memory(stored.size, f"masks of {stored.size:,} weights take as many bytes")

    def read() -> list[bytes]:
        own = range(ranks.rank, len(stored.shards), ranks.world_size)
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(lambda index: _read_shard(objects, stored, index), own))

    read_by = ranks.together(read)
    packed = np.empty(packing.num_bytes, np.uint8)
    for index in range(len(stored.shards)):
        part = read_by[index % ranks.world_size][index // ranks.world_size]
        start, _ = packing.chunk_span(index * CHUNKS_PER_SHARD)
        packed[start : start + len(part)] = np.frombuffer(part, np.uint8)
    try:
        masks = {name: packing.unpack(packed, name) for name in stored.shapes}
    except ValueError as error:
        raise RunError(f"{objects.folder}: damaged masks: {error}") from error
    for name, mask in masks.items():
        if int(mask.sum()) != stored.kept[name]:
            raise RunError(f"{objects.folder}: damaged masks: {name} does not keep what is told")
    return Masks(masks)


def read_part(
    objects: Objects, stored: StoredMasks, wanted: Mapping[str, tuple[int, int]]
) -> dict[str, Tensor]:
    """Of each wanted tensor the weights `start` to `stop` in row-major order, as flat bool tensors.

    Reads the byte ranges of the chunks that hold them, and nothing else. Raises `ValueError` for
    what is not in the masks, and `RunError` as `read_masks` does.
    """
    packing = stored.packing
    spans: dict[str, tuple[int, int]] = {}
    for name, (start, stop) in wanted.items():
        if name not in stored.shapes or not 0 <= start <= stop <= packing.size(name):
            raise ValueError(f"no weights {start} to {stop} of {name} in these masks")
        first, _ = packing.span(name)
        spans[name] = first + start // 8, first + (stop + 7) // 8
    needed = {chunk for span in spans.values() for chunk in packing.chunks_of(*span)}
    chunks: dict[int, NDArray[np.uint8]] = {}
    for index in sorted({chunk // CHUNKS_PER_SHARD for chunk in needed}):
        chunks |= _read_chunks(objects, stored, index, needed)
    found: dict[str, Tensor] = {}
    for name, (start, stop) in wanted.items():
        first, last = spans[name]
        packed = np.empty(last - first, np.uint8)
        for chunk in packing.chunks_of(first, last):
            begin, end = packing.chunk_span(chunk)
            low, high = max(first, begin), min(last, end)
            packed[low - first : high - first] = chunks[chunk][low - begin : high - begin]
        bits = unpack_bits(packed, (8 * len(packed),))
        found[name] = bits[start % 8 : start % 8 + stop - start]
    return found


def _read_shard(objects: Objects, stored: StoredMasks, index: int) -> bytes:
    """The packed bits of a shard: the object is verified, and every chunk."""
    shard = stored.shards[index]
    content = objects.get(shard.sha256, shard.num_bytes)
    parts = [content[offset : offset + length] for offset, length in shard.chunks]
    first = index * CHUNKS_PER_SHARD
    return b"".join(
        _unpacked(objects, stored, first + place, part) for place, part in enumerate(parts)
    )


def _read_chunks(
    objects: Objects, stored: StoredMasks, index: int, needed: set[int]
) -> dict[int, NDArray[np.uint8]]:
    """The chunks of a shard that are needed, by their numbers."""
    shard, first = stored.shards[index], index * CHUNKS_PER_SHARD
    own = [chunk for chunk in range(first, first + len(shard.chunks)) if chunk in needed]
    ranges = [shard.chunks[chunk - first] for chunk in own]
    parts = objects.get_ranges(shard.sha256, ranges)
    return {
        chunk: np.frombuffer(_unpacked(objects, stored, chunk, part), np.uint8)
        for chunk, part in zip(own, parts, strict=True)
    }


def _unpacked(objects: Objects, stored: StoredMasks, chunk: int, compressed: bytes) -> bytes:
    """The bits of a chunk. Nothing longer than they must be is ever decompressed."""
    start, stop = stored.packing.chunk_span(chunk)
    shard = stored.shards[chunk // CHUNKS_PER_SHARD]
    try:
        if zstandard.get_frame_parameters(compressed).content_size != stop - start:
            raise ValueError("of another length")
        packed = zstandard.ZstdDecompressor().decompress(compressed, stop - start)
        if hashlib.sha256(packed).hexdigest() != stored.chunks[chunk]:
            raise ValueError("its bits do not match their digest")
    except (ValueError, zstandard.ZstdError) as error:
        where = objects.file(shard.sha256)
        raise RunError(f"{where}: damaged: chunk {chunk % CHUNKS_PER_SHARD}: {error}") from error
    return bytes(packed)
