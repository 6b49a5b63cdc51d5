"""`tombola data pack SOURCE -o URL`."""

import json
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from data.errors import RunError
from data.files import Folder
from data.layout import parse_source
from data.pack import Packed, PackedSplit, pack
from data.pack_shard import PackOptions
from launch.progress import WorkDisplay


def pack_data(
    source: str,
    *,
    output: str,
    resize: int | None = None,
    quality: int = 90,
    shard_size: int = 2048,
    num_workers: int | None = None,
    as_json: bool = False,
) -> None:
    """Packs a source into shards, or what is left of it, and prints what became of each split.

    Raises `UserError` where it cannot be packed there, and `RunError` where it was stopped.
    """
    options = PackOptions(resize=resize, quality=quality, shard_size=shard_size)
    kind, place = parse_source(source)
    target = Folder(output)
    with WorkDisplay(images_of="packing images") as display:
        try:
            packed = pack(kind, place, target, options, num_workers=num_workers, progress=display)
        except KeyboardInterrupt:
            raise RunError(
                f"stopped; the same command goes on with the shards that {target} lacks"
            ) from None
        speed = display.images_per_second if packed.num_written else None
    if as_json:
        print(json.dumps(_document(packed, source, target, options, speed), indent=1))
    else:
        _print(packed, target, speed)


def _document(
    packed: Packed, source: str, target: Folder, options: PackOptions, speed: float | None
) -> dict[str, Any]:
    return {
        "source": source,
        "target": target.location,
        "options": options.document(),
        "splits": {split: facts._asdict() for split, facts in packed.splits.items()},
        "was_whole": packed.was_whole,
        "num_written": packed.num_written,
        "images_per_second": speed,
    }


def _print(packed: Packed, target: Folder, speed: float | None) -> None:
    console = Console(highlight=False, soft_wrap=True)
    table = Table("split", "images", "shards", "bytes before", "bytes after")
    for column in table.columns[1:]:
        column.justify = "right"
    for split, facts in packed.splits.items():
        table.add_row(split, *_cells(facts))
    console.print(table)
    if packed.was_whole:
        line = f"{target}: is packed already; nothing was done"
    elif speed is None:
        line = f"{target}: is packed; all shards were there already"
    else:
        line = f"{target}: is packed; {packed.num_written:,} images at {speed:,.0f} images/s"
    console.print(line, markup=False)


def _cells(facts: PackedSplit) -> tuple[str, str, str, str]:
    return (
        f"{facts.num_images:,}",
        f"{facts.num_shards:,}",
        decimal(facts.bytes_before),
        decimal(facts.bytes_after),
    )
