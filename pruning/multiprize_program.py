"""Multi-prize tickets as a stage of a run: a search over scores, density by density.

Diffenderfer and Kailkhura 2021 (2103.09377); `pruning.multiprize` has the layers. For each density
the same random weights are drawn, the scores are trained for the whole length of the training, and
what they choose in the end is the ticket: nothing is trained after it.

Choices where the paper leaves them open: all densities see the data in the same order; a bias is
zero; normalisations begin with weight one and bias zero, as layer scales do with one; and what
else a network has (position embeddings, class tokens) keeps its initial values.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from data.errors import UserError
from pruning.allocate import Scope
from pruning.masks import Masks, prunable
from pruning.multiprize import Gradient, Weights, num_kept, score, scored_layers
from pruning.packing import Shape
from pruning.program import Arm, train_ticket
from pruning.random_weights import Init, RandomWeights, Scaled
from pruning.score_training import Share, TrainedScores
from pruning.signed_weights import SignedLayer, SignedWeights
from pruning.sources import (
    Found,
    Outlook,
    Promise,
    check_levels,
    claim_sources,
    find_sources,
)
from pruning.store import TicketFolder
from pruning.tickets import Ticket
from pruning.weight_store import StoredWeights, write_weights
from train.duration import check_durations
from train.models import ModelSpec, shaped_by
from train.optim import NORMALISATIONS
from train.session import MakeSparsity, Session, Start
from train.settings import Settings

MULTIPRIZE_DEFAULTS = {"optimizer.weight_decay": "5e-4", "schedule.name": "cosine"}
"""the authors' on CIFAR-10: SGD with 0.1, a cosine, and this weight decay on the scores"""
_SEED_BITS = (1 << 32) - 1


@dataclass(frozen=True)
class MultiprizeConfig:
    """Multi-prize tickets: subnetworks of random weights, chosen by trained scores and never
    trained themselves. With model.activation = 'sign' activations are binary too (MPT-1/1)."""

    density: tuple[float, ...] | Literal["ticket"] = (0.3,)
    """the fraction kept; several are searched one after the other; or ticket, in each layer as many
    weights as the ticket of another stage keeps there"""
    ticket: str | None = None
    """with density = ticket: an earlier stage, or RUN/STAGE, RUN/STAGE/LEVEL, STORE/ID"""
    levels: tuple[int, ...] = ()
    """with density = ticket: which levels of that stage (default: its sparsest)"""
    scope: Scope = "layer"
    """keep the same fraction of each layer, or rank the scores over all layers"""
    min_kept: int = 1
    """scope = global: how many weights each layer keeps at least"""
    ramp: str | None = None
    """time in which the density falls from 50 % to its target, by a cubic curve (default: 10% with
    scope = global, else none)"""
    weights: Weights = "binary"
    """signs times one gain a layer, or float: the random weights themselves (edge-popup)"""
    init: Init = "signed_constant"
    """the random weights' magnitudes: one a layer, or kaiming_normal"""
    scaled: Scaled = "none"
    """scale them up for the density, so that the variance is kept; biprop: for what is pruned, as
    the authors' code does"""
    gradient: Gradient = "biprop"
    """of the scores: the authors', or literal (a deviation: the chain rule's, with the gain)"""
    batchnorm: Literal["fixed", "learned"] = "fixed"
    """whether weights and biases of normalisations are trained (+BN in the paper)"""
    dense_first: bool = False
    """leave the layer that sees the images dense, real and random"""
    dense_last: bool = False
    """leave the classifier dense, real and random"""
    train_dense: bool = False
    """train these dense layers"""

    def __post_init__(self) -> None:
        check_durations(self, "ramp")
        check_levels(self)
        if self.density == "ticket" and self.ticket is None:
            raise ValueError("density = 'ticket': needs ticket, the stage that gives it")
        if self.density != "ticket" and self.ticket is not None:
            raise ValueError(f"ticket = {self.ticket!r}: needs density = 'ticket'")
        if self.levels and self.ticket is None:
            raise ValueError(f"levels = {list(self.levels)}: needs density = 'ticket'")
        for density in self.densities:
            if not 0 < density <= 1:
                raise ValueError(f"density = {density}: must be above 0 and at most 1")
        if self.density != "ticket" and len(set(self.densities)) < max(1, len(self.densities)):
            raise ValueError(f"density = {list(self.densities)}: give each once, and at least one")
        if self.min_kept < 1:
            raise ValueError(f"min_kept = {self.min_kept}: must be at least 1")
        if self.ticket is not None and (self.scope == "global" or self.ramp is not None):
            raise ValueError("density = 'ticket' goes by layer: leave out scope and ramp")
        if self.scaled == "biprop" and (self.ticket is not None or 1 in self.densities):
            raise ValueError("scaled = 'biprop': needs a density below 1, it scales for the rest")
        if self.train_dense and not (self.dense_first or self.dense_last):
            raise ValueError("train_dense: needs dense_first or dense_last")

    @property
    def densities(self) -> tuple[float, ...]:
        """Those that are given as numbers."""
        return () if isinstance(self.density, str) else self.density

    @property
    def ramp_length(self) -> str:
        """The ramp as a duration."""
        return self.ramp or ("10%" if self.scope == "global" else "0it")

    def dense(self, spec: ModelSpec) -> frozenset[str]:
        """The names of the weights that are not chosen by scores."""
        first = shaped_by(spec, "in_chans") if self.dense_first else frozenset()
        last = shaped_by(spec, "num_classes") if self.dense_last else frozenset()
        return first | last

    def adapt(self, model: nn.Module, spec: ModelSpec) -> None:
        """Makes a network one whose scores are trained, in place. Raises `UserError`."""
        score(model, exclude=self.dense(spec), weights=self.weights, gradient=self.gradient)
        _freeze(model, learned=self.batchnorm == "learned", trained=self._trained(spec))

    def _trained(self, spec: ModelSpec) -> frozenset[str]:
        return self.dense(spec) if self.train_dense else frozenset()


