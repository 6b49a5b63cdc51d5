"""A ticket's network in forms that other tools read; docs/export.md says what each file holds."""

import io
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from data.errors import RunError, UserError
from data.files import Folder
from pruning import document, mpt, semi_structured_file
from pruning.onnx_model import to_onnx
from pruning.packing import Shape
from pruning.prizes import Prize
from pruning.tickets import Ticket
from pruning.trained import trained_weights
from train.basis import weights_of

Format = Literal["torch", "safetensors", "onnx", "pruning", "mpt", "semi-structured"]


@dataclass(frozen=True)
class Subnetwork:
    """A ticket with one of its sets of weights: those at step k, or those it was trained to."""

    ticket: Ticket
    weights: dict[str, Tensor]
    """the state dict, masked or not"""
    trained: bool = False

    @classmethod
    def at_start(cls, ticket: Ticket) -> "Subnetwork":
        """What the ticket is trained from. Raises `UserError` where it has no such weights."""
        ticket.require_fit()
        return cls(ticket, ticket.weights())

    @classmethod
    def at_end(cls, ticket: Ticket, level: Folder) -> "Subnetwork":
        """What the training in a run's folder of a level came to, averaged (EMA) if it was.

        Raises `UserError` where no checkpoint of its end is there, `RunError` for a damaged one.
        """
        return cls(ticket, trained_weights(ticket, level), trained=True)

    def build_model(self) -> nn.Module:
        """The network, masked weights zero: without a basis, its coefficients made weights."""
        spec = self.ticket.model
        model = spec.build()
        model.load_state_dict(self.weights)
        self.ticket.masks.project_(model)
        if spec.basis is None:
            return model
        plain = spec.plain.build()
        plain.load_state_dict(weights_of(model))
        return plain

    def facts(self) -> dict[str, str]:
        """What a file's metadata say of its origin."""
        ticket, basis = self.ticket, self.ticket.model.basis
        facts = {
            "ticket": ticket.id,
            "model": json.dumps(asdict(ticket.model.plain)),
            "density": repr(ticket.density),
            "weights": "trained" if self.trained else f"step {ticket.step}",
        }
        return facts if basis is None else {**facts, "basis": basis}


def export(network: Subnetwork, form: Format, *, image_size: int | None = None) -> bytes:
    """The content of a file of that form; `image_size`, the side, is for ONNX and mpt.

    Raises `UserError` where the packages for ONNX are missing or the network cannot be expressed.
    """
    if form == "mpt":
        return _as_mpt(network.ticket, image_size)
    if form == "pruning":
        return _saved(_reparametrized(network))
    if form == "semi-structured":
        return _compressed(network)
    model = network.build_model()
    if form == "onnx":
        in_chans = network.ticket.model.in_chans
        return to_onnx(model, in_chans=in_chans, image_size=image_size, facts=network.facts())
    state = _plain(model)
    if form == "torch":
        return _saved(state)
    return safetensors.torch.save(state, {"format": "pt", **network.facts()})


def _as_mpt(ticket: Ticket, image_size: int | None) -> bytes:
    """The file of a multi-prize ticket, for images as it was measured on or of another size.

    It is read again before it is handed out. Raises `UserError` for another ticket, or where the
    network does not take such images, or their size is not known; `RunError` for a ticket that
    cannot be used.
    """
    prize = Prize.of(ticket)
    about = {
        "ticket": ticket.id,
        "place": ticket.place,
        "level": ticket.level,
        "metrics": ticket.metrics,
        "versions": ticket.versions,
    }
    known = ticket.config.get("preprocessing")
    preprocessing = known if isinstance(known, dict) else {}
    shape = _image_shape(ticket, preprocessing, image_size)
    try:
        file = mpt.MptFile.of(prize, shape, preprocessing=preprocessing, about=about)
    except (RunError, ValueError) as error:
        raise UserError(f"ticket {ticket.place}: {error}; choose another --image-size") from error
    content = mpt.to_bytes(file)
    try:
        mpt.from_bytes(content)
    except (ValueError, RunError) as error:
        raise RunError(f"ticket {ticket.place}: {error}: nothing was written") from error
    return content


def _image_shape(ticket: Ticket, preprocessing: dict[str, Any], image_size: int | None) -> Shape:
    """Channels, height, width. Raises `UserError` where they are not known."""
    if image_size is not None:
        return ticket.model.in_chans, image_size, image_size
    found = ticket.config.get("image_shape", preprocessing.get("image_shape"))
    if found is None:
        raise UserError(f"ticket {ticket.place}: tell the side of its images with --image-size")
    try:
        return document.shape(found, "image_shape")
    except ValueError as error:
        raise UserError(f"ticket {ticket.place}: {error}; choose an --image-size") from error


def _reparametrized(network: Subnetwork) -> dict[str, Tensor]:
    """The state dict of the network as torch prunes it: `*_orig`, not masked, and `*_mask`.

    Raises `UserError` for a ticket whose masks are of coefficients.
    """
    ticket = network.ticket
    _require_no_basis(ticket)
    model = ticket.model.build()
    model.load_state_dict(network.weights)
    for name, mask in ticket.masks.items():
        layer, _, parameter = name.rpartition(".")
        prune.custom_from_mask(model.get_submodule(layer), parameter, mask)
    return _plain(model)


def _compressed(network: Subnetwork) -> bytes:
    """The file of a 2:4 ticket. Raises `UserError` for another one."""
    ticket = network.ticket
    _require_no_basis(ticket)
    state = _plain(network.build_model())
    try:
        return semi_structured_file.to_bytes(state, ticket.masks, network.facts())
    except UserError as error:
        raise UserError(f"ticket {ticket.place}: {error}") from None


def _require_no_basis(ticket: Ticket) -> None:
    if ticket.model.basis is not None:
        raise UserError(
            f"ticket {ticket.place}: its masks are of coefficients in the basis "
            f"{ticket.model.basis!r}, not of weights: choose another --format"
        )


def _plain(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }


def _saved(state: dict[str, Tensor]) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()
