"""A figure of the page: what is drawn of it, and the same as numbers.

Traces and layouts are those of plotly.js, as JSON. Colours and lines are chosen so that they can be
told apart on white and on black; what depends on the theme is put in by the page.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle, islice
from typing import Any, TypeVar

from launch.legends import density_ticks

COLOURS = (
    "#3b7dd8",
    "#d3541c",
    "#2b9160",
    "#9a5fd0",
    "#a8730e",
    "#d63f6b",
    "#0f8f9e",
    "#7a7f87",
)
"""with a contrast of at least 3.8 to white and to the page's black"""
DASHES = ("solid", "dot", "dash", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x")
HEIGHT = 420

Trace = dict[str, Any]
Cell = str | int | float | None
P = TypeVar("P")


@dataclass(frozen=True)
class View:
    """One picture: a figure of several lets the reader choose."""

    name: str
    traces: Sequence[Trace]
    layout: dict[str, Any] = field(default_factory=dict)
    height: int = HEIGHT
    """pixels"""


@dataclass(frozen=True)
class Figure:
    """A figure of at least one view; all of its numbers are its rows."""

    id: str
    """names its files, and its place in the page"""
    title: str
    caption: str
    views: Sequence[View]
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    @cached_property
    def csv(self) -> str:
        """The numbers as a file."""
        return as_csv(self.columns, self.rows)

    def spec(self) -> dict[str, Any]:
        """What the page draws from."""
        views = [
            {"name": v.name, "data": v.traces, "layout": v.layout, "height": v.height}
            for v in self.views
        ]
        return {"views": views, "csv": self.csv}


def as_csv(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table as the text of a file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def pick(options: Sequence[str], number: int) -> str:
    """One of the options, from the beginning again where they end."""
    return next(islice(cycle(options), number, None))


def translucent(colour: str, opacity: float) -> str:
    """A colour `#rrggbb` through which others are seen."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def density_axis(densities: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis of densities, the dense network on the left."""
    ticks = density_ticks(densities)
    return {
        "title": {"text": "density: weights kept"},
        "type": "log",
        "autorange": "reversed",
        "tickmode": "array",
        "tickvals": ticks,
        "ticktext": [f"{100 * value:.3g} %" for value in ticks],
    }


def thinned(points: Sequence[P], most: int) -> list[P]:
    """Evenly chosen points of a curve where there are more than `most`, the last one included."""
    if len(points) <= most:
        return list(points)
    step = (len(points) - 1) / (most - 1)
    return [points[round(number * step)] for number in range(most)]
