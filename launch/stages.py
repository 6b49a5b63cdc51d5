"""`tombola tickets stages MODEL`: the lists of like blocks that a network has."""

import json

from rich.console import Console
from rich.table import Table

from data.errors import UserError
from pruning.elastic import DepthChange, Order, format_map, stages
from train.models import ModelConfig, ModelSpec
from train.stages import Stage


def show_stages(model: str, *, to: str | None, order: Order, as_json: bool) -> None:
    """Prints the stages of a model, and which of its blocks go where in the model `to`.

    Raises `UserError` for an unknown model, one without stages, or one of another family.
    """
    found = _stages_of(model)
    maps = None
    if to is not None:
        try:
            maps = format_map(DepthChange.between(found, _stages_of(to), order).maps)
        except UserError as error:
            raise UserError(f"a ticket of {model} cannot become one of {to}: {error}") from None
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


def _stages_of(model: str) -> list[Stage]:
    try:
        config = ModelConfig(name=model)
    except ValueError as error:
        raise UserError(f"MODEL: {error}") from None
    found = stages(ModelSpec.of(config, num_classes=10, in_chans=3).outline())
    if not found:
        raise UserError(f"{model} has no list of like blocks: its depth cannot be changed")
    return found