def _freeze(model: nn.Module, *, learned: bool, trained: frozenset[str]) -> None:
    """Leaves the scores to be trained, what is `trained`, and normalisations if they are learned.

    These begin as the identity: timm starts some with zero or nearly so, and would stay there.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained or name.rpartition(".")[2] == "scores")
    for module in model.modules():
        normalises = isinstance(module, NORMALISATIONS) or "Norm" in type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            if name.startswith("gamma") or (normalises and name == "weight"):
                nn.init.ones_(parameter)
            elif normalises and name == "bias":
                nn.init.zeros_(parameter)
            else:
                continue
            parameter.requires_grad_(learned)


# Before anything is trained ------------------------------------------------------------------


def foresee_multiprize(
    stage: str, config: MultiprizeConfig, settings: Settings, outlook: Outlook
) -> Promise:
    """What the stage will have made. Raises `UserError` for what is known to fail."""
    if settings.train.ema is not None:
        raise UserError(
            f"stages.{stage}: train.ema = {settings.train.ema}: averaged scores choose other "
            "weights than those that were trained; leave it out"
        )
    spec = ModelSpec.of(settings.model, num_classes=10, in_chans=3)
    model = spec.outline()
    try:
        config.adapt(model, spec)
        sizes = {name: layer.scores.numel() for name, layer in scored_layers(model).items()}
        for density in config.densities if config.scope == "global" else ():
            _require_enough(density, sizes, config.min_kept)
    except UserError as error:
        raise UserError(f"stages.{stage}: {settings.model.name}: {error}") from None
    if config.ticket is None:
        return Promise(settings.model, tuple(range(len(config.densities))))
    where = f"stages.{stage}.ticket"
    found = outlook.sources(where, config.ticket, config.levels, needed="masks")
    for _, source in found:
        here = ModelSpec.of(
            settings.model, num_classes=source.num_classes, in_chans=source.in_chans
        )
        _require_layers(where, source.name, shapes_of(source), shapes_of(here))
    return Promise(settings.model, tuple(level for level, _ in found))


def shapes_of(spec: ModelSpec) -> dict[str, Shape]:
    """The shapes of all weights of a network that can be chosen, in layer order."""
    return {name: tuple(weight.shape) for name, weight in prunable(spec.outline()).items()}


def _require_enough(density: float, sizes: Mapping[str, int], least: int) -> None:
    """Raises `UserError` where a density over all layers cannot give each its least."""
    count, needed = (
        num_kept(density, sum(sizes.values())),
        sum(min(least, n) for n in sizes.values()),
    )
    if count < needed:
        raise UserError(
            f"density = {density} keeps {count} weights; {least} in each of {len(sizes)} layers "
            f"are {needed}: keep more"
        )


def _require_layers(
    where: str, source: str, masked: Mapping[str, Shape], here: Mapping[str, Shape]
) -> None:
    """Raises `UserError` unless the masks of a ticket are of weights that this model has."""
    for name, shape in masked.items():
        if here.get(name) != shape:
            raise UserError(
                f"{where}: {source} has {name} of {shape}, this model {here.get(name, 'none')}: "
                "name a ticket of the same network"
            )


# The program ----------------------------------------------------------------------------------


def run_multiprize(session: Session, stage: str, config: MultiprizeConfig) -> None:
    """Searches all tickets of the stage, as far as they are not finished yet.

    Raises `UserError` for a source of another network, or a density that keeps too little.
    """
    _Multiprize(session, stage, config).run()


class _Multiprize:
    """The program: each density is an arm of `train_ticket`, at once if it is finished."""

    def __init__(self, session: Session, stage: str, config: MultiprizeConfig) -> None:
        self.session, self.stage, self.config = session, stage, config
        self.tickets, self.spec = TicketFolder(session.folder), session.model_spec
        self.network = session.build_network(adapt=lambda model: config.adapt(model, self.spec))
        self._require_called()
        self._layers = scored_layers(self.network.module)
        self._index = {name: number for number, name in enumerate(shapes_of(self.spec))}
        seed = session.seed("multiprize", "weights") & _SEED_BITS
        self.random = RandomWeights(seed, config.init, config.scaled)
        self._initial = {k: v.cpu().clone() for k, v in self.network.module.state_dict().items()}

    def _require_called(self) -> None:
        """Raises `UserError` for a layer of which the network uses only the weight."""
        layers, called = scored_layers(self.network.module), set()
        hooks = [
            layer.register_forward_hook(lambda *_, name=name: called.add(name))
            for name, layer in layers.items()
        ]
        was_training = self.network.module.training
        with torch.no_grad():
            example = self.session.engine.example(self.session.data.image_shape, 2)
            self.network.module.eval()(self.session.engine.place(example))
        self.network.module.train(was_training)
        for hook in hooks:
            hook.remove()
        for name in layers.keys() - called:
            raise UserError(
                f"stages.{self.stage}: {self.spec.name} does not call its layer {name}, so that "
                "scores cannot choose its weights; choose another model"
            )

    def run(self) -> None:
        sources = self._sources()
        num_arms = len(sources) or len(self.config.densities)
        self.session.display.plan(self.session.total_steps * num_arms)
        for found in sources:
            self._search(found.ticket.level, self._counts(found.ticket), found.ticket)
        for level, density in enumerate(self.config.densities):
            self._search(level, density)

    def _sources(self) -> list[Found]:
        """The tickets that give the densities, and no others than those of an earlier attempt."""
        config, engine, run = self.config, self.session.engine, self.session.folder
        if config.ticket is None:
            return []
        where, place, levels = f"stages.{self.stage}.ticket", config.ticket, config.levels

        def find() -> list[Found]:
            found = find_sources(where, place, levels, run)
            for one in found:
                masked = one.ticket.stored_masks.shapes
                _require_layers(where, one.ticket.place, masked, shapes_of(self.spec))
            claim_sources(run, self.stage, found)
            return found

        return engine.on_main(find, patient=True)

    def _counts(self, source: Ticket) -> dict[str, int]:
        """How many weights each layer keeps: as many as the source, or all if it has no mask."""
        sizes = {name: layer.scores.numel() for name, layer in self._layers.items()}
        return {name: source.stored_masks.kept.get(name, size) for name, size in sizes.items()}

    def _search(
        self, level: int, density: float | Mapping[str, int], source: Ticket | None = None
    ) -> Ticket:
        config, session = self.config, self.session
        ramp = session.steps(config.ramp_length)
        share = Share(density, config.scope, config.min_kept, ramp)
        arm = Arm(
            stage=self.stage,
            method="multiprize",
            level=level,
            masks=lambda: share.choose(self._scores(), 0).to("cpu"),
            start=lambda: self._start(density),
            first_step=0,
            stop=session.total_steps,
            schedule=session.schedule,
            seed_labels=("multiprize", "order"),
            parent=source,
            weights=lambda start: self._stored(),
            config={
                "multiprize": asdict(config),
                "preprocessing": asdict(session.data.preprocessing),
            },
        )

        def make_sparsity(masks: Masks) -> MakeSparsity:
            return lambda model, optimizer: TrainedScores(model, share, ranks=session.engine)

        return train_ticket(session, self.tickets, self.network, arm, make_sparsity)

    # Weights -----------------------------------------------------------------------------

    def _scores(self) -> dict[str, Tensor]:
        return {name: layer.scores.detach() for name, layer in self._layers.items()}

    def _start(self, density: float | Mapping[str, int]) -> Start:
        """The network as it is before any score is trained, its random weights drawn."""
        for name, layer in self._layers.items():
            shape, index = tuple(layer.scores.shape), self._index[name]
            kept = density if isinstance(density, float) else density[name] / layer.scores.numel()
            random = self.random.weight(shape, index, kept)
            layer.draw(random, self.random.scores(shape, index))
        scores = {f"{n.removesuffix('weight')}scores": s for n, s in self._scores().items()}
        return Start(self._initial | {name: s.cpu().clone() for name, s in scores.items()})

    def _stored(self) -> StoredWeights | SignedWeights:
        """The weights that were chosen, and what was trained beside them."""
        objects, engine = self.tickets.objects, self.session.engine
        state = {
            name: value
            for name, value in self.network.module.state_dict().items()
            if not name.endswith(".scores")
        }
        if self.config.weights == "float":
            drawn = {name: layer.random for name, layer in self._layers.items()}
            return write_weights(objects, {**state, **drawn}, engine)
        layers = {
            name: SignedLayer(tuple(layer.random.shape), self._index[name], float(layer.gain))
            for name, layer in self._layers.items()
        }
        return SignedWeights(layers, write_weights(objects, state, engine), self.random.seed)
