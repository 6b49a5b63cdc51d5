"""Where the images of a source lie: folders of classes, ImageNet's own layout, tar shards.

A split goes by its part in a run: `train`; `validation`, measured while a training goes on; and
`test`, which is reported. A source with one held-out split, as ImageNet, has it as `test`.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from data.config import sources
from data.errors import UserError, did_you_mean
from data.files import Folder
from data.scan import EXTENSIONS

SPLITS = ("train", "validation", "test")
_FOLDERS = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
_LISTING_THREADS = 16
T = TypeVar("T")
PACKED = "pack.json"
"""what is packed, and the digest of each shard; its presence says that the pack is whole"""
UNFINISHED = "packing"
"""the folder in one that is not: its plan, and what is known of the shards that are there"""


class Entry(NamedTuple):
    """A file: path below the root, size in bytes, and time of the last change (ns)."""

    name: str
    num_bytes: int
    time: int


@dataclass(frozen=True)
class Listing:
    """The files of a split with their labels, in order."""

    entries: list[Entry]
    labels: list[int]


@dataclass(frozen=True)
class Tree:
    """Image files on a local disk, each labelled."""

    root: Path
    classes: tuple[str, ...]
    splits: dict[str, Listing]
    ignored: int = 0
    """files whose names are not those of images"""


@dataclass(frozen=True)
class Shards:
    """Tar shards in a folder or under a URL: the shards of each split, in order."""

    folder: Folder
    classes: tuple[str, ...] | None
    """`None` where nothing but the labels says what the classes are"""
    splits: dict[str, list[str]]


def parse_source(text: str) -> tuple[str, str]:
    """Kind and place of a source on the command line: `KIND:PATH`, a path or URL, or `digits`.

    Raises `UserError` where the kind cannot be found out.
    """
    kind, _, place = text.partition(":")
    if kind in sources() and (place or kind == "digits"):
        return kind, place
    return find_kind(text), text


def find_kind(root: str) -> str:
    """Which kind of source lies at a path or URL, by what is there.

    Raises `UserError` where it is none that is known.
    """
    if Path(root).expanduser().is_file():
        raise UserError(f"{root}: is a file; give the folder that it is in")
    names = Folder(root).names()
    if not names and not Folder(root).exists():
        raise UserError(f"{root}: there is no such folder")
    if {PACKED, UNFINISHED} & set(names) or any(name.endswith(".tar") for name in names):
        return "webdataset"
    if any(re.match(r"ILSVRC2012_(devkit|val)", name) for name in names):
        return "imagenet"
    if "cifar-10-batches-py" in names:
        return "cifar10"
    if "cifar-100-python" in names:
        return "cifar100"
    if any(re.match(r"train-images[.-]idx3-ubyte", name) for name in names):
        return "idx"
    if any((Path(root).expanduser() / name).is_dir() for name in names) and "://" not in root:
        return "folder"
    raise UserError(
        f"{root}: holds neither folders of classes nor tar shards, and no data set that is known; "
        "give the folder above its splits (train, val), or KIND:PATH"
    )


# Folders of classes ----------------------------------------------------------------------


def folder_tree(root: str, *, flat_split: str | None = None) -> Tree:
    """`root/<split>/<class>/**/<image>`, as torchvision's ImageFolder reads each split.

    Classes are the folders of `train` in sorted order. With `flat_split`, a root that holds the
    folders of classes itself is that one split. Raises `UserError` for what is not there.
    """
    top = _existing(root)
    folders = _split_folders(top)
    if "train" not in folders:
        if flat_split is None or folders:
            raise UserError(f"{top}: has no folder 'train'; data.root is the folder above it")
        folders = {flat_split: top}
    first = next(iter(folders.values()))
    classes = tuple(_subfolders(first))
    if not classes:
        raise UserError(f"{first}: has no folders, one for each class")
    splits, ignored = {}, 0
    for split, folder in folders.items():
        strangers = [name for name in _subfolders(folder) if name not in set(classes)]
        if strangers:
            raise UserError(
                f"{folder}: class {strangers[0]!r} is not one of the {len(classes)} of "
                f"{first}{did_you_mean(strangers[0], classes)}"
            )
        splits[split], num_other = _list_classes(top, folder, classes)
        ignored += num_other
    return Tree(top, classes, splits, ignored)


def _existing(root: str) -> Path:
    if "://" in root:
        raise UserError(
            f"data.root = {root!r}: single files are read from local disks only; pack them into "
            "shards with `tombola data pack`, which are read from anywhere"
        )
    top = Path(root).expanduser()
    if not top.is_dir():
        raise UserError(f"data.root = {str(top)!r}: there is no such folder")
    return top


def _split_folders(top: Path) -> dict[str, Path]:
    found = {
        split: top / name
        for split, names in _FOLDERS.items()
        for name in names
        if (top / name).is_dir()
    }
    return _in_order(found)


def _in_order(found: dict[str, T]) -> dict[str, T]:
    """The splits in the order of `SPLITS`; the only one that is held out as `test`."""
    if "validation" in found and "test" not in found:
        found = {**found, "test": found["validation"]}
        del found["validation"]
    return {split: found[split] for split in SPLITS if split in found}


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _list_classes(top: Path, folder: Path, classes: Iterable[str]) -> tuple[Listing, int]:
    def images_of(name: str) -> tuple[list[Entry], int]:
        return list_images(top, folder / name)

    entries: list[Entry] = []
    labels: list[int] = []
    ignored = 0
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        for label, (images, num_other) in enumerate(pool.map(images_of, classes)):
            entries += images
            labels += [label] * len(images)
            ignored += num_other
    return Listing(entries, labels), ignored


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder, but hidden ones, and the names of the files in it."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield place, names


def list_images(top: Path, folder: Path) -> tuple[list[Entry], int]:
    """The image files in and below `folder`, sorted, named from `top`; and how many others."""
    images: list[Entry] = []
    num_other = 0
    for place, names in sorted(_walk(folder)):
        for name in sorted(names):
            if not name.lower().endswith(EXTENSIONS) or name.startswith("."):
                num_other += 1
                continue
            path = os.path.join(place, name)
            try:
                facts = os.stat(path)
                size, time = facts.st_size, facts.st_mtime_ns
            except OSError:  # a link to nothing is listed, and found unreadable
                size, time = 0, 0
            images.append(Entry(os.path.relpath(path, top), size, time))
    return images, num_other


# ImageNet --------------------------------------------------------------------------------


def imagenet_tree(root: str) -> Tree:
    """ILSVRC2012 as it is distributed: `train/<WordNet id>/`, and `val/` sorted or not.

    An unsorted `val/` of 50,000 files is labelled by the devkit's ground truth beside it:
    line i of `ILSVRC2012_validation_ground_truth.txt` is the ILSVRC2012_ID of image i, which
    `meta.mat` translates to a WordNet id. Raises `UserError` for what is not there.
    """
    top = _existing(root)
    val = next((top / name for name in _FOLDERS["validation"] if (top / name).is_dir()), None)
    if val is None or _subfolders(val):
        return folder_tree(root)
    images, ignored = list_images(top, val)
    if not images:
        raise UserError(f"{val}: holds no images")
    train = top / "train"
    classes = tuple(_subfolders(train)) if train.is_dir() else ()
    if not classes:
        raise UserError(f"{train}: has no folders, one for each WordNet id")
    truth = _ground_truth(top)
    label_of = {name: label for label, name in enumerate(classes)}
    wanted = [truth(entry) for entry in images]
    missing = sorted(set(wanted) - set(classes))
    if missing:
        raise UserError(f"{train}: has no folder {missing[0]!r}, a class of the images in {val}")
    labels = [label_of[name] for name in wanted]
    listing, num_other = _list_classes(top, train, classes)
    splits = {"train": listing, "test": Listing(images, labels)}
    return Tree(top, classes, splits, ignored + num_other)


def _ground_truth(top: Path) -> Callable[[Entry], str]:
    """The WordNet id of a validation image, from the devkit at or below `top`."""
    from scipy.io import loadmat

    name = "ILSVRC2012_validation_ground_truth.txt"
    places = (top, top / "data", *(p / "data" for p in sorted(top.glob("ILSVRC2012_devkit*"))))
    place = next((p for p in places if (p / name).is_file()), None)
    if place is None or not (place / "meta.mat").is_file():
        raise UserError(
            f"{top}: val/ has no folders of classes, and there is no devkit to label its images: "
            f"unpack ILSVRC2012_devkit_t12.tar.gz there ({name} and meta.mat), or sort val/"
        )
    synsets = loadmat(place / "meta.mat", squeeze_me=True)["synsets"]
    wordnet_ids = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
    numbers = [int(line) for line in (place / name).read_text().split()]

    def wordnet_id(entry: Entry) -> str:
        match = re.search(r"_(\d{8})\.\w+$", entry.name)
        if match is None or not 1 <= int(match[1]) <= len(numbers):
            raise UserError(
                f"{top / entry.name}: is not named ILSVRC2012_val_XXXXXXXX with a number up to "
                f"{len(numbers)}, so that {place / name} does not label it"
            )
        return wordnet_ids[numbers[int(match[1]) - 1]]

    return wordnet_id


# Shards ----------------------------------------------------------------------------------


def find_shards(root: str) -> Shards:
    """The tar shards in a folder or under a URL; `train`, `val` or `test` in a name is the split.

    `classes.txt` there names the classes, one a line. Raises `UserError` for what is not there.
    """
    folder = Folder(root)
    names = folder.names()
    if UNFINISHED in names and PACKED not in names:
        raise UserError(f"{folder}: is not packed completely; run `tombola data pack` again")
    shards = [name for name in names if name.endswith(".tar")]
    for part in (part for parts in _FOLDERS.values() for part in parts):
        if part in names:
            shards += [f"{part}/{n}" for n in (folder / part).names() if n.endswith(".tar")]
    if not shards:
        raise UserError(f"data.root = {root!r}: there are no tar shards")
    splits: dict[str, list[str]] = {}
    for name in shards:
        match = re.search(r"(?<![A-Za-z])(train|val|test)", name)
        if match is None:
            raise UserError(f"{folder}/{name}: its name says neither train nor val nor test")
        role = {"train": "train", "val": "validation", "test": "test"}[match[0]]
        splits.setdefault(role, []).append(name)
    classes = None
    if "classes.txt" in names:
        classes = tuple(folder.read("classes.txt").decode().splitlines())
    return Shards(folder, classes, _in_order(splits))
