"""Where the images of a source lie: folders as torchvision reads them, ImageNet, tar shards."""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jpegs import encoded, prepared, tar
from PIL import Image
from scipy.io import savemat
from torchvision import datasets
from torchvision.datasets import imagenet

from data.catalogue import Manifest
from data.cataloguing import make_catalogue
from data.config import DataConfig
from data.errors import UserError
from data.files import Folder
from data.layout import Tree, find_kind, find_shards, folder_tree, imagenet_tree, parse_source
from data.shards import Member, index_shard

PNG = encoded(Image.new("RGB", (5, 3)), "PNG")
WORDNET = ("n01440764", "n01443537", "n02102040", "n03000684")


def put(root: Path, *names: str, content: bytes = PNG) -> Path:
    """Writes files below `root`."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def names_and_labels(tree: Tree, split: str) -> list[tuple[str, int]]:
    """The images of a split, in their order."""
    listing = tree.splits[split]
    return [(e.name, label) for e, label in zip(listing.entries, listing.labels, strict=True)]


def as_torchvision(root: Path, split: str) -> list[tuple[str, int]]:
    """What `ImageFolder` finds in a split, in its order."""
    folder = datasets.ImageFolder(str(root / split))
    return [(os.path.relpath(path, root), label) for path, label in folder.samples]


# ---- folders of classes


def test_a_tree_is_read_as_imagefolder_reads_it(tmp_path: Path) -> None:
    """Classes and images in its order: upper case before lower, nested folders, any extension."""
    put(
        tmp_path,
        *("train/b/2.JPEG", "train/b/10.jpg", "train/b/deep/er/1.PNG", "train/b/deep/0.bmp"),
        *(
            "train/B/z.webp",
            "train/a c/x.tif",
            "train/a c/y.TIFF",
            "train/ä/é.Jpg",
            "train/ä/e.png",
        ),
        *("val/B/1.png", "val/ä/1.png", "val/a c/1.png", "val/b/1.png"),
    )
    tree = folder_tree(str(tmp_path))
    assert list(tree.classes) == datasets.ImageFolder(str(tmp_path / "train")).classes
    assert tree.classes == ("B", "a c", "b", "ä")
    assert names_and_labels(tree, "train") == as_torchvision(tmp_path, "train")
    assert names_and_labels(tree, "test") == as_torchvision(tmp_path, "val")
    assert len(tree.splits["train"].entries) == 9
    assert tree.ignored == 0


@pytest.mark.parametrize("sibling", ["x-y", "x y", "x.y", "x0", "xy"])
def test_folders_within_a_class_are_in_imagefolders_order(tmp_path: Path, sibling: str) -> None:
    """By their paths as text, in which a sibling `x-y` comes before what is inside `x`."""
    put(tmp_path, "train/c/x/in/1.png", "train/c/x/2.png", f"train/c/{sibling}/3.png")
    put(tmp_path, "val/c/4.png")
    tree = folder_tree(str(tmp_path))
    assert names_and_labels(tree, "train") == as_torchvision(tmp_path, "train")


def test_links_to_folders_and_files_are_followed(tmp_path: Path) -> None:
    """As by ImageFolder: a class may lie on another disk."""
    put(tmp_path, "elsewhere/n/1.png", "elsewhere/2.png", "set/train/a/0.png", "set/val/a/0.png")
    (tmp_path / "set/train/b").symlink_to(tmp_path / "elsewhere/n")
    (tmp_path / "set/train/a/2.png").symlink_to(tmp_path / "elsewhere/2.png")
    tree = folder_tree(str(tmp_path / "set"))
    assert names_and_labels(tree, "train") == as_torchvision(tmp_path / "set", "train")
    assert [label for _, label in names_and_labels(tree, "train")] == [0, 0, 1]


def test_sizes_and_times_are_those_of_the_files(tmp_path: Path) -> None:
    """In bytes and nanoseconds; of a link, those of what it leads to; of a broken link, zero."""
    put(tmp_path, "train/a/1.png", "val/a/1.png")
    os.utime(tmp_path / "train/a/1.png", ns=(0, 1_600_000_000_123_456_789))
    (tmp_path / "train/a/2.png").symlink_to(tmp_path / "train/a/1.png")
    (tmp_path / "train/a/3.png").symlink_to(tmp_path / "nothing")
    entries = folder_tree(str(tmp_path)).splits["train"].entries
    assert [tuple(entry) for entry in entries] == [
        ("train/a/1.png", len(PNG), 1_600_000_000_123_456_789),
        ("train/a/2.png", len(PNG), 1_600_000_000_123_456_789),
        ("train/a/3.png", 0, 0),
    ]


def test_files_that_are_no_images_are_counted_and_left_out(tmp_path: Path) -> None:
    """Other extensions, hidden files, and files beside the folders of classes."""
    put(
        tmp_path,
        *("train/a/1.png", "train/a/labels.txt", "train/a/.hidden.png", "train/a/._1.png"),
        *("train/a/png", "train/a/1.png.part", "train/stray.png", "val/a/1.png", "val/a/Thumbs.db"),
    )
    tree = folder_tree(str(tmp_path))
    assert [name for name, _ in names_and_labels(tree, "train")] == ["train/a/1.png"]
    assert tree.ignored == 6  # the stray one is in no class, and not looked for


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    """What notebooks and version control leave behind."""
    put(tmp_path, "train/a/1.png", "train/.git/2.png", "val/a/1.png", "val/.cache/3.png")
    assert folder_tree(str(tmp_path)).classes == ("a",)


def test_images_in_hidden_folders_of_a_class_are_left_out(tmp_path: Path) -> None:
    """Copies that notebooks keep in `.ipynb_checkpoints` are not trained on."""
    put(tmp_path, "train/a/1.png", "train/a/.ipynb_checkpoints/1-checkpoint.png", "val/a/1.png")
    tree = folder_tree(str(tmp_path))
    assert [name for name, _ in names_and_labels(tree, "train")] == ["train/a/1.png"]


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_single_held_out_split_is_the_test_split(tmp_path: Path, name: str) -> None:
    """Under each of its usual names."""
    put(tmp_path, "train/a/1.png", f"{name}/a/2.png")
    tree = folder_tree(str(tmp_path))
    assert sorted(tree.splits) == ["test", "train"]
    assert names_and_labels(tree, "test") == [(f"{name}/a/2.png", 0)]


def test_two_held_out_splits_are_validation_and_test(tmp_path: Path) -> None:
    """Each by its own folder."""
    put(tmp_path, "train/a/1.png", "val/a/2.png", "test/a/3.png")
    tree = folder_tree(str(tmp_path))
    assert names_and_labels(tree, "validation") == [("val/a/2.png", 0)]
    assert names_and_labels(tree, "test") == [("test/a/3.png", 0)]


def test_a_held_out_split_may_lack_classes(tmp_path: Path) -> None:
    """Labels are those of the training classes."""
    put(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png", "val/c/1.png")
    assert names_and_labels(folder_tree(str(tmp_path)), "test") == [("val/c/1.png", 2)]


def test_a_held_out_class_that_training_does_not_know_is_an_error(tmp_path: Path) -> None:
    """Named with its folder, and with the class that may have been meant."""
    put(tmp_path, "train/tabby/1.png", "train/terrier/1.png", "val/tabby/1.png", "val/taby/1.png")
    with pytest.raises(UserError) as caught:
        folder_tree(str(tmp_path))
    message = str(caught.value)
    assert f"{tmp_path / 'val'}: class 'taby' is not one of the 2" in message
    assert message.endswith("did you mean 'tabby'?")


def test_a_root_without_training_images_is_an_error(tmp_path: Path) -> None:
    """The classes themselves, or a folder too low: it names the folder that is missing."""
    put(tmp_path, "val/a/1.png")
    with pytest.raises(UserError, match=r"has no folder 'train'; data\.root is the folder above"):
        folder_tree(str(tmp_path))
    with pytest.raises(UserError, match="has no folder 'train'"):
        folder_tree(str(tmp_path / "val"))
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=rf"{tmp_path / 'train'}: has no folders, one for each"):
        folder_tree(str(tmp_path))


def test_folders_of_classes_alone_are_a_split_on_demand(tmp_path: Path) -> None:
    """Which `data verify` and `data pack` ask for."""
    put(tmp_path, "a/1.png", "b/1.png", "b/2.png")
    tree = folder_tree(str(tmp_path), flat_split="train")
    assert names_and_labels(tree, "train") == [("a/1.png", 0), ("b/1.png", 1), ("b/2.png", 1)]
    assert list(tree.splits) == ["train"]


@pytest.mark.parametrize("read", [folder_tree, imagenet_tree])
def test_single_files_are_read_from_local_disks_only(read: Any, tmp_path: Path) -> None:
    """A URL is refused with what to do instead, a missing folder by its path."""
    with pytest.raises(UserError, match=r"'s3://bucket/set': .* pack them .* `tombola data pack`"):
        read("s3://bucket/set")
    with pytest.raises(UserError, match=rf"data\.root = '{tmp_path}/none': there is no such"):
        read(f"{tmp_path}/none")


def test_a_source_without_held_out_or_training_images_is_refused(tmp_path: Path) -> None:
    """Before a run begins, by its root; a class without images by its name."""
    put(tmp_path, "train/a/1.png", "train/b/2.png")
    config = DataConfig(f"folder:{tmp_path}")
    with pytest.raises(UserError, match=rf"{tmp_path}.*nothing is held out, as val or test"):
        prepared(config, tmp_path / "cache")
    (tmp_path / "val/a").mkdir(parents=True)
    with pytest.raises(UserError, match="there are no test images"):
        prepared(config, tmp_path / "cache")
    put(tmp_path, "val/a/1.png")
    (tmp_path / "train/b/2.png").unlink()
    with pytest.raises(UserError, match="class 'b' has no training images"):
        prepared(config, tmp_path / "cache")
    put(tmp_path, "train/b/2.png")
    assert len(prepared(config, tmp_path / "cache")) == 64


# ---- what lies at a place


def test_the_kind_of_a_source_is_found_by_what_is_there(tmp_path: Path) -> None:
    """Folders, ImageNet, shards, packed shards, CIFAR and idx files."""
    put(tmp_path, "folder/train/a/1.png")
    put(tmp_path, "imagenet/ILSVRC2012_devkit_t12/data/meta.mat", "imagenet/train/n1/1.png")
    put(tmp_path, "webdataset/train-0000.tar", "packed/pack.json", "packed/train/train-0.tar")
    put(tmp_path, "cifar10/cifar-10-batches-py/x", "cifar100/cifar-100-python/x")
    put(tmp_path, "idx/train-images-idx3-ubyte.gz", "dotted/train-images.idx3-ubyte")
    kinds = {"packed": "webdataset", "dotted": "idx"}
    for place in sorted(os.listdir(tmp_path)):
        kind = kinds.get(place, place)
        assert find_kind(str(tmp_path / place)) == kind
        assert parse_source(str(tmp_path / place)) == (kind, str(tmp_path / place))


def test_a_place_of_no_known_kind_is_an_error(tmp_path: Path) -> None:
    """An empty folder, and one with files only; one that is not there is called that."""
    put(tmp_path, "files/1.png")
    (tmp_path / "empty").mkdir()
    for place in ("files", "empty"):
        with pytest.raises(UserError, match=rf"{tmp_path / place}: holds neither folders of"):
            find_kind(str(tmp_path / place))
    with pytest.raises(UserError, match=rf"{tmp_path}/none: there is no such folder"):
        find_kind(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("digits", ("digits", "")),
        ("folder:/data/pets", ("folder", "/data/pets")),
        ("webdataset:s3://bucket/set", ("webdataset", "s3://bucket/set")),
        ("imagenet:~/imagenet", ("imagenet", "~/imagenet")),
    ],
)
def test_a_source_that_says_its_kind_is_believed(text: str, source: tuple[str, str]) -> None:
    """Without a look at the place."""
    assert parse_source(text) == source


# ---- ImageNet


def write_devkit(folder: Path, truth: list[int], ids: dict[str, int]) -> None:
    """`ILSVRC2012_devkit_t12` as it is distributed: the ground truth, and `synsets` in meta.mat.

    `ids`: WordNet id -> ILSVRC2012_ID. As there, inner nodes of the hierarchy follow the classes.
    """
    data = folder / "ILSVRC2012_devkit_t12/data"
    data.mkdir(parents=True)
    lines = "".join(f"{number}\n" for number in truth)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text(lines)
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children")
    fields += ("wordnet_height", "num_train_images")
    inner = {"n00001740": max(ids.values()) + 1}
    synsets = np.zeros((len(ids) + 1, 1), [(field, "O") for field in fields])
    for row, (name, number) in enumerate({**ids, **inner}.items()):
        children = np.array([[1.0, 2.0]]) if name in inner else np.zeros((1, 0))
        synsets[row, 0] = (
            np.array([[number]], np.uint16),
            np.array([name]),
            np.array([f"{name}, a thing"]),
            np.array(["what it is"]),
            np.array([[children.size]], np.uint8),
            children,
            np.array([[0]], np.uint8),
            np.array([[1300]], np.uint16),
        )
    savemat(data / "meta.mat", {"synsets": synsets})


def write_imagenet(root: Path, *, num_val: int = 9) -> dict[str, str]:
    """ImageNet with four classes and an unsorted val/; the class of each validation image.

    An ILSVRC2012_ID is no label: the ids run against the order of the WordNet ids.
    """
    for name in WORDNET:
        put(root, f"train/{name}/{name}_1.JPEG", f"train/{name}/{name}_22.JPEG")
    truth = [1 + index * 3 % 4 for index in range(num_val)]
    write_devkit(root, truth, {name: 4 - row for row, name in enumerate(WORDNET)})
    found = {}
    for index, number in enumerate(truth, 1):
        name = f"val/ILSVRC2012_val_{index:08d}.JPEG"
        put(root, name)
        found[name] = WORDNET[4 - number]
    return found


def test_the_devkit_of_these_tests_is_one_for_torchvision_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parser, without the archive's checksum, finds the classes that the tests expect."""
    classes = write_imagenet(tmp_path)
    shutil.make_archive(str(tmp_path / "kit"), "gztar", tmp_path, "ILSVRC2012_devkit_t12")
    shutil.move(tmp_path / "kit.tar.gz", tmp_path / "ILSVRC2012_devkit_t12.tar.gz")
    monkeypatch.setattr(imagenet, "_verify_archive", lambda root, file, md5: None)
    imagenet.parse_devkit_archive(str(tmp_path))
    names, truth = imagenet.load_meta_file(str(tmp_path))
    assert truth == list(classes.values())
    assert names == {name: (name, "a thing") for name in WORDNET}


