"""`tombola report RUN...`: what runs came to, and the error barrier between two of them."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from rich.console import Console
from torch import Tensor

from data.errors import RunError, UserError
from data.files import Folder
from launch.claim import read_run, require_data, stage_names
from launch.config import Stage
from launch.levels import compared, gathered, growth_rows, level_rows
from launch.places import find_runs, find_single, find_tickets
from launch.run import make_engine
from launch.summary import compare_runs, print_comparison, print_tables
from pruning.connectivity import Connectivity, Line, measure
from pruning.store import TicketFolder
from pruning.tickets import INDEX, Ticket, find_ticket
from pruning.trained import trained_weights
from train.engine import Engine
from train.metrics import Recorder
from train.progress import Display
from train.ranks import Ranks
from train.session import Session
from train.signals import Signals


def report_runs(places: Sequence[str], *, compare: bool, root: str, as_json: bool) -> None:
    """Prints the tables of each run: its levels with their controls, and its error barriers.

    Of a run over several seeds, and with `compare` of all runs together, prints one table of what
    the methods reached at the same densities.
    """
    if not places:
        raise UserError("name a run: tombola report runs/digits-imp")
    if os.environ.get("RANK", "0") != "0":
        return  # under torchrun one rank's tables are enough
    console = Console(quiet=as_json)
    if compare:
        documents = [_told_together(console, ", ".join(places), _all_runs(places, root))]
    else:
        documents = [_told(console, place, root) for place in places]
    if as_json:
        print(json.dumps(documents, indent=1))


def report_page(places: Sequence[str], *, output: str, csv: str | None, root: str) -> None:
    """Writes a page about runs, and into the folder `csv` its numbers.

    Raises `UserError` where `output` is no HTML file or nothing of the runs is finished.
    """
    if not places:
        raise UserError("name a run: tombola report runs/digits-imp -o report.html")
    if os.environ.get("RANK", "0") != "0":
        return
    from launch.page.writing import Report  # plotly takes a while to import

    folder, name = Folder(output).parent, output.rpartition("/")[2]
    if not name.endswith((".html", ".htm")):
        raise UserError(f"-o {output}: must end in .html")
    report = Report(_all_runs(places, root), ", ".join(places))
    folder.write(name, report.html().encode())
    for file, content in report.tables().items() if csv is not None else ():
        (Folder(csv or "")).write(file, content.encode())
    Console().print(output, highlight=False, soft_wrap=True)


def _all_runs(places: Sequence[str], root: str) -> list[Folder]:
    """The runs that the places name, several where one holds a sweep; each once."""
    found = [run for place in places for run in find_runs(place, root) or [_run(place, root)]]
    return list({run.location: run for run in found}.values())


def _told(console: Console, place: str, root: str) -> dict[str, Any]:
    """Prints what a place holds, one run or several of one configuration; and gives it."""
    runs = find_runs(place, root)
    if runs:
        return _told_together(console, place, runs)
    folder = _run(place, root)
    tickets, results = gathered(folder, stage_names(folder))
    console.print(f"{folder}\n", highlight=False, soft_wrap=True)
    print_tables(console, tickets, results)
    if not tickets:
        console.print("no finished level yet\n")
    shown = compared(tickets)
    stages = dict.fromkeys(ticket.stage for ticket in shown)
    return {
        "run": str(folder),
        "stages": {stage: level_rows(shown, stage) for stage in stages},
        "growth": {stage: rows for stage in stages if (rows := growth_rows(shown, stage))},
        "connectivity": [_as_json(result) for result in results],
    }


def _told_together(console: Console, title: str, runs: Sequence[Folder]) -> dict[str, Any]:
    rows = compare_runs(runs)
    print_comparison(console, rows, title)
    return {"runs": list(map(str, runs)), "comparison": [row.to_json() for row in rows]}


def _as_json(result: Connectivity) -> dict[str, Any]:
    barriers = {split: curve.barrier for split, curve in result.curves.items()}
    return {**result.to_json(), "barriers": barriers, "connected": result.is_connected}


class _Trained(NamedTuple):
    """A level of a run that is trained."""

    run: Folder
    ticket: Ticket

    def weights(self, ranks: Ranks) -> dict[str, Tensor]:
        return trained_weights(self.ticket, self.run / self.ticket.place, ranks)

    def __str__(self) -> str:
        return f"{self.run}/{self.ticket.place}"


def report_barrier(
    places: Sequence[str],
    *,
    levels: Sequence[int],
    line: Line,
    data_root: str | None,
    root: str,
    as_json: bool,
) -> None:
    """Measures the line between what two levels, or all levels of two runs, were trained to.

    On the data and with the settings of the first run; `data_root` is where these data are now.
    Raises `UserError` where they have no level of the same network in common, or the data are
    others.
    """
    pairs = _pairs(places, levels, root)
    run = pairs[0][0].run
    results: list[Connectivity] = []
    engine: Engine | None = None
    for stage in read_run(run).stages:
        here = [pair for pair in pairs if pair[0].ticket.stage == stage.name]
        if not here:
            continue
        engine = make_engine(stage)
        display = Display(shown=engine.is_main and not as_json)
        session = open_stage(stage, engine, run, display, data_root)
        try:
            engine.on_main(partial(require_data, run, stage.name, session.data_record))
            results += [_measured(session, *pair, line) for pair in here]
            session.signals.drain()
        finally:
            display.close()
    if engine is None:
        raise RunError(f"{run}/config.toml: has none of the stages that the run has tickets of")
    if engine.is_main:
        _print(results, pairs, as_json)
    engine.close()


def _pairs(
    places: Sequence[str], levels: Sequence[int], root: str
) -> list[tuple[_Trained, _Trained]]:
    if len(places) != 2:
        raise UserError("--barrier: name two runs, or two levels as RUN/STAGE/LEVEL")
    singles = [find_single(place, root) for place in places]
    first, second = (_levels_of(place, root) for place in places)
    if None not in singles:
        pairs = [(first[0], second[0])]
    else:
        others = {one.ticket.place: one for one in second}
        pairs = [(one, others[one.ticket.place]) for one in first if one.ticket.place in others]
    pairs = [pair for pair in pairs if not levels or pair[0].ticket.level in levels]
    if not pairs:
        raise UserError(f"--barrier: {places[0]} and {places[1]} have no such level in common")
    for one, other in pairs:
        if one.ticket.model != other.ticket.model:
            raise UserError(
                f"--barrier: {one} and {other} are of different networks: no line leads from one "
                "to the other"
            )
    return pairs


def _levels_of(place: str, root: str) -> list[_Trained]:
    """The level that a place names, or the levels of a run, without controls."""
    single = find_single(place, root)
    if single is not None:
        level = Folder(single.removesuffix(f"/{INDEX}"))
        if not level.exists(INDEX):
            raise UserError(f"{place}: is in a store, which has no trained weights; name a run's")
        return [_Trained(level.parent.parent, find_ticket(single))]
    run = _run(place, root)
    return [_Trained(run, ticket) for ticket in TicketFolder(run).all() if not ticket.control]


def _measured(session: Session, first: _Trained, second: _Trained, line: Line) -> Connectivity:
    ticket = first.ticket
    model = session.build_network(ticket.model).module
    start, end = (one.weights(session.engine) for one in (first, second))
    curves = measure(session, model, start, end, line, what=ticket.place)
    return Connectivity(
        stage=ticket.stage,
        name=ticket.name,
        first=str(first),
        second=str(second),
        density=ticket.density,
        batchnorm=line.treatment(model),
        curves=curves,
    )


def _print(
    results: Sequence[Connectivity], pairs: Sequence[tuple[_Trained, _Trained]], as_json: bool
) -> None:
    same = {str(one): _start(one.ticket) == _start(other.ticket) for one, other in pairs}
    if as_json:
        print(json.dumps([{**_as_json(r), "same_start": same[r.first]} for r in results], indent=1))
        return
    console = Console()
    print_tables(console, [], results)
    for result in results:
        start = "the same weights and masks" if same[result.first] else "different tickets"
        line = f"{result.first} and {result.second} were trained from {start}"
        console.print(line, highlight=False, soft_wrap=True)


def _start(ticket: Ticket) -> tuple[str, str | None, int]:
    """From which masks and weights a ticket is trained: what no noise changes."""
    return ticket.stored_masks.digest, ticket.weights_digest, ticket.step


# Runs ------------------------------------------------------------------------------------


def _run(place: str, root: str) -> Folder:
    """The folder of a run. Raises `UserError` for a store or a level."""
    if find_single(place, root) is not None:
        raise UserError(f"{place}: is one ticket: name its run (`tombola tickets show` has it)")
    tickets = find_tickets(place, root)
    if not isinstance(tickets, TicketFolder):
        raise UserError(f"{place}: is a ticket store; a report is of runs")
    return tickets.folder


def open_stage(
    stage: Stage, engine: Engine, run: Folder, display: Display, data_root: str | None = None
) -> Session:
    """A stage of a run, of which nothing is recorded; of image files the run keeps what is known.

    Its data are where the run has them, or below `data_root`.
    """
    settings = stage.settings
    if data_root is not None:
        moved = replace(settings.data, source=settings.data.kind, root=data_root)
        settings = replace(settings, data=moved)
    signals = Signals(world_size=engine.world_size, is_main=engine.is_main, save_minutes=math.inf)
    return Session(settings, engine, run, Recorder(), display, signals)
