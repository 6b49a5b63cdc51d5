"""On a GPU a step is only queued: nothing may wait for its result but where something is logged.

What would wait there, such as the value of a tensor becoming a number of Python, is noticed here on
the CPU.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_dual_runs import BASE as DUAL_BASE
from test_dynamic_runs import BASE, GMP, RIGL
from test_multiprize_runs import BASE as PRIZE_BASE
from test_multiprize_runs import GLOBAL, PRIZE
from tiny import TOML, write_config
from torch.utils._python_dispatch import TorchDispatchMode

from launch.cli import run_command
from pruning import choosing
from train import session
from train.engine import Engine

_WAITING = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
}
_DUAL = '[[stages]]\nname = "dual"\nrecipe = "dual"\ndensity = 0.2\n'
_RICH = """clip = 1.0
ema = 0.99
mixup = 0.2
cutmix = 1.0
label_smoothing = 0.1
micro_batch = 24
[optimizer]"""


class Waits(TorchDispatchMode):
    """Notes the steps in which something waits, and for what."""

    def __init__(self) -> None:
        super().__init__()
        self.step = -1
        self.found: list[tuple[int, str]] = []

    def note(self, what: str) -> None:
        self.found.append((self.step, what))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().split(".")[0]
        by_mask = name == "aten::index" and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in _WAITING or by_mask:
            self.note(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[Waits]:
    """Of every training, one after the other."""
    found: list[Waits] = []
    fit, backward = session.fit, Engine.backward

    def watched(*arguments: Any, **options: Any) -> None:
        found.append(Waits())
        with found[-1]:
            fit(*arguments, **options)

    def counted(self: Engine, state: Any, *arguments: Any) -> Any:
        found[-1].step = state.step
        return backward(self, state, *arguments)

    def noting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def noted(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            if found and threading.current_thread() is threading.main_thread():
                found[-1].note(name)  # the thread that writes a checkpoint may wait
            return original(tensor, *arguments, **options)

        return noted

    monkeypatch.setattr(session, "fit", watched)
    monkeypatch.setattr(Engine, "backward", counted)
    monkeypatch.setattr(choosing, "on_device", lambda scores: True)
    for name in ("cpu", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, noting(name, getattr(torch.Tensor, name)))
    return found


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        pytest.param(TOML.replace("rounds = 2", "rounds = 1"), (), id="imp"),
        pytest.param(TOML.replace("[optimizer]", _RICH), (), id="all options"),
        pytest.param(BASE + RIGL, (4, 8, 12, 16), id="rigl"),
        pytest.param(BASE + GMP, (2, 6, 10, 14, 18, 19), id="gmp"),
        pytest.param(PRIZE_BASE + PRIZE, (), id="multiprize"),
        pytest.param(PRIZE_BASE + GLOBAL, (), id="multiprize over all layers"),
        pytest.param(DUAL_BASE + _DUAL, (0,), id="dual"),
    ],
)
def test_steps_wait_for_nothing_but_where_they_are_logged(
    text: str, changes: tuple[int, ...], tmp_path: Path, waits: list[Waits]
) -> None:
    """Or where masks change. Every tenth step is logged, and the last; nothing else is saved."""
    text = text.replace("every = 5", "every = 10").replace('"8it"', '"1000it"')
    text = text.replace('evaluate = "13it"', 'evaluate = "1000it"')
    assert run_command(["run", write_config(tmp_path, text), "--root", str(tmp_path)]) == 0
    assert waits
    for training in waits:
        logged = {s for s in range(training.step + 1) if s % 10 == 9} | {training.step}
        rewinding = {4} if "imp" in text else set()  # whose checkpoint is kept
        allowed = logged | rewinding | set(changes) | {-1}
        elsewhere = [one for one in training.found if one[0] not in allowed]
        assert not elsewhere, elsewhere[:5]
        assert training.found, "nothing was noticed at all"
