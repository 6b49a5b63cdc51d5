"""Through which a training is watched, saved and stopped."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from data.loader import EvaluationSet
from train.checkpoint import Checkpoints
from train.engine import Engine
from train.evaluate import Evaluation
from train.metrics import Recorder
from train.progress import Display
from train.signals import Signals
from train.state import TrainState
from train.watch import Throughput


@dataclass
class Instruments:
    """What `fit` reports to, and what tells it to save or to stop."""

    checkpoints: Checkpoints
    recorder: Recorder
    display: Display
    signals: Signals
    held_out: tuple[str, EvaluationSet]
    """the split, with its name, that is measured while the training goes on"""
    identity: dict[str, Any] = field(default_factory=dict)
    """`stage` and `level`, as they stand in every record"""

    def record_training(
        self, state: TrainState, *, stop: int, loss: float, rate: float, throughput: Throughput
    ) -> None:
        """Records the loss over the global batch of the last step, and its learning rate.

        `stop` is the step at which the training ends.
        """
        lap = throughput.lap()
        fact = {
            "event": "train",
            **self.identity,
            "step": state.step,
            "stop": stop,
            "epoch": state.step / state.loader.steps_per_epoch,
            "loss": loss,
            "lr": rate,
            "density": state.sparsity.density,
            **state.sparsity.facts(),
        }
        if state.loader.skips_bad:
            place = (str(self.identity.get("stage")), str(self.identity.get("level")))
            fact["replaced"] = self.recorder.num_replaced(*place)
        timing = {"images_per_second": lap.images_per_second, "data_wait": lap.data_wait}
        self.recorder.record(fact, timing)
        self.display.status.density = state.sparsity.density
        self.display.advance(step=state.step, lap=lap, loss=loss)

    def record_replacements(self, state: TrainState, engine: Engine) -> None:
        """Records the images that any rank had to replace, each once, in the order of the steps.

        It comes before all other records and before each save, so that a resumed run's lines
        stand in the same order.
        """
        if not state.loader.skips_bad:
            return
        replaced = state.loader.replacements()
        if not engine.reduce(torch.tensor(len(replaced), device=engine.device)):
            return
        for one in sorted(one for part in engine.gather(replaced) for one in part):
            fact = {"event": "replaced", **self.identity, **one._asdict()}
            self.recorder.record(fact)
            self.display.say(
                f"step {one.step}: {one.image} cannot be used ({one.reason}); {one.by} in its place"
            )

    def record_evaluation(self, state: TrainState, split: str, result: Evaluation) -> None:
        """Records what the model reaches on a split at this step."""
        place = {"event": "evaluation", **self.identity, "split": split, "step": state.step}
        self.recorder.record({**place, **asdict(result)})
        self.display.status.accuracy = result.accuracy
