"""Tickets that someone made up to do harm: refused in one line, before they cost anything."""

import copy
import dataclasses
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import run_ranks
from stores import paths, refusal, replace, reseal, somewhere, ticket_of

from data.errors import RunError, UserError
from data.files import Folder
from pruning.document import read_document
from pruning.mask_store import Shard, StoredMasks, read_masks, write_masks
from pruning.masks import Masks
from pruning.objects import Objects
from pruning.packing import CHUNK_BYTES
from pruning.store import TicketStore, problem_of
from pruning.tickets import KIND, find_ticket
from pruning.weight_store import StoredWeights, WeightFile, read_weights, write_weights

STORE = TicketStore(Folder(somewhere()))
STORE.add(ticket_of(somewhere(), 1))
TICKET = STORE.all()[0]
INDEX: dict[str, Any] = json.loads(STORE.folder.read(f"{TICKET.id}.json"))
WIDE = {key: value for key, value in INDEX.items() if key not in ("id", "sha256")}


def written(index: Any) -> str:
    """The place of an index, beside the objects of a good ticket."""
    content = index if isinstance(index, bytes) else json.dumps(index).encode()
    told = index.get("id") if isinstance(index, dict) else None
    name = told if isinstance(told, str) and len(told) == 64 else "ab" * 32
    STORE.folder.write(f"{name}.json", content)
    return f"{STORE.folder}/{name}.json"


def used(place: str) -> None:
    """Does all that is ever done with a ticket."""
    ticket = find_ticket(place)
    json.dumps(ticket.summary())
    assert f"{ticket.density:.2%}"
    assert f"{ticket.name} {ticket.stage} {ticket.method}".encode()
    assert 0 <= ticket.density <= 1
    ticket.build_model()
    assert problem_of(place) is None


def changed(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """The good index with one value replaced, its digests recomputed."""
    index = copy.deepcopy(INDEX)
    replace(index, path, value)
    return reseal(index)


def test_the_index_from_which_they_are_made_is_good() -> None:
    """... and is still good when its digests are recomputed."""
    assert reseal(copy.deepcopy(INDEX)) == INDEX
    assert refusal(lambda: used(written(INDEX))) is None


# Types --------------------------------------------------------------------------------------

SOME = {"conv1.weight", "fc.weight", "norm1.num_batches_tracked"}
PLACES = [p for p in paths(INDEX) if p[1:2] != ("tensors",) or not p[2:] or p[2] in SOME]
PLACES = [p for p in PLACES if not any(type(key) is int and key > 1 for key in p)]
"""every kind of field, once or twice"""
RECOMPUTED = {("id",), ("sha256",), ("identity", "masks"), ("identity", "weights")}
"""by `reseal`"""
WRONG = (None, -1, 1.5, "x", [], {}, True, 10**400, 1 << 60, "\ud800", "two\nlines", [[1]])
FREE = {("about", name) for name in ("config", "metrics", "timing", "versions")}


@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:12])
def test_every_field_is_of_its_type(value: Any) -> None:
    """At every place of an index: refused in one line that names it, or it does no harm."""
    refused = 0
    for path in PLACES:
        index = changed(path, value)
        place = written(index)
        line = refusal(lambda place=place: find_ticket(place))
        if line is None:
            line = refusal(lambda place=place: used(place))
        else:
            assert place in line, (path, line)
        if line is not None:
            refused += 1
            assert "\n" not in line
            assert line.isprintable()
            assert len(line) < 500
    assert refused > 0.7 * len(PLACES)


