"""Iterative magnitude pruning with rewinding, its retraining modes, and its controls.

Frankle and Carbin 2019 (1803.03635), Frankle et al. 2019 (1903.01611, Algorithm 1) and Renda et
al. 2020 (2003.02389). Level 0 trains the dense network from step 0 to T and keeps W_k once. Level
l prunes `ceil(prune_fraction * R)` of the R survivors of level l-1 by their final magnitude, goes
back as `mode` says, and trains from k to T on the original schedule.

Choices where the papers leave them open: every control trains for the same T - k steps as the
ticket that it is compared with, on the same stream of data; `reinit` too starts at step k of the
schedule; `oneshot` ranks the magnitudes of W_k over all layers.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

from data.errors import RunError, UserError
from pruning.allocate import Scope, keep_count, prune_fraction, shuffle_layers
from pruning.fixed import FixedMasks
from pruning.masks import Masks
from pruning.scores import magnitude
from pruning.tickets import Ticket, TicketFolder, software_versions, write_weights
from train.duration import check_durations
from train.schedule import constant
from train.session import Phase, Session, Start

Mode = Literal["weights", "lr", "finetune"]
Control = Literal["random", "reinit", "oneshot"]


@dataclass(frozen=True)
class ImpConfig:
    """Iterative magnitude pruning."""

    rounds: int = 12
    """levels of pruning after the dense one"""
    prune_fraction: float = 0.2
    """share of the surviving weights that each round removes"""
    density: float | None = None
    """instead of `rounds`: prune until at most this fraction is kept"""
    rewind: str = "init"
    """k: the step to which weights and schedule go back; 1000it, 5ep, 5%, init"""
    mode: Mode = "weights"
    """weights: rewind both to k; lr: keep the weights, rewind the schedule to k; finetune: keep
    the weights, train the same T - k steps at the final rate"""
    scope: Scope = "global"
    """rank the weights over all layers, or prune each layer by the same fraction"""
    exclude: tuple[str, ...] = ()
    """patterns of the names of layers that stay dense, such as fc"""
    rewind_optimizer: bool = False
    """take the optimizer's state at k as well, instead of a fresh one"""
    same_order: bool = False
    """every level sees the data in the same order, instead of an order of its own"""
    controls: tuple[Control, ...] = ()
    """what to train beside each ticket: random (the same number of weights in each layer, at
    random), reinit (the ticket's masks, fresh weights), oneshot (the largest weights at k)"""
    control_levels: tuple[int, ...] = ()
    """the levels that have controls (default: all)"""

    def __post_init__(self) -> None:
        check_durations(self, "rewind")
        if not 0 < self.prune_fraction < 1:
            raise ValueError(f"prune_fraction = {self.prune_fraction}: must be between 0 and 1")
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density = {self.density}: must be above 0 and at most 1")
        if self.rounds < 0:
            raise ValueError(f"rounds = {self.rounds}: must not be negative")
        if self.rewind_optimizer and self.mode != "weights":
            raise ValueError(f"rewind_optimizer needs mode = 'weights', not {self.mode!r}")
        beyond = [level for level in self.control_levels if not 1 <= level <= self.num_rounds]
        if beyond:
            raise ValueError(f"control_levels = {beyond}: levels go from 1 to {self.num_rounds}")

    @property
    def num_rounds(self) -> int:
        """The number of pruned levels."""
        if self.density is None:
            return self.rounds
        return math.ceil(math.log(self.density) / math.log(1 - self.prune_fraction) - 1e-9)

    def controls_at(self, level: int) -> tuple[Control, ...]:
        """The controls that are trained beside the ticket of `level`."""
        chosen = not self.control_levels or level in self.control_levels
        return self.controls if level and chosen else ()


def run_imp(session: Session, stage: str, config: ImpConfig) -> list[Ticket]:
    """All tickets of the stage and their controls; trains only what is not finished yet.

    Raises `UserError` where k lies beyond the end of the training.
    """
    return _Imp(session, stage, config).run()


@dataclass(frozen=True)
class _Arm:
    """One training of the comparison: a level's ticket, or a control beside it."""

    method: Literal["imp"] | Control
    level: int
    parent: Ticket | None
    masks: Callable[[], Masks]
    start: Callable[[], Start]
    first_step: int

    @property
    def name(self) -> str:
        return f"level-{self.level:02d}" + ("" if self.method == "imp" else f"-{self.method}")

    @property
    def is_pruned_ticket(self) -> bool:
        return self.method == "imp" and self.level > 0


