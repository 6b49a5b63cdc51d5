"""Elastic tickets as a stage of a run: from tickets of one depth to trained tickets of another.

Chen et al. 2021 (2103.16547); `pruning.elastic` has the transformation. The source's state at step
k and its masks are moved to the target, which is trained once, from step k to T on its schedule.
Moving to another data set it is trained from step 0, and a head of another number of classes is
fresh and dense.

Choices where the paper leaves them open: every control trains for the same steps as its ticket, on
the same stream of data; `reinit` starts at the same step of the schedule; `snip` keeps in all
replicas together as many weights as the ticket does, by their sensitivity at step k with the rest
masked and the replicas dense.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from data.errors import UserError
from pruning.allocate import keep_count, shuffle_layers
from pruning.elastic import DepthChange, Order, format_map, parse_map, stages, transform
from pruning.masks import Masks, maskable
from pruning.program import Arm, train_ticket
from pruning.scores import snip
from pruning.sources import (
    Outlook,
    Promise,
    check_levels,
    claim_sources,
    find_sources,
    finished_levels,
    is_of_channels,
    require_weights,
)
from pruning.store import TicketFolder
from pruning.tickets import Ticket
from pruning.weight_store import write_weights
from train.models import ModelSpec, shaped_by
from train.session import Session, Start
from train.settings import Settings

Control = Literal["random", "reinit", "permuted", "snip"]
_NEEDS_REPLICAS = ("permuted", "snip")
T = TypeVar("T")


@dataclass(frozen=True)
class ElasticConfig:
    """Elastic tickets: tickets of one depth, stretched or squeezed to this stage's model."""

    ticket: str
    """the source: an earlier stage, or RUN/STAGE, RUN/STAGE/LEVEL, STORE/ID as a path or URL"""
    levels: tuple[int, ...] = ()
    """which levels of the source; by default its sparsest"""
    order: Order = "append"
    """how blocks are repeated or left out: append (as a group; the last are left out) or
    interpolate (each in place; evenly)"""
    map: str | None = None
    """instead of an order: source block and target blocks, 0:0;1:1,2;2:3, stages parted by |"""
    transfer: bool = False
    """to another data set: train from step 0 of the schedule, with a fresh, dense head where the
    number of classes differs"""
    head: Literal["copy", "fresh"] = "copy"
    """with transfer: copy the head where the classes are as many, or always take a fresh one"""
    controls: tuple[Control, ...] = ()
    """what to train beside each ticket: random (the same number of weights in each layer, at
    random), reinit (the ticket's masks, fresh weights), permuted (random in the replicas only),
    snip (the replicas' weights chosen by SNIP)"""
    snip_batches: int = 1
    """global batches over which the control snip takes its gradient"""

    def __post_init__(self) -> None:
        check_levels(self)
        if self.map is not None:
            try:
                parse_map(self.map)
            except UserError as error:
                raise ValueError(str(error)) from None
        if self.head == "fresh" and not self.transfer:
            raise ValueError("head = 'fresh': needs transfer = true, for another data set")
        if self.snip_batches < 1:
            raise ValueError(f"snip_batches = {self.snip_batches}: must be at least 1")

    def change(self, source: nn.Module, target: nn.Module) -> DepthChange:
        """How tickets of one network become tickets of another. Raises `UserError`."""
        maps = None if self.map is None else parse_map(self.map)
        change = DepthChange.between(stages(source), stages(target), self.order, maps)
        needing = [control for control in self.controls if control in _NEEDS_REPLICAS]
        if needing and not change.replicates:
            raise UserError(f"controls = {needing[0]!r}: no block is replicated; leave it out")
        return change

    def require_controls(self, of_channels: bool) -> None:
        """Raises `UserError` for a control that chooses single weights, of tickets of channels."""
        choosing = [control for control in self.controls if control != "reinit"]
        if of_channels and choosing:
            raise UserError(
                f"controls = {choosing[0]!r}: chooses single weights, and of this ticket whole "
                "channels went; leave it out"
            )


