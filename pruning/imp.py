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
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from data.errors import RunError, UserError
from pruning.allocate import Scope, keep_count, prune_fraction, shuffle_layers
from pruning.masks import Masks
from pruning.program import Arm, masks_of, train_ticket
from pruning.scores import magnitude
from pruning.sources import Outlook, Promise
from pruning.store import TicketFolder
from pruning.tickets import Ticket
from pruning.weight_store import StoredWeights, write_weights
from train.duration import check_durations
from train.schedule import constant
from train.session import Session, Start
from train.settings import Settings

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
    """the levels that have controls; by default all"""

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


def foresee_imp(stage: str, config: ImpConfig, settings: Settings, outlook: Outlook) -> Promise:
    """What the stage will have made."""
    lacking = ""
    if config.mode != "weights":
        lacking = (
            f"its mode is {config.mode!r}, which keeps no weights of step k to train another "
            "ticket from; set mode = 'weights' there"
        )
    return Promise(dict.fromkeys(range(config.num_rounds + 1), settings.model), lacking)


def run_imp(session: Session, stage: str, config: ImpConfig) -> list[Ticket]:
    """All tickets of the stage and their controls; trains only what is not finished yet.

    Raises `UserError` where k lies beyond the end of the training.
    """
    return _Imp(session, stage, config).run()


class _Imp:
    """The program: each arm is trained by `train_ticket`, at once if it is finished."""

    def __init__(self, session: Session, stage: str, config: ImpConfig) -> None:
        self.session, self.stage, self.config = session, stage, config
        self.tickets = TicketFolder(session.folder)
        self.start_step, self.stop = session.steps(config.rewind), session.total_steps
        rewind = f"stages.{stage}.rewind = {config.rewind!r} is step"
        session.require_before_end(self.start_step, rewind)
        self.network = session.build_network()
        try:
            self.everything = Masks.ones(self.network.module, config.exclude).to("cpu")
        except UserError as error:
            raise UserError(f"stages.{stage}.{error}") from None
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
        return self._train(
            Arm(
                masks=lambda: self.everything,
                start=lambda: Start(self._initial),
                first_step=0,
                keep=frozenset({self.start_step}),
                weights=lambda start: self._store(self._saved_at_k("model")),
                **self._common("imp", 0),
            )
        )

    def _level(self, level: int, parent: Ticket) -> Ticket:
        mode, schedule = self.config.mode, self.session.schedule
        rewinds = mode == "weights"
        arm = Arm(
            masks=lambda: self._pruned(parent),
            start=self._rewound if rewinds else lambda: self._final(parent),
            first_step=self.start_step,
            weights=lambda start: self._dense_ticket.stored_weights if rewinds else None,
            parent=parent,
            search_steps=parent.total_steps,
            **self._common("imp", level),
        )
        if mode == "finetune":
            arm = replace(arm, schedule=constant(schedule(self.stop - 1)))
        return self._train(arm)

    def _control(self, control: Control, ticket: Ticket) -> Ticket:
        fresh_start = control == "reinit"
        seed = self.session.seed("imp", control, ticket.level)
        masks: dict[Control, Callable[[], Masks]] = {
            "random": lambda: shuffle_layers(self._masks(ticket), seed),
            "reinit": lambda: self._masks(ticket),
            "oneshot": lambda: self._oneshot(ticket.stored_masks.num_kept),
        }

        def fresh() -> Start:
            return Start(self.session.model_spec.build(seed).state_dict())

        return self._train(
            Arm(
                masks=masks[control],
                start=fresh if fresh_start else self._rewound,
                first_step=self.start_step,
                weights=lambda start: (
                    self._store(start.weights) if fresh_start else self._dense_ticket.stored_weights
                ),
                parent=ticket,
                control=True,
                search_steps=_searched(control, ticket, self.start_step),
                **self._common(control, ticket.level),
            )
        )

    def _common(self, method: str, level: int) -> dict[str, Any]:
        """What all arms have alike."""
        return {
            "stage": self.stage,
            "method": method,
            "level": level,
            "stop": self.stop,
            "schedule": self.session.schedule,
            "seed_labels": ("imp", "order", 0 if self.config.same_order else level),
            "rewind_step": self.start_step,
            "config": {"imp": asdict(self.config)},
        }

    def _train(self, arm: Arm) -> Ticket:
        return train_ticket(self.session, self.tickets, self.network, arm)

    # Masks and weights -------------------------------------------------------------------

    def _masks(self, ticket: Ticket) -> Masks:
        return masks_of(self.tickets, ticket, self.session.engine)

    def _pruned(self, parent: Ticket) -> Masks:
        """The parent's masks, less its smallest final weights."""
        model = self.network.module
        model.load_state_dict(self._final(parent).weights)
        scores = magnitude(model, exclude=self.config.exclude)
        engine, fraction = self.session.engine, self.config.prune_fraction
        masks = self._masks(parent).to(engine.device)
        try:
            pruned = prune_fraction(scores, masks, fraction, self.config.scope, engine).to("cpu")
        except ValueError as error:
            raise RunError(f"{self.stage}/{parent.name}: cannot be pruned: {error}") from error
        if not pruned.kept:
            raise UserError(
                f"stages.{self.stage}.prune_fraction = {fraction} leaves none of the {masks.kept} "
                f"weights of {self.stage}/{parent.name}: prune less, or in fewer rounds"
            )
        return pruned

    def _oneshot(self, count: int) -> Masks:
        self.network.module.load_state_dict(self._rewound().weights)
        scores = magnitude(self.network.module, exclude=self.config.exclude)
        return keep_count(scores, count, ranks=self.session.engine).to("cpu")

    def _final(self, ticket: Ticket) -> Start:
        """The weights at the end of a ticket's training."""
        return Start(self._saved("model", ticket.name, self.stop))

    def _rewound(self) -> Start:
        """The weights at step k of the dense training, and the optimizer's state if asked for."""
        return self._at_k

    @cached_property
    def _at_k(self) -> Start:
        optimizer = self._saved_at_k("optimizer") if self.config.rewind_optimizer else None
        return Start(self._dense_ticket.weights(), optimizer)

    @cached_property
    def _dense_ticket(self) -> Ticket:
        """Level 0, whose stored weights at step k all that is rewound has."""
        dense = self.session.engine.on_main(lambda: self.tickets.find(self.stage, "level-00"))
        assert dense is not None, "level 0 is trained before anything is rewound"
        return dense

    def _saved_at_k(self, part: str) -> dict[str, Any]:
        return self._saved(part, "level-00", self.start_step)

    def _saved(self, part: str, name: str, step: int) -> dict[str, Any]:
        """A part of a checkpoint; the others' tensors are not read."""
        place = f"{self.stage}/{name}"
        others = tuple(f"{one}/" for one in ("model", "optimizer", "ema") if one != part)
        try:
            found: dict[str, Any] = self.session.checkpoints(place).load(step, skip=others)[part]
        except RunError as error:
            folder = self.session.folder / place
            raise RunError(f"{error}; remove {folder} to train that level again") from error
        return found

    def _store(self, weights: dict[str, Tensor]) -> StoredWeights:
        return write_weights(self.tickets.objects, weights, self.session.engine)


def _searched(control: Control, ticket: Ticket, start_step: int) -> int:
    """What a control needs before its training: the ticket's masks, or W_k alone."""
    return int(ticket.timing.get("search_steps", 0)) if control == "reinit" else start_step
