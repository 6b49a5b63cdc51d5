"""`tombola bench engine`: images/s through `fit` against a bare PyTorch loop of the same work."""

import statistics
import tempfile
from collections.abc import Callable

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

ROUNDS = 21


def bench_engine(*, as_json: bool) -> None:
    """CPU: ResNet-18 at 64 px, batch 32, fp32. CUDA: ResNet-50 at 224 px, channels_last, bf16.

    Both loops see the same images on the device, the same model and the same optimizer; `fit`
    also draws its batches by `SampleOrder`, holds a dense ticket's masks, logs, polls for signals.
    """
    cuda = torch.cuda.is_available()
    name, size, batch_size, steps = ("resnet50", 224, 256, 20) if cuda else ("resnet18", 64, 32, 3)
    precision: Precision = "bf16" if cuda else "fp32"
    engine = Engine(precision=precision, channels_last=cuda)
    images = torch.randn(2 * batch_size, 3, size, size, device=engine.device)
    labels = torch.randint(0, 1000, (2 * batch_size,), device=engine.device)
    with tempfile.TemporaryDirectory() as folder:
        ours = _through_fit(engine, name, images, labels, batch_size, steps, Folder(folder))
        bare = _bare_loop(engine, name, images, labels, batch_size, steps, precision)
        fit_seconds, bare_seconds = interleaved(ours, bare, rounds=ROUNDS)
    num_images = batch_size * steps
    result = {
        "work": f"{name}, {size} px, batch {batch_size}, {precision}, {ROUNDS} x {steps} steps",
        "fit images/s": num_images / statistics.median(fit_seconds),
        "bare loop images/s": num_images / statistics.median(bare_seconds),
        "ratio": median_ratio(bare_seconds, fit_seconds),
    }
    engine.close()
    report(result, as_json=as_json)


def _through_fit(
    engine: Engine,
    name: str,
    images: torch.Tensor,
    labels: torch.Tensor,
    batch_size: int,
    steps: int,
    folder: Folder,
) -> Callable[[], object]:
    network = engine.prepare(timm.create_model(name), images[:batch_size])
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
        Checkpoints(folder, engine, keep=1),
        Recorder(folder),
        display,
        Signals(world_size=1, is_main=True, save_minutes=1e9),
        held_out=(
            "test",
            MemoryEvaluationSet(images, labels, batch_size=batch_size, rank=0, world_size=1),
        ),
    )

    def work() -> None:
        plan = Plan(
            stop=state.step + steps,
            schedule=constant(0.1),
            learning_rate=0.1,
            objective=Objective(1000),
            log_every=steps,
        )
        display.begin("bench", density=1.0, step=state.step, start=state.step, stop=plan.stop)
        fit(state, plan, engine=engine, instruments=instruments)

    return work


def _bare_loop(
    engine: Engine,
    name: str,
    images: torch.Tensor,
    labels: torch.Tensor,
    batch_size: int,
    steps: int,
    precision: Precision,
) -> Callable[[], object]:
    device = engine.device
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    model = timm.create_model(name).to(device).to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    batches = [
        (
            images[start : start + batch_size].to(memory_format=layout),
            labels[start : start + batch_size],
        )
        for start in (0, batch_size)
    ]

    def work() -> None:
        for step in range(steps):
            inputs, targets = batches[step % 2]
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()

    return work
