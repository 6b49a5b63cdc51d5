"""The trainings of a recursion before a pruning, whose networks go on, and what is seen of them."""

from functools import partial

from torch import nn

from data.files import Folder
from pruning.fixed import FixedMasks
from pruning.growth_networks import Networks, State
from pruning.masks import Masks
from pruning.trained import state_after
from train.evaluate import Evaluation
from train.session import Phase, Session, Start


class Phases:
    """Trainings of `train.total` steps, which are measured every `measure` steps."""

    def __init__(self, session: Session, stage: str, networks: Networks, measure: int) -> None:
        self.session, self.stage, self.networks = session, stage, networks
        self.total, self.measure = session.total_steps, measure

    def trained(
        self, name: str, level: int, depth: int, state: State, masks: Masks
    ) -> tuple[nn.Module, dict[str, Evaluation]]:
        """The network after its training, averaged where it is, and what it reaches.

        Trains, or goes on doing it, or finds it done.
        """
        session = self.session
        session.engine.require_same(masks.digest(), f"the masks for {self.stage}/{name}")
        phase = Phase(
            self.stage,
            name,
            start=0,
            stop=self.total,
            schedule=session.schedule,
            seed_labels=("growth", "order", level),
            evaluate_every=self.measure,
        )
        start = Start(self.begun(name, depth, state))
        make_sparsity = partial(FixedMasks, masks.to(session.engine.device))
        outcome = session.train(phase, self.networks.at(depth), start, make_sparsity)
        end = state_after(self.folder(name), self.total, session.engine)
        return self.networks.loaded(depth, end).module, outcome.evaluations

    def begun(self, name: str, depth: int, state: State) -> State:
        """`state`, with which a training begins: what it reaches is the first fact."""
        reached = self.session.evaluate(self.networks.loaded(depth, state).module)
        self.session.record_start(self.stage, name, reached)
        return state

    def curve(self, name: str) -> dict[str, float]:
        """The held-out accuracy of a training by its steps."""
        session = self.session
        curve = session.engine.on_main(
            lambda: session.recorder.curve(self.stage, name, session.held_out)
        )
        return {str(step): accuracy for step, accuracy in curve.items()}

    def folder(self, name: str) -> Folder:
        """Of a training, or of a ticket."""
        return self.session.folder / f"{self.stage}/{name}"
