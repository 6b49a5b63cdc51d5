"""Masks in objects: bit-packed, compressed chunk by chunk, written and read by many ranks.

Some chunks make a shard, an object of its own: which ones does not depend on how many ranks
write, so equal masks are stored once. Each rank writes its share of the shards, and reads
its share, or only the byte ranges of the weights that it needs.
"""

import hashlib
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
import torch
import zstandard
from torch import Tensor

from data.errors import RunError
from pruning import document
from pruning.masks import LayerDensity, Masks
from pruning.objects import Objects, require_memory
from pruning.packing import CHUNK_BYTES, SHARD_BYTES, Packing, Shape, unpack_bits
from train.ranks import ALONE, Ranks

_MOST_BYTES = 2 * SHARD_BYTES
"""of a shard: incompressible, with its header"""
_LEVEL = 1


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
    """SHA-256 of the bits of each chunk"""
    shards: tuple[Shard, ...]

    @cached_property
    def packing(self) -> Packing:
        """How the bits lie in chunks and shards."""
        return Packing(self.shapes)

    @cached_property
    def digest(self) -> str:
        """As `Masks.digest`."""
        return self.packing.digest(self.chunks)

    @property
    def num_kept(self) -> int:
        """Weights that are kept."""
        return sum(self.kept.values())

    @property
    def size(self) -> int:
        """Weights that could be pruned."""
        return sum(map(self.packing.size, self.shapes))

    def table(self) -> list[LayerDensity]:
        """As `Masks.table`."""
        return [
            LayerDensity(name, shape, self.kept[name], self.packing.size(name))
            for name, shape in self.shapes.items()
        ]

    @property
    def objects(self) -> dict[str, int]:
        """The digests of the objects that hold them, with their bytes."""
        return {shard.sha256: shard.num_bytes for shard in self.shards}

    def to_json(self) -> dict[str, Any]:
        """Their part of a ticket's index."""
        return {
            "tensors": {
                name: {
                    "shape": list(shape),
                    "kept": self.kept[name],
                    "chunks": [self.chunks[i] for i in self.packing.chunks_of(name)],
                }
                for name, shape in self.shapes.items()
            },
            "shards": [asdict(shard) for shard in self.shards],
        }

    @classmethod
    def from_json(cls, value: Any) -> "StoredMasks":
        """Raises `ValueError` or `KeyError` where it is not what `to_json` gives."""
        fields = document.mapping(value, "masks")
        rows = document.table(document.mapping, fields["tensors"], "masks.tensors")
        shapes = {name: document.shape(row["shape"], name) for name, row in rows.items()}
        kept = {
            name: document.count(row["kept"], name, math.prod(shapes[name]))
            for name, row in rows.items()
        }
        chunks = {name: document.digests(row["chunks"], name) for name, row in rows.items()}
        shards = tuple(map(_shard, document.sequence(fields["shards"], "shards")))
        in_order = tuple(chunk for name in sorted(chunks) for chunk in chunks[name])
        for name, found in chunks.items():  # before anything of that length is made
            needed = -(-math.prod(shapes[name]) // (8 * CHUNK_BYTES))
            if len(found) != needed:
                raise ValueError(f"{name} has {len(found)} chunks instead of {needed}")
        stored = cls(shapes, kept, in_order, shards)
        if [len(s.chunks) for s in shards] != [len(r) for r in stored.packing.shards]:
            raise ValueError("the shards do not hold each chunk once")
        return stored


def _shard(value: Any) -> Shard:
    fields = document.mapping(value, "a shard")
    num_bytes = document.count(fields["num_bytes"], "the bytes of a shard", _MOST_BYTES)
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
    shards = packing.shards

    def write() -> list[_Written]:
        own = shards[ranks.rank :: ranks.world_size]
        return [_write_shard(objects, masks, packing, chunks) for chunks in own]

    written = ranks.together(write)
    in_order = [written[i % ranks.world_size][i // ranks.world_size] for i in range(len(shards))]
    kept = dict.fromkeys(masks, 0)
    for chunk, num in zip(packing.chunks, (n for one in in_order for n in one.kept), strict=True):
        kept[chunk.name] += num
    digests = (digest for one in in_order for digest in one.digests)
    return StoredMasks(packing.shapes, kept, tuple(digests), tuple(one.shard for one in in_order))


class _Written(NamedTuple):
    """A shard, and what it holds chunk by chunk."""

    shard: Shard
    digests: list[str]
    kept: list[int]


def _write_shard(objects: Objects, masks: Masks, packing: Packing, chunks: range) -> _Written:
    compressor = zstandard.ZstdCompressor(level=_LEVEL)
    digests, kept, parts = [], [], {}
    for place, chunk in enumerate(chunks):
        packed = packing.pack(masks, chunk)
        digests.append(hashlib.sha256(packed.data).hexdigest())
        kept.append(int(np.bitwise_count(packed).sum()))
        parts[f"{place:03d}"] = np.frombuffer(compressor.compress(packed.data), np.uint8)
    content = safetensors.numpy.save(parts, {"format": "tombola-masks"})
    offset = len(content) - sum(map(len, parts.values()))
    places = []
    for part in parts.values():
        places.append((offset, len(part)))
        offset += len(part)
    return _Written(Shard(objects.put(content), len(content), tuple(places)), digests, kept)


# Reading ------------------------------------------------------------------------------------


def read_masks(objects: Objects, stored: StoredMasks, ranks: Ranks = ALONE) -> Masks:
    """The masks, on every rank; each reads its share of the shards, and they tell one another.

    Raises `RunError` naming the object that is missing or damaged, or where they do not fit into
    this machine's memory.
    """
    packing = stored.packing

    def read() -> list[dict[int, bytes]]:
        require_memory(stored.size, f"masks of {stored.size:,} weights take as many bytes")
        own = range(ranks.rank, len(stored.shards), ranks.world_size)
        with ThreadPoolExecutor(objects.num_threads) as pool:
            return list(pool.map(lambda index: _read_shard(objects, stored, index), own))

    bits = {i: part for by in ranks.together(read) for shard in by for i, part in shard.items()}
    packed = np.frombuffer(b"".join(bits[i] for i in range(len(packing.chunks))), np.uint8)
    # All in one array, for which NumPy takes large pages: a third of the time of many.
    flat = torch.from_numpy(np.unpackbits(packed, bitorder="little").view(np.bool_))
    masks: dict[str, Tensor] = {}
    for name, shape in stored.shapes.items():
        start, num_bytes, size = packing.start(name), packing.num_bytes(name), packing.size(name)
        if np.bitwise_count(packed[start : start + num_bytes]).sum() != stored.kept[name]:
            raise RunError(f"{objects.folder}: damaged masks: {name} does not keep what is told")
        if flat[8 * start + size : 8 * (start + num_bytes)].any():
            raise RunError(f"{objects.folder}: damaged masks: {name}: bits beyond the last weight")
        masks[name] = flat[8 * start : 8 * start + size].view(shape)
    return Masks(masks)


def read_part(
    objects: Objects, stored: StoredMasks, wanted: Mapping[str, tuple[int, int]]
) -> dict[str, Tensor]:
    """Of each wanted tensor the weights `start` to `stop` in row-major order, as flat bool tensors.

    Reads the byte ranges of the chunks that hold them, and nothing else. Raises `ValueError` for
    what is not in the masks, and `RunError` as `read_masks` does.
    """
    packing = stored.packing
    chunks: dict[str, range] = {}
    for name, (start, stop) in wanted.items():
        if name not in stored.shapes or not 0 <= start <= stop <= packing.size(name):
            raise ValueError(f"no weights {start} to {stop} of {name} in these masks")
        chunks[name] = packing.chunks_of(name, start // 8, (stop + 7) // 8 if stop > start else 0)
    needed = {chunk for found in chunks.values() for chunk in found}
    bits: dict[int, bytes] = {}
    for index, shard in enumerate(packing.shards):
        if not needed.isdisjoint(shard):
            bits |= _read_shard(objects, stored, index, needed)
    found: dict[str, Tensor] = {}
    for name, (start, stop) in wanted.items():
        packed = b"".join(bits[chunk] for chunk in chunks[name])
        first = 8 * packing.chunks[chunks[name][0]].start if chunks[name] else start
        found[name] = unpack_bits(packed, (8 * len(packed),))[start - first : stop - first]
    return found


def _read_shard(
    objects: Objects, stored: StoredMasks, index: int, needed: set[int] | None = None
) -> dict[int, bytes]:
    """The bits of a shard's chunks by their numbers, verified: all, or those that are needed."""
    shard, where = stored.shards[index], objects.file(stored.shards[index].sha256)
    places = dict(zip(stored.packing.shards[index], shard.chunks, strict=True))
    if needed is None:
        content = objects.get(shard.sha256, shard.num_bytes)
        parts = [content[offset : offset + length] for offset, length in places.values()]
    else:
        places = {number: place for number, place in places.items() if number in needed}
        parts = objects.get_ranges(shard.sha256, list(places.values()))
    return {
        number: _unpacked(stored, number, part, where)
        for number, part in zip(places, parts, strict=True)
    }


def _unpacked(stored: StoredMasks, number: int, compressed: bytes, where: str) -> bytes:
    """The bits of a chunk. Nothing longer than they must be is ever decompressed."""
    name, start, stop = stored.packing.chunks[number]
    try:
        if zstandard.get_frame_parameters(compressed).content_size != stop - start:
            raise ValueError("of another length")
        packed = zstandard.ZstdDecompressor().decompress(compressed, stop - start)
        if hashlib.sha256(packed).hexdigest() != stored.chunks[number]:
            raise ValueError("its bits do not match their digest")
    except (ValueError, zstandard.ZstdError) as error:
        raise RunError(f"{where}: damaged: a chunk of {name}: {error}") from error
    return bytes(packed)
