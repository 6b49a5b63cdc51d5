"""A ticket store under kills, full disks and flipped bits: what was whole stays whole."""

import contextlib
import ctypes
import errno
import io
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import KILLED, die
from processes import run_ranks
from stores import assert_whole, objects_at, refusal, somewhere, temporaries, ticket_of

from data import files
from data.errors import RunError
from data.files import Folder
from pruning.mask_store import read_part
from pruning.store import TicketFolder, Tickets, TicketStore, collect, objects_of
from pruning.tickets import Ticket, find_ticket

# Killed while a ticket is saved -------------------------------------------------------------

POINTS = ("before", "half", "written", "renamed")
FILES = {"masks": 1, "weights": 2, "index": 3}
"""in which order a ticket's files are written"""


def tickets_at(place: str, kind: str) -> Tickets:
    return TicketStore(Folder(place)) if kind == "store" else TicketFolder(Folder(place))


def save(place: str, kind: str, seed: int) -> None:
    """Saves a ticket as copies do, or as a run does."""
    if kind == "store":
        TicketStore(Folder(place)).add(ticket_of(somewhere(), seed))
    else:
        TicketFolder(Folder(place)).write(ticket_of(place, seed))


def dies_in_write(point: str, number: int) -> None:
    """From now on this process kills itself in the middle of its write of that number."""
    writes = [0]
    write, replace = Folder.write, os.replace

    class Half(io.FileIO):
        """A file that takes the first half."""

        def write(self, content: Any) -> int:
            super().write(content[: len(content) // 2])
            die()
            return 0

    def counted(self: Folder, name: str, content: bytes) -> None:
        writes[0] += self.is_local
        if writes[0] == number and point == "before":
            die()
        if writes[0] == number and point == "half":
            files.open = Half  # type: ignore[attr-defined]
        write(self, name, content)

    def renamed(source: Any, target: Any) -> None:
        if writes[0] == number and point == "written":
            die()
        replace(source, target)
        if writes[0] == number and point == "renamed":
            die()

    Folder.write = counted  # type: ignore[method-assign]
    os.replace = renamed


def killed_save(place: str, kind: str, seed: int, point: str, number: int) -> None:
    dies_in_write(point, number)
    save(place, kind, seed)


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["store", "run"])
def test_a_killed_save_leaves_the_tickets_before(
    kind: str, file: str, point: str, tmp_path: Path
) -> None:
    """And no half ticket; what it left is collected; saving once more commits."""
    place = str(tmp_path)
    save(place, kind, 1)
    first, second = ticket_of(somewhere(), 1), ticket_of(somewhere(), 2)
    assert run_ranks(1, killed_save, place, kind, 2, point, FILES[file]) == [KILLED]
    tickets = tickets_at(place, kind)
    committed = file == "index" and point == "renamed"
    there = [first, second] if committed else [first]
    assert_whole(tickets, *there)
    assert len(temporaries(tmp_path)) == (point in ("half", "written"))
    left = len(objects_at(tickets)) + len(temporaries(tmp_path))
    collect(tickets, grace=3600)
    assert len(objects_at(tickets)) + len(temporaries(tmp_path)) == left
    collect(tickets, grace=0)
    assert not temporaries(tmp_path)
    assert set(tickets.objects.digests()) == {d for ticket in there for d in objects_of(ticket)}
    assert_whole(tickets, *there)
    save(place, kind, 2)
    assert_whole(tickets, first, second)


def test_saving_again_after_a_kill_needs_no_collecting(tmp_path: Path) -> None:
    """Over torn files and orphans that are still there."""
    place = str(tmp_path)
    for point in POINTS:
        assert run_ranks(1, killed_save, place, "store", 2, point, 1) == [KILLED]
    save(place, "store", 2)
    assert_whole(tickets_at(place, "store"), ticket_of(somewhere(), 2))


def killed_collect(place: str, number: int) -> None:
    """Collects, and dies before its deletion of that number."""
    left = [number]
    remove = Folder.remove

    def counted(self: Folder, name: str = "") -> None:
        left[0] -= 1
        if not left[0]:
            die()
        remove(self, name)

    Folder.remove = counted  # type: ignore[method-assign]
    collect(TicketStore(Folder(place)), grace=0)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_killed_collect_is_finished_by_the_next(number: int, tmp_path: Path) -> None:
    """No ticket misses what it needs, however far it came."""
    store = TicketStore(Folder(tmp_path))
    first, second = ticket_of(somewhere(), 1), ticket_of(somewhere(), 2)
    store.add(first)
    store.add(second)
    store.folder.remove(f"{second.id}.json")
    store.folder.write(f".{second.id}.json.ff.tmp", b"{")
    assert run_ranks(1, killed_collect, str(tmp_path), number) == [KILLED]
    assert_whole(store, first)
    assert len(collect(store, grace=0)) == 4 - number
    assert_whole(store, first)
    assert set(store.objects.digests()) == set(objects_of(first))
    assert not temporaries(tmp_path)


def killed_at_any_moment(place: str, chance: int) -> None:
    """Saves ticket after ticket until it is killed, between none and fifty milliseconds on."""
    rank = int(os.environ.get("RANK", "0"))
    draws = random.Random(chance * 8 + rank)
    tickets = [ticket_of(somewhere(), draws.randrange(1000)) for _ in range(3)]
    threading.Timer(draws.random() * 0.05, die).start()
    while True:
        for ticket in tickets:
            store = TicketStore(Folder(place))
            store.add(ticket)
            store.folder.remove(f"{ticket.id}.json")


def test_writers_killed_at_random_moments_leave_whole_tickets(tmp_path: Path) -> None:
    """Thirty writers, three at a time: whatever is listed is whole."""
    store = TicketStore(Folder(tmp_path))
    for chance in range(10):
        assert run_ranks(3, killed_at_any_moment, str(tmp_path), chance) == [KILLED] * 3
        assert_whole(store, *store.all())
    collect(store, grace=0)
    assert not temporaries(tmp_path)
    assert set(store.objects.digests()) == store.used()
    assert_whole(store, *store.all())


# Disks that are full, and folders that cannot be written -----------------------------------


def mount(words: list[bytes | None], flags: int) -> None:
    """mount(2). Raises `OSError`."""
    libc = ctypes.CDLL(None, use_errno=True)
    source, target, kind, data = words
    if libc.mount(source, target, kind, ctypes.c_ulong(flags), data):
        raise OSError(ctypes.get_errno(), "mount")


READ_ONLY, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 32, 4096, 16384, 1 << 18
NO_MOUNTS = 77
"""exit code of a process that may not mount anything"""


@contextlib.contextmanager
def own_mounts() -> Iterator[None]:
    """What is mounted inside is seen by this process alone; ends it where it may not mount."""
    new_namespace = 0x20000
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        if libc.unshare(new_namespace):
            raise OSError(ctypes.get_errno(), "unshare")
        mount([None, b"/", None, None], RECURSIVE | PRIVATE)
        yield
    except PermissionError:
        os._exit(NO_MOUNTS)


def in_own_mounts(target: Callable[..., None], *arguments: Any) -> None:
    """Runs a function in a process of its own, or skips the test where it may not mount."""
    (code,) = run_ranks(1, target, *arguments)
    if code == NO_MOUNTS:
        pytest.skip("needs the right to mount")
    assert code == 0


def failure(action: Callable[[], object]) -> OSError | None:
    """The error with which an action ends, if it does."""
    try:
        action()
    except OSError as error:
        return error
    return None


def on_a_full_disk(place: str) -> None:
    """Copies a ticket onto disks with room for ever more of it, until it fits."""
    with own_mounts():
        mount([b"tmpfs", place.encode(), b"tmpfs", b"size=1m"], 0)
    store = TicketStore(Folder(place))
    first, second = ticket_of(somewhere(), 1), ticket_of(somewhere(), 2)
    store.add(first)
    filler = Path(place, "filler")
    failures = 0
    for room in range(0, 1 << 20, os.sysconf("SC_PAGE_SIZE")):
        filler.write_bytes(b"")
        free = os.statvfs(place)
        filler.write_bytes(b"x" * (free.f_bavail * free.f_frsize - room))
        error = failure(lambda: TicketStore(store.folder).add(second))
        if error is None:
            break
        failures += 1
        assert error.errno == errno.ENOSPC
        assert str(error.filename).startswith(place)
        assert_whole(store, first)
        assert not temporaries(Path(place))
        collect(store, grace=0)
        assert len(objects_at(store)) == 2
    assert failures > 5
    assert_whole(store, first, second)


def test_a_full_disk_is_one_error_and_loses_nothing(tmp_path: Path) -> None:
    """A real one, full at every page of a ticket's files: it names the file, leaves no torn one."""
    in_own_mounts(on_a_full_disk, str(tmp_path))


def on_a_read_only_folder(place: str) -> None:
    """Reads a store, and tries to write, where even root may not."""
    first, second = ticket_of(somewhere(), 1), ticket_of(somewhere(), 2)
    TicketStore(Folder(place)).add(first)
    store = TicketStore(Folder(place))
    store.objects.put(b"an orphan")
    with own_mounts():
        mount([place.encode(), place.encode(), None, None], BIND)
        mount([None, place.encode(), None, None], REMOUNT | BIND | READ_ONLY)
    for action in (
        lambda: store.add(second),
        lambda: store.objects.put(b"an orphan"),
        lambda: collect(store, grace=0),
    ):
        with pytest.raises(OSError, match="Read-only file system") as caught:
            action()
        assert str(caught.value.filename).startswith(place)
    assert not store.add(first)
    assert_whole(store, first)
    assert len(objects_at(store)) == 3
    assert not temporaries(Path(place))


def test_a_read_only_store_is_read(tmp_path: Path) -> None:
    """Copying a ticket that is there is no error; whatever would write is one."""
    in_own_mounts(on_a_read_only_folder, str(tmp_path))


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_no_failing_write_leaves_a_half_file(
    number: int, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the three files of a ticket, at each step of writing it; then it is copied."""
    store = TicketStore(Folder(tmp_path))
    first, second = ticket_of(somewhere(), 1), ticket_of(somewhere(), 2)
    store.add(first)
    left = [number]

    def fails() -> None:
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

    class Full(io.FileIO):
        def write(self, content: Any) -> int:
            super().write(content[:100])
            fails()
            return super().write(content[100:])

    with monkeypatch.context() as patch:
        if call == "write":
            patch.setattr(files, "open", Full, raising=False)
        else:
            real = getattr(os, call)
            patch.setattr(os, call, lambda *words: (fails(), real(*words)))
        with pytest.raises(OSError, match="Disk quota exceeded") as caught:
            store.add(second)
    assert str(caught.value.filename).startswith(str(tmp_path))
    assert_whole(store, first)
    assert not temporaries(tmp_path)
    assert store.add(second)
    assert_whole(store, first, second)


def test_an_object_of_somebody_else_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its time may not be changed, a folder that may be written is enough."""
    store = TicketStore(Folder(tmp_path))
    name = f"{store.objects.put(b'content')}.safetensors"
    before = (tmp_path / "objects" / name).stat().st_ino

    def refused(*words: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refused)
    store.objects.put(b"content")
    assert (tmp_path / "objects" / name).stat().st_ino != before


# Flipped bits, torn and missing files ------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> TicketFolder:
    """A run with one ticket, and the masks of a level that began."""
    tickets = TicketFolder(Folder(tmp_path))
    ticket = ticket_of(str(tmp_path), 1)
    tickets.write(ticket)
    tickets.choose_masks("imp", "level-01", ticket.stored_masks)
    return tickets


def read_all(run: TicketFolder) -> Any:
    """All that a ticket is: what is told of it, its masks, whole and in parts, and its weights."""
    ticket = find_ticket(f"{run.folder}/imp/level-01")
    wanted = {name: (1, mask.numel() - 1) for name, mask in ticket.masks.items()}
    parts = read_part(ticket.objects, ticket.stored_masks, wanted)
    chosen = run.chosen_masks("imp", "level-01")
    return ticket.summary(), ticket.stored_masks, ticket.masks, parts, ticket.weights(), chosen


def file_of(run: TicketFolder, kind: str) -> Path:
    """The only file of a kind."""
    ticket = run.all()[0]
    if kind in ("ticket.json", "masks.json"):
        return Path(f"{run.folder}/imp/level-01/{kind}")
    assert ticket.stored_weights is not None
    stored = ticket.stored_masks.shards if kind == "masks" else ticket.stored_weights.files
    return Path(f"{run.objects.folder}/{stored[0].sha256}.safetensors")


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


EVERY = {"ticket.json": 13, "masks.json": 5, "masks": 2, "weights": 61}
"""one flipped bit in so many bytes: hundreds in each kind of file"""


@pytest.mark.parametrize("kind", EVERY)
def test_a_flipped_bit_is_refused_or_changes_nothing(kind: str, run: TicketFolder) -> None:
    """At hundreds of places. Only between the fields of an index it may change nothing."""
    path = file_of(run, kind)
    content = path.read_bytes()
    expected = read_all(run)
    draws = random.Random(0)
    refused = 0
    places = range(0, len(content), EVERY[kind])
    assert len(places) > 200
    for position in places:
        flipped = bytearray(content)
        flipped[position] ^= 1 << draws.randrange(8)
        path.write_bytes(flipped)
        found: list[Any] = []
        line = refusal(lambda found=found: found.append(read_all(run)))
        if line is None:
            assert same(found[0], expected)
        else:
            assert path.name in line
            assert "\n" not in line
            refused += 1
    spaces = content.count(b" ") + content.count(b"\n") if kind.endswith("json") else 0
    assert refused > len(places) * (1 - 1.5 * spaces / len(content)) - 1
    path.write_bytes(content)
    assert same(read_all(run), expected)


@pytest.mark.parametrize("kind", EVERY)
def test_a_torn_file_is_refused(kind: str, run: TicketFolder) -> None:
    """Cut at many lengths, empty, longer, of zeros, another one, a folder, gone: one line."""
    path = file_of(run, kind)
    content = path.read_bytes()
    is_index = kind.endswith("json")
    torn = [content[:cut] for cut in range(0, len(content) - 2, len(content) // 60)]
    torn += [content + b"}", content + b"\0" * 512, bytes(len(content)), content * 2]
    torn += [content[:-2] if is_index else content[:-1], content[1:], content[::-1]]
    other = file_of(run, "masks" if kind == "weights" else "weights")
    torn.append(other.read_bytes())
    for damaged in torn:
        path.write_bytes(damaged)
        with pytest.raises(RunError, match=f"{path.name}: damaged") as caught:
            read_all(run)
        assert "\n" not in str(caught.value)
    path.unlink()
    if not is_index:
        with pytest.raises(RunError, match=f"{path.name}: missing"):
            read_all(run)
    for inside in (0, 1, 100):
        path.mkdir(exist_ok=True)
        (path / str(inside)).touch()
        with pytest.raises(RunError, match=f"{path.name}: (damaged|cannot be read)"):
            read_all(run)


def test_one_damaged_ticket_does_not_hide_another(tmp_path: Path) -> None:
    """Each is loaded by itself."""
    store = TicketStore(Folder(tmp_path))
    tickets = [ticket_of(somewhere(), seed) for seed in (1, 2, 3)]
    for ticket in tickets:
        store.add(ticket)
    (tmp_path / f"{tickets[1].id}.json").write_bytes(b"{")
    for ticket in (tickets[0], tickets[2]):
        assert Ticket.load(f"{tmp_path}/{ticket.id}").masks == ticket.masks
    with pytest.raises(RunError, match=f"{tickets[1].id}.json: damaged"):
        store.all()
    assert len(store.places()) == 3
