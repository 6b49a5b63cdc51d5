"""Masks and weights that other tools wrote: torch.nn.utils.prune and open_lth.

Everything is read as safetensors, or by torch's restricted unpickler (`weights_only=True`): a file
that holds anything but tensors by name is refused, and nothing in it is run.
"""

import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from data.errors import UserError, did_you_mean
from data.files import Folder, read_content
from pruning import open_lth
from pruning.mask_store import write_masks
from pruning.masks import Masks, maskable, prunable
from pruning.prizes import Prize
from pruning.signed_weights import SignedLayer, SignedWeights
from pruning.store import open_store
from pruning.tickets import Ticket, told_of
from pruning.weight_store import write_weights
from train.models import ModelSpec
from train.versions import software_versions

Origin = Literal["pruning", "open-lth", "biprop", "mpt"]
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Imported:
    """A ticket of another tool, in the names and shapes of a network here."""

    model: ModelSpec
    masks: Masks
    weights: dict[str, Tensor] | None
    """the state that it is trained from, where there is one"""
    step: int
    level: int
    origin: Origin
    source: str


def imported(
    source: str,
    origin: Origin,
    model: ModelSpec,
    *,
    step: int | None = None,
    level: int | None = None,
) -> Imported:
    """The ticket in a file (`pruning`) or in a level's folder (`open-lth`), for a network.

    `step` and `level` are by default what open_lth's names say, else 0. Raises `UserError` where a
    file is missing, holds anything but tensors, or does not fit the network.
    """
    weights: dict[str, Tensor] | None
    if origin == "pruning":
        masks, weights = split_pruned(read_state(source), source)
        start, found_level = step or 0, 0
    else:
        folder = Folder(source.removesuffix(f"/{open_lth.MASK}"))
        file = f"{folder}/{open_lth.MASK}"
        masks = open_lth.renamed(read_state(file), file)
        name, start = open_lth.find_start(folder, step)
        file = f"{folder}/{name}"
        weights = None if name is None else open_lth.renamed(read_state(file), file)
        found_level = open_lth.find_level(folder)
    network = model.build()
    return Imported(
        model=model,
        masks=_fitting_masks(masks, network, source, complete=origin == "open-lth"),
        weights=None if weights is None else _fitting_weights(weights, network, source),
        step=start,
        level=found_level if level is None else level,
        origin=origin,
        source=source,
    )


def store(parts: Imported, url: str) -> str:
    """Writes these parts as a ticket to the store at `url`; returns what `Ticket.load` takes."""
    tickets = open_store(url)
    objects = tickets.objects
    ticket = Ticket(
        method="imported",
        level=parts.level,
        model=parts.model,
        step=parts.step,
        stored_masks=write_masks(objects, parts.masks),
        stored_weights=None if parts.weights is None else write_weights(objects, parts.weights),
        objects=objects,
        config={"imported": {"from": parts.origin, "source": parts.source}},
        versions=software_versions(),
    )
    tickets.add(ticket)
    return f"{tickets.folder}/{ticket.id}.json"


def store_prize(
    prize: Prize, url: str, config: dict[str, Any], about: Mapping[str, Any] | None = None
) -> str:
    """Writes a binary network as a ticket to the store at `url`; returns as `store` does.

    `about` may tell its level and metrics, as the file of a ticket does.
    """
    level, metrics = told_of(about or {})
    tickets = open_store(url)
    objects = tickets.objects
    masks = Masks({name: layer.mask for name, layer in prize.layers.items()})
    signs = {name: layer.binary > 0 for name, layer in prize.layers.items()}
    layers = {
        name: SignedLayer(layer.shape, layer.index, layer.gain)
        for name, layer in prize.layers.items()
    }
    ticket = Ticket(
        method="multiprize",
        level=level,
        metrics=metrics,
        model=prize.model,
        step=0,
        stored_masks=write_masks(objects, masks),
        stored_weights=SignedWeights(
            layers,
            write_weights(objects, prize.rest),
            prize.seed,
            write_masks(objects, Masks(signs)) if prize.seed is None else None,
        ),
        objects=objects,
        config=config,
        versions=software_versions(),
    )
    tickets.add(ticket)
    return f"{tickets.folder}/{ticket.id}.json"


# Reading ---------------------------------------------------------------------------------


