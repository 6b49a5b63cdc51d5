"""`tombola watch RUN`: what a run is at that is written elsewhere, as it goes on."""

import json
import os
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from data.errors import StoreError
from data.files import Folder
from launch.grid import runs_at
from launch.levels import compared
from launch.places import candidates
from launch.tables import level_table, plain_table
from launch.watched import Now, State, Watched
from train.progress import duration

_WIDE = 160


def watch(place: str, *, root: str, interval: float, once: bool, as_json: bool) -> None:
    """Shows a run, or several in one folder, until it is interrupted; with `once` one time.

    With `as_json` as one JSON document, once. A run that is not there yet is waited for. Raises
    `StoreError` with `once`, where the store fails; else it is told, and tried again.
    """
    if os.environ.get("RANK", "0") != "0":
        return  # under torchrun one rank's view is enough
    view = _View(place, root)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDE)  # nobody's lines are folded
    try:
        if as_json:
            print(json.dumps({"runs": [state.to_json() for state in view.look()]}, indent=1))
        elif once:
            console.print(shown(view.look(), place), soft_wrap=not console.is_terminal)
        elif console.is_terminal:
            _live(view, place, console, interval)
        else:
            _plain(view, place, console, interval)
    except KeyboardInterrupt:
        return


class _View:
    """The runs of a place, which may come later."""

    def __init__(self, place: str, root: str) -> None:
        self._candidates = [Folder(one) for one in candidates(place, root)]
        self._watched: dict[str, Watched] = {}

    def look(self) -> list[State]:
        """The runs that are there by now, and what is known of each."""
        for folder in self._candidates:
            if found := runs_at(folder):
                watched = [self._watched.setdefault(p, Watched(f)) for p, f in found.items()]
                return [one.look() for one in watched]
        return []


def _live(view: _View, place: str, console: Console, interval: float) -> None:
    """A picture in the terminal that is drawn again and again."""
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        last: RenderableType = Text("")
        while True:
            try:
                last = shown(view.look(), place)
                live.update(last, refresh=True)
            except StoreError as error:
                live.update(Group(last, Text(f"{error}; trying again")), refresh=True)
            time.sleep(interval)


def _plain(view: _View, place: str, console: Console, interval: float) -> None:
    """A line whenever something has changed, for each process that writes."""
    before: dict[str, object] = {}
    while True:
        try:
            lines = _lines(view.look(), place)
        except StoreError as error:
            lines = {"": (str(error), f"{error}; trying again")}
        for name, (what, line) in lines.items():
            if before.get(name) != what:
                console.print(line, soft_wrap=True, markup=False)
        before = {name: what for name, (what, _) in lines.items()}
        time.sleep(interval)


def _lines(states: Sequence[State], place: str) -> dict[str, tuple[object, str]]:
    """The line of each process, by what writes it, with what must differ for it to be told anew."""
    if not states:
        return {"": ("waiting", _waiting(place))}
    found: dict[str, tuple[object, str]] = {}
    for state in states:
        if not state.parts:
            found[state.run] = "begun", f"{state.run}: {_of_run(state)}; no line yet"
        for now in state.parts:
            what = now.stage, now.level, now.step, now.accuracies, now.is_silent, len(state.tickets)
            facts = [f"{now.stage}/{now.level}", *_facts(now), f"levels {_levels(state)}"]
            line = f"{state.run}: {'  '.join([*facts, _age(now)])}"
            found[f"{state.run} {now.part}"] = what, line
    return found


# Pictures --------------------------------------------------------------------------------


def shown(states: Sequence[State], place: str) -> RenderableType:
    """Several runs as a table, one with its levels, none as a line."""
    if not states:
        return Text(_waiting(place))
    return _several(states, place) if len(states) > 1 else _one(states[0])


def _one(state: State) -> RenderableType:
    lines: list[RenderableType] = [Text(f"{state.run}: {_of_run(state)}")]
    if not state.parts:
        lines.append(Text("no line yet"))
    for now in state.parts:
        named = f"{now.stage}/{now.level}" + (f" (part {now.part})" if now.part else "")
        lines.append(Text("  ".join([named, *_facts(now)])))
        lines.append(Text(f"  {_age(now)}", style="bold" if now.is_silent else ""))
    finished = compared(state.tickets)
    tables = [level_table(finished, stage) for stage in dict.fromkeys(t.stage for t in finished)]
    return Group(*lines, *tables)


def _several(states: Sequence[State], place: str) -> Table:
    """A line for each process of each run; what does not fit into one is told of a run alone."""
    columns = ("at", "step", "loss", "accuracy", "ETA", "levels", "last line")
    table = plain_table(place, "", *columns)
    for index, column in enumerate(table.columns):
        column.justify = "left" if index < 2 else "right"
        column.overflow = "fold"
    for state in states:
        name = state.run.rstrip("/")
        name = name.rpartition(f"{place.strip('/')}/")[2] or name
        for now in state.parts:
            table.add_row(
                name + (f" {now.part}" if now.part else ""),
                f"{now.stage}/{now.level}",
                _steps(now),
                _number(now.loss, ".4f"),
                _number(next(reversed(now.accuracies.values()), None), ".4f"),
                _eta(now),
                _levels(state),
                "done" if state.is_done else _ago(now),
            )
        if not state.parts:
            table.add_row(name, *["-"] * 5, _levels(state), "no line yet")
    return table


# Words -----------------------------------------------------------------------------------


def _waiting(place: str) -> str:
    return f"{place}: no run there yet"


def _of_run(state: State) -> str:
    """The attempts at a run, where it is, and how many levels are finished."""
    ranks = f"{state.world_size} rank{'' if state.world_size == 1 else 's'}"
    where = f", {ranks} from {state.host}" if state.host and state.world_size else ""
    damaged = f", {state.num_damaged} lines damaged" if state.num_damaged else ""
    done = ", done" if state.is_done else ""
    return f"attempt {state.attempts}{where}, levels {_levels(state)}{done}{damaged}"


def _facts(now: Now) -> list[str]:
    facts = [
        f"density {_number(now.density, '.2%')}",
        f"step {_steps(now)}",
        f"loss {_number(now.loss, '.4f')}",
        *(f"{split} {accuracy:.4f}" for split, accuracy in now.accuracies.items()),
        f"{_number(now.images_per_second, ',.0f')} images/s",
        f"data wait {_number(now.data_wait, '.0%')}",
    ]
    return [*facts, f"ETA {_eta(now)}"]


def _steps(now: Now) -> str:
    return f"{now.step:,}/{'-' if now.stop is None else f'{now.stop:,}'}"


def _levels(state: State) -> str:
    total = "-" if state.num_levels is None else str(state.num_levels)
    return f"{state.num_finished}/{total}"


def _age(now: Now) -> str:
    return f"last line {_ago(now)}"


def _ago(now: Now) -> str:
    if now.age is None:
        return "at an unknown time"
    minutes, hours = now.age / 60, now.age / 3600
    told = f"{now.age:.0f} s ago"
    if minutes >= 2:
        told = f"{minutes:.0f} min ago" if hours < 2 else f"{hours:.0f} h ago"
    return f"{told}, long silent" if now.is_silent else told


def _eta(now: Now) -> str:
    return "-" if now.eta is None else duration(now.eta)


def _number(value: Any, form: str) -> str:
    return "-" if not isinstance(value, int | float) else format(value, form)
