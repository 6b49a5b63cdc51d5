"""Through which a training is watched, saved and stopped."""

from dataclasses import asdict, dataclass, field
from typing import Any

from data.loader import EvaluationSet
from train.checkpoint import Checkpoints
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
        self, state: TrainState, *, loss: float, rate: float, throughput: Throughput
    ) -> None:
        """Records the loss over the global batch of the last step, and its learning rate."""
        seconds, images_per_second = throughput.lap()
        fact = {
            "event": "train",
            **self.identity,
            "step": state.step,
            "epoch": state.step / state.loader.steps_per_epoch,
            "loss": loss,
            "lr": rate,
            "density": state.sparsity.density,
            **state.sparsity.facts(),
        }
        self.recorder.record(fact, {"images_per_second": images_per_second})
        self.display.status.density = state.sparsity.density
        self.display.advance(
            step=state.step, seconds=seconds, images_per_second=images_per_second, loss=loss
        )

    def record_evaluation(self, state: TrainState, split: str, result: Evaluation) -> None:
        """Records what the model reaches on a split at this step."""
        place = {"event": "evaluation", **self.identity, "split": split, "step": state.step}
        self.recorder.record({**place, **asdict(result)})
        self.display.status.accuracy = result.accuracy