def test_an_unsorted_val_is_labelled_by_the_devkit(tmp_path: Path) -> None:
    """Image i by line i, through the ILSVRC2012_ID to the WordNet id's place in train/."""
    classes = write_imagenet(tmp_path)
    tree = imagenet_tree(str(tmp_path))
    assert tree.classes == WORDNET
    found = names_and_labels(tree, "test")
    assert found == [(name, WORDNET.index(wnid)) for name, wnid in sorted(classes.items())]
    assert {label for _, label in found} == {0, 1, 2, 3}
    assert names_and_labels(tree, "train") == as_torchvision(tmp_path, "train")


def test_the_labels_are_those_of_a_sorted_val(tmp_path: Path) -> None:
    """The same images sorted into folders give the same labels, without a devkit."""
    classes = write_imagenet(tmp_path / "unsorted")
    for name, wnid in classes.items():
        put(tmp_path / "sorted", f"val/{wnid}/{Path(name).name}")
    shutil.copytree(tmp_path / "unsorted/train", tmp_path / "sorted/train")
    found = {
        place: {
            Path(name).name: label
            for name, label in names_and_labels(imagenet_tree(str(tmp_path / place)), "test")
        }
        for place in ("sorted", "unsorted")
    }
    assert found["sorted"] == found["unsorted"]
    assert len(found["sorted"]) == 9


