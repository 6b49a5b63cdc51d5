"""Masks and weights in objects: what is written comes back, on any number of ranks, by any part."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_ranks

from data.errors import RunError
from data.files import Folder
from launch.bench.networks import scores_of
from pruning.allocate import keep_top
from pruning.document import write_document
from pruning.mask_store import StoredMasks, read_masks, read_part, write_masks
from pruning.masks import Masks
from pruning.objects import Objects
from pruning.packing import CHUNK_BYTES
from pruning.weight_store import StoredWeights, read_weights, write_weights
from train.ranks import Ranks

LARGE = {"b": (3, 1001, 999), "a": (8 * CHUNK_BYTES * 8 + 5,), "c": (), "d": (0, 4), "e": (70, 33)}
"""15 chunks in two shards: one tensor is empty, one a scalar; in layer order"""


def random_masks(shapes: dict[str, tuple[int, ...]], density: float = 0.3) -> Masks:
    generator = torch.Generator().manual_seed(0)
    return Masks({n: torch.rand(s, generator=generator) < density for n, s in shapes.items()})


def equal(one: Masks, other: Masks) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def objects(tmp_path: Path) -> Objects:
    return Objects(Folder(tmp_path / "objects"))


def test_large_masks_come_back(objects: Objects) -> None:
    """In layer order, with the digest that the masks have; in one object a shard."""
    masks = random_masks(LARGE)
    stored = write_masks(objects, masks)
    assert len(stored.shards) == 2
    assert stored.digest == masks.digest()
    assert (stored.num_kept, stored.size) == (masks.kept, masks.size)
    assert equal(read_masks(objects, stored), masks)
    assert objects.digests() == sorted(shard.sha256 for shard in stored.shards)


@settings(max_examples=40)
@given(
    st.lists(st.lists(st.integers(0, 4), min_size=0, max_size=3), min_size=0, max_size=4), st.data()
)
def test_any_masks_come_back(shapes: list[list[int]], data: st.DataObject) -> None:
    """Of any shape, empty and scalar ones included, through the index as JSON."""
    masks = {}
    for index, shape in enumerate(shapes):
        size = int(torch.tensor(shape).prod()) if shape else 1
        bits = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
        masks[f"layer{9 - index}.weight"] = torch.tensor(bits, dtype=torch.bool).view(shape)
    objects = Objects(Folder("memory://tickets/objects"))
    stored = write_masks(objects, Masks(masks))
    again = StoredMasks.from_json(json.loads(json.dumps(stored.to_json())))
    assert again == stored
    assert equal(read_masks(objects, again), Masks(masks))
    assert stored.digest == Masks(dict(reversed(masks.items()))).digest()


def test_a_part_is_read_without_the_rest(objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any range of weights, exactly; no more bytes than the chunks that hold them."""
    masks = random_masks(LARGE)
    stored = write_masks(objects, masks)
    read: list[int] = []
    original = Folder.read_range

    def counted(self: Folder, name: str, start: int, length: int) -> bytes:
        read.append(length)
        return original(self, name, start, length)

    monkeypatch.setattr(Folder, "read_range", counted)
    monkeypatch.setattr(Folder, "read", lambda self, name: pytest.fail("read an object whole"))
    million = 8 * CHUNK_BYTES
    for name, start, stop in [
        ("a", 0, 1),
        ("a", 3, million),
        ("a", million - 1, million + 1),
        ("a", 8 * million, 8 * million + 5),
        ("a", 7, 7),
        ("b", 100_003, 1_900_001),
        ("c", 0, 1),
        ("d", 0, 0),
        ("e", 69, 2310),
    ]:
        found = read_part(objects, stored, {name: (start, stop)})[name]
        assert torch.equal(found, masks[name].flatten()[start:stop]), (name, start, stop)
    read.clear()
    read_part(objects, stored, {"a": (2 * million, 4 * million), "e": (0, 8)})
    (first, second) = stored.shards
    assert read == [sum(n for _, n in first.chunks[2:4]), second.chunks[-1][1]]
    for wanted in ({"x": (0, 1)}, {"a": (0, 9 * million)}, {"a": (-1, 5)}):
        with pytest.raises(ValueError, match="no weights"):
            read_part(objects, stored, wanted)


def as_ranks(folder: str) -> None:
    """Writes and reads masks and weights on all ranks; each checks what it gets."""
    from train.engine import Engine

    engine = Engine()
    objects = Objects(Folder(folder))
    masks = random_masks(LARGE)
    stored = write_masks(objects, masks, engine)
    assert equal(read_masks(objects, stored, engine), masks)
    weights = {str(i): torch.full((5 << 20,), float(i)) for i in range(5)}
    found = write_weights(objects, weights, engine)
    document = {"masks": stored.to_json(), "weights": found.to_json()}
    Path(folder, f"rank-{engine.rank}.json").write_text(json.dumps(document))
    engine.close()


