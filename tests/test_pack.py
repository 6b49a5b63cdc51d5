"""`tombola data pack`: the shards train as the files do, whatever interrupts the packing."""

import hashlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from jpegs import CLASSES, cuts, encoded, opened, prepared, write_shards, write_tree
from PIL import Image
from waiting import PATIENCE

from data.catalogue import Catalogue
from data.cataloguing import PACKED_INDEX, make_catalogue
from data.config import DataConfig
from data.encoded import EncodedImages
from data.errors import RunError, UserError
from data.files import Folder
from data.layout import UNFINISHED
from data.pack import Packed, pack
from data.pack_plan import PACKED
from data.pack_shard import PackOptions
from data.pack_shard import encoded as packed_image
from launch.cli import run_command
from launch.progress import WorkDisplay

TRAIN, VAL = 21, 6  # of each of two classes
SMALL_SHARDS = PackOptions(shard_size=8)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """42 training and 12 held-out JPEGs of two classes."""
    return write_tree(tmp_path_factory.mktemp("images"), train=TRAIN, val=VAL, side=64)


@pytest.fixture(scope="module")
def packed(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree in shards of 8: 6 of train, 2 of test."""
    return pack_tree(tree, tmp_path_factory.mktemp("packed"))


def pack_tree(tree: Path, target: Path, options: PackOptions = SMALL_SHARDS, **more: Any) -> Path:
    """Packs a tree into a local folder."""
    pack("folder", str(tree), Folder(target), options, **more)
    return target


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Sample(NamedTuple):
    """An image as the loader would get it."""

    label: int
    content: bytes
    shape: tuple[int, ...]


def samples(kind: str, root: str | Path) -> dict[str, list[Sample]]:
    """The images of each split of a source, in order."""
    catalogue = make_catalogue(kind, str(root))
    found = {}
    for split, manifest in catalogue.splits.items():
        images = EncodedImages(catalogue.root, manifest)
        found[split] = [
            Sample(int(manifest.labels[row]), images.read(row), tuple(manifest.shapes[row]))
            for row in range(len(manifest))
        ]
    return found


def digests(folder: Path) -> dict[str, Any]:
    """The entries of `pack.json` for its shards."""
    return {entry["name"]: entry for entry in json.loads((folder / PACKED).read_text())["shards"]}


# ---- what is packed


def test_the_packed_samples_are_those_of_the_tree_in_their_order(tree: Path, packed: Path) -> None:
    """Byte for byte, with their labels, shapes and classes."""
    assert samples("webdataset", packed) == samples("folder", tree)
    assert [len(split) for split in samples("webdataset", packed).values()] == [42, 12]
    assert make_catalogue("webdataset", str(packed)).classes == CLASSES
    assert (packed / "classes.txt").read_text() == "china\nflower\n"


def test_training_on_shards_equals_training_on_files_bit_for_bit(
    tree: Path, packed: Path, tmp_path: Path
) -> None:
    """The batches of more than an epoch, and those of the evaluation."""
    streams = []
    for source in (f"folder:{tree}", f"webdataset:{packed}"):
        config = DataConfig(source, batch_size=10, eval_batch_size=5, size=("32",), threads=1)
        data = opened(config, tmp_path, prepared(config, tmp_path))
        streams.append([*itertools.islice(data.loader(3), 6), *data.evaluation["test"]])
    assert len(streams[0]) == 6 + 3
    for one, other in zip(*streams, strict=True):
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.images, other.images)


def test_a_shard_is_a_tar_of_consecutive_pairs_without_times_and_owners(packed: Path) -> None:
    """As Python's tarfile reads it: `<key>.jpg`, then `<key>.cls`."""
    with tarfile.open(packed / "train-000005.tar") as shard:
        members = shard.getmembers()
        for image, label in zip(members[::2], members[1::2], strict=True):
            assert image.name == f"{image.name[:8]}.jpg"
            assert label.name == f"{image.name[:8]}.cls"
            content = shard.extractfile(label)
            assert content is not None
            assert content.read() == (b"0" if int(image.name[:8]) < TRAIN else b"1")
    assert len(members) == 2 * 2  # 42 images in shards of 8
    facts = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members}
    assert facts == {(0, 0, 0, "", "", 0o444)}


