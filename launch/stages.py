"""`tombola tickets stages MODEL`: the lists of like blocks that a network has."""

import json

from rich.console import Console
from rich.table import Table
from torch import nn

from data.errors import UserError
from pruning.elastic import DepthChange, Order, format_map, stages, transform
from train.models import ModelConfig, ModelSpec


def show_stages(model: str, *, to: str | None, order: Order, as_json: bool) -> None:
    """Prints the stages of a model, and which of its blocks go where in the model `to`.

    Raises `UserError` for an unknown model, one without stages, or one of another family.
    """
    network = _outline("MODEL", model)
    found, maps = stages(network), None
    if not found:
        raise UserError(f"{model} has no list of like blocks: its depth cannot be changed")
    if to is not None:
        maps = _map(model, network, to, order)
    if as_json:
        rows = [{**vars(stage), "num_blocks": stage.num_blocks} for stage in found]
        print(json.dumps({"model": model, "stages": rows, "to": to, "map": maps}, indent=1))
        return
    table = Table("stage", "blocks", "of", title=f"{model}: {len(found)} stages")
    table.columns[1].justify = "right"
    for stage in found:
        table.add_row(stage.name, str(stage.num_blocks), stage.kind)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    if maps is not None:
        console.print(f"{model} to {to}, {order}: {maps}")


def _map(model: str, network: nn.Module, to: str, order: Order) -> str:
    """Which blocks go where. Raises `UserError` where a ticket could not be moved so."""
    target = _outline("--to", to)
    try:
        change = DepthChange.between(stages(network), stages(target), order)
        transform(network.state_dict(), change, target.state_dict())
    except UserError as error:
        raise UserError(f"a ticket of {model} cannot become one of {to}: {error}") from None
    return format_map(change.maps)


def _outline(option: str, model: str) -> nn.Module:
    try:
        config = ModelConfig(name=model)
    except ValueError as error:
        raise UserError(f"{option}: {error}") from None
    return ModelSpec.of(config, num_classes=10, in_chans=3).outline()
