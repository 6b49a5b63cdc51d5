"""Makes a catalogue of a source, or brings a kept one up to date."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.catalogue import Catalogue, Manifest, Names, Progress, silent
from data.errors import RunError, UserError
from data.files import Folder
from data.layout import Listing, Shards, Tree, find_shards, folder_tree, imagenet_tree
from data.scan import PROBLEMS, Header, scan_path
from data.shards import Member, index_shard
from data.workers import Crashed, in_workers

PACKED_INDEX = "index.safetensors"
"""a packed data set's own catalogue, beside its shards"""
_CHUNK = 512


def cache_name(kind: str, root: str) -> str:
    """The file in a cache folder that belongs to a source."""
    place = root if "://" in root else str(Path(root).expanduser().absolute())
    return f"{kind}-{hashlib.sha256(place.encode()).hexdigest()[:12]}.safetensors"


def load_catalogue(content: bytes, kind: str, root: str) -> Catalogue:
    """The catalogue of a source from the bytes in its cache. Raises `ValueError`."""
    place = Folder(root).location if kind == "webdataset" else str(Path(root).expanduser())
    return Catalogue.from_bytes(content, place)


def make_catalogue(
    kind: str,
    root: str,
    *,
    kept: bytes | None = None,
    progress: Progress = silent,
    flat_split: str | None = None,
) -> Catalogue:
    """Lists the images of a source, and scans the headers that `kept` does not know already.

    `kept` is an earlier catalogue's `to_bytes`; one that cannot be read is done without. Raises
    `UserError` where the source is not what its kind says.
    """
    old = None
    if kept is not None:
        try:
            old = load_catalogue(kept, kind, root)
        except ValueError:
            old = None
    if kind == "webdataset":
        return _of_shards(find_shards(root), old, progress)
    tree = imagenet_tree(root) if kind == "imagenet" else folder_tree(root, flat_split=flat_split)
    return _of_tree(tree, old, progress)


# Files -----------------------------------------------------------------------------------


def _of_tree(tree: Tree, old: Catalogue | None, progress: Progress) -> Catalogue:
    splits = {
        split: _tree_manifest(tree.root, listing, old.splits.get(split) if old else None, progress)
        for split, listing in tree.splits.items()
    }
    return Catalogue(str(tree.root), tree.classes, splits)


def _tree_manifest(
    root: Path, listing: Listing, old: Manifest | None, progress: Progress
) -> Manifest:
    names = Names.of(entry.name for entry in listing.entries)
    num_bytes = np.array([entry.num_bytes for entry in listing.entries], np.int64)
    times = np.array([entry.time for entry in listing.entries], np.int64)
    shapes, problems, known = _known_headers(names, num_bytes, times, old)
    unknown = np.flatnonzero(~known)
    for rows, headers in _scan(root, names, unknown, progress):
        shapes[rows] = [(header.width, header.height) for header in headers]
        problems[rows] = [header.problem for header in headers]
    return Manifest(
        names=names,
        labels=np.array(listing.labels, np.int64),
        shapes=shapes,
        num_bytes=num_bytes,
        problems=problems,
        files=names,
        file_bytes=num_bytes,
        file_times=times,
        file_of=np.arange(len(names), dtype=np.int32),
        offsets=np.zeros(len(names), np.int64),
    )


def _known_headers(
    names: Names, num_bytes: NDArray[np.int64], times: NDArray[np.int64], old: Manifest | None
) -> tuple[NDArray[np.int32], NDArray[np.uint8], NDArray[np.bool_]]:
    """Shapes and problems of the files that are as `old` saw them, and which those are."""
    shapes = np.zeros((len(names), 2), np.int32)
    problems = np.zeros(len(names), np.uint8)
    if old is None or old.in_shards:
        return shapes, problems, np.zeros(len(names), np.bool_)
    row_of = {old.names.raw(row): row for row in range(len(old))}
    rows = np.array([row_of.get(names.raw(i), -1) for i in range(len(names))], np.int64)
    known = rows >= 0
    same_size = old.num_bytes[rows[known]] == num_bytes[known]
    known[known] = same_size & (old.file_times[rows[known]] == times[known])
    # What could not be read may be readable now, and is as it was by size and time.
    known[known] = old.problems[rows[known]] != PROBLEMS.index("unreadable")
    shapes[known], problems[known] = old.shapes[rows[known]], old.problems[rows[known]]
    return shapes, problems, known


def _scan(
    root: Path, names: Names, rows: NDArray[np.int64], progress: Progress
) -> Iterator[tuple[NDArray[np.int64], list[Header]]]:
    chunks = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
    paths = [[f"{root}/{names[row]}" for row in chunk.tolist()] for chunk in chunks]
    if len(chunks) <= 1:  # not worth starting workers
        yield from zip(chunks, map(scan_paths, paths), strict=True)
        return
    done = 0
    for index, headers in in_workers(scan_paths, paths):
        if isinstance(headers, Crashed):
            raise RunError(
                f"a process reading {paths[index][0]} and the files after it died ({headers}); a "
                "script of your own needs `if __name__ == '__main__':` around what it does"
            )
        yield chunks[index], headers
        done += len(chunks[index])
        progress("reading headers", done, len(rows))


