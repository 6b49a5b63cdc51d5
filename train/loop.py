"""The training loop: the page to read first.

`fit` takes a `TrainState` from the step where it is to the step where it should end. It knows
neither levels nor masks nor methods: a lottery-ticket method is a program that calls `fit`
several times, and a `Sparsity` that acts inside `Engine.update`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from data.errors import Interrupted
from train.engine import Engine
from train.evaluate import evaluate
from train.instruments import Instruments
from train.objective import Objective
from train.optim import set_learning_rate
from train.schedule import Schedule
from train.state import Sparsity, TrainState
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
    eval_flip: bool = False
    """average over mirror images in evaluations"""
    ended: Callable[[Sparsity], bool] = lambda sparsity: False
    """what ends the training before `stop`, on all ranks alike; that step is kept, too"""

    def is_over(self, state: TrainState) -> bool:
        """Whether the training has come to its end."""
        return state.step >= self.stop or self.ended(state.sparsity)

    def keeps(self, state: TrainState) -> bool:
        """Whether the state is saved as it is now, and never deleted."""
        return state.step in self.keep or self.ended(state.sparsity)


def fit(state: TrainState, plan: Plan, *, engine: Engine, instruments: Instruments) -> None:
    """Trains `state` to the end of the plan, and leaves the state there.

    The last save may still be on its way: `Checkpoints.wait` tells when it is committed. Raises
    `RunError` at the first non-finite loss, naming its step (the checkpoint before it stays), and
    `Interrupted` after a signal, with the state saved.
    """
    throughput = Throughput()
    health = Health(engine)
    signals = instruments.signals

    def save() -> None:
        with throughput.paused():
            health.check()
            instruments.record_replacements(state, engine)
            instruments.recorder.sync()
            engine.broadcast_buffers(state.model)
            engine.broadcast_buffers(state.evaluated)
            instruments.checkpoints.save(state.step, state.state_dict(), kept=plan.keeps(state))
            signals.saved()

    if plan.keeps(state):
        save()
    state.model.train()
    batches = iter(state.loader)
    while not plan.is_over(state):
        with throughput.waiting():
            batch = next(batches)
        rate = set_learning_rate(state.optimizer, plan.schedule, state.step, plan.learning_rate)
        loss = engine.backward(state, batch, plan.objective)
        health.watch(loss, state.step)
        engine.update(state)
        state.step += 1
        if state.ema is not None:
            state.ema.update(state.model)
        throughput.count(state.loader.batch_size)

        if state.step % plan.log_every == 0 or plan.is_over(state):
            health.check()
            instruments.record_replacements(state, engine)
            global_loss = float(engine.reduce(loss))
            instruments.record_training(
                state, stop=plan.stop, loss=global_loss, rate=rate, throughput=throughput
            )
        if _due(plan.evaluate_every, state.step) and not plan.is_over(state):
            with throughput.paused():
                health.check()
                state.sparsity.facts()  # raises what a method has noted: nothing bad is recorded
                instruments.record_replacements(state, engine)
                split, images = instruments.held_out
                result = evaluate(state.evaluated, images, engine, flip=plan.eval_flip)
                instruments.record_evaluation(state, split, result)
        decision = signals.poll()
        planned = plan.keeps(state) or _due(plan.save_every, state.step)
        if planned or decision.save or decision.stop:
            save()
        if decision.stop:
            instruments.checkpoints.wait()
            raise Interrupted(f"saved at step {state.step}")
    health.check()


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