@pytest.mark.parametrize("place", ["", "data", "ILSVRC2012_devkit_t12/data"])
def test_the_devkits_files_may_lie_at_the_top_or_below(tmp_path: Path, place: str) -> None:
    """Beside train/, in data/, or where the archive unpacks them."""
    write_imagenet(tmp_path)
    reference = names_and_labels(imagenet_tree(str(tmp_path)), "test")
    shutil.move(tmp_path / "ILSVRC2012_devkit_t12", tmp_path / "moved")
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    for path in list((tmp_path / "moved/data").iterdir()):
        shutil.move(path, tmp_path / place / path.name)
    assert names_and_labels(imagenet_tree(str(tmp_path)), "test") == reference


def test_an_unsorted_val_without_a_devkit_is_an_error(tmp_path: Path) -> None:
    """It names what to unpack and where, or what else to do."""
    write_imagenet(tmp_path)
    (tmp_path / "ILSVRC2012_devkit_t12/data/meta.mat").unlink()
    with pytest.raises(UserError) as caught:
        imagenet_tree(str(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}: val/ has no folders of classes, and there is no devkit to label its images: "
        "unpack ILSVRC2012_devkit_t12.tar.gz there (ILSVRC2012_validation_ground_truth.txt and "
        "meta.mat), or sort val/"
    )