def test_every_full_shard_mixes_the_classes(packed: Path) -> None:
    """In an order that is neither that of the classes nor that of the keys."""
    for name in [f"train-{index:06d}.tar" for index in range(5)]:
        with tarfile.open(packed / name) as shard:
            keys = [int(image[:8]) for image in shard.getnames()[::2]]
        assert {key < TRAIN for key in keys} == {True, False}
        assert keys != sorted(keys)


def test_pack_json_tells_size_and_digest_of_each_shard(packed: Path) -> None:
    """Of all shards that are there; `sha256sum` agrees."""
    entries = digests(packed)
    assert sorted(entries) == sorted(path.name for path in packed.glob("*.tar"))
    for name, entry in entries.items():
        content = (packed / name).read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["num_bytes"] == len(content)
        assert entry["split"] == name.partition("-")[0]
    assert sum(entry["num_images"] for entry in entries.values()) == 2 * (TRAIN + VAL)


def test_the_index_is_what_an_indexing_of_the_shards_finds(packed: Path, tmp_path: Path) -> None:
    """Every array of it, but the times of the files, which a copy does not keep."""
    index = Catalogue.from_bytes((packed / PACKED_INDEX).read_bytes(), "")
    bare = Path(shutil.copytree(packed, tmp_path / "bare"))
    (bare / PACKED_INDEX).unlink()
    found = make_catalogue("webdataset", str(bare))
    assert found.classes == index.classes
    assert found.splits.keys() == index.splits.keys()
    for split, manifest in found.splits.items():
        for name, value in vars(index.splits[split]).items():
            if name != "file_times":
                assert list(np.ravel(value)) == list(np.ravel(getattr(manifest, name))), name


def test_validation_and_test_stay_two_splits(tmp_path: Path) -> None:
    """And so do their images."""
    tree = write_tree(tmp_path / "tree", train=3, val=2, side=48)
    write_tree(tmp_path / "more", train=1, val=3, side=48)
    (tmp_path / "more/val").rename(tree / "test")
    target = pack_tree(tree, tmp_path / "packed")
    assert samples("webdataset", target) == samples("folder", tree)
    names = sorted(path.name for path in target.glob("*.tar"))
    assert names == ["test-000000.tar", "train-000000.tar", "validation-000000.tar"]


def test_shards_are_packed_anew_from_shards(tree: Path, packed: Path, tmp_path: Path) -> None:
    """From other people's, and to those that came out of the tree."""
    others = write_shards(tree, tmp_path / "others")
    pack("webdataset", str(others), Folder(tmp_path / "again"), SMALL_SHARDS)
    for name, entry in digests(packed).items():
        assert digests(tmp_path / "again")[name] == entry


def test_a_file_is_named_by_its_format(tmp_path: Path) -> None:
    """ImageNet has a PNG whose name ends in .JPEG."""
    tree = write_tree(tmp_path / "tree", train=2, val=1, side=48)
    for form, name in (("PNG", "0000"), ("WEBP", "0001")):
        (tree / f"train/china/{name}.JPEG").write_bytes(encoded(cuts(0, 1, side=48)[0], form))
    with tarfile.open(pack_tree(tree, tmp_path / "packed") / "train-000000.tar") as shard:
        names = sorted(shard.getnames())
    assert names[::2] == [f"0000000{key}.cls" for key in range(4)]
    assert names[1::2] == ["00000000.png", "00000001.webp", "00000002.jpg", "00000003.jpg"]
    assert samples("webdataset", tmp_path / "packed") == samples("folder", tree)


def test_it_packs_to_a_store_and_is_read_from_there(
    tree: Path, packed: Path, tmp_path: Path
) -> None:
    """A file system that is not the local disk gets the same files, and nothing beside them."""
    url = f"simplecache::file://{tmp_path}/store"
    assert not Folder(url).is_local
    pack("folder", str(tree), Folder(url), SMALL_SHARDS, num_workers=2)
    assert contents(tmp_path / "store") == contents(packed)
    assert samples("webdataset", url) == samples("folder", tree)


