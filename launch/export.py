"""`tombola export TICKET` and `tombola tickets import SOURCE`: from and to other tools."""

import os

from data.errors import UserError
from data.files import Folder
from launch.places import locate
from pruning.exporting import Format, Subnetwork, export
from pruning.importing import Origin, imported, store
from pruning.onnx_model import require_packages
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
    if image_size is not None and (form != "onnx" or image_size < 1):
        raise UserError(f"--image-size {image_size}: must be at least 1, and with --format onnx")
    if form == "onnx":
        require_packages()
    folder, name = _place(output)
    if folder.exists(name) and not force:
        raise UserError(f"{output}: is there already; --force replaces it")
    url = locate(place, root)
    content = export(_chosen(url, trained), form, image_size=image_size)
    folder.write(name, content)
    print(f"{output}: {url} as {form}, {len(content):,} bytes")


def import_ticket(
    source: str,
    *,
    origin: Origin,
    model: str,
    num_classes: int,
    in_chans: int,
    width: int | None,
    norm: str | None,
    step: int | None,
    level: int | None,
    output: str,
) -> None:
    """Writes the ticket of another tool to a store. Raises `UserError` for an impossible value."""
    for option, value in {"step": step, "level": level}.items():
        if value is not None and value < 0:
            raise UserError(f"--{option} {value}: must not be negative")
    for option, value in {"num-classes": num_classes, "in-chans": in_chans}.items():
        if value < 1:
            raise UserError(f"--{option} {value}: must be at least 1")
    try:
        config = ModelConfig(name=model, width=width, norm=norm)
    except ValueError as error:
        raise UserError(f"--model: {error}") from None
    spec = ModelSpec.of(config, num_classes=num_classes, in_chans=in_chans)
    parts = imported(source, origin, spec, step=step, level=level)
    url = store(parts, output)
    state = "masks alone" if parts.weights is None else f"masks and weights of step {parts.step}"
    print(f"{url}: level {parts.level}, density {parts.masks.density:.4%}, {state}")


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