@pytest.mark.parametrize(
    "name", ["cat.JPEG", "ILSVRC2012_val_00000010.JPEG", "ILSVRC2012_val_00000000.JPEG"]
)
def test_a_validation_image_that_the_ground_truth_does_not_name_is_an_error(
    tmp_path: Path, name: str
) -> None:
    """Another name, or a number that is no line of the file."""
    write_imagenet(tmp_path)
    put(tmp_path, f"val/{name}")
    with pytest.raises(UserError, match=rf"{tmp_path}/val/{name}: is not named .* up to 9,"):
        imagenet_tree(str(tmp_path))


def test_a_class_of_the_ground_truth_that_training_lacks_is_an_error(tmp_path: Path) -> None:
    """A download that is not complete; and no train/ at all."""
    write_imagenet(tmp_path)
    shutil.rmtree(tmp_path / "train/n02102040")
    with pytest.raises(UserError, match=r"train: has no folder 'n02102040', a class of the images"):
        imagenet_tree(str(tmp_path))
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(UserError, match=r"train: has no folders, one for each WordNet id"):
        imagenet_tree(str(tmp_path))


def test_an_empty_val_is_an_error(tmp_path: Path) -> None:
    """Rather than a test split of no images."""
    write_imagenet(tmp_path, num_val=0)
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match="val: holds no images"):
        imagenet_tree(str(tmp_path))


