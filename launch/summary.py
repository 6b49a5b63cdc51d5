"""What a run came to: a table in the terminal, and accuracy against density as a picture."""

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from data.files import Folder
from pruning.tickets import Ticket

_COLOURS = {"imp": "#1a5fb4", "random": "#c64600", "reinit": "#26a269", "oneshot": "#813d9c"}


def summarise(tickets: Sequence[Ticket], folder: Folder) -> None:
    """Prints the table of each stage, and writes `accuracy.png` into the run folder."""
    console = Console()
    for stage in dict.fromkeys(ticket.stage for ticket in tickets):
        console.print(level_table([t for t in tickets if t.stage == stage], stage))
    folder.write("accuracy.png", accuracy_plot(tickets))
    console.print(f"{folder}/accuracy.png", highlight=False, soft_wrap=True)


def level_table(tickets: Sequence[Ticket], stage: str) -> Table:
    """A row a level: density, accuracy of the ticket and of each control, images/s."""
    controls = list(dict.fromkeys(t.method for t in tickets if t.control))
    table = Table("level", "density", "ticket accuracy", title=f"{stage}: test accuracy")
    for control in controls:
        table.add_column(f"{control} accuracy")
    table.add_column("images/s")
    for column in table.columns:
        column.justify = "right"
    beside = {(t.parent, t.method): t for t in tickets if t.control}
    for ticket in sorted((t for t in tickets if not t.control), key=lambda t: t.level):
        others = [beside.get((ticket.id, control)) for control in controls]
        table.add_row(
            str(ticket.level),
            f"{ticket.density:.2%}",
            *("-" if t is None else f"{accuracy(t):.4f}" for t in (ticket, *others)),
            f"{ticket.timing['images_per_second']:,.0f}",
        )
    return table


def accuracy(ticket: Ticket) -> float:
    """The test accuracy at the end of the ticket's training."""
    return float(ticket.metrics["test"]["accuracy"])


def accuracy_plot(tickets: Sequence[Ticket]) -> bytes:
    """Test accuracy against density, a line a stage and method, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    stages = list(dict.fromkeys(t.stage for t in tickets))
    for stage in stages:
        in_stage = [t for t in tickets if t.stage == stage]
        for method in dict.fromkeys(t.method for t in in_stage):
            line = sorted((t for t in in_stage if t.method == method), key=lambda t: -t.density)
            label = {"imp": "winning tickets", "random": "random masks"}.get(method, method)
            axes.plot(
                [t.density for t in line],
                [accuracy(t) for t in line],
                marker="s" if line[0].control else "o",
                markersize=4,
                color=_COLOURS.get(method),
                label=label if len(stages) == 1 else f"{stage}: {label}",
            )
        dense = [t for t in in_stage if t.density == 1.0 and not t.control]
        if dense:
            axes.axhline(accuracy(dense[0]), color="0.6", linewidth=1, linestyle="--", zorder=0)
    axes.set_xscale("log")
    axes.invert_xaxis()
    ticks = sorted({t.density for t in tickets}, reverse=True)
    axes.set_xticks(ticks[:: -(-len(ticks) // 7)])
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:.3g} %"))
    axes.set_xlabel("density: weights kept")
    axes.set_ylabel("test accuracy")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()
