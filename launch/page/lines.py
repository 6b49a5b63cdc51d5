"""The error on the lines between networks."""

from collections.abc import Sequence

from launch.page.figure import COLOURS, DASHES, Cell, Figure, Trace, View, pick
from launch.page.results import Results
from pruning.connectivity import STABLE

_HOVER = "error %{y:.2%} at %{x:.2f}<extra>%{fullData.name}</extra>"


def lines_figure(runs: Sequence[Results]) -> Figure | None:
    """The error on each line that was measured, on training and test images."""
    traces, rows = list[Trace](), list[list[Cell]]()
    for run in runs:
        for result in run.lines:
            place = f"{result.stage}/{result.name}"
            number = len({trace["legendgroup"] for trace in traces})
            for split, curve in result.curves.items():
                steps = len(curve.errors) - 1
                at = [step / steps for step in range(steps + 1)]
                group = f"{run.name}/{place}" if len(runs) > 1 else place
                name = f"{group}, {split}"
                traces.append(
                    {
                        "type": "scatter",
                        "mode": "lines",
                        "name": name,
                        "legendgroup": group,
                        "x": at,
                        "y": list(curve.errors),
                        "line": {
                            "color": pick(COLOURS, number),
                            "dash": "solid" if split == "test" else DASHES[1],
                        },
                        "hovertemplate": _HOVER,
                    }
                )
                rows += [
                    [run.name, place, split, result.density, curve.barrier, x, error]
                    for x, error in zip(at, curve.errors, strict=True)
                ]
    if not traces:
        return None
    layout = {
        "xaxis": {"title": {"text": "from the first network (0) to the second (1)"}},
        "yaxis": {"title": {"text": "error"}, "tickformat": ".1%", "rangemode": "tozero"},
    }
    return Figure(
        id="lines",
        title="Error on lines between networks",
        caption=(
            "The barrier of a line is its highest error less the mean of its ends; below "
            f"{STABLE:.0%} on training and test images the two networks are connected."
        ),
        views=[View("", traces, layout)],
        columns=("run", "place", "split", "density", "barrier", "position", "error"),
        rows=rows,
    )
