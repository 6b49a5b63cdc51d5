"""The engine: the order of an update, precision, compilation, accumulation, the loop around it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from states import Dense, state_of
from torch import nn

from data.augment import Augmentation, Augmenter
from data.errors import RunError, UserError
from data.files import Folder
from data.loader import Batch, MemoryEvaluationSet, MemoryLoader
from train.checkpoint import Checkpoints
from train.compiling import keep_kernels
from train.engine import Engine
from train.instruments import Instruments
from train.loop import Plan, fit
from train.metrics import Recorder
from train.models import ModelSpec
from train.objective import Objective
from train.optim import OptimizerConfig, build_optimizer
from train.progress import Display
from train.schedule import constant
from train.settings import TrainConfig
from train.signals import Signals


def batch(size: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 1, 8, 8, generator=generator)
    return Batch(images, torch.randint(0, 10, (size,), generator=generator))


def small_model() -> nn.Module:
    return ModelSpec("cifar_resnet8", 10, 1, {"width": 4}).build()


def train_state(engine: Engine, folder: Path, model: nn.Module | None = None) -> Any:
    """A state to fit, and the instruments to do it with."""
    images, labels = batch(40)
    network = engine.prepare(model or small_model(), images[:8])
    optimizer = build_optimizer(network.module, OptimizerConfig(lr=0.05))
    state = state_of(engine, network, optimizer)
    augmenter = Augmenter(images, Augmentation())
    state.loader = MemoryLoader(augmenter, labels, batch_size=8, seed=0)
    location = Folder(folder)
    instruments = Instruments(
        Checkpoints(location / "checkpoints", engine, keep=2),
        Recorder(location),
        Display(shown=False),
        Signals(world_size=1, is_main=True, save_minutes=1e9),
        held_out=("test", MemoryEvaluationSet(images, labels, batch_size=8, rank=0, world_size=1)),
    )
    return state, instruments


def plan(stop: int, **options: Any) -> Plan:
    return Plan(stop, constant(1.0), 0.05, Objective(10), log_every=5, **options)


class Spy(Dense):
    """Writes down when it is called, and what it sees."""

    def __init__(self, weight: nn.Parameter, allow: bool = True) -> None:
        self.weight, self.allow = weight, allow
        self.seen: list[tuple[str, float, float]] = []

    def _look(self, when: str) -> None:
        gradient = 0.0 if self.weight.grad is None else float(self.weight.grad.norm())
        self.seen.append((when, float(self.weight.detach()[0, 0]), gradient))

    def before_update(self, step: int) -> bool:
        self._look("before")
        return self.allow

    def after_update(self, step: int) -> None:
        self._look("after")


def test_an_update_is_unscale_before_clip_step_after() -> None:
    """`before_update` sees the full gradient and the old weight, `after_update` the new one."""
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    model.weight.grad = torch.full((1, 1), 8.0)
    spy = Spy(model.weight)
    engine = Engine(clip=0.5)
    engine.update(state_of(engine, model, torch.optim.SGD(model.parameters(), lr=1.0), spy))
    assert spy.seen == [
        ("before", 1.0, 8.0),
        ("after", pytest.approx(0.5), pytest.approx(0.5)),
    ]


def test_a_veto_leaves_the_weights_alone() -> None:
    """RigL takes no optimizer step when it rewires; `after_update` is called all the same."""
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    model.weight.grad = torch.full((1, 1), 8.0)
    spy = Spy(model.weight, allow=False)
    engine = Engine()
    engine.update(state_of(engine, model, torch.optim.SGD(model.parameters(), lr=1.0), spy))
    assert spy.seen == [("before", 1.0, 8.0), ("after", 1.0, 8.0)]


def test_fp16_unscales_before_the_method_sees_the_gradient(tmp_path: Path) -> None:
    """The scaler's factor of 65,536 never reaches `before_update`; its state is saved."""
    images, labels = batch()
    gradients = []
    for precision in ("fp32", "fp16"):
        engine = Engine(precision=precision)  # type: ignore[arg-type]
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        network = engine.prepare(model, images)
        spy = Spy(model[1].weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        state = state_of(engine, network, optimizer, spy, batch_size=12)
        engine.backward(state, Batch(images, labels), Objective(10))
        engine.update(state)
        gradients.append(spy.seen[0][2])
    assert gradients[1] == pytest.approx(gradients[0], rel=1e-2)
    assert state.state_dict()["scaler"]["scale"] == 65536.0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_in_fp32_weights(precision: Any, tmp_path: Path) -> None:
    """Autocast lowers the arithmetic; weights, loss and optimizer state stay fp32."""
    engine = Engine(precision=precision, channels_last=True)
    state, instruments = train_state(engine, tmp_path)
    fit(state, plan(10), engine=engine, instruments=instruments)
    records = instruments.recorder._journal
    assert records is not None
    assert {p.dtype for p in state.model.parameters()} == {torch.float32}
    weight = state.model.conv1.weight
    assert state.optimizer.state[weight]["momentum_buffer"].dtype == torch.float32
    assert state.step == 10


def test_a_compiled_model_keeps_its_parameter_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """... and gives the same gradients: checkpoints and masks know nothing of `_orig_mod`."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    results = []
    for options in ({}, {"compile": True}, {"compile": True, "cuda_graphs": True}):
        torch.compiler.reset()
        engine = Engine(**options)  # type: ignore[arg-type]
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        network = engine.prepare(model, batch().images)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        state = state_of(engine, network, optimizer, batch_size=12)
        loss = engine.backward(state, batch(), Objective(10))
        results.append((list(model.state_dict()), float(loss), model[1].weight.grad))
    for names, loss_, gradient in results:
        assert names == ["1.weight", "1.bias"]
        assert loss_ == pytest.approx(results[0][1], rel=1e-6)
        torch.testing.assert_close(gradient, results[0][2])


def test_compiled_kernels_are_kept_for_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the user's cache, of which nobody else can write; or where the environment says."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    monkeypatch.setenv(name, "mine")
    keep_kernels()
    assert os.environ[name] == "mine"
    monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_kernels()
    folder = tmp_path / "tombola" / "compiled"
    assert os.environ[name] == str(folder)
    assert folder.stat().st_mode & 0o077 == 0
    monkeypatch.delenv(name)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_kernels()
    assert name not in os.environ

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    keep_kernels()
    assert name not in os.environ


def test_graphs_are_not_replayed_where_gradients_are_accumulated() -> None:
    """The next replay would overwrite them; also where fewer ranks make it so."""
    engine = Engine(compile=True, cuda_graphs=True)
    assert engine.replays
    engine.micro_batch = 8
    assert not engine.replays
    assert not Engine(cuda_graphs=True).replays
    with pytest.raises(ValueError, match="cuda_graphs = true: not with micro_batch = 8"):
        TrainConfig(compile=True, cuda_graphs=True, micro_batch=8)
    with pytest.raises(ValueError, match="needs compile"):
        TrainConfig(cuda_graphs=True)


def test_a_second_process_finds_what_the_first_compiled(tmp_path: Path) -> None:
    script = """
import torch
from torch._dynamo.utils import counters
from train.compiling import compile_in_place
model = torch.nn.Sequential(torch.nn.Linear(64, 10), torch.nn.ReLU())
compile_in_place(model)
model(torch.zeros(4, 64)).sum().backward()
print("found", counters["aot_autograd"]["autograd_cache_hit"])
"""
    environment = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
    environment["XDG_CACHE_HOME"] = str(tmp_path)
    command = [sys.executable, "-c", script]
    for found in ("0", "1"):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.split()[-1] == found


def test_a_non_finite_loss_names_its_step_and_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    """The weights go bad at step 7; what is found at the next save or log is step 7."""
    engine = Engine()
    state, instruments = train_state(engine, tmp_path)

    class Poison(Dense):
        def after_update(self, step: int) -> None:
            if step == 6:
                state.model.fc.weight.data.fill_(float("nan"))

    state.sparsity = Poison()
    with pytest.raises(RunError, match=r"not finite at step 7; .*Lower optimizer.lr"):
        fit(state, plan(20, save_every=3), engine=engine, instruments=instruments)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step-00000003",
        "step-00000006",
    ]
    assert instruments.checkpoints.latest() == 6
    saved = instruments.checkpoints.load(6)["model"]["fc.weight"]
    assert bool(saved.isfinite().all())


class Until(Dense):
    """Has done its work after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def after_update(self, step: int) -> None:
        self.left -= 1


def is_done(sparsity: Any) -> bool:
    return bool(sparsity.left <= 0)


def test_a_training_ends_when_its_sparsity_says_so(tmp_path: Path) -> None:
    """At that step, which is recorded and kept as the last one; it is not measured twice."""
    engine = Engine()
    state, instruments = train_state(engine, tmp_path)
    state.sparsity = Until(7)
    until = plan(20, save_every=3, evaluate_every=7, ended=is_done)
    fit(state, until, engine=engine, instruments=instruments)
    instruments.checkpoints.wait()
    assert state.step == 7
    assert state.loader.state_dict() == {"position": 7}
    instruments.recorder.close()
    facts = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(fact["event"], fact["step"]) for fact in facts] == [("train", 5), ("train", 7)]
    kept = {}
    for step in (3, 6, 7):
        manifest = tmp_path / f"checkpoints/step-{step:08d}/manifest.json"
        kept[step] = json.loads(manifest.read_text())["kept"]
    assert kept == {3: False, 6: False, 7: True}