@pytest.mark.parametrize("world_size", [2, 3])
def test_many_ranks_write_what_one_writes(
    world_size: int, objects: Objects, tmp_path: Path
) -> None:
    """The same objects and the same index; what 2 or 3 wrote, 1 reads."""
    assert run_ranks(world_size, as_ranks, str(tmp_path)) == [0] * world_size
    documents = [json.loads((tmp_path / f"rank-{r}.json").read_text()) for r in range(world_size)]
    assert all(document == documents[0] for document in documents)
    stored = write_masks(objects, random_masks(LARGE))
    assert StoredMasks.from_json(documents[0]["masks"]) == stored
    elsewhere = Objects(Folder(tmp_path))
    assert equal(read_masks(elsewhere, stored), random_masks(LARGE))
    weights = StoredWeights.from_json(documents[0]["weights"])
    assert len(weights.files) == 2
    assert [float(v[0]) for v in read_weights(elsewhere, weights).values()] == [0, 1, 2, 3, 4]
    assert set(objects.digests()) < set(elsewhere.digests())


class Share(Ranks):
    """One of several ranks, whose partners are not there: notes what it would do alone."""

    def together(self, action):  # type: ignore[no-untyped-def]
        action()
        raise InterruptedError


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_reads_its_share_only(
    rank: int, objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two shards each of two ranks reads one."""
    stored = write_masks(objects, random_masks(LARGE))
    read: list[str] = []
    monkeypatch.setattr(Objects, "get", lambda self, digest, n: read.append(digest) or b"" * n)
    with pytest.raises((InterruptedError, RunError)):
        read_masks(objects, stored, Share(rank, 2))
    assert read == [stored.shards[rank].sha256]


def test_equal_content_is_stored_once(objects: Objects) -> None:
    """Masks in another order of layers, weights that two levels share."""
    masks = random_masks({"a": (30, 3), "b": (4,)})
    first = write_masks(objects, masks)
    second = write_masks(objects, Masks({"b": masks["b"], "a": masks["a"]}))
    assert first.shards == second.shards
    assert write_weights(objects, {"w": torch.ones(3)}) == write_weights(
        objects, {"w": torch.ones(3)}
    )
    assert len(objects.digests()) == 2


def test_masks_beyond_the_memory_are_refused_before_they_are_read(
    objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, and no attempt."""
    stored = write_masks(objects, random_masks({"a": (1000, 1000)}))
    monkeypatch.setattr("os.sysconf", lambda name: 900)
    with pytest.raises(RunError, match="masks of 1,000,000 weights take as many bytes of memory"):
        read_masks(objects, stored)


def test_weights_of_any_type_come_back(objects: Objects) -> None:
    """Floats of all widths, integers, scalars, transposed storage, tensors that share storage."""
    tied = torch.randn(4)
    weights = {
        "a": torch.randn(3, 4).t(),
        "b": torch.randn(2).bfloat16(),
        "c": torch.tensor(5),
        "d": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "e": tied,
        "f": tied,
        "g": torch.zeros(0, 3, dtype=torch.float16),
    }
    read = read_weights(objects, write_weights(objects, weights))
    assert list(read) == list(weights)
    assert all(torch.equal(read[k], v) and read[k].dtype == v.dtype for k, v in weights.items())


@pytest.mark.parametrize(
    ("density", "bound"), [(0.8, 1.05), (0.2, 1.05), (0.05, 1.25), (0.02, 1.25)]
)
def test_a_resnet50_takes_hardly_more_than_its_entropy(density: float, bound: float) -> None:
    """The largest of normal scores over all layers: against each layer's entropy, and 64 KiB."""
    scores = scores_of("resnet50")
    masks = keep_top(scores, density)
    entropy = 0.0
    for mask in masks.values():
        kept = float(mask.float().mean())
        for share in (kept, 1 - kept):
            entropy -= mask.numel() * share * math.log2(share) / 8 if share else 0
    folder = Folder("memory://resnet50")
    stored = write_masks(Objects(folder / "objects"), masks)
    write_document(folder, "masks.json", "test", stored.to_json())
    num_bytes = sum(shard.num_bytes for shard in stored.shards) + folder.size("masks.json")
    assert num_bytes <= bound * entropy + (64 << 10)
    folder.remove()
