"""Exact evaluation on any number of ranks: sums and counts, every image once."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from data.errors import RunError
from data.loader import EvaluationSet
from train.engine import Engine


@dataclass(frozen=True)
class Evaluation:
    """What a model reaches on a data set."""

    loss: float
    """mean cross-entropy"""
    accuracy: float
    """share of images whose first guess is right"""
    top5: float
    """share of images whose label is among the first five guesses (all, if fewer classes)"""


@torch.no_grad()
def evaluate(
    model: nn.Module, images: EvaluationSet, engine: Engine, *, flip: bool = False
) -> Evaluation:
    """Measures `model` on all of `images`, each rank its share; the same result on every rank.

    With `flip`, an image's logits are the mean over the image and its mirror image. The model is
    used bare, without DDP: ranks may have different numbers of batches.
    """
    was_training = model.training
    model.eval()
    engine.broadcast_buffers(model)
    sums = torch.zeros(4, dtype=torch.float64, device=engine.device)
    for batch in images:
        logits = engine.forward(model, batch.images)
        if flip:
            mirrored = batch.images.flip(3)
            logits = (logits.clone() + engine.forward(model, mirrored)) / 2
        guesses = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch.labels[:, None]
        loss = F.cross_entropy(logits, batch.labels, reduction="sum")
        size = torch.full_like(loss, len(logits))  # made on the device: a copy would wait for it
        counts = (loss, guesses[:, 0].sum(), guesses.sum(), size)
        sums += torch.stack([count.to(sums) for count in counts])
    model.train(was_training)
    loss_sum, first, among, count = engine.reduce(sums).tolist()
    if count != images.num_samples:
        raise RunError(f"evaluated {count:.0f} images of {images.num_samples}: a loader is wrong")
    return Evaluation(loss_sum / count, first / count, among / count)
