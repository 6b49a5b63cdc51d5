"""The recipes that a stage may name: a configuration, and the program that it configures."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pruning.imp import ImpConfig, run_imp
from pruning.tickets import Ticket
from train.session import Session


@dataclass(frozen=True)
class Recipe:
    """A lottery-ticket method as a stage of a run."""

    config: type[Any]
    run: Callable[[Session, str, Any], list[Ticket]]


RECIPES = {"imp": Recipe(ImpConfig, run_imp)}
