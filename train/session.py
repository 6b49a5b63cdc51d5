"""A stage of a run as one rank sees it, and `Session.train`: one restartable training in it.

A lottery-ticket method is a program over a session: it asks for networks, trains them phase by
phase, and records what comes of it. Each phase has its own folder of checkpoints; a phase that
was interrupted goes on from the newest valid one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from data.config import ON_DISK
from data.errors import UserError
from data.files import Folder
from data.loader import Batch
from data.order import stream_seed
from data.record import Record, described
from data.sources import Data, Placement, decoder_of, open_data, prepare_data
from data.stream import SizeOfEpoch
from train.checkpoint import Checkpoints
from train.duration import Duration
from train.engine import Engine
from train.evaluate import Evaluation, evaluate
from train.instruments import Instruments
from train.loop import Plan, fit
from train.metrics import Recorder
from train.models import ModelSpec
from train.objective import Objective
from train.optim import build_optimizer, load_optimizer_state
from train.progress import Display
from train.rng import seed_everything
from train.schedule import Schedule, build_schedule
from train.settings import Settings
from train.signals import Signals
from train.sizes import size_of_epoch
from train.state import Network, Sparsity, TrainState

MakeSparsity = Callable[[nn.Module, Optimizer], Sparsity]


@dataclass(frozen=True)
class Phase:
    """One training from step `start` to step `stop`, on a schedule and in a folder of its own."""

    stage: str
    level: str
    start: int
    stop: int
    schedule: Schedule
    seed_labels: tuple[str | int, ...]
    """which random stream orders and augments the data: another for each training"""
    keep: frozenset[int] = frozenset()
    """steps whose checkpoints stay; the last one's always does"""

    @property
    def name(self) -> str:
        return f"{self.stage}/{self.level}"


@dataclass(frozen=True)
class Outcome:
    """What a phase came to; the network that was trained holds the final weights."""

    evaluations: dict[str, Evaluation]
    sparsity: Sparsity
    """as it ended: a method may have changed its masks"""


