"""Real JPEGs, cut from scikit-learn's two sample photographs: small ImageFolder trees for tests."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from data.config import DataConfig
from data.files import Folder
from data.sources import Data, Placement, open_data, prepare_data

CLASSES = ("china", "flower")


def photographs() -> list[Image.Image]:
    """The two photographs, 640x427."""
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def cuts(label: int, count: int, *, seed: int = 0, side: int = 96) -> list[Image.Image]:
    """Different parts of one of the photographs, of different shapes around `side`."""
    rng = np.random.default_rng([seed, label])
    photograph = photographs()[label]
    found = []
    for _ in range(count):
        width, height = rng.integers(side * 3 // 4, side * 3 // 2, 2).tolist()
        left, top = rng.integers(0, 640 - width), rng.integers(0, 427 - height)
        found.append(photograph.crop((left, top, left + width, top + height)))
    return found


def write_tree(
    root: Path, *, train: int = 40, val: int = 12, side: int = 96, val_name: str = "val"
) -> Path:
    """`root/{train,val}/{china,flower}/NNNN.JPEG`, that many of each class."""
    for split, (count, seed) in {"train": (train, 0), val_name: (val, 1)}.items():
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index, image in enumerate(cuts(label, count, seed=seed, side=side)):
                image.save(folder / f"{index:04d}.JPEG", quality=90)
    return root


def damage(path: Path) -> None:
    """Spoils a JPEG's first Huffman table: the scan passes the file, no decoder does."""
    content = bytearray(path.read_bytes())
    table = content.index(b"\xff\xc4")
    content[table + 5 : table + 21] = b"\xff" * 16
    path.write_bytes(content)


def write_singles(root: Path, *, train: int, val: int, side: int = 96) -> Path:
    """A tree in which each training image is a class of its own: its label tells which it is.

    `root/train/cNN/image.JPEG`, and `root/val` with one image of each of the first `val` classes.
    """
    for split, count, seed in (("train", train, 0), ("val", val, 1)):
        half = count // 2
        images = cuts(0, half, seed=seed, side=side) + cuts(1, count - half, seed=seed, side=side)
        for label, image in enumerate(images):
            folder = root / split / f"c{label:02d}"
            folder.mkdir(parents=True)
            image.save(folder / "image.JPEG", quality=90)
    return root


def write_shards(tree: Path, folder: Path, *, per_shard: int = 10) -> Path:
    """The images of a tree as WebDataset shards `folder/{train,val}-NNNN.tar`, keyed by path."""
    folder.mkdir(parents=True)
    classes = sorted(path.name for path in (tree / "train").iterdir())
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    for split in ("train", "val"):
        paths = sorted((tree / split).rglob("*.JPEG"))
        for index, start in enumerate(range(0, len(paths), per_shard)):
            members = []
            for path in paths[start : start + per_shard]:
                key = path.relative_to(tree / split).with_suffix("").as_posix()
                label = str(classes.index(path.parent.name)).encode()
                members += [(f"{key}.jpeg", path.read_bytes()), (f"{key}.cls", label)]
            (folder / f"{split}-{index:04d}.tar").write_bytes(tar(members))
    return folder


def tar(members: list[tuple[str, bytes]]) -> bytes:
    """A tar file of `(name, content)`."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def encoded(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    """An image file in memory."""
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


# Damage that a look at the header and the end of a file does not find ---------------------


def without_huffman_tables(jpeg: bytes) -> bytes:
    """A JPEG whose first Huffman table is zeros: whole by its markers, and undecodable."""
    start = jpeg.index(b"\xff\xc4")
    length = int.from_bytes(jpeg[start + 2 : start + 4], "big")
    return jpeg[: start + 4] + bytes(length - 2) + jpeg[start + 2 + length :]


def without_its_end(jpeg: bytes, share: float = 0.5) -> bytes:
    """A JPEG cut off after `share` of its pixels' data, with an end marker in a comment.

    Its upper part can be decoded, its lower part cannot. Only in a file below 4 kB does the comment
    hide the damage.
    """
    scan = jpeg.index(b"\xff\xda")
    comment = b"\xff\xfe\x00\x04\xff\xd9"
    cut = jpeg[:2] + comment + jpeg[2 : scan + int((len(jpeg) - scan) * share)]
    assert len(cut) < 4096, "an image of a smaller side"
    return cut


# Opening ---------------------------------------------------------------------------------


def prepared(config: DataConfig, cache: Path) -> str:
    """Makes the catalogue in `cache`, as rank 0 does; the token that `opened` takes."""
    return prepare_data(config, Folder(cache))[1]


def opened(config: DataConfig, cache: Path, token: str, **place: Any) -> Data:
    """The data as one rank opens them, on the CPU, by the catalogue in `cache`."""
    return open_data(
        config, Placement(torch.device("cpu"), **place), cache=Folder(cache), token=token
    )
