"""Stores of tickets: copies between any two places, what verify finds, and what collect removes."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import run_ranks
from s3 import s3_server
from stores import assert_whole, objects_at, somewhere, temporaries, ticket_of

from data.errors import RunError, UserError
from data.files import Folder
from pruning.objects import Objects
from pruning.store import (
    TicketFolder,
    TicketStore,
    collect,
    objects_of,
    open_tickets,
    problem_of,
)
from pruning.tickets import Ticket, find_ticket

YEAR = 365 * 86400.0
KINDS = ("local", "memory", "s3")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of a bucket on an S3 server."""
    with s3_server() as bucket:
        yield bucket.url


def place(kind: str, name: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """An unused place on a kind of storage."""
    if kind == "local":
        return str(tmp_path / name)
    if kind == "memory":
        return somewhere()
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}/{name}"


@pytest.fixture
def run(tmp_path: Path) -> TicketFolder:
    """A run with two tickets."""
    tickets = TicketFolder(Folder(tmp_path / "run"))
    for seed in (1, 2):
        tickets.write(ticket_of(str(tickets.folder), seed))
    tickets.folder.write("config.toml", b"")
    return tickets


@pytest.fixture
def store(tmp_path: Path, run: TicketFolder) -> TicketStore:
    """A local store with the two tickets of a run."""
    store = TicketStore(Folder(tmp_path / "store"))
    for ticket in run.all():
        store.add(ticket)
    return store


def object_path(store: TicketStore, digest: str) -> Path:
    return Path(f"{store.folder}/objects/{digest}.safetensors")


# Copies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_tickets_are_copied_between_any_two_places(
    source: str, target: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """From a run to a store to a store: the same id, all that is told of it, the same network."""
    ticket = ticket_of(place(source, "run", tmp_path, request), 1)
    first = TicketStore(Folder(place(source, "first", tmp_path, request)))
    second = TicketStore(Folder(place(target, "second", tmp_path, request)))
    assert first.add(ticket)
    assert second.add(first.all()[0])
    for tickets in (first, second):
        assert_whole(tickets, ticket)
    (found,) = second.all()
    assert found.summary() == ticket.summary()
    weights = found.build_model().state_dict()
    assert all(bool((weights[k] == v).all()) for k, v in ticket.build_model().state_dict().items())
    assert Ticket.load(f"{second.folder}/{ticket.id[:12]}").id == ticket.id


def test_equal_masks_and_weights_are_copied_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tickets that differ in their level share both objects; these are read once."""
    run = TicketFolder(Folder(tmp_path / "run"))
    one = ticket_of(str(run.folder), 1)
    other = ticket_of(str(run.folder), 1, level=5)
    assert one.id != other.id
    read: list[str] = []
    original = Objects.get

    def counted(self: Objects, digest: str, num_bytes: int) -> bytes:
        if self.folder.url == run.objects.folder.url:
            read.append(digest)
        return original(self, digest, num_bytes)

    monkeypatch.setattr(Objects, "get", counted)
    store = TicketStore(Folder(tmp_path / "store"))
    assert store.add(one)
    assert store.add(other)
    assert sorted(read) == sorted(objects_of(one)) == store.objects.digests()
    assert_whole(store, one, other)


def test_a_whole_ticket_is_left_as_it_is(store: TicketStore, run: TicketFolder) -> None:
    """Not one file is written when it is copied once more, and nothing is told anew."""
    before = {path: path.stat() for path in Path(str(store.folder)).rglob("*.*")}
    changed = ticket_of(str(run.folder), 1, metrics={}, timing={"images_per_second": 1.0})
    assert changed.id in [ticket.id for ticket in store.all()]
    assert not TicketStore(store.folder).add(changed)
    after = {path: path.stat() for path in Path(str(store.folder)).rglob("*.*")}
    assert {p: (s.st_ino, s.st_mtime_ns) for p, s in after.items()} == {
        p: (s.st_ino, s.st_mtime_ns) for p, s in before.items()
    }


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "missing", "index", "no index"])
@pytest.mark.parametrize("kind", ["local", "memory"])
def test_a_damaged_copy_is_mended(
    kind: str, damage: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Copying the ticket once more makes every one of its files whole."""
    folder = Folder(place(kind, "store", tmp_path, request))
    ticket = ticket_of(place(kind, "run", tmp_path, request), 1)
    for digest in objects_of(ticket):
        TicketStore(folder).add(ticket)
        name = f"objects/{digest}.safetensors"
        if damage in ("index", "no index"):
            name = f"{ticket.id}.json"
        content = folder.read(name)
        if damage in ("missing", "no index"):
            folder.remove(name)
        elif damage == "flipped":
            folder.write(name, content[:-1] + bytes([content[-1] ^ 1]))
        else:
            folder.write(name, b"" if damage == "empty" else content[:-9])
        store = TicketStore(folder)
        if damage != "no index":
            assert problem_of(store.places()[0]) is not None
        assert store.add(ticket)
        assert_whole(store, ticket)


