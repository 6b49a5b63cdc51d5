"""What a run came to: tables in the terminal, and pictures in its folder."""

from collections.abc import Sequence
from itertools import zip_longest

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from data.files import Folder
from launch.claim import stage_names
from launch.comparison import Row, comparison
from launch.levels import compared, gathered, level_rows
from launch.plots import accuracy_plot, comparison_plot, connectivity_plot
from launch.sweep import seed_runs
from pruning.connectivity import STABLE, Connectivity
from pruning.tickets import Ticket

_BESIDE_IMP = "IMP: its own ticket for that network, at the nearest density."
_UNDER_IMP = (
    "An elastic ticket costs no search; in the paper it stays 0.5 to 2.3 points under IMP's own on "
    "ImageNet."
)
_COMPARED = (
    "Accuracy: the mean over the runs; spread: the largest less the smallest. Steps: all that are "
    "behind it, those of the search for its masks included."
)
_BARRIER = (
    f"Barrier: the highest error on the line less the mean of its ends; below {STABLE:.0%} on both "
    "sets they are connected, and a ticket is stable if two trainings of it are."
)


def summarise(folder: Folder, stages: Sequence[str]) -> None:
    """Prints the tables of a run's stages, and draws its pictures into the run folder."""
    console = Console()
    tickets, results = gathered(folder, stages)
    print_tables(console, tickets, results)
    shown = compared(tickets)
    pictures: dict[str, bytes] = {}
    if shown:
        pictures["accuracy.png"] = accuracy_plot(shown)
    if results:
        pictures["connectivity.png"] = connectivity_plot(results)
    for name, content in pictures.items():
        folder.write(name, content)
        console.print(f"{folder}/{name}", highlight=False, soft_wrap=True)


def summarise_sweep(folder: Folder) -> None:
    """Prints the comparison over the seeds of a run, and draws it into the folder of all."""
    console = Console()
    rows = compare_runs(list(seed_runs(folder).values()))
    print_comparison(console, rows, str(folder))
    folder.write("comparison.png", comparison_plot(rows))
    console.print(f"{folder}/comparison.png", highlight=False, soft_wrap=True)


def compare_runs(folders: Sequence[Folder]) -> list[Row]:
    """The rows that compare what runs came to, in the order of the stages of the first."""
    stages = list(dict.fromkeys(name for folder in folders for name in stage_names(folder)))
    return comparison([gathered(folder, stages)[0] for folder in folders])


def print_comparison(console: Console, rows: Sequence[Row], title: str) -> None:
    """A table of all methods, density by density, and how to read it."""
    console.print(comparison_table(rows, f"{title}: test accuracy"), _COMPARED, "", sep="\n")


def print_tables(
    console: Console, tickets: Sequence[Ticket], results: Sequence[Connectivity]
) -> None:
    """A table a stage: its levels, or the lines that were measured in it."""
    shown = compared(tickets)
    tables = [level_table(shown, stage) for stage in dict.fromkeys(t.stage for t in shown)]
    for table in tables:
        console.print(table, "")
    if any(ticket.method == "elastic" for ticket in shown):
        beside = any(column.header == "IMP" for table in tables for column in table.columns)
        console.print(f"{_BESIDE_IMP} {_UNDER_IMP}" if beside else _UNDER_IMP, "", sep="\n")
    for stage in dict.fromkeys(result.stage for result in results):
        here = [result for result in results if result.stage == stage]
        console.print(connectivity_table(here, f"{stage}: error on the line"))
        treatments = ", ".join(dict.fromkeys(result.batchnorm for result in here))
        console.print(f"BatchNorm: {treatments}")
        for result in here:
            if not result.first.startswith(f"{stage}/{result.name}-copy"):
                ends = f"{result.name}: from {result.first} to {result.second}"
                console.print(ends, highlight=False, soft_wrap=True)
        console.print()
    if results:
        console.print(_BARRIER, "", sep="\n")


def level_table(tickets: Sequence[Ticket], stage: str) -> Table:
    """What a stage reached, a row a level; the gap is to IMP's ticket "at" the nearest density."""
    rows = level_rows(tickets, stage)
    known = {"level", "density", "images_per_second", "imp", "imp_density", "gap"}
    accuracies = list(dict.fromkeys(key for row in rows for key in row if key not in known))
    beside_imp = any("imp" in row for row in rows)
    table = _table(f"{stage}: test accuracy", "level", "density", *accuracies)
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
        table.add_row(str(row["level"]), f"{row['density']:.2%}", *cells)
    return table


def comparison_table(rows: Sequence[Row], title: str) -> Table:
    """What each method reached at like densities, and in how many steps; a row a method."""
    numbers = ("density", "kept", "runs", "accuracy", "spread", "steps", "of search")
    table = _table(title, "", *numbers)
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


def connectivity_table(results: Sequence[Connectivity], title: str) -> Table:
    """The errors between pairs of networks, a row a pair, and how BatchNorm was treated."""
    splits = list(dict.fromkeys(split for result in results for split in result.curves))
    table = _table(title, "level", "density")
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


def _table(title: str, *columns: str) -> Table:
    """Narrow enough for ten columns of numbers in a terminal of 80 characters."""
    narrow = {"padding": (0, 1, 0, 0), "pad_edge": False, "show_edge": False}
    return Table(*columns, title=title, box=SIMPLE_HEAD, title_justify="left", **narrow)  # type: ignore[arg-type]


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)
