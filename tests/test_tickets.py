"""Tickets: what is written comes back, by its digests, and nothing damaged is ever loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import RunError, UserError
from data.files import Folder
from pruning.allocate import keep_top
from pruning.mask_store import write_masks
from pruning.masks import Masks
from pruning.scores import magnitude
from pruning.store import TicketFolder
from pruning.tickets import Ancestor, Ticket
from pruning.weight_store import write_weights
from train.models import ModelSpec
from train.versions import software_versions

SPEC = ModelSpec("cifar_resnet8", 10, 1, {"width": 4})


def make_ticket(run: Path | str, *, masks: Masks | None = None, **changes: Any) -> Ticket:
    """A ticket whose objects are in a run's folder; its index is not written."""
    model = SPEC.build(seed=1)
    objects = TicketFolder(Folder(run)).objects
    masks = keep_top(magnitude(model), 0.25) if masks is None else masks
    values: dict[str, Any] = {
        "method": "imp",
        "level": 2,
        "model": SPEC,
        "step": 20,
        "stored_masks": write_masks(objects, masks),
        "stored_weights": write_weights(objects, model.state_dict()),
        "parent": "ab" * 32,
        "lineage": (Ancestor("ab" * 32, "imp/level-01", "imp", 1, 0.5),),
        "metrics": {"test": {"accuracy": 0.5, "top5": 0.9, "loss": 1.25}},
        "timing": {"images_per_second": 10.0},
        "versions": software_versions(),
        "stage": "imp",
        "name": "level-02",
        "objects": objects,
        **changes,
    }
    return Ticket(**values)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with one ticket."""
    TicketFolder(Folder(tmp_path)).write(make_ticket(tmp_path))
    return tmp_path


def test_a_ticket_comes_back_as_it_was(run: Path) -> None:
    """Masks, lineage, metrics and id, from the level's folder or the file itself."""
    written = make_ticket(run)
    for url in (run / "imp/level-02", str(run / "imp/level-02/ticket.json")):
        read = Ticket.load(url)
        assert read.summary() == written.summary()
        assert read.id == written.id
        assert all(torch.equal(read.masks[name], mask) for name, mask in written.masks.items())


def test_build_model_gives_the_masked_network_at_step_k(run: Path) -> None:
    """W_k where the mask is true, zero where it is not, buffers included."""
    ticket = Ticket.load(run / "imp/level-02")
    model, at_k = ticket.build_model(), SPEC.build(seed=1)
    ticket.masks.project_(at_k)
    assert model.state_dict().keys() == at_k.state_dict().keys()
    assert all(torch.equal(v, at_k.state_dict()[k]) for k, v in model.state_dict().items())
    kept = sum(int(dict(model.named_parameters())[n].count_nonzero()) for n in ticket.masks)
    assert kept == ticket.masks.kept


def test_the_id_is_that_of_the_content(run: Path) -> None:
    """Another mask, parent, step, level, method or weights: another id; other metrics: the same."""
    ticket = make_ticket(run)
    names = list(ticket.masks)
    changed = Masks({**ticket.masks, names[0]: ~ticket.masks[names[0]]})
    different: list[dict[str, Any]] = [
        {"masks": changed},
        {"parent": None},
        {"step": 21},
        {"level": 3},
        {"method": "random"},
        {"stored_weights": None},
        {"model": ModelSpec("cifar_resnet8", 11, 1, {"width": 4})},
    ]
    ids = {make_ticket(run, **change).id for change in different} | {ticket.id}
    assert len(ids) == 8
    assert make_ticket(run, metrics={}, timing={"images_per_second": 0.0}).id == ticket.id


def test_equal_masks_and_weights_are_stored_once(run: Path) -> None:
    """Two tickets of the same masks and W_k share both objects."""
    TicketFolder(Folder(run)).write(make_ticket(run, level=3, name="level-03"))
    assert len(list((run / "tickets/objects").iterdir())) == 2
    assert len(TicketFolder(Folder(run)).all()) == 2


def test_a_ticket_without_rewind_weights_says_so(run: Path) -> None:
    """Learning-rate rewinding gives no W_k: one line."""
    ticket = make_ticket(run, stored_weights=None, name="level-04")
    TicketFolder(Folder(run)).write(ticket)
    with pytest.raises(UserError, match="has no weights to start from: it was found by learning"):
        Ticket.load(run / "imp/level-04").build_model()


def test_no_ticket_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no ticket here \(a ticket is a folder with ticket.json"):
        Ticket.load(tmp_path)


def objects_of_kind(run: Path, kind: str) -> list[Path]:
    """The files of a run's only ticket that hold its masks or its weights."""
    ticket = Ticket.load(run / "imp/level-02")
    assert ticket.stored_weights is not None
    stored = {"masks": ticket.stored_masks.shards, "weights": ticket.stored_weights.files}[kind]
    return [run / f"tickets/objects/{one.sha256}.safetensors" for one in stored]


@pytest.mark.parametrize("kind", ["masks", "weights"])
def test_no_damaged_object_is_loaded(kind: str, run: Path) -> None:
    """Every 97th byte flipped, cut short at several places, empty, missing: always refused."""
    (path,) = objects_of_kind(run, kind)
    content = path.read_bytes()
    damaged = [content[:cut] for cut in (0, 4, 9, 100, len(content) - 1)]
    damaged.append(content + b"\0")
    for position in range(0, len(content), 97):
        flipped = bytearray(content)
        flipped[position] ^= 4
        damaged.append(bytes(flipped))

    def load() -> None:
        ticket = Ticket.load(run / "imp/level-02")
        ticket.weights()

    load()
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(RunError, match=f"{path.name}: damaged"):
            load()
    path.unlink()
    with pytest.raises(RunError, match=f"{path.name}: missing"):
        load()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 5000])
def test_a_torn_ticket_is_refused(content: bytes, run: Path) -> None:
    path = run / "imp/level-02/ticket.json"
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"ticket\.json: damaged"):
        Ticket.load(path)


def test_a_ticket_loads_from_an_object_store() -> None:
    """A URL of a level's folder is enough, on any storage."""
    location = "memory://shared/run"
    written = make_ticket(location)
    TicketFolder(Folder(location)).write(written)
    read = Ticket.load(f"{location}/imp/level-02")
    assert read.id == written.id
    assert read.build_model().conv1.weight.shape == (4, 1, 3, 3)


def test_a_link_to_a_level_is_a_ticket(run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """... wherever the link is."""
    link = tmp_path_factory.mktemp("links") / "mine"
    link.symlink_to(run / "imp/level-02")
    assert Ticket.load(link).id == make_ticket(run).id


@pytest.mark.parametrize("kind", ["masks", "weights"])
def test_a_damaged_object_is_written_again(kind: str, run: Path) -> None:
    """Writing equal masks or weights once more mends what was damaged on the disk."""
    (path,) = objects_of_kind(run, kind)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    make_ticket(run)
    ticket = Ticket.load(run / "imp/level-02")
    assert ticket.weights().keys() == SPEC.build().state_dict().keys()
