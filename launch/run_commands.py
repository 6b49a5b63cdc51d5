"""The words after `tombola run`, `tombola sweep` and `tombola watch`."""

from dataclasses import dataclass
from typing import Annotated

import tyro
from tyro.conf import Positional

from data.errors import UserError


@dataclass
class Run:
    """Runs a configuration, or what is left of it; --section.key value overrides the file."""

    config: Annotated[Positional[str], tyro.conf.arg(metavar="CONFIG")]
    """a TOML file"""
    root: str = "runs"
    """folder or URL that holds the runs"""
    only: tuple[str, ...] = ()
    """only these parts of it, beside other processes: STAGE, STAGE:tickets (without its controls),
    STAGE:CONTROL (one control, of tickets that are finished)"""
    store: str | None = None
    """folder or URL of a ticket store, into which the run's tickets are copied at its end"""

    def __call__(self, overrides: list[str]) -> None:
        from launch.run import run

        run(self.config, overrides, root=self.root, only=self.only, store=self.store)


@dataclass
class Sweep:
    """Runs a configuration once for each combination of values, and compares what comes of it: an
    option with commas, as --seed 0,1,2 or --optimizer.lr 0.1,0.2, has each of them in turn."""

    config: Annotated[Positional[str], tyro.conf.arg(metavar="CONFIG")]
    """a TOML file"""
    root: str = "runs"
    """folder or URL that holds the runs, which are in its folder NAME"""
    only: tuple[str, ...] = ()
    """only these parts of each run, as of tombola run"""
    store: str | None = None
    """folder or URL of a ticket store, into which the runs' tickets are copied at the end"""
    dry_run: bool = False
    """list the runs, and how far each is, and do nothing"""

    def __call__(self, overrides: list[str]) -> None:
        from launch.sweeping import sweep

        sweep(
            self.config,
            overrides,
            root=self.root,
            only=self.only,
            store=self.store,
            dry_run=self.dry_run,
        )


@dataclass
class Watch:
    """Shows what a run is at that goes on elsewhere: step, loss, accuracies, time left, levels."""

    run: Annotated[Positional[str], tyro.conf.arg(metavar="RUN")]
    """a path, a URL, or a name under --root; of a sweep, or a run over seeds, a line a run"""
    root: str = "runs"
    """folder or URL that holds the runs"""
    interval: float = 5.0
    """seconds between two looks"""
    once: bool = False
    """show it once"""
    json: bool = False
    """print one JSON document, once"""

    def __call__(self) -> None:
        from launch.watching import watch

        if not 0 < self.interval < 86400:
            raise UserError(f"--interval {self.interval}: must be above 0 and below a day (86400)")
        watch(self.run, root=self.root, interval=self.interval, once=self.once, as_json=self.json)
