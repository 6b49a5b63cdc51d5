"""Pruning once, at initialisation or at step k, as a stage of a run.

SNIP (Lee et al. 2019, 1810.02340), GraSP (Wang et al. 2020, 2002.07376), SynFlow (Tanaka et al.
2020, 2006.05467), magnitudes and random masks. The dense network is trained to step k once, if k is
not 0; its weights are ranked there, and each ticket is trained from k to T on the schedule of the
whole training.

Choices where the papers leave them open: all densities, and the dense training before them, see the
data in the same order; the optimizer is fresh at k; a control is random in each layer and trained
on the same stream of data. With a pattern SynFlow takes one weight of each group at a time, and
scores anew before each.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from data.errors import Interrupted, UserError
from data.loader import Batch
from pruning.allocate import keep_count, keep_counts, random_masks, shuffle_layers
from pruning.class_samples import class_samples, require_samples
from pruning.fixed import FixedMasks
from pruning.initial_config import InitialConfig, Kept
from pruning.masks import Masks
from pruning.n_of_m import Pattern, n_of_m, random_n_of_m
from pruning.program import Arm, masks_of, train_ticket
from pruning.scores import SCORES
from pruning.scoring import require_scores
from pruning.store import TicketFolder
from pruning.synflow import Narrow, synflow_masks, synflow_narrowed
from pruning.tickets import Ticket
from pruning.weight_store import StoredWeights, write_weights
from train.rng import seed_everything
from train.session import Phase, Session, Start

_DENSE = "dense"
"""the folder of the training up to step k"""


def run_initial(session: Session, stage: str, config: InitialConfig) -> None:
    """Trains all tickets of the stage and their controls, as far as they are not finished yet.

    Raises `UserError` where k lies beyond the end, a density keeps nothing of a layer, a pattern
    does not fit, a class has too few images, or scores do not tell the weights apart.
    """
    _Initial(session, stage, config).run()


class _Initial:
    """The program: each arm is trained by `train_ticket`, at once if it is finished."""

    def __init__(self, session: Session, stage: str, config: InitialConfig) -> None:
        self.session, self.stage, self.config = session, stage, config
        self.tickets = TicketFolder(session.folder)
        self.start_step, self.stop = session.steps(config.at), session.total_steps
        at = f"stages.{stage}.at = {config.at!r} is step"
        session.require_before_end(self.start_step, at)
        self.network = session.build_network()
        with self._told():
            self.shapes = config.shapes(self.network.module)
            self.kept = config.kept(self.shapes)
            if self.config.images == "classes":
                require_samples(session, config.samples_per_class)
        self._initial = {k: v.cpu().clone() for k, v in self.network.module.state_dict().items()}

    def run(self) -> None:
        controls = self.config.controls
        num_arms = len(self.kept) * (1 + len(controls))
        self.session.display.plan(self.start_step + num_arms * (self.stop - self.start_step))
        for level, kept in enumerate(self.kept):
            ticket = self._ticket(level, kept)
            for _ in controls:
                self._control(ticket, kept)
        if "_at_k" not in vars(self):  # all was finished before
            self.session.display.skip(self.start_step)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """To the user's mistakes adds the stage."""
        try:
            yield
        except UserError as error:
            told = UserError(f"stages.{self.stage}: {error}")
            vars(told)["met_by_all"] = getattr(error, "met_by_all", False)
            raise told from None

    # The arms ----------------------------------------------------------------------------

    def _ticket(self, level: int, kept: Kept) -> Ticket:
        seed = self.session.seed("initial", "random", level)
        return self._train(
            Arm(masks=lambda: self._chosen(kept, seed), **self._common(self.config.score, level))
        )

    def _control(self, ticket: Ticket, kept: Kept) -> Ticket:
        seed = self.session.seed("initial", "control", ticket.level)

        def masks() -> Masks:
            if isinstance(kept, Pattern):
                return self._random(kept, seed)
            return shuffle_layers(masks_of(self.tickets, ticket, self.session.engine), seed)

        common = self._common("random", ticket.level)
        return self._train(Arm(masks=masks, parent=ticket, control=True, **common))

    def _common(self, method: str, level: int) -> dict[str, Any]:
        """What all arms have alike."""
        return {
            "stage": self.stage,
            "method": method,
            "level": level,
            "start": lambda: Start(self._at_k),
            "first_step": self.start_step,
            "stop": self.stop,
            "schedule": self.session.schedule,
            "seed_labels": ("initial", "order"),
            "search_steps": self.start_step,
            "rewind_step": self.start_step,
            "weights": lambda start: self._stored,
            "config": {"initial": asdict(self.config)},
        }

    def _train(self, arm: Arm) -> Ticket:
        return train_ticket(self.session, self.tickets, self.network, arm)

    # Weights -----------------------------------------------------------------------------

    @cached_property
    def _at_k(self) -> dict[str, Tensor]:
        """The state at step k, to which the dense network is trained if it was not yet."""
        if not self.start_step:
            return self._initial
        checkpoints = self.session.checkpoints(f"{self.stage}/{_DENSE}")
        if self._is_ranked():
            latest = checkpoints.load_latest(at_most=self.start_step)
            if latest is not None and latest[0] == self.start_step:
                self.session.display.skip(self.start_step)
                weights: dict[str, Tensor] = latest[1]["model"]
                return weights
        everything = Masks.ones(self.network.module, self.config.exclude)
        phase = Phase(
            self.stage,
            _DENSE,
            start=0,
            stop=self.start_step,
            schedule=self.session.schedule,
            seed_labels=("initial", "order"),
        )
        start, sparsity = Start(self._initial), partial(FixedMasks, everything)
        self.session.train(phase, self.network, start, sparsity)
        weights = checkpoints.load(self.start_step)["model"]
        return weights

    def _is_ranked(self) -> bool:
        """Whether masks were chosen before, so that the dense training came to its end."""
        first = "level-00"
        chosen = self.session.engine.on_main(lambda: self.tickets.chosen_masks(self.stage, first))
        return chosen is not None

    @cached_property
    def _stored(self) -> StoredWeights:
        return write_weights(self.tickets.objects, self._at_k, self.session.engine)

    # Masks -------------------------------------------------------------------------------

    def _chosen(self, kept: Kept, seed: int) -> Masks:
        """The masks of a ticket; `seed` is that of random ones."""
        everything = Masks.ones(self.network.module, self.config.exclude).to("cpu")
        if kept in (everything.size, {row.name: row.size for row in everything.table()}):
            return everything
        if self.config.score == "random":
            return self._random(kept, seed)
        with self._told():
            masks = self._by_flow(kept) if self.config.score == "synflow" else self._top(kept)
        return masks.to("cpu")

    def _random(self, kept: Kept, seed: int) -> Masks:
        assert not isinstance(kept, int), "random masks are drawn layer by layer"
        if isinstance(kept, Pattern):
            return random_n_of_m(self.shapes, *kept, seed, misfits=self.config.misfits)
        return random_masks(self.shapes, kept, seed)

    def _top(self, kept: Kept) -> Masks:
        if isinstance(kept, Pattern):
            return n_of_m(self._scores, *kept, misfits=self.config.misfits)
        if isinstance(kept, int):
            return keep_count(self._scores, kept, ranks=self.session.engine)
        return keep_counts(self._scores, kept, ranks=self.session.engine)

    @cached_property
    def _scores(self) -> dict[str, Tensor]:
        """The scores at step k, the same for all densities."""
        config, session = self.config, self.session
        self.network.module.load_state_dict(self._at_k)
        seed_everything(session.seed("initial", "noise", session.engine.rank))  # of dropout
        scores = SCORES[config.score].of(
            self.network.module, self._batches(), exclude=config.exclude, ranks=session.engine
        )
        require_scores(f"score = {config.score!r}", scores)
        return scores

    def _batches(self) -> Iterable[Batch] | None:
        if self.config.images == "none":
            return None
        if self.config.images == "classes":
            num = self.config.samples_per_class
            return class_samples(self.session, num, "initial", "images")
        return self._first_batches()

    def _first_batches(self) -> Iterator[Batch]:
        """As many as are asked for, which may take long. Raises `Interrupted` after a signal."""
        session = self.session
        for batch in session.first_batches(self.config.num_batches, "initial", "images"):
            yield batch
            if session.signals.poll().stop:
                raise Interrupted(f"while the weights of {self.stage} were scored")

    def _by_flow(self, kept: Kept) -> Masks:
        """SynFlow's masks, which need no data."""
        config, session = self.config, self.session
        model, shape = self.network.module, session.data.image_shape
        model.load_state_dict(self._at_k)
        common: dict[str, Any] = {"exclude": config.exclude, "ranks": session.engine}
        if not isinstance(kept, Pattern):
            return synflow_masks(model, shape, kept, iterations=config.iterations, **common)

        def down_to(num: int) -> Narrow:
            return lambda scores, left: n_of_m(
                scores, num, kept.m, misfits=config.misfits, within=left
            )

        steps = [down_to(num) for num in range(kept.m - 1, kept.n - 1, -1)]
        return synflow_narrowed(model, shape, steps, **common)
