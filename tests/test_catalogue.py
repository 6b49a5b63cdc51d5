"""What is known of image files: read once, kept, and brought up to date; and what differs."""

import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jpegs import cuts, encoded, tar, without_huffman_tables
from PIL import Image
from safetensors.numpy import load, save

from data.arrays import digits
from data.catalogue import Catalogue, Manifest, Names
from data.cataloguing import PACKED_INDEX, cache_name, make_catalogue, scan_paths
from data.config import DataConfig
from data.errors import UserError
from data.files import Folder
from data.record import Record, described, differences, record_of_arrays, record_of_files
from data.scan import PROBLEMS, Header, scan_bytes, scan_path
from data.sources import Placement, open_data, prepare_data

PICTURE = cuts(0, 1, side=40)[0]
JPEG = encoded(PICTURE)
PNG = encoded(PICTURE, "PNG")
OTHER = encoded(Image.new("RGB", (7, 4)), "PNG")


# ---- headers


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("MPO", {"save_all": True, "append_images": [PICTURE.rotate(90)]}),
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {}),
        ("WEBP", {"save_all": True, "append_images": [PICTURE.rotate(90)]}),
    ],
)
def test_a_header_tells_the_shape_as_it_is_stored(
    form: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Of every format that training decodes, by path and from memory."""
    content = encoded(PICTURE, form, **options)
    assert scan_bytes(content) == Header(*PICTURE.size, 0)
    (tmp_path / "image").write_bytes(content)  # its name does not matter
    assert scan_path(str(tmp_path / "image")) == Header(*PICTURE.size, 0)


def test_the_exif_orientation_does_not_turn_the_shape() -> None:
    """Pixels are taken as they are stored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    assert scan_bytes(encoded(PICTURE, exif=exif))[:2] == PICTURE.size


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "empty"),
        (b"\0", "not an image"),
        (b"No image.\n" * 100, "not an image"),
        (b"<!DOCTYPE html><html>Not Found</html>", "not an image"),
        (bytes(5000), "not an image"),
        (JPEG[:100], "not an image"),
        (b"\xff\xd8" + bytes(4000), "not an image"),
        (PNG[:20], "not an image"),
        (encoded(PICTURE, "GIF"), "unsupported format"),
        (encoded(PICTURE, "PPM"), "unsupported format"),
        (encoded(PICTURE, "ICO"), "unsupported format"),
        (encoded(PICTURE, "JPEG2000"), "unsupported format"),
        (JPEG[:-300], "truncated"),
        (JPEG[:-2], "truncated"),
        (PNG[: len(PNG) // 2], "truncated"),
        (PNG[:-8], "truncated"),
        (JPEG, ""),
        (JPEG + b"behind it", ""),
        (without_huffman_tables(JPEG), ""),
    ],
)
def test_a_problem_is_called_by_its_name(content: bytes, problem: str) -> None:
    """What the beginning and the end of a file tell; damage between them, they do not."""
    header = scan_bytes(content)
    assert PROBLEMS[header.problem] == problem
    if problem in ("", "truncated"):
        assert header[:2] == PICTURE.size
    else:
        assert header[:2] == (0, 0)


def test_a_large_image_is_read_at_its_two_ends_only(tmp_path: Path) -> None:
    """A file of 10 GB with an end marker in its last 4 kB: a hole on the disk."""
    path = tmp_path / "large.jpg"
    path.write_bytes(JPEG[:-2])
    with open(path, "r+b") as file:
        file.seek(10_000_000_000)
        file.write(b"\xff\xd9" + bytes(4000))
    assert scan_path(str(path)) == Header(*PICTURE.size, 0)
    os.truncate(path, 9_000_000_000)
    assert PROBLEMS[scan_path(str(path)).problem] == "truncated"


def test_what_cannot_be_opened_is_unreadable(tmp_path: Path) -> None:
    """A file that is not there, a link to nothing, a folder."""
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nothing")
    (tmp_path / "folder.jpg").mkdir()
    headers = scan_paths([str(tmp_path / name) for name in ("none", "link.jpg", "folder.jpg")])
    assert [PROBLEMS[header.problem] for header in headers] == ["unreadable"] * 3


