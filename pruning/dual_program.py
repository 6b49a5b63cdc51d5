"""Dual tickets as a stage of a run: transformed for a random structure, pruned to it, trained.

Bai et al. 2022 (2203.04248); `pruning.dual` has the transformation. For each density the dense
network is trained from its initial weights in a phase of its own, `level-00-transform`, under a
penalty on the weights that will go. Then they go, and what is left is trained on the schedule, with
a fresh optimizer; normalisations and their statistics are carried over.

Choices where the paper leaves them open: all densities share one order in which weights go, and all
transformations and all trainings their order of data; the moving average of `train.ema` begins with
the training; `budget` stretches the schedule over all of its steps.
"""

from dataclasses import asdict, dataclass
from functools import cache, partial

from torch import Tensor

from data.errors import UserError
from pruning.dual import Going, Transformation
from pruning.dual_config import Control, DualConfig
from pruning.program import Arm, around, masks_of, train_ticket
from pruning.store import TicketFolder
from pruning.tickets import Ticket
from pruning.weight_store import StoredWeights, write_weights
from train.schedule import constant, stretched
from train.session import Phase, Session, Start


def run_dual(session: Session, stage: str, config: DualConfig) -> None:
    """Makes all tickets of the stage and their controls, as far as they are not finished yet.

    Raises `UserError` for a ramp that its increments do not finish, or a batch that does not fit.
    """
    _Dual(session, stage, config).run()


@dataclass(frozen=True)
class _Transformed:
    """The network after the removal, and what it reached just before and just after."""

    weights: dict[str, Tensor]
    metrics: dict[str, dict[str, float]]


class _Dual:
    """The program: each arm is trained by `train_ticket`, at once if it is finished."""

    def __init__(self, session: Session, stage: str, config: DualConfig) -> None:
        self.session, self.stage, self.config = session, stage, config
        self.tickets, where = TicketFolder(session.folder), f"stages.{stage}.transform"
        if config.transform.batch_size is not None:
            session.require_batch_size(f"{where}.batch_size", config.transform.batch_size)
        self.course = config.transform.course(session, where)
        self.network = session.build_network()
        model, seed = self.network.module, session.seed("dual", "masks")
        try:
            self.going = Going.of(model, pick=config.pick, seed=seed, exclude=config.exclude)
        except UserError as error:
            raise UserError(f"stages.{stage}.{error}") from None
        self._initial = {k: v.cpu().clone() for k, v in model.state_dict().items()}

    def run(self) -> None:
        total, transform = self.session.total_steps, self.course.steps
        longer = {"random": total, "budget": total + transform}
        num_steps = transform + total + sum(longer[control] for control in self.config.controls)
        self.session.display.plan(num_steps * len(self.config.densities))
        for level, density in enumerate(self.config.densities):
            ticket = self._ticket(level, density)
            for control in self.config.controls:
                self._control(control, ticket)

    # The arms ----------------------------------------------------------------------------

    def _ticket(self, level: int, density: float) -> Ticket:
        transformed = cache(partial(self._transformed, level, density))
        return self._train(
            Arm(
                stage=self.stage,
                method="dual",
                level=level,
                masks=lambda: self.going.kept(density),
                start=lambda: Start(transformed().weights),
                search_steps=self.course.steps,
                start_steps=self.course.steps,
                measured=lambda: transformed().metrics,
                first_step=0,
                stop=self.session.total_steps,
                schedule=self.session.schedule,
                seed_labels=("dual", "order"),
                weights=self._store,
                config={"dual": asdict(self.config)},
            )
        )

    def _control(self, control: Control, ticket: Ticket) -> Ticket:
        """The ticket's masks on the initial weights, trained as long, or as long in all."""
        total = self.session.total_steps
        stop = total + (self.course.steps if control == "budget" else 0)
        return self._train(
            Arm(
                stage=self.stage,
                method=control,
                level=ticket.level,
                masks=lambda: masks_of(self.tickets, ticket, self.session.engine),
                start=lambda: Start(self._initial),
                first_step=0,
                stop=stop,
                schedule=stretched(self.session.schedule, total, stop),
                seed_labels=("dual", "order"),
                weights=self._store,
                parent=ticket,
                control=True,
                config={"dual": asdict(self.config)},
            )
        )

    def _train(self, arm: Arm) -> Ticket:
        return train_ticket(self.session, self.tickets, self.network, arm)

    def _store(self, start: Start) -> StoredWeights:
        return write_weights(self.tickets.objects, start.weights, self.session.engine)

    # The transformation ------------------------------------------------------------------

    def _transformed(self, level: int, density: float) -> _Transformed:
        """Transforms, or goes on doing it, or finds it done; and removes what was to go."""
        session, config = self.session, self.config.transform
        masks = self.going.kept(density)
        phase = Phase(
            self.stage,
            f"level-{level:02d}-transform",
            start=0,
            stop=self.course.steps,
            schedule=constant(1.0),
            seed_labels=("dual", "transform"),
            optimizer=config.optimizer(session.settings.optimizer),
            batch_size=config.batch_size,
            averaged=False,
        )
        session.engine.require_same(masks.digest(), f"the masks for {phase.name}")
        make_sparsity = partial(Transformation, self.going, density, self.course)
        outcome = session.train(phase, self.network, Start(self._initial), make_sparsity)
        masks.project_(self.network.module)
        after = session.evaluate(self.network.module)
        session.record_start(self.stage, f"level-{level:02d}", after)
        weights = {k: v.cpu().clone() for k, v in self.network.module.state_dict().items()}
        return _Transformed(weights, around("removal", outcome.evaluations, after))