# ---- shards

SAMPLE = [("a.png", PNG), ("a.cls", b"0")]


def index(tmp_path: Path, members: list[tuple[str, bytes]]) -> list[Member]:
    """The samples of one shard."""
    (tmp_path / "train.tar").write_bytes(tar(members))
    return index_shard((str(tmp_path), "train.tar"))


def test_an_image_is_found_by_its_offset_in_the_shard(tmp_path: Path) -> None:
    """The bytes there are the file's, for each of several samples of different sizes."""
    images = [encoded(Image.new("RGB", (5 + i, 3)), "PNG") + bytes(i * 300) for i in range(5)]
    members = [
        (f"{i}.{end}", content)
        for i, image in enumerate(images)
        for end, content in (("png", image), ("cls", b"%d" % i))
    ]
    found = index(tmp_path, members)
    content = (tmp_path / "train.tar").read_bytes()
    for i, (member, image) in enumerate(zip(found, images, strict=True)):
        assert (member.name, member.label, member.num_bytes) == (f"{i}.png", i, len(image))
        assert content[member.offset : member.offset + member.num_bytes] == image
        assert tuple(member.header) == (5 + i, 3, 0)


@pytest.mark.parametrize(
    ("name", "content", "label"),
    [
        ("cls", b"7", 7),
        ("cls", b" 12\n", 12),
        ("CLS", b"3", 3),
        ("json", b'{"label": 5}', 5),
        ("json", b'{"cls": 6, "text": "a dog"}', 6),
        ("json", b'{"cls": 6, "label": 5}', 5),
        ("json", b'{"label": "8"}', 8),
    ],
)
def test_a_label_is_a_number_in_cls_or_json(
    tmp_path: Path, name: str, content: bytes, label: int
) -> None:
    """In either of the forms that are about."""
    (member,) = index(tmp_path, [("a.jpg", PNG), (f"a.{name}", content)])
    assert member.label == label


