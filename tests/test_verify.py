"""`tombola data verify`: every kind of finding, each from real files, and how the command ends."""

import csv
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from jpegs import cuts, damage, encoded, tar, write_shards, write_tree
from PIL import Image
from processes import tombola
from waiting import PATIENCE, wait_for

import launch.verify
from data.errors import UserError
from data.inspection import Decode, decode_with_dali, kind_of, look
from data.scan import PROBLEMS, scan_bytes
from data.verify import KINDS, Finding, Report, verify
from launch.cli import run_command

LETHAL = b"ends its decoder"


def crash_at_lethal(contents: Sequence[bytes]) -> list[str]:
    """A decoder that a marked file kills, as a malformed one kills DALI."""
    if any(LETHAL in content for content in contents):
        os.kill(os.getpid(), signal.SIGSEGV)
    return [""] * len(contents)


def crash_in_company(contents: Sequence[bytes]) -> list[str]:
    """A decoder that a marked file kills only beside others."""
    return crash_at_lethal(contents) if len(contents) > 1 else [""]


def refuse_strangers(contents: Sequence[bytes]) -> list[str]:
    """A decoder that anything but a whole image of a supported format kills."""
    if any(scan_bytes(content).problem for content in contents):
        os.kill(os.getpid(), signal.SIGSEGV)
    return [""] * len(contents)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two images of each of two classes to train on, one of each held out."""
    return write_tree(tmp_path / "tree", train=2, val=1)


def verify_tree(tree: Path, decode: Decode | None = decode_with_dali) -> Report:
    return verify("folder", str(tree), decode=decode, num_workers=2)


def other(index: int = 0) -> Image.Image:
    """An image that is not in the tree."""
    return cuts(0, index + 1, seed=9)[index]


def rotated(form: str) -> bytes:
    exif = Image.Exif()
    exif[0x112] = 6
    return encoded(other(), form, exif=exif)


def broken_png() -> bytes:
    content = bytearray(encoded(other(), "PNG"))
    start = content.index(b"IDAT") + 40
    content[start : start + 40] = bytes(40)
    return bytes(content)


def huge_bmp() -> bytes:
    """The header of 20,000 by 20,000 pixels, and a few of them."""
    content = encoded(other(), "BMP")
    return content[:18] + struct.pack("<ii", 20_000, 20_000) + content[26:]


# ---- single images


JPEG = encoded(other())
FILES: list[tuple[str, bytes, str, str]] = [
    ("x.JPEG", b"", "empty", "0 bytes"),
    ("x.jpg", b"<html>not found</html>", "not-an-image", "begins with b'<html>not found<'"),
    ("x.jpg", encoded(other(), "GIF"), "unsupported", "is a GIF"),
    ("x.bmp", huge_bmp(), "too-large", "400000000 pixels"),
    ("x.JPEG", JPEG[: len(JPEG) // 2], "truncated", f"missing after {len(JPEG) // 2:,} bytes"),
    ("x.tif", encoded(other(), "TIFF")[:5000], "truncated", "Pillow: "),
    ("x.png", broken_png(), "undecodable", "Pillow: "),
    ("x.JPEG", encoded(other().convert("L")), "grayscale", "mode L"),
    ("x.png", encoded(other().convert("1"), "PNG"), "grayscale", "mode 1"),
    ("x.JPEG", encoded(other().convert("CMYK")), "cmyk", "four channels"),
    ("x.JPEG", encoded(other(), "PNG"), "misnamed", "is a PNG"),
    ("x.png", JPEG, "misnamed", "is a JPEG"),
    ("x.JPEG", rotated("JPEG"), "orientation", "EXIF orientation 6"),
    ("x.tif", rotated("TIFF"), "orientation", "EXIF orientation 6"),
]


@pytest.mark.parametrize(("name", "content", "kind", "detail"), FILES)
def test_a_flawed_file_is_found_once_and_explained(
    tree: Path, name: str, content: bytes, kind: str, detail: str
) -> None:
    """With its split, its class and its path; nothing else in the tree is found."""
    (tree / "train/flower" / name).write_bytes(content)
    report = verify_tree(tree)
    (finding,) = report.findings
    assert finding[:4] == ("train", "flower", f"train/flower/{name}", kind)
    assert detail in finding.detail
    assert report.num_images == 7


GOOD = [
    ("x.jpeg", encoded(other(), quality=50, progressive=True)),
    ("x.PNG", encoded(other().convert("RGBA"), "PNG")),
    ("x.png", encoded(other().quantize(), "PNG")),
    ("x.bmp", encoded(other(), "BMP")),
    ("x.tiff", encoded(other(), "TIFF", compression="tiff_lzw")),
    ("x.webp", encoded(other(), "WEBP")),
    ("x.jpg", encoded(other(), "MPO", save_all=True, append_images=[other().rotate(180)])),
]


def test_images_of_every_format_that_trains_are_fine(tree: Path) -> None:
    """JPEG, progressive or with a preview, PNG, BMP, TIFF and WebP."""
    for index, (name, content) in enumerate(GOOD):
        (tree / "train/china" / f"{index}{name}").write_bytes(content)
    assert verify_tree(tree) == Report(6 + len(GOOD), 0, [])


def test_a_link_to_nothing_is_unreadable(tree: Path) -> None:
    """It is listed, as an image that the disk does not give."""
    (tree / "train/china/gone.JPEG").symlink_to(tree / "nowhere")
    assert verify_tree(tree).findings == [
        Finding(
            "train", "china", "train/china/gone.JPEG", "unreadable", "No such file or directory"
        )
    ]


def test_an_image_whose_header_and_end_are_sound_can_be_undecodable(tree: Path) -> None:
    """A JPEG with a spoilt Huffman table passes the scan before a training."""
    path = tree / "test_me"
    path.write_bytes(encoded(other()))
    damage(path)
    assert scan_bytes(path.read_bytes()).problem == 0
    path.rename(tree / "val/china/x.JPEG")
    (finding,) = verify_tree(tree).findings
    assert finding[:4] == ("test", "china", "val/china/x.JPEG", "undecodable")


def test_what_pillow_decodes_and_dali_does_not_is_found(tree: Path) -> None:
    """32-bit TIFF is such; without DALI it goes unseen."""
    content = encoded(other().convert("I"), "TIFF")
    assert [kind for kind, _ in look("x.tif", content)] == ["grayscale"]
    (tree / "train/china/x.tif").write_bytes(content)
    kinds = {finding.kind: finding.detail for finding in verify_tree(tree).findings}
    assert kinds.keys() == {"grayscale", "undecodable"}
    assert kinds["undecodable"].startswith("DALI: ")
    assert [f.kind for f in verify_tree(tree, decode=None).findings] == ["grayscale"]


def test_dali_s_decoder_names_each_of_the_bad_among_several_batches() -> None:
    """In the first, in a later and in the last, shorter batch; none that is good."""
    bad = encoded(other().convert("I"), "TIFF")
    contents = [encoded(image) for image in cuts(1, 40)]
    for index in (3, 5, 39):
        contents[index] = bad
    reasons = decode_with_dali(contents)
    assert [index for index, reason in enumerate(reasons) if reason] == [3, 5, 39]


def test_nothing_but_whole_images_reaches_the_second_decoder(tree: Path) -> None:
    """DALI may crash on the rest: here the decoder surely does."""
    kinds = []
    for index, (name, content, kind, _) in enumerate(FILES[:6]):
        (tree / "train/china" / f"{index}{name}").write_bytes(content)
        kinds.append(kind)
    findings = verify_tree(tree, decode=refuse_strangers).findings
    assert [finding.kind for finding in findings] == kinds


def test_a_file_at_which_the_decoder_crashes_is_named_and_the_rest_is_checked(tree: Path) -> None:
    """Also what lies beside it, in the chunk that the crash took along."""
    folder = tree / "train/china"
    for index, image in enumerate(cuts(0, 20, seed=3)):
        image.save(folder / f"more{index:02d}.JPEG")
    other(0).save(folder / "more04x.JPEG", comment=LETHAL)
    (folder / "more05.JPEG").write_bytes(encoded(other(1).convert("L")))
    findings = verify_tree(tree, decode=crash_at_lethal).findings
    assert [(f.image, f.kind) for f in findings] == [
        ("train/china/more04x.JPEG", "crash"),
        ("train/china/more05.JPEG", "grayscale"),
    ]
    assert "SIGSEGV" in findings[0].detail


def test_a_crash_that_no_file_alone_causes_is_not_forgotten(tree: Path) -> None:
    """It is noted at the first of the images that were decoded together."""
    for index, image in enumerate(cuts(0, 20, seed=3)):
        image.save(tree / f"train/china/more{index:02d}.JPEG", comment=LETHAL)
    findings = verify_tree(tree, decode=crash_in_company).findings
    assert {finding.kind for finding in findings} == {"crash"}
    assert all("each alone did not" in finding.detail for finding in findings)


def test_a_name_that_is_no_text_is_written_readably(tree: Path, tmp_path: Path) -> None:
    """A file may be named by any bytes; those that are no UTF-8 are shown escaped."""
    path = os.fsencode(tree / "train/china") + b"/\xff.JPEG"
    Path(os.fsdecode(path)).write_bytes(b"")
    assert command(tree, output=tmp_path / "v.csv") == 1
    assert r"train/china/\xff.JPEG" in (tmp_path / "v.csv").read_text()


# ---- duplicates, classes, layouts


@pytest.mark.parametrize(
    ("copy", "detail"),
    [
        ("train/china/9.JPEG", "same bytes as train/china/0001.JPEG"),
        (
            "train/flower/9.JPEG",
            "same bytes as train/china/0001.JPEG, in another class, 'china'",
        ),
        ("val/china/9.JPEG", "same bytes as train/china/0001.JPEG, in another split, 'train'"),
        (
            "val/flower/9.JPEG",
            "same bytes as train/china/0001.JPEG, in another class, 'china', in another split, "
            "'train'",
        ),
    ],
)
def test_a_duplicate_names_the_first_and_where_that_is_not(
    tree: Path, copy: str, detail: str
) -> None:
    """In the same class, another class, another split, or both."""
    (tree / copy).write_bytes((tree / "train/china/0001.JPEG").read_bytes())
    (finding,) = verify_tree(tree).findings
    assert (finding.image, finding.kind, finding.detail) == (copy, "duplicate", detail)


def test_a_class_without_images_is_found_in_each_split(tree: Path) -> None:
    """An empty folder of a class, and one that a held-out split does not have."""
    (tree / "train/empty").mkdir()
    found = [(f.split, f.class_name, f.kind) for f in verify_tree(tree).findings]
    assert found == [("train", "empty", "empty-class"), ("test", "empty", "empty-class")]


def test_folders_of_classes_without_splits_are_checked(tree: Path) -> None:
    """A tree that is to be divided yet."""
    assert verify("folder", str(tree / "train"), decode=None) == Report(4, 0, [])


def test_as_many_images_as_workers_times_chunks_are_all_looked_at(tmp_path: Path) -> None:
    """Each of 30 flawed files, whatever the number of workers."""
    tree = write_tree(tmp_path / "tree", train=0, val=1)
    for index in range(30):
        (tree / f"train/china/{index:02d}.JPEG").write_bytes(b"")
    Image.new("RGB", (8, 8)).save(tree / "train/flower/x.JPEG")
    for num_workers in (1, 2, 3):
        report = verify("folder", str(tree), decode=None, num_workers=num_workers)
        assert [f.image for f in report.findings] == [
            f"train/china/{index:02d}.JPEG" for index in range(30)
        ]


# ---- shards


@pytest.fixture
def shards(tree: Path, tmp_path: Path) -> Path:
    """The tree in shards of two images, with the `pack.json` of a pack."""
    folder = write_shards(tree, tmp_path / "shards", per_shard=2)
    write_pack_json(folder)
    return folder


def write_pack_json(folder: Path) -> None:
    entries = [
        {
            "name": path.name,
            "split": path.name.partition("-")[0],
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "num_bytes": path.stat().st_size,
            "num_images": 2,
        }
        for path in sorted(folder.glob("*.tar"))
    ]
    (folder / "pack.json").write_text(json.dumps({"shards": entries}))


def verify_shards(folder: Path) -> Report:
    return verify("webdataset", str(folder), decode=decode_with_dali, num_workers=2)


def test_shards_as_they_were_packed_are_fine(shards: Path) -> None:
    """Their images are decoded, their checksums agree."""
    assert verify_shards(shards) == Report(6, 0, [])


def test_a_flawed_image_in_a_shard_is_named_with_its_shard(shards: Path) -> None:
    """As Manifest.where does."""
    image = encoded(other().convert("L"))
    members = [("china/9.jpeg", image), ("china/9.cls", b"1")]
    (shards / "val-0007.tar").write_bytes(tar(members))
    write_pack_json(shards)
    assert verify_shards(shards).findings == [
        Finding("test", "flower", "val-0007.tar:china/9.jpeg", "grayscale", "mode L")
    ]


def test_a_shard_with_another_checksum_is_found(shards: Path) -> None:
    """One changed byte between the images, which no decoder meets."""
    path = shards / "train-0001.tar"
    content = bytearray(path.read_bytes())
    content[300] ^= 1  # in the padding of a header: not part of an image
    content[148:156] = b"%06o\0 " % (sum(content[:148]) + 8 * 32 + sum(content[156:512]))
    path.write_bytes(content)
    report = verify_shards(shards)
    (finding,) = report.findings
    assert finding[:4] == ("train", "", "train-0001.tar", "checksum")
    assert report.num_images == 6


def test_shards_that_are_lost_or_were_not_packed_are_found(shards: Path) -> None:
    """What pack.json lists is what there must be."""
    (shards / "train-0001.tar").rename(shards / "train-0009.tar")
    assert [(f.image, f.kind, f.detail) for f in verify_shards(shards).findings] == [
        ("train-0009.tar", "checksum", "pack.json does not list it"),
        ("train-0001.tar", "checksum", "pack.json lists it, and it is not here"),
    ]


def cut(content: bytes) -> bytes:
    """A shard that ends in the pixels of its first image."""
    return content[: content.index(b"\xff\xda") + 100]


def cut_between_samples(content: bytes) -> bytes:
    """A shard without its second sample: for `tarfile` a shorter one."""
    return content[: content.index(b"china/0001.jpeg") + 200]


def without_labels(content: bytes) -> bytes:
    return tar([("china/9.jpeg", JPEG)])


@pytest.mark.parametrize(
    ("spoil", "detail"),
    [
        (cut, "is no whole tar file"),
        (cut_between_samples, "is cut off"),
        (without_labels, "has no label"),
    ],
)
def test_a_damaged_shard_is_a_finding_and_the_others_are_checked(
    shards: Path, spoil: Callable[[bytes], bytes], detail: str
) -> None:
    """Whoever made the shards."""
    path = shards / "train-0000.tar"
    path.write_bytes(spoil(path.read_bytes()))
    (shards / "pack.json").unlink()
    gray = [("china/9.jpeg", encoded(other().convert("L"))), ("china/9.cls", b"0")]
    (shards / "train-0007.tar").write_bytes(tar(gray))
    found = {f.kind: f for f in verify_shards(shards).findings}
    assert found["shard"].image == "train-0000.tar"
    assert detail in found["shard"].detail
    assert found["grayscale"].image == "train-0007.tar:china/9.jpeg"


# ---- arrays


def write_idx(folder: Path, part: str, images: np.ndarray, labels: list[int]) -> None:
    folder.mkdir(exist_ok=True)
    head = struct.pack(">HBB3I", 0, 8, 3, *images.shape)
    (folder / f"{part}-images-idx3-ubyte").write_bytes(head + images.astype(np.uint8).tobytes())
    head = struct.pack(">HBBI", 0, 8, 1, len(labels))
    (folder / f"{part}-labels-idx1-ubyte").write_bytes(head + bytes(labels))


def test_duplicates_and_empty_classes_are_found_in_arrays(tmp_path: Path) -> None:
    """An image of the test that is also trained on, under another label; no image of class 1."""
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 5))
    write_idx(tmp_path / "idx", "train", images[:3], [0, 2, 2])
    write_idx(tmp_path / "idx", "t10k", images[[3, 1]], [1, 0])
    report = verify("idx", str(tmp_path / "idx"), decode=None)
    assert report.num_images == 5
    assert report.findings == [
        Finding("train", "1", "", "empty-class", "no images"),
        Finding("test", "2", "", "empty-class", "no images"),
        Finding(
            "test",
            "0",
            "test[1]",
            "duplicate",
            "same bytes as train[1], in another class, '2', in another split, 'train'",
        ),
    ]


# ---- the command


def command(source: Path | str, *words: str, output: Path) -> int:
    """The exit code of the command, run in this process."""
    options = ["--output", str(output), "--workers", "2"]
    return run_command(["data", "verify", str(source), *options, *words])


def test_a_clean_source_ends_with_one_line_and_exit_code_0(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its list is empty; what is not named as an image is counted."""
    (tree / "train/china/readme.txt").write_text("no image")
    assert command(tree, output=tmp_path / "v.csv") == 0
    printed = capsys.readouterr()
    assert printed.out == f"{tree}: all 6 images are fine (files of other names, ignored: 1)\n"
    assert printed.err == ""
    assert (tmp_path / "v.csv").read_text() == "split,class,image,finding,detail\n"
    assert command("digits", output=tmp_path / "v.csv") == 0
    assert capsys.readouterr().out == "digits: all 1,797 images are fine\n"


