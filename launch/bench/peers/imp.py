"""IMP with rewinding in the published design of open_lth (Frankle et al.), on our digits.

This is not open_lth's code: we wrote it after what its repository shows. As there:

- images go through a `DataLoader` over PIL images, by default without worker processes;
- before each forward pass, evaluations included, a loop multiplies every pruned parameter by its
  mask, one by one; gradients and momentum are left as they are;
- at the first step of a training, at each epoch and at the end the test set is evaluated;
- at each epoch `torch.save` writes model, optimizer and log; the model once more at both ends;
- each level builds model and optimizer anew, and reads weights and masks from files of torch.save;
- NumPy sorts the magnitudes of all surviving weights to find the threshold.

Other than there, a threshold prunes exactly as many weights as ours (open_lth: one more), and the
incomplete batch at the end of an epoch is left out: otherwise the work would not be the same.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.bench.peers.loader import pil_loader
from launch.bench.peers.work import Training, at_least, shipped
from launch.config import RunConfig
from pruning.masks import prunable
from train.duration import Duration

Say = Callable[[str], object]


@dataclass(frozen=True)
class Sweep:
    """A dense training and its pruned levels."""

    training: Training
    num_rounds: int
    prune_fraction: float
    rewind_step: int

    @classmethod
    def of(cls, config: RunConfig) -> "Sweep":
        """What the stage of a configuration does, whose recipe is `imp`."""
        training, stage = Training.of(config), config.stages[0].config
        rewind = Duration.parse(stage.rewind).steps(training.steps_per_epoch, training.num_steps)
        return cls(training, stage.num_rounds, stage.prune_fraction, rewind)


@dataclass(frozen=True)
class Level:
    """What a level came to."""

    level: int
    num_kept: int
    density: float
    accuracy: float
    """on the test set, at the end"""
    num_steps: int
    """level 0: those to the step of rewinding included"""
    seconds: float


def run_peer(
    sweep: Sweep, folder: Path, *, num_workers: int = 0, say: Say = lambda line: None
) -> list[Level]:
    """All levels, whose files are written in `folder`."""
    return _Peer(sweep, folder, num_workers).run(say)


class _Pruned(nn.Module):
    """A network that multiplies its parameters by their masks before each forward pass."""

    def __init__(self, model: nn.Module, masks: dict[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        for name, mask in masks.items():
            self.register_buffer(_buffer(name), mask.float())

    def forward(self, x: Tensor) -> Tensor:
        for name, parameter in self.model.named_parameters():
            if hasattr(self, _buffer(name)):
                parameter.data *= getattr(self, _buffer(name))
        scores: Tensor = self.model(x)
        return scores


def _buffer(name: str) -> str:
    return "mask_" + name.replace(".", "_")


class _Peer:
    """The program: levels meet in files alone."""

    def __init__(self, sweep: Sweep, folder: Path, num_workers: int) -> None:
        self.sweep, self.training, self.folder = sweep, sweep.training, folder
        self._num_workers, self._num_steps = num_workers, 0
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def run(self, say: Say) -> list[Level]:
        started = time.perf_counter()
        dense = self._build()
        ones = {name: torch.ones_like(weight) for name, weight in prunable(dense).items()}
        place = self._place("pretrain")
        self._train(_Pruned(dense, ones), place, 0, self.sweep.rewind_step)
        torch.save(dense.state_dict(), self.folder / "rewound.pt")
        levels = []
        for number in range(self.sweep.num_rounds + 1):
            place = self._place(f"level_{number}")
            self._choose(number, place, ones)
            masks = torch.load(place / "mask.pt", weights_only=True)
            model = self._build()
            model.load_state_dict(torch.load(self.folder / "rewound.pt", weights_only=True))
            pruned = _Pruned(model, masks)
            accuracy = self._train(pruned, place, self.sweep.rewind_step, self.training.num_steps)
            kept, size = (sum(int(f(m)) for m in masks.values()) for f in (torch.sum, torch.numel))
            now, num_steps = time.perf_counter(), self._num_steps
            levels.append(Level(number, kept, kept / size, accuracy, num_steps, now - started))
            say(
                f"level {number}: density {kept / size:.2%}  accuracy {accuracy:.4f}  "
                f"{num_steps} steps  {now - started:.2f} s"
            )
            started, self._num_steps = now, 0
        return levels

    def _build(self) -> nn.Module:
        return self.training.model.build(self.training.seed)

    def _place(self, name: str) -> Path:
        place = self.folder / name
        place.mkdir()
        return place

    def _choose(self, number: int, place: Path, ones: dict[str, Tensor]) -> None:
        """Writes a level's masks: of the last one's survivors all but the smallest weights."""
        if number == 0:
            torch.save({name: one.int() for name, one in ones.items()}, place / "mask.pt")
            return
        before = self.folder / f"level_{number - 1}"
        loaded = torch.load(before / "mask.pt", weights_only=True)
        masks = {name: mask.numpy() for name, mask in loaded.items()}
        state = torch.load(before / "end.pt", map_location="cpu", weights_only=True)
        weights = {name: state[name].numpy() for name in masks}
        survivors = np.concatenate([weights[name][mask == 1] for name, mask in masks.items()])
        num_pruned = math.ceil(self.sweep.prune_fraction * len(survivors))
        threshold = np.sort(np.abs(survivors))[num_pruned - 1]
        chosen = {
            name: np.where(np.abs(weights[name]) > threshold, mask, np.zeros_like(mask))
            for name, mask in masks.items()
        }
        torch.save({n: torch.from_numpy(mask) for n, mask in chosen.items()}, place / "mask.pt")

    # One training ------------------------------------------------------------------------

    def _train(self, model: nn.Module, place: Path, start: int, stop: int) -> float:
        """Trains from one step to another; the accuracy on the test set at the end."""
        training = self.training
        model.to(self._device)
        optimizer = training.build_optimizer(model)
        rates = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: training.schedule(start + step)
        )
        self._save_model(model, place / "start.pt")
        log: dict[int, float] = {}
        for step, images, labels in self._batches(start, stop):
            if step == start or step % training.steps_per_epoch == 0:
                self._watch(model, optimizer, place, step, log)
            model.train()
            optimizer.zero_grad()
            scores = model(images.to(self._device))
            F.cross_entropy(scores, labels.to(self._device)).backward()
            optimizer.step()
            rates.step()
            self._num_steps += 1
        self._watch(model, optimizer, place, stop, log)
        self._save_model(model, place / "end.pt")
        return log[stop]

    def _batches(self, start: int, stop: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Each step's images and labels; an epoch that begins before `start` is read from there."""
        training, data, order = self.training, self.training.images, torch.Generator()
        batches = pil_loader(
            data.train,
            data.normalisation,
            batch_size=training.batch_size,
            shuffled_by=order,
            num_workers=self._num_workers,
        )
        per_epoch = training.steps_per_epoch
        for epoch in range(start // per_epoch, -(-stop // per_epoch)):
            order.manual_seed(training.seed + epoch)
            for step, (images, labels) in enumerate(batches, epoch * per_epoch):
                if step == stop:
                    return
                if step >= start:
                    yield step, images, labels

    def _watch(
        self, model: nn.Module, optimizer: Any, place: Path, step: int, log: dict[int, float]
    ) -> None:
        """Evaluates, and saves all that a resumed training needs."""
        log[step] = self._accuracy(model)
        saved = {
            "step": step,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "log": log,
        }
        torch.save(saved, place / "checkpoint.pt")

    @torch.no_grad()
    def _accuracy(self, model: nn.Module) -> float:
        data = self.training.images
        model.eval()
        num_right = torch.zeros((), device=self._device)
        for images, labels in pil_loader(
            data.test,
            data.normalisation,
            batch_size=self.training.batch_size,
            num_workers=self._num_workers,
        ):
            guesses = model(images.to(self._device)).argmax(dim=1)
            num_right += (guesses == labels.to(self._device)).sum()
        return float(num_right) / len(data.test.labels)

    def _save_model(self, pruned: Any, path: Path) -> None:
        torch.save(pruned.model.state_dict(), path)


def main() -> None:
    """Runs the digits sweep, and prints what each level reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--levels", type=at_least(int, 0), default=3, help="pruned levels")
    parser.add_argument(
        "--workers", type=at_least(int, 0), default=0, help="processes of each DataLoader"
    )
    options = parser.parse_args()
    config = shipped("digits-imp", "imp", ["--stages.imp.rounds", str(options.levels)])
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run_peer(Sweep.of(config), Path(folder), num_workers=options.workers, say=print)
    print(f"{time.perf_counter() - started:.2f} s in all")


if __name__ == "__main__":
    main()