def scan_paths(paths: list[str]) -> list[Header]:
    """The header of each file."""
    return [scan_path(path) for path in paths]


# Shards ----------------------------------------------------------------------------------


def _of_shards(shards: Shards, old: Catalogue | None, progress: Progress) -> Catalogue:
    packed = _packed_index(shards.folder)
    splits = {
        split: _shard_manifest(
            shards.folder,
            names,
            old.splits.get(split) if old else None,
            packed.splits.get(split) if packed else None,
            progress,
        )
        for split, names in shards.splits.items()
    }
    most = max((int(m.labels.max()) for m in splits.values() if len(m)), default=-1)
    classes = shards.classes or (packed.classes if packed else tuple(map(str, range(most + 1))))
    if most >= len(classes):
        raise UserError(f"{shards.folder}: a label is {most}, and there are {len(classes)} classes")
    return Catalogue(shards.folder.location, classes, splits)


def _packed_index(folder: Folder) -> Catalogue | None:
    if not folder.exists(PACKED_INDEX):
        return None
    try:
        return Catalogue.from_bytes(folder.read(PACKED_INDEX), folder.location)
    except ValueError as error:
        raise UserError(f"{folder}/{PACKED_INDEX}: {error}") from None


def _shard_manifest(
    folder: Folder,
    shards: list[str],
    old: Manifest | None,
    packed: Manifest | None,
    progress: Progress,
) -> Manifest:
    facts = [folder.stat(name) for name in shards]
    if old is not None and _facts_of(old) == list(zip(shards, facts, strict=True)):
        return old
    # A copy of a packed data set has other times, and the sizes of what was packed.
    members = {**_known_members(shards, facts, packed, times=False)}
    members |= _known_members(shards, facts, old, times=True)
    unknown = [index for index in range(len(shards)) if index not in members]
    tasks = [(folder.url, shards[index]) for index in unknown]
    for done, (task, found) in enumerate(_index_shards(tasks), 1):
        members[unknown[task]] = found
        progress("indexing shards", done, len(tasks))
    return _joined(shards, facts, members)


def _facts_of(manifest: Manifest) -> list[tuple[str, tuple[int, int]]]:
    """The shards with the sizes and times that a manifest saw."""
    facts = zip(manifest.file_bytes.tolist(), manifest.file_times.tolist(), strict=True)
    return list(zip(manifest.files, facts, strict=True)) if manifest.in_shards else []


def _known_members(
    shards: list[str], facts: list[tuple[int, int]], manifest: Manifest | None, *, times: bool
) -> dict[int, list[Member]]:
    """What `manifest` knows of those shards that have the size, and the time, that it saw."""
    if manifest is None or not manifest.in_shards:
        return {}
    row_of = {name: row for row, name in enumerate(manifest.files)}

    def unchanged(name: str, num_bytes: int, time: int) -> bool:
        row = row_of.get(name)
        if row is None or manifest.file_bytes[row] != num_bytes:
            return False
        return not times or bool(manifest.file_times[row] == time)

    order = np.argsort(manifest.file_of, kind="stable")
    cuts = np.searchsorted(manifest.file_of[order], np.arange(1, len(manifest.files)))
    rows_of = np.split(order, cuts)
    return {
        index: [_member_of(manifest, row) for row in rows_of[row_of[name]].tolist()]
        for index, (name, fact) in enumerate(zip(shards, facts, strict=True))
        if unchanged(name, *fact)
    }


def _member_of(manifest: Manifest, row: int) -> Member:
    return Member(
        manifest.names[row],
        int(manifest.offsets[row]),
        int(manifest.num_bytes[row]),
        int(manifest.labels[row]),
        Header(
            int(manifest.shapes[row, 0]), int(manifest.shapes[row, 1]), int(manifest.problems[row])
        ),
    )


def _index_shards(tasks: list[tuple[str, str]]) -> Iterator[tuple[int, list[Member]]]:
    for index, members in in_workers(index_shard, tasks):
        if isinstance(members, Crashed):
            raise UserError(f"{'/'.join(tasks[index])}: cannot be indexed ({members})")
        yield index, members


def _joined(
    shards: list[str], facts: list[tuple[int, int]], members: dict[int, list[Member]]
) -> Manifest:
    """All samples in the order of their names, whichever shard they are in."""
    rows = sorted(
        (member.name, shard, member) for shard, found in members.items() for member in found
    )
    headers = [member.header for _, _, member in rows]
    return Manifest(
        names=Names.of(name for name, _, _ in rows),
        labels=np.array([member.label for _, _, member in rows], np.int64),
        shapes=np.array([(h.width, h.height) for h in headers], np.int32).reshape(-1, 2),
        num_bytes=np.array([member.num_bytes for _, _, member in rows], np.int64),
        problems=np.array([header.problem for header in headers], np.uint8),
        files=Names.of(shards),
        file_bytes=np.array([size for size, _ in facts], np.int64),
        file_times=np.array([time for _, time in facts], np.int64),
        file_of=np.array([shard for _, shard, _ in rows], np.int32),
        offsets=np.array([member.offset for _, _, member in rows], np.int64),
    )
