"""Multi-prize tickets as a stage of a run: a search over scores, density by density.

Diffenderfer and Kailkhura 2021 (2103.09377); `pruning.multiprize` has the layers. For each density
the same random weights are drawn, the scores are trained for the whole length of the training, and
what they choose in the end is the ticket: nothing is trained after it.

Choices where the paper leaves them open: all densities see the data in the same order; a bias is
zero; normalisations begin with weight one and bias zero, as layer scales do with one; and what
else a network has (position embeddings, class tokens) keeps its initial values.
"""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial

from torch import Tensor

from data.errors import UserError
from pruning.choosing import require_enough
from pruning.masks import maskable
from pruning.multiprize import scored_layers, uncalled
from pruning.multiprize_config import (
    MultiprizeConfig,
    require_called,
    require_layers,
    shapes_of,
)
from pruning.program import Arm, train_ticket
from pruning.random_weights import RandomWeights
from pruning.score_training import Share, TrainedScores
from pruning.signed_weights import SignedLayer, SignedWeights
from pruning.sources import Found, claim_sources, find_sources, finished_levels
from pruning.store import TicketFolder
from pruning.tickets import Ticket
from pruning.weight_store import StoredWeights, write_weights
from train.session import Session, Start

_SEED_BITS = (1 << 32) - 1


def run_multiprize(session: Session, stage: str, config: MultiprizeConfig) -> None:
    """Searches all tickets of the stage, as far as they are not finished yet.

    Raises `UserError` for a source of another network, or a density that keeps too little.
    """
    run, engine = session.folder, session.engine
    if config.ticket is None or engine.on_main(lambda: finished_levels(run, stage)) is None:
        _Multiprize(session, stage, config).run()


class _Multiprize:
    """The program: each density is an arm of `train_ticket`, at once if it is finished."""

    def __init__(self, session: Session, stage: str, config: MultiprizeConfig) -> None:
        self.session, self.stage, self.config = session, stage, config
        self.tickets, self.spec = TicketFolder(session.folder), session.model_spec
        self.network = session.build_network(adapt=lambda model: config.adapt(model, self.spec))
        self._layers = scored_layers(self.network.module)
        self.ramp = session.steps(config.ramp_length)
        self._check()
        self._index = {name: number for number, name in enumerate(shapes_of(self.spec))}
        seed = session.seed("multiprize", "weights") & _SEED_BITS
        self.random = RandomWeights(seed, config.init, config.scaled)
        self._initial = {k: v.cpu().clone() for k, v in self.network.module.state_dict().items()}

    def _check(self) -> None:
        """Raises `UserError` for what only the data and the network itself tell."""
        config, session, stage = self.config, self.session, f"stages.{self.stage}"
        session.require_before_end(self.ramp, f"{stage}.ramp = {config.ramp_length!r} is step")
        sizes = {name: layer.scores.numel() for name, layer in self._layers.items()}
        images = session.engine.example(session.data.image_shape, 2)
        lost = uncalled(self.network.module, session.engine.place(images))
        try:
            require_called(lost)
            for density in config.densities if config.scope == "global" else ():
                require_enough(density, sizes, config.min_kept)
        except UserError as error:
            raise UserError(f"{stage}: {self.spec.name}: {error}") from None

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

        known = {name: tuple(w.shape) for name, w in maskable(self.spec.outline()).items()}

        def find() -> list[Found]:
            found = find_sources(where, place, levels, run)
            for one in found:
                masks = one.ticket.stored_masks
                require_layers(where, one.ticket.place, masks.shapes, known)
                for name, kept in masks.kept.items():
                    if not kept and name in self._layers:
                        raise UserError(
                            f"{where}: {one.ticket.place} keeps nothing of {name}: choose a level "
                            "that keeps some of each layer"
                        )
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
        share = Share(density, config.scope, config.min_kept, self.ramp)
        arm = Arm(
            stage=self.stage,
            method="multiprize",
            level=level,
            masks=None,
            sparsity=lambda _: partial(TrainedScores, share, session.engine),
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
        return train_ticket(session, self.tickets, self.network, arm)

    # Weights -----------------------------------------------------------------------------

    def _start(self, density: float | Mapping[str, int]) -> Start:
        """The network as it is before any score is trained, its random weights drawn."""
        scores: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            shape, index = tuple(layer.scores.shape), self._index[name]
            if isinstance(density, Mapping):
                kept = density[name] / layer.scores.numel()
            else:
                kept = density
            layer.draw(self.random.weight(shape, index, kept))
            scores[f"{name.removesuffix('weight')}scores"] = self.random.scores(shape, index)
        return Start(self._initial | scores)

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
