"""The report as a page: its numbers are those of the tickets, and a browser shows and moves it."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from browser import browser, needs_browser, requests
from family import DEEPER
from PIL import Image
from processes import tombola
from tiny import TOML, write_config
from waiting import wait_for

from launch.cli import run_command
from launch.page.accuracy import accuracy_figure, growth_figure
from launch.page.figure import COLOURS, thinned
from launch.page.lineage import Rail, _placed
from launch.page.training import _SCALE
from pruning.tickets import Ticket, find_ticket

CONFIG = TOML.replace("3ep", "2ep").replace("cifar_resnet8", "cifar_resnet14")
STABLE = """
[[stages]]
name = "stable"
recipe = "connectivity"
ticket = "imp"
levels = [2]
points = 3
"""
ALL = ("early/seed-3", "early/seed-4", "late")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one configuration and one of another, and the page about them."""
    folder = tmp_path_factory.mktemp("page")
    path, place = write_config(folder, CONFIG + DEEPER), ("--root", str(folder))
    late = ("--name", "late", "--stages.imp.rewind", "8it")
    assert tombola("run", path, *place, "--name", "early", "--seeds", "3", "4") == [0]
    assert tombola("run", write_config(folder, CONFIG + DEEPER + STABLE), *place, *late) == [0]
    page, numbers = str(folder / "report.html"), str(folder / "csv")
    words = ["report", "early", "late", "-o", page, "--csv", numbers, "--root", str(folder)]
    assert run_command(words) == 0
    return folder


def rows(root: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((root / "csv" / f"{name}.csv").read_text())))


def data_of(root: Path, name: str) -> Any:
    """What the page draws a figure from."""
    pattern = rf'<script type="application/json" id="{name}-data">(.*?)</script>'
    found = re.search(pattern, (root / "report.html").read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def tickets(root: Path) -> dict[str, Ticket]:
    return {
        f"{run}/{path.parent.relative_to(root / run)}": find_ticket(str(path.parent))
        for run in ALL
        for path in sorted((root / run).glob("*/*/ticket.json"))
    }


# Numbers ---------------------------------------------------------------------------------


def test_every_ticket_is_in_the_table_with_its_numbers(root: Path) -> None:
    found = {f"{row['run']}/{row['ticket']}": row for row in rows(root, "tickets")}
    expected = tickets(root)
    assert set(found) == set(expected)
    for name, ticket in expected.items():
        row = found[name]
        assert row["id"] == ticket.id
        assert float(row["density"]) == ticket.density
        assert float(row["accuracy"]) == ticket.metrics["test"]["accuracy"]
        assert int(row["steps"]) == ticket.total_steps
        assert 0 < int(row["sparse_flops"]) <= int(row["flops"])
        assert int(row["kept_parameters"]) == int(row["parameters"]) - sum(
            layer.size - layer.kept for layer in ticket.masks.table()
        )


def test_accuracy_is_drawn_over_the_seeds(root: Path) -> None:
    """A line is the mean of the seeds, its band from the lowest to the highest."""
    every = tickets(root)
    reached = [every[f"early/seed-{s}/imp/level-01"].metrics["test"]["accuracy"] for s in (3, 4)]
    (view,) = data_of(root, "accuracy")["views"]
    label = "imp (rewind 5it)"
    named = [trace for trace in view["data"] if trace["name"] == label]
    band, single, mean = sorted(named, key=lambda trace: trace["mode"] != "lines")
    if mean["mode"] == "markers":
        single, mean = mean, single
    assert mean["y"][1] == pytest.approx(sum(reached) / 2)
    assert sorted(single["y"][2:4]) == sorted(reached)
    size = len(mean["x"])
    assert (band["y"][1], band["y"][-2]) == (max(reached), min(reached))
    assert len(band["x"]) == 2 * size
    alone = [trace for trace in view["data"] if trace["name"] == "imp (rewind 8it)"]
    assert [trace["mode"] for trace in alone] == ["lines+markers"]
    assert len(rows(root, "accuracy")) == sum(t.stage != "stable" for t in every.values())


def test_the_heat_map_holds_the_density_of_each_layer(root: Path) -> None:
    ticket = tickets(root)["late/imp/level-02"]
    view = next(v for v in data_of(root, "layers")["views"] if v["name"] == "late/imp")
    (trace,) = view["data"]
    assert trace["y"] == [row.name.removesuffix(".weight") for row in ticket.masks.table()]
    for layer, row in enumerate(ticket.masks.table()):
        assert 10 ** trace["z"][layer][2] == pytest.approx(row.density)
        assert trace["text"][layer][2].endswith(f"{row.kept:,} of {row.size:,}")


def test_hours_are_those_of_the_journals(root: Path) -> None:
    """Steps times images, by the rate: of each interval between two records."""
    lines = (root / "late/metrics.jsonl").read_text().splitlines()
    records = [r for r in map(json.loads, lines) if r["event"] == "train"]
    seconds = 0.0
    for record, before in zip(records, [None, *records], strict=False):
        is_first = before is None or before["level"] != record["level"]
        steps = 5 if before is None or is_first else record["step"] - before["step"]
        seconds += steps * 96 / record["timing"]["images_per_second"]
    last = [row for row in rows(root, "throughput") if row["run"] == "late"][-1]
    assert float(last["hours"]) == pytest.approx(seconds / 3600)


def test_what_differs_is_a_table(root: Path) -> None:
    page = (root / "report.html").read_text()
    assert re.search(
        r"<code>stages.imp.rewind</code></td><td class=\"text\">5it</td><td class=\"text\">8it",
        page,
    )


def test_figures_are_valid(root: Path) -> None:
    """As plotly's own schema has it, which refuses what plotly.js would ignore."""
    from plotly.graph_objects import Figure

    for name in ("accuracy", "layers", "curves", "throughput", "lines"):
        for view in data_of(root, name)["views"]:
            Figure({"data": view["data"], "layout": view["layout"]})


def test_colours_are_seen_on_white_and_on_black() -> None:
    """At least 3 to 1, what WCAG 2 asks of graphical objects."""

    def luminance(colour: tuple[float, ...]) -> float:
        parts = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in colour]
        return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), parts, strict=True))

    named = [tuple(int(c[at : at + 2], 16) for at in (1, 3, 5)) for c in COLOURS]
    for colour in [*named, *_SCALE]:
        one = luminance(tuple(value / 255 for value in colour))
        black = luminance((0x15 / 255, 0x18 / 255, 0x1D / 255))
        assert min(1.05 / (one + 0.05), (one + 0.05) / (black + 0.05)) > 3