def test_a_label_in_cls_goes_before_one_in_json(tmp_path: Path) -> None:
    """In whichever order they are in the shard."""
    both = [("a.json", b'{"label": 5}'), ("a.cls", b"1")]
    for files in (both, both[::-1]):
        (member,) = index(tmp_path, [*files, ("a.png", PNG)])
        assert member.label == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("txt", b"3"),
        ("cls", b"dog"),
        ("cls", b""),
        ("cls", b"-1"),
        ("cls", b"1.0"),
        ("json", b"{"),
        ("json", b"[3]"),
        ("json", b'{"category": 3}'),
        ("json", b'{"label": null}'),
        ("json", b'{"label": 2.5}'),
    ],
)
def test_a_sample_without_a_label_is_an_error(tmp_path: Path, name: str, content: bytes) -> None:
    """By the shard and the sample's key; also where the label is no whole number."""
    with pytest.raises(UserError, match=r"train\.tar: sample 'x/a' has no label"):
        index(tmp_path, [*SAMPLE, ("x/a.png", PNG), (f"x/a.{name}", content)])


def test_a_sample_without_an_image_is_an_error(tmp_path: Path) -> None:
    """It tells what the sample has instead."""
    with pytest.raises(UserError, match=r"train\.tar: sample 'b' has no image \(cls, mp4\)"):
        index(tmp_path, [*SAMPLE, ("b.cls", b"1"), ("b.mp4", b"...")])


def test_a_key_is_the_path_up_to_the_first_dot_of_its_last_part(tmp_path: Path) -> None:
    """Dots in folders are not the key's end, and the same name in two folders is two samples."""
    found = index(
        tmp_path,
        [
            *(("v1.0/set.a/1.png", PNG), ("v1.0/set.a/1.cls", b"1")),
            *(("v1.0/set.b/1.png", PNG), ("v1.0/set.b/1.cls", b"2")),
            *(("./2.png", PNG), ("./2.cls", b"3")),
        ],
    )
    assert [(member.name, member.label) for member in found] == [
        ("v1.0/set.a/1.png", 1),
        ("v1.0/set.b/1.png", 2),
        ("./2.png", 3),
    ]


def test_an_extension_may_have_several_parts(tmp_path: Path) -> None:
    """`1.rgb.png` is an image of the sample `1`; `1.seg.cls` is no label of it."""
    (member,) = index(tmp_path, [("1.rgb.png", PNG), ("1.seg.cls", b"9"), ("1.cls", b"4")])
    assert (member.name, member.label) == ("1.rgb.png", 4)


def test_a_plain_extension_goes_before_one_of_several_parts(tmp_path: Path) -> None:
    """Of an image and its depth map or mask, the image, in whichever order they are."""
    files = [("1.depth.png", b"a map"), ("1.jpg", PNG), ("1.mask.png", b"a mask")]
    for order in (files, files[::-1]):
        (member,) = index(tmp_path, [*order, ("1.cls", b"4")])
        assert member.name == "1.jpg"


def test_folders_in_a_shard_are_no_samples(tmp_path: Path) -> None:
    """As `tar c folder` writes them."""
    put(tmp_path / "in", "set/a.png", "set/b.png")
    put(tmp_path / "in", "set/a.cls", "set/b.cls", content=b"1")
    shutil.make_archive(str(tmp_path / "train"), "tar", tmp_path / "in")
    found = index_shard((str(tmp_path), "train.tar"))
    assert sorted(Path(member.name).name for member in found) == ["a.png", "b.png"]