# ---- re-encoding


def test_larger_images_get_the_shorter_side_and_smaller_ones_stay_verbatim(
    tree: Path, tmp_path: Path
) -> None:
    """Sides are 48 to 95 pixels: some of each."""
    target = pack_tree(tree, tmp_path / "packed", PackOptions(resize=64, quality=80))
    before, after = (samples(*s) for s in (("folder", tree), ("webdataset", target)))
    num_resized = 0
    for old, new in zip(before["train"], after["train"], strict=True):
        assert old.label == new.label
        if min(old.shape) <= 64:
            assert new == old
            continue
        num_resized += 1
        scale = 64 / min(old.shape)
        assert new.shape == tuple(round(side * scale) for side in old.shape)
        assert min(new.shape) == 64
    assert 0 < num_resized < 2 * TRAIN


def test_a_resized_image_looks_the_same(tree: Path) -> None:
    """Within what JPEG loses against Pillow's own antialiased Lanczos."""
    content = encoded(cuts(1, 1, side=200)[0], quality=95)
    small, extension = packed_image(content, PackOptions(resize=64, quality=95))
    assert extension == "jpg"
    found = decoded(small)
    expected = decoded(content).resize(found.size, Image.Resampling.LANCZOS)
    difference = np.asarray(found, np.float64) - np.asarray(expected, np.float64)
    assert np.abs(difference).mean() < 4


def decoded(content: bytes) -> Image.Image:
    """The pixels of an image file."""
    return Image.open(io.BytesIO(content)).convert("RGB")


def test_a_higher_quality_takes_more_bytes() -> None:
    """`--quality` reaches the encoder."""
    content = encoded(cuts(0, 1, side=200)[0], quality=95)
    sizes = [
        len(packed_image(content, PackOptions(resize=100, quality=quality))[0])
        for quality in (50, 75, 95)
    ]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "CMYK", "1"])
def test_what_is_re_encoded_is_an_rgb_jpeg(mode: str) -> None:
    """Of whatever mode it was."""
    form = "JPEG" if mode == "CMYK" else "PNG"
    content = encoded(cuts(0, 1, side=100)[0].convert(mode), form)
    small, extension = packed_image(content, PackOptions(resize=32))
    with Image.open(io.BytesIO(small)) as image:
        assert (extension, image.format, image.mode, min(image.size)) == ("jpg", "JPEG", "RGB", 32)


def test_exif_is_dropped_and_turns_nothing() -> None:
    """Pixels are taken as stored, as training reads them; a comment goes too."""
    wide = cuts(0, 1, side=100)[0].resize((120, 80))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    content = encoded(wide, exif=exif, comment=b"by hand")
    small, _ = packed_image(content, PackOptions(resize=40))
    with Image.open(io.BytesIO(small)) as image:
        assert image.size == (60, 40)
        assert not image.getexif()
        assert "comment" not in image.info


@pytest.mark.parametrize(
    ("form", "mode", "orientation"), [("PNG", "I;16", 1), ("TIFF", "F", 1), ("TIFF", "RGB", 6)]
)
def test_what_a_jpeg_cannot_hold_stays_verbatim(form: str, mode: str, orientation: int) -> None:
    """More than 8 bits; and a TIFF that Pillow would turn."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = cuts(0, 1, side=100)[0]
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257)
    content = encoded(image.convert(mode), form, exif=exif)
    assert packed_image(content, PackOptions(resize=32))[0] == content


# ---- the same bytes, whatever happens


@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_bytes_do_not_depend_on_the_number_of_workers(
    tree: Path, packed: Path, tmp_path: Path, num_workers: int
) -> None:
    """Of every file, and nothing else is left."""
    pack_tree(tree, tmp_path / "packed", num_workers=num_workers)
    assert contents(tmp_path / "packed") == contents(packed)
    names = {path.name for path in packed.iterdir()}
    tars = [f"train-00000{i}.tar" for i in range(6)] + [f"test-00000{i}.tar" for i in range(2)]
    assert names == {*tars, "classes.txt", PACKED_INDEX, PACKED}


KILLED_PACK = """
import multiprocessing, os, signal, sys
from pathlib import Path
from data.files import Folder
from data.pack import pack
from data.pack_shard import PackOptions

