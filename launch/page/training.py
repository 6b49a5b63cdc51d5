"""How training went: loss and accuracy of each level, and images per second over the run."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from launch.page.figure import COLOURS, DASHES, Cell, Figure, Trace, View, pick, thinned
from launch.page.results import Results

_MOST_POINTS = 300
"""of a curve; what the journals have beyond them is not drawn"""
_THINNED = f"Of a curve at most {_MOST_POINTS} points are shown; metrics.jsonl has all."
_HEIGHT = 560
_LEVEL = re.compile(r"level-\d+")
_SCALE = (
    (138, 86, 201),
    (59, 125, 216),
    (15, 143, 158),
    (80, 150, 43),
    (176, 126, 14),
    (211, 84, 28),
)
"""from violet to red, as light everywhere: to be seen on white and on black"""
_NAME = "<extra>%{fullData.name}</extra>"
_RATE = f"%{{y:,.0f}} images/s at %{{x:.3g}}{_NAME}"
_WAIT = f"%{{y:.1%}} waiting at %{{x:.3g}}{_NAME}"
Record = dict[str, Any]
Points = list[tuple[float, float]]


def curves_figure(runs: Sequence[Results]) -> Figure | None:
    """Training loss above, accuracy below, by step; a colour a level, a view a stage of a run."""
    views, rows = [], list[list[Cell]]()
    for run in runs:
        records = [record for found in run.journals.values() for record in found]
        for stage in dict.fromkeys(str(r["stage"]) for r in records if "stage" in r):
            here = [r for r in records if r.get("stage") == stage]
            curves = {**_curves(here, "train", "loss"), **_curves(here, "evaluation", "accuracy")}
            if not curves:
                continue
            name = f"{run.name}/{stage}" if len(runs) > 1 else stage
            loss = {"title": {"text": "training loss"}, "type": "log", "tickformat": "~g"}
            layout = _two_rows(loss, {"title": {"text": "accuracy"}}, along="step")
            views.append(View(name, _levels(curves), layout, _HEIGHT))
            rows += [
                [run.name, stage, level, what, step, value]
                for (level, what), points in curves.items()
                for step, value in points
            ]
    if not views:
        return None
    return Figure(
        id="curves",
        title="Training",
        caption=(
            "The loss of single batches, and the accuracy on held-out and on test images (dotted). "
            "A colour is a level; controls are paler. "
            f"{_THINNED}"
        ),
        views=views,
        columns=("run", "stage", "level", "what", "step", "value"),
        rows=rows,
    )


def _curves(records: Iterable[Record], event: str, value: str) -> dict[tuple[str, str], Points]:
    """The points of each level: its loss, or its accuracy on each split."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for record in records:
        if record.get("event") == event and record.get(value) is not None:
            what = str(record.get("split", value))
            points = found.setdefault((str(record["level"]), what), {})
            points[int(record["step"])] = record[value]
    return {key: thinned(sorted(points.items()), _MOST_POINTS) for key, points in found.items()}


def _levels(curves: dict[tuple[str, str], Points]) -> list[Trace]:
    levels = sorted({_rank(level) for level, _ in curves})
    seen: set[str] = set()
    traces = []
    for (level, what), points in sorted(curves.items()):
        is_loss = what == "loss"
        traces.append(
            {
                "type": "scatter",
                "mode": "lines" if len(points) > 1 else "markers",
                "name": level,
                "legendgroup": level,
                "showlegend": level not in seen,
                "x": [step for step, _ in points],
                "y": [value for _, value in points],
                "xaxis": "x" if is_loss else "x2",
                "yaxis": "y" if is_loss else "y2",
                "line": {
                    "color": _between(levels.index(_rank(level)) / max(1, len(levels) - 1)),
                    "dash": "dot" if what == "test" else "solid",
                    "width": 1.5,
                },
                "opacity": 1.0 if _LEVEL.fullmatch(level) else 0.5,
                "hovertemplate": f"step %{{x:,}}<br>{what} %{{y:.4f}}{_NAME}",
            }
        )
        seen.add(level)
    return traces


def _rank(level: str) -> str:
    """What a level and its controls have in common."""
    found = _LEVEL.match(level)
    return found[0] if found else level


def _between(share: float) -> str:
    """A colour of the scale, from its beginning (0) to its end (1)."""
    place = share * (len(_SCALE) - 1)
    low = min(int(place), len(_SCALE) - 2)
    mixed = (
        round(one + (other - one) * (place - low))
        for one, other in zip(_SCALE[low], _SCALE[low + 1], strict=True)
    )
    return f"rgb({','.join(map(str, mixed))})"


def throughput_figure(runs: Sequence[Results]) -> Figure | None:
    """Images per second over the time of training, and the share of it spent waiting."""
    rates, waits, rows = list[Trace](), list[Trace](), list[list[Cell]]()
    found = [
        (run, file, thinned(points, _MOST_POINTS))
        for run in runs
        for file, points in run.rates.items()
        if points
    ]
    if not found:
        return None
    unit, scale = _unit(max(points[-1].hours for _, _, points in found))
    for number, (run, file, points) in enumerate(found):
        name = run.name if len(run.journals) == 1 else f"{run.name} {file}"
        line = {"color": pick(COLOURS, number), "dash": pick(DASHES, number // len(COLOURS))}
        shared: Trace = {"type": "scatter", "mode": "lines", "name": name, "legendgroup": name}
        shared |= {"x": [point.hours * scale for point in points], "line": {**line, "width": 1.5}}
        rates.append({**shared, "y": [p.rate for p in points], "hovertemplate": _RATE})
        below = {"xaxis": "x2", "yaxis": "y2", "showlegend": False, "hovertemplate": _WAIT}
        waits.append({**shared, **below, "y": [point.wait for point in points]})
        rows += [[run.name, file, *point] for point in points]
    layout = _two_rows(
        {"title": {"text": "images/s"}, "rangemode": "tozero"},
        {"title": {"text": "waiting for data"}, "tickformat": ".1%"},
        along=f"{unit} of training",
    )
    return Figure(
        id="throughput",
        title="Throughput",
        caption=(
            "Images per second of all devices together, evaluations and saves left out, and the "
            f"share of the time in which the next batch was waited for. {_THINNED}"
        ),
        views=[View("", [*rates, *waits], layout, _HEIGHT)],
        columns=("run", "journal", "hours", "images per second", "data wait"),
        rows=rows,
    )


def _two_rows(above: dict[str, Any], below: dict[str, Any], *, along: str) -> dict[str, Any]:
    """The layout of two pictures, given by their vertical axes, along one horizontal axis."""
    return {
        "grid": {"rows": 2, "columns": 1, "roworder": "top to bottom"},
        "xaxis": {"matches": "x2", "showticklabels": False},
        "yaxis": above,
        "xaxis2": {"title": {"text": along}, "anchor": "y2"},
        "yaxis2": {**below, "anchor": "x2"},
    }


def _unit(hours: float) -> tuple[str, float]:
    """The unit in which a time is a readable number, and how many of it are an hour."""
    if hours >= 1:
        return "hours", 1.0
    return ("minutes", 60.0) if hours >= 1 / 60 else ("seconds", 3600.0)