def test_a_bad_image_in_a_shard_is_noted_and_no_error(tmp_path: Path) -> None:
    """Its header tells what is wrong; whether it may be skipped is the configuration's."""
    found = index(tmp_path, [*SAMPLE, ("b.jpg", b"text"), ("b.cls", b"1")])
    assert [member.header.problem for member in found] == [0, 3]


def test_a_shard_that_is_cut_off_anywhere_is_an_error(tmp_path: Path) -> None:
    """In a header, in a file, between files, and between samples: no image is lost silently."""
    members = [("a.png", PNG + bytes(600)), ("a.cls", b"0"), ("b.png", PNG), ("b.cls", b"1")]
    whole = tar(members)
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # of the last file
    path = tmp_path / "train.tar"
    for length in sorted({*range(0, end + 1, 256), *range(7, end, 500)}):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=rf"{tmp_path}/train\.tar: "):
            print(length, index_shard((str(tmp_path), "train.tar")))
    path.write_bytes(whole)
    assert len(index_shard((str(tmp_path), "train.tar"))) == 2


def test_zeros_at_the_end_of_an_image_are_not_the_end_of_a_shard(tmp_path: Path) -> None:
    """Cut off right behind a black bitmap, and not where a whole shard ends."""
    black = encoded(Image.new("RGB", (40, 40)), "BMP")
    members = [("a.cls", b"0"), ("a.bmp", black), ("b.cls", b"1"), ("b.bmp", black)]
    whole = tar(members)
    assert len(index(tmp_path, members)) == 2
    size = 512 + 512 + 512 + -(-len(black) // 512) * 512  # header, label, header, image
    (tmp_path / "train.tar").write_bytes(whole[:size])
    with pytest.raises(UserError, match=r"train\.tar: is no whole tar file"):
        index_shard((str(tmp_path), "train.tar"))


@pytest.mark.parametrize("content", [b"", b"text\n" * 400, PNG])
def test_a_file_that_is_no_tar_is_an_error(tmp_path: Path, content: bytes) -> None:
    """By its name."""
    (tmp_path / "train.tar").write_bytes(content)
    with pytest.raises(UserError, match=rf"{tmp_path}/train\.tar: is no whole tar file"):
        index_shard((str(tmp_path), "train.tar"))


def shard_of(labels: list[int], prefix: str = "") -> bytes:
    """A shard of images with these labels."""
    return tar(
        [
            (f"{prefix}{i:04d}.{end}", content)
            for i, label in enumerate(labels)
            for end, content in (("png", PNG), ("cls", b"%d" % label))
        ]
    )


def test_the_split_of_a_shard_is_in_its_name(tmp_path: Path) -> None:
    """Or in the name of its folder; `val` alone is the test split."""
    put(tmp_path / "flat", "set-train-01.tar", "set-train-00.tar", "set-val-00.tar", "notes.txt")
    flat = find_shards(str(tmp_path / "flat"))
    assert flat.splits == {
        "train": ["set-train-00.tar", "set-train-01.tar"],
        "test": ["set-val-00.tar"],
    }
    assert flat.classes is None
    put(tmp_path / "deep", "train/0.tar", "train/1.tar", "validation/0.tar", "test/0.tar")
    assert find_shards(str(tmp_path / "deep")).splits == {
        "train": ["train/0.tar", "train/1.tar"],
        "validation": ["validation/0.tar"],
        "test": ["test/0.tar"],
    }


@pytest.mark.parametrize("name", ["latest-train-000.tar", "contest_train_000.tar"])
def test_a_split_in_a_name_is_a_word_of_its_own(tmp_path: Path, name: str) -> None:
    """`latest-train` are training images, though `latest` contains `test`."""
    put(tmp_path, name, "val-000.tar")
    assert find_shards(str(tmp_path)).splits["train"] == [name]


def test_a_shard_of_no_split_and_a_folder_without_shards_are_errors(tmp_path: Path) -> None:
    """By the shard, and by the root."""
    put(tmp_path, "part-000.tar")
    with pytest.raises(UserError, match=r"part-000\.tar: its name says neither train nor val"):
        find_shards(str(tmp_path))
    with pytest.raises(UserError, match=rf"data\.root = '{tmp_path}/none': there are no tar"):
        find_shards(str(tmp_path / "none"))


def manifest_of(root: str, split: str = "train") -> Manifest:
    """A split of the shards at a root."""
    return make_catalogue("webdataset", root).splits[split]


def test_the_classes_are_those_of_classes_txt(tmp_path: Path) -> None:
    """One a line in the order of the labels; without it they are numbered up to the largest."""
    put(tmp_path, "train-0.tar", content=shard_of([0, 2]))
    put(tmp_path, "val-0.tar", content=shard_of([3]))
    assert make_catalogue("webdataset", str(tmp_path)).classes == ("0", "1", "2", "3")
    (tmp_path / "classes.txt").write_text("cat\ndog\nbird\nplane\nship\n")
    assert make_catalogue("webdataset", str(tmp_path)).classes == (
        *("cat", "dog", "bird", "plane", "ship"),
    )


def test_a_label_beyond_the_classes_is_an_error(tmp_path: Path) -> None:
    """In any split: the label, and how many classes there are."""
    put(tmp_path, "train-0.tar", content=shard_of([0, 1]))
    put(tmp_path, "val-0.tar", content=shard_of([2]))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match=rf"{tmp_path}: a label is 2, and there are 2 classes"):
        make_catalogue("webdataset", str(tmp_path))


