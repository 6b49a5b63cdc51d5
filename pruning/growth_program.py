"""Recursive growth as a stage of a run: train, prune, add a block, and keep what was learned.

The juvenile state hypothesis (2109.03862, Algorithm 2); `pruning.growth` has the block. Level d is
the network after d growths. Its unpruned layers are trained with the rest in a phase of its own,
`level-02-train`, from the weights of the level before and under its masks; then they are pruned,
each to the same density; then the ticket is trained on. The training of level 0 is that of a dense
network, `level-00-dense`, with which the control of this name goes on.

Choices where the paper leaves them open: each phase has a fresh optimizer and the schedule of the
session, compressed to the length of the training after the pruning; all networks of a level see the
data in the same order; what is pruned, and what grows, is the moving average where `train.ema` is.
Other recursions are the same program with another insertion, without growth, or without pruning; as
far as they would repeat level 0, they begin with it. `reset` prunes the dense network of the last
level; budgets stretch the schedule over all of their steps.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

from torch import nn

from data.errors import UserError
from pruning.growth import Insertion, kept_ratio, prune_new
from pruning.growth_config import Control, GrowthConfig, told_of
from pruning.growth_networks import Networks, State
from pruning.growth_phases import Phases
from pruning.masks import Masks
from pruning.program import Arm, around, masks_of, train_ticket, trained_weights_of
from pruning.store import TicketFolder
from pruning.tickets import Ticket
from pruning.weight_store import StoredWeights, write_weights
from train.schedule import stretched
from train.session import Session, Start


def run_growth(session: Session, stage: str, config: GrowthConfig) -> None:
    """Makes all tickets of the stage and their controls, as far as they are not finished yet.

    Raises `UserError` for a length of less than a step, a density that keeps nothing of a layer, or
    a preserving insertion that changes logits.
    """
    _Growth(session, stage, config).run()


@dataclass(frozen=True)
class _Recursion:
    """A way of going from level to level."""

    method: str
    insertion: Insertion
    grows: bool = True
    prunes: bool = True
    first: int = 0
    """the first level of its own; it goes on from the ticket of the level before"""

    def depth(self, level: int) -> int:
        return level if self.grows else 0

    def name(self, level: int) -> str:
        """The folder of a ticket."""
        return f"level-{level:02d}" + ("" if self.method == "growth" else f"-{self.method}")

    def phase(self, level: int) -> str:
        """The folder of the training before the pruning."""
        return f"{self.name(level)}-train" if level else _fresh(0)


@dataclass(frozen=True)
class _Turn:
    """What a level's ticket starts from, and what it reached around the pruning."""

    weights: State
    masks: Masks
    metrics: dict[str, dict[str, float]]


def _fresh(level: int) -> str:
    """The folder of the training of a fresh dense network."""
    return f"level-{level:02d}-dense"


