"""What may be packed, into which shards, and where to: a target has one source and one plan."""

import os
from typing import Any, NamedTuple

import numpy as np
import PIL
from numpy.typing import NDArray

from data.catalogue import Catalogue
from data.config import ON_DISK
from data.errors import UserError
from data.files import Folder
from data.layout import PACKED, UNFINISHED
from data.order import random_permutation, stream_seed
from data.pack_shard import PackOptions
from data.record import differences

PLAN = f"{UNFINISHED}/plan.json"
"""the same without the shards, of a pack that is not"""
_FORMAT = 1
Document = dict[str, Any]


def new_plan(options: PackOptions) -> Document:
    """A plan, but for its `source`: the record of the images that are packed."""
    return {
        "format": _FORMAT,
        "options": options.document(),
        "versions": {"pillow": PIL.__version__},
    }


def is_whole(document: Document) -> bool:
    """Whether it is of a pack that is whole."""
    return "shards" in document


def check_places(kind: str, root: str, target: Folder) -> None:
    """Raises `UserError` for a source that needs no packing, and for a target inside of it."""
    if kind not in ON_DISK:
        raise UserError(f"{kind}: is held in memory as a whole, and needs no packing")
    place, source = (
        os.path.realpath(folder.location) if folder.is_local else folder.location
        for folder in (target, Folder(root))
    )
    if f"{place}/".startswith(f"{source}/"):
        raise UserError(f"{target}: lies in the source itself; give a folder outside of {root}")


def check_images(catalogue: Catalogue) -> None:
    """Raises `UserError` for a split without images, and for images that cannot be used."""
    for split, manifest in catalogue.splits.items():
        if len(manifest) == 0:
            raise UserError(f"{catalogue.root}: there are no {split} images")
    bad = [
        f"{manifest.where(image)} is {manifest.problem(image)}"
        for manifest in catalogue.splits.values()
        for image in np.flatnonzero(manifest.problems).tolist()
    ]
    if bad:
        num_images = sum(map(len, catalogue.splits.values()))
        raise UserError(
            f"{catalogue.root}: {len(bad)} of {num_images} images cannot be used: {bad[0]}"
            f"{' ...' if len(bad) > 1 else ''}; mend or remove them (`tombola data verify` lists "
            "them all)"
        )


def class_lines(catalogue: Catalogue) -> bytes:
    """`classes.txt`, one class a line. Raises `UserError` for a name that is no line of text."""
    for name in catalogue.classes:
        try:
            line = f"{name}\n".encode()
        except UnicodeEncodeError:
            line = b""
        if line.decode().splitlines() != [name]:
            raise UserError(f"{catalogue.root}: class {name!r}: its name is no line of text")
    return "".join(f"{name}\n" for name in catalogue.classes).encode()


class Shard(NamedTuple):
    """Which images of a split a shard holds, in its order."""

    name: str
    split: str
    rows: NDArray[np.int64]


def plan_shards(catalogue: Catalogue, shard_size: int) -> list[Shard]:
    """Each split in a fixed random order, cut: a reader of whole shards gets mixed classes."""
    shards = []
    for split, manifest in catalogue.splits.items():
        order = random_permutation(stream_seed(0, "pack", split), len(manifest))
        shards += [
            Shard(f"{split}-{index:06d}.tar", split, order[start : start + shard_size])
            for index, start in enumerate(range(0, len(manifest), shard_size))
        ]
    return shards


def begun_plan(target: Folder) -> Document | None:
    """The plan of the pack that is there, whole or not; `None` for an empty folder.

    Raises `UserError` for a folder that holds anything else.
    """
    name = next((name for name in (PACKED, PLAN) if target.exists(name)), None)
    if name is None:
        others = [n for n in target.names() if n and n != UNFINISHED and not n.startswith(".")]
        if others:
            raise UserError(f"{target}: holds other files ({others[0]}); give an empty folder")
        return None
    try:
        document: Document = target.read_json(name)
        if document["format"] != _FORMAT:
            raise ValueError(f"format {document['format']!r} is not {_FORMAT!r}")
        for key in ("options", "source", "versions", *(["shards"] if name == PACKED else [])):
            document[key]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{target}/{name}: damaged, or of another version ({error}); give another folder"
        ) from None
    return document


def require_same(target: Folder, begun: Document, plan: Document) -> None:
    """Raises `UserError` where `plan`, as far as it is known, is not of the pack that is there."""
    there, here = begun["options"], plan["options"]
    found = [
        f"{key} is {_said(there.get(key))} there and {_said(here[key])} here"
        for key in here
        if there.get(key) != here[key]
    ]
    if not found and here["resize"] and not is_whole(begun):
        versions = [document["versions"].get("pillow") for document in (begun, plan)]
        if versions[0] != versions[1]:
            found = ["images there are encoded by Pillow {}, and here it is {}".format(*versions)]
    if "source" in plan:
        differing = differences(begun["source"], plan["source"])
        found += [differing] if differing else []
    if found:
        raise UserError(f"{target}: holds another pack: {'; '.join(found)}. Give another folder")


def _said(value: int | None) -> str:
    return "not set" if value is None else str(value)


def require_shards(target: Folder, names: list[str]) -> None:
    """Raises `UserError` where shards of a whole pack are gone."""
    lost = sorted(set(names) - set(target.names()))
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UserError(
            f"{target}: is packed, but lacks {lost[0]}{more}; copy them there again, or remove the "
            "folder and pack again"
        )
