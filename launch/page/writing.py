"""The page itself: everything that it needs is in one file."""

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata, resources
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from data.files import Folder
from launch.comparison import Run, comparison
from launch.page.accuracy import accuracy_figure, growth_figure
from launch.page.layers import layers_figure
from launch.page.lineage import lineages
from launch.page.lines import lines_figure
from launch.page.results import read_results
from launch.page.tables import (
    attempt_lines,
    configuration,
    differences,
    kind_of_devices,
    methods_csv,
    run_lines,
    tickets_csv,
)
from launch.page.training import curves_figure, throughput_figure
from launch.variants import variants

_FIGURES = (
    accuracy_figure,
    growth_figure,
    layers_figure,
    curves_figure,
    throughput_figure,
    lines_figure,
)


class Report:
    """The page about some runs, and its numbers as files."""

    def __init__(self, folders: Sequence[Folder], title: str) -> None:
        """Reads the runs. Raises `UserError` or `RunError` where something of them is damaged."""
        self._title = title
        self._variants = variants(folders)
        self._runs = read_results(self._variants)
        self._figures = [f for make in _FIGURES if (f := make(self._runs)) is not None]
        self._comparison = comparison(
            [Run(run.tickets, run.variant, run.num_devices) for run in self._runs]
        )
        self._lineages = lineages(self._runs)
        self._sheets = {
            "methods": methods_csv(self._comparison),
            "tickets": tickets_csv(self._lineages),
        }

    def tables(self) -> dict[str, str]:
        """The numbers of each figure and table as CSV, by the name of its file."""
        found = {figure.id: figure.csv for figure in self._figures} | self._sheets
        return {f"{name}.csv": text for name, text in found.items()}

    def html(self) -> str:
        """The page."""
        documents: dict[str, Any] = {figure.id: figure.spec() for figure in self._figures}
        documents |= {f"{name}-table": {"csv": text} for name, text in self._sheets.items()}
        return _template().render(
            title=self._title,
            version=metadata.version("tombola"),
            written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            css=Markup(_asset("report.css")),
            js=Markup(_asset("report.js")),
            plotly=Markup(get_plotlyjs()),
            documents={name: Markup(_script(one)) for name, one in documents.items()},
            variants=self._variants,
            runs=run_lines(self._runs),
            devices=kind_of_devices(self._runs),
            figures=self._figures,
            comparison=self._comparison,
            lineages=self._lineages,
            differences=differences(self._variants) if len(self._variants) > 1 else [],
        )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    filters: dict[str, Callable[..., object]] = {
        "percent": lambda value: f"{100 * value:.3g} %",
        "count": lambda value: f"{value:,.0f}",
        "si": _si,
        "hours": lambda value: "-" if value is None else f"{value:.3g}",
        "capitalize_first": lambda text: text[:1].upper() + text[1:],
        "configuration": configuration,
        "attempts": attempt_lines,
    }
    environment.filters |= filters
    return environment.from_string(_asset("report.html.j2"))


def _si(value: float) -> str:
    """Three digits and a decimal prefix: `1.53 M`."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 999.5 or prefix == "T":
            break
        value /= 1000
    return f"{value:.3g} {prefix}"


def _asset(name: str) -> str:
    return (resources.files("launch.page") / "templates" / name).read_text()


def _script(document: Any) -> str:
    """JSON that cannot end the element of the page which holds it."""
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