@pytest.mark.parametrize("path", PLACES, ids=lambda path: ".".join(map(str, path)))
def test_every_field_is_needed(path: tuple[Any, ...]) -> None:
    """Without any one of them: refused, but for what is told in free words or in lists."""
    index = copy.deepcopy(INDEX)
    above = index
    for key in path[:-1]:
        above = above[key]
    del above[path[-1]]
    line = refusal(lambda: used(written(reseal(index))))
    free = path[:2] in FREE and len(path) > 2
    free |= path[:2] == ("about", "lineage") and len(path) == 3
    free |= path in RECOMPUTED
    assert (line is None) == free, (path, line)


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("format",), "tombola-masks", "format 'tombola-masks': not a tombola-ticket"),
        (("format",), ["x" * 10**6], "not a tombola-ticket"),
        (("version",), 3, "version 3: this Tombola reads only version 2"),
        (("version",), 2.0, "version 2.0: this Tombola"),
        (("version",), True, "version True: this Tombola"),
        (("identity", "parent"), "../../etc/passwd", "not a SHA-256"),
        (("masks", "shards", 0, "sha256"), "../" * 21 + "x", "not a SHA-256"),
        (("masks", "shards", 0, "sha256"), "/" + "a" * 63, "not a SHA-256"),
        (("masks", "shards", 0, "sha256"), "A" * 64, "not a SHA-256"),
        (("masks", "shards", 0, "sha256"), "a" * 64 + "\n", "not a SHA-256"),
        (("masks", "shards", 0, "sha256"), "٣" * 64, "not a SHA-256"),
        (("masks", "shards", 0, "num_bytes"), 1 << 39, "not a number from 0 to"),
        (("masks", "shards", 0, "chunks", 0), [0, 1 << 40], "outside of its shard"),
        (("masks", "shards", 0, "chunks", 0), [-5, 5], "not a number from 0 to"),
        (("masks", "shards", 0, "chunks", 0), [1, 2, 3], "too many values"),
        (("masks", "shards", 0, "chunks"), [], "do not hold each chunk once"),
        (("masks", "shards"), [], "do not hold each chunk once"),
        (("masks", "tensors", "fc.weight", "chunks"), [], "has 0 chunks instead of 1"),
        (("masks", "tensors", "fc.weight", "chunks", 0), "../x", "not a SHA-256"),
        (("masks", "tensors", "fc.weight", "kept"), 161, "not a number from 0 to 160"),
        (("weights", "files", 0, "sha256"), "..", "not a SHA-256"),
        (("weights", "files", 0, "tensors"), ["../x"], "do not hold each tensor once"),
        (("about", "lineage", 0, "density"), 1.5, "not a number from 0 to 1"),
    ],
)
def test_what_no_field_may_be(path: tuple[Any, ...], value: Any, told: str) -> None:
    """Paths for digests, other versions, places outside: one line that says what."""
    place = written(changed(path, value))
    with pytest.raises(RunError, match=told) as caught:
        find_ticket(place)
    assert place in str(caught.value)
    assert len(str(caught.value)) < 500


SHAPES = (
    [1 << 60],
    [1 << 30, 1 << 30],
    [1 << 40, 1 << 40, 0],
    [10**400],
    [-1],
    [-4, -3, 3, 3],
    [4.0, 1, 3, 3],
    [True, 4, 3, 3],
    ["4"],
    [1] * 17,
    [2] * 100_000,
    [[4]],
    [None],
)


