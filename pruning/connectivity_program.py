"""Instability analysis as a stage of a run: are two trainings of a ticket linearly connected?

Frankle et al. 2020 (1912.05671). From one state (W_k, m) two copies are trained from k to T that
differ in SGD noise alone: the order and the augmentation of the data, and dropout. Both are trained
anew, since the ticket's own training may have carried the momentum of step k. With `other` nothing
is trained: what two tickets of one network were trained to is compared, such as an elastic ticket
and one that IMP found.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor

from data.errors import UserError
from data.files import Folder
from pruning.connectivity import (
    BatchNorm,
    Connectivity,
    Line,
    described,
    find_result,
    measure,
    write_result,
)
from pruning.program import Arm, train_ticket
from pruning.sources import (
    Found,
    Needed,
    Outlook,
    check_levels,
    claim_sources,
    find_sources,
    recorded_sources,
    require_weights,
)
from pruning.store import TicketFolder
from pruning.tickets import Ticket
from pruning.trained import trained_weights
from pruning.weight_store import write_weights
from train.models import ModelSpec
from train.session import Session, Start
from train.settings import Settings
from train.state import Network


@dataclass(frozen=True)
class ConnectivityConfig:
    """Linear mode connectivity: the error barrier between two trainings of a ticket."""

    ticket: str
    """an earlier stage, or RUN/STAGE, RUN/STAGE/LEVEL, STORE/ID as a path or URL"""
    levels: tuple[int, ...] = ()
    """which levels of it; by default its sparsest"""
    other: str | None = None
    """compare with what this ticket was trained to, instead of training two copies of one"""
    other_levels: tuple[int, ...] = ()
    """which levels of the other; by default the same"""
    points: int = 30
    """of the line, both ends included"""
    batchnorm: BatchNorm = "recalibrate"
    """statistics on the line: recalibrate on training batches, or interpolate"""
    num_batches: int = 16
    """global training batches to recalibrate on, at each point"""
    train_images: int | None = None
    """evaluate this many training images, spread evenly; by default all"""

    def __post_init__(self) -> None:
        check_levels(self)
        _ = self.line  # checks its parts
        if self.other_levels and self.other is None:
            raise ValueError(f"other_levels = {list(self.other_levels)}: needs other")

    @property
    def line(self) -> Line:
        """How its lines are measured."""
        return Line(self.points, self.batchnorm, self.num_batches, self.train_images)


def foresee_connectivity(
    stage: str, config: ConnectivityConfig, settings: Settings, outlook: Outlook
) -> None:
    """Raises `UserError` for what is known to fail before anything is trained."""
    if is_measured(outlook.run, stage, config):
        return
    where = f"stages.{stage}"
    needed: Needed = "start" if config.other is None else "end"
    found = outlook.sources(f"{where}.ticket", config.ticket, config.levels, needed=needed)
    if config.other is None:
        return
    levels = config.other_levels or [level for level, _ in found]
    others = outlook.sources(f"{where}.other", config.other, levels, needed="end")
    _require_pairs(stage, config, [model for _, model in found], [model for _, model in others])


def is_measured(run: Folder, stage: str, config: ConnectivityConfig) -> bool:
    """Whether all levels of a stage are measured: then it needs its sources no more."""
    sources = recorded_sources(run, stage) or []
    num_levels = len(sources) if config.other is None else len(sources) // 2
    folders = [run / f"{stage}/{_name(int(level))}" for level, _ in sources[:num_levels]]
    return bool(folders) and all(find_result(folder) is not None for folder in folders)


def _require_pairs(
    stage: str, config: ConnectivityConfig, one: Sequence[ModelSpec], other: Sequence[ModelSpec]
) -> None:
    """Raises `UserError` unless there are as many of both, and each pair of one network."""
    where = f"stages.{stage}.other = {config.other!r}"
    if len(one) != len(other):
        raise UserError(
            f"{where}: {len(other)} levels to compare with {len(one)}: name as many in "
            "other_levels as in levels"
        )
    for first, second in zip(one, other, strict=True):
        if (first.name, first.arguments) != (second.name, second.arguments):
            raise UserError(
                f"{where}: is of another network ({second.name}, not {first.name}): no line leads "
                "from one to the other"
            )


def run_connectivity(session: Session, stage: str, config: ConnectivityConfig) -> None:
    """Measures every level that is not measured yet.

    Raises `UserError` for tickets without weights to train from, or of different networks.
    """
    run = session.folder
    if not session.engine.on_main(lambda: is_measured(run, stage, config)):
        _Connectivity(session, stage, config).run()


class _End(NamedTuple):
    """A network that a line begins or ends with."""

    place: str
    weights: dict[str, Tensor]


class _Connectivity:
    """The program: each level that has its result is passed over."""

    def __init__(self, session: Session, stage: str, config: ConnectivityConfig) -> None:
        self.session, self.stage, self.config = session, stage, config
        self.tickets = TicketFolder(session.folder)
        self.found = self._find("ticket", config.ticket, config.levels)
        self.others: list[Found] = []
        if config.other is not None:
            levels = config.other_levels or [one.ticket.level for one in self.found]
            self.others = self._find("other", config.other, levels)
        session.engine.together(self._check)

    def run(self) -> None:
        session, run = self.session, self.session.folder
        num_steps = [2 * (session.total_steps - one.ticket.step) for one in self.found]
        session.display.plan(0 if self.others else sum(num_steps))
        sources = self.found + self.others
        session.engine.on_main(lambda: claim_sources(run, self.stage, sources))
        for index, one in enumerate(self.found):
            folder = run / f"{self.stage}/{_name(one.ticket.level)}"
            if session.engine.on_main(partial(find_result, folder)) is None:
                self._measure(one, self.others[index] if self.others else None)
            elif not self.others:
                session.display.skip(num_steps[index])

    def _find(self, option: str, place: str, levels: Sequence[int]) -> list[Found]:
        where, run = f"stages.{self.stage}.{option}", self.session.folder
        return self.session.engine.on_main(
            lambda: find_sources(where, place, levels, run), patient=True
        )

    def _check(self) -> None:
        for one in self.found + self.others:
            one.ticket.require_fit()
            self._require_fit(one.ticket)
        if self.config.other is not None:
            models = [[one.ticket.model for one in some] for some in (self.found, self.others)]
            _require_pairs(self.stage, self.config, models[0], models[1])

    def _require_fit(self, ticket: Ticket) -> None:
        session, model = self.session, ticket.model
        where = f"stages.{self.stage}: ticket {ticket.place}"
        data = len(session.data.classes), session.data.image_shape[0]
        if (model.num_classes, model.in_chans) != data:
            raise UserError(
                f"{where} is of {model.num_classes} classes and {model.in_chans} channels, the "
                f"data have {data[0]} and {data[1]}"
            )
        if not self.others:
            require_weights(ticket)
            session.require_before_end(ticket.step, f"{where} is of step")

    def _measure(self, one: Found, other: Found | None) -> None:
        session, line, name = self.session, self.config.line, _name(one.ticket.level)
        network = session.build_network(one.ticket.model)
        if other is None:
            first, second = (self._copy(one.ticket, network, number) for number in (1, 2))
        else:
            first, second = self._trained(one), self._trained(other)
        curves = measure(
            session,
            network.module,
            first.weights,
            second.weights,
            line,
            what=f"{self.stage}/{name}",
        )
        result = Connectivity(
            stage=self.stage,
            name=name,
            first=first.place,
            second=second.place,
            density=one.ticket.density,
            batchnorm=line.treatment(network.module),
            curves=curves,
        )
        self._record(result)  # first, so that no kill leaves a result without its facts
        session.engine.on_main(lambda: write_result(session.folder, result))
        session.display.say(described(result))

    def _copy(self, ticket: Ticket, network: Network, number: int) -> _End:
        """A training of the ticket with noise of its own."""
        session, objects = self.session, self.tickets.objects
        arm = Arm(
            stage=self.stage,
            method=f"copy-{number}",
            level=ticket.level,
            masks=lambda: ticket.read(session.engine).masks,
            start=lambda: Start(ticket.weights()),
            first_step=ticket.step,
            stop=session.total_steps,
            schedule=session.schedule,
            seed_labels=("connectivity", "order", ticket.level, number),
            parent=ticket,
            model=ticket.model,
            control=True,
            rewind_step=ticket.step,
            weights=lambda start: write_weights(objects, start.weights, session.engine),
            config={"connectivity": asdict(self.config)},
        )
        copy = train_ticket(session, self.tickets, network, arm)
        level = session.folder / f"{self.stage}/{arm.name}"
        return _End(copy.place, trained_weights(copy, level, session.engine))

    def _trained(self, one: Found) -> _End:
        run = self.session.folder
        inside = one.level is not None and one.level.url == (run / one.ticket.place).url
        place = one.ticket.place if inside else str(one.level)
        return _End(place, trained_weights(one.ticket, one.level, self.session.engine))

    def _record(self, result: Connectivity) -> None:
        session = self.session
        place = {"event": "connectivity", "stage": self.stage, "level": result.name}
        for split, curve in result.curves.items():
            fact = {**place, "split": split, "step": session.total_steps}
            session.recorder.record({**fact, "barrier": curve.barrier, "errors": curve.errors})
        session.recorder.sync()


def _name(level: int) -> str:
    return f"level-{level:02d}"