def test_a_damaged_source_is_refused_and_nothing_half_arrives(
    store: TicketStore, tmp_path: Path
) -> None:
    """Whichever of its objects is damaged: one line that names it, and no ticket in the target."""
    ticket, other = store.all()
    for number, digest in enumerate(objects_of(ticket)):
        path = object_path(store, digest)
        content = path.read_bytes()
        path.write_bytes(content[:-1] + b"\xee")
        target = TicketStore(Folder(tmp_path / f"target-{number}"))
        with pytest.raises(RunError, match=f"{digest}.safetensors: damaged"):
            target.add(ticket)
        assert target.places() == []
        assert target.add(other)
        path.write_bytes(content)
        assert target.add(ticket)
        assert_whole(target, ticket, other)


def add_all(source: str, target: str) -> None:
    """Copies every ticket of a run, as one of several processes that do so."""
    store = TicketStore(Folder(target))
    for ticket in TicketFolder(Folder(source)).all():
        store.add(ticket)


def test_several_processes_copy_the_same_tickets(run: TicketFolder, tmp_path: Path) -> None:
    """All succeed; each object is there once."""
    target = tmp_path / "target"
    assert run_ranks(4, add_all, str(run.folder), str(target)) == [0] * 4
    store = TicketStore(Folder(target))
    assert_whole(store, *run.all())
    assert set(store.objects.digests()) == store.used()
    assert not temporaries(target)


# Listing and verifying ----------------------------------------------------------------------


def test_a_place_is_a_run_a_store_or_neither(
    run: TicketFolder, store: TicketStore, tmp_path: Path
) -> None:
    assert isinstance(open_tickets(str(run.folder)), TicketFolder)
    assert isinstance(open_tickets(str(store.folder)), TicketStore)
    with pytest.raises(UserError, match="neither a run nor a ticket store"):
        open_tickets(str(tmp_path / "nothing"))


def test_tickets_are_found_by_the_beginning_of_their_ids(store: TicketStore) -> None:
    """Six digits are enough where no other begins like that; fewer never are."""
    one, other = store.all()
    assert find_ticket(f"{store.folder}/{one.id[:6]}").id == one.id
    assert find_ticket(f"{store.folder}/{other.id}.json").id == other.id
    with pytest.raises(UserError, match="no ticket here"):
        find_ticket(f"{store.folder}/{one.id[:5]}")
    twin = one.id[:-1] + ("0" if one.id[-1] != "0" else "1")
    store.folder.write(f"{twin}.json", store.folder.read(f"{one.id}.json"))
    with pytest.raises(UserError, match="2 tickets begin like that"):
        find_ticket(f"{store.folder}/{one.id[:20]}")
    with pytest.raises(RunError, match=f"{twin}.json: damaged: this is ticket {one.id}"):
        find_ticket(f"{store.folder}/{twin}")


def test_verify_finds_each_damage(store: TicketStore) -> None:
    """In any file of a ticket, one line that names the file; the other ticket is whole."""
    ticket, other = store.all()
    where, elsewhere = (f"{store.folder}/{one.id}.json" for one in (ticket, other))
    for path in (Path(where), *(object_path(store, digest) for digest in objects_of(ticket))):
        content = path.read_bytes()
        for damaged in (content[:-3], content[:50] + b"#" + content[51:], b"", None):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            problem = problem_of(where)
            assert problem is not None
            assert "\n" not in problem
            assert (ticket.id if damaged is None and str(path) == where else path.name) in problem
            assert problem_of(elsewhere) is None
        path.write_bytes(content)
    assert problem_of(where) is None


def test_verify_finds_masks_that_do_not_fit_the_model(store: TicketStore, tmp_path: Path) -> None:
    """Whole files, but of another network: refused, before a bit is read."""
    good = store.all()[0]
    for changes in (
        {"model": type(good.model)("cifar_resnet8", 10, 1, {"width": 8})},
        {"model": type(good.model)("cifar_vgg11", 10, 1, {"width": 4}), "stored_weights": None},
        {"model": type(good.model)("cifar_resnet8", 10, 3, {"width": 4})},
        {"model": type(good.model)("no_such_model", 10, 3, {})},
        {"model": type(good.model)("cifar_resnet8", 10, 1, {"width": "4"})},
        {"model": type(good.model)("cifar_resnet8", 10, 1, {"norm": "layer"})},
    ):
        values = {name: getattr(good, name) for name in Ticket.__dataclass_fields__}
        other = TicketStore(Folder(tmp_path / "other"))
        wrong = Ticket(**{**values, **changes})
        other.add(wrong)
        problem = problem_of(f"{other.folder}/{wrong.id}.json")
        assert problem is not None
        assert "model" in problem
        with pytest.raises((RunError, UserError)):
            Ticket.load(f"{other.folder}/{wrong.id}").build_model()


