"""What every ticket method does for each ticket: look, choose masks, train, write.

A method is a program of arms. An arm whose `ticket.json` is there is finished; one whose masks
were chosen goes on with these masks, whatever choosing them again would give; and its training
goes on from its newest checkpoint.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from data.errors import RunError, StoreError
from pruning.fixed import FixedMasks
from pruning.mask_store import read_masks, write_masks
from pruning.masks import Masks
from pruning.signed_weights import SignedWeights
from pruning.store import TicketFolder
from pruning.tickets import Ticket
from pruning.trained import trained_weights
from pruning.weight_store import StoredWeights
from train.evaluate import Evaluation
from train.models import ModelSpec
from train.progress import MUCH_WAIT
from train.ranks import Ranks
from train.schedule import Schedule
from train.session import MakeSparsity, Outcome, Phase, Session, Start
from train.state import Network
from train.versions import software_versions


@dataclass(frozen=True)
class Arm:
    """One training of a method: a ticket, or a control beside it."""

    stage: str
    method: str
    level: int
    masks: Callable[[], Masks] | None
    """chooses the masks; not called again once they are chosen; `None`: `sparsity` has its own"""
    start: Callable[[], Start]
    first_step: int
    stop: int
    schedule: Schedule
    seed_labels: tuple[str | int, ...]
    sparsity: Callable[[Masks], MakeSparsity] = lambda masks: partial(FixedMasks, masks)
    """what keeps to the masks in training, or chooses its own"""
    parent: Ticket | None = None
    model: ModelSpec | None = None
    """of the network that is trained (default: the session's)"""
    control: bool = False
    search_steps: int = 0
    """optimizer steps that went into finding the masks before this training"""
    start_steps: int = 0
    """those of them that `start` takes itself, in a phase of its own"""
    rewind_step: int = 0
    """k, which the ticket records"""
    weights: Callable[[Start], StoredWeights | SignedWeights | None] = lambda start: None
    """stores the state that the ticket starts from; called when the training is done"""
    measured: Callable[[], Mapping[str, Mapping[str, float]]] = dict
    """what was measured beside the end of the training, by split, or by another name; called when
    that is done"""
    evaluate_every: int | None = None
    """steps between two evaluations in the training (default: as `train.evaluate` says)"""
    keep: frozenset[int] = frozenset()
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The level's folder: `level-07`, and a control's `level-07-random`."""
        return f"level-{self.level:02d}" + (f"-{self.method}" if self.control else "")


def train_ticket(
    session: Session,
    tickets: TicketFolder,
    network: Network | Callable[[], Network],
    arm: Arm,
) -> Ticket:
    """The finished ticket of an arm; trains only what is not finished yet.

    It has the masks with which the training ended. `network` may build it: it is asked for once
    the arm has started, and not for a finished one. Raises `RunError` where the ranks come to
    different masks.
    """
    engine = session.engine
    with _remedy(tickets, arm.stage, arm.name):
        finished = engine.on_main(lambda: tickets.find(arm.stage, arm.name))
    if finished is not None:
        session.display.skip(arm.start_steps + arm.stop - arm.first_step)
        return finished
    start = arm.start()  # first: where it is missing, nothing is begun
    chosen = Masks({}) if arm.masks is None else _chosen(tickets, arm, arm.masks, engine)
    phase = Phase(
        arm.stage,
        arm.name,
        start=arm.first_step,
        stop=arm.stop,
        schedule=arm.schedule,
        seed_labels=arm.seed_labels,
        keep=arm.keep,
        evaluate_every=arm.evaluate_every,
    )
    network = network() if callable(network) else network
    outcome = session.train(phase, network, start, arm.sparsity(chosen.to(engine.device)))
    masks = Masks(outcome.sparsity.masks).to("cpu")
    engine.require_same(masks.digest(), f"the masks of {arm.stage}/{arm.name}")
    ticket = _describe(session, tickets, arm, outcome, masks, arm.weights(start))
    engine.on_main(lambda: tickets.write(ticket))
    session.display.say(_line(ticket))
    return ticket


def _chosen(tickets: TicketFolder, arm: Arm, choose: Callable[[], Masks], ranks: Ranks) -> Masks:
    """The masks with which an arm's training begins: those of an earlier attempt, or new ones."""
    with _remedy(tickets, arm.stage, arm.name):
        stored = ranks.on_main(lambda: tickets.chosen_masks(arm.stage, arm.name))
        if stored is not None:
            return read_masks(tickets.objects, stored, ranks)
    masks = choose()
    ranks.require_same(masks.digest(), f"the masks of {arm.stage}/{arm.name}")
    stored = write_masks(tickets.objects, masks, ranks)
    ranks.on_main(lambda: tickets.choose_masks(arm.stage, arm.name, stored))
    return masks


def masks_of(tickets: TicketFolder, ticket: Ticket, ranks: Ranks) -> Masks:
    """The masks of a ticket of the run, on every rank. Raises `RunError` with the remedy."""
    with _remedy(tickets, ticket.stage, ticket.name):
        return ticket.read(ranks).masks


def trained_weights_of(tickets: TicketFolder, ticket: Ticket, ranks: Ranks) -> dict[str, Tensor]:
    """What a ticket of the run was trained to, on every rank. Raises `RunError` with the remedy."""
    with _remedy(tickets, ticket.stage, ticket.name):
        return trained_weights(ticket, tickets.folder / ticket.place, ranks)


def around(
    what: str, before: Mapping[str, Evaluation], after: Mapping[str, Evaluation]
) -> dict[str, dict[str, float]]:
    """By split, the accuracies just before and just after a step that takes weights away."""
    return {
        split: {
            f"accuracy_before_{what}": before[split].accuracy,
            f"accuracy_after_{what}": after[split].accuracy,
        }
        for split in after
    }


@contextlib.contextmanager
def _remedy(tickets: TicketFolder, stage: str, name: str) -> Iterator[None]:
    """To what is damaged adds how the run goes on."""
    try:
        yield
    except StoreError:
        raise
    except RunError as error:
        folder = tickets.folder / f"{stage}/{name}"
        advised = RunError(f"{error}; remove {folder} to train that level again")
        vars(advised)["met_by_all"] = getattr(error, "met_by_all", False)
        raise advised from error


def _describe(
    session: Session,
    tickets: TicketFolder,
    arm: Arm,
    outcome: Outcome,
    masks: Masks,
    weights: StoredWeights | SignedWeights | None,
) -> Ticket:
    """The ticket of a training that has ended; its objects are stored."""
    parent = arm.parent
    ticket = Ticket(
        method=arm.method,
        level=arm.level,
        control=arm.control,
        model=arm.model or session.model_spec,
        step=arm.rewind_step,
        stored_masks=write_masks(tickets.objects, masks, session.engine),
        stored_weights=weights,
        parent=None if parent is None else parent.id,
        lineage=() if parent is None else (parent.as_ancestor(), *parent.lineage),
        config={
            "image_shape": list(session.data.image_shape),
            **_whole(arm.config, session),
            "settings": _settings(session, arm),
        },
        metrics=_metrics(outcome, arm),
        timing={
            **session.recorder.timing(arm.stage, arm.name),
            "steps": float(arm.stop - arm.first_step),
            "search_steps": float(arm.search_steps),
        },
        versions=software_versions(),
        stage=arm.stage,
        name=arm.name,
        objects=tickets.objects,
    )
    return ticket.hold(masks)


def _metrics(outcome: Outcome, arm: Arm) -> dict[str, dict[str, float]]:
    """What is known of each split, at the end of the training and besides; and of the sparsity."""
    metrics = {split: asdict(result) for split, result in outcome.evaluations.items()}
    for name, values in arm.measured().items():
        metrics[name] = {**metrics.get(name, {}), **values}
    facts = outcome.sparsity.facts()
    return {**metrics, "sparsity": facts} if facts else metrics


def _whole(config: Mapping[str, Any], session: Session) -> dict[str, Any]:
    """What configured an arm, as the run has it: also where this process does a part of it."""
    return {
        name: {key: session.whole.get(key, option) for key, option in value.items()}
        if isinstance(value, dict)
        else value
        for name, value in config.items()
    }


def _settings(session: Session, arm: Arm) -> dict[str, Any]:
    """The settings of a training, with the network that was trained."""
    settings = asdict(session.settings)
    if arm.model is not None:
        settings["model"] = {"name": arm.model.name, **arm.model.arguments}
    return settings


def _line(ticket: Ticket) -> str:
    accuracy = "  ".join(
        f"{split} accuracy {values['accuracy']:.4f}"
        for split, values in ticket.metrics.items()
        if "accuracy" in values
    )
    rate, wait = ticket.timing["images_per_second"], ticket.timing["data_wait"]
    name = f"{ticket.stage}/{ticket.name}"
    line = f"{name}: density {ticket.density:.2%}  {accuracy}  {rate:,.0f} images/s"
    return f"{line}  data wait {wait:.0%}" if wait >= MUCH_WAIT else line