class _Imp:
    """The program: each arm is `_ticket`, which returns at once if it is finished."""

    def __init__(self, session: Session, stage: str, config: ImpConfig) -> None:
        self.session, self.stage, self.config = session, stage, config
        self.tickets = TicketFolder(session.folder)
        self.start_step, self.stop = session.steps(config.rewind), session.total_steps
        if not self.start_step < self.stop:
            raise UserError(
                f"stages.{stage}.rewind = {config.rewind!r} is step {self.start_step}, beyond the "
                f"end of the training at step {self.stop} (train.total = "
                f"{session.settings.train.total!r})"
            )
        self.network = session.build_network()
        self.everything = Masks.ones(self.network.module, config.exclude).to("cpu")
        self._initial = {k: v.cpu().clone() for k, v in self.network.module.state_dict().items()}

    def run(self) -> list[Ticket]:
        config = self.config
        self.session.display.plan(self._num_steps())
        ticket = self._dense()
        found = [ticket]
        for level in range(1, config.num_rounds + 1):
            ticket = self._level(level, ticket)
            found.append(ticket)
            for control in config.controls_at(level):
                found.append(self._control(control, ticket))
        return found

    def _num_steps(self) -> int:
        levels = range(1, self.config.num_rounds + 1)
        num_short = sum(1 + len(self.config.controls_at(level)) for level in levels)
        return self.stop + num_short * (self.stop - self.start_step)

    # The arms ----------------------------------------------------------------------------

    def _dense(self) -> Ticket:
        return self._ticket(
            _Arm("imp", 0, None, lambda: self.everything, lambda: Start(self._initial), 0)
        )

    def _level(self, level: int, parent: Ticket) -> Ticket:
        rewinds = self.config.mode == "weights"
        start = self._rewound if rewinds else lambda: self._final(parent)
        pruned = lambda: self._pruned(parent)  # noqa: E731
        return self._ticket(_Arm("imp", level, parent, pruned, start, self.start_step))

    def _control(self, control: Control, ticket: Ticket) -> Ticket:
        seed = self.session.seed("imp", control, ticket.level)
        masks: dict[Control, Callable[[], Masks]] = {
            "random": lambda: shuffle_layers(ticket.masks, seed),
            "reinit": lambda: ticket.masks,
            "oneshot": lambda: self._oneshot(ticket.masks.kept),
        }
        fresh = lambda: Start(self.session.model_spec.build(seed).state_dict())  # noqa: E731
        start = fresh if control == "reinit" else self._rewound
        return self._ticket(
            _Arm(control, ticket.level, ticket, masks[control], start, self.start_step)
        )

    def _ticket(self, arm: _Arm) -> Ticket:
        """The finished ticket, or else: its masks, its training, its files."""
        session, engine = self.session, self.session.engine
        finished = engine.on_main(lambda: self.tickets.find(self.stage, arm.name))
        if finished is not None:
            session.display.skip(self.stop - arm.first_step)
            return finished
        masks, start = arm.masks(), arm.start()
        engine.require_same(masks.digest(), f"the masks of {self.stage}/{arm.name}")
        on_device = masks.to(engine.device)
        outcome = session.train(
            self._phase(arm),
            self.network,
            start,
            lambda model, optimizer: FixedMasks(on_device, model, optimizer),
        )
        ticket = Ticket(
            method=arm.method,
            level=arm.level,
            density=masks.density,
            masks=masks,
            model=session.model_spec,
            step=self.start_step,
            weights_digest=self._store_weights(arm, start),
            parent=None if arm.parent is None else arm.parent.id,
            config={"imp": asdict(self.config), "settings": asdict(session.settings)},
            metrics={split: asdict(result) for split, result in outcome.evaluations.items()},
            timing={"images_per_second": outcome.images_per_second},
            versions=software_versions(),
            stage=self.stage,
            name=arm.name,
            objects=self.tickets.objects,
        )
        engine.on_main(lambda: self.tickets.write(ticket))
        session.display.say(_line(ticket))
        return ticket

    def _phase(self, arm: _Arm) -> Phase:
        schedule = self.session.schedule
        finetunes = arm.is_pruned_ticket and self.config.mode == "finetune"
        return Phase(
            self.stage,
            arm.name,
            start=arm.first_step,
            stop=self.stop,
            schedule=constant(schedule(self.stop - 1)) if finetunes else schedule,
            seed_labels=("imp", "order", 0 if self.config.same_order else arm.level),
            keep=frozenset({self.start_step}) if arm.level == 0 else frozenset(),
        )

    # Masks and weights -------------------------------------------------------------------

    def _pruned(self, parent: Ticket) -> Masks:
        """The parent's masks, less its smallest final weights."""
        model = self.network.module
        model.load_state_dict(self._final(parent).weights)
        scores = magnitude(model, exclude=self.config.exclude)
        masks = parent.masks.to(self.session.engine.device)
        try:
            return prune_fraction(scores, masks, self.config.prune_fraction, self.config.scope).to(
                "cpu"
            )
        except ValueError as error:
            raise RunError(f"{self.stage}/{parent.name}: cannot be pruned: {error}") from error

    def _oneshot(self, count: int) -> Masks:
        self.network.module.load_state_dict(self._rewound().weights)
        return keep_count(magnitude(self.network.module, exclude=self.config.exclude), count).to(
            "cpu"
        )

    def _final(self, ticket: Ticket) -> Start:
        """The weights at the end of a ticket's training."""
        return Start(self._checkpoint(ticket.name, self.stop)["model"])

    def _rewound(self) -> Start:
        """The weights at step k of the dense training, and the optimizer's state if asked for."""
        return self._at_k

    @cached_property
    def _at_k(self) -> Start:
        state = self._checkpoint("level-00", self.start_step)
        return Start(state["model"], state["optimizer"] if self.config.rewind_optimizer else None)

    def _checkpoint(self, name: str, step: int) -> dict[str, Any]:
        return self.session.checkpoints(f"{self.stage}/{name}").load(step)

    def _store_weights(self, arm: _Arm, start: Start) -> str | None:
        """The digest of the state at k that the arm starts from; `None` if it was not rewound."""
        if arm.is_pruned_ticket and self.config.mode != "weights":
            return None
        weights = self._rewound().weights if arm.level == 0 else start.weights
        digest: str = self.session.engine.on_main(
            lambda: write_weights(self.tickets.objects, weights)
        )
        return digest


def _line(ticket: Ticket) -> str:
    accuracy = "  ".join(
        f"{split} accuracy {values['accuracy']:.4f}" for split, values in ticket.metrics.items()
    )
    rate = ticket.timing["images_per_second"]
    name = f"{ticket.stage}/{ticket.name}"
    return f"{name}: density {ticket.density:.2%}  {accuracy}  {rate:,.0f} images/s"
