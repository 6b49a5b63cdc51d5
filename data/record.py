"""What a run's data are, so that it never goes on with others: classes, counts and digests."""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.arrays import ImageArrays, Split
from data.catalogue import Catalogue, Manifest

Record = dict[str, Any]
"""`source`; `classes` in the order of their labels; `images`: split -> class -> [count, digest];
and of image files the `decoder`, `cpu` or `gpu`"""


def record_of_arrays(kind: str, arrays: ImageArrays) -> Record:
    """The record of a data set in memory: its digests are those of the pixels."""
    splits = {"train": arrays.train, "validation": arrays.validation, "test": arrays.test}

    def of_class(split: Split, label: int) -> list[Any]:
        images = split.images[split.labels == label]
        return [len(images), hashlib.sha256(images.tobytes()).hexdigest()[:16]]

    images = {
        split: {name: of_class(part, label) for label, name in enumerate(arrays.classes)}
        for split, part in splits.items()
        if part is not None
    }
    return {"source": kind, "classes": list(arrays.classes), "images": images}


def record_of_files(kind: str, catalogue: Catalogue) -> Record:
    """The record of image files: its digests are those of their names and sizes."""
    images: dict[str, dict[str, list[Any]]] = {}
    for split, manifest in catalogue.splits.items():
        order = np.argsort(manifest.labels, kind="stable")
        cuts = np.searchsorted(manifest.labels[order], np.arange(1, len(catalogue.classes)))
        images[split] = {
            name: [len(rows), _digest(manifest, rows)]
            for name, rows in zip(catalogue.classes, np.split(order, cuts), strict=True)
        }
    return {"source": kind, "classes": list(catalogue.classes), "images": images}


def _digest(manifest: Manifest, rows: NDArray[np.int64]) -> str:
    digest = hashlib.sha256(b"\0".join(map(manifest.names.raw, rows.tolist())))
    digest.update(manifest.num_bytes[rows].tobytes())
    return digest.hexdigest()[:16]


def described(record: Record) -> str:
    """The record in a line: `imagenet: 1,281,167 train and 50,000 test images of 1,000 classes`."""
    counts = {
        split: sum(count for count, _ in classes.values())
        for split, classes in record["images"].items()
    }
    images = " and ".join(f"{count:,} {split}" for split, count in counts.items())
    return f"{record['source']}: {images} images of {len(record['classes']):,} classes"


def differences(before: Record, now: Record) -> str:
    """What differs between a run's data and those that are here; empty if nothing does."""
    if before["source"] != now["source"]:
        return f"the source is {before['source']!r} there and {now['source']!r} here"
    found = _class_differences(before["classes"], now["classes"])
    decoders = before.get("decoder"), now.get("decoder")
    if decoders[0] != decoders[1]:
        found.append(
            f"images were decoded on the {decoders[0]}, and now on the {decoders[1]}, which gives "
            "other pixels (data.decoder)"
        )
    for split in sorted(before["images"].keys() | now["images"].keys()):
        there, here = before["images"].get(split, {}), now["images"].get(split, {})
        names = sorted(n for n in there.keys() | here.keys() if there.get(n) != here.get(n))
        if names:
            num_there, num_here = (side.get(names[0], [0])[0] for side in (there, here))
            what = f"{num_there:,} images there and {num_here:,} here"
            if num_there == num_here:
                what = f"{num_here:,} images on both sides, but not the same"
            more = f" ({len(names) - 1} more such classes)" if len(names) > 1 else ""
            found.append(f"{split}, class {names[0]!r}: {what}{more}")
    return "; ".join(found)


def _class_differences(there: list[str], here: list[str]) -> list[str]:
    if there == here:
        return []
    lost, new = sorted(set(there) - set(here)), sorted(set(here) - set(there))
    if not lost and not new:
        return ["the classes are in another order"]
    parts = [f"{len(there):,} classes there and {len(here):,} here"]
    parts += [f"{lost[0]!r} is missing"] if lost else []
    parts += [f"{new[0]!r} is new"] if new else []
    return [", ".join(parts)]
