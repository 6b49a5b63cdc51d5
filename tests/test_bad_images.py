"""Images that cannot be decoded: named and refused, or replaced in the same way everywhere."""

import gc
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from jpegs import (
    CLASSES,
    cuts,
    encoded,
    opened,
    prepared,
    without_huffman_tables,
    without_its_end,
    write_shards,
    write_tree,
)
from waiting import PATIENCE

from data.config import DataConfig
from data.encoded import EncodedImages
from data.errors import RunError, UserError
from data.loader import Batch, Replacement
from data.order import SampleOrder
from data.scan import PROBLEMS, scan_bytes

PER_CLASS, BATCH, STEPS = 12, 5, 4
SEED = 3
TEXT = b"This is no image, whatever its name says.\n" * 40
GIF = encoded(cuts(0, 1, side=40)[0], "GIF")

Damage = Callable[[bytes], bytes]
AFTER_THE_SCAN: dict[str, tuple[Damage, str]] = {
    "text": (lambda jpeg: TEXT, "not an image"),
    "empty": (lambda jpeg: b"", "empty"),
    "gif": (lambda jpeg: GIF, "unsupported format"),
    "only a header": (lambda jpeg: jpeg[:300], "not an image"),
    "cut off": (lambda jpeg: jpeg[: jpeg.index(b"\xff\xda") + 60], "truncated"),
}
"""what happens to a file between the catalogue and the training, and how that is called"""


class Source(NamedTuple):
    """A data set whose catalogue is made."""

    config: DataConfig
    cache: Path
    token: str

    def stream(self, count: int, *, position: int = 0, **place: Any) -> "Stream":
        """The next batches, and what was replaced in them."""
        loader = opened(self.config, self.cache, self.token, **place).loader(SEED)
        loader.load_state_dict({"position": position})
        batches = list(itertools.islice(loader, count))
        return Stream(batches, loader.replacements())


class Stream(NamedTuple):
    """What a loader gave."""

    batches: list[Batch]
    replacements: list[Replacement]


def config_of(root: Path, **options: Any) -> DataConfig:
    """Batches of 5 of a tree's 24 images, in 32x32 pixels; what is bad is skipped."""
    small = {"batch_size": BATCH, "eval_batch_size": 4, "size": ("32",), "threads": 1}
    return DataConfig(f"folder:{root}", **{**small, "on_bad": "skip", **options})


def source_of(root: Path, **options: Any) -> Source:
    """A tree with its catalogue beside it."""
    cache = root.with_name(f"{root.name}-cache")
    config = config_of(root, **options)
    return Source(config, cache, prepared(config, cache))


def name_of(index: int, split: str = "train") -> str:
    """The path of an image in the order of the catalogue."""
    per_class = PER_CLASS if split == "train" else 4
    return f"{split}/{CLASSES[index // per_class]}/{index % per_class:04d}.JPEG"


