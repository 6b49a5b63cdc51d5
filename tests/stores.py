"""Tickets that differ by a number, and what must be true of a place that keeps them."""

import hashlib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from test_tickets import SPEC, make_ticket

from data.errors import RunError, UserError
from pruning.masks import Masks, prunable
from pruning.packing import canonical
from pruning.store import Tickets, problem_of
from pruning.tickets import Ticket
from pruning.weight_store import write_weights


def ticket_of(run: Path | str, seed: int, **changes: Any) -> Ticket:
    """A ticket with masks and weights of its own; its objects are in a run's folder."""
    generator = torch.Generator().manual_seed(seed)
    model = SPEC.build(seed)
    draws = {name: torch.rand(w.shape, generator=generator) for name, w in prunable(model).items()}
    ticket = make_ticket(
        run, masks=Masks({name: draw < 0.3 for name, draw in draws.items()}), level=seed
    )
    values = {
        **vars(ticket),
        "stored_weights": write_weights(ticket.objects, model.state_dict()),
        "name": f"level-{seed:02}",
        **changes,
    }
    return Ticket(**{name: values[name] for name in Ticket.__dataclass_fields__})


def somewhere() -> str:
    """A place in memory that nobody has used."""
    return f"memory://{uuid.uuid4().hex}"


def assert_whole(tickets: Tickets, *expected: Ticket) -> None:
    """Exactly these tickets are listed, and nothing of them is damaged."""
    assert sorted(t.id for t in tickets.all()) == sorted(t.id for t in expected)
    assert [problem_of(place) for place in tickets.places()] == [None] * len(expected)


def objects_at(tickets: Tickets) -> list[str]:
    """All names where the objects are, leftovers included."""
    return tickets.objects.folder.names()


def refusal(action: Callable[[], object]) -> str | None:
    """The line with which an action is refused, or `None` where it is not."""
    try:
        action()
    except (RunError, UserError) as error:
        return str(error)
    return None


def temporaries(folder: Path) -> list[Path]:
    """What broken writes left below a folder."""
    return sorted(folder.rglob("*.tmp"))


def reseal(index: dict[str, Any]) -> dict[str, Any]:
    """An index whose digests, id and checksum are those of what stands in it."""
    identity = index.get("identity")
    if isinstance(identity, dict):
        masks, weights = index.get("masks"), index.get("weights")
        try:
            rows = masks["tensors"].items()
            identity["masks"] = _sha256(
                {name: {"shape": row["shape"], "chunks": row["chunks"]} for name, row in rows}
            )
        except (TypeError, AttributeError, KeyError):
            pass
        try:
            rows = weights["tensors"].items()
            identity["weights"] = _sha256(
                {name: [row["dtype"], row["shape"], row["sha256"]] for name, row in rows}
            )
        except (TypeError, AttributeError, KeyError):
            pass
        index["id"] = _sha256(identity)
    index.pop("sha256", None)
    index["sha256"] = _sha256(index)
    return index


def _sha256(document: Any) -> str:
    return hashlib.sha256(canonical(document)).hexdigest()


def paths(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in a JSON document."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in inside:
        yield (*above, key)
        if isinstance(inner, (dict, list)):
            yield from paths(inner, (*above, key))


def replace(document: Any, path: tuple[Any, ...], value: Any) -> None:
    """Puts another value at a path of a JSON document. Raises `TypeError` where it is none."""
    for key in path[:-1]:
        document = document[key]
    if isinstance(document, dict) != isinstance(path[-1], str):
        raise TypeError(f"{path[-1]!r} is no key there")
    document[path[-1]] = value
