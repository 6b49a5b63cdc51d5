"""The training loop: the page to read first.

`fit` takes a `TrainState` from the step where it is to the step where it should end. It knows
neither levels nor masks nor methods: a lottery-ticket method is a program that calls `fit`
several times, and a `Sparsity` that acts inside `Engine.update`.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from data.errors import Interrupted
from data.loader import EvaluationSet
from train.checkpoint import Checkpoints
from train.engine import Engine
from train.evaluate import Evaluation, evaluate
from train.metrics import Recorder
from train.objective import Objective
from train.optim import set_learning_rate
from train.progress import Display
from train.schedule import Schedule
from train.signals import Signals
from train.state import TrainState
from train.watch import Health, Throughput


@dataclass(frozen=True)
class Plan:
    """What a call of `fit` does, in optimizer steps counted from the start of the training."""

    stop: int
    schedule: Schedule
    learning_rate: float
    """the base rate, which the schedule multiplies"""
    objective: Objective
    log_every: int = 50
    evaluate_every: int | None = None
    save_every: int | None = None
    keep: frozenset[int] = frozenset()
    """steps whose checkpoints are saved and never deleted"""
    identity: dict[str, Any] = field(default_factory=dict)
    """`stage` and `level`, as they stand in every record"""


@dataclass
class Instruments:
    """Through which a training is watched, saved and stopped."""

    checkpoints: Checkpoints
    recorder: Recorder
    display: Display
    signals: Signals
    held_out: tuple[str, EvaluationSet]
    """the split, with its name, that is measured while the training goes on"""


def fit(state: TrainState, plan: Plan, *, engine: Engine, instruments: Instruments) -> Throughput:
    """Trains `state` up to `plan.stop` steps, and leaves the state there.

    Raises `RunError` at the first non-finite loss, naming its step (the checkpoint before it
    stays), and `Interrupted` after a signal, with the state saved.
    """
    throughput = Throughput()
    health = Health(engine)
    signals = instruments.signals

    def save() -> None:
        with throughput.paused():
            health.check()
            instruments.recorder.sync()
            kept = state.step in plan.keep
            engine.broadcast_buffers(state.model)
            engine.broadcast_buffers(state.evaluated)
            instruments.checkpoints.save(state.step, state.state_dict(), kept=kept)
            signals.saved()

    if state.step in plan.keep:
        save()
    state.model.train()
    batches = iter(state.loader)
    while state.step < plan.stop:
        batch = next(batches)
        rate = set_learning_rate(state.optimizer, plan.schedule, state.step, plan.learning_rate)
        loss = engine.backward(
            state.network,
            batch,
            plan.objective,
            step=state.step,
            batch_size=state.loader.batch_size,
        )
        health.watch(loss, state.step)
        engine.update(state.optimizer, state.sparsity, state.step)
        state.step += 1
        if state.ema is not None:
            state.ema.update(state.model)
        throughput.count(state.loader.batch_size)

        if state.step % plan.log_every == 0 or state.step == plan.stop:
            log_progress(state, plan, loss, rate, throughput, health, engine, instruments)
        if _due(plan.evaluate_every, state.step) and state.step < plan.stop:
            with throughput.paused():
                split, images = instruments.held_out
                result = evaluate(state.evaluated, images, engine)
                record_evaluation(result, split, state, plan, instruments)
        decision = signals.poll()
        if (
            decision.save
            or decision.stop
            or state.step in plan.keep
            or _due(plan.save_every, state.step)
        ):
            save()
        if decision.stop:
            raise Interrupted(f"saved at step {state.step}")
    health.check()
    return throughput


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def log_progress(
    state: TrainState,
    plan: Plan,
    loss: Tensor,
    rate: float,
    throughput: Throughput,
    health: Health,
    engine: Engine,
    instruments: Instruments,
) -> None:
    """Records the loss of the last step; the one place of the loop that waits for the device."""
    global_loss = float(engine.reduce(loss))
    health.check()
    seconds, images_per_second = throughput.lap()
    fact = {
        "event": "train",
        **plan.identity,
        "step": state.step,
        "epoch": state.step / state.loader.steps_per_epoch,
        "loss": global_loss,
        "lr": rate,
        "density": state.sparsity.density,
    }
    instruments.recorder.record(fact, {"images_per_second": images_per_second})
    instruments.display.advance(
        step=state.step, seconds=seconds, images_per_second=images_per_second, loss=global_loss
    )


def record_evaluation(
    result: Evaluation, split: str, state: TrainState, plan: Plan, instruments: Instruments
) -> None:
    """Records what the model reaches on a split at this step."""
    fact = {
        "event": "evaluation",
        **plan.identity,
        "split": split,
        "step": state.step,
        "accuracy": result.accuracy,
        "top5": result.top5,
        "loss": result.loss,
    }
    instruments.recorder.record(fact)
    instruments.display.status.accuracy = result.accuracy