def foresee_elastic(
    stage: str, config: ElasticConfig, settings: Settings, outlook: Outlook
) -> Promise:
    """What the stage will have made. Raises `UserError` for what is known to fail."""
    finished = finished_levels(outlook.run, stage, config.controls)
    if finished is not None:
        return Promise(dict.fromkeys(finished, settings.model))
    where, levels = f"stages.{stage}.ticket", []
    found = outlook.sources(where, config.ticket, config.levels)
    of_channels = outlook.of_channels(where, config.ticket, config.levels)
    for level, source in found:
        target = ModelSpec.of(
            settings.model, num_classes=source.num_classes, in_chans=source.in_chans
        )
        with _told_of(stage, source, target):
            _require_same_basis(source, target)
            config.require_controls(of_channels)
            there, here = source.outline(), target.outline()
            transform(there.state_dict(), config.change(there, here), here.state_dict())
        levels.append(level)
    return Promise(dict.fromkeys(levels, settings.model), of_channels=of_channels)


def run_elastic(session: Session, stage: str, config: ElasticConfig) -> None:
    """Trains all tickets of the stage and their controls, as far as they are not finished yet.

    Raises `UserError` for a source of another family, without weights of step k, or whose head has
    another number of classes (unless `transfer`).
    """
    engine, run = session.engine, session.folder
    if engine.on_main(lambda: finished_levels(run, stage, config.controls)) is not None:
        return
    where = f"stages.{stage}.ticket"
    found = engine.on_main(
        lambda: find_sources(where, config.ticket, config.levels, run), patient=True
    )
    moves: list[_Move] = []
    engine.together(lambda: moves.extend(_Move(session, stage, config, f.ticket) for f in found))
    program, num_arms = _Elastic(session, stage, config), 1 + len(config.controls)
    session.display.plan(sum(session.total_steps - move.first_step for move in moves) * num_arms)
    engine.on_main(lambda: claim_sources(run, stage, found))
    for move in moves:
        program.run(move)