def test_a_training_that_has_ended_is_loaded_and_not_gone_on_with(tmp_path: Path) -> None:
    """Nor is it where it ends before its first step."""
    engine = Engine()
    state, instruments = train_state(engine, tmp_path)
    state.sparsity = Until(0)
    weights = state.model.fc.weight.detach().clone()
    for _ in range(2):
        fit(state, plan(20, ended=is_done), engine=engine, instruments=instruments)
        instruments.checkpoints.wait()
        assert state.step == 0
        assert torch.equal(state.model.fc.weight, weights)
        assert instruments.checkpoints.latest() == 0


def test_a_training_that_does_not_end_by_itself_goes_to_its_stop(tmp_path: Path) -> None:
    engine = Engine()
    state, instruments = train_state(engine, tmp_path)
    state.sparsity = Until(4)
    fit(state, plan(3, ended=is_done), engine=engine, instruments=instruments)
    instruments.checkpoints.wait()
    assert state.step == 3
    assert instruments.checkpoints.latest() is None


def test_an_ema_is_what_is_evaluated_and_saved(tmp_path: Path) -> None:
    """The average follows the weights by its decay, buffers included."""
    from timm.utils.model_ema import ModelEmaV3

    engine = Engine()
    state, instruments = train_state(engine, tmp_path)
    state.ema = ModelEmaV3(state.model, decay=0.5)
    start = state.model.fc.bias.detach().clone()
    fit(state, plan(1, keep=frozenset({1})), engine=engine, instruments=instruments)
    instruments.checkpoints.wait()
    expected = (start + state.model.fc.bias.detach()) / 2
    torch.testing.assert_close(state.evaluated.fc.bias.detach(), expected)
    saved = instruments.checkpoints.load(1)
    torch.testing.assert_close(saved["ema"]["fc.bias"], expected)


