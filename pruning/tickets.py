"""Tickets: which weights are kept, from which state they are trained, and where they come from.

A ticket is an index, a JSON document that is written last, and the objects that it names: the
bits of its masks, and the weights at step k. The index hashes to the ticket's id; every object is
verified on loading; nothing goes through pickle. docs/formats.md specifies it.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from data.errors import RunError, UserError
from data.files import Folder
from pruning import document
from pruning.mask_store import StoredMasks, read_masks
from pruning.masks import Masks, maskable
from pruning.objects import Objects
from pruning.packing import canonical
from pruning.signed_weights import SignedWeights, stored_state
from pruning.weight_store import StoredWeights
from train.models import ModelSpec
from train.ranks import ALONE, Ranks

KIND = "tombola-ticket"
INDEX = "ticket.json"
"""in the folder of a level"""
STORED = re.compile(r"([0-9a-f]{64})\.json")
"""in a store"""
_SHORTEST_ID = 6


@dataclass(frozen=True)
class Ancestor:
    """A ticket of the lineage, as its descendants remember it."""

    id: str
    place: str
    """stage and level in its run: imp/level-03"""
    method: str
    level: int
    density: float


@dataclass(frozen=True)
class Ticket:
    """A sparse trainable subnetwork: which weights, from which state, and what it reached.

    `stored_weights` is the state (weights and buffers) at `step`, from which the ticket is
    trained; it is `None` for a ticket without one (learning-rate rewinding, fine-tuning).
    """

    method: str
    level: int
    model: ModelSpec
    step: int
    stored_masks: StoredMasks
    stored_weights: StoredWeights | SignedWeights | None
    objects: Objects = field(compare=False, repr=False)
    parent: str | None = None
    lineage: tuple[Ancestor, ...] = ()
    """the parent, its parent, and so on"""
    stage: str = ""
    name: str = ""
    control: bool = False
    """trained for comparison beside its parent, not a ticket of the method"""
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, url: str | Path, ranks: Ranks = ALONE) -> "Ticket":
        """The ticket at a place such as `runs/digits-imp/imp/level-07` or `s3://store/<id>.json`.

        With several ranks each reads a part of the masks. Raises `UserError` where there is none,
        `RunError` where a file of it is damaged.
        """
        return ranks.on_main(lambda: find_ticket(url)).read(ranks)

    def read(self, ranks: Ranks = ALONE) -> "Ticket":
        """This ticket, with its masks read and verified. Raises `RunError`."""
        if "masks" not in vars(self):
            self.hold(read_masks(self.objects, self.stored_masks, ranks))
        return self

    def hold(self, masks: Masks) -> "Ticket":
        """This ticket, with its masks, which then need not be read."""
        vars(self)["masks"] = masks
        return self

    @cached_property
    def masks(self) -> Masks:
        """What is kept; read from the objects when it is first asked for."""
        return read_masks(self.objects, self.stored_masks)

    @cached_property
    def id(self) -> str:
        """SHA-256 of what the ticket is: masks, weights, model, step, lineage; not of metrics."""
        return hashlib.sha256(canonical(self._identity())).hexdigest()

    @property
    def density(self) -> float:
        """The fraction of the prunable weights that is kept."""
        return self.stored_masks.num_kept / self.stored_masks.size

    @property
    def place(self) -> str:
        """Stage and level in its run, such as `imp/level-03`; its method where it has none."""
        return f"{self.stage}/{self.name}" if self.stage else self.method

    @property
    def accuracy(self) -> float:
        """On the test images at the end of its training. Raises `UserError` where none is told."""
        try:
            return float(self.metrics["test"]["accuracy"])
        except (KeyError, TypeError):
            raise UserError(
                f"ticket {self.id[:12]} ({self.place}) tells no test accuracy: it "
                "was not trained here"
            ) from None

    @property
    def weights_are_final(self) -> bool:
        """Whether its weights were chosen and not trained: its accuracy is theirs, masked."""
        return self.method == "multiprize"

    @property
    def total_steps(self) -> int:
        """Optimizer steps behind its accuracy: those of the search for it, and its training."""
        return int(self.timing.get("search_steps", 0) + self.timing.get("steps", 0))

    @property
    def weights_digest(self) -> str | None:
        """Names the state at `step`."""
        return None if self.stored_weights is None else self.stored_weights.digest

    def weights(self) -> dict[str, Tensor]:
        """The state at `step`, on the CPU, not masked. Raises `UserError` if there is none."""
        if self.stored_weights is None:
            raise UserError(
                f"ticket {self.id[:12]} ({self.method}, level {self.level}) has no weights to "
                "start from: it was found by learning-rate rewinding or fine-tuning, or imported "
                "as masks alone"
            )
        return self.stored_weights.read(self.objects)

    def build_model(self) -> nn.Module:
        """The network at `step` with the masked weights zero: what the ticket is trained from."""
        self.require_fit()
        weights = self.weights()
        model = self.model.build()
        model.load_state_dict(weights)
        self.masks.project_(model)
        return model

    def require_fit(self, weights: Mapping[str, Tensor] | None = None) -> None:
        """Raises `RunError` unless masks and weights are of the shapes that the model has.

        The weights are those at `step`, or others that shall take their place.
        """
        model = self.outline()
        shapes = {name: tuple(weight.shape) for name, weight in maskable(model).items()}
        for name, shape in self.stored_masks.shapes.items():
            if shapes.get(name) != shape:
                raise RunError(f"ticket {self.id[:12]}: no weights {name} of {shape} in its model")
        if weights is None and self.stored_weights is None:
            return
        told = {} if self.stored_weights is None else self.stored_weights.shapes
        if weights is not None:
            told = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        if told != {name: tuple(value.shape) for name, value in model.state_dict().items()}:
            raise RunError(f"ticket {self.id[:12]}: its weights are not those of its model")

    def outline(self) -> nn.Module:
        """The model without memory for its weights. Raises `RunError`: it may be anyone's."""
        return outline_of(self.model, f"ticket {self.id[:12]}")

    def as_ancestor(self) -> Ancestor:
        """What descendants remember of this ticket."""
        return Ancestor(self.id, self.place, self.method, self.level, self.density)

    def summary(self) -> dict[str, Any]:
        """All but bits and weights, as a JSON document."""
        return {
            "id": self.id,
            "stage": self.stage,
            "name": self.name,
            "density": self.density,
            "kept": self.stored_masks.num_kept,
            **self._identity(),
            **self._about(),
        }

    def _identity(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "level": self.level,
            "step": self.step,
            "parent": self.parent,
            "model": asdict(self.model),
            "masks": self.stored_masks.digest,
            "weights": self.weights_digest,
        }

    def _about(self) -> dict[str, Any]:
        """What does not make the ticket another one."""
        about: dict[str, Any] = document.finite(
            {
                "stage": self.stage,
                "name": self.name,
                "control": self.control,
                "lineage": [asdict(one) for one in self.lineage],
                "config": self.config,
                "metrics": self.metrics,
                "timing": self.timing,
                "versions": self.versions,
            }
        )
        return about