tree, target, num_images, workers = sys.argv[1:]

def progress(what, done, total):
    if what == "packing images" and done >= int(num_images):
        children = multiprocessing.active_children()
        Path(workers).write_text(" ".join(str(child.pid) for child in children))
        os.kill(os.getpid(), signal.SIGKILL)

options = PackOptions(shard_size=8)
pack("folder", tree, Folder(target), options, num_workers=2, progress=progress)
"""
"""packs until that many images are in shards, notes its workers, and kills itself"""


@pytest.mark.parametrize("num_images", [0, 20, 54])
@pytest.mark.parametrize("prefix", ["", "simplecache::file://"])
def test_a_killed_pack_goes_on_to_the_same_bytes(
    tree: Path, packed: Path, tmp_path: Path, num_images: int, prefix: str
) -> None:
    """By SIGKILL before the first shard, in the middle, after the last; the workers end too."""
    target = f"{prefix}{tmp_path}/packed"
    arguments = [str(tree), target, str(num_images), str(tmp_path / "workers")]
    killed = subprocess.run([sys.executable, "-c", KILLED_PACK, *arguments], timeout=PATIENCE)
    assert killed.returncode == -signal.SIGKILL
    for worker in (tmp_path / "workers").read_text().split():
        while is_running(int(worker)):  # the test's own limit of time ends this
            time.sleep(0.05)
    assert Folder(target).exists(UNFINISHED)
    assert not Folder(target).exists(PACKED)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "packed").glob("*.tar")}
    assert len(finished) >= num_images // 8
    again = pack("folder", str(tree), Folder(target), SMALL_SHARDS)
    assert again.num_written <= 2 * (TRAIN + VAL) - num_images
    assert contents(tmp_path / "packed") == contents(packed)
    if num_images == 54:
        assert finished == {path: path.stat().st_mtime_ns for path in finished}


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def interrupted(tree: Path, target: Path) -> Path:
    """A pack that was stopped after its first shard."""

    def progress(what: str, done: int, total: int) -> None:
        if what == "packing images" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_tree(tree, target, num_workers=1, progress=progress)
    assert not multiprocessing.active_children()
    return target


@pytest.mark.parametrize("content", [b"", b"{}", b'{"sha256": "', b"[]", b"null"])
def test_a_shard_with_a_damaged_note_is_written_again(
    tree: Path, packed: Path, tmp_path: Path, content: bytes
) -> None:
    """And one that was cut off."""
    target = interrupted(tree, tmp_path / "packed")
    next((target / UNFINISHED).glob("*.tar.json")).write_bytes(content)
    pack_tree(tree, target)
    assert contents(target) == contents(packed)


def test_a_shard_that_was_cut_off_is_written_again(
    tree: Path, packed: Path, tmp_path: Path
) -> None:
    """Its size is not what its note says."""
    target = interrupted(tree, tmp_path / "packed")
    shard = next(target.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    pack_tree(tree, target)
    assert contents(target) == contents(packed)


def test_a_worker_that_dies_is_reported_with_its_shard(
    tree: Path, packed: Path, tmp_path: Path
) -> None:
    """And the same command goes on."""

    def progress(what: str, done: int, total: int) -> None:
        for worker in multiprocessing.active_children():
            os.kill(int(worker.pid or 0), signal.SIGKILL)

    with pytest.raises(RunError, match=r"train-00000\d.tar: the process that wrote it died \(kill"):
        pack_tree(tree, tmp_path / "packed", num_workers=1, progress=progress)
    pack_tree(tree, tmp_path / "packed")
    assert contents(tmp_path / "packed") == contents(packed)


def test_a_whole_pack_is_left_as_it_is(tree: Path, packed: Path) -> None:
    """Not one file is written; whatever the number of workers."""
    before = {path: path.stat().st_mtime_ns for path in packed.iterdir()}
    again = pack("folder", str(tree), Folder(packed), SMALL_SHARDS, num_workers=1)
    assert again == Packed(again.splits, num_written=0, was_whole=True)
    assert {path: path.stat().st_mtime_ns for path in packed.iterdir()} == before


# ---- what is refused


def test_other_options_are_refused(tree: Path, packed: Path, tmp_path: Path) -> None:
    """On a whole pack and on one that was begun, saying which."""
    for target in (packed, interrupted(tree, tmp_path / "packed")):
        before = contents(target)
        with pytest.raises(UserError, match="shard_size is 8 there and 9 here"):
            pack_tree(tree, target, PackOptions(shard_size=9))
        with pytest.raises(UserError, match="resize is not set there and 64 here"):
            pack_tree(tree, target, PackOptions(shard_size=8, resize=64))
        assert contents(target) == before


def test_another_source_is_refused(tree: Path, packed: Path, tmp_path: Path) -> None:
    """One image more, on a whole pack and on one that was begun."""
    other = Path(shutil.copytree(tree, tmp_path / "tree"))
    shutil.copy(other / "train/flower/0000.JPEG", other / "train/flower/9999.JPEG")
    for target in (packed, interrupted(tree, tmp_path / "packed")):
        before = contents(target)
        with pytest.raises(UserError, match="class 'flower': 21 images there and 22 here"):
            pack_tree(other, target)
        assert contents(target) == before


def test_images_encoded_by_another_pillow_are_not_added_to(tree: Path, tmp_path: Path) -> None:
    """Half of the shards would differ from what a whole run writes."""
    options = PackOptions(shard_size=8, resize=64)
    target = interrupted(tree, tmp_path / "packed")
    plan = json.loads((target / UNFINISHED / "plan.json").read_text())
    plan |= {"versions": {"pillow": "9.0"}, "options": options.document()}
    (target / UNFINISHED / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match=r"encoded by Pillow 9.0, and here it is"):
        pack_tree(tree, target, options)


def test_a_folder_with_other_files_is_refused(tree: Path, tmp_path: Path) -> None:
    """They might be taken for shards of the pack."""
    (tmp_path / "train-000099.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds other files \(train-000099.tar\); give an empty"):
        pack_tree(tree, tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": 2}', '{"format": 1}'])
def test_a_damaged_pack_json_is_reported(tree: Path, tmp_path: Path, content: str) -> None:
    """And not written over."""
    (tmp_path / PACKED).write_text(content)
    with pytest.raises(UserError, match=r"pack.json: damaged, or of another version"):
        pack_tree(tree, tmp_path)


def test_a_whole_pack_that_lost_a_shard_is_reported(
    tree: Path, packed: Path, tmp_path: Path
) -> None:
    """It is not taken for finished."""
    target = Path(shutil.copytree(packed, tmp_path / "packed"))
    (target / "train-000002.tar").unlink()
    with pytest.raises(UserError, match=r"is packed, but lacks train-000002.tar"):
        pack_tree(tree, target)


def test_a_target_inside_of_the_source_is_refused(tree: Path) -> None:
    """The next listing of the source would find it."""
    for target in (tree, tree / "train/packed"):
        with pytest.raises(UserError, match="lies in the source itself"):
            pack_tree(tree, target)
    assert sorted(path.name for path in tree.iterdir()) == ["train", "val"]


def test_images_that_the_scan_finds_bad_are_refused(tree: Path, tmp_path: Path) -> None:
    """With the first, the count, and the command that lists them; nothing is written."""
    spoilt = Path(shutil.copytree(tree, tmp_path / "tree"))
    (spoilt / "train/china/0003.JPEG").write_bytes(b"")
    (spoilt / "val/china/0000.JPEG").write_bytes(b"no image")
    with pytest.raises(UserError) as refused:
        pack_tree(spoilt, tmp_path / "packed")
    for part in ("2 of 54", "train/china/0003.JPEG is empty ...", "tombola data verify"):
        assert part in str(refused.value)
    assert not (tmp_path / "packed").exists()


def test_an_image_that_cannot_be_decoded_is_named(tree: Path, tmp_path: Path) -> None:
    """Found only when it is re-encoded."""
    spoilt = Path(shutil.copytree(tree, tmp_path / "tree"))
    content = bytearray(encoded(cuts(0, 1, side=100)[0], "PNG"))
    content[200:400] = bytes(200)
    (spoilt / "train/china/0003.JPEG").write_bytes(content)
    with pytest.raises(UserError, match=r"train/china/0003.JPEG: cannot be decoded .*data verify"):
        pack_tree(spoilt, tmp_path / "packed", PackOptions(resize=32))


def test_a_class_whose_name_is_no_line_is_refused(tree: Path, tmp_path: Path) -> None:
    """It could not be read back from classes.txt."""
    odd = Path(shutil.copytree(tree, tmp_path / "tree"))
    for split in ("train", "val"):
        (odd / split / "china").rename(odd / split / "chi\nna")
    with pytest.raises(UserError, match=r"class 'chi\\nna': its name is no line of text"):
        pack_tree(odd, tmp_path / "packed")


# ---- the command


def test_the_command_prints_images_shards_and_bytes_of_each_split(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kind is found out; a second time it says that nothing was done."""
    words = ["data", "pack", str(tree), "-o", str(tmp_path / "packed"), "--shard-size", "16"]
    assert run_command(words) == 0
    printed = capsys.readouterr()
    for part in ("split", "images", "shards", "bytes before", "train", "42", "3", "test", "12"):
        assert part in printed.out
    assert f"{tmp_path}/packed: is packed; 54 images at" in printed.out
    assert printed.err == ""
    assert run_command(words) == 0
    assert "is packed already; nothing was done" in capsys.readouterr().out


