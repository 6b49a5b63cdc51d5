"""`tombola run CONFIG`: the stages of a run one after the other, each resuming by itself."""

from collections.abc import Sequence

from data.files import Folder
from launch.claim import claim_data, claimed, require_same
from launch.config import RunConfig, Stage, read_config
from launch.recipes import RECIPES
from launch.summary import summarise, summarise_sweep
from launch.sweep import require_free, seed_name, seed_runs
from pruning.sources import Outlook, Promise
from train.engine import Engine
from train.metrics import Recorder
from train.progress import Display
from train.session import Session
from train.signals import Signals


def run(path: str, overrides: Sequence[str], *, root: str) -> None:
    """Runs a configuration, or what is left of it, and sums up its tickets.

    Raises `UserError`, `RunError`, or `Interrupted` after SIGTERM or SIGUSR1.
    """
    run_config(read_config(path, overrides), root=root)


def run_config(config: RunConfig, *, root: str) -> None:
    """The same for a configuration that was read already."""
    engine = make_engine(config.stages[0])
    folder = Folder(root) / config.settings.name
    runs = [(folder / seed_name(seed), config.with_seed(seed)) for seed in config.seeds]
    runs = runs or [(folder, config)]
    engine.on_main(lambda: _check(config, folder, runs), patient=True)
    signals = Signals(
        world_size=engine.world_size,
        is_main=engine.is_main,
        save_minutes=config.settings.checkpoint.minutes,
    )
    with signals:  # of all runs: one that comes at the end of a run stops the next
        for place, one in runs:
            _run_stages(one, place, engine, signals, is_alone=not config.seeds)
    if config.seeds:
        engine.on_main(lambda: summarise_sweep(folder))
    engine.close()


def _check(config: RunConfig, folder: Folder, runs: Sequence[tuple[Folder, RunConfig]]) -> None:
    """Raises `UserError` for what is known to fail in any of the runs, before the first begins."""
    require_free(folder, for_seeds=bool(config.seeds))
    for place, one in runs:
        check_stages(one, place)
    for seed, place in seed_runs(folder).items():
        require_same(place, config.with_seed(seed))


def _run_stages(
    config: RunConfig, folder: Folder, engine: Engine, signals: Signals, *, is_alone: bool
) -> None:
    """The stages of a run of one seed, and what they came to, unless it is one of several."""
    with claimed(folder, config, engine):
        recorder = open_recorder(folder, config, engine)
        display = Display(shown=engine.is_main)
        if not is_alone:
            display.say(str(folder))
        try:
            for stage in config.stages:
                engine = make_engine(stage)
                session = Session(stage.settings, engine, folder, recorder, display, signals)
                claim_data(folder, stage.name, session.data_record, engine)
                RECIPES[stage.recipe].run(session, stage.name, stage.config)
            signals.drain()
        finally:
            display.close()
            recorder.close()
        if is_alone:
            engine.on_main(lambda: summarise(folder, [stage.name for stage in config.stages]))


def check_stages(config: RunConfig, folder: Folder) -> None:
    """Raises `UserError` for a stage that is known to fail once those before it are trained."""
    earlier: dict[str, Promise] = {}
    for stage in config.stages:
        outlook = Outlook(folder, earlier)
        promise = RECIPES[stage.recipe].foresee(stage.name, stage.config, stage.settings, outlook)
        if promise is not None:
            earlier[stage.name] = promise


def open_recorder(folder: Folder, config: RunConfig, engine: Engine) -> Recorder:
    """The run's metrics, on rank 0; what hinders it there is raised on every rank."""
    opened: list[Recorder] = []

    def open_there() -> None:
        opened.append(Recorder(folder, run=config.settings.name, config=config.settings.log))

    engine.on_main(open_there)
    return opened[0] if opened else Recorder()


def make_engine(stage: Stage) -> Engine:
    """The engine as the stage's settings want it."""
    train = stage.settings.train
    return Engine(
        precision=train.precision,
        channels_last=train.channels_last,
        compile=train.compile,
        sync_batchnorm=train.sync_batchnorm,
        clip=train.clip,
        micro_batch=train.micro_batch,
        timeout=train.timeout,
    )