def test_a_curve_is_thinned_evenly() -> None:
    points = [(float(step), 0.0) for step in range(1001)]
    assert thinned(points, 11) == [(float(step), 0.0) for step in range(0, 1001, 100)]
    assert thinned(points[:5], 11) == points[:5]


def test_the_lines_of_descent() -> None:
    """A thread straight down, a control and a ticket of another stage to its right."""

    def one(name: str, parent: str | None, stage: str = "imp", control: bool = False) -> Any:
        return SimpleNamespace(id=name, parent=parent, stage=stage, control=control)

    found = _placed(
        [
            one("0", None),
            one("1", "0"),
            one("1r", "1", control=True),
            one("wide", "0", stage="wide"),
            one("wide-r", "wide", stage="wide", control=True),
            one("stranger", "of another run"),
        ]
    )
    assert [(ticket.id, rail) for ticket, rail in found] == [
        ("0", Rail(0, (), joins=False, branches=False, goes_on=True, opens=True)),
        ("wide", Rail(1, (0,), joins=False, branches=True, goes_on=False, opens=True)),
        ("wide-r", Rail(2, (0,), joins=False, branches=True, goes_on=False, opens=False)),
        ("1", Rail(0, (), joins=True, branches=False, goes_on=False, opens=True)),
        ("1r", Rail(1, (), joins=False, branches=True, goes_on=False, opens=False)),
        ("stranger", Rail(0, (), joins=False, branches=False, goes_on=False, opens=False)),
    ]


def test_networks_that_grew_are_drawn_by_their_depth() -> None:
    """Not by density, which stays; the random control is named by what is random in it."""

    def grown(method: str, level: int, accuracy: float) -> Any:
        about = {"stage": "growth", "density": 0.1, "metrics": {}, "place": f"{method}-{level}"}
        return SimpleNamespace(
            **about, method=method, control=method != "growth", level=level, accuracy=accuracy
        )

    shown = [grown("growth", level, 0.9 + level / 100) for level in (1, 0, 2)]
    shown += [grown("random", level, 0.8) for level in (1, 2)]
    run: Any = SimpleNamespace(
        variant="", name="grown", seed=0, shown=shown, anchor=lambda ticket: ticket.place
    )
    figure = growth_figure([run])
    assert accuracy_figure([run]) is None
    assert figure is not None
    found = {trace["name"]: trace for trace in figure.views[0].traces}
    assert found["growth"]["x"] == [0, 1, 2]
    assert found["growth"]["y"] == pytest.approx([0.9, 0.91, 0.92])
    assert found["growth: random insertions"]["customdata"] == ["random-1", "random-2"]
    assert figure.csv.splitlines()[0].startswith("configuration,stage,method,control,level")
    assert len(figure.rows) == 5


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["early", "-o", "report.pdf"], "-o report.pdf: must end in .html"),
        (["early", "--csv", "numbers"], "--csv: goes with -o FILE"),
        (["early", "--compare", "-o", "a.html"], "--compare and -o: choose one"),
        (["-o", "a.html"], "name a run: tombola report runs/digits-imp -o report.html"),
        (["erly", "-o", "a.html"], "no run of that name under"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], line: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["report", *words, "--root", str(root)]) == 2
    told = capsys.readouterr().err
    assert line in told
    assert told.count("\n") == 1


