"""A stage of a run as one rank sees it, and `Session.train`: one restartable training in it.

A lottery-ticket method is a program over a session: it asks for networks, trains them phase by
phase, and records what comes of it. Each phase has its own folder of checkpoints; a phase that
was interrupted goes on from the newest valid one.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from typing import Any

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
from train.models import ModelSpec, require_shapes
from train.objective import Objective
from train.optim import OptimizerConfig, build_optimizer, load_optimizer_state
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
    optimizer: OptimizerConfig | None = None
    """of this training (default: the session's)"""
    batch_size: int | None = None
    """of this training's global batches (default: `data.batch_size`)"""
    averaged: bool = True
    """whether the moving average of `train.ema` is kept and measured, where there is one"""
    ended: Callable[[Sparsity], bool] = lambda sparsity: False
    """what ends it before `stop`, on all ranks alike; that step's checkpoint stays, too"""
    evaluate_every: int | None = None
    """steps between two evaluations of the held-out images (default: as `train.evaluate` says)"""

    @property
    def name(self) -> str:
        """Its folder in the run: stage and level."""
        return f"{self.stage}/{self.level}"


@dataclass(frozen=True)
class Outcome:
    """What a phase came to; the network that was trained holds the final weights."""

    evaluations: dict[str, Evaluation]
    sparsity: Sparsity
    """as it ended: a method may have changed its masks"""
    step: int
    """at which it ended: `stop`, or an earlier one"""


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
    whole: Mapping[str, Any] = field(default_factory=dict)
    """options of the stage as its run has them, where this process does a part of it alone"""
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
        self._size_of_epoch()(0)
        self.require_batch_size("data.batch_size", self.settings.data.batch_size)

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

    def steps(self, text: str, *, batch_size: int | None = None) -> int:
        """A duration in optimizer steps of this session's data and length.

        In steps of another `batch_size` than the training's an epoch and a share of the training
        are as many images as in its own.
        """
        return Duration.parse(text).steps(*self._lengths(batch_size))

    def _lengths(self, batch_size: int | None) -> tuple[int, int]:
        """Steps of an epoch and of the training, in batches of this size."""
        usual = self.settings.data.batch_size
        if batch_size in (None, usual):
            return self.data.steps_per_epoch, self.total_steps
        steps_per_epoch = self.data.loader(0, batch_size=batch_size).steps_per_epoch
        return steps_per_epoch, max(1, round(self.total_steps * usual / batch_size))

    def require_batch_size(self, key: str, batch_size: int) -> None:
        """Raises `UserError` for a global batch that does not fit the data or the ranks.

        `key` names the option that it comes from.
        """
        try:
            self.data.loader(0, batch_size=batch_size)
        except UserError as error:
            raise UserError(str(error).replace("data.batch_size", key, 1)) from None
        mixes = self.settings.train.mixup or self.settings.train.cutmix
        if mixes and batch_size % (2 * self.engine.world_size):
            raise UserError(
                f"{key} = {batch_size}: train.mixup and train.cutmix pair the images of each rank: "
                f"choose a multiple of {2 * self.engine.world_size}"
            )

    @property
    def held_out(self) -> str:
        """The split that is measured while a training goes on."""
        return "validation" if "validation" in self.data.evaluation else "test"

    @property
    def schedule(self) -> Schedule:
        """The learning rate's factor over the whole training."""
        return build_schedule(
            self.settings.schedule,
            steps_per_epoch=self.data.steps_per_epoch,
            total_steps=self.total_steps,
        )

    def _size_of_epoch(self, batch_size: int | None = None) -> SizeOfEpoch:
        steps_per_epoch, total_steps = self._lengths(batch_size)
        return size_of_epoch(
            self.settings.data, steps_per_epoch=steps_per_epoch, total_steps=total_steps
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
                f"{what} {step}: must be before the end of the training at step {self.total_steps} "
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
        require_shapes(model.eval(), spec.name, self.data.all_shapes)
        example = self.engine.example(self.data.image_shape, self.settings.data.batch_size)
        return self.engine.prepare(model.train(), example)

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
            held_out=(self.held_out, self.data.evaluation[self.held_out]),
            identity={"stage": phase.stage, "level": phase.level},
        )
        with checkpoints:  # whose last save is written while the evaluation goes on
            fit(state, self._plan(phase), engine=self.engine, instruments=instruments)
            evaluations = self.evaluate(state.evaluated)
        for split, result in evaluations.items():
            instruments.record_evaluation(state, split, result)
        self.recorder.sync()
        return Outcome(evaluations, state.sparsity, state.step)

    def record_start(self, stage: str, level: str, reached: Mapping[str, Evaluation]) -> None:
        """Records what a training of its own begins with: the first fact, of step 0."""
        place = {"event": "evaluation", "stage": stage, "level": level, "step": 0}
        for split, result in reached.items():
            self.recorder.record({**place, "split": split, **asdict(result)})
        self.recorder.sync()

    def evaluate(self, model: nn.Module) -> dict[str, Evaluation]:
        """What a model reaches on each split that is held out."""
        flip = self.settings.train.eval_flip
        return {
            split: evaluate(model, images, self.engine, flip=flip)
            for split, images in self.data.evaluation.items()
        }

    def _begin(
        self, phase: Phase, network: Network, start: Start, make_sparsity: MakeSparsity
    ) -> TrainState:
        seed_everything(self.seed(*phase.seed_labels, "rank", self.engine.rank))
        network.module.load_state_dict(start.weights)
        config = phase.optimizer or self.settings.optimizer
        optimizer = build_optimizer(network.module, config)
        if start.optimizer is not None:
            load_optimizer_state(network.module, optimizer, start.optimizer)
        sparsity = make_sparsity(network.module, optimizer)
        sizes = self._size_of_epoch(phase.batch_size)
        seed = self.seed(*phase.seed_labels)
        loader = self.data.loader(seed, sizes, batch_size=phase.batch_size)
        loader.load_state_dict({"position": phase.start})
        decay = self.settings.train.ema if phase.averaged else None
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
        steps = partial(self.steps, batch_size=phase.batch_size)
        return Plan(
            stop=phase.stop,
            schedule=phase.schedule,
            learning_rate=(phase.optimizer or settings.optimizer).lr,
            objective=Objective(
                len(self.data.classes),
                label_smoothing=settings.train.label_smoothing,
                mixup=settings.train.mixup,
                cutmix=settings.train.cutmix,
                seed=self.seed(*phase.seed_labels),
            ),
            log_every=settings.log.every,
            evaluate_every=phase.evaluate_every or (None if every is None else steps(every)),
            save_every=None if save is None else steps(save),
            keep=phase.keep | {phase.stop},
            eval_flip=settings.train.eval_flip,
            ended=phase.ended,
        )
