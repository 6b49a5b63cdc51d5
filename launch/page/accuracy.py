"""Accuracy against density, over the seeds; of networks that grew, against depth."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from launch.legends import method_name
from launch.page.figure import (
    COLOURS,
    DASHES,
    SYMBOLS,
    Cell,
    Figure,
    Trace,
    View,
    density_axis,
    pick,
    translucent,
)
from launch.page.results import Results
from launch.tables import grew
from pruning.tickets import Ticket

_COLUMNS = ("configuration", "stage", "method", "control", "level", "run", "seed", "density")


class _Line(NamedTuple):
    """A method of a stage: all runs of one configuration together."""

    variant: str
    stage: str
    method: str
    control: bool
    grown: bool

    @property
    def label(self) -> str:
        method = method_name(self.method, grown=self.grown)
        name = f"{self.stage}: {method}" if self.control else self.stage
        return f"{name} ({self.variant})" if self.variant else name


class _Point(NamedTuple):
    run: Results
    ticket: Ticket


_Lines = dict[_Line, dict[int, list[_Point]]]


def accuracy_figure(runs: Sequence[Results]) -> Figure | None:
    """Test accuracy against density: the mean over the seeds, from the lowest to the highest."""
    lines = _lines(runs, grown=False)
    if not lines:
        return None
    found = [points for levels in lines.values() for points in levels.values()]
    every = [point.ticket.density for points in found for point in points]
    layout = {
        "xaxis": density_axis(every),
        "yaxis": {"title": {"text": "test accuracy"}},
        "hovermode": "closest",
    }
    return Figure(
        id="accuracy",
        title="Accuracy against density",
        caption=(
            "Test accuracy at the end of each level's training. A line is the mean over the "
            "seeds, its band from the lowest to the highest of them, small points the single runs. "
            "A click on a point leads to its ticket; a click in the legend hides a line."
        ),
        views=[View("", _traces(lines, _density), layout)],
        columns=(*_COLUMNS, "test accuracy"),
        rows=_rows(lines),
    )


def growth_figure(runs: Sequence[Results]) -> Figure | None:
    """Test accuracy against the number of growths."""
    lines = _lines(runs, grown=True)
    if not lines:
        return None
    layout = {
        "xaxis": {"title": {"text": "growths: blocks added"}, "dtick": 1},
        "yaxis": {"title": {"text": "test accuracy"}},
        "hovermode": "closest",
    }
    return Figure(
        id="growth",
        title="Accuracy against depth",
        caption="Test accuracy after each growth: mean and range over the seeds.",
        views=[View("", _traces(lines, _level), layout)],
        columns=(*_COLUMNS, "test accuracy"),
        rows=_rows(lines),
    )


def _lines(runs: Sequence[Results], *, grown: bool) -> _Lines:
    lines: _Lines = defaultdict(lambda: defaultdict(list))
    for run in runs:
        stages = {ticket.stage for ticket in run.shown}
        here = {stage for stage in stages if grew(run.shown, stage) == grown}
        for ticket in run.shown:
            if ticket.stage in here:
                key = _Line(run.variant, ticket.stage, ticket.method, ticket.control, grown)
                lines[key][ticket.level].append(_Point(run, ticket))
    return lines


def _density(found: Sequence[_Point]) -> float:
    return statistics.mean(point.ticket.density for point in found)


def _level(found: Sequence[_Point]) -> float:
    return float(found[0].ticket.level)


def _traces(lines: _Lines, place: Any) -> list[Trace]:
    """Of each line its band, its single runs and its mean; those of one stage share a colour."""
    stages = list(dict.fromkeys((line.variant, line.stage) for line in lines))
    alone = len(stages) == 1
    traces: list[Trace] = []
    for number, (line, levels) in enumerate(lines.items()):
        beside = [one for one in lines if (one.variant, one.stage) == (line.variant, line.stage)]
        stage, rank = stages.index((line.variant, line.stage)), beside.index(line)
        colour = pick(COLOURS, number if alone else stage)
        look = {
            "color": colour,
            "dash": pick(DASHES, 0 if alone else rank),
            "symbol": pick(SYMBOLS, rank if alone else rank + stage // len(COLOURS)),
        }
        found = [levels[level] for level in sorted(levels)]
        if all(len(points) == 1 for points in found):
            traces.append(_mean(line, found, place, look))
        else:
            traces += [_band(line, found, place, colour), _single(line, found, place, look)]
            traces.append(_mean(line, found, place, look))
    return traces


def _mean(line: _Line, found: Sequence[list[_Point]], place: Any, look: dict[str, str]) -> Trace:
    reached = [[point.ticket.accuracy for point in points] for points in found]
    hover = [
        f"level {points[0].ticket.level}, density {100 * _density(points):.3g} %<br>"
        f"accuracy {statistics.mean(values):.4f}"
        + (f" ({min(values):.4f} to {max(values):.4f}, {len(values)} runs)" if values[1:] else "")
        for points, values in zip(found, reached, strict=True)
    ]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": line.label,
        "legendgroup": line.label,
        "x": list(map(place, found)),
        "y": list(map(statistics.mean, reached)),
        "line": {"color": look["color"], "dash": look["dash"], "width": 2},
        "marker": {"symbol": look["symbol"], "size": 8},
        "text": hover,
        "hovertemplate": "%{text}<extra>%{fullData.name}</extra>",
        "customdata": [points[0].run.anchor(points[0].ticket) for points in found],
    }


def _single(line: _Line, found: Sequence[list[_Point]], place: Any, look: dict[str, str]) -> Trace:
    points = [(place(level), point) for level in found for point in level]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": line.label,
        "legendgroup": line.label,
        "showlegend": False,
        "x": [x for x, _ in points],
        "y": [point.ticket.accuracy for _, point in points],
        "marker": {"color": look["color"], "symbol": look["symbol"], "size": 4, "opacity": 0.6},
        "text": [f"{p.run.name}/{p.ticket.place}" for _, p in points],
        "hovertemplate": "%{text}<br>accuracy %{y:.4f}<extra></extra>",
        "customdata": [p.run.anchor(p.ticket) for _, p in points],
    }


def _band(line: _Line, found: Sequence[list[_Point]], place: Any, colour: str) -> Trace:
    """From the lowest to the highest, and back."""
    xs = list(map(place, found))
    reached = [[point.ticket.accuracy for point in points] for points in found]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": line.label,
        "legendgroup": line.label,
        "showlegend": False,
        "x": [*xs, *reversed(xs)],
        "y": [*map(max, reached), *reversed([*map(min, reached)])],
        "line": {"width": 0},
        "fill": "toself",
        "fillcolor": translucent(colour, 0.18),
        "hoverinfo": "skip",
    }


def _rows(lines: _Lines) -> list[list[Cell]]:
    rows: list[list[Cell]] = []
    for line, levels in lines.items():
        for level in sorted(levels):
            for run, ticket in levels[level]:
                reached: list[Cell] = [run.name, run.seed, ticket.density, ticket.accuracy]
                rows.append([*line[:3], int(line.control), level, *reached])
    return rows