def test_what_somebody_wrote_is_text(root: Path, tmp_path: Path) -> None:
    """A host, a command or a metric that looks like HTML runs nothing."""
    bad = "</script><script>document.title='taken'</script>"
    run = tmp_path / "late"
    run.mkdir()
    for name in ("config.toml", "data.json"):
        (run / name).write_bytes((root / "late" / name).read_bytes())
    environment = json.loads((root / "late/environment.json").read_text())
    environment[0]["hardware"]["host"] = environment[0]["command"] = bad
    (run / "environment.json").write_text(json.dumps(environment))
    fact = {"event": "train", "stage": bad, "level": bad, "step": 1, "loss": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(fact) + "\n")
    assert run_command(["report", str(run), "-o", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "taken" in page
    assert bad not in page


def test_a_page_goes_to_an_object_store(root: Path) -> None:
    words = ["report", "late", "--root", str(root)]
    assert run_command([*words, "-o", "memory://pages/late.html"]) == 0
    from data.files import Folder

    assert Folder("memory://pages").read("late.html").startswith(b"<!DOCTYPE html>")


# In a browser ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def open_page(root: Path) -> Iterator[Callable[..., Any]]:
    """Opens the page anew, and waits until its figures are drawn."""
    with browser(root) as driver:

        def opened(anchor: str = "") -> Any:
            driver.get("about:blank")
            driver.get_log("browser"), requests(driver)
            driver.get(f"{(root / 'report.html').as_uri()}{anchor}")
            wait_for(lambda: driver.execute_script("return document.documentElement.dataset.ready"))
            return driver

        yield opened


_SHIFT = """
const done = arguments[0];
let sum = 0;
new PerformanceObserver((list) => list.getEntries().forEach((one) => { sum += one.value; }))
  .observe({ type: "layout-shift", buffered: true });
setTimeout(() => done(sum), 300);
"""
_PLACE = """
const plot = document.getElementById(arguments[0]), trace = plot.data[arguments[1]];
plot.scrollIntoView({ block: "center" });
const { xaxis, yaxis } = plot._fullLayout, box = plot.getBoundingClientRect();
return [
  box.left + xaxis._offset + xaxis.d2p(trace.x[arguments[2]]),
  box.top + yaxis._offset + yaxis.d2p(trace.y[arguments[2]]),
];
"""


@needs_browser
def test_the_page_loads_quietly(open_page: Callable[..., Any], root: Path) -> None:
    """Without a word on the console or a request, and nothing moves after it is laid out."""
    driver = open_page()
    assert driver.get_log("browser") == []
    assert requests(driver) == [(root / "report.html").as_uri()]
    assert driver.execute_async_script(_SHIFT) == 0


@needs_browser
def test_hovering_shows_the_value(open_page: Callable[..., Any], root: Path) -> None:
    driver = open_page()
    (view,) = data_of(root, "accuracy")["views"]
    number, trace = next((n, t) for n, t in enumerate(view["data"]) if t["mode"] == "lines+markers")
    x, y = driver.execute_script(_PLACE, "accuracy-plot", number, 1)
    for at in (x - 20, x):  # a mouse comes from somewhere
        where = {"type": "mouseMoved", "x": at, "y": y}
        driver.execute_cdp_cmd("Input.dispatchMouseEvent", where)
    shown = wait_for(lambda: text_of(driver, "#accuracy-plot .hoverlayer"))
    assert f"{trace['y'][1]:.4f}" in shown
    assert trace["name"] in shown


def text_of(driver: Any, selector: str) -> str:
    return str(
        driver.execute_script("return document.querySelector(arguments[0])?.textContent", selector)
    )


@needs_browser
def test_the_keyboard_reaches_every_value(open_page: Callable[..., Any], root: Path) -> None:
    """Arrows show and say values, Enter leads to the ticket, + and 0 change the axes and back."""
    from selenium.webdriver.common.keys import Keys

    driver = open_page()
    plot = driver.find_element("id", "accuracy-plot")
    (view,) = data_of(root, "accuracy")["views"]
    first = next(trace for trace in view["data"] if trace.get("hoverinfo") != "skip")
    plot.send_keys(Keys.ARROW_RIGHT)
    assert wait_for(lambda: text_of(driver, "#accuracy-said"))
    assert f"{first['y'][0]:.4f}" in text_of(driver, "#accuracy-said")
    width = "const [a, b] = document.getElementById('accuracy-plot')._fullLayout.yaxis.range;"
    width += "return b - a"
    before = driver.execute_script(width)
    plot.send_keys("+")
    wait_for(lambda: driver.execute_script(width) == pytest.approx(0.8 * before))
    plot.send_keys("0")
    wait_for(lambda: driver.execute_script(width) == pytest.approx(before))
    plot.send_keys(Keys.ARROW_RIGHT, Keys.ENTER)
    wait_for(lambda: driver.execute_script("return location.hash") == f"#{first['customdata'][0]}")
    layers = driver.find_element("id", "layers-plot")
    layers.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    wait_for(lambda: "level 0" in text_of(driver, "#layers-said"))


_INSIDE = """
const box = document.querySelector(":target").getBoundingClientRect();
return box.top > 0 && box.bottom < innerHeight;
"""


@needs_browser
def test_lineage_links_lead_to_the_parent(open_page: Callable[..., Any], root: Path) -> None:
    driver = open_page()
    for row in driver.find_elements("css selector", ".lineage tr[id$='deeper-level-02']"):
        row.find_element("css selector", "a[data-parent]").click()
        target = wait_for(
            lambda: driver.execute_script("return document.querySelector(':target')?.id")
        )
        assert target == row.get_attribute("id").replace("deeper", "imp")
        wait_for(lambda: driver.execute_script(_INSIDE))
    links = driver.find_elements("css selector", "a[href^='#']")
    ids = driver.execute_script(
        "return [...document.querySelectorAll('[id]')].map((one) => one.id)"
    )
    assert len(ids) == len(set(ids))
    assert {link.get_attribute("href").partition("#")[2] for link in links} <= set(ids)


@needs_browser
def test_a_link_opens_what_is_closed(open_page: Callable[..., Any]) -> None:
    driver = open_page()
    close = "const d = document.querySelector('#ticket-late-imp-level-01').closest('details');"
    driver.execute_script(f"{close} d.open = false")
    driver.execute_script("location.hash = 'ticket-late-imp-level-01'")
    wait_for(lambda: driver.execute_script(f"{close} return d.open"))


@needs_browser
def test_figures_are_saved(open_page: Callable[..., Any], root: Path) -> None:
    """As CSV the same as the command writes, as PNG in full size, as SVG with its words."""
    driver = open_page()
    for element in driver.find_elements("css selector", "button[data-save='csv']"):
        driver.execute_script("arguments[0].click()", element)
        name = f"{element.get_attribute('data-figure').removesuffix('-table')}.csv"
        wait_for((root / name).exists)
        wait_for(lambda n=name: (root / n).read_text() == (root / "csv" / n).read_text())  # type: ignore[misc]
    for kind in ("png", "svg"):
        button = f"button[data-save='{kind}'][data-figure='lines']"
        driver.execute_script("document.querySelector(arguments[0]).click()", button)
        wait_for((root / f"lines.{kind}").exists)
    with Image.open(root / "lines.png") as picture:
        assert picture.size == (2000, 840)
    words = "".join(ElementTree.parse(root / "lines.svg").getroot().itertext())
    assert "from the first network (0) to the second (1)" in words


@needs_browser
def test_another_view_is_chosen(open_page: Callable[..., Any], root: Path) -> None:
    from selenium.webdriver.support.select import Select

    driver = open_page()
    Select(
        driver.find_element("css selector", "select[data-view='layers']")
    ).select_by_visible_text("late/deeper")
    names = "return document.getElementById('layers-plot').data[0].y.length"
    view = next(v for v in data_of(root, "layers")["views"] if v["name"] == "late/deeper")
    wait_for(lambda: driver.execute_script(names) == len(view["data"][0]["y"]))


_INK = """
const number = (c) => c.match(/[\\d.]+/g).slice(0, 3).map(Number);
const plot = document.querySelector("#accuracy-plot .xtick text");
return [getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor,
        getComputedStyle(plot).fill].map(number);
"""


@needs_browser
@pytest.mark.parametrize(("dark", "width"), [(True, 1280), (False, 400)])
def test_it_can_be_read_in_the_dark_and_on_a_phone(
    dark: bool, width: int, root: Path, tmp_path: Path
) -> None:
    """The theme is the system's until another is chosen, and nothing is wider than the screen."""
    with browser(tmp_path, dark=dark, width=width) as driver:
        driver.get((root / "report.html").as_uri())
        wait_for(lambda: driver.execute_script("return document.documentElement.dataset.ready"))
        text, page, ticks = map(sum, driver.execute_script(_INK))
        assert (min(text, ticks) > page) == dark
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        assert driver.execute_async_script(_SHIFT) == 0
        driver.find_element("id", "theme").click()
        wait_for(
            lambda: (
                (sum(driver.execute_script(_INK)[2]) > sum(driver.execute_script(_INK)[1])) != dark
            )
        )
        assert driver.get_log("browser") == []
