"""`tombola tickets verify|copy|diff|gc` as a user meets them, and where they find tickets."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from test_tickets import make_ticket

from data.files import Folder
from launch.cli import run_command
from pruning.allocate import keep_top
from pruning.masks import Masks
from pruning.overlap import overlaps, total
from pruning.scores import magnitude
from pruning.store import TicketFolder, collect
from pruning.tickets import Ticket

DAY = 24 * 3600


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run `tiny` under `runs` with a dense ticket and two pruned ones."""
    folder = tmp_path / "runs/tiny"
    model = make_ticket(folder).model.build(seed=1)
    tickets = TicketFolder(Folder(folder))
    for level, density in enumerate((1.0, 0.5, 0.25)):
        name = f"level-{level:02d}"
        masks = keep_top(magnitude(model), density)
        tickets.write(make_ticket(folder, masks=masks, level=level, name=name))
    (folder / "config.toml").write_text("")
    return folder


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    """What a command prints, standard output and errors."""
    assert run_command(["tickets", *words]) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.out + captured.err


def document(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """What a command prints with --json."""
    return json.loads(said(capsys, *words, "--json"))


def test_a_whole_run_is_copied_listed_and_verified(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the run's name; a second time nothing is copied; the store lists what the run lists."""
    root, store = str(run.parent), str(tmp_path / "store")
    copied = document(capsys, "copy", "tiny", store, "--root", root)
    assert [row["copied"] for row in copied] == [True] * 3
    assert {path.name for path in Path(store).iterdir()} == {
        "objects",
        *(f"{row['id']}.json" for row in copied),
    }
    assert "was there" in said(capsys, "copy", str(run), store)
    in_run = document(capsys, "list", "tiny", "--root", root)
    in_store = document(capsys, "list", store)
    assert sorted(in_run, key=lambda t: str(t["id"])) == in_store
    assert said(capsys, "verify", store, "tiny", "--root", root).count(": whole") == 6


def test_one_ticket_is_copied_to_an_object_store_and_back(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """... named by its place in the run, then by the beginning of its id."""
    said(capsys, "copy", "tiny/imp/level-02", "memory://shared/tickets", "--root", str(run.parent))
    (listed,) = document(capsys, "list", "memory://shared/tickets")
    place = f"memory://shared/tickets/{listed['id'][:10]}"
    said(capsys, "copy", place, str(tmp_path / "back"))
    ticket = Ticket.load(tmp_path / f"back/{listed['id']}.json")
    assert ticket.summary() == Ticket.load(run / "imp/level-02").summary()
    ticket.build_model()
    assert said(capsys, "verify", place).endswith(": whole\n")
    assert listed["id"] in said(capsys, "show", place)


def test_a_damaged_ticket_is_found_and_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """verify: exit code 1, the file named, the others whole; list shows the rest."""
    ticket = Ticket.load(run / "imp/level-01")
    shard = run / f"tickets/objects/{ticket.stored_masks.shards[0].sha256}.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    printed = said(capsys, "verify", str(run), code=1)
    assert printed.count(": whole") == 2
    assert f"{shard}: damaged" in printed
    assert "error: 1 of 3 tickets cannot be used" in printed
    (run / "imp/level-02/ticket.json").write_text("{")
    assert "damaged" in said(capsys, "list", str(run))
    rows = document(capsys, "list", str(run))
    assert [("damaged" in row) for row in rows] == [False, False, True]
    assert "2 of 3" in said(capsys, "verify", str(run), code=1)
    assert "ticket.json: damaged" in said(capsys, "verify", str(run / "imp/level-02"), code=1)


def test_a_ticket_that_does_not_fit_its_model_is_found(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All digests are right, and yet nobody can build it."""
    other = make_ticket(run, masks=Masks({"fc.weight": torch.ones(3, 3, dtype=torch.bool)}))
    TicketFolder(Folder(run)).write(other)
    printed = said(capsys, "verify", str(run / "imp/level-02"), code=1)
    assert "no weights fc.weight of (3, 3) in its model" in printed


def test_diff_counts_what_two_tickets_keep(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pruned ticket keeps a part of what its parent keeps: nothing is added."""
    root = str(run.parent)
    words = ("diff", "tiny/imp/level-01", "tiny/imp/level-02", "--root", root)
    found = document(capsys, *words)
    one, other = (Ticket.load(run / f"imp/level-0{level}").masks for level in (1, 2))
    assert found["all"]["first"] == one.kept
    assert found["all"]["common"] == found["all"]["second"] == other.kept
    assert found["all"]["added"] == 0
    assert found["all"]["removed"] == one.kept - other.kept
    assert found["all"]["iou"] == pytest.approx(other.kept / one.kept)
    assert [layer["name"] for layer in found["layers"]] == list(one)
    assert "removed" in said(capsys, *words)


def test_overlaps_by_hand() -> None:
    """Four weights: two and three kept, one in common."""
    first = Masks({"w": torch.tensor([True, True, False, False]), "x": torch.ones(2).bool()})
    second = Masks({"w": torch.tensor([True, False, True, True]), "y": torch.ones(2).bool()})
    (row,) = overlaps(first, second)
    assert (row.first, row.second, row.common, row.added, row.removed) == (2, 3, 1, 2, 1)
    assert row.iou == 0.25
    assert row.chance == pytest.approx(1.5 / 3.5)
    assert total([row, row]).size == 8
    masks = Masks({"w": torch.tensor([True, False]), "x": torch.ones(2).bool()})
    assert total(overlaps(masks, masks)).chance == pytest.approx(2.5 / 3.5)  # layer by layer
    with pytest.raises(ValueError, match=r"w is \(4,\) and \(1,\)"):
        overlaps(first, Masks({"w": torch.ones(1).bool()}))


def test_diff_of_different_networks(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line for another shape, and one where nothing is in common."""
    for name, mask in (("fc.weight", torch.ones(3, 3)), ("head.weight", torch.ones(2))):
        ticket = make_ticket(run, masks=Masks({name: mask.bool()}), name="other")
        TicketFolder(Folder(run)).write(ticket)
        printed = said(capsys, "diff", str(run), str(run / "imp/other"), code=2)
        assert printed.startswith("error: ")
        assert "different networks" in printed or "no layer in common" in printed


def test_gc_removes_old_objects_that_nobody_names(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Young ones stay, and those of a training that has only begun; --dry-run removes nothing."""
    tickets = TicketFolder(Folder(run))
    begun = make_ticket(run, masks=Masks({"fc.weight": torch.ones(7, 7).bool()}))
    tickets.choose_masks("imp", "level-03", begun.stored_masks)
    old, young = (
        make_ticket(run, masks=Masks({"fc.weight": torch.ones(n, n).bool()})) for n in (8, 9)
    )
    objects = run / "tickets/objects"
    for path in objects.iterdir():
        if path.stem != young.stored_masks.shards[0].sha256:
            os.utime(path, (path.stat().st_mtime - DAY - 60,) * 2)
    before = sorted(objects.iterdir())
    assert "1 files that no ticket names would be removed" in said(
        capsys, "gc", str(run), "--dry-run"
    )
    assert sorted(objects.iterdir()) == before
    found = document(capsys, "gc", str(run))
    assert found["removed"] == [f"{old.stored_masks.shards[0].sha256}.safetensors"]
    assert len(list(objects.iterdir())) == len(before) - 1
    assert document(capsys, "gc", str(run), "--hours", "0")["removed"] == [
        f"{young.stored_masks.shards[0].sha256}.safetensors"
    ]
    assert said(capsys, "verify", str(run)).count(": whole") == 3


def test_gc_removes_nothing_while_an_index_cannot_be_read(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it names might be gone for good."""
    (run / "imp/level-02/ticket.json").write_text("{")
    before = sorted((run / "tickets/objects").iterdir())
    assert "ticket.json: damaged" in said(capsys, "gc", str(run), "--hours", "0", code=1)
    assert sorted((run / "tickets/objects").iterdir()) == before


def test_places_where_there_is_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line each, with the near name."""
    root = str(run.parent)
    line = said(capsys, "verify", "tinny", "--root", root, code=2)
    assert line.startswith("error: tinny: no run and no ticket store there")
    assert line.endswith("did you mean 'tiny'?\n")
    said(capsys, "copy", "tiny", str(run / "store"), "--root", root)
    assert "name one of its 3 tickets" in said(capsys, "show", str(run / "store"), code=2)
    assert "no ticket 'level-07'" in said(capsys, "show", str(run), "level-07", code=2)


def test_a_damaged_ticket_does_not_hide_the_others(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """show finds the one that is named, copy takes the whole ones and then names the damaged."""
    (run / "imp/level-02/ticket.json").write_text("{")
    assert "imp/level-01" in said(capsys, "show", str(run), "imp/level-01")
    assert "imp/level-01" in said(capsys, "show", str(run))
    assert "ticket.json: damaged" in said(capsys, "show", str(run), "level-02", code=1)
    printed = said(capsys, "copy", str(run), str(tmp_path / "store"), code=1)
    assert "error: 1 of 3 tickets not copied" in printed
    assert len(document(capsys, "list", str(tmp_path / "store"))) == 2


def test_what_cannot_be_meant_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run as the target of a copy, no place to verify, impossible hours, an unknown protocol."""
    before = sorted(run.rglob("*"))
    line = said(capsys, "copy", str(run), str(run), code=2)
    assert "is a run, which keeps its own tickets" in line
    assert sorted(run.rglob("*")) == before
    assert "name a ticket, a run or a store" in said(capsys, "verify", code=2)
    for hours in ("-5", "nan", "inf"):
        assert "must be a number from 0" in said(capsys, "gc", str(run), "--hours", hours, code=2)
    said(capsys, "copy", str(run), "memory://short/store")
    line = said(capsys, "gc", "memory://short/store", "--hours", "1", code=2)
    assert "on an object store at least 2" in line
    assert "foo://x: cannot be opened" in said(capsys, "list", "foo://x", code=2)


def test_gc_gives_back_what_a_writer_has_just_relied_on(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer finds an old object between the look at its age and its removal: it stays."""
    tickets = TicketFolder(Folder(run))
    masks = Masks({"fc.weight": torch.ones(8, 8).bool()})
    shard = make_ticket(run, masks=masks).stored_masks.shards[0]
    path = run / f"tickets/objects/{shard.sha256}.safetensors"
    os.utime(path, (path.stat().st_mtime - 2 * DAY,) * 2)
    rename = Folder.rename

    def after_a_writer(self: Folder, name: str, other: str) -> None:
        if name == path.name:
            make_ticket(run, masks=masks)
        rename(self, name, other)

    monkeypatch.setattr(Folder, "rename", after_a_writer)
    assert collect(tickets, grace=DAY) == []
    assert path.exists()
    monkeypatch.undo()
    os.utime(path, (path.stat().st_mtime - 2 * DAY,) * 2)
    assert collect(tickets, grace=DAY) == [path.name]
    assert [one for one in path.parent.iterdir() if one.name.endswith(".tmp")] == []