# Collecting ---------------------------------------------------------------------------------


def age(path: Path, seconds: float) -> None:
    """Makes a file that much older."""
    told = path.stat().st_mtime - seconds
    os.utime(path, (told, told))


def orphan(objects: Objects, number: int = 0) -> str:
    """The name of an object that no index names."""
    return f"{objects.put(b'nobody names this %d' % number)}.safetensors"


def test_collect_leaves_exactly_what_is_named(store: TicketStore, run: TicketFolder) -> None:
    """Orphans and torn files go, of a store and of a run; a dry run only tells."""
    levels = {store: store.folder, run: run.folder / "imp/level-01"}
    for tickets, level in levels.items():
        before = objects_at(tickets)
        torn = [".0123.safetensors.ff.tmp", ".ticket.json.ff.tmp"]
        for name, folder in zip(torn, (tickets.objects.folder, level), strict=True):
            folder.write(name, b"half")
        found = sorted([orphan(tickets.objects), *torn])
        assert sorted(collect(tickets, grace=0, dry_run=True)) == found
        assert len(objects_at(tickets)) == len(before) + 2
        assert sorted(collect(tickets, grace=0)) == found
        assert objects_at(tickets) == before
        assert not temporaries(Path(str(tickets.folder)))
        assert collect(tickets, grace=0) == []
        assert_whole(tickets, *tickets.all())


def test_collect_keeps_what_is_young(store: TicketStore) -> None:
    """Of two orphans the old one goes; one that is stored again is young again."""
    names = [orphan(store.objects, number) for number in range(3)]
    folder = Path(str(store.objects.folder))
    for name in names[:2]:
        age(folder / name, YEAR)
    assert orphan(store.objects, 1) == names[1]
    assert collect(store, grace=3600) == [names[0]]
    assert {names[1], names[2]} < set(objects_at(store))


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_collect_on_an_object_store(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """By the times that it tells."""
    store = TicketStore(Folder(place(kind, "store", tmp_path, request)))
    ticket = ticket_of(somewhere(), 1)
    store.add(ticket)
    name = orphan(store.objects)
    assert collect(store, grace=3600) == []
    assert collect(store, grace=0) == [name]
    assert_whole(store, ticket)
    assert set(store.objects.digests()) == set(objects_of(ticket))


def test_collect_keeps_the_masks_with_which_a_training_began(run: TicketFolder) -> None:
    """They are in no ticket yet."""
    chosen = ticket_of(str(run.folder), 7, stored_weights=None).stored_masks
    run.choose_masks("imp", "level-07", chosen)
    collect(run, grace=0)
    assert run.chosen_masks("imp", "level-07") == chosen
    assert {shard.sha256 for shard in chosen.shards} <= set(run.objects.digests())
    run.folder.remove("imp/level-07")
    removed = collect(run, grace=0)
    assert {f"{shard.sha256}.safetensors" for shard in chosen.shards} <= set(removed)


@pytest.mark.parametrize("name", ["ticket.json", "masks.json"])
def test_collect_removes_nothing_where_an_index_is_damaged(name: str, run: TicketFolder) -> None:
    """Its objects could not be told from those of nobody."""
    run.choose_masks("imp", "level-01", run.all()[0].stored_masks)
    orphan(run.objects)
    before = objects_at(run)
    folder = run.folder / "imp/level-01"
    for content in (folder.read(name)[:-40], b"", b"{}", json.dumps({"version": 9}).encode()):
        folder.write(name, content)
        with pytest.raises(RunError, match=f"{name}: damaged"):
            collect(run, grace=0)
        assert objects_at(run) == before


def test_collect_never_takes_what_is_not_an_object(store: TicketStore) -> None:
    """Whatever else lies beside the objects, and other files of a store."""
    names = ["README", "x.safetensors", "0" * 64, "A" * 64 + ".safetensors", ".hidden"]
    for name in names:
        (store.folder / "objects").write(name, b"mine")
        store.folder.write(name, b"mine")
    assert collect(store, grace=0) == []
    assert set(names) < set(objects_at(store))
    assert set(names) < set(store.folder.names())
