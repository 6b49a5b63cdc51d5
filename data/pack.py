"""Packs image files into WebDataset shards that train as the files themselves do, bit for bit.

A target is taken by writing its plan; each shard is written whole, with a note of what is in it;
`pack.json` comes last, and says that all is there. A pack that was interrupted goes on with the
shards that are missing. What it writes is a pure function of the source and the options.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.catalogue import Catalogue, Manifest, Names, Progress, silent
from data.cataloguing import PACKED_INDEX, make_catalogue
from data.errors import RunError, UserError
from data.files import Folder
from data.layout import PACKED, UNFINISHED
from data.pack_plan import (
    PLAN,
    Document,
    Shard,
    begun_plan,
    check_images,
    check_places,
    class_lines,
    is_whole,
    new_plan,
    plan_shards,
    require_same,
    require_shards,
)
from data.pack_shard import DEFAULTS, PackedShard, PackOptions, ShardTask, write_shard
from data.record import record_of_files
from data.workers import Crashed, in_workers

_SOURCE = f"{UNFINISHED}/source.safetensors"
"""what is known of the source's headers, for a pack that goes on"""
_KEY_DIGITS = 8


class PackedSplit(NamedTuple):
    """What became of a split: the bytes are those of the images before, of the shards after."""

    num_images: int
    num_shards: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Packed:
    """A packed data set, and how many of its images this call has written."""

    splits: dict[str, PackedSplit]
    num_written: int
    was_whole: bool
    """there was nothing to do"""


def pack(
    kind: str,
    root: str,
    target: Folder,
    options: PackOptions = DEFAULTS,
    *,
    num_workers: int | None = None,
    progress: Progress = silent,
) -> Packed:
    """Packs a source into `target`, or what is left of it to pack.

    Raises `UserError` where there is nothing to pack, where images are bad, and where the target
    holds something else; `RunError` where a worker died; `OSError`.
    """
    check_places(kind, root, target)
    if num_workers is not None and num_workers < 1:
        raise UserError(f"--workers {num_workers}: must be at least 1")
    plan, begun = new_plan(options), begun_plan(target)
    if begun is not None:
        require_same(target, begun, plan)  # before the source is read, which takes its time
    kept = target.read(_SOURCE) if target.exists(_SOURCE) else None
    catalogue = make_catalogue(kind, root, kept=kept, progress=progress)
    check_images(catalogue)
    plan["source"] = record_of_files(kind, catalogue)
    if begun is not None:
        require_same(target, begun, plan)
    work = _Work(catalogue, plan_shards(catalogue, options.shard_size), options, target)
    if begun is not None and is_whole(begun):
        require_shards(target, [shard.name for shard in work.shards])
        target.remove(UNFINISHED)  # left there if a process was killed after its last word
        return Packed(_summary(catalogue, begun), num_written=0, was_whole=True)
    work.begin(plan)
    known = work.known_shards()
    written = work.write_shards(known, num_workers, progress)
    whole = work.end(plan, known | written)
    num_written = sum(len(shard.names) for shard in written.values())
    return Packed(_summary(catalogue, whole), num_written, was_whole=False)


@dataclass(frozen=True)
class _Work:
    """What is to be packed, and the steps of doing so."""

    catalogue: Catalogue
    shards: list[Shard]
    options: PackOptions
    target: Folder

    def begin(self, plan: Document) -> None:
        """Takes the target."""
        class_lines(self.catalogue)
        (self.target / UNFINISHED).make()
        self.target.write_json(PLAN, plan)
        self.target.write(_SOURCE, self.catalogue.to_bytes())

    def known_shards(self) -> dict[str, PackedShard]:
        """The shards that are there already, by the notes that were written after them."""
        notes, names = set((self.target / UNFINISHED).names()), set(self.target.names())
        known = {}
        for shard in self.shards:
            note = f"{shard.name}.json"
            if note not in notes or shard.name not in names:
                continue
            with contextlib.suppress(ValueError):  # a damaged note: the shard is written again
                document = self.target.read_json(f"{UNFINISHED}/{note}")
                packed = PackedShard.from_document(document, len(shard.rows))
                if packed.num_bytes == self.target.stat(shard.name)[0]:
                    known[shard.name] = packed
        return known

    def write_shards(
        self, known: Mapping[str, PackedShard], num_workers: int | None, progress: Progress
    ) -> dict[str, PackedShard]:
        """Writes the shards that are not known, in workers."""
        missing = [shard for shard in self.shards if shard.name not in known]
        total = sum(len(shard.rows) for shard in self.shards)
        done = total - sum(len(shard.rows) for shard in missing)
        progress("packing images", done, total)
        written: dict[str, PackedShard] = {}
        with _scratch(self.target) as scratch:
            tasks = _Tasks(self, missing, scratch)
            for index, outcome in in_workers(write_shard, tasks, num_workers=num_workers):
                name = missing[index].name
                if isinstance(outcome, Crashed):
                    raise RunError(
                        f"{self.target}/{name}: the process that wrote it died ({outcome}); run "
                        "the same command again, with fewer --workers if memory ran out"
                    )
                written[name] = outcome
                done += len(missing[index].rows)
                progress("packing images", done, total)
        return written

    def end(self, plan: Document, packed: Mapping[str, PackedShard]) -> Document:
        """Writes what belongs to the shards; what it gives is in `pack.json`, the last of it."""
        whole = plan | {"shards": [_entry(shard, packed[shard.name]) for shard in self.shards]}
        index = _index(self.catalogue, self.shards, packed)
        self.target.write("classes.txt", class_lines(self.catalogue))
        self.target.write(PACKED_INDEX, index.to_bytes())
        self.target.write_json(PACKED, whole)
        self.target.remove(UNFINISHED)
        return whole


