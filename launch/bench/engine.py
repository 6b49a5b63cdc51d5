"""`tombola bench engine`: images/s through `fit` against a bare PyTorch loop of the same work."""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F

from data.augment import Augmentation, Augmenter
from data.files import Folder
from data.loader import MemoryEvaluationSet, MemoryLoader
from launch.bench.measure import interleaved, median_ratio, report
from pruning.fixed import FixedMasks
from pruning.masks import Masks
from train.checkpoint import Checkpoints
from train.engine import Engine, Precision
from train.instruments import Instruments
from train.loop import Plan, fit
from train.metrics import Recorder
from train.objective import Objective
from train.optim import OptimizerConfig, build_optimizer
from train.progress import Display
from train.schedule import constant
from train.signals import Signals
from train.state import TrainState

_IDENTITY = {"stage": "bench", "level": "engine"}


def bench_engine(*, as_json: bool) -> None:
    """CPU: ResNet-18 at 64 px, batch 32, fp32. CUDA: ResNet-50 at 224 px, channels_last, bf16,
    as it is and compiled, and a small network with CUDA graphs against the same loop without.
    `data wait`: the share of `fit` in which the next batch is waited for.

    Both loops see the same images on the device, the same model and the same optimizer; `fit`
    also draws its batches by `SampleOrder`, holds a dense ticket's masks, logs, polls for signals.
    """
    if not torch.cuda.is_available():
        work = _Work("resnet18", size=64, batch_size=32, steps=3, rounds=21, precision="fp32")
        report({"work": str(work), **_measured(work)}, as_json=as_json)
        return
    work = _Work("resnet50", size=224, batch_size=256, steps=20, rounds=5, precision="bf16")
    small = _Work("resnet18", size=32, batch_size=128, steps=50, rounds=5, precision="bf16")
    result = {
        "work": str(work),
        "as it is": _measured(work),
        "compiled": _measured(work, compiled=True),
        "small network": str(small),
        "small, compiled": _measured(small, compiled=True),
        "small, CUDA graphs": _measured(small, compiled=True, cuda_graphs=True),
    }
    report(result, as_json=as_json)


@dataclass(frozen=True)
class _Work:
    """What both loops do."""

    name: str
    size: int
    batch_size: int
    steps: int
    rounds: int
    precision: Precision

    def __str__(self) -> str:
        return (
            f"{self.name}, {self.size} px, batch {self.batch_size}, {self.precision}, "
            f"{self.rounds} x {self.steps} steps"
        )


def _measured(
    work: _Work, *, compiled: bool = False, cuda_graphs: bool = False
) -> dict[str, float]:
    """Images per second of both loops, and the median of their ratios, round by round."""
    cuda, batch_size = torch.cuda.is_available(), work.batch_size
    engine = Engine(
        precision=work.precision, channels_last=cuda, compile=compiled, cuda_graphs=cuda_graphs
    )
    images = torch.randn(2 * batch_size, 3, work.size, work.size, device=engine.device)
    labels = torch.randint(0, 1000, (2 * batch_size,), device=engine.device)
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(Folder(folder))
        ours = _through_fit(engine, work, images, labels, recorder)
        bare = _bare_loop(engine, work, images, labels, compiled=compiled)
        fit_seconds, bare_seconds = interleaved(ours, bare, rounds=work.rounds)
        recorder.close()
    engine.close()
    num_images = batch_size * work.steps
    return {
        "fit images/s": num_images / statistics.median(fit_seconds),
        "bare loop images/s": num_images / statistics.median(bare_seconds),
        "ratio": median_ratio(bare_seconds, fit_seconds),
        "data wait": recorder.timing(**_IDENTITY)["data_wait"],
    }


def _through_fit(
    engine: Engine, work: _Work, images: torch.Tensor, labels: torch.Tensor, recorder: Recorder
) -> Callable[[], object]:
    batch_size, steps = work.batch_size, work.steps
    network = engine.prepare(timm.create_model(work.name), images[:batch_size])
    optimizer = build_optimizer(network.module, OptimizerConfig())
    masks = Masks.ones(network.module)
    state = TrainState(
        network=network,
        optimizer=optimizer,
        sparsity=FixedMasks(masks, network.module, optimizer),
        scaler=engine.make_scaler(),
        loader=MemoryLoader(
            Augmenter(images, Augmentation()), labels, batch_size=batch_size, seed=0
        ),
        ema=None,
        rank=0,
        device=engine.device,
    )
    display = Display(shown=False)
    instruments = Instruments(
        Checkpoints(Folder("memory://bench"), engine, keep=1),
        recorder,
        display,
        Signals(world_size=1, is_main=True, save_minutes=1e9),
        held_out=(
            "test",
            MemoryEvaluationSet(images, labels, batch_size=batch_size, rank=0, world_size=1),
        ),
        identity=_IDENTITY,
    )

    def train() -> None:
        plan = Plan(
            stop=state.step + steps,
            schedule=constant(0.1),
            learning_rate=0.1,
            objective=Objective(1000),
            log_every=steps,
        )
        display.begin("bench", density=1.0, step=state.step, start=state.step, stop=plan.stop)
        fit(state, plan, engine=engine, instruments=instruments)

    return train


def _bare_loop(
    engine: Engine, work: _Work, images: torch.Tensor, labels: torch.Tensor, *, compiled: bool
) -> Callable[[], object]:
    device, batch_size = engine.device, work.batch_size
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    model = timm.create_model(work.name).to(device).to(memory_format=layout)
    if compiled:
        model.compile()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    batches = [
        (
            images[start : start + batch_size].to(memory_format=layout),
            labels[start : start + batch_size],
        )
        for start in (0, batch_size)
    ]

    def train() -> None:
        for step in range(work.steps):
            inputs, targets = batches[step % 2]
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=work.precision == "bf16"):
                loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()

    return train
