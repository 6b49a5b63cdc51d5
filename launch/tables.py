"""The tables of runs in the terminal: levels, methods side by side, growth, lines."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from launch.comparison import Row
from launch.levels import growth_rows, level_rows
from pruning.connectivity import Connectivity
from pruning.growth_config import OF_LAST
from pruning.tickets import Ticket


def level_table(tickets: Sequence[Ticket], stage: str) -> Table:
    """What a stage reached, a row a level; the gap is to IMP's ticket "at" the nearest density."""
    rows = level_rows(tickets, stage)
    known = {"level", "blocks", "density", "images_per_second", "data_wait"}
    known |= {"imp", "imp_density", "gap"}
    accuracies = list(dict.fromkeys(key for row in rows for key in row if key not in known))
    accuracies = [key for key in accuracies if key not in OF_LAST]  # which have their own table
    beside_imp = any("imp" in row for row in rows)
    grows = ["blocks"] if any("blocks" in row for row in rows) else []
    table = plain_table(f"{stage}: test accuracy", "level", *grows, "density", *accuracies)
    for name in ("IMP", "at", "gap") if beside_imp else ("images/s",):
        table.add_column(name)
    for column in table.columns:
        column.justify = "right"
    for row in rows:
        cells = [_number(row.get(key)) for key in accuracies]
        if beside_imp:
            imp, at, gap = (row.get(key) for key in ("imp", "imp_density", "gap"))
            cells += [_number(imp), _number(at, ".2%"), _number(gap, "+.4f")]
        else:
            cells.append(_number(row["images_per_second"], ",.0f"))
        level = [str(row[key]) for key in ("level", *grows)]
        table.add_row(*level, f"{row['density']:.2%}", *cells)
    return table


def comparison_table(rows: Sequence[Row], title: str) -> Table:
    """What each method reached at like densities, and in how many steps; a row a method."""
    numbers = ("density", "kept", "runs", "accuracy", "spread", "steps", "of search")
    table = plain_table(title, "", *numbers)
    for column in table.columns[1:]:
        column.justify = "right"
    for row, following in zip_longest(rows, rows[1:]):
        table.add_row(
            row.name,
            f"{row.density:.2%}",
            f"{row.kept:,.0f}",
            str(len(row.accuracies)),
            f"{row.mean:.4f}",
            f"{row.spread:.4f}",
            f"{row.steps:,.0f}",
            f"{row.search_steps:,.0f}",
            end_section=following is None or following.group != row.group,
        )
    return table


def growth_tables(tickets: Sequence[Ticket], stage: str) -> list[Table]:
    """Beside the levels of a stage that grew networks: the deepest network, and the measures."""
    if not grew(tickets, stage):
        return []
    tables = [_measures_table(growth_rows(tickets, stage), stage)]
    in_stage = [ticket for ticket in tickets if ticket.stage == stage]
    last = max(ticket.level for ticket in in_stage)
    if any(ticket.method in OF_LAST for ticket in in_stage):
        deepest = plain_table(f"{stage}: the last level", "", "density", "steps", "test accuracy")
        for ticket in (t for t in in_stage if t.level == last):
            cells = (f"{ticket.density:.2%}", f"{ticket.total_steps:,}", _number(ticket.accuracy))
            deepest.add_row(ticket.method, *cells)
        tables.insert(0, deepest)
    for table in tables:
        for column in table.columns[1:]:
            column.justify = "right"
    return tables


def _measures_table(rows: Sequence[dict[str, Any]], stage: str) -> Table:
    columns = ("", "level", "kept", "to 95%", "dense", "early", "before", "after")
    table = plain_table(f"{stage}: what keeping the weights gains", *columns, "regain", "gap")
    for row in rows:
        table.add_row(
            row["method"],
            str(row["level"]),
            _number(row["kept_ratio"], ".1%"),
            _number(row["steps_to_95"], ",d"),
            _number(row["dense_steps_to_95"], ",d"),
            _number(row["early_area"], ".3f"),
            _number(row["before"]),
            _number(row["after"]),
            _number(row["recovery"], ".0%"),
            _number(row["gap"], "+.4f"),
        )
    return table


def grew(tickets: Sequence[Ticket], stage: str) -> bool:
    """Whether a stage grew networks."""
    return any(ticket.stage == stage and ticket.method == "growth" for ticket in tickets)


def connectivity_table(results: Sequence[Connectivity], title: str) -> Table:
    """The errors between pairs of networks, a row a pair, and how BatchNorm was treated."""
    splits = list(dict.fromkeys(split for result in results for split in result.curves))
    table = plain_table(title, "level", "density")
    for split in splits:
        for name in (f"{split} ends", "peak", "barrier"):
            table.add_column(name)
    table.add_column("connected")
    for column in table.columns:
        column.justify = "right"
    for result in results:
        cells = []
        for split in splits:
            curve = result.curves[split]
            peak = max(curve.errors)
            cells += [f"{one:.2%}" for one in (peak - curve.barrier, peak, curve.barrier)]
        level = result.name.removeprefix("level-").removeprefix("0")
        table.add_row(
            level, f"{result.density:.2%}", *cells, "yes" if result.is_connected else "no"
        )
    return table


def plain_table(title: str, *columns: str) -> Table:
    """Narrow enough for ten columns of numbers in a terminal of 80 characters."""
    narrow = {"padding": (0, 1, 0, 0), "pad_edge": False, "show_edge": False}
    return Table(*columns, title=title, box=SIMPLE_HEAD, title_justify="left", **narrow)  # type: ignore[arg-type]


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)