def test_a_finding_ends_with_a_table_a_list_and_exit_code_1(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One row of the file for each finding, quoted as CSV is."""
    (tree / "train/china/a,b.JPEG").write_bytes(b"")
    (tree / "train/china/gray.JPEG").write_bytes(encoded(other().convert("L")))
    output = tmp_path / "lists/v.csv"
    assert command(tree, output=output) == 1
    printed = capsys.readouterr()
    assert printed.err == f"error: {tree}: 2 findings in 8 images; {output} lists them\n"
    assert "empty" in printed.out
    assert "grayscale" in printed.out
    assert list(csv.reader(output.read_text().splitlines())) == [
        ["split", "class", "image", "finding", "detail"],
        ["train", "china", "train/china/a,b.JPEG", "empty", "0 bytes"],
        ["train", "china", "train/china/gray.JPEG", "grayscale", "mode L"],
    ]


def test_allowed_findings_are_no_fault_and_still_listed(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Marked in the table; whatever else is found is a fault."""
    (tree / "train/china/gray.JPEG").write_bytes(encoded(other().convert("L")))
    output = tmp_path / "v.csv"
    assert command(tree, "--allow", "grayscale", "cmyk", output=output) == 0
    printed = capsys.readouterr()
    assert "grayscale (allowed)" in printed.out
    assert printed.err == ""
    assert "train/china/gray.JPEG,grayscale" in output.read_text()
    (tree / "train/china/none.JPEG").write_bytes(b"")
    assert command(tree, "--allow", "grayscale", "cmyk", output=output) == 1
    assert "1 finding in 8 images" in capsys.readouterr().err


def test_json_is_one_document_and_all_of_stdout(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The number of images, the findings and their counts; the exit code is the same."""
    assert command(tree, "--json", output=tmp_path / "v.csv") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["num_images"], document["findings"], document["counts"]) == (6, [], {})
    (tree / "train/china/none.JPEG").write_bytes(b"")
    assert command(tree, "--json", output=tmp_path / "v.csv") == 1
    document = json.loads(capsys.readouterr().out)
    assert document["num_images"] == 7
    assert document["counts"] == {"empty": 1}
    assert document["findings"] == [
        {
            "split": "train",
            "class": "china",
            "image": "train/china/none.JPEG",
            "finding": "empty",
            "detail": "0 bytes",
        }
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--allow", "greyscale"], "--allow greyscale: there is no such finding; did you mean "),
        (["--workers", "0"], "--workers 0: must be at least 1"),
        (["--output", "/"], "--output /: is a folder"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    """Before anything is read."""
    assert command(tree, *words, output=tmp_path / "v.csv") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {line}")
    assert error.count("\n") == 1


def test_a_source_without_images_is_not_fine(tmp_path: Path) -> None:
    """A shard without a sample has nothing wrong, and nothing to train on."""
    (tmp_path / "train-0.tar").write_bytes(tar([]))
    with pytest.raises(UserError, match="holds no images"):
        verify("webdataset", str(tmp_path), decode=None)


def test_without_dali_pillow_alone_decodes_and_a_note_says_so(
    tree: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On stderr, so that --json stays one document."""

    def missing() -> None:
        raise UserError("not installed")

    monkeypatch.setattr(launch.verify, "require_dali", missing)
    (tree / "train/china/x.tif").write_bytes(encoded(other().convert("I"), "TIFF"))
    assert command(tree, "--allow", "grayscale", "--json", output=tmp_path / "v.csv") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["counts"] == {"grayscale": 1}
    assert printed.err == "note: DALI is not installed; Pillow alone decodes the images\n"


def test_every_kind_of_finding_is_explained_and_can_be_allowed(tree: Path, tmp_path: Path) -> None:
    """What the scan before a training refuses is among them; here the command is a process."""
    assert all(KINDS.values())
    assert {kind_of(problem) for problem in PROBLEMS[1:]} < KINDS.keys()
    for index, (name, content, _, _) in enumerate(FILES):
        (tree / "train/china" / f"{index:02d}{name}").write_bytes(content)
    words = ["data", "verify", str(tree), "--output", str(tmp_path / "v.csv"), "--workers", "2"]
    assert tombola(*words, output=tmp_path / "printed") == [1]
    assert tombola(*words, "--allow", *KINDS, output=tmp_path / "printed") == [0]


# ---- interruption


def descendants(process: int) -> set[int]:
    """All processes below one, by /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (facts := stat_of(int(entry.name))):
            children.setdefault(int(facts[1]), []).append(int(entry.name))
    found, todo = set[int](), [process]
    while todo:
        below = children.get(todo.pop(), [])
        found.update(below)
        todo += below
    return found


def stat_of(process: int) -> list[str]:
    """State, parent, ... of a process; empty if it is gone, or only waits to be reaped."""
    try:
        facts = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
    return [] if facts[0] == "Z" else facts


def test_an_interrupt_ends_it_and_its_workers(tmp_path: Path) -> None:
    """SIGINT to the command alone, while its workers decode: none of them is left."""
    tree = write_tree(tmp_path / "tree", train=1, val=1, side=256)
    for index in range(20_000):
        os.link(tree / "train/china/0000.JPEG", tree / f"train/china/x{index:05d}.JPEG")
    words = [sys.executable, "-m", "launch", "data", "verify", str(tree), "--workers", "2"]
    with subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(lambda: len(descendants(process.pid)) >= 4)  # with two that serve these
            time.sleep(2)
            below = descendants(process.pid)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE) == 1
            wait_for(lambda: not any(map(stat_of, below)))
        finally:
            process.kill()
        assert process.stderr is not None
        assert process.stderr.read() == (
            "error: stopped: not all images were checked, and nothing was written\n"
        )
    assert not (tmp_path / "verify.csv").exists()