def find_ticket(url: str | Path) -> Ticket:
    """The ticket at a place, without its masks' bits.

    The place is a level's folder in a run, `STORE/<id>.json`, or `STORE/<beginning of the id>`.
    Raises `UserError` where there is none, `RunError` where its index is damaged.
    """
    location = str(url).rstrip("/").removesuffix(f"/{INDEX}")
    folder = Folder(location)
    if folder.exists(INDEX):
        return read_index(folder, INDEX, run_objects(folder.parent.parent))
    if location.endswith(".mpt"):
        raise UserError(
            f"{folder}: a file of one network, not a ticket of a run or a store: bring it into a "
            "store by tombola tickets import FILE --from mpt -o STORE"
        )
    parent, _, name = folder.url.rpartition("/")
    store, beginning = Folder(parent or "."), name.removesuffix(".json")
    if re.fullmatch(rf"[0-9a-f]{{{_SHORTEST_ID},64}}", beginning):
        found = _beginning_with(store, beginning)
        if len(found) > 1:
            raise UserError(f"{folder}: {len(found)} tickets begin like that: give more of the id")
        if found:
            return read_stored(store, found[0])
    raise UserError(
        f"{folder}: no ticket here (a ticket is a folder with {INDEX}, or STORE/ID in a store)"
    )


def _beginning_with(store: Folder, beginning: str) -> list[str]:
    """The ids in a store that begin so. A whole id needs no listing: not all storages have one."""
    if len(beginning) == 64:
        return [beginning] if store.exists(f"{beginning}.json") else []
    names = (STORED.fullmatch(name) for name in store.names())
    return [match[1] for match in names if match and match[1].startswith(beginning)]


