"""The tickets of a run as a tree: each below the one that it was made of.

The thread of a method runs straight down; what branches off (controls, tickets of other depths) is
set to the right, above the thread's next level.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.legends import method_name
from launch.page.results import Results
from pruning.cost import Cost, Costs
from pruning.tickets import Ticket

_LANE, _ROW = 16, 30
"""pixels of a lane's width, and of a row's height"""


@dataclass(frozen=True)
class Rail:
    """The lines beside a row."""

    lane: int
    passing: tuple[int, ...]
    """lanes that go through"""
    joins: bool
    """whether it comes down its own lane"""
    branches: bool
    """whether it comes from the lane on its left"""
    goes_on: bool
    """whether its own lane goes on below it"""
    opens: bool
    """whether the first of what branches off follows"""

    def paths(self) -> str:
        """The lines as the path of an SVG picture, in pixels."""
        x, middle = _LANE * self.lane + _LANE / 2, _ROW / 2
        parts = [f"M{_LANE * lane + _LANE / 2} 0V{_ROW}" for lane in self.passing]
        if self.joins:
            parts.append(f"M{x} 0V{middle}")
        if self.branches:
            parts.append(f"M{x - _LANE} 0V{middle / 2}Q{x - _LANE} {middle} {x} {middle}")
        if self.goes_on or self.opens:
            parts.append(f"M{x} {middle}V{_ROW}")
        return "".join(parts)

    @property
    def x(self) -> float:
        """Where its ticket is, in pixels."""
        return _LANE * self.lane + _LANE / 2


@dataclass(frozen=True)
class Row:
    """A ticket in the tree."""

    ticket: Ticket
    anchor: str
    rail: Rail
    method: str
    accuracy: float | None
    steps: int
    search_steps: int
    cost: Cost | None
    parent: str
    """as the page names it; empty for a first one"""
    parent_anchor: str | None
    """where it is in the page, if it is"""


@dataclass(frozen=True)
class Lineage:
    """The tree of one run."""

    run: Results
    rows: Sequence[Row]

    @property
    def width(self) -> int:
        """Pixels of all lanes."""
        return _LANE * (1 + max((row.rail.lane for row in self.rows), default=0))

    height = _ROW


def lineages(runs: Sequence[Results]) -> list[Lineage]:
    """The trees of all runs that have tickets."""
    anchors = {t.id: run.anchor(t) for run in reversed(runs) for t in reversed(run.tickets)}
    costs = Costs()
    return [_lineage(run, anchors, costs) for run in runs if run.tickets]


def _lineage(run: Results, elsewhere: Mapping[str, str], costs: Costs) -> Lineage:
    own = {ticket.id: run.anchor(ticket) for ticket in reversed(run.tickets)}
    placed = _placed(run.tickets)
    rows = [_row(run, ticket, rail, {**elsewhere, **own}, costs) for ticket, rail in placed]
    return Lineage(run, rows)


def _row(run: Results, ticket: Ticket, rail: Rail, anchors: Mapping[str, str], costs: Costs) -> Row:
    parent = ticket.lineage[0].place if ticket.lineage else (ticket.parent or "")[:12]
    return Row(
        ticket,
        run.anchor(ticket),
        rail,
        method=method_name(ticket.method),
        accuracy=ticket.metrics.get("test", {}).get("accuracy"),
        steps=ticket.total_steps,
        search_steps=int(ticket.timing.get("search_steps", 0)),
        cost=costs.of(ticket),
        parent=parent,
        parent_anchor=anchors.get(ticket.parent or ""),
    )


def _placed(tickets: Sequence[Ticket]) -> list[tuple[Ticket, Rail]]:
    """The tickets from above to below, each with its lines."""
    by_id = {ticket.id: ticket for ticket in reversed(tickets)}
    children: dict[str, list[Ticket]] = {ticket.id: [] for ticket in tickets}
    roots = []
    for ticket in tickets:
        parent = by_id.get(ticket.parent or "")
        if parent is None or parent is ticket:
            roots.append(ticket)
        else:
            children[parent.id].append(ticket)
    placed: list[tuple[Ticket, Rail]] = []
    pending = [(root, 0, (), False, False) for root in reversed(roots)]
    stack: list[tuple[Ticket, int, tuple[int, ...], bool, bool]] = list(pending)
    while stack:  # not recursive: a lineage may have a thousand levels
        ticket, lane, passing, joins, branches = stack.pop()
        thread = _thread(ticket, children[ticket.id])
        beside = [child for child in children[ticket.id] if child is not thread]
        goes_on = thread is not None
        rail = Rail(lane, passing, joins, branches, goes_on, bool(beside))
        placed.append((ticket, rail))
        if thread is not None:
            stack.append((thread, lane, passing, True, False))
        for number, child in enumerate(reversed(beside)):
            is_last = number == 0
            through = (*passing, lane) if goes_on or not is_last else passing
            stack.append((child, lane + 1, through, False, True))
    return placed


def _thread(ticket: Ticket, children: Sequence[Ticket]) -> Ticket | None:
    """The child with which a method goes on: the next level of the same stage and kind."""
    alike = [c for c in children if (c.stage, c.control) == (ticket.stage, ticket.control)]
    return alike[-1] if alike else None
