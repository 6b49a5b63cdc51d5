"""Training images of which each class has the same number: what GraSP takes its gradients from."""

from itertools import islice

import numpy as np
import torch

from data.errors import UserError
from data.loader import Batch
from train.session import Session


def require_samples(session: Session, num: int) -> None:
    """Raises `UserError` where a class has fewer than `num` training images."""
    for name, (count, _) in session.data_record["images"]["train"].items():
        if count < num:
            raise UserError(
                f"samples_per_class = {num}: class {name!r} has {count} training images; choose at "
                "most as many as each class has"
            )


def class_samples(session: Session, num: int, *labels: str | int) -> list[Batch]:
    """This rank's share of the first `num` training images of each class in a stream's order.

    The stream is of one epoch, varied as in training; which images are taken does not depend on the
    number of ranks. They come in batches of at most a micro-batch. Raises `UserError` where the
    epoch, which leaves out an incomplete batch, has too few of a class.
    """
    engine, classes = session.engine, session.data.classes
    loader = session.data.loader(session.seed(*labels))
    missing = np.full(len(classes), num)
    taken: list[Batch] = []
    for images, targets in islice(loader, loader.steps_per_epoch):
        shares = engine.gather(targets.tolist())
        chosen = [[_take(missing, label) for label in share] for share in shares][engine.rank]
        if any(chosen):
            own = torch.tensor(chosen, device=images.device)
            taken.append(Batch(images[own], targets[own]))
        if not missing.any():
            break
    if missing.any():
        worst = int(missing.argmax())
        raise UserError(
            f"samples_per_class = {num}: an epoch of whole batches has only {num - missing[worst]} "
            f"images of class {classes[worst]!r}; choose fewer, or a smaller data.batch_size"
        )
    return _in_batches(session, taken)


def _take(missing: np.ndarray[tuple[int], np.dtype[np.int64]], label: int) -> bool:
    """Whether another image of the class is wanted; it is missing no more then."""
    wanted = bool(missing[label] > 0)
    missing[label] -= wanted
    return wanted


def _in_batches(session: Session, taken: list[Batch]) -> list[Batch]:
    """The images of many small batches in few large ones: normalisations use their statistics."""
    if not taken:
        return []
    engine, batch_size = session.engine, session.settings.data.batch_size
    largest = -(-batch_size // (engine.world_size * engine.num_micro_batches(batch_size)))
    images = torch.cat([batch.images for batch in taken])
    targets = torch.cat([batch.labels for batch in taken])
    num_parts = -(-len(images) // largest)
    parts = zip(images.tensor_split(num_parts), targets.tensor_split(num_parts), strict=True)
    return [Batch(engine.place(part), target) for part, target in parts]
