"""Multi-prize training in the published design of biprop, on our digits.

This is not biprop's code: we wrote it after what its repository shows. As there, each convolution
and linear layer has random weights that are never trained and a score for each; in every forward
pass, those of evaluations included, it sorts all its scores, keeps the highest, and convolves with
their signs times one gain. The gradient of the scores passes straight through the choice. Images go
through a `DataLoader` over PIL images, the test set is evaluated after each epoch, and `torch.save`
then writes network and optimizer.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from launch.bench.peers.loader import pil_loader
from launch.bench.peers.sorting import score_by_sorting
from launch.bench.peers.work import Training, at_least, shipped


def run_peer(training: Training, density: float, folder: Path, *, num_workers: int = 0) -> float:
    """Trains scores from step 0 to the end; the accuracy on the test set."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data, batch_size = training.images, training.batch_size
    torch.manual_seed(training.seed)
    model = training.model.build(training.seed)
    score_by_sorting(model, density)
    model.to(device)
    optimizer = training.build_optimizer(model)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, training.schedule)
    order = torch.Generator().manual_seed(training.seed)
    load = partial(pil_loader, batch_size=batch_size, num_workers=num_workers)
    batches = load(data.train, data.normalisation, shuffled_by=order)
    held_out = load(data.test, data.normalisation)
    step, accuracy = 0, 0.0
    while step < training.num_steps:
        model.train()
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(images.to(device)), labels.to(device)).backward()
            optimizer.step()
            rates.step()
            step += 1
            if step == training.num_steps:
                break
        accuracy = accuracy_on(held_out, model, device)
        saved = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(saved, folder / "checkpoint.pt")
    return accuracy


@torch.no_grad()
def accuracy_on(images: Any, model: nn.Module, device: torch.device) -> float:
    """The share of the images whose first guess is right."""
    model.eval()
    right = [(model(x.to(device)).argmax(dim=1) == y.to(device)).float() for x, y in images]
    return float(torch.cat(right).mean())


def main() -> None:
    """Trains scores over the digits network, and prints what they reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--density", type=at_least(float, 0.01, 1), default=0.3, help="fraction kept in each layer"
    )
    parser.add_argument("--epochs", type=at_least(int, 1), default=30)
    parser.add_argument(
        "--workers", type=at_least(int, 0), default=0, help="processes of each DataLoader"
    )
    options = parser.parse_args()
    length = ["--train.total", f"{options.epochs}ep"]
    training = Training.of(shipped("digits-multiprize", "mpt-1-32", length))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        accuracy = run_peer(training, options.density, Path(folder), num_workers=options.workers)
    print(
        f"density {options.density:.2%}  accuracy {accuracy:.4f}  {training.num_steps} steps  "
        f"{time.perf_counter() - started:.2f} s"
    )


if __name__ == "__main__":
    main()
