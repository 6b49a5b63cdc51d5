"""Dynamic sparse training as a stage of a run: density by density, from the same initial weights.

Each density is one training from step 0, whose masks change in it (`pruning.dynamic`); the masks
with which it ends are the ticket, and its weights those of step 0. Initial masks are a function of
the run's seed, the layer, and its number of weights: SET, RigL and their static control begin with
the same. All see the data in the same order.
"""

import math
from dataclasses import asdict
from functools import partial

from data.errors import UserError
from pruning.allocate import random_masks
from pruning.densities import SHARINGS, some_for
from pruning.dynamic import SET, GradualMagnitude, RigL
from pruning.dynamic_config import DynamicConfig
from pruning.fixed import FixedMasks
from pruning.masks import Masks, prunable_shapes
from pruning.program import Arm, train_ticket
from pruning.rewiring import Ramp, Rewiring
from pruning.store import TicketFolder
from pruning.tickets import Ticket
from pruning.weight_store import write_weights
from train.session import MakeSparsity, Session, Start


def run_dynamic(session: Session, stage: str, config: DynamicConfig) -> list[Ticket]:
    """All tickets of the stage and their controls; trains only what is not finished yet.

    Raises `UserError` for a length beyond the training, or a density that empties a layer.
    """
    return _Dynamic(session, stage, config).run()


class _Dynamic:
    """The program: each density is an arm of `train_ticket`, at once if it is finished."""

    def __init__(self, session: Session, stage: str, config: DynamicConfig) -> None:
        self.session, self.stage, self.config = session, stage, config
        self.tickets = TicketFolder(session.folder)
        self.interval, self.begin, self.end = map(
            session.steps, (config.interval, config.begin, config.end)
        )
        self._check_lengths()
        self.network = session.build_network()
        model = self.network.module
        try:
            self._shapes = prunable_shapes(model, config.exclude)
            self._counts = [self._count(density) for density in config.levels]
        except UserError as error:
            raise UserError(f"stages.{stage}: {session.model_spec.name}: {error}") from None
        self._initial = {k: v.cpu().clone() for k, v in model.state_dict().items()}

    def _check_lengths(self) -> None:
        """Raises `UserError` for a time that is not within the training."""
        config, session, where = self.config, self.session, f"stages.{self.stage}"
        interval = f"{where}.interval = {config.interval!r}"
        if self.interval < 1:
            raise UserError(f"{interval}: is less than one step")
        if config.method == "gmp":
            stop = f"{where}.stop = {config.end!r} is step"
            session.require_before_end(self.end, stop)
            if self.begin >= self.end:
                raise UserError(
                    f"{stop} {self.end}, not after start = {config.begin!r} at step {self.begin}"
                )
            if self.interval > self.end - self.begin:
                raise UserError(
                    f"{interval}: is {self.interval} steps, and the ramp {self.end - self.begin}: "
                    "choose a shorter one, or an earlier start or later stop"
                )
            return
        session.require_before_end(self.interval, f"{interval}: the first change is at step")
        until = f"{where}.until = {config.end!r} is step {self.end}"
        if self.end > session.total_steps:
            raise UserError(
                f"{until}: must be at most the end of the training at step {session.total_steps} "
                f"(train.total = {session.settings.train.total!r})"
            )
        if self.interval >= self.end:
            raise UserError(
                f"{until}, before the first change at step {self.interval} (interval = "
                f"{config.interval!r}): choose a later one, or a shorter interval"
            )

    def _count(self, density: float) -> dict[str, int] | int:
        """How many weights of each layer are kept, or of all layers. Raises `UserError`."""
        if self.config.scope != "global":
            return SHARINGS[self.config.layer_densities](self._shapes, density)
        return some_for(density, sum(map(math.prod, self._shapes.values())))

    def run(self) -> list[Ticket]:
        config, session = self.config, self.session
        num_arms = len(self._counts) * (1 + len(config.controls))
        session.display.plan(session.total_steps * num_arms)
        found = []
        for level, counts in enumerate(self._counts):
            ticket = self._train(level, config.method, counts)
            found.append(ticket)
            for control in config.controls:
                found.append(self._train(level, control, counts, ticket))
        return found

    def _train(
        self, level: int, method: str, counts: dict[str, int] | int, parent: Ticket | None = None
    ) -> Ticket:
        session = self.session
        arm = Arm(
            stage=self.stage,
            method=method,
            level=level,
            masks=lambda: self._masks(method, counts),
            sparsity=lambda masks: self._sparsity(method, masks, counts),
            start=lambda: Start(self._initial),
            first_step=0,
            stop=session.total_steps,
            schedule=session.schedule,
            seed_labels=("dynamic", "order"),
            parent=parent,
            control=parent is not None,
            weights=lambda start: write_weights(
                self.tickets.objects, start.weights, session.engine
            ),
            config={"dynamic": asdict(self.config)},
        )
        return train_ticket(session, self.tickets, self.network, arm)

    def _masks(self, method: str, counts: dict[str, int] | int) -> Masks:
        """The masks with which a training begins, equal on every rank."""
        if method == "gmp" or isinstance(counts, int):
            return Masks.ones(self.network.module, self.config.exclude).to("cpu")
        return random_masks(self._shapes, counts, self.session.seed("dynamic", "masks"))

    def _sparsity(self, method: str, masks: Masks, counts: dict[str, int] | int) -> MakeSparsity:
        ranks, config = self.session.engine, self.config
        if method == "static":
            return partial(FixedMasks, masks)
        if method == "gmp":
            initial = 1.0 if config.initial is None else config.initial
            ramp = Ramp(self.interval, self.begin, self.end, counts, initial)
            return partial(GradualMagnitude, masks, ramp=ramp, ranks=ranks)
        rewiring = Rewiring(self.interval, config.moved, self.end)
        if method == "rigl":
            return partial(RigL, masks, rewiring=rewiring, ranks=ranks)
        seed = self.session.seed("dynamic", "growth")
        return partial(SET, masks, rewiring=rewiring, seed=seed, ranks=ranks)