def next_of_class(index: int) -> int:
    """The image that stands in for another, if it is whole itself."""
    return index // PER_CLASS * PER_CLASS + (index + 1) % PER_CLASS


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 12 images, and 4 of each held out; no file is as large as 4 kB."""
    folder = tmp_path_factory.mktemp("bad") / "tree"
    return write_tree(folder, train=PER_CLASS, val=4, side=60)


@pytest.fixture(scope="module")
def intact(tree: Path) -> list[Batch]:
    """Two epochs and one batch of the tree without damage."""
    return source_of(tree).stream(9).batches


def copied(tree: Path, folder: Path) -> Path:
    """The tree, to be damaged."""
    return Path(shutil.copytree(tree, folder))


def damage(root: Path, damages: dict[int, Damage], split: str = "train") -> None:
    """Changes the files of these images."""
    for index, change in damages.items():
        path = root / name_of(index, split)
        path.write_bytes(change(path.read_bytes()))


def twin(tree: Path, folder: Path, shows: dict[int, int]) -> list[Batch]:
    """The stream of a tree in which each of these images is a copy of another, by its number."""
    root = copied(tree, folder)
    for index, other in shows.items():
        shutil.copyfile(tree / name_of(other), root / name_of(index))
    return source_of(root).stream(9).batches


def appearances(*images: int) -> dict[int, list[tuple[int, int]]]:
    """The `(position, image)` at which these images are seen, by batches of two epochs."""
    order = SampleOrder(2 * PER_CLASS, BATCH, SEED)
    return {
        position: [(position, i) for i in order.batch(*divmod(position, STEPS)) if i in images]
        for position in range(9)
    }


def seen_at(position: int, place: int = 1) -> int:
    """The image at a place of a batch of the first epoch."""
    return int(SampleOrder(2 * PER_CLASS, BATCH, SEED).batch(*divmod(position, STEPS))[place])


def expected_replacements(
    root: Path, shows: dict[int, int], reasons: dict[int, str]
) -> list[Replacement]:
    """One for each appearance of a bad image in nine batches, in their order."""
    return [
        Replacement(
            position + 1,
            name_of(image),
            name_of(shows[image]),
            reasons[image],
        )
        for found in appearances(*shows).values()
        for position, image in found
    ]


def assert_equal_batches(found: list[Batch], expected: list[Batch]) -> None:
    """Bit for bit."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.images, other.images)


def joined(parts: tuple[Batch, ...]) -> Batch:
    """The ranks' shares in rank order."""
    return Batch(torch.cat([b.images for b in parts]), torch.cat([b.labels for b in parts]))


# ---- the damage itself


def test_the_hidden_damages_pass_the_scan(tree: Path) -> None:
    """Whatever header and end tell, they are right: only decoding finds these."""
    jpeg = (tree / name_of(0)).read_bytes()
    whole = scan_bytes(jpeg)
    assert whole.problem == 0
    for damaged in (without_huffman_tables(jpeg), without_its_end(jpeg)):
        assert scan_bytes(damaged) == whole


@pytest.mark.parametrize("kind", AFTER_THE_SCAN)
def test_the_other_damages_do_not(tree: Path, kind: str) -> None:
    """And are called as the tests below expect."""
    change, reason = AFTER_THE_SCAN[kind]
    content = change((tree / name_of(0)).read_bytes())
    assert PROBLEMS[scan_bytes(content).problem] == reason


# ---- refused


@pytest.mark.parametrize("kind", AFTER_THE_SCAN)
@pytest.mark.parametrize("position", [0, 2])
def test_a_file_damaged_after_the_scan_ends_the_run_by_its_name(
    tree: Path, intact: list[Batch], tmp_path: Path, kind: str, position: int
) -> None:
    """Path, reason, epoch and step; every batch before it comes as it would have."""
    root = copied(tree, tmp_path / "tree")
    source = source_of(root, on_bad="error", prefetch=3)
    bad = seen_at(position)
    damage(root, {bad: AFTER_THE_SCAN[kind][0]})
    loader = opened(source.config, source.cache, source.token).loader(SEED)
    batches: list[Batch] = []
    with pytest.raises(RunError) as caught:
        iter_into(loader, batches)
    assert_equal_batches(batches, intact[:position])
    assert loader.state_dict() == {"position": position}
    message = str(caught.value)
    assert name_of(bad) in message
    assert AFTER_THE_SCAN[kind][1] in message
    assert f"(epoch 0, step {position})" in message
    assert "--data.on-bad skip" in message
    assert loader.replacements() == []


def iter_into(loader: Any, batches: list[Batch]) -> None:
    """Adds batch after batch, so that those before an error are kept."""
    for batch in loader:
        batches.append(batch)
        assert len(batches) < 20, "no error came"


