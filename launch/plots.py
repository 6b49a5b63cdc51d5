"""The pictures of runs, as PNG files: accuracy against density, all methods, errors on lines."""

import io
import statistics
from collections.abc import Sequence
from itertools import cycle
from typing import Any

from launch.comparison import Row
from launch.legends import METHODS, density_ticks, method_name
from pruning.connectivity import Connectivity
from pruning.tickets import Ticket

_COLOURS = (
    "#1a5fb4",
    "#c64600",
    "#26a269",
    "#813d9c",
    "#986a44",
    "#a51d2d",
    "#5e5c64",
    "#e5a50a",
)
_MARKERS = (("o", "s"), ("^", "D"), ("v", "P"))
"""of tickets and of controls; the next ones where all colours were taken"""
_STYLES = ("--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))


def accuracy_plot(tickets: Sequence[Ticket]) -> bytes:
    """Test accuracy against density, a line a stage and method.

    Of one stage each method has its colour; of several, each stage, and those beyond the colours
    other markers.
    """
    from matplotlib.ticker import FuncFormatter

    figure, axes = _new_figure()
    stages = list(dict.fromkeys(ticket.stage for ticket in tickets))
    colours = cycle(_COLOURS)
    for number, stage in enumerate(stages):
        markers = _MARKERS[number // len(_COLOURS) % len(_MARKERS)]
        in_stage = [ticket for ticket in tickets if ticket.stage == stage]
        methods = sorted(dict.fromkeys(t.method for t in in_stage), key=lambda m: m not in METHODS)
        colour, styles = next(colours) if len(stages) > 1 else None, cycle(_STYLES)
        for method in methods:
            line = sorted((t for t in in_stage if t.method == method), key=lambda t: -t.density)
            is_control = line[0].control
            label = method_name(method)
            axes.plot(
                [ticket.density for ticket in line],
                [ticket.accuracy for ticket in line],
                marker=markers[is_control],
                markersize=4,
                linestyle=next(styles) if is_control and colour else "-",
                color=colour or next(colours),
                label=label if len(stages) == 1 else f"{stage}: {label}",
            )
        dense = [ticket for ticket in in_stage if ticket.density == 1.0 and not ticket.control]
        if dense:
            axes.axhline(
                dense[0].accuracy, color=colour or "0.6", linewidth=1, linestyle="--", zorder=0
            )
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xticks(density_ticks([ticket.density for ticket in tickets]))
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:.3g} %"))
    axes.set_xlabel("density: weights kept")
    axes.set_ylabel("test accuracy")
    return _finished(figure, axes)


def comparison_plot(rows: Sequence[Row]) -> bytes:
    """The accuracies of all methods, mean and range over the runs, beside the steps behind them.

    A line a method, a colour a density; the light part of the steps is the search for the masks.
    The best of the dense networks is a dashed line.
    """
    from matplotlib.ticker import EngFormatter

    sparse = [row for row in rows if row.group < 1]
    names = list(dict.fromkeys(row.name for row in sparse))
    groups = list(dict.fromkeys(row.group for row in sparse))
    figure, (left, right) = _new_figure(size=(9.5, 1.5 + 0.25 * len(names)), columns=2)
    height = 0.8 / max(1, len(groups))
    for number, (group, colour) in enumerate(zip(groups, cycle(_COLOURS), strict=False)):
        here = [row for row in sparse if row.group == group]
        places = [names.index(row.name) + (number + 0.5) * height - 0.4 for row in here]
        for row, place in zip(here, places, strict=True):
            left.hlines(place, min(row.accuracies), max(row.accuracies), color=colour, linewidth=1)
        label = f"{100 * statistics.mean(row.density for row in here):.2g} % kept"
        left.plot([row.mean for row in here], places, "o", markersize=4, color=colour, label=label)
        right.barh(places, [row.steps for row in here], height, color=colour)
        right.barh(places, [row.search_steps for row in here], height, color="w", alpha=0.6)
    dense = [row.mean for row in rows if row.group == 1]
    if dense:
        left.axvline(
            max(dense), color="0.6", linewidth=1, linestyle="--", zorder=0, label="best dense"
        )
    left.set_yticks(range(len(names)), names, fontsize="small")
    left.set_ylim(len(names) - 0.4, -0.6)
    left.set_xlabel("test accuracy")
    right.set_xlabel("optimizer steps; light: the search for the masks")
    right.xaxis.set_major_formatter(EngFormatter(sep=""))
    left.grid(alpha=0.25)
    if sparse:
        figure.legend(loc="outside upper center", ncols=len(groups) + 1, frameon=False)
    return _as_png(figure)


def growth_plot(tickets: Sequence[Ticket]) -> bytes:
    """Test accuracy against depth: a line for each recursion and for the dense networks.

    Each method has its colour; of several stages, each its style.
    """
    figure, axes = _new_figure()
    stages = list(dict.fromkeys(ticket.stage for ticket in tickets))
    styles = dict(zip(stages, cycle(("-", *_STYLES)), strict=False))
    methods = dict.fromkeys(ticket.method for ticket in tickets)
    colours = dict(zip(methods, cycle(_COLOURS), strict=False))
    for stage, method in dict.fromkeys((t.stage, t.method) for t in tickets):
        line = [t for t in tickets if (t.stage, t.method) == (stage, method)]
        line.sort(key=lambda ticket: ticket.level)
        label = method_name(method, grown=True)
        axes.plot(
            [ticket.level for ticket in line],
            [ticket.accuracy for ticket in line],
            marker="s" if line[0].control else "o",
            markersize=4,
            linestyle=styles[stage],
            color=colours[method],
            label=label if len(stages) == 1 else f"{stage}: {label}",
        )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("growths: blocks added")
    axes.set_ylabel("test accuracy")
    return _finished(figure, axes)


def connectivity_plot(results: Sequence[Connectivity]) -> bytes:
    """The errors on each line, solid on test images and dotted on training images."""
    figure, axes = _new_figure()
    for result, colour in zip(results, cycle(_COLOURS), strict=False):
        for split, curve in result.curves.items():
            steps = len(curve.errors) - 1
            axes.plot(
                [step / steps for step in range(steps + 1)],
                [error * 100 for error in curve.errors],
                color=colour,
                linestyle="-" if split == "test" else ":",
                label=f"{result.stage}/{result.name}, {split} (density {result.density:.2%})",
            )
    axes.set_xlabel("from the first network (0) to the second (1)")
    axes.set_ylabel("error, %")
    axes.set_ylim(bottom=0)
    return _finished(figure, axes)


def _new_figure(*, size: tuple[float, float] = (7, 4.5), columns: int = 1) -> tuple[Any, Any]:
    """A figure and its axes; matplotlib takes a second to import, so only who draws does."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(ncols=columns, sharey=True)


def _finished(figure: Any, axes: Any) -> bytes:
    axes.grid(alpha=0.25)
    if len(axes.get_legend_handles_labels()[0]) > 4:  # beside the curves, not over them
        figure.set_size_inches(9.5, 4.5)
        figure.legend(loc="outside right upper", frameon=False, fontsize="small", handlelength=3)
    else:
        axes.legend(frameon=False, handlelength=3)
    return _as_png(figure)


def _as_png(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()
