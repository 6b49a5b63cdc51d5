"""What is in a WebDataset shard: a tar file of samples, each an image and its label.

The files of a sample share a key, their path up to the first dot of its last part: `000017.jpg`
and `000017.cls`. The label is the whole number in `.cls`, or `label` (else `cls`) in `.json`.
"""

import json
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from data.errors import UserError
from data.files import Folder
from data.scan import EXTENSIONS, Header, scan_bytes

_BLOCK = 512
"""bytes; empty ones mark the end of a tar file"""


class Member(NamedTuple):
    """An image in a shard: where its bytes are, and what they are."""

    name: str
    offset: int
    num_bytes: int
    label: int
    header: Header


def index_shard(task: tuple[str, str]) -> list[Member]:
    """The samples of the shard `(folder URL, name)`, in its order.

    Raises `UserError` for a damaged shard, and for a sample without an image or a label.
    """
    folder, name = Folder(task[0]), task[1]
    where = f"{folder}/{name}"
    try:
        with folder.open(name) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            members = [_member(where, key, files) for key, files in _samples(tar)]
            file.seek(tar.offset)  # cut between two files, it reads as a shorter one
            if file.read(_BLOCK) != bytes(_BLOCK):
                raise tarfile.ReadError("it is cut off, the mark of its end is missing")
            return members
    except tarfile.TarError as error:
        raise UserError(f"{where}: is no whole tar file: {error}") from None


class _File(NamedTuple):
    name: str
    offset: int
    content: bytes


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, _File]]]:
    """`(key, files by extension)` of each sample."""
    key, files = "", dict[str, _File]()
    for info in tar:
        if not info.isfile():
            continue
        folder, slash, last = info.name.rpartition("/")
        stem, _, extension = last.partition(".")
        if files and folder + slash + stem != key:
            yield key, files
            files = {}
        key = folder + slash + stem
        reader = tar.extractfile(info)
        assert reader is not None
        content = reader.read()
        if len(content) < info.size:
            raise tarfile.ReadError(f"{info.name} is cut off")
        files[extension.lower()] = _File(info.name, info.offset_data, content)
    if files:
        yield key, files


def _member(where: str, key: str, files: dict[str, _File]) -> Member:
    images = [extension for extension in files if f".{extension}".endswith(EXTENSIONS)]
    if not images:
        raise UserError(f"{where}: sample {key!r} has no image ({', '.join(files)})")
    # `1.jpg` before what is said of it in `1.depth.png`.
    image = files[min(images, key=lambda extension: extension.count("."))]
    label = _label(files)
    if label is None or label < 0:
        raise UserError(
            f"{where}: sample {key!r} has no label: a whole number in {key}.cls, or as 'label' "
            f"in {key}.json"
        )
    header = scan_bytes(image.content)
    return Member(image.name, image.offset, len(image.content), label, header)


def _label(files: dict[str, _File]) -> int | None:
    try:
        if "cls" in files:
            return int(files["cls"].content)
        if "json" in files:
            facts = json.loads(files["json"].content)
            label = facts["label"] if "label" in facts else facts["cls"]
            return int(label) if float(label) == int(label) else None
    except (ValueError, KeyError, TypeError, OverflowError):
        pass
    return None