class _Move:
    """One source ticket on its way to the target network."""

    def __init__(self, session: Session, stage: str, config: ElasticConfig, source: Ticket) -> None:
        require_weights(source)
        source.require_fit()
        self.source, self.target = source, session.model_spec
        self.first_step = 0 if config.transfer else source.step
        ticket = f"stages.{stage}: ticket {source.place} is of step"
        session.require_before_end(self.first_step, ticket)
        self._fresh_seed = session.seed("elastic", "head")
        with _told_of(stage, source.model, self.target):
            _require_same_basis(source.model, self.target)
            config.require_controls(is_of_channels(source))
            self._fresh = self._fresh_head(config)
            there, here = source.outline(), self.target.outline()
            self.change = config.change(there, here)
            self._tensors, self._maskable = here.state_dict(), maskable(here)
            self._transform(there.state_dict())

    def _fresh_head(self, config: ElasticConfig) -> frozenset[str]:
        """The names of the head's tensors, if they are not copied."""
        there, here = self.source.model, self.target
        if there.in_chans != here.in_chans:
            raise UserError(f"it takes {there.in_chans} channels, the images have {here.in_chans}")
        if there.num_classes == here.num_classes and config.head == "copy":
            return frozenset()
        if not config.transfer:
            raise UserError(
                f"its head has {there.num_classes} classes, the data have {here.num_classes}; for "
                "another data set set transfer = true, which gives it a fresh head"
            )
        return shaped_by(there, "num_classes") | shaped_by(here, "num_classes")

    def _copied(self, tensors: Mapping[str, T]) -> dict[str, T]:
        """All but a head that is fresh."""
        return {name: value for name, value in tensors.items() if name not in self._fresh}

    def _transform(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return transform(self._copied(weights), self.change, self._copied(self._tensors))

    def weights(self) -> dict[str, Tensor]:
        """The state from which the target is trained, not masked."""
        moved = self._transform(self.source.weights())
        if not self._fresh:
            return moved
        fresh = _initial(self.target, self._fresh_seed)
        return {name: moved.get(name, value) for name, value in fresh.items()}

    def masks(self, source: Masks) -> Masks:
        """The target's masks in its layer order; a fresh head is dense."""
        masked = {n: w for n, w in self._maskable.items() if self.change.origin(n) in source}
        moved = transform(self._copied(source), self.change, self._copied(masked))
        dense = {n: torch.ones(masked[n].shape, dtype=torch.bool) for n in masked.keys() - moved}
        return Masks({name: {**moved, **dense}[name] for name in masked})


class _Elastic:
    """The program: each arm is trained by `train_ticket`, at once if it is finished."""

    def __init__(self, session: Session, stage: str, config: ElasticConfig) -> None:
        self.session, self.stage, self.config = session, stage, config
        self.tickets = TicketFolder(session.folder)
        self.network = session.build_network()

    def run(self, move: _Move) -> None:
        """The elastic ticket of one source, and its controls."""
        ticket = self._train(move, "elastic", lambda: move.masks(self._read(move.source)))
        for control in self.config.controls:
            self._control(move, ticket, control)

    def _control(self, move: _Move, ticket: Ticket, control: Control) -> Ticket:
        seed = self.session.seed("elastic", control, ticket.level)
        masks: dict[Control, Callable[[Masks], Masks]] = {
            "random": lambda masks: shuffle_layers(masks, seed),
            "reinit": lambda masks: masks,
            "permuted": lambda masks: self._with_replicas(
                move, masks, lambda replicas: shuffle_layers(replicas, seed)
            ),
            "snip": lambda masks: self._with_replicas(
                move, masks, lambda replicas: self._sensitive(move, masks, replicas)
            ),
        }
        choose, start = masks[control], move.weights
        if control == "reinit":
            start = partial(_initial, move.target, seed)
        return self._train(move, control, lambda: choose(self._read(ticket)), start, ticket)

    def _train(
        self,
        move: _Move,
        method: str,
        masks: Callable[[], Masks],
        start: Callable[[], dict[str, Tensor]] | None = None,
        compared: Ticket | None = None,
    ) -> Ticket:
        """Trains an arm; `compared` is the ticket beside which a control is trained."""
        level, objects, engine = move.source.level, self.tickets.objects, self.session.engine
        arm = Arm(
            stage=self.stage,
            method=method,
            level=level,
            masks=masks,
            start=lambda: Start((start or move.weights)()),
            first_step=move.first_step,
            stop=self.session.total_steps,
            schedule=self.session.schedule,
            seed_labels=("elastic", "order", level),
            parent=compared or move.source,
            control=compared is not None,
            search_steps=move.source.total_steps,
            rewind_step=move.first_step,
            weights=lambda begun: write_weights(objects, begun.weights, engine),
            config={"elastic": asdict(self.config), "map": format_map(move.change.maps)},
        )
        return train_ticket(self.session, self.tickets, self.network, arm)

    def _read(self, ticket: Ticket) -> Masks:
        return ticket.read(self.session.engine).masks

    # Other masks for the replicas ---------------------------------------------------------

    def _with_replicas(self, move: _Move, masks: Masks, choose: Callable[[Masks], Masks]) -> Masks:
        """The masks, those of the further copies of blocks as `choose` makes them."""
        replicas = Masks({n: mask for n, mask in masks.items() if move.change.is_replica(n)})
        return Masks({**masks, **choose(replicas)})

    def _sensitive(self, move: _Move, masks: Masks, replicas: Masks) -> Masks:
        """As many weights as the replicas keep, over all of them, by SNIP at step k."""
        engine, model = self.session.engine, self.network.module
        model.load_state_dict(move.weights())
        rest = Masks({name: mask for name, mask in masks.items() if name not in replicas})
        rest.project_(model)
        batches = self.session.first_batches(self.config.snip_batches, "elastic", "snip")
        scores = snip(model, batches, ranks=engine)
        chosen = {name: scores[name] for name in replicas}
        return keep_count(chosen, replicas.kept, ranks=engine).to("cpu")


def _initial(spec: ModelSpec, seed: int) -> dict[str, Tensor]:
    return spec.build(seed).state_dict()


def _require_same_basis(source: ModelSpec, target: ModelSpec) -> None:
    """Raises `UserError` where coefficients would be taken for weights, or for other ones."""
    there, here = (one.basis or "identity" for one in (source, target))
    if there != here:
        raise UserError(f"its model.basis is {there!r}, this stage's {here!r}: give both the same")


@contextlib.contextmanager
def _told_of(stage: str, source: ModelSpec, target: ModelSpec) -> Iterator[None]:
    """To what does not fit adds of which networks it is said."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"stages.{stage}: a ticket of {source.name} cannot become one of {target.name}: {error}"
        ) from None