# Tasks -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _scratch(target: Folder) -> Iterator[str]:
    """A local folder for shards while they are written: on the target's disk if that is local."""
    if target.is_local:
        yield (target / UNFINISHED).location
        return
    with tempfile.TemporaryDirectory(prefix="tombola-pack-") as folder:
        yield folder


class _Tasks(Sequence[ShardTask]):
    """The tasks of shards, each made when a worker gets it."""

    def __init__(self, work: _Work, shards: Sequence[Shard], scratch: str) -> None:
        self._work, self._shards, self._scratch = work, shards, scratch

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, index: int) -> ShardTask:  # type: ignore[override]
        (name, split, rows), work = self._shards[index], self._work
        return ShardTask(
            source=Folder(work.catalogue.root).location,
            images=_part(work.catalogue.splits[split], rows),
            keys=[f"{row:0{_KEY_DIGITS}d}" for row in rows.tolist()],
            options=work.options,
            target=work.target.location,
            name=name,
            scratch=self._scratch,
        )


def _part(manifest: Manifest, rows: NDArray[np.int64]) -> Manifest:
    """Some images of a manifest, numbered anew in the order of `rows`."""
    of_images = ("labels", "shapes", "num_bytes", "problems", "offsets", "file_of")
    part = replace(
        manifest,
        names=Names.of(manifest.names[row] for row in rows.tolist()),
        **{name: getattr(manifest, name)[rows] for name in of_images},
    )
    if manifest.in_shards:
        return part
    return replace(
        part,
        files=part.names,
        file_of=np.arange(len(rows), dtype=np.int32),
        file_bytes=manifest.file_bytes[rows],
        file_times=manifest.file_times[rows],
    )


# What is written beside the shards -------------------------------------------------------


def _index(
    catalogue: Catalogue, shards: Sequence[Shard], packed: Mapping[str, PackedShard]
) -> Catalogue:
    """The catalogue that an indexing of the shards would find, but for their times."""
    splits = {
        split: _packed_manifest(manifest, [(s, packed[s.name]) for s in shards if s.split == split])
        for split, manifest in catalogue.splits.items()
    }
    return Catalogue("", catalogue.classes, splits)


def _packed_manifest(manifest: Manifest, shards: Sequence[tuple[Shard, PackedShard]]) -> Manifest:
    """The images in the order of their keys, which is that of the source."""
    num_images = len(manifest)
    names = [""] * num_images
    num_bytes, offsets = np.zeros(num_images, np.int64), np.zeros(num_images, np.int64)
    shapes, file_of = np.zeros((num_images, 2), np.int32), np.zeros(num_images, np.int32)
    for index, (shard, packed) in enumerate(shards):
        for row, name in zip(shard.rows.tolist(), packed.names, strict=True):
            names[row] = name
        num_bytes[shard.rows], offsets[shard.rows] = packed.sizes, packed.offsets
        shapes[shard.rows], file_of[shard.rows] = packed.shapes, index
    return Manifest(
        names=Names.of(names),
        labels=manifest.labels,
        shapes=shapes,
        num_bytes=num_bytes,
        problems=np.zeros(num_images, np.uint8),
        files=Names.of(shard.name for shard, _ in shards),
        file_bytes=np.array([packed.num_bytes for _, packed in shards], np.int64),
        file_times=np.zeros(len(shards), np.int64),
        file_of=file_of,
        offsets=offsets,
    )


def _entry(shard: Shard, packed: PackedShard) -> Document:
    return {
        "name": shard.name,
        "split": shard.split,
        "sha256": packed.sha256,
        "num_bytes": packed.num_bytes,
        "num_images": len(packed.names),
    }


def _summary(catalogue: Catalogue, document: Document) -> dict[str, PackedSplit]:
    entries = document["shards"]
    sizes = {
        split: [entry["num_bytes"] for entry in entries if entry["split"] == split]
        for split in catalogue.splits
    }
    return {
        split: PackedSplit(
            len(manifest), len(sizes[split]), int(manifest.num_bytes.sum()), sum(sizes[split])
        )
        for split, manifest in catalogue.splits.items()
    }