@pytest.mark.parametrize("part", ["masks", "weights"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: repr(shape)[:20])
def test_no_absurd_shape_is_believed(part: str, shape: list[Any]) -> None:
    """Too large, negative, of no integers, of too many dimensions."""
    place = written(changed((part, "tensors", "conv1.weight", "shape"), shape))
    with pytest.raises(RunError, match=r"damaged: conv1\.weight (is|has)"):
        find_ticket(place)


def test_shapes_are_those_of_the_model() -> None:
    """A shape of the same size is refused as well."""
    place = written(changed(("masks", "tensors", "conv1.weight", "shape"), [3, 3, 4, 1]))
    with pytest.raises(RunError, match=r"no weights conv1.weight of \(3, 3, 4, 1\) in its model"):
        find_ticket(place).build_model()


def test_masks_of_nothing_are_no_ticket() -> None:
    """They would have no density."""
    index = copy.deepcopy(INDEX)
    index["masks"] = {"tensors": {}, "shards": []}
    with pytest.raises(RunError, match="its masks are of no weights"):
        find_ticket(written(reseal(index)))


@pytest.mark.parametrize(
    "model",
    [
        {"name": "hf-hub:someone/model"},
        {"name": "hf_hub:someone/model"},
        {"name": "local-dir:/tmp/model"},
        {"name": "../resnet18"},
        {"name": "resnet18", "arguments": {"pretrained": True}},
        {"name": "resnet18", "arguments": {"checkpoint_path": "/tmp/evil.pth"}},
        {"name": "resnet18", "arguments": {"pretrained_cfg": {"file": "/tmp/evil.pth"}}},
        {"name": "resnet18", "arguments": {"pretrained_cfg_overlay": {"url": "http://x"}}},
        {"name": "resnet18", "arguments": {"cache_dir": "/tmp"}},
        {"name": "no_such_model"},
        {"name": "resnet18", "arguments": {"block": "x"}},
        {"name": "cifar_resnet8", "arguments": {"width": 0}},
        {"name": "cifar_resnet8", "arguments": {"width": -4}},
        {"name": "cifar_resnet8", "arguments": {"width": 10**400}},
        {"name": "cifar_resnet8", "arguments": {"norm": {}}},
        {"name": "cifar_resnet8", "arguments": {"blocks": [1, 1, 10**9]}},
        {"name": "cifar_resnet8", "arguments": {"blocks": "123"}},
        {"name": "cifar_resnet8", "arguments": {"blocks": [True, 1, 1]}},
        {"name": "cifar_resnet8", "arguments": {"blocks": [1, 1]}},
        {"name": "resnet18", "arguments": {"blocks": {"layers": 2}}},
        {"name": "cifar_resnet8", "arguments": {"\ud800": 1}},
        {"name": "cifar_resnet8", "arguments": {"a\nb": 1}},
        {"name": "cifar_resnet8", "num_classes": 1 << 40, "arguments": {"width": 1 << 40}},
    ],
    ids=lambda model: json.dumps(model)[:50],
)
def test_no_model_is_fetched_unpickled_or_made_up(
    model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line; nothing is loaded on the way."""
    for owner, name in ((torch, "load"), (torch.hub, "load_state_dict_from_url")):
        monkeypatch.setattr(owner, name, lambda *words, **options: pytest.fail("loads"))
    value = {**INDEX["identity"]["model"], "arguments": {}, **model}
    place = written(changed(("identity", "model"), value))
    line = refusal(lambda: find_ticket(place).build_model())
    assert line is not None
    assert "\n" not in line
    assert problem_of(place) == line


# Documents ----------------------------------------------------------------------------------


def raw(text: str) -> bytes:
    """The good index with something before its first field, its checksum as it was."""
    return json.dumps(INDEX).replace("{", "{" + text, 1).encode()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[" * 200_000, "nested too deeply"),
        (b"[" * 200_000 + b"]" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b"[" * 100 + b"]" * 100, "nested too deeply"),
        (raw('"format": "tombola-ticket", '), "a field is there twice"),
        (raw('"x": NaN, '), "Out of range float"),
        (raw('"x": -Infinity, '), "Out of range float"),
        (raw('"x": 1e999, '), "Out of range float"),
        (raw('"x": 1, '), "does not match its checksum"),
        (raw(f'"x": 1{"0" * 5000}, '), "Exceeds the limit"),
        (raw("").replace(b"imp", b"\xff\xfe"), "can't decode byte"),
        (json.dumps(INDEX).encode("utf-16"), "can't decode byte"),
        (b"\xef\xbb\xbf" + raw(""), "BOM"),
        (raw("") + b"{}", "Extra data"),
        (b"null", "not of type dict"),
        (b'"tombola-ticket"', "not of type dict"),
        (b"", "Expecting value"),
        (b"\0" * 4096, "Expecting value"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_no_odd_document_is_read(content: bytes, told: str) -> None:
    """Deep, ambiguous, of no numbers, in no UTF-8: one line that names the file."""
    place = written(content)
    with pytest.raises(RunError, match=told) as caught:
        find_ticket(place)
    assert str(caught.value).startswith(f"{place}: damaged: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", [("about", "config"), ("identity", "model", "arguments")])
@pytest.mark.parametrize("depth", [10, 63, 300, 900])
def test_depth_is_bounded_where_anything_is_allowed(depth: int, place: tuple[str, ...]) -> None:
    """What is accepted can be copied, hashed and printed; anything deeper is refused."""
    deep: Any = {}
    for _ in range(depth):
        deep = {"a": deep}
    where = written(changed(place, deep))
    line = refusal(lambda: json.dumps(find_ticket(where).summary()))
    assert (line is None) == (depth == 10)


def test_a_huge_index_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its size alone."""
    path = tmp_path / f"{TICKET.id}.json"
    path.touch()
    (tmp_path / "objects").mkdir()
    with open(path, "r+b") as file:
        file.truncate((16 << 20) + 1)
    monkeypatch.setattr(Folder, "read", lambda self, name: pytest.fail("reads it"))
    with pytest.raises(RunError, match=r"\.json: damaged: larger than 16 MiB"):
        find_ticket(path)


# Bombs --------------------------------------------------------------------------------------


def frame(header: bytes, num_zeros: int) -> bytes:
    """A zstd frame of run-length blocks: 128 KiB of zeros in four bytes."""
    block = CHUNK_BYTES
    num_blocks = num_zeros // block
    last = [int(number == num_blocks - 1) for number in range(num_blocks)]
    blocks = b"".join(struct.pack("<I", block << 3 | 1 << 1 | one)[:3] + b"\0" for one in last)
    return b"\x28\xb5\x2f\xfd" + header + blocks


WINDOW, HUGE = bytes([7 << 3]), bytes([21 << 3])
"""of 128 KiB, of 2 GiB"""
BOMBS = {
    "no size": frame(b"\x00" + WINDOW, 1 << 30),
    "its size": frame(b"\x80" + WINDOW + struct.pack("<I", 1 << 30), 1 << 30),
    "a lie": frame(b"\x80" + WINDOW + struct.pack("<I", CHUNK_BYTES), 1 << 30),
    "a window of 2 GiB": frame(
        b"\x80" + bytes([21 << 3]) + struct.pack("<I", CHUNK_BYTES), 1 << 30
    ),
    "a dictionary": frame(b"\x83" + WINDOW + b"abcd" + struct.pack("<I", CHUNK_BYTES), 1 << 20),
}


def masks_of_chunk(objects: Objects, compressed: bytes) -> StoredMasks:
    """Masks of one whole chunk, which is stored as these bytes."""
    good = write_masks(objects, Masks({"a": torch.zeros(8 * CHUNK_BYTES, dtype=torch.bool)}))
    content = safetensors.numpy.save({"0": np.frombuffer(compressed, np.uint8)})
    place = (len(content) - len(compressed), len(compressed))
    shard = Shard(objects.put(content), len(content), (place,))
    return dataclasses.replace(good, shards=(shard,))


def peak() -> int:
    """The most memory that this process ever had, in bytes."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) << 10


def set_off(name: str, folder: str) -> None:
    """Reads a bomb; ends with an error where it takes memory."""
    objects = Objects(Folder(folder))
    stored = masks_of_chunk(objects, BOMBS[name])
    before = peak()
    line = refusal(lambda: read_masks(objects, stored))
    assert line is not None
    assert f"{stored.shards[0].sha256}.safetensors: damaged: a chunk of a: " in line
    assert peak() - before < 64 << 20


@pytest.mark.parametrize("name", BOMBS)
def test_a_decompression_bomb_takes_no_memory(name: str, tmp_path: Path) -> None:
    """1 GiB of zeros in 32 KiB: refused by its header, or when it is longer than a chunk."""
    assert len(BOMBS[name]) < 64 << 10
    assert run_ranks(1, set_off, name, str(tmp_path)) == [0]


def test_the_bombs_are_bombs() -> None:
    """A reader that trusts them gets what they hold."""
    reader = zstandard.ZstdDecompressor().stream_reader(BOMBS["no size"])
    num_bytes = 0
    while part := reader.read(1 << 22):
        num_bytes += len(part)
    assert num_bytes == 1 << 30


def test_one_chunk_named_over_and_over_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 Gi weights in an index of some megabytes would be the cheapest bomb."""
    objects = STORE.objects
    good = write_masks(objects, Masks({"a": torch.zeros(8 * CHUNK_BYTES, dtype=torch.bool)}))
    shard, place = good.shards[0], good.shards[0].chunks[0]
    many = StoredMasks(
        {"a": (1 << 36,)},
        {"a": 0},
        good.chunks * (1 << 16),
        (dataclasses.replace(shard, chunks=(place,) * 8),) * (1 << 13),
    )
    monkeypatch.setattr(Folder, "read", lambda self, name: pytest.fail("reads it"))
    monkeypatch.setattr("os.sysconf", lambda name: 1 << 17)
    with pytest.raises(RunError, match="masks of 68,719,476,736 weights take as many bytes"):
        read_masks(objects, many)


def test_a_long_object_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its size; a terabyte of holes costs its maker nothing."""
    objects = Objects(Folder(tmp_path))
    stored = write_masks(objects, Masks({"a": torch.ones(9, dtype=torch.bool)}))
    weights = write_weights(objects, {"w": torch.ones(3)})
    for digest in objects.digests():
        with open(tmp_path / f"{digest}.safetensors", "r+b") as file:
            file.truncate(1 << 40)
    monkeypatch.setattr(Folder, "read", lambda self, name: pytest.fail("reads it"))
    for read in (lambda: read_masks(objects, stored), lambda: read_weights(objects, weights)):
        with pytest.raises(RunError, match="damaged: not of"):
            read()
    (file,) = weights.files
    told = dataclasses.replace(weights, files=(dataclasses.replace(file, num_bytes=1 << 40),))
    with pytest.raises(RunError, match="take as many of memory; this machine has"):
        read_weights(objects, told)


# Anything -----------------------------------------------------------------------------------

QUICK = settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**320), 10**320)
    | st.floats()
    | st.text(max_size=5)
    | st.text(st.characters(categories=["Cs", "Cc"]), max_size=2)
    | st.sampled_from(["0" * 64, "float32", "shape", 1 << 40])
)
FIELDS = sorted({key for path in paths(INDEX) for key in path if isinstance(key, str)})[:60]
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=3), inner, max_size=5)
    ),
    max_leaves=20,
)


@QUICK
@given(st.binary(max_size=300) | TREES.map(lambda tree: json.dumps(tree).encode()))
def test_any_bytes_are_refused(content: bytes) -> None:
    """As an index, as masks.json."""
    with pytest.raises(RunError):
        find_ticket(written(content))
    with pytest.raises(RunError):
        read_document(Folder(STORE.folder.url), "ab" * 32 + ".json", "tombola-masks", dict)


@QUICK
@given(TREES)
def test_any_tree_is_refused_as_masks_or_weights(tree: Any) -> None:
    """By the errors that the reader of documents expects, and no others."""
    for kind in (StoredMasks, StoredWeights):
        with pytest.raises((ValueError, KeyError)):
            kind.from_json(tree)


@QUICK
@given(st.dictionaries(st.sampled_from(sorted(WIDE)), TREES))
def test_any_sealed_document_is_refused(fields: dict[str, Any]) -> None:
    """Of the right kind and version, with a checksum that matches."""
    body = {**copy.deepcopy(INDEX), **fields, "format": KIND, "version": 2}
    try:
        reseal(body)
    except ValueError:  # NaN
        return
    line = refusal(lambda: used(written(body)))
    assert line is None or "\n" not in line


@QUICK
@given(st.data())
def test_any_few_changes_are_refused_or_harmless(data: st.DataObject) -> None:
    """Several places of the good index replaced at once, its digests recomputed."""
    index = copy.deepcopy(INDEX)
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(list(paths(INDEX))))
        try:
            replace(index, path, data.draw(TREES))
        except (TypeError, KeyError, IndexError):  # what an earlier one replaced
            continue
    try:
        reseal(index)
    except ValueError:
        return
    line = refusal(lambda: used(written(index)))
    assert line is None or "\n" not in line


CONTENTS = {
    kind: STORE.objects.get(one.sha256, one.num_bytes)
    for kind, one in {
        "masks": TICKET.stored_masks.shards[0],
        "weights": TICKET.stored_weights.files[0],  # type: ignore[union-attr]
    }.items()
}


def bent(good: bytes) -> st.SearchStrategy[bytes]:
    """Bytes like these, cut, spliced and overwritten, or any others."""
    cuts = st.integers(0, len(good))
    spliced = st.builds(lambda a, b, x: good[:a] + x + good[b:], cuts, cuts, st.binary(max_size=40))
    headed = st.builds(
        lambda header, rest: struct.pack("<Q", len(header)) + header + rest,
        TREES.map(lambda tree: json.dumps(tree).encode()) | st.binary(max_size=80),
        st.binary(max_size=64),
    )
    sized = st.builds(lambda n, x: struct.pack("<Q", n) + x, st.integers(0, 2**64 - 1), st.binary())
    return spliced | headed | sized | st.binary(max_size=200)


@QUICK
@given(bent(CONTENTS["weights"]))
def test_any_bytes_are_refused_as_weights(content: bytes) -> None:
    """Though the object's digest is theirs."""
    stored = TICKET.stored_weights
    assert stored is not None
    (file,) = stored.files
    told = WeightFile(STORE.objects.put(content), len(content), file.tensors)
    other = dataclasses.replace(stored, files=(told,))
    line = refusal(lambda: read_weights(STORE.objects, other))
    assert (line is None) == (content == CONTENTS["weights"])
    assert line is None or (told.sha256 in line and "\n" not in line)


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F4", "C64", "F32", "X", "F6_E2M3"])
@pytest.mark.parametrize("shape", [[], [1], [0], [1 << 62, 4], [-1]])
def test_any_header_is_refused_as_weights(dtype: str, shape: list[int]) -> None:
    """Types that torch does not have, shapes that its bytes do not have."""
    header = {"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, 8]}}
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + bytes(8)
    stored = write_weights(STORE.objects, {"w": torch.ones(2)})
    told = WeightFile(STORE.objects.put(content), len(content), ("w",))
    with pytest.raises(RunError, match=f"{told.sha256}.safetensors: damaged"):
        read_weights(STORE.objects, dataclasses.replace(stored, files=(told,)))


@QUICK
@given(st.data())
def test_any_bytes_are_refused_as_masks(data: st.DataObject) -> None:
    """Whatever a shard holds, wherever its chunk is said to be, and whatever its digest is."""
    stored = TICKET.stored_masks
    content = data.draw(bent(CONTENTS["masks"]))
    places = list(stored.shards[0].chunks)
    which = data.draw(st.integers(0, len(places) - 1))
    offset = data.draw(st.integers(0, len(content)) | st.just(places[which][0]))
    places[which] = (offset, data.draw(st.integers(0, 60) | st.just(places[which][1])))
    shard = Shard(STORE.objects.put(content), len(content), tuple(places))
    other = dataclasses.replace(stored, shards=(shard,))
    line = refusal(lambda: read_masks(STORE.objects, other))
    assert line is None or (shard.sha256 in line and "\n" not in line)
    if line is None:
        assert read_masks(STORE.objects, other) == TICKET.masks


@QUICK
@given(st.binary(min_size=1, max_size=4))
def test_bits_are_those_that_the_index_counts(packed: bytes) -> None:
    """Chunks whose digests match, but with other counts, or with bits beyond the last weight."""
    objects = STORE.objects
    size = 8 * len(packed) - 3
    good = write_masks(objects, Masks({"a": torch.zeros(size, dtype=torch.bool)}))
    compressed = zstandard.ZstdCompressor().compress(packed)
    shard = Shard(objects.put(compressed), len(compressed), ((0, len(compressed)),))
    digest = hashlib.sha256(packed).hexdigest()
    other = dataclasses.replace(good, chunks=(digest,), shards=(shard,))
    line = refusal(lambda: read_masks(objects, other))
    assert (line is None) == (packed == bytes(len(packed)))
    assert line is None or "damaged masks: " in line


def test_no_digest_leads_out_of_the_store(tmp_path: Path) -> None:
    """Not even where nobody looked at it before."""
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    objects = Objects(Folder(tmp_path / "objects"))
    for digest in ("../secret", "/etc/passwd", "", ".", "a" * 63, "a" * 64 + "/.."):
        with pytest.raises(RunError, match="is no digest"):
            objects.get(digest, 6)
    for name in ("../secret", "..%2Fsecret", "~"):
        with pytest.raises((UserError, RunError)):
            find_ticket(f"{tmp_path}/objects/{name}")
