"""What a run came to: tables in the terminal, and pictures in its folder."""

from collections.abc import Sequence

from rich.console import Console

from data.files import Folder
from launch.claim import attempts, num_devices, stage_names
from launch.comparison import Row, Run, comparison
from launch.grid import runs_below
from launch.levels import compared, gathered
from launch.plots import accuracy_plot, comparison_plot, connectivity_plot, growth_plot
from launch.tables import comparison_table, connectivity_table, grew, growth_tables, level_table
from launch.variants import variants
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
_MEASURES = (
    "kept: of all weights, excluded layers too. to 95%: steps until 95 % of the dense network's "
    "accuracy, and its own. early: area under the early curve; the dense network's is 1. before, "
    "after: accuracy around the pruning; regain: the share of its cost that training regained."
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
    grown = [ticket for ticket in shown if grew(shown, ticket.stage)]
    pruned = [ticket for ticket in shown if ticket not in grown]
    pictures: dict[str, bytes] = {}
    if pruned:
        pictures["accuracy.png"] = accuracy_plot(pruned)
    if grown:
        pictures["growth.png"] = growth_plot(grown)
    if results:
        pictures["connectivity.png"] = connectivity_plot(results)
    for name, content in pictures.items():
        folder.write(name, content)
        console.print(f"{folder}/{name}", highlight=False, soft_wrap=True)


def summarise_grid(folder: Folder) -> None:
    """Prints the comparison of the runs of a grid, and draws it into the folder of all."""
    console = Console()
    rows = compare_runs(list(runs_below(folder).values()))
    print_comparison(console, rows, str(folder))
    folder.write("comparison.png", comparison_plot(rows))
    console.print(f"{folder}/comparison.png", highlight=False, soft_wrap=True)


def compare_runs(folders: Sequence[Folder]) -> list[Row]:
    """The rows that compare what runs came to, in the order of the stages of the first."""
    stages = list(dict.fromkeys(name for folder in folders for name in stage_names(folder)))
    return comparison(
        [
            Run(gathered(folder, stages)[0], variant.label, num_devices(attempts(folder)))
            for variant in variants(folders)
            for folder in variant.runs
        ]
    )


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
    for stage in dict.fromkeys(ticket.stage for ticket in shown):
        for table in growth_tables(shown, stage):
            console.print(table, "")
    if any(ticket.method == "growth" for ticket in shown):
        console.print(_MEASURES, "", sep="\n")
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
