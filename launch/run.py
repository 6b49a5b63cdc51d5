"""`tombola run CONFIG`: the stages of a run one after the other, each resuming by itself."""

from collections.abc import Sequence
from typing import NamedTuple

from data.errors import Diverged, RunError, UserError
from data.files import Folder
from launch.claim import claim_data, claimed
from launch.config import RunConfig, Stage, flat, read_config
from launch.grid import Grid, grid_of, require_room
from launch.hosts import hosts_of, micro_batch, told
from launch.parts import Unit, check_stages, label, stages_of, units_of
from launch.recipes import RECIPES
from launch.store import publish, require_store
from launch.summary import summarise, summarise_grid
from train.engine import Engine
from train.metrics import Recorder
from train.progress import Display
from train.session import Session
from train.signals import Signals


def run(
    path: str,
    overrides: Sequence[str],
    *,
    root: str,
    only: Sequence[str] = (),
    store: str | None = None,
) -> None:
    """Runs a configuration, or what is left of it, and sums up its tickets.

    `only` names parts of it, `store` where its tickets are copied in the end. Raises `UserError`,
    `RunError`, or `Interrupted` after SIGTERM or SIGUSR1.
    """
    run_config(read_config(path, overrides), root=root, only=only, store=store)


def run_config(
    config: RunConfig, *, root: str, only: Sequence[str] = (), store: str | None = None
) -> None:
    """The same for a configuration that was read already."""
    run_grid(grid_of(config), root=root, only=only, store=store)


def run_grid(grid: Grid, *, root: str, only: Sequence[str] = (), store: str | None = None) -> None:
    """The same for several runs, one after the other, and what they came to together.

    One that diverges, or meets a mistake in what it has otherwise than the first, does not keep the
    others from being run: an error tells of it at the end.
    """
    folder = Folder(root) / grid.name
    runs = planned(grid, folder, only)
    first = runs[0].config
    engine = make_engine(first.stages[0])
    engine.on_main(lambda: _check(grid, folder, runs), patient=True)
    if store is not None:
        engine.on_main(lambda: require_store(store))
    signals = Signals(
        world_size=engine.world_size,
        is_main=engine.is_main,
        save_minutes=first.settings.checkpoint.minutes,
    )
    failed: list[Exception] = []
    with signals:  # of all runs: one that comes at the end of a run stops the next
        for run in runs:
            try:
                _run_stages(run, engine, signals, is_alone=grid.is_alone)
            except (Diverged, UserError) as error:
                if grid.is_alone or not _is_of_one(error, engine, is_first=run is runs[0]):
                    raise
                failed.append(error)
                Display(shown=engine.is_main).say(f"{run.folder}: {error}")
    if not grid.is_alone:
        engine.on_main(lambda: summarise_grid(folder))
    if store is not None:
        engine.on_main(lambda: publish([run.folder for run in runs], store), patient=True)
    engine.close()
    if failed:
        kind = UserError if any(isinstance(one, UserError) for one in failed) else RunError
        told = kind(f"{len(failed)} of {len(runs)} runs failed, the others are done: {failed[0]}")
        vars(told)["met_by_all"] = True
        raise told


def _is_of_one(error: Exception, engine: Engine, *, is_first: bool) -> bool:
    """Whether an error hinders one run of several, and all ranks have met it.

    A mistake that ends the first is taken for one in all.
    """
    if isinstance(error, Diverged):
        return True
    return not is_first and (engine.world_size == 1 or getattr(error, "met_by_all", False))


class Planned(NamedTuple):
    """A run, and what of it is to be done."""

    name: str
    """as people see it: `digits-imp`, `rewinding/rewind-init/seed-0`"""
    folder: Folder
    config: RunConfig
    units: list[Unit]


def planned(grid: Grid, folder: Folder, only: Sequence[str] = ()) -> list[Planned]:
    """The runs of a grid in the folder of all, in their order. Raises as `units_of` does."""
    return [
        Planned(
            f"{grid.name}/{place}".rstrip("/"),
            folder / place if place else folder,
            config,
            units_of(config, only),
        )
        for place, config in grid.runs.items()
    ]


def _check(grid: Grid, folder: Folder, runs: Sequence[Planned]) -> None:
    """Raises `UserError` for what is known to fail in any of the runs, before the first begins."""
    require_room(grid, folder)
    for run in runs:
        check_stages(run.config, run.folder, run.units)


def _run_stages(run: Planned, engine: Engine, signals: Signals, *, is_alone: bool) -> None:
    """These units of a run, and what they came to, unless it is one of several."""
    name, folder, config, units = run
    hosts, part = hosts_of(engine), label(units, config)
    with claimed(folder, config, engine, list(map(str, units)), part=part) as claim:
        before = claim.ranks_before
        recorder = open_recorder(name, folder, config, engine, part=part)
        display = Display(shown=engine.is_main)
        if not is_alone:
            display.say(str(folder))
        for line in told(config, hosts, before):
            display.say(line)
        if not claim.is_guarded and folder.local_path is not None:
            display.say(f"{folder}: this file system has no locks: start nothing twice there")
        try:
            for stage, whole in stages_of(units, config):
                engine = make_engine(stage, before)
                session = Session(stage.settings, engine, folder, recorder, display, signals, whole)
                claim_data(folder, stage.name, session.data_record, engine)
                RECIPES[stage.recipe].run(session, stage.name, stage.config)
            signals.drain()
        finally:
            display.close()
            recorder.close()
        if is_alone:
            engine.on_main(lambda: summarise(folder, [stage.name for stage in config.stages]))


def open_recorder(
    name: str, folder: Folder, config: RunConfig, engine: Engine, *, part: str = ""
) -> Recorder:
    """The run's metrics, on rank 0; what hinders it there is raised on every rank."""
    opened: list[Recorder] = []

    def open_there() -> None:
        told = flat(config.document())
        opened.append(
            Recorder(folder, run=name, config=config.settings.log, part=part, settings=told)
        )

    engine.on_main(open_there)
    return opened[0] if opened else Recorder()


def make_engine(stage: Stage, before: Sequence[int] = ()) -> Engine:
    """The engine as the stage's settings want it, in a run that had so many ranks before."""
    train = stage.settings.train
    engine = Engine(
        precision=train.precision,
        channels_last=train.channels_last,
        compile=train.compile,
        cuda_graphs=train.cuda_graphs,
        sync_batchnorm=train.sync_batchnorm,
        clip=train.clip,
        timeout=train.timeout,
        pack_below=train.pack_below,
        reduce_dtype=train.reduce_dtype,
    )
    engine.micro_batch = micro_batch(stage, engine.world_size, before)
    return engine
