"""What the training of a ticket came to: weights that only the run's own checkpoint holds."""

import re
from pathlib import Path

from torch import Tensor, nn

from data.errors import UserError
from data.files import Folder
from pruning.tickets import Ticket
from train.checkpoint import Checkpoints
from train.ranks import ALONE, Ranks


def trained_model(level: str | Path) -> nn.Module:
    """The network that a ticket of a run was trained to, in evaluation mode, on the CPU.

    `level` is the folder of its level, such as `runs/digits-imp/imp/level-07`; what the ticket is
    trained *from* is `Ticket.load(level).build_model()`. Raises `UserError` where there is no
    ticket or no checkpoint of the end of its training, `RunError` for a damaged one.
    """
    ticket = Ticket.load(level)
    model = ticket.model.build()
    model.load_state_dict(trained_weights(ticket, level))
    ticket.masks.project_(model)
    return model.eval()


def trained_weights(
    ticket: Ticket, level: Folder | str | Path | None, ranks: Ranks = ALONE
) -> dict[str, Tensor]:
    """The state at the end of a ticket's training, masked, averaged (EMA) if it was; on the CPU.

    `level` is the folder of its level in a run; a ticket whose own weights are final needs none.
    Raises `UserError` where no checkpoint of the end is there, `RunError` for a damaged one.
    """
    if ticket.weights_are_final:
        weights, masks = ticket.weights(), ticket.read(ranks).masks
        return weights | {name: weights[name].masked_fill(~m, 0) for name, m in masks.items()}
    if level is None:
        raise UserError(
            f"ticket {ticket.id[:12]} comes from a store: trained weights are only in the folder "
            "of a level in its run"
        )
    level = Folder(level)
    folder = level / "checkpoints"
    last = ranks.on_main(lambda: _last_step(folder))
    if last <= ticket.step:
        raise UserError(
            f"{folder}: no checkpoint of the end of the training: trained weights are only in "
            "the folder of a level in its run"
        )
    trained = state_after(level, last, ranks)
    ticket.require_fit(trained)
    return trained


def state_after(level: Folder, step: int, ranks: Ranks) -> dict[str, Tensor]:
    """The state that a training had reached at a step, averaged (EMA) if it was; on the CPU.

    `level` is the training's folder. Raises `RunError` where the checkpoint is missing or damaged.
    """
    state = Checkpoints(level / "checkpoints", ranks, keep=1).load(step, skip=("optimizer/",))
    trained: dict[str, Tensor] = state.get("ema") or state.get("model") or {}
    return trained


def _last_step(folder: Folder) -> int:
    names = (name for name in folder.names() if re.fullmatch(r"step-\d+", name))
    return max((int(name.removeprefix("step-")) for name in names), default=-1)