def test_damage_that_the_scan_does_not_see_ends_the_run_in_a_later_epoch_too(
    tree: Path, intact: list[Batch], tmp_path: Path
) -> None:
    """A resume behind the first epoch names the epoch and the step of the whole run."""
    root = copied(tree, tmp_path / "tree")
    bad = seen_at(5)
    damage(root, {bad: without_huffman_tables})
    source = source_of(root, on_bad="error")
    loader = opened(source.config, source.cache, source.token).loader(SEED)
    loader.load_state_dict({"position": 4})
    batches: list[Batch] = []
    with pytest.raises(RunError, match=rf"{name_of(bad)}: .* \(epoch 1, step 5\)"):
        iter_into(loader, batches)
    assert_equal_batches(batches, intact[4:5])


def test_an_image_that_the_scan_refuses_ends_the_run_before_it_begins(
    tree: Path, tmp_path: Path
) -> None:
    """How many, the first by its name, why, and both remedies."""
    root = copied(tree, tmp_path / "tree")
    damage(root, {7: AFTER_THE_SCAN["text"][0], 9: AFTER_THE_SCAN["empty"][0]})
    with pytest.raises(UserError) as caught:
        source_of(root, on_bad="error")
    message = str(caught.value)
    assert f"2 of 24 train images cannot be used: {name_of(7)} is not an image ..." in message
    assert "tombola data verify" in message
    assert "--data.on-bad skip" in message


# ---- replaced


@pytest.mark.parametrize("kind", AFTER_THE_SCAN)
def test_a_file_damaged_after_the_scan_shows_the_next_of_its_class(
    tree: Path, intact: list[Batch], tmp_path: Path, kind: str
) -> None:
    """Bit for bit as if the file held that image; labels and all other images are untouched."""
    bad = seen_at(1)
    shows = {bad: next_of_class(bad)}
    root = copied(tree, tmp_path / "tree")
    source = source_of(root)
    damage(root, {bad: AFTER_THE_SCAN[kind][0]})
    found = source.stream(9)
    assert_equal_batches(found.batches, twin(tree, tmp_path / "twin", shows))
    reasons = {bad: AFTER_THE_SCAN[kind][1]}
    assert found.replacements == expected_replacements(root, shows, reasons)
    order = SampleOrder(2 * PER_CLASS, BATCH, SEED)
    for position, (batch, whole) in enumerate(zip(found.batches, intact, strict=True)):
        others = torch.from_numpy(order.batch(*divmod(position, STEPS)) != bad)
        assert torch.equal(batch.labels, whole.labels)
        assert torch.equal(batch.images[others], whole.images[others])
        assert not (~others).any() or not torch.equal(batch.images, whole.images)


class Damaged(NamedTuple):
    """A source with several bad images, and what it has to show."""

    source: Source
    batches: list[Batch]
    replacements: list[Replacement]


