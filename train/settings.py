"""The sections of a configuration that every method shares."""

import math
from dataclasses import dataclass, field

from data.config import DataConfig
from train.checkpoint import CheckpointConfig
from train.duration import Duration, check_durations
from train.engine import Precision
from train.metrics import LogConfig
from train.models import ModelConfig
from train.optim import OptimizerConfig
from train.reduction import ReduceDtype
from train.schedule import ScheduleConfig


@dataclass(frozen=True)
class TrainConfig:
    """How long and how precisely a network is trained."""

    total: str = "15ep"
    """length of the training: 90ep, 112590it"""
    precision: Precision = "fp32"
    """fp32, or automatic mixed precision in bf16 or fp16 (weights stay fp32)"""
    channels_last: bool = False
    """memory format of images and convolutions: faster on recent GPUs"""
    compile: bool = False
    """torch.compile the model; parameter names stay as they are"""
    cuda_graphs: bool = False
    """replay the kernels of a compiled model as CUDA graphs: for small networks, whose kernels take
    less time than to launch them (needs compile)"""
    sync_batchnorm: bool = False
    """batch statistics over all ranks instead of each rank's share (CUDA only)"""
    micro_batch: int | None = None
    """most images per rank and forward pass; more are accumulated; by default no limit"""
    clip: float | None = None
    """largest norm of the gradient"""
    label_smoothing: float = 0.0
    """share of the target that all classes get alike; 0 is off"""
    mixup: float = 0.0
    """alpha of mixup; 0 is off"""
    cutmix: float = 0.0
    """alpha of cutmix; 0 is off"""
    ema: float | None = None
    """decay of an exponential moving average of the weights, which is then what is evaluated"""
    evaluate: str | None = "5ep"
    """how often the held-out images are evaluated during the training"""
    eval_flip: bool = False
    """evaluate each image and its mirror image, and average the logits"""
    pack_below: float = 0.4
    """on several ranks, sum gradients without the pruned entries in each bucket of which masks keep
    a smaller share than this; 0: never"""
    reduce_dtype: ReduceDtype = "fp32"
    """what gradients travel as between the ranks; bf16 halves the bytes and rounds them"""
    timeout: float = 300.0
    """seconds after which a rank gives up waiting for another"""

    def __post_init__(self) -> None:
        check_durations(self, "total", "evaluate")
        if Duration.parse(self.total).unit == "%":
            raise ValueError(f"total = {self.total!r}: must be in epochs (90ep) or steps (2000it)")
        if self.cuda_graphs and not self.compile:
            raise ValueError("cuda_graphs = true: needs compile = true")
        if self.cuda_graphs and self.micro_batch is not None:
            raise ValueError(
                f"cuda_graphs = true: not with micro_batch = {self.micro_batch}, since gradients "
                "cannot be accumulated then: leave out one of them"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing = {self.label_smoothing}: must be in [0, 1)")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema = {self.ema}: must be between 0 and 1")
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)}: must not be negative")
        if not 0 <= self.pack_below <= 1:
            raise ValueError(f"pack_below = {self.pack_below}: must be between 0 (never) and 1")
        for name in ("micro_batch", "clip", "timeout"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} = {value}: must be above 0")


@dataclass(frozen=True)
class Settings:
    """Everything about a run but its stages."""

    name: str = "run"
    """the run's folder under --root"""
    seed: int = 0
    """of everything random in the run"""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        if not self.name or set(self.name) & set("/\\") or self.name.startswith("."):
            raise ValueError(f"name = {self.name!r}: must be a plain folder name")
        if self.seed < 0:
            raise ValueError(f"seed = {self.seed}: must not be negative")