def test_a_disk_that_fails_is_not_the_files_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the disk while the header is read is `unreadable`, not `not an image`."""
    (tmp_path / "a.jpg").write_bytes(JPEG)

    def fail(*arguments: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("PIL.Image.open", fail)
    assert PROBLEMS[scan_path(str(tmp_path / "a.jpg")).problem] == "unreadable"


def test_an_image_that_would_fill_the_memory_is_refused() -> None:
    """A PNG of few bytes that claims 100,000 x 100,000 pixels."""
    size = (100_000).to_bytes(4, "big")
    bomb = PNG[:16] + size + size + PNG[24:]
    assert scan_bytes(bomb).problem != 0


@pytest.mark.filterwarnings("ignore")  # Pillow's, about what is malformed
@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF"])
@given(data=st.data())
@settings(max_examples=60)
def test_no_content_makes_the_scan_fail(form: str, data: st.DataObject) -> None:
    """Any bytes of a file's first 100 changed, and cut anywhere: a header comes back."""
    content = bytearray(encoded(Image.new("RGB", (9, 6), (1, 2, 3)), form))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(99, len(content) - 1)))] = data.draw(
            st.integers(0, 255)
        )
    header = scan_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    assert header.width >= 0
    assert header.height >= 0
    assert 0 <= header.problem < len(PROBLEMS)
    assert header.problem or min(header[:2]) > 0


# ---- names


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
@settings(max_examples=100)
def test_names_are_a_list_of_texts(texts: list[str]) -> None:
    """Empty ones, newlines and all of Unicode; `raw` is their UTF-8."""
    names = Names.of(texts)
    assert list(names) == texts
    assert len(names) == len(texts)
    assert [names.raw(index) for index in range(len(names))] == [t.encode() for t in texts]
    for beyond in (len(texts), -1):
        with pytest.raises(IndexError):
            names[beyond]


