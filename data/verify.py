"""Checks a source of images one by one, before a training meets what is wrong with them."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from data.arrays import READERS
from data.catalogue import Progress, silent
from data.errors import UserError
from data.files import Folder
from data.inspection import Decode, Flaw, Inspected, Sample, inspect
from data.layout import PACKED, Shards, find_shards, folder_tree, imagenet_tree
from data.shards import Member, index_shard
from data.workers import Crashed, in_workers, num_cpus

KINDS = {
    "empty": "a file of no bytes; training refuses it",
    "unreadable": "the disk or store does not give it; training refuses it",
    "not-an-image": "other data under the name of an image; training refuses it",
    "unsupported": "a format that training does not decode; training refuses it",
    "too-large": "more pixels than Pillow takes for harmless; training refuses it",
    "truncated": "cut off; training refuses it, or stops at it",
    "undecodable": "a header without sound pixels; training stops at it, or replaces it",
    "crash": "ends the process that decodes it, and with it the training",
    "grayscale": "trains, with three equal channels",
    "cmyk": "trains, converted to RGB by the decoder's own rule",
    "misnamed": "trains, as what it is; other tools may go by its extension",
    "orientation": "trains as its pixels are stored, not turned as viewers show it",
    "duplicate": "counts twice; across classes a label is wrong, across splits a test is seen",
    "empty-class": "an output that no image trains or tests",
    "shard": "samples of the shard are missing; training refuses it, or goes on without them",
    "checksum": "not the shard that was packed; its images may be others",
}
"""kinds of findings, and what each means for training"""


class Finding(NamedTuple):
    """Something that is wrong with an image, a class or a shard."""

    split: str
    class_name: str
    image: str
    kind: str
    detail: str


@dataclass(frozen=True)
class Report:
    """What was looked at, and what was found, in the order of splits and images."""

    num_images: int
    num_ignored: int
    """files in the folders of classes that are not named as images"""
    findings: list[Finding]


@dataclass(frozen=True)
class _Source:
    """Samples in the order of their splits; `findings` are of what had to be read to list them."""

    root: str
    classes: tuple[str, ...]
    splits: list[str]
    samples: Sequence[Sample]
    findings: Sequence[Finding] = ()
    num_ignored: int = 0

    def class_name(self, sample: Sample) -> str:
        known = sample.label < len(self.classes)
        return self.classes[sample.label] if known else str(sample.label)


def verify(
    kind: str,
    place: str,
    *,
    decode: Decode | None,
    num_workers: int | None = None,
    progress: Progress = silent,
) -> Report:
    """Reads every image of a source, and decodes those that are files, in worker processes.

    `decode`, found by its name in a module, decodes again what Pillow could. Raises `UserError`
    where the source is not what its kind says, or has no images.
    """
    workers = num_cpus() if num_workers is None else num_workers
    if workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    if kind in READERS:
        source, inspected = _of_arrays(kind, place)
    else:
        is_shards = kind == "webdataset"
        source = _of_shards(place, workers, progress) if is_shards else _of_tree(kind, place)
        inspected = _inspected(source, decode, workers, progress)
    findings = [*source.findings, *_empty_classes(source), *_of_images(source, inspected)]
    if not source.samples and not findings:
        raise UserError(f"{place}: holds no images")
    return Report(len(source.samples), source.num_ignored, findings)


def _inspected(
    source: _Source, decode: Decode | None, num_workers: int, progress: Progress
) -> list[Inspected]:
    num, results = len(source.samples), dict[int, Inspected]()
    found = inspect(source.root, source.samples, decode=decode, num_workers=num_workers)
    for index, one in found:
        results[index] = one
        progress("checking images", len(results), num)
    assert len(results) == num, f"{num - len(results)} images were not looked at"
    return [results[index] for index in range(num)]


def _empty_classes(source: _Source) -> Iterator[Finding]:
    filled = {(sample.split, sample.label) for sample in source.samples}
    for split in source.splits:
        for label, name in enumerate(source.classes):
            if (split, label) not in filled:
                yield Finding(split, name, "", "empty-class", "no images")


def _of_images(source: _Source, inspected: Sequence[Inspected]) -> Iterator[Finding]:
    first_of: dict[bytes, Sample] = {}
    for sample, (flaws, digest) in zip(source.samples, inspected, strict=True):
        copies: list[Flaw] = []
        if digest is not None:
            first = first_of.setdefault(digest, sample)
            if first is not sample:
                copies = [("duplicate", _compared(source, sample, first))]
        for kind, detail in (*flaws, *copies):
            yield Finding(sample.split, source.class_name(sample), sample.where, kind, detail)


def _compared(source: _Source, sample: Sample, first: Sample) -> str:
    others = []
    if first.label != sample.label:
        others.append(f"in another class, {source.class_name(first)!r}")
    if first.split != sample.split:
        others.append(f"in another split, {first.split!r}")
    return ", ".join((f"same bytes as {first.where}", *others))


# What there is to check ------------------------------------------------------------------


def _of_arrays(kind: str, place: str) -> tuple[_Source, list[Inspected]]:
    arrays = READERS[kind](place)
    splits = {"train": arrays.train, "validation": arrays.validation, "test": arrays.test}
    samples, inspected = [], []
    for name, split in splits.items():
        for index, label in enumerate(split.labels.tolist() if split else ()):
            assert split is not None
            samples.append(Sample(name, label, f"{name}[{index}]"))
            digest = hashlib.sha256(split.images[index].tobytes()).digest()
            inspected.append(Inspected([], digest))
    names = [name for name, split in splits.items() if split is not None]
    return _Source(place, arrays.classes, names, samples), inspected


def _of_tree(kind: str, place: str) -> _Source:
    tree = imagenet_tree(place) if kind == "imagenet" else folder_tree(place, flat_split="train")
    splits = list(tree.splits)
    samples = [
        Sample(split, label, entry.name)
        for split in splits
        for entry, label in zip(tree.splits[split].entries, tree.splits[split].labels, strict=True)
    ]
    return _Source(str(tree.root), tree.classes, splits, samples, num_ignored=tree.ignored)


# Shards ----------------------------------------------------------------------------------


class ReadShard(NamedTuple):
    """A shard as a worker read it: its samples, its SHA-256, and what is wrong with it."""

    members: list[Member]
    sha256: str
    damage: str


def read_shard(task: tuple[str, str]) -> ReadShard:
    """Reads the shard `(folder URL, name)` whole: never raises for what is in it."""
    folder, name = Folder(task[0]), task[1]
    digest = ""
    try:
        digest = folder.digest(name)
        return ReadShard(index_shard(task), digest, "")
    except UserError as error:
        return ReadShard([], digest, str(error).removeprefix(f"{folder}/{name}: "))
    except OSError as error:
        return ReadShard([], digest, error.strerror or str(error))


def _of_shards(place: str, num_workers: int, progress: Progress) -> _Source:
    shards = find_shards(place)
    names = [(split, name) for split in shards.splits for name in shards.splits[split]]
    tasks = [(shards.folder.url, name) for _, name in names]
    results: dict[int, ReadShard] = {}
    for index, one in in_workers(read_shard, tasks, num_workers=num_workers):
        results[index] = ReadShard([], "", f"{one}") if isinstance(one, Crashed) else one
        progress("reading shards", len(results), len(names))
    read = [results[index] for index in range(len(names))]
    samples = [
        Sample(split, member.label, member.name, name, member.offset, member.num_bytes)
        for (split, name), shard in zip(names, read, strict=True)
        for member in shard.members
    ]
    packed = _packed(shards.folder)
    findings = [
        Finding(split, "", name, kind, detail)
        for (split, name), shard in zip(names, read, strict=True)
        for kind, detail in _shard_flaws(name, shard, packed)
    ]
    lost = packed.keys() - {name for _, name in names}
    findings += [
        Finding(packed[name][0], "", name, "checksum", f"{PACKED} lists it, and it is not here")
        for name in sorted(lost)
    ]
    classes = _shard_classes(shards, samples)
    return _Source(shards.folder.url, classes, list(shards.splits), samples, findings)


def _shard_flaws(name: str, shard: ReadShard, packed: dict[str, tuple[str, str]]) -> Iterator[Flaw]:
    if shard.damage:
        yield "shard", shard.damage
    if packed and name not in packed:
        yield "checksum", f"{PACKED} does not list it"
    elif packed and shard.sha256 and shard.sha256 != packed[name][1]:
        was = packed[name][1][:16]
        yield "checksum", f"its SHA-256 is {shard.sha256[:16]}..., and was {was}... when packed"


def _packed(folder: Folder) -> dict[str, tuple[str, str]]:
    """Split and SHA-256 of each shard as it was packed; none where others made the shards."""
    if not folder.exists(PACKED):
        return {}
    try:
        entries = folder.read_json(PACKED)["shards"]
        return {str(e["name"]): (str(e["split"]), str(e["sha256"])) for e in entries}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}/{PACKED}: is not what `tombola data pack` writes ({error})"
        ) from None


def _shard_classes(shards: Shards, samples: Sequence[Sample]) -> tuple[str, ...]:
    most = max((sample.label for sample in samples), default=-1)
    if shards.classes is None:
        return tuple(str(label) for label in range(most + 1))
    if most >= len(shards.classes):
        raise UserError(
            f"{shards.folder}: a label is {most}, and there are {len(shards.classes)} classes"
        )
    return shards.classes