def run_objects(run: Folder) -> Objects:
    """What the tickets of a run share."""
    return Objects(run / "tickets/objects")


def read_stored(store: Folder, ticket_id: str) -> Ticket:
    """A ticket of a store by its id. Raises `FileNotFoundError` or `RunError`."""
    name = f"{ticket_id}.json"
    ticket = read_index(store, name, Objects(store / "objects"))
    if ticket.id != ticket_id:
        raise RunError(f"{store}/{name}: damaged: this is ticket {ticket.id}")
    return ticket


def write_index(ticket: Ticket, folder: Folder, name: str) -> None:
    """Commits a ticket, whose objects are there."""
    body = {
        "id": ticket.id,
        "identity": ticket._identity(),
        "masks": ticket.stored_masks.to_json(),
        "weights": None if ticket.stored_weights is None else ticket.stored_weights.to_json(),
        "about": ticket._about(),
    }
    document.write_document(folder, name, KIND, body)


def read_index(folder: Folder, name: str, objects: Objects) -> Ticket:
    """A ticket without its masks' bits. Raises `FileNotFoundError` or `RunError`."""
    return document.read_document(folder, name, KIND, lambda body: _parse(body, objects))


def _parse(body: dict[str, Any], objects: Objects) -> Ticket:
    identity = document.mapping(body["identity"], "identity")
    about = document.mapping(body["about"], "about")
    weights = body["weights"]
    ticket = Ticket(
        method=document.text(identity["method"], "method"),
        level=document.count(identity["level"], "level"),
        model=model_from_json(identity["model"]),
        step=document.count(identity["step"], "step"),
        stored_masks=StoredMasks.from_json(body["masks"]),
        stored_weights=None if weights is None else stored_state(weights),
        objects=objects,
        parent=document.optional(document.digest, identity["parent"], "parent"),
        lineage=tuple(map(_ancestor, document.sequence(about["lineage"], "lineage"))),
        stage=document.text(about["stage"], "stage"),
        name=document.text(about["name"], "name"),
        control=document.flag(about["control"], "control"),
        config=document.mapping(about["config"], "config"),
        metrics=document.table(_measures, about["metrics"], "metrics"),
        timing=_measures(about["timing"], "timing"),
        versions=document.table(document.text, about["versions"], "versions"),
    )
    if not ticket.stored_masks.size:
        raise ValueError("its masks are of no weights")
    if ticket._identity() != identity or ticket.id != body["id"]:
        raise ValueError("its content does not match its id")
    return ticket


def outline_of(model: ModelSpec, where: str) -> nn.Module:
    """A model without memory for its weights. Raises `RunError`: it may be anyone's."""
    try:
        return model.outline()
    except Exception as error:
        problem, *_ = (str(error) or type(error).__name__).splitlines()
        raise RunError(f"{where}: its model cannot be built: {problem:.200}") from error


def model_from_json(value: Any) -> ModelSpec:
    """A model's specification, which may be anyone's. Raises `ValueError` or `KeyError`."""
    row = document.mapping(value, "model")
    arguments = document.mapping(row["arguments"], "model.arguments")
    return ModelSpec(
        document.text(row["name"], "model.name"),
        document.count(row["num_classes"], "model.num_classes"),
        document.count(row["in_chans"], "model.in_chans"),
        {document.text(name, "a model argument"): inner for name, inner in arguments.items()},
    )


def _ancestor(value: Any) -> Ancestor:
    row = document.mapping(value, "an ancestor")
    return Ancestor(
        document.digest(row["id"], "an ancestor"),
        document.text(row["place"], "place"),
        document.text(row["method"], "method"),
        document.count(row["level"], "level"),
        document.fraction(row["density"], "density"),
    )


def told_of(about: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Level and metrics in what a file tells of a ticket, which may be anyone's.

    Raises `ValueError`.
    """
    level = document.count(about.get("level", 0), "level")
    return level, document.table(_measures, about.get("metrics", {}), "metrics")


def _measures(value: Any, what: str) -> dict[str, Any]:
    """Numbers by their names; `None` for what was not finite."""
    return document.table(partial(document.optional, document.number), value, what)