def test_mixup_is_the_same_at_the_same_step_and_leaves_numpy_alone() -> None:
    """A pure function of (seed, step): the coefficient does not depend on what ran before."""
    objective = Objective(10, mixup=0.8, cutmix=1.0, seed=5)
    np.random.seed(1)
    before = np.random.get_state()[1].tolist()  # type: ignore[union-attr]

    def mixed(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = batch()
        return objective.mix(Batch(images, labels), step)

    images, targets = mixed(3)
    again, same_targets = mixed(3)
    other, _ = mixed(4)
    assert torch.equal(images, again)
    assert torch.equal(targets, same_targets)
    assert not torch.equal(images, other)
    assert torch.allclose(targets.sum(1), torch.ones(12))
    assert np.random.get_state()[1].tolist() == before  # type: ignore[union-attr]
    with pytest.raises(UserError, match="pair images"):
        objective.mix(batch(7), 0)


def test_label_smoothing_is_torchs() -> None:
    """The summed loss over a batch is torch's mean times its size."""
    images, labels = batch()
    logits = images.flatten(1)[:, :10]
    expected = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    loss = Objective(10, label_smoothing=0.1).loss_sum(logits, labels)
    assert float(loss) == pytest.approx(12 * float(expected), rel=1e-6)


def test_sync_batchnorm_on_the_cpu_is_refused() -> None:
    """torch has it on CUDA only: one line instead of an error in the first forward pass."""
    with pytest.raises(UserError, match=r"train\.sync_batchnorm = true needs CUDA"):
        Engine(sync_batchnorm=True)


def test_minutes_since_the_last_save_ask_for_the_next() -> None:
    """Rank 0's clock decides; a save starts it anew."""
    eager = Signals(world_size=1, is_main=True, save_minutes=1e-9)
    assert eager.poll().save
    assert not Signals(world_size=1, is_main=False, save_minutes=1e-9).poll().save
    patient = Signals(world_size=1, is_main=True, save_minutes=1e9)
    patient.saved()
    assert not patient.poll().save


def test_signal_handlers_are_put_back() -> None:
    """A program that calls a run is not left with its handlers."""
    import signal

    before = signal.getsignal(signal.SIGTERM)
    with Signals(world_size=1, is_main=True, save_minutes=1.0) as signals:
        signal.raise_signal(signal.SIGTERM)
        assert signals.poll().stop
    assert signal.getsignal(signal.SIGTERM) is before
