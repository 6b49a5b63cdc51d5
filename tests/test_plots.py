"""The pictures of runs: what is drawn, not how it looks."""

from types import SimpleNamespace
from typing import Any

import pytest

from launch import plots


def tickets(num_stages: int) -> list[Any]:
    """Of each stage a ticket and two controls, at two densities."""
    return [
        SimpleNamespace(
            stage=f"stage-{stage}",
            method=method,
            control=method != "snip",
            density=density,
            accuracy=0.9,
        )
        for stage in range(num_stages)
        for method in ("snip", "random", "budget")
        for density in (0.5, 0.1)
    ]


@pytest.mark.parametrize("num_stages", [1, 2, 9])
def test_no_two_lines_look_alike(num_stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of one stage nor of more stages than there are colours."""
    drawn: list[Any] = []

    def finished(figure: Any, axes: Any) -> bytes:
        drawn.extend(axes.lines)
        return b""

    monkeypatch.setattr(plots, "_finished", finished)
    plots.accuracy_plot(tickets(num_stages))
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in drawn}
    assert len(looks) == len(drawn) == 3 * num_stages
