"""`tombola sweep CONFIG --seed 0,1,2 --optimizer.lr 0.1,0.2`: a run for each combination."""

import os
from collections.abc import Sequence

from rich.console import Console

from data.errors import UserError
from data.files import Folder
from launch.grid import read_grid, require_room
from launch.run import planned, run_grid
from launch.standing import standing


def sweep(
    path: str,
    overrides: Sequence[str],
    *,
    root: str,
    only: Sequence[str] = (),
    store: str | None = None,
    dry_run: bool = False,
) -> None:
    """Does all runs one after the other, or what is left of them, and compares what they came to.

    With `dry_run` it prints a line a run instead: its folder, and how far it is. Raises as
    `launch.run.run` does.
    """
    for option, place in (("root", root), ("store", store or "")):
        if "," in place:
            raise UserError(f"--{option} {place}: all runs are in one place: name one")
    grid = read_grid(path, overrides)
    if not dry_run:
        run_grid(grid, root=root, only=only, store=store)
    elif os.environ.get("RANK", "0") == "0":  # under torchrun one rank's list is enough
        console = Console(highlight=False, soft_wrap=True, markup=False)
        folder = Folder(root) / grid.name
        require_room(grid, folder)
        for run in planned(grid, folder, only):
            told = standing(run.folder, run.config, run.units)
            console.print(f"{run.folder}  {told}")