def read_state(url: str) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU, without the prefix that DDP gives them.

    Raises `UserError` where there is no such file, or it is not tensors by name alone.
    """
    content = read_content(url)
    try:
        state = _read(content, is_safetensors=url.endswith(".safetensors"))
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(f"{url}: refused: {_reason(error)}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]  # as many training scripts save it, biprop's among them
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"{url}: refused: not a dict of tensors by name")
    for name, value in state.items():
        if not isinstance(name, str) or not _is_plain(value):
            raise UserError(f"{url}: refused: {name!r} is not a plain tensor; save a state dict")
    state = dict(state)
    consume_prefix_in_state_dict_if_present(state, "module.")
    return state


def _read(content: bytes, *, is_safetensors: bool) -> object:
    if is_safetensors:
        return safetensors.torch.load(content)
    if zipfile.is_zipfile(io.BytesIO(content)):
        _refuse_inflated(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other pickle protocols, of checks that take long
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _refuse_inflated(content: bytes) -> None:
    """Raises `ValueError` for an archive whose files are larger than it: torch packs nothing."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        files = archive.infolist()
    if any(file.compress_type != zipfile.ZIP_STORED for file in files) or sum(
        file.file_size for file in files
    ) > len(content):
        raise ValueError("its records are compressed, which torch.save never does")


def _reason(error: Exception) -> str:
    """In one line; torch's own advice is to trust the file."""
    if not isinstance(error, pickle.UnpicklingError):
        return f"damaged, or no file of tensors: {str(error).partition(chr(10))[0][:200]}"
    foreign = re.search(r"GLOBAL (\S+)", str(error))
    return (
        f"not tensors alone{f' but {foreign[1]}' if foreign else ''}, and only tensors are read "
        "from elsewhere: where you trust it, save its state dict"
    )


def _is_plain(value: object) -> bool:
    """Whether it is a tensor of common numbers that are all in the file (none is repeated)."""
    return (
        isinstance(value, Tensor)
        and value.dtype in (*_INTEGERS, *_FLOATS)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.nbytes <= value.untyped_storage().nbytes()
    )


def split_pruned(
    state: Mapping[str, Tensor], file: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Masks and weights of a network pruned by `torch.nn.utils.prune`, under their own names.

    Raises `UserError` where nothing is pruned, or one of `*_orig` and `*_mask` is missing.
    """
    masks = {name.removesuffix("_mask"): v for name, v in state.items() if name.endswith("_mask")}
    dense = {name.removesuffix("_orig"): v for name, v in state.items() if name.endswith("_orig")}
    if not masks:
        raise UserError(f"{file}: no masks: no name ends with _mask; was prune.remove called?")
    for name in masks.keys() ^ dense.keys():
        raise UserError(f"{file}: {name} has only one of {name}_orig and {name}_mask")
    others = {name: v for name, v in state.items() if not name.endswith(("_mask", "_orig"))}
    return masks, {**others, **dense}


# Fitting ---------------------------------------------------------------------------------


def _fitting_masks(
    found: Mapping[str, Tensor], network: nn.Module, file: str, *, complete: bool
) -> Masks:
    """Raises `UserError` for names, shapes and values that are not masks of the network.

    With `complete`, each of its convolutions and linear layers has one.
    """
    weights, known = prunable(network), maskable(network)
    for name, mask in found.items():
        if name not in known:
            near = did_you_mean(name, weights)
            raise UserError(f"{file}: mask of {name}: the network prunes no such weight{near}")
        _require_shape(name, mask, known[name], file)
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise UserError(f"{file}: mask of {name}: has values other than 0 and 1")
    missing = [name for name in weights if name not in found]
    if complete and missing:
        raise UserError(f"{file}: no mask of {missing[0]}, which the network has")
    return Masks({name: found[name].bool() for name in known if name in found})


def _fitting_weights(
    found: Mapping[str, Tensor], network: nn.Module, file: str
) -> dict[str, Tensor]:
    """The state dict in the network's own types. Raises `UserError` where it does not fit."""
    expected = network.state_dict()
    for name, value in found.items():
        if name not in expected:
            raise UserError(
                f"{file}: {name}: the network has no such weight{did_you_mean(name, expected)}"
            )
        _require_shape(name, value, expected[name], file)
        if value.is_floating_point() != expected[name].is_floating_point():
            raise UserError(f"{file}: {name}: {value.dtype}, the network: {expected[name].dtype}")
    missing, _ = network.load_state_dict(found, strict=False)
    if missing:
        raise UserError(f"{file}: no {missing[0]}, which the network has")
    return dict(network.state_dict())


def _require_shape(name: str, value: Tensor, expected: Tensor, file: str) -> None:
    if value.shape != expected.shape:
        raise UserError(
            f"{file}: {name}: {tuple(value.shape)}, the network: {tuple(expected.shape)}; "
            "is it another --model, --num-classes, --in-chans or --width?"
        )