def test_the_command_prints_one_json_document(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing else on stdout."""
    target = tmp_path / "packed"
    words = ["data", "pack", f"folder:{tree}", "-o", str(target), "--resize", "64", "--json"]
    for was_whole in (False, True):
        assert run_command(words) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["target"] == str(target)
        assert document["options"] == {"resize": 64, "quality": 90, "shard_size": 2048}
        assert (document["was_whole"], document["num_written"]) == (was_whole, 54 * (not was_whole))
        train = document["splits"]["train"]
        files = [path.stat().st_size for path in (tree / "train").rglob("*.JPEG")]
        assert (train["num_images"], train["num_shards"]) == (42, 1)
        assert train["bytes_before"] == sum(files)
        assert train["bytes_after"] == (target / "train-000000.tar").stat().st_size


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["digits:"], "digits: is held in memory as a whole, and needs no packing"),
        (["--resize", "5"], "--resize 5: must be from 16 to 4096"),
        (["--quality", "0"], "--quality 0: must be from 1 to 100"),
        (["--shard-size", "0"], "--shard-size 0: must be at least 1"),
        (["--workers", "0"], "--workers 0: must be at least 1"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], part: str
) -> None:
    """Before anything is written."""
    source = words if not words[0].startswith("--") else [str(tree), *words]
    assert run_command(["data", "pack", *source, "-o", str(tmp_path / "packed")]) == 2
    assert part in capsys.readouterr().err.removesuffix("\n").splitlines()[0]
    assert not (tmp_path / "packed").exists()


def test_a_stopped_command_says_how_it_goes_on(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C: one line, exit code 1, no process left."""

    def stop(self: WorkDisplay, what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(WorkDisplay, "__call__", stop)
    assert run_command(["data", "pack", str(tree), "-o", str(tmp_path / "packed")]) == 1
    assert "stopped; the same command goes on" in capsys.readouterr().err
    assert not multiprocessing.active_children()


def test_an_error_of_the_disk_is_one_line(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here a target below a file."""
    (tmp_path / "file").write_bytes(b"")
    assert run_command(["data", "pack", str(tree), "-o", str(tmp_path / "file/packed")]) == 1
    assert capsys.readouterr().err.startswith("error: Not a directory")


# ---- putting a file


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_a_file_is_put_whole_in_the_place_of_another(tmp_path: Path, kind: str) -> None:
    """And is where it was no more."""
    folder = Folder(tmp_path / "target" if kind == "local" else f"memory://{tmp_path.name}")
    folder.write("name", b"old")
    path = tmp_path / "new"
    path.write_bytes(b"new")
    folder.put("name", path)
    assert folder.read("name") == b"new"
    assert folder.names() == ["name"]
    assert not path.exists()
