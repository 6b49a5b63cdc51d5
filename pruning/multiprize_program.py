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

import torch
from torch import Tensor

from data.errors import UserError
from pruning.masks import Masks
from pruning.multiprize import scored_layers
from pruning.multiprize_config import MultiprizeConfig, require_layers, shapes_of
from pruning.program import Arm, train_ticket
from pruning.random_weights import RandomWeights
from pruning.score_training import Share, TrainedScores
from pruning.signed_weights import SignedLayer, SignedWeights
from pruning.sources import Found, claim_sources, find_sources, finished_levels
from pruning.store import TicketFolder
from pruning.tickets import Ticket
from pruning.weight_store import StoredWeights, write_weights
from train.session import MakeSparsity, Session, Start

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
                masks = one.ticket.stored_masks
                require_layers(where, one.ticket.place, masks.shapes, shapes_of(self.spec))
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
