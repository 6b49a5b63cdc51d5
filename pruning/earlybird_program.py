"""Early-bird tickets as a stage of a run: one search for all densities, then a training of each.

You et al. 2020 (1909.11957); `pruning.earlybird` has the search, `pruning.channels` what it looks
at. The dense network is trained once, in `search`, until all densities are drawn; each ticket is
what its density keeps of the weights at the step at which it was drawn, and is trained from there
to the end of the schedule.

Choices where the paper leaves them open: search and trainings see one stream of data; a training
begins with a fresh optimizer, and has no penalty (the authors keep theirs, to prune further); the
moving average of `train.ema` begins with it.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache, partial

from torch import Tensor

from data.errors import RunError, UserError
from pruning.allocate import random_masks
from pruning.channels import Channels
from pruning.earlybird import NUM_MASKS, EarlyBird, Search
from pruning.earlybird_config import EarlyBirdConfig
from pruning.masks import Masks, count_kept
from pruning.program import Arm, masks_of, train_ticket
from pruning.store import TicketFolder
from pruning.tickets import INDEX, Ticket
from pruning.weight_store import StoredWeights, write_weights
from train.checkpoint import Checkpoints
from train.session import Phase, Session, Start
from train.state import Sparsity

_SEARCH = "search"
"""the folder of the dense training in which tickets are drawn"""


def run_earlybird(session: Session, stage: str, config: EarlyBirdConfig) -> None:
    """Draws and trains all tickets of the stage and their controls, as far as not finished yet.

    Raises `UserError` for an interval that leaves no time for five masks, or a density of less than
    one channel a layer; `RunError`, once all others are trained, for a density that is not drawn.
    """
    _EarlyBird(session, stage, config).run()


class _EarlyBird:
    """The program: each arm is trained by `train_ticket`, at once if it is finished."""

    def __init__(self, session: Session, stage: str, config: EarlyBirdConfig) -> None:
        self.session, self.stage, self.config = session, stage, config
        self.tickets, self.total = TicketFolder(session.folder), session.total_steps
        self.stop = min(session.steps(config.search), self.total - 1)  # something is to be trained
        self._check_interval()
        self.network = session.build_network()
        self.channels = Channels(session.model_spec.build(), session.data.image_shape)
        self._initial = {k: v.cpu().clone() for k, v in self.network.module.state_dict().items()}
        try:
            scores = self.channels.scores(self._initial)
            self.channels.keep(scores, min(config.density), config.of)
        except UserError as error:
            raise UserError(f"stages.{stage}: {session.model_spec.name}: {error}") from None

    def _check_interval(self) -> None:
        interval = self.session.steps(self.config.interval)
        where = f"stages.{self.stage}.interval = {self.config.interval!r}"
        if interval < 1:
            raise UserError(f"{where}: is less than one step")
        if interval * NUM_MASKS > self.stop:
            raise UserError(
                f"{where}: {NUM_MASKS} masks, which a ticket takes, are there after "
                f"{interval * NUM_MASKS} steps, and the search ends at step {self.stop} of "
                f"{self.total}: choose a shorter interval, or a longer search"
            )

    def run(self) -> None:
        if self._is_finished():
            return
        self.session.display.plan(self.stop)
        found = self._searched()
        num_arms = 1 + len(self.config.controls)
        lengths = [self.total - step for step in found.drawn.values()]
        self.session.display.plan(sum(lengths) * num_arms)
        for level, density in enumerate(self.config.densities):
            if density in found.drawn:
                self._make(level, density, found.drawn[density])
        self._require_all(found)

    def _is_finished(self) -> bool:
        """Whether all tickets and controls are there, which need the search no more."""
        folder = self.session.folder / self.stage
        names = [
            f"level-{level:02d}{suffix}/{INDEX}"
            for level in range(len(self.config.densities))
            for suffix in ("", *(f"-{control}" for control in self.config.controls))
        ]
        return self.session.engine.on_main(lambda: all(map(folder.exists, names)))

    # The search --------------------------------------------------------------------------

    def _searched(self) -> EarlyBird:
        """Searches, or goes on doing it, or finds it done: from one draw to the next, so that the
        checkpoint of each stays."""
        config, session = self.config, self.session
        search = Search(
            self.channels,
            config.densities,
            session.steps(config.interval),
            config.of,
            config.distance,
            config.penalty,
        )
        phase = Phase(
            self.stage,
            _SEARCH,
            start=0,
            stop=self.stop,
            schedule=session.schedule,
            seed_labels=("earlybird", "order"),
            averaged=False,
        )
        make_sparsity = partial(EarlyBird, search, ranks=session.engine)
        known = self._num_known()
        while True:
            ended = partial(_has_drawn_more, known)
            outcome = session.train(
                replace(phase, ended=ended), self.network, Start(self._initial), make_sparsity
            )
            found = outcome.sparsity
            assert isinstance(found, EarlyBird)
            for density, step in found.drawn.items():
                if step == outcome.step:
                    session.display.say(f"{phase.name}: density {density} is drawn at step {step}")
            known, phase = len(found.drawn), replace(phase, start=outcome.step)
            if outcome.step == self.stop or known == len(config.densities):
                return found

    def _num_known(self) -> int:
        """How many draws an earlier attempt has gone on from."""
        checkpoints = self._checkpoints
        newest = checkpoints.latest(at_most=self.stop)
        if newest is None:
            return 0
        state = checkpoints.load(newest, skip=("model/", "optimizer/"))
        return sum(step < newest for step in state["sparsity"]["drawn"].values())

    def _require_all(self, found: EarlyBird) -> None:
        """Raises `RunError` for densities that are not drawn."""
        missing = [density for density in self.config.densities if density not in found.drawn]
        if not missing:
            return
        apart = ", ".join(f"{max(found.distances(one)):.4f} at {one}" for one in missing)
        raise RunError(
            f"stages.{self.stage}: density = {' '.join(map(str, missing))}: not drawn in "
            f"{self.stop} steps: the newest mask still differs from one of the four before it in "
            f"more than distance = {self.config.distance} of the channels ({apart}). All else is "
            "finished; under another --name raise distance, search longer, or at a shorter interval"
        )

    @property
    def _checkpoints(self) -> Checkpoints:
        return self.session.checkpoints(f"{self.stage}/{_SEARCH}")

    # The arms ----------------------------------------------------------------------------

    def _make(self, level: int, density: float, step: int) -> None:
        """The ticket of a density, and its controls, from the weights at which it was drawn."""
        weights = cache(partial(self._weights_at, step))

        def drawn() -> Masks:
            return self.channels.keep(self.channels.scores(weights()), density, self.config.of)

        ticket = self._train("earlybird", level, step, weights, drawn)
        for control in self.config.controls:
            self._train(control, level, step, weights, partial(self._random, ticket), ticket)

    def _weights_at(self, step: int) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = self._checkpoints.load(step, skip=("optimizer/",))["model"]
        return weights

    def _random(self, ticket: Ticket) -> Masks:
        """As many channels in each layer as the ticket has, at random."""
        masks = masks_of(self.tickets, ticket, self.session.engine)
        counts = {scale: count_kept(masks[scale]) for scale in self.channels.shapes}
        seed = self.session.seed("earlybird", "random", ticket.level)
        return random_masks(self.channels.shapes, counts, seed)

    def _train(
        self,
        method: str,
        level: int,
        step: int,
        weights: Callable[[], dict[str, Tensor]],
        kept: Callable[[], Masks],
        ticket: Ticket | None = None,
    ) -> Ticket:
        """Trains an arm with these channels from a step on; `ticket` is that of a control."""
        arm = Arm(
            stage=self.stage,
            method=method,
            level=level,
            masks=lambda: self.channels.masks(kept()),
            start=lambda: Start(weights()),
            first_step=step,
            stop=self.total,
            schedule=self.session.schedule,
            seed_labels=("earlybird", "order"),
            search_steps=step,
            rewind_step=step,
            weights=self._store,
            parent=ticket,
            control=ticket is not None,
            config={"earlybird": asdict(self.config)},
        )
        return train_ticket(self.session, self.tickets, self.network, arm)

    def _store(self, start: Start) -> StoredWeights:
        return write_weights(self.tickets.objects, start.weights, self.session.engine)


def _has_drawn_more(known: int, search: Sparsity) -> bool:
    assert isinstance(search, EarlyBird)
    return len(search.drawn) > known