class _Growth:
    """The program: each arm is trained by `train_ticket`, at once if it is finished."""

    def __init__(self, session: Session, stage: str, config: GrowthConfig) -> None:
        self.session, self.stage, self.config = session, stage, config
        self.tickets, self.total = TicketFolder(session.folder), session.total_steps
        self.recover, self.measure = self._steps("recover"), self._steps("measure")
        self.early = self._steps("early")
        self.networks = Networks(session, config)
        self.phases = Phases(session, stage, self.networks, self.measure)
        with told_of(stage):
            config.check(session.model_spec)
        self.recursions = {
            "growth": _Recursion("growth", config.insertion),
            "random": _Recursion("random", "random", first=1),
            "unpruned": _Recursion("unpruned", config.insertion, prunes=False),
            "ungrown": _Recursion("ungrown", config.insertion, grows=False, first=1),
        }

    def _steps(self, name: str) -> int:
        text = getattr(self.config, name)
        steps, where = self.session.steps(text), f"stages.{self.stage}.{name} = {text!r}"
        if steps < 1:
            raise UserError(f"{where}: is less than one step")
        if name == "early" and not self.measure <= steps <= self.total:
            raise UserError(
                f"{where}: is step {steps}: must be from measure, {self.measure}, to the end, "
                f"{self.total}"
            )
        return steps

    def run(self) -> None:
        config, levels = self.config, range(self.config.recursions + 1)
        if config.insertion == "preserving" and self._find("level-00") is None:
            with told_of(self.stage):
                self.networks.require_preserving()
        self.session.display.plan(self._num_steps())
        grown: list[Ticket] = []
        for level in levels:
            grown.append(self._level(self.recursions["growth"], level, grown))
            if "dense" in config.controls and self._meets(grown[-1], self._dense(grown[-1])):
                break
        for control in config.controls:
            if control in self.recursions:
                self._beside(self.recursions[control], grown)
            elif control != "dense":
                self._of_last(control, grown[-1])

    def _num_steps(self) -> int:
        """The optimizer steps of the stage, if it grows to its end."""
        num_levels, turn = self.config.recursions + 1, self.total + self.recover
        whole = num_levels * turn
        lengths: dict[str, int] = {
            "dense": num_levels * self.total,
            "random": whole - turn,
            "ungrown": whole - turn,
            "unpruned": whole,
            "reset": 2 * self.total,
            "reset-budget": whole,
            "dense-budget": whole,
        }
        return whole + sum(lengths[control] for control in self.config.controls)

    def _meets(self, ticket: Ticket, dense: Ticket) -> bool:
        """Whether a level is sparse enough, and near enough to the dense network of its depth."""
        if self.config.tolerance is None:
            return False
        one, other = (t.metrics[self.session.held_out]["accuracy"] for t in (ticket, dense))
        is_sparse = ticket.metrics["growth"]["kept_ratio"] <= (self.config.ratio or 1)
        return bool(is_sparse and abs(one - other) <= self.config.tolerance)

    # Recursions --------------------------------------------------------------------------

    def _beside(self, recursion: _Recursion, grown: list[Ticket]) -> None:
        """The controls of another recursion, a level beside each ticket."""
        own = grown[: recursion.first]
        for level in range(recursion.first, len(grown)):
            own.append(self._level(recursion, level, own, beside=grown[level]))

    def _level(
        self, recursion: _Recursion, level: int, before: list[Ticket], beside: Ticket | None = None
    ) -> Ticket:
        """The ticket of a level, `before` which are those of the levels that it goes on from."""
        previous = before[-1] if before else None
        turn = cache(partial(self._turn, recursion, level, previous))
        steps_before = 0 if previous is None else previous.total_steps
        return self._train(
            recursion.method,
            level,
            recursion.depth(level),
            start=lambda: turn().weights,
            masks=lambda: turn().masks,
            stop=self.recover,
            seed_labels=("growth", "recover", level),
            search_steps=steps_before + self.total,
            start_steps=self.total,
            measured=lambda: turn().metrics,
            parent=beside or previous,
            control=beside is not None,
        )

    def _turn(self, recursion: _Recursion, level: int, previous: Ticket | None) -> _Turn:
        """Trains a level, or goes on doing it, or finds it done; and prunes what is not pruned."""
        phase, depth = recursion.phase(level), recursion.depth(level)
        state, masks = self._grown(recursion, level, previous)
        model, before = self.phases.trained(phase, level, depth, state, masks)
        if recursion.prunes:
            masks = self._pruned(model, Masks({}) if previous is None else self._masks(previous))
        masks.project_(model)
        after = self.session.evaluate(model)
        self.session.record_start(self.stage, recursion.name(level), after)
        facts = {"kept_ratio": kept_ratio(masks, model), "early_steps": float(self.early)}
        metrics = {
            **around("pruning", before, after),
            "growth": facts,
            "curve": self.phases.curve(phase),
        }
        return _Turn({k: v.cpu().clone() for k, v in model.state_dict().items()}, masks, metrics)

    def _grown(
        self, recursion: _Recursion, level: int, previous: Ticket | None
    ) -> tuple[State, Masks]:
        """State and masks with which the training of a level begins."""
        if previous is None:
            return self.networks.first_values(0), self.networks.dense(0)
        state = trained_weights_of(self.tickets, previous, self.session.engine)
        masks = self._masks(previous)
        if not recursion.grows:
            return state, masks
        return self.networks.grown(state, masks, level, recursion.insertion)

    # Controls of one network ---------------------------------------------------------------

    def _dense(self, ticket: Ticket) -> Ticket:
        """A fresh network as deep as the ticket's."""
        level, name = ticket.level, _fresh(ticket.level)
        return self._train(
            "dense",
            level,
            level,
            start=lambda: self.phases.begun(name, level, self.networks.first_values(level)),
            masks=lambda: self.networks.dense(level),
            stop=self.total,
            measured=lambda: {"curve": self.phases.curve(name)},
            evaluate_every=self.measure,
            parent=ticket,
            control=True,
        )

    def _of_last(self, control: Control, ticket: Ticket) -> Ticket:
        """The deepest network: dense, or pruned after a dense training and set back."""
        level, resets = ticket.level, control.startswith("reset")
        budget = ticket.total_steps - (self.total if resets else 0)
        return self._train(
            control,
            level,
            level,
            start=lambda: self.networks.first_values(level),
            masks=partial(self._oneshot if resets else self.networks.dense, level),
            stop=budget if control.endswith("budget") else self.total,
            search_steps=self.total if resets else 0,
            start_steps=self.total if resets else 0,
            parent=ticket,
            control=True,
        )

    def _oneshot(self, level: int) -> Masks:
        """The largest weights of each layer after the dense training of a level."""
        state, masks = self.networks.first_values(level), self.networks.dense(level)
        model, _ = self.phases.trained(_fresh(level), level, level, state, masks)
        return self._pruned(model, Masks({}))

    # Trainings -----------------------------------------------------------------------------

    def _train(
        self,
        method: str,
        level: int,
        depth: int,
        *,
        start: Callable[[], State],
        stop: int,
        seed_labels: tuple[str | int, ...] | None = None,
        **options: Any,
    ) -> Ticket:
        arm = Arm(
            stage=self.stage,
            method=method,
            level=level,
            start=lambda: Start(start()),
            first_step=0,
            stop=stop,
            schedule=stretched(self.session.schedule, self.total, stop),
            seed_labels=seed_labels or ("growth", "order", level),
            model=self.networks.spec(depth),
            weights=self._store,
            config={"growth": asdict(self.config)},
            **options,
        )
        return train_ticket(self.session, self.tickets, partial(self.networks.at, depth), arm)

    # Tickets and masks ---------------------------------------------------------------------

    def _pruned(self, model: nn.Module, frozen: Masks) -> Masks:
        config, engine = self.config, self.session.engine
        return prune_new(model, frozen, config.density, config.exclude, engine)

    def _masks(self, ticket: Ticket) -> Masks:
        return masks_of(self.tickets, ticket, self.session.engine)

    def _find(self, name: str) -> Ticket | None:
        return self.session.engine.on_main(lambda: self.tickets.find(self.stage, name))

    def _store(self, start: Start) -> StoredWeights:
        return write_weights(self.tickets.objects, start.weights, self.session.engine)