def test_the_samples_of_several_shards_are_in_the_order_of_their_names(tmp_path: Path) -> None:
    """However they are spread over the shards: a repacked set is the same set."""
    put(tmp_path, "a/train-0.tar", content=tar(SAMPLE))
    for shards in ({"0": [3, 1], "1": [0, 2]}, {"0": [2, 0, 1], "1": [], "2": [3]}):
        folder = tmp_path / uuid.uuid4().hex
        for number, samples in shards.items():
            members = [
                (f"{i}.{end}", content)
                for i in samples
                for end, content in (("png", PNG), ("cls", b"%d" % (i % 2)))
            ]
            put(folder, f"train-{number}.tar", content=tar(members))
        manifest = manifest_of(str(folder))
        assert list(manifest.names) == ["0.png", "1.png", "2.png", "3.png"]
        assert manifest.labels.tolist() == [0, 1, 0, 1]
        where = {i: f"train-{n}.tar:{i}.png" for n, samples in shards.items() for i in samples}
        assert [manifest.where(i) for i in range(4)] == [where[i] for i in range(4)]


def test_more_shards_than_workers_are_all_indexed(tmp_path: Path) -> None:
    """Each of nine shards, with all of its samples."""
    for number in range(9):
        put(tmp_path, f"train-{number}.tar", content=shard_of([number] * 2, f"{number}/"))
    manifest = manifest_of(str(tmp_path))
    assert manifest.labels.tolist() == [number for number in range(9) for _ in range(2)]


def test_shards_are_read_from_any_storage() -> None:
    """Fsspec's memory: the same catalogue as from a disk, but for the times."""
    place = Folder(f"memory://{uuid.uuid4().hex}")
    place.write("train-0.tar", shard_of([0, 1]))
    place.write("val-0.tar", shard_of([1]))
    place.write("classes.txt", b"cat\ndog\n")
    assert find_kind(str(place)) == "webdataset"
    shards = find_shards(str(place))
    assert shards.splits == {"train": ["train-0.tar"], "test": ["val-0.tar"]}
    assert shards.classes == ("cat", "dog")
    assert index_shard((place.url, "train-0.tar"))[1].label == 1


def test_a_json_label_may_stand_among_other_facts(tmp_path: Path) -> None:
    """As img2dataset and timm write them."""
    facts = {"label": 2, "class_name": "bird", "width": 5, "sizes": [1, 2]}
    (member,) = index(tmp_path, [("a.json", json.dumps(facts).encode()), ("a.webp", PNG)])
    assert (member.name, member.label) == ("a.webp", 2)
