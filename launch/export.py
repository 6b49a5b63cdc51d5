"""`tombola export TICKET` and `tombola tickets import SOURCE`: from and to other tools."""

import os
from collections.abc import Mapping

import torch

from data.errors import UserError
from data.files import Folder
from launch.places import locate
from pruning import biprop, mpt
from pruning.exporting import Format, Subnetwork, export
from pruning.importing import Origin, imported, read_state, store, store_prize
from pruning.onnx_model import image_sides, require_packages
from pruning.semi_structured import semi_structured
from pruning.tickets import Ticket
from train.models import ModelConfig, ModelSpec


def export_ticket(
    place: str,
    *,
    form: Format,
    output: str,
    trained: bool,
    image_size: int | None,
    force: bool,
    root: str,
) -> None:
    """Writes a ticket's network to the file `output`, whole or not at all.

    Raises `UserError` before anything is read where that cannot be.
    """
    if image_size is not None and form not in ("onnx", "mpt", "semi-structured"):
        others = "onnx, mpt or semi-structured"
        raise UserError(f"--image-size {image_size}: goes with --format {others}, not {form}")
    if image_size is not None and image_size < 1:
        raise UserError(f"--image-size {image_size}: must be at least 1")
    if form == "onnx":
        require_packages()
    folder, name = _place(output)
    if folder.exists(name) and not force:
        raise UserError(f"{output}: is there already; --force replaces it")
    url = locate(place, root)
    network = _chosen(url, trained)
    content = export(network, form, image_size=image_size)
    folder.write(name, content)
    print(f"{output}: {url} as {form}, {len(content):,} bytes")
    if form == "semi-structured":
        _tell_inference(network, image_size)


def _tell_inference(network: Subnetwork, image_size: int | None) -> None:
    """Which layers are 2:4, and on a CUDA machine what that does for the time of an inference."""
    from launch.bench.semi_structured import measure_inference

    ticket = network.ticket
    names = semi_structured(ticket.masks)
    print(f"{len(names)} of {len(ticket.masks)} layers are 2:4")
    if not torch.cuda.is_available():
        print("a CUDA machine is needed to tell what that does for the time of an inference")
        return
    model = network.build_model()
    shape = (ticket.model.in_chans, *image_sides(model, image_size))
    try:
        result = measure_inference(model, names, shape)
    except RuntimeError as error:  # too little memory, or a GPU without such kernels
        print(f"its inference cannot be timed here: {str(error).partition(chr(10))[0]}")
        return
    taken, ratio = result["layers on sparse kernels"], result["2:4 / dense"]
    print(f"inference: {ratio:.2f} of the dense network's time, {taken} layers on sparse kernels")


def import_ticket(
    source: str,
    *,
    origin: Origin,
    model: str | None,
    num_classes: int | None,
    in_chans: int,
    width: int | None,
    norm: str | None,
    activation: str | None,
    density: float | None,
    step: int | None,
    level: int | None,
    output: str,
) -> None:
    """Writes the ticket of another tool to a store. Raises `UserError` for an impossible value."""
    when = {"step": step, "level": level}
    which = {"model": model, "num-classes": num_classes}
    how = {"width": width, "norm": norm, "activation": activation}
    _check_options(origin, density, when, {**which, **how})
    if origin == "mpt":
        _import_mpt(source, output)
        return
    if model is None or num_classes is None:
        raise UserError(f"--from {origin}: needs --model and --num-classes")
    for option, count in {"num-classes": num_classes, "in-chans": in_chans}.items():
        if count < 1:
            raise UserError(f"--{option} {count}: must be at least 1")
    try:
        config = ModelConfig(name=model, width=width, norm=norm, activation=activation)
    except ValueError as error:
        raise UserError(f"--model: {error}") from None
    spec = ModelSpec.of(config, num_classes=num_classes, in_chans=in_chans)
    if density is not None:
        _import_biprop(source, spec, density, output)
        return
    parts = imported(source, origin, spec, step=step, level=level)
    url = store(parts, output)
    state = "masks alone" if parts.weights is None else f"masks and weights of step {parts.step}"
    print(f"{url}: level {parts.level}, density {parts.masks.density:.4%}, {state}")


def _check_options(
    origin: Origin,
    density: float | None,
    when: Mapping[str, int | None],
    network: Mapping[str, int | str | None],
) -> None:
    """Raises `UserError` for options that do not go together."""
    for option, value in when.items():
        if value is not None and value < 0:
            raise UserError(f"--{option} {value}: must not be negative")
        if value is not None and origin in ("biprop", "mpt"):
            raise UserError(
                f"--{option}: not with --from {origin}, whose weights are never trained"
            )
    if density is None and origin == "biprop":
        raise UserError("--from biprop: needs --density, its files do not tell what is kept")
    if density is not None and origin != "biprop":
        raise UserError(f"--density {density}: goes with --from biprop, not {origin}")
    if origin == "mpt" and any(value is not None for value in network.values()):
        raise UserError("--from mpt: the file tells model, classes and all: leave them out")


def _import_mpt(source: str, output: str) -> None:
    file = mpt.verified(source)
    config = {
        "imported": {"from": "mpt", "source": source},
        "preprocessing": file.preprocessing,
        "image_shape": list(file.image_shape),
    }
    url = store_prize(file.prize, output, config, file.about)
    print(f"{url}: density {file.prize.density:.4%}, binary weights, logits as the file tells")


def _import_biprop(source: str, spec: ModelSpec, density: float, output: str) -> None:
    prize = biprop.prize_of(read_state(source), spec, density, source)
    url = store_prize(prize, output, {"imported": {"from": "biprop", "source": source}})
    print(f"{url}: density {prize.density:.4%}, binary weights, signs stored")


def _chosen(url: str, trained: bool) -> Subnetwork:
    ticket = Ticket.load(url)
    if trained:
        return Subnetwork.at_end(ticket, Folder(url.removesuffix("/ticket.json")))
    try:
        return Subnetwork.at_start(ticket)
    except UserError as error:
        raise UserError(f"{error}; --trained exports what it was trained to") from None


def _place(output: str) -> tuple[Folder, str]:
    """The folder and the name of a file to be written."""
    head, slash, name = output.rpartition("/")
    if not name or os.path.isdir(output):
        raise UserError(f"-o {output}: is a folder; give the name of a file")
    if head.endswith(":/"):  # the root of a store
        head += "/"
    return Folder(head or slash or "."), name
