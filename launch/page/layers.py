"""The density of each layer at each level: where a method prunes."""

import math
from collections.abc import Sequence

from launch.page.figure import Cell, Figure, View
from launch.page.results import Results
from pruning.tickets import Ticket

_ROW, _MARGIN = 18, 120
"""pixels of a layer, and around all of them"""


def layers_figure(runs: Sequence[Results]) -> Figure | None:
    """A heat map for each stage of each run; colours are logarithmic."""
    views, rows = [], list[list[Cell]]()
    for run in runs:
        for stage in dict.fromkeys(ticket.stage for ticket in run.shown):
            tickets = [t for t in run.shown if t.stage == stage and not t.control]
            tickets = sorted(tickets, key=lambda ticket: ticket.level)
            name = f"{run.name}/{stage}" if len(runs) > 1 else stage
            views.append(View(name, [_map(tickets)], _layout(tickets), _height(tickets)))
            rows += [
                [run.name, stage, t.level, row.name, row.kept, row.size, row.density]
                for t in tickets
                for row in t.stored_masks.table()
            ]
    if not views:
        return None
    return Figure(
        id="layers",
        title="Density of each layer",
        caption=(
            "What each level keeps of each layer that is pruned, from the input (above) to the "
            "output. Empty: the layer is not there, or is not pruned."
        ),
        views=views,
        columns=("run", "stage", "level", "layer", "kept", "size", "density"),
        rows=rows,
    )


def _layers(tickets: Sequence[Ticket]) -> list[str]:
    """In order; of networks of several depths, all that there are."""
    longest = max(tickets, key=lambda ticket: len(ticket.stored_masks.shapes))
    every = dict.fromkeys(longest.stored_masks.shapes)
    for ticket in tickets:
        every |= dict.fromkeys(ticket.stored_masks.shapes)
    return list(every)


def _map(tickets: Sequence[Ticket]) -> dict[str, object]:
    layers = _layers(tickets)
    tables = [{row.name: row for row in ticket.stored_masks.table()} for ticket in tickets]
    found = [[table.get(layer) for table in tables] for layer in layers]
    least = min((row.density for line in found for row in line if row and row.kept), default=1.0)
    floor = math.floor(math.log10(least)) if least < 1 else -1
    ticks = list(range(floor, 1))
    return {
        "type": "heatmap",
        "x": [f"{t.level}" for t in tickets],
        "y": [layer.removesuffix(".weight") for layer in layers],
        "z": [
            [None if row is None else math.log10(max(row.density, 10**floor)) for row in line]
            for line in found
        ],
        "text": [
            [
                "" if row is None else f"{100 * row.density:.3g} %: {row.kept:,} of {row.size:,}"
                for row in line
            ]
            for line in found
        ],
        "hovertemplate": "%{y}, level %{x}<br>%{text}<extra></extra>",
        "hoverongaps": False,
        "colorscale": "Viridis",
        "zmin": floor,
        "zmax": 0,
        "xgap": 1,
        "ygap": 1,
        "colorbar": {
            "title": {"text": "density"},
            "tickvals": ticks,
            "ticktext": [f"{100 * 10**tick:.3g} %" for tick in ticks],
        },
    }


def _layout(tickets: Sequence[Ticket]) -> dict[str, object]:
    return {
        "xaxis": {
            "title": {"text": "level, and density of all layers"},
            "type": "category",
            "tickvals": [f"{t.level}" for t in tickets],
            "ticktext": [f"{t.level}<br>{100 * t.density:.3g} %" for t in tickets],
            "showgrid": False,
        },
        "yaxis": {"autorange": "reversed", "type": "category", "automargin": True, "dtick": 1},
    }


def _height(tickets: Sequence[Ticket]) -> int:
    return max(300, _MARGIN + _ROW * len(_layers(tickets)))
