"""Tickets on a real S3 server: many writers at once, errors in the middle, slow and cut lines.

Against moto; with TOMBOLA_TEST_S3 against another server (see tests/s3.py).
"""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import free_port, run_ranks
from s3 import Bucket, Proxy, environment_of, faulty, s3_server, with_environment
from stores import assert_whole, refusal, somewhere, ticket_of

from data import files
from data.errors import StoreError
from data.files import Folder
from pruning.mask_store import read_masks, read_part, write_masks
from pruning.masks import Masks
from pruning.store import TicketFolder, TicketStore, collect, objects_of, problem_of
from pruning.tickets import Ticket


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    """A bucket, seen by this process."""
    with s3_server() as bucket:
        yield bucket


@pytest.fixture
def url(bucket: Bucket, tmp_path: Path) -> str:
    """An unused place in the bucket."""
    return f"{bucket.url}/{tmp_path.name}"


@pytest.fixture
def line(bucket: Bucket) -> Iterator[Proxy]:
    """What lies between this process and the server."""
    with faulty(bucket) as (proxy, _):
        yield proxy


FIRST, SECOND = (ticket_of(somewhere(), seed) for seed in (1, 2))


def test_a_run_keeps_its_tickets_on_s3(bucket: Bucket, url: str) -> None:
    """Written, listed, found by a URL, built, collected."""
    run = TicketFolder(Folder(url))
    tickets = [ticket_of(url, seed) for seed in (1, 2)]
    for ticket in tickets:
        run.write(ticket)
    assert_whole(run, *tickets)
    found = Ticket.load(f"{url}/imp/level-02")
    assert found.summary() == tickets[1].summary()
    assert found.build_model().conv1.weight.shape == (4, 1, 3, 3)
    for shard in tickets[0].stored_masks.shards:
        run.objects.folder.remove(f"{shard.sha256}.safetensors")
    assert "missing" in str(problem_of(f"{url}/imp/level-01"))
    collect(run, grace=0)
    assert problem_of(f"{url}/imp/level-02") is None


def test_a_part_of_masks_is_read_by_byte_ranges(url: str) -> None:
    """Of several megabytes only the chunks that hold it."""
    generator = torch.Generator().manual_seed(0)
    masks = Masks({"a": torch.rand(20 << 20, generator=generator) < 0.5})
    objects = TicketStore(Folder(url)).objects
    stored = write_masks(objects, masks)
    assert len(stored.shards) == 3
    wanted = (5_000_000, 12_345_678)
    part = read_part(objects, stored, {"a": wanted})["a"]
    assert torch.equal(part, masks["a"][slice(*wanted)])
    assert read_masks(objects, stored) == masks


# Many writers -------------------------------------------------------------------------------


def add_one(url: str) -> None:
    """Writes the one ticket, and reads it back."""
    store = TicketStore(Folder(url))
    store.add(FIRST)
    assert_whole(store, FIRST)


def test_eight_processes_write_the_same_ticket(bucket: Bucket, url: str) -> None:
    """All succeed; the ticket is whole, and each of its objects is there once."""
    codes = run_ranks(8, with_environment, bucket.environment, add_one, url)
    assert codes == [0] * 8
    store = TicketStore(Folder(url))
    assert_whole(store, FIRST)
    assert sorted(store.objects.digests()) == sorted(objects_of(FIRST))
    assert sorted(store.folder.names()) == [f"{FIRST.id}.json", "objects"]


# Faults -------------------------------------------------------------------------------------


def stored_first(url: str) -> TicketStore:
    """A store with a ticket in it."""
    store = TicketStore(Folder(url))
    store.add(FIRST)
    return store


def one_line(text: str | None, place: str) -> None:
    assert text is not None
    assert place in text
    assert "\n" not in text
    assert len(text) < 1000


PUTS = ("safetensors", ".json")


@pytest.mark.parametrize("containing", PUTS)
@pytest.mark.parametrize("status", [500, 503, 403])
def test_a_save_that_fails_leaves_no_half_ticket(
    status: int, containing: str, url: str, line: Proxy
) -> None:
    """An error that stays, at an object or the index: one line; then the same call succeeds."""
    store = stored_first(url)
    line.fail(float("inf"), method="PUT", containing=containing, status=status)
    one_line(refusal(lambda: store.add(SECOND)), url)
    line.heal()
    assert_whole(store, FIRST)
    assert store.add(SECOND)
    assert_whole(store, FIRST, SECOND)