@pytest.fixture(scope="module")
def damaged(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Damaged:
    """A quarter of the images: known at the scan, hidden, changed since, and in a row.

    0, 1 and 2 follow one another; 11, the last of its class, is followed by 0.
    """
    folder = tmp_path_factory.mktemp("damaged")
    root = copied(tree, folder / "tree")
    text, empty = AFTER_THE_SCAN["text"][0], AFTER_THE_SCAN["empty"][0]
    damage(root, {0: text, 13: empty, 1: without_huffman_tables})
    source = source_of(root)
    damage(root, {2: text, 11: lambda jpeg: b"no image", 20: without_huffman_tables})
    shows = {0: 3, 1: 3, 2: 3, 11: 3, 13: 14, 20: 21}
    hidden = "damaged data"
    reasons = {0: "not an image", 1: hidden, 2: "not an image", 11: "not an image"}
    reasons |= {13: "empty", 20: hidden}
    return Damaged(
        source,
        twin(tree, folder / "twin", shows),
        expected_replacements(root, shows, reasons),
    )


def test_bad_images_in_a_row_show_the_next_that_is_whole(damaged: Damaged) -> None:
    """Round the end of the class if need be; each is named once, at each step that it is due."""
    found = damaged.source.stream(9)
    assert_equal_batches(found.batches, damaged.batches)
    assert found.replacements == damaged.replacements
    assert len(found.replacements) >= 8


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("prefetch", [2, 4])
def test_what_is_replaced_does_not_depend_on_prefetching(
    damaged: Damaged, threads: int, prefetch: int
) -> None:
    """Several bad batches may be decoded ahead at once."""
    config = replace(damaged.source.config, threads=threads, prefetch=prefetch)
    found = damaged.source._replace(config=config).stream(9)
    assert_equal_batches(found.batches, damaged.batches)
    assert found.replacements == damaged.replacements


@pytest.mark.parametrize("world_size", [2, 3])
def test_what_is_replaced_does_not_depend_on_the_number_of_ranks(
    damaged: Damaged, world_size: int
) -> None:
    """The joined batches are the same, and each replacement is named by the rank that shows it."""
    ranks = [
        damaged.source.stream(9, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    batches = [joined(parts) for parts in zip(*(rank.batches for rank in ranks), strict=True)]
    assert_equal_batches(batches, damaged.batches)
    found = [replacement for rank in ranks for replacement in rank.replacements]
    assert sorted(found) == sorted(damaged.replacements)


def test_what_is_replaced_is_the_same_after_a_resume_at_any_step(damaged: Damaged) -> None:
    """By a process that has not yet met the bad images; only what it hands out is named."""
    for position in range(1, 9):
        found = damaged.source.stream(9 - position, position=position)
        assert_equal_batches(found.batches, damaged.batches[position:])
        due = [r for r in damaged.replacements if r.step > position]
        assert found.replacements == due


def test_replacements_are_named_once_when_their_batch_is_handed_out(damaged: Damaged) -> None:
    """Not when it is decoded ahead, and not again when asked again."""
    loader = opened(damaged.source.config, damaged.source.cache, damaged.source.token).loader(SEED)
    assert loader.skips_bad
    batches = iter(loader)
    for position in range(9):
        next(batches)
        due = [r for r in damaged.replacements if r.step == position + 1]
        assert loader.replacements() == due
        assert loader.replacements() == []


def test_damage_below_the_window_does_no_harm(
    tree: Path, tmp_path: Path, intact: list[Batch]
) -> None:
    """An image that lacks its lower part is shown where a window needs only the upper one.

    Which of the two is a pure function of epoch and image: the same on two ranks, and from any
    step on.
    """
    bad = [1, 4, 7, 14, 17, 20]
    root = copied(tree, tmp_path / "tree")
    damage(root, {image: lambda jpeg: without_its_end(jpeg, 0.7) for image in bad})
    source = source_of(root)
    found = source.stream(9)
    replaced = {(r.step - 1, r.image) for r in found.replacements}
    due = {(p, name_of(i)) for at in appearances(*bad).values() for p, i in at}
    assert replaced < due  # both occur
    assert replaced
    copies = twin(tree, tmp_path / "twin", {image: image + 1 for image in bad})
    order = SampleOrder(2 * PER_CLASS, BATCH, SEED)
    for position, batch in enumerate(found.batches):
        for place, image in enumerate(order.batch(*divmod(position, STEPS)).tolist()):
            shown = copies if (position, name_of(image)) in replaced else intact
            assert torch.equal(batch.images[place], shown[position].images[place])
    ranks = [source.stream(9, rank=rank, world_size=2).batches for rank in range(2)]
    assert_equal_batches([joined(parts) for parts in zip(*ranks, strict=True)], found.batches)
    for position in (2, 5):
        resumed = source.stream(9 - position, position=position)
        assert_equal_batches(resumed.batches, found.batches[position:])
        assert resumed.replacements == [r for r in found.replacements if r.step > position]


def test_whole_images_are_not_replaced(tree: Path, intact: list[Batch]) -> None:
    """`on_bad` changes nothing where nothing is bad."""
    for on_bad in ("skip", "error"):
        found = source_of(tree, on_bad=on_bad).stream(9)
        assert_equal_batches(found.batches, intact)
        assert found.replacements == []


# ---- nothing to show


@pytest.mark.parametrize("known", [True, False])
def test_a_class_without_a_whole_image_ends_the_run(
    tree: Path, tmp_path: Path, known: bool
) -> None:
    """Known from the scan, or found out one by one: an error that names one of them, no hang."""
    root = copied(tree, tmp_path / "tree")
    all_of_china = dict.fromkeys(range(PER_CLASS), AFTER_THE_SCAN["text"][0])
    if known:
        damage(root, all_of_china)
    source = source_of(root)
    if not known:
        damage(root, all_of_china)
    with pytest.raises(RunError, match=r"no image of the class of train/china/\d{4}\.JPEG can be"):
        source.stream(9)


@pytest.mark.parametrize("on_bad", ["skip", "error"])
def test_what_cannot_be_read_ends_the_run_and_is_never_replaced(
    tree: Path, tmp_path: Path, on_bad: str
) -> None:
    """A file, or a disk, that is no longer there may be there again."""
    root = copied(tree, tmp_path / "tree")
    source = source_of(root, on_bad=on_bad)
    bad = seen_at(2)
    (root / name_of(bad)).unlink()
    with pytest.raises(RunError, match=rf"cannot read {name_of(bad)}: No such file or directory"):
        source.stream(9)
    root.rename(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=r"cannot read train/\w+/\d{4}\.JPEG: No such file"):
        source.stream(2)


# ---- the evaluation


@pytest.mark.parametrize("kind", [*AFTER_THE_SCAN, "hidden"])
@pytest.mark.parametrize("on_bad", ["skip", "error"])
def test_a_bad_held_out_image_ends_the_run_by_its_name(
    tree: Path, tmp_path: Path, kind: str, on_bad: str
) -> None:
    """An accuracy over fewer images would be another measure; the batches before come whole."""
    change, reason = AFTER_THE_SCAN.get(kind, (without_huffman_tables, "damaged data"))
    root = copied(tree, tmp_path / "tree")
    source = source_of(root, on_bad=on_bad)
    damage(root, {6: change}, split="val")
    data = opened(source.config, source.cache, source.token)
    batches: list[Batch] = []
    with pytest.raises(RunError) as caught:
        iter_into(data.evaluation["test"], batches)
    assert [batch.labels.tolist() for batch in batches] == [[0] * 4]
    assert f"{name_of(6, 'val')}, of the evaluated images: {reason}" in str(caught.value)
    assert next(iter(data.loader(SEED))).images.shape == (BATCH, 3, 32, 32)  # training may go on


def test_a_held_out_image_that_the_scan_refuses_ends_the_run_before_it_begins(
    tree: Path, tmp_path: Path
) -> None:
    """Also where training images may be skipped."""
    root = copied(tree, tmp_path / "tree")
    damage(root, {3: AFTER_THE_SCAN["text"][0]}, split="val")
    with pytest.raises(UserError, match=r"1 of 8 test images cannot be used: val/china/0003") as e:
        source_of(root)
    assert "on-bad" not in str(e.value)  # which would not help


# ---- shards


@pytest.fixture
def shards(tree: Path, tmp_path: Path) -> Source:
    """The tree in three training shards of ten images, indexed."""
    folder = write_shards(tree, tmp_path / "shards", per_shard=10)
    config = replace(config_of(tree), source=f"webdataset:{folder}")
    return Source(config, tmp_path / "cache", prepared(config, tmp_path / "cache"))


def overwrite(shards: Path, tree: Path, image: int, content: bytes) -> None:
    """Overwrites the beginning of an image where it lies in a shard."""
    jpeg = (tree / name_of(image)).read_bytes()
    (path,) = [p for p in sorted(shards.glob("train-*.tar")) if jpeg in p.read_bytes()]
    with open(path, "r+b") as file:
        file.seek(path.read_bytes().index(jpeg))
        file.write(content[: len(jpeg)])


def test_damage_in_a_shard_is_replaced_as_in_a_file(
    tree: Path, tmp_path: Path, shards: Source, intact: list[Batch]
) -> None:
    """Text and zeros over an image, and hidden damage, since the shards were indexed."""
    assert_equal_batches(shards.stream(9).batches, intact)
    place = Path(shards.config.place)
    hidden = without_huffman_tables((tree / name_of(20)).read_bytes())
    for image, content in {2: TEXT[:900], 9: bytes(700), 20: hidden}.items():
        overwrite(place, tree, image, content)
    found = shards.stream(9)
    shows = {2: 3, 9: 10, 20: 21}
    assert_equal_batches(found.batches, twin(tree, tmp_path / "twin", shows))
    expected = expected_replacements(tree, shows, dict.fromkeys(shows, ""))
    assert [r.step for r in found.replacements] == [r.step for r in expected]
    for replacement in found.replacements:
        assert replacement.image.startswith("train-000")
        assert ".tar:china/00" in replacement.image or ".tar:flower/00" in replacement.image
        assert replacement.reason in ("not an image", "damaged data")
    ranks = [shards.stream(9, rank=rank, world_size=2).batches for rank in range(2)]
    assert_equal_batches([joined(parts) for parts in zip(*ranks, strict=True)], found.batches)
    refusing = shards._replace(config=replace(shards.config, on_bad="error"))
    with pytest.raises(RunError, match=r"cannot decode train-000\d\.tar:\w+/00\d\d\.jpeg: .*step"):
        refusing.stream(9)


def test_a_shard_that_is_cut_off_since_is_an_error_or_replaced(
    tree: Path, shards: Source, intact: list[Batch]
) -> None:
    """Of the last training shard, with four flowers: other flowers, or an error with its name."""
    os.truncate(Path(shards.config.place) / "train-0002.tar", 600)
    found = shards.stream(9)
    shows = {20: 12, 21: 12, 22: 12, 23: 12}
    steps = [r.step for r in expected_replacements(tree, shows, dict.fromkeys(shows, ""))]
    assert [r.step for r in found.replacements] == steps
    for one, other in zip(found.batches, intact, strict=True):
        assert torch.equal(one.labels, other.labels)
    refusing = shards._replace(config=replace(shards.config, on_bad="error"))
    with pytest.raises(RunError, match=r"cannot decode train-0002\.tar:flower/00"):
        refusing.stream(9)


def test_a_shard_that_is_gone_since_ends_the_run_by_its_name(shards: Source) -> None:
    """Also where bad images may be skipped: it may be there again."""
    (Path(shards.config.place) / "train-0002.tar").unlink()
    with pytest.raises(RunError, match=r"cannot read train-0002\.tar:flower/00.*No such file"):
        shards.stream(9)


def test_iterators_that_are_left_hold_no_threads(shards: Source) -> None:
    """Without a garbage collection: a run has hundreds of phases and evaluations."""
    data = opened(shards.config, shards.cache, shards.token)
    next(iter(data.loader(SEED)))  # what torch and DALI start once
    before = threading.active_count()
    gc.disable()
    try:
        for _ in range(4):
            next(iter(data.loader(SEED)))
            next(iter(data.evaluation["test"]))
        for _ in range(100):  # pools end by themselves, soon
            if threading.active_count() <= before:
                break
            time.sleep(0.05)
        assert threading.active_count() <= before
    finally:
        gc.enable()


def fail_some_reads(monkeypatch: pytest.MonkeyPatch, failing: dict[int, set[int]]) -> list[int]:
    """Of these images the reads of these numbers fail, counted per image. Gives what failed."""
    read, calls, failed = EncodedImages.read, defaultdict[int, Iterator[int]](itertools.count), []

    def flaky(self: EncodedImages, image: int) -> bytes:
        if next(calls[image]) in failing.get(image, ()):
            failed.append(image)
            raise OSError(5, "Input/output error")
        return read(self, image)

    monkeypatch.setattr(EncodedImages, "read", flaky)
    return failed


@pytest.mark.parametrize("on_bad", ["skip", "error"])
def test_readings_that_fail_now_and_then_cost_nothing(
    shards: Source, monkeypatch: pytest.MonkeyPatch, on_bad: str
) -> None:
    """As stores do: it is tried again, and no image is replaced.

    Of one image also the search for what is bad fails to read it, another fails in two trials of
    its batch.
    """
    source = shards._replace(config=replace(shards.config, on_bad=on_bad))
    whole = source.stream(9)
    failing = {seen_at(1): {0, 1}, seen_at(6): {0, 3}, seen_at(6, 2): {2}}
    failed = fail_some_reads(monkeypatch, failing)
    found = source.stream(9)
    assert_equal_batches(found.batches, whole.batches)
    assert not found.replacements
    assert len(failed) >= 3


def test_an_evaluation_outlives_readings_that_fail(
    shards: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every image once, in the same order, in the same pixels."""
    evaluation = opened(shards.config, shards.cache, shards.token).evaluation["test"]
    whole = list(evaluation)
    failed = fail_some_reads(monkeypatch, {0: {0, 1}, 5: {0}, 6: {1}})
    assert_equal_batches(list(evaluation), whole)
    assert len(failed) >= 3


def test_an_image_that_cannot_be_read_twice_ends_the_run_by_its_name(
    shards: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training, though bad images are skipped, and in an evaluation."""
    fail_some_reads(monkeypatch, {seen_at(1): set(range(99)), 5: set(range(99))})
    with pytest.raises(RunError, match=r"cannot read train-\d+\.tar:.*Input/output error"):
        shards.stream(9)
    evaluation = opened(shards.config, shards.cache, shards.token).evaluation["test"]
    with pytest.raises(RunError, match=r"cannot read val.*tar:.*Input/output error"):
        list(evaluation)


def test_a_batch_that_always_fails_ends_the_run(
    shards: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every image of it can be decoded alone: not tried for ever."""
    monkeypatch.setattr(EncodedImages, "content", lambda self, image: np.zeros(1, np.uint8))
    with pytest.raises(RunError, match="a batch cannot be decoded, though each of its images can"):
        shards.stream(1)


# ---- the process lives

NASTY = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
import numpy as np, torch
from data.errors import RunError
from data.pipeline import DecodeError, Decoding, Feed, decoded
from jpegs import opened
from test_bad_images import AFTER_THE_SCAN, damage, name_of, source_of

root = Path({root!r})
source = source_of(root)
paths = [root / name_of(index % 24) for index in range(64)]
feed = Feed(
    [np.frombuffer(str(path).encode(), np.uint8) for path in paths],
    np.tile(np.array([2, 2, 30, 30], np.int32), (64, 1)),
    np.full((64, 2), 32, np.float32),
    np.zeros(64, np.int32),
    np.ones((64, 3), np.float32),
)
for index, kind in enumerate({kinds!r}):
    damage(root, {{index: AFTER_THE_SCAN[kind][0]}})
    for attempt in range(4):
        decoding = Decoding("train", torch.device("cpu"), 64, from_paths=True, num_threads=2)
        try:
            list(decoded(decoding, (feed for _ in range(4))))
        except DecodeError:
            print("refused", kind, flush=True)
source.stream(4)
damage(root, {{3: AFTER_THE_SCAN["text"][0]}}, split="val")
try:
    list(opened(source.config, source.cache, source.token).evaluation["test"])
except RunError:
    print("refused an evaluation", flush=True)
"""


def test_files_that_are_no_images_do_not_kill_the_process(tree: Path, tmp_path: Path) -> None:
    """Large batches with several of them, in training and evaluation, until the exit.

    Without the look at their headers first, about every second of these batches is a crash.
    """
    root = copied(tree, tmp_path / "tree")
    here = Path(__file__).parent
    kinds = ["text", "gif", "only a header", "empty", "cut off"]
    script = NASTY.format(paths=[str(here.parent), str(here)], root=str(root), kinds=kinds)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = [f"refused {kind}" for kind in kinds for _ in range(4)]
    assert done.stdout.splitlines() == [*expected, "refused an evaluation"]