@dataclass(frozen=True)
class Start:
    """Where a phase begins: weights (and buffers), and optionally an optimizer's state."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Any] | None = None


@dataclass
class Session:
    """One stage of a run: its settings, its data, and the instruments that all phases share."""

    settings: Settings
    engine: Engine
    folder: Folder
    recorder: Recorder
    display: Display
    signals: Signals
    data: Data = field(init=False)
    data_record: Record = field(init=False)
    """what the data are, to be compared with what an earlier attempt saw"""
    total_steps: int = field(init=False)

    def __post_init__(self) -> None:
        self._open_data()
        length = Duration.parse(self.settings.train.total)
        self.total_steps = length.steps(self.data.steps_per_epoch)
        lengths = {"train.total": self.settings.train.total}
        lengths["train.evaluate"] = self.settings.train.evaluate or "1it"
        lengths["checkpoint.every"] = self.settings.checkpoint.every or "1it"
        for key, text in lengths.items():
            if self.steps(text) < 1:
                raise UserError(f"{key} = {text!r}: is less than one step")
        self._size_of_epoch(0)
        mixes = self.settings.train.mixup or self.settings.train.cutmix
        if mixes and self.settings.data.batch_size % (2 * self.engine.world_size):
            raise UserError(
                f"data.batch_size = {self.settings.data.batch_size}: train.mixup and train.cutmix "
                f"pair the images of each rank: choose a multiple of {2 * self.engine.world_size}"
            )

    def _open_data(self) -> None:
        config, engine = self.settings.data, self.engine
        cache = self.folder / "manifests" if config.manifest is None else Folder(config.manifest)
        self.data_record, token = engine.on_main(
            lambda: prepare_data(config, cache, self.display.work), patient=True
        )
        place = Placement(
            engine.device, engine.rank, engine.world_size, engine.dtype, engine.channels_last
        )
        self.data = open_data(config, place, cache=cache, token=token)
        if config.kind in ON_DISK:
            self.data_record["decoder"] = decoder_of(config, engine.device)
            self.display.say(described(self.data_record))

    # Lengths and networks ----------------------------------------------------------------

    def steps(self, text: str) -> int:
        """A duration in optimizer steps of this session's data and length."""
        return Duration.parse(text).steps(self.data.steps_per_epoch, self.total_steps)

    @property
    def schedule(self) -> Schedule:
        """The learning rate's factor over the whole training."""
        return build_schedule(
            self.settings.schedule,
            steps_per_epoch=self.data.steps_per_epoch,
            total_steps=self.total_steps,
        )

    @property
    def _size_of_epoch(self) -> SizeOfEpoch:
        return size_of_epoch(
            self.settings.data,
            steps_per_epoch=self.data.steps_per_epoch,
            total_steps=self.total_steps,
        )

    @property
    def model_spec(self) -> ModelSpec:
        """The shape of this session's network."""
        return ModelSpec.of(
            self.settings.model,
            num_classes=len(self.data.classes),
            in_chans=self.data.image_shape[0],
        )

    def require_before_end(self, step: int, what: str) -> None:
        """Raises `UserError`, beginning with `what`, unless `step` leaves anything to train."""
        if not step < self.total_steps:
            raise UserError(
                f"{what} {step}, beyond the end of the training at step {self.total_steps} "
                f"(train.total = {self.settings.train.total!r})"
            )

    def seed(self, *labels: str | int) -> int:
        """A seed of the run for one purpose."""
        return stream_seed(self.settings.seed, *labels)

    def build_network(
        self, spec: ModelSpec | None = None, adapt: Callable[[nn.Module], None] | None = None
    ) -> Network:
        """A network with initial weights ready for training: by default the session's.

        `adapt` changes it in place before anything distributed sees it. Raises `UserError` where
        it does not take the data set's images.
        """
        spec = spec or self.model_spec
        model = spec.build(self.seed("init"))
        if adapt is not None:
            adapt(model)
        self._try_shapes(model.eval(), spec.name)
        example = self.engine.example(self.data.image_shape, self.settings.data.batch_size)
        return self.engine.prepare(model.train(), example)

    def _try_shapes(self, model: nn.Module, name: str) -> None:
        device = next(model.parameters()).device
        for shape in self.data.all_shapes:
            try:
                with torch.no_grad():
                    model(torch.zeros(2, *shape, device=device))
            except (AssertionError, RuntimeError, ValueError) as error:
                reason = str(error).partition("\n")[0]
                raise UserError(
                    f"model.name = {name!r} does not take images of "
                    f"{'x'.join(map(str, shape))}: {reason}"
                ) from None

    def first_batches(self, num_batches: int, *labels: str | int) -> Iterator[Batch]:
        """This rank's shares of the first global batches of a stream, cut into micro-batches."""
        loader = self.data.loader(self.seed(*labels))
        num_parts = self.engine.num_micro_batches(loader.batch_size)
        for images, targets in islice(loader, num_batches):
            parts = zip(
                images.tensor_split(num_parts), targets.tensor_split(num_parts), strict=True
            )
            yield from (Batch(self.engine.place(part), target) for part, target in parts)

    # Training ----------------------------------------------------------------------------

    def checkpoints(self, phase: str) -> Checkpoints:
        """The checkpoints of a phase by its name `stage/level`."""
        return Checkpoints(
            self.folder / f"{phase}/checkpoints",
            self.engine,
            keep=self.settings.checkpoint.keep,
            asynchronous=self.settings.checkpoint.asynchronous,
            timeout=self.settings.checkpoint.timeout,
            say=self.display.say,
        )

    def train(
        self, phase: Phase, network: Network, start: Start, make_sparsity: MakeSparsity
    ) -> Outcome:
        """Trains `network` through `phase`, from `start` or from the newest valid checkpoint.

        Afterwards the checkpoint of the last step exists and `network` holds its weights.
        """
        state = self._begin(phase, network, start, make_sparsity)
        self.display.begin(
            phase.name,
            density=state.sparsity.density,
            step=state.step,
            start=phase.start,
            stop=phase.stop,
        )
        checkpoints = self.checkpoints(phase.name)
        instruments = Instruments(
            checkpoints,
            self.recorder,
            self.display,
            self.signals,
            held_out=self._held_out(),
            identity={"stage": phase.stage, "level": phase.level},
        )
        with checkpoints:
            fit(state, self._plan(phase), engine=self.engine, instruments=instruments)
        evaluations = {}
        for split, images in self.data.evaluation.items():
            evaluations[split] = evaluate(
                state.evaluated, images, self.engine, flip=self.settings.train.eval_flip
            )
            instruments.record_evaluation(state, split, evaluations[split])
        self.recorder.sync()
        return Outcome(evaluations, state.sparsity)

    def _begin(
        self, phase: Phase, network: Network, start: Start, make_sparsity: MakeSparsity
    ) -> TrainState:
        seed_everything(self.seed(*phase.seed_labels, "rank", self.engine.rank))
        network.module.load_state_dict(start.weights)
        optimizer = build_optimizer(network.module, self.settings.optimizer)
        if start.optimizer is not None:
            load_optimizer_state(network.module, optimizer, start.optimizer)
        sparsity = make_sparsity(network.module, optimizer)
        loader = self.data.loader(self.seed(*phase.seed_labels), self._size_of_epoch)
        loader.load_state_dict({"position": phase.start})
        decay = self.settings.train.ema
        state = TrainState(
            network=network,
            optimizer=optimizer,
            sparsity=sparsity,
            scaler=self.engine.make_scaler(),
            loader=loader,
            ema=None if decay is None else ModelEmaV3(network.module, decay=decay),
            rank=self.engine.rank,
            device=self.engine.device,
            step=phase.start,
        )
        latest = self.checkpoints(phase.name).load_latest(at_most=phase.stop)
        if latest is not None:
            step, saved = latest
            state.load_state_dict(saved)
            self.display.say(f"{phase.name}: goes on at step {step} of {phase.stop}")
        return state

    def _plan(self, phase: Phase) -> Plan:
        settings = self.settings
        every, save = settings.train.evaluate, settings.checkpoint.every
        return Plan(
            stop=phase.stop,
            schedule=phase.schedule,
            learning_rate=settings.optimizer.lr,
            objective=Objective(
                len(self.data.classes),
                label_smoothing=settings.train.label_smoothing,
                mixup=settings.train.mixup,
                cutmix=settings.train.cutmix,
                seed=self.seed(*phase.seed_labels),
            ),
            log_every=settings.log.every,
            evaluate_every=None if every is None else self.steps(every),
            save_every=None if save is None else self.steps(save),
            keep=phase.keep | {phase.stop},
            eval_flip=settings.train.eval_flip,
        )

    def _held_out(self) -> tuple[str, Any]:
        split = "validation" if "validation" in self.data.evaluation else "test"
        return split, self.data.evaluation[split]