def test_an_error_in_the_middle_is_tried_again(
    bucket: Bucket, url: str, line: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two 500s at each request, with the retries that a client has by default."""
    with environment_of({**bucket.environment, "AWS_ENDPOINT_URL": line.url}):
        monkeypatch.delenv("AWS_MAX_ATTEMPTS", raising=False)
        store = TicketStore(Folder(url))
        for method in ("PUT", "GET", "HEAD"):
            line.fail(2, method=method)
            store.add(FIRST)
            assert_whole(store, FIRST)
        assert sum(method == "PUT" for method, _ in line.requests) == 3 + 2


@pytest.mark.parametrize("after", [0, 1000, 10_000])
def test_a_line_cut_while_uploading_leaves_no_half_ticket(
    after: int, url: str, line: Proxy
) -> None:
    """At the first object and further on: one line; then the same call succeeds."""
    store = stored_first(url)
    line.cut(after, method="PUT")
    one_line(refusal(lambda: store.add(SECOND)), url)
    line.heal()
    assert_whole(store, FIRST)
    assert store.add(SECOND)
    assert_whole(store, FIRST, SECOND)


@pytest.mark.parametrize("after", [0, 3000, 15_000])
def test_a_line_cut_while_downloading_gives_no_half_ticket(
    after: int, url: str, line: Proxy
) -> None:
    """In the index or in an object: one line; whole once more when the line is."""
    store = stored_first(url)
    line.cut(after, method="GET", containing=url.rsplit("/", 1)[-1])

    def load() -> None:
        ticket = Ticket.load(f"{url}/{FIRST.id}.json")
        ticket.weights()

    one_line(refusal(load), url)
    line.heal()
    load()
    assert_whole(store, FIRST)


def test_a_slow_line_is_only_slow(url: str, line: Proxy) -> None:
    """A tenth of a second a request."""
    line.delay(0.1)
    assert_whole(stored_first(url), FIRST)


def test_copying_off_a_failing_server_leaves_no_half_ticket(
    url: str, line: Proxy, tmp_path: Path
) -> None:
    """A source that fails at its second object."""
    source = stored_first(url)
    target = TicketStore(Folder(tmp_path / "store"))
    (ticket,) = source.all()
    last = list(objects_of(ticket))[-1]
    line.fail(float("inf"), method="GET", containing=last)
    one_line(refusal(lambda: target.add(ticket)), url)
    assert target.places() == []
    line.heal()
    assert target.add(ticket)
    assert_whole(target, FIRST)


def test_a_server_that_fails_while_collecting_loses_nothing(url: str, line: Proxy) -> None:
    """A listing that fails is not an empty one."""
    store = stored_first(url)
    store.objects.put(b"nobody names this")
    for method in ("GET", "POST", "DELETE"):
        line.fail(float("inf"), method=method)
        refusal(lambda: collect(store, grace=0))
        line.heal()
        assert_whole(store, FIRST)
    collect(store, grace=0)
    assert set(store.objects.digests()) == set(objects_of(FIRST))


def test_a_server_that_is_gone_is_one_line(url: str, bucket: Bucket) -> None:
    """Nothing listens there."""
    nowhere = f"http://127.0.0.1:{free_port()}"
    environment = {**bucket.environment, "AWS_ENDPOINT_URL": nowhere, "AWS_MAX_ATTEMPTS": "1"}
    with environment_of(environment):
        with pytest.raises(StoreError) as caught:
            TicketStore(Folder(url)).add(FIRST)
        one_line(str(caught.value), url)


def test_a_server_that_never_answers_is_given_up(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading and writing end in one line, after limits that are made short here."""
    s3fs = pytest.importorskip("s3fs")
    for name, value in {"read_timeout": 0.2, "connect_timeout": 0.2, "retries": 1}.items():
        monkeypatch.setattr(s3fs.S3FileSystem, name, value)
    monkeypatch.setattr(files, "_PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = {**bucket.environment, "AWS_ENDPOINT_URL": endpoint, "AWS_MAX_ATTEMPTS": "1"}
        with environment_of(environment):
            folder = Folder(f"{bucket.url}/silent")
            for action in (lambda: folder.write("a", b"a"), lambda: folder.read("a")):
                one_line(refusal(action), folder.url)