def test_a_file_name_that_is_no_unicode_survives(tmp_path: Path) -> None:
    """Linux allows any bytes: the file is listed, scanned and named to a person."""
    for split in ("train", "val"):
        folder = tmp_path / split / "a"
        folder.mkdir(parents=True)
        (Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png"))).write_bytes(PNG)
    catalogue = make_catalogue("folder", str(tmp_path))
    again = Catalogue.from_bytes(catalogue.to_bytes(), catalogue.root)
    for train in (catalogue.splits["train"], again.splits["train"]):
        assert train.names.raw(0) == b"train/a/caf\xe9.png"
        assert train.problem(0) == ""
        assert train.where(0) == "train/a/caf\\xe9.png"


# ---- the catalogue as a file


def put(root: Path, *names: str, content: bytes = PNG) -> Path:
    """Writes files below `root`."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes; four training images, one of them bad, and two held-out ones."""
    root = put(tmp_path / "tree", "train/a/1.png", "train/a/2.png", "val/a/1.png", "val/b/1.png")
    put(root, "train/b/1.jpg", content=JPEG)
    put(root, "train/b/2.png", content=b"text")
    return root


def sample(key: str, label: int, image: bytes = PNG) -> list[tuple[str, bytes]]:
    """An image and its label, as members of a shard."""
    return [(f"{key}.png", image), (f"{key}.cls", b"%d" % label)]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two training shards, the second with a bad image, and one held out."""
    root = put(tmp_path / "shards", "train-0.tar", content=tar(sample("a", 0) + sample("b", 1)))
    put(root, "train-1.tar", content=tar(sample("c", 1, OTHER) + sample("d", 0, b"text")))
    put(root, "val-0.tar", content=tar(sample("e", 1)))
    return root


def assert_same(found: Manifest, expected: Manifest, *, but: tuple[str, ...] = ()) -> None:
    """All that two manifests hold, but for some fields."""
    for field in dataclasses.fields(Manifest):
        if field.name in but:
            continue
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(one, Names):
            assert list(one) == list(other)
        else:
            assert one.dtype == other.dtype
            assert np.array_equal(one, other), field.name
    assert found.in_shards == expected.in_shards


def test_a_catalogue_of_files_says_where_each_is_and_what(tree: Path) -> None:
    """In the order of their names, with their labels."""
    catalogue = make_catalogue("folder", str(tree))
    assert (catalogue.root, catalogue.classes) == (str(tree), ("a", "b"))
    train = catalogue.splits["train"]
    names = ["train/a/1.png", "train/a/2.png", "train/b/1.jpg", "train/b/2.png"]
    assert list(train.names) == names
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert train.shapes.tolist() == [list(PICTURE.size)] * 3 + [[0, 0]]
    assert train.num_bytes.tolist() == [len(PNG), len(PNG), len(JPEG), 4]
    assert [train.problem(image) for image in range(4)] == ["", "", "", "not an image"]
    assert [train.where(image) for image in range(4)] == names
    assert train.file_times.tolist() == [os.stat(tree / name).st_mtime_ns for name in names]
    assert not train.in_shards


def test_a_catalogue_of_shards_says_the_same(shards: Path) -> None:
    """With the shard in front of the name."""
    train = make_catalogue("webdataset", str(shards)).splits["train"]
    assert train.in_shards
    assert train.where(2) == "train-1.tar:c.png"
    assert train.shapes.tolist() == [list(PICTURE.size)] * 2 + [[7, 4], [0, 0]]
    assert [train.problem(image) for image in range(4)] == ["", "", "", "not an image"]
    for image, content in enumerate([PNG, PNG, OTHER, b"text"]):
        shard = (shards / train.files[int(train.file_of[image])]).read_bytes()
        start = int(train.offsets[image])
        assert shard[start : start + int(train.num_bytes[image])] == content


@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_a_catalogue_is_read_back_as_it_was_written(kind: str, tree: Path, shards: Path) -> None:
    """Every field; the bytes are the same every time, so that ranks can compare them."""
    root = str(tree if kind == "folder" else shards)
    catalogue = make_catalogue(kind, root)
    content = catalogue.to_bytes()
    again = Catalogue.from_bytes(content, root)
    assert (again.root, again.classes) == (catalogue.root, catalogue.classes)
    assert list(again.splits) == list(catalogue.splits)
    for split, manifest in catalogue.splits.items():
        assert_same(again.splits[split], manifest)
    assert again.to_bytes() == content
    assert make_catalogue(kind, root).to_bytes() == content


def test_a_catalogue_without_images_is_read_back(tree: Path) -> None:
    """A held-out folder that is still empty."""
    shutil.rmtree(tree / "val")
    (tree / "val/a").mkdir(parents=True)
    content = make_catalogue("folder", str(tree)).to_bytes()
    assert len(Catalogue.from_bytes(content, str(tree)).splits["test"]) == 0


def with_meta(content: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """A catalogue whose description is changed."""
    tensors = load(content)
    meta = json.loads(tensors["meta"].tobytes())
    change(meta)
    return bytes(save({**tensors, "meta": np.frombuffer(json.dumps(meta).encode(), np.uint8)}))


def test_what_is_no_catalogue_is_refused(tree: Path) -> None:
    """Another format or version, other types, a part that is missing, a cut, any other file."""
    content = make_catalogue("folder", str(tree)).to_bytes()
    tensors = load(content)
    foreign = {
        "another version": with_meta(content, lambda meta: meta.update(format="tombola-9")),
        "no format": with_meta(content, lambda meta: meta.pop("format")),
        "a split too many": with_meta(content, lambda meta: meta["splits"].append("more")),
        "other types": save({**tensors, "train/labels": tensors["train/labels"].astype("i4")}),
        "no labels": save({k: v for k, v in tensors.items() if k != "train/labels"}),
        "weights": save({"weight": np.zeros(3, np.float32)}),
        "no JSON": save({**tensors, "meta": np.frombuffer(b"{", np.uint8)}),
        "a list": save({**tensors, "meta": np.frombuffer(b"[1]", np.uint8)}),
        "text": b"text" * 100,
        "nothing": b"",
    }
    foreign |= {f"{size} bytes": content[:size] for size in range(1, len(content), 97)}
    for what, other in foreign.items():
        with pytest.raises(ValueError, match=r"is no catalogue|is not '|Expecting"):
            print(what, Catalogue.from_bytes(other, str(tree)))


# ---- kept and brought up to date


class Scans:
    """Stands for `scan_paths`, and notes which files it was asked for."""

    def __init__(self, root: Path) -> None:
        self.root, self.asked = root, list[str]()

    def __call__(self, paths: list[str]) -> list[Header]:
        self.asked += [os.path.relpath(path, self.root) for path in paths]
        return scan_paths(paths)

    def take(self) -> list[str]:
        """Which, since the last time."""
        asked, self.asked = self.asked, []
        return sorted(asked)


@pytest.fixture
def scans(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Scans:
    """What is scanned of the tree."""
    found = Scans(tree)
    monkeypatch.setattr("data.cataloguing.scan_paths", found)
    return found


def test_a_kept_catalogue_saves_the_scan(tree: Path, scans: Scans) -> None:
    """Nothing is read again, and the catalogue is the same, bit for bit."""
    first = make_catalogue("folder", str(tree)).to_bytes()
    assert len(scans.take()) == 6
    assert make_catalogue("folder", str(tree), kept=first).to_bytes() == first
    assert scans.take() == []


def test_a_kept_catalogue_is_believed_where_size_and_time_are_the_same(tree: Path) -> None:
    """As by `make` and `rsync`: another content is not noticed."""
    first = make_catalogue("folder", str(tree)).to_bytes()
    path = tree / "train/a/1.png"
    facts = path.stat()
    path.write_bytes(bytes(len(PNG)))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert make_catalogue("folder", str(tree), kept=first).to_bytes() == first


@pytest.mark.parametrize("change", ["size", "later", "earlier"])
def test_a_file_of_another_size_or_time_is_scanned_again(
    tree: Path, scans: Scans, change: str
) -> None:
    """It alone; earlier times count too, as of a file that was copied back."""
    first = make_catalogue("folder", str(tree)).to_bytes()
    scans.take()
    path = tree / "train/a/2.png"
    time = path.stat().st_mtime_ns
    content = OTHER if change == "size" else OTHER + bytes(len(PNG) - len(OTHER))
    path.write_bytes(content)
    time += {"size": 0, "later": 1000, "earlier": -(10**15)}[change]
    os.utime(path, ns=(time, time))
    second = make_catalogue("folder", str(tree), kept=first)
    assert scans.take() == ["train/a/2.png"]
    assert_same(second.splits["train"], make_catalogue("folder", str(tree)).splits["train"])
    assert PROBLEMS[int(second.splits["train"].problems[1])] in ("", "truncated")
    assert second.splits["train"].shapes[1].tolist() == [7, 4]


def test_files_that_are_added_removed_or_moved_change_nothing_else(
    tree: Path, scans: Scans
) -> None:
    """Only what is new under its name is scanned; all numbers are as of a new catalogue."""
    first = make_catalogue("folder", str(tree)).to_bytes()
    scans.take()
    put(tree, "train/a/0.png", "train/B/9.png", content=OTHER)  # before all others
    (tree / "train/a/1.png").unlink()
    (tree / "train/b/1.jpg").rename(tree / "train/a/1.jpg")
    second = make_catalogue("folder", str(tree), kept=first)
    assert scans.take() == ["train/B/9.png", "train/a/0.png", "train/a/1.jpg"]
    assert second.to_bytes() == make_catalogue("folder", str(tree)).to_bytes()
    train = second.splits["train"]
    assert list(zip(train.names, train.labels.tolist(), strict=True)) == [
        ("train/B/9.png", 0),
        ("train/a/0.png", 1),
        ("train/a/1.jpg", 1),
        ("train/a/2.png", 1),
        ("train/b/2.png", 2),
    ]
    assert train.problem(4) == "not an image"  # known from before


def test_a_split_that_is_new_is_scanned(tree: Path, scans: Scans) -> None:
    """And what was the test split is known under its new part, or scanned again."""
    first = make_catalogue("folder", str(tree)).to_bytes()
    scans.take()
    put(tree, "test/a/1.png", content=OTHER)
    second = make_catalogue("folder", str(tree), kept=first)
    assert "test/a/1.png" in scans.take()
    assert second.to_bytes() == make_catalogue("folder", str(tree)).to_bytes()


def test_a_file_that_was_unreadable_is_tried_again(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk's failure changes neither size nor time, and does not last for ever."""

    def fail(paths: list[str]) -> list[Header]:
        return [Header.bad("unreadable")] * len(paths)

    with monkeypatch.context() as patch:
        patch.setattr("data.cataloguing.scan_paths", fail)
        first = make_catalogue("folder", str(tree))
    assert first.splits["train"].problems.all()
    second = make_catalogue("folder", str(tree), kept=first.to_bytes())
    assert [second.splits["train"].problem(image) for image in range(4)] == [
        *("", "", "", "not an image"),
    ]


@pytest.mark.parametrize("kept", [b"", b"text", b"shards"])
def test_a_kept_catalogue_that_is_none_is_done_without(
    tree: Path, shards: Path, kept: bytes
) -> None:
    """A file of a crash, or of another source."""
    if kept == b"shards":
        kept = make_catalogue("webdataset", str(shards)).to_bytes()
    found = make_catalogue("folder", str(tree), kept=kept)
    assert found.to_bytes() == make_catalogue("folder", str(tree)).to_bytes()


@pytest.mark.parametrize("chunk", [1, 4, 5])
def test_many_files_are_scanned_by_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Every file gets its own header, and the progress goes up to their number."""
    monkeypatch.setattr("data.cataloguing._CHUNK", chunk)
    for index in range(13):
        image = encoded(Image.new("RGB", (1 + index, 20)), "PNG") if index != 6 else b"text"
        put(tmp_path, f"train/a/{index:02d}.png", content=image)
    put(tmp_path, "val/a/1.png")
    seen: list[tuple[str, int, int]] = []
    catalogue = make_catalogue("folder", str(tmp_path), progress=lambda *facts: seen.append(facts))
    train = catalogue.splits["train"]
    assert train.shapes.tolist() == [[1 + i, 20] if i != 6 else [0, 0] for i in range(13)]
    assert [train.problem(i) for i in range(13)] == [
        "" if i != 6 else "not an image" for i in range(13)
    ]
    done = [done for _, done, _ in seen]
    assert done == sorted(done)
    assert {(what, total) for what, _, total in seen} == {("reading headers", 13)}
    assert done[-1] == 13


# ---- kept shards


def unnoticed(path: Path, content: bytes) -> None:
    """Overwrites a file of the same size, and gives it back its time."""
    facts = path.stat()
    assert len(content) == facts.st_size
    path.write_bytes(content)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def test_shards_of_the_same_size_and_time_are_not_read_again(shards: Path) -> None:
    """Though there were nothing in them any more."""
    first = make_catalogue("webdataset", str(shards)).to_bytes()
    for path in shards.glob("*.tar"):
        unnoticed(path, bytes(path.stat().st_size))
    assert make_catalogue("webdataset", str(shards), kept=first).to_bytes() == first


def test_a_shard_that_has_changed_is_read_again(shards: Path) -> None:
    """It alone: the other is no longer a tar file, and nobody notices."""
    first = make_catalogue("webdataset", str(shards)).to_bytes()
    expected = tar(sample("c", 0, PNG) + sample("bb", 1))
    put(shards, "train-1.tar", content=expected)
    other = shards / "train-0.tar"
    unnoticed(other, bytes(other.stat().st_size))
    train = make_catalogue("webdataset", str(shards), kept=first).splits["train"]
    assert [train.where(i) for i in range(4)] == [
        *("train-0.tar:a.png", "train-0.tar:b.png", "train-1.tar:bb.png", "train-1.tar:c.png"),
    ]
    assert train.labels.tolist() == [0, 1, 1, 0]


def test_shards_may_be_added_and_removed(shards: Path) -> None:
    """The catalogue is that of a first look."""
    first = make_catalogue("webdataset", str(shards)).to_bytes()
    put(shards, "train-00.tar", content=tar(sample("0", 3)))
    (shards / "train-0.tar").unlink()
    second = make_catalogue("webdataset", str(shards), kept=first)
    assert second.to_bytes() == make_catalogue("webdataset", str(shards)).to_bytes()
    assert list(second.splits["train"].names) == ["0.png", "c.png", "d.png"]
    assert second.classes == ("0", "1", "2", "3")


def test_an_empty_shard_is_no_hindrance(shards: Path) -> None:
    """A tar file without files, kept and read back."""
    put(shards, "train-05.tar", content=tar([]))
    first = make_catalogue("webdataset", str(shards))
    assert len(first.splits["train"]) == 4
    again = make_catalogue("webdataset", str(shards), kept=first.to_bytes())
    assert again.to_bytes() == first.to_bytes()


def test_a_packed_sets_own_index_is_believed_by_sizes_alone(shards: Path) -> None:
    """A copy has other times. Another size is read again; what is no index is an error."""
    index = make_catalogue("webdataset", str(shards))
    (shards / PACKED_INDEX).write_bytes(
        dataclasses.replace(index, classes=("cat", "dog")).to_bytes()
    )
    path = shards / "train-0.tar"
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    os.utime(path, ns=(1, 1))
    found = make_catalogue("webdataset", str(shards))
    assert found.classes == ("cat", "dog")
    assert_same(found.splits["train"], index.splits["train"], but=("file_times",))
    path.write_bytes(tar(sample("a", 0) + sample("b", 1) + sample("z", 1)) + bytes(1024))
    assert list(make_catalogue("webdataset", str(shards)).splits["train"].names)[-1] == "z.png"
    (shards / PACKED_INDEX).write_bytes(b"text")
    with pytest.raises(UserError, match=rf"{shards}/{PACKED_INDEX}: is no catalogue of images"):
        make_catalogue("webdataset", str(shards))


# ---- in a cache


def test_each_source_has_its_own_file_in_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same however the place is spelt; a URL is a place as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    names = {cache_name("folder", place) for place in (str(tmp_path / "a"), "~/a", "a", "./a")}
    assert len(names) == 1
    assert names.pop().startswith("folder-")
    others = [("folder", "~/b"), ("imagenet", "~/a"), ("webdataset", "s3://a"), ("folder", "~/a")]
    assert len({cache_name(*other) for other in others}) == 4


def test_preparing_again_leaves_the_cache_alone(tree: Path) -> None:
    """The same token, and no write where nothing has changed; another one where it has."""
    cache = Folder(tree.parent / "cache")
    config = DataConfig(f"folder:{tree}", batch_size=2, on_bad="skip")
    first = prepare_data(config, cache)
    (path,) = (tree.parent / "cache").iterdir()
    assert path.name == cache_name("folder", str(tree))
    path.chmod(0o444)
    facts = path.stat()
    assert prepare_data(config, cache) == first
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (facts.st_ino, facts.st_mtime_ns)
    put(tree, "train/a/3.png")
    second = prepare_data(config, cache)
    assert second[1] != first[1]
    assert second[0] != first[0]


def test_a_rank_that_sees_another_catalogue_is_stopped(tree: Path) -> None:
    """Its cache is not rank 0's: the same index would be another image."""
    config = DataConfig(f"folder:{tree}", batch_size=2, on_bad="skip")
    caches = [Folder(f"memory://{uuid.uuid4().hex}") for _ in range(2)]
    (_, token) = prepare_data(config, caches[0])
    put(tree, "train/a/3.png")
    prepare_data(config, caches[1])
    place = Placement(torch.device("cpu"), rank=1, world_size=2)
    assert open_data(config, place, cache=caches[0], token=token).steps_per_epoch == 2
    with pytest.raises(UserError, match=r"sees another catalogue .* than rank 0"):
        open_data(config, place, cache=caches[1], token=token)


# ---- the record


def record_of(tree: Path) -> Record:
    """As it is kept in a run's folder."""
    return dict(
        json.loads(json.dumps(record_of_files("folder", make_catalogue("folder", str(tree)))))
    )


def test_the_record_of_files_counts_every_class_of_every_split(tree: Path) -> None:
    """Classes in the order of their labels, and a digest of sixteen digits beside each count."""
    record = record_of(tree)
    assert (record["source"], record["classes"]) == ("folder", ["a", "b"])
    counts = {
        split: {name: count for name, (count, _) in classes.items()}
        for split, classes in record["images"].items()
    }
    assert counts == {"train": {"a": 2, "b": 2}, "test": {"a": 1, "b": 1}}
    assert all(len(d) == 16 for split in record["images"].values() for _, d in split.values())
    assert described(record) == "folder: 4 train and 2 test images of 2 classes"


def test_the_same_data_elsewhere_have_the_same_record(tree: Path, tmp_path: Path) -> None:
    """Neither the root nor the times count: a copy on another machine is the same data."""
    copy = Path(shutil.copytree(tree, tmp_path / "copy"))
    os.utime(copy / "train/a/1.png", ns=(5, 5))
    assert record_of(copy) == record_of(tree)
    assert differences(record_of(copy), record_of(tree)) == ""


def change_nothing(tree: Path) -> None:
    """No difference."""


def add(tree: Path) -> None:
    """One image more."""
    put(tree, "train/a/3.png")


def rename(tree: Path) -> None:
    """The same number under other names."""
    (tree / "train/a/1.png").rename(tree / "train/a/0.png")


def resize(tree: Path) -> None:
    """Another size under the same name."""
    put(tree, "val/b/1.png", content=OTHER)


def drop_class(tree: Path) -> None:
    """A class less."""
    shutil.rmtree(tree / "train/b")
    shutil.rmtree(tree / "val/b")


def rename_class(tree: Path) -> None:
    """Another class instead."""
    for split in ("train", "val"):
        (tree / split / "b").rename(tree / split / "c")


def drop_everywhere(tree: Path) -> None:
    """An image less in each training class."""
    (tree / "train/a/1.png").unlink()
    (tree / "train/b/1.jpg").unlink()


def split_anew(tree: Path) -> None:
    """Another held-out split."""
    put(tree, "test/a/7.png")


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (change_nothing, ""),
        (add, "train, class 'a': 2 images there and 3 here"),
        (rename, "train, class 'a': 2 images on both sides, but not the same"),
        (resize, "test, class 'b': 1 images on both sides, but not the same"),
        (
            drop_class,
            "2 classes there and 1 here, 'b' is missing; test, class 'b': 1 images there and 0 "
            "here; train, class 'b': 2 images there and 0 here",
        ),
        (
            rename_class,
            "2 classes there and 2 here, 'b' is missing, 'c' is new; test, class 'b': 1 images "
            "there and 0 here (1 more such classes); train, class 'b': 2 images there and 0 here "
            "(1 more such classes)",
        ),
        (drop_everywhere, "train, class 'a': 2 images there and 1 here (1 more such classes)"),
        (
            split_anew,
            "test, class 'a': 1 images on both sides, but not the same (1 more such classes); "
            "validation, class 'a': 0 images there and 1 here (1 more such classes)",
        ),
    ],
)
def test_a_difference_is_told_in_words(
    tree: Path, change: Callable[[Path], None], difference: str
) -> None:
    """The first class of each split that differs, and how; nothing where nothing differs."""
    before = record_of(tree)
    change(tree)
    assert differences(before, record_of(tree)) == difference


def test_another_source_and_another_order_of_classes_are_told(tree: Path) -> None:
    """The order decides the labels."""
    record = record_of(tree)
    assert differences(record, {**record, "source": "imagenet"}) == (
        "the source is 'folder' there and 'imagenet' here"
    )
    assert differences(record, {**record, "classes": ["b", "a"]}) == (
        "the classes are in another order"
    )
    decoded = [{**record, "decoder": decoder} for decoder in ("gpu", "cpu")]
    assert differences(*decoded) == (
        "images were decoded on the gpu, and now on the cpu, which gives other pixels "
        "(data.decoder)"
    )


def test_the_record_of_arrays_sees_a_single_pixel() -> None:
    """Of the class that it belongs to, and no other."""
    arrays = digits("")
    before = record_of_arrays("digits", arrays)
    arrays.test.images[0, 0, 0, 0] ^= 1
    now = record_of_arrays("digits", arrays)
    name = arrays.classes[int(arrays.test.labels[0])]
    count = int((arrays.test.labels == arrays.test.labels[0]).sum())
    assert differences(json.loads(json.dumps(before)), now) == (
        f"test, class '{name}': {count} images on both sides, but not the same"
    )
