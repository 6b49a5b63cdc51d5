"""Tickets: masks, the weights they start from, and where they come from, in files without pickle.

A level's `ticket.json` is written last and refers to objects in the run's `tickets/` folder, each
in a folder named by the digest of its content: bit-packed masks, and weights, both as safetensors.
Equal masks and equal weights are stored once. Loading recomputes every digest.
"""

import hashlib
import json
import platform
import re
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from data.errors import RunError, UserError
from data.files import Folder
from pruning.masks import Masks, pack_bits, unpack_bits
from train.models import ModelSpec

FORMAT = 1
_FILE = "ticket.json"
_CHOSEN = "masks.json"
_MASKS, _WEIGHTS = "masks.safetensors", "weights.safetensors"


@dataclass(frozen=True)
class Ticket:
    """A sparse trainable subnetwork: which weights, from which state, and what it reached.

    `weights_digest` names the state (weights and buffers) at `step`, from which the ticket is
    trained; it is `None` for a ticket without one (learning-rate rewinding, fine-tuning).
    """

    method: str
    level: int
    density: float
    masks: Masks
    model: ModelSpec
    step: int
    weights_digest: str | None
    parent: str | None
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    stage: str = ""
    name: str = ""
    control: bool = False
    """trained for comparison beside its parent, not a ticket of the method"""
    objects: Folder | None = field(default=None, compare=False, repr=False)

    @property
    def id(self) -> str:
        """SHA-256 of what the ticket is: masks, weights, model, step, lineage; not of metrics."""
        identity = {
            "format": FORMAT,
            "method": self.method,
            "level": self.level,
            "parent": self.parent,
            "masks": self.masks.digest(),
            "weights": self.weights_digest,
            "step": self.step,
            "model": asdict(self.model),
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    @classmethod
    def load(cls, url: str | Path) -> "Ticket":
        """The ticket in a level's folder, such as `runs/digits-imp/imp/level-07`.

        Raises `UserError` where there is none, `RunError` where a file of it is damaged.
        """
        folder = Folder(str(url).removesuffix(f"/{_FILE}"))
        if not folder.exists(_FILE):
            raise UserError(f"{folder}: no ticket here (a ticket is a folder with {_FILE})")
        return _read(folder, folder.parent.parent / "tickets")

    def weights(self) -> dict[str, Tensor]:
        """The state at `step`, on the CPU, not masked. Raises `UserError` if there is none."""
        if self.weights_digest is None or self.objects is None:
            raise UserError(
                f"ticket {self.id[:12]} ({self.method}, level {self.level}) has no weights to "
                "start from: it was found by learning-rate rewinding or fine-tuning"
            )
        return read_weights(self.objects, self.weights_digest)

    def build_model(self) -> nn.Module:
        """The network at `step` with the masked weights zero: what the ticket is trained from."""
        model = self.model.build()
        model.load_state_dict(self.weights())
        self.masks.project_(model)
        return model

    def summary(self) -> dict[str, Any]:
        """All but the masks' bits, as a JSON document."""
        return {
            "format": FORMAT,
            "id": self.id,
            "stage": self.stage,
            "name": self.name,
            "method": self.method,
            "control": self.control,
            "level": self.level,
            "density": self.density,
            "kept": self.masks.kept,
            "parent": self.parent,
            "step": self.step,
            "masks": self.masks.digest(),
            "weights": self.weights_digest,
            "model": asdict(self.model),
            "config": self.config,
            "metrics": self.metrics,
            "timing": self.timing,
            "versions": self.versions,
        }


class TicketFolder:
    """The tickets of a run: `<stage>/<name>/ticket.json`, and the objects that they share."""

    def __init__(self, run: Folder) -> None:
        self._run = run
        self.objects = run / "tickets"

    def find(self, stage: str, name: str) -> Ticket | None:
        """The ticket of that name, or `None` where it is not finished yet."""
        folder = self._run / f"{stage}/{name}"
        return _read(folder, self.objects) if folder.exists(_FILE) else None

    def chosen_masks(self, stage: str, name: str) -> Masks | None:
        """The masks with which a training began, or `None` where it did not begin yet."""
        folder = self._run / f"{stage}/{name}"
        if not folder.exists(_CHOSEN):
            return None
        document = folder.read_json(_CHOSEN)
        if not isinstance(document, dict) or not isinstance(document.get("masks"), str):
            raise RunError(f"{folder}/{_CHOSEN}: damaged: remove it to choose the masks again")
        return read_masks(self.objects, document["masks"])

    def choose_masks(self, stage: str, name: str, masks: Masks) -> None:
        """Writes down the masks with which a training begins: a resume has these, no others."""
        digest = write_masks(self.objects, masks)
        (self._run / f"{stage}/{name}").write_json(_CHOSEN, {"masks": digest})

    def write(self, ticket: Ticket) -> None:
        """Writes the masks, and then the ticket itself."""
        write_masks(self.objects, ticket.masks)
        (self._run / f"{ticket.stage}/{ticket.name}").write_json(_FILE, ticket.summary())

    def all(self) -> list[Ticket]:
        """Every finished ticket of the run, by stage and name."""
        return [
            _read(folder, self.objects)
            for stage in self._run.names()
            for name in (self._run / stage).names()
            if (folder := self._run / f"{stage}/{name}").exists(_FILE)
        ]


def software_versions() -> dict[str, str]:
    """The versions that a result depends on."""
    packages = ("tombola", "torch", "torchvision", "timm", "accelerate", "numpy")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


# Objects ---------------------------------------------------------------------------------


def write_masks(objects: Folder, masks: Masks) -> str:
    """Stores masks under their digest, unless they are there already; returns the digest."""
    digest = masks.digest()
    if not _is_whole(read_masks, objects, digest):
        packed = {
            name: torch.from_numpy(np.frombuffer(pack_bits(mask), np.uint8).copy())
            for name, mask in masks.items()
        }
        shapes = json.dumps({name: list(mask.shape) for name, mask in masks.items()})
        content = safetensors.torch.save(packed, {"format": "tombola-masks-1", "shapes": shapes})
        objects.write(f"{digest}/{_MASKS}", content)
    return digest


def read_masks(objects: Folder, digest: str) -> Masks:
    """The masks of that digest. Raises `RunError` where they are missing or damaged."""
    tensors, header = _read_object(objects, digest, _MASKS)
    file = f"{objects}/{digest}/{_MASKS}"
    try:
        if header.get("format") != "tombola-masks-1":
            raise ValueError(f"unknown format {header.get('format')!r}")
        shapes = {name: tuple(shape) for name, shape in json.loads(header["shapes"]).items()}
        masks = Masks(
            {name: unpack_bits(tensors[name].numpy().tobytes(), s) for name, s in shapes.items()}
        )
    except (KeyError, ValueError, TypeError) as error:
        raise RunError(f"{file}: damaged: {error}") from error
    if masks.digest() != digest:
        raise RunError(f"{file}: damaged: its content does not match its digest")
    return masks


def write_weights(objects: Folder, weights: dict[str, Tensor]) -> str:
    """Stores a state dict under its digest, unless it is there already; returns the digest."""
    plain = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    digest = weights_digest(plain)
    if not _is_whole(read_weights, objects, digest):
        content = safetensors.torch.save(plain, {"format": "tombola-weights-1"})
        objects.write(f"{digest}/{_WEIGHTS}", content)
    return digest


def read_weights(objects: Folder, digest: str) -> dict[str, Tensor]:
    """The state dict of that digest. Raises `RunError` where it is missing or damaged."""
    tensors, _ = _read_object(objects, digest, _WEIGHTS)
    if weights_digest(tensors) != digest:
        file = f"{objects}/{digest}/{_WEIGHTS}"
        raise RunError(f"{file}: damaged: its content does not match its digest")
    return tensors


def weights_digest(weights: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values."""
    sha = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        sha.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        sha.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _is_whole(read: Callable[[Folder, str], object], objects: Folder, digest: str) -> bool:
    """Whether the object is there and undamaged: a damaged one is written again."""
    try:
        read(objects, digest)
    except RunError:
        return False
    return True


def _read_object(
    objects: Folder, digest: str, name: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise RunError(f"{digest!r} is no digest")
    file = f"{digest}/{name}"
    try:
        content = objects.read(file)
        tensors = safetensors.torch.load(content)
        (length,) = struct.unpack("<Q", content[:8])
        header: dict[str, str] = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    except FileNotFoundError as error:
        raise RunError(f"{objects}/{file}: missing") from error
    except (SafetensorError, ValueError) as error:
        raise RunError(f"{objects}/{file}: damaged: {error}") from error
    return tensors, header


def _read(folder: Folder, objects: Folder) -> Ticket:
    try:
        document = folder.read_json(_FILE)
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']!r} is not known, only {FORMAT}")
        ticket = Ticket(
            method=document["method"],
            level=document["level"],
            density=document["density"],
            masks=read_masks(objects, document["masks"]),
            model=ModelSpec(**document["model"]),
            step=document["step"],
            weights_digest=document["weights"],
            parent=document["parent"],
            config=document["config"],
            metrics=document["metrics"],
            timing=document["timing"],
            versions=document["versions"],
            stage=document["stage"],
            name=document["name"],
            control=document["control"],
            objects=objects,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{folder}/{_FILE}: damaged: {error}") from error
    if ticket.id != document["id"]:
        raise RunError(f"{folder}/{_FILE}: damaged: its content does not match its id")
    return ticket
