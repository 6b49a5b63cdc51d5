"""The recipes that a stage may name: a configuration, and the program that it configures."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pruning.connectivity_program import (
    ConnectivityConfig,
    check_connectivity,
    run_connectivity,
)
from pruning.elastic_program import ElasticConfig, check_elastic, promise_elastic, run_elastic
from pruning.imp import ImpConfig, promise_imp, run_imp
from pruning.sources import Promise
from train.session import Session
from train.settings import Settings


@dataclass(frozen=True)
class Recipe:
    """A lottery-ticket method as a stage of a run."""

    config: type[Any]
    run: Callable[[Session, str, Any], object]
    promise: Callable[[Any, Settings], Promise] | None = None
    """which tickets it will have made, for the stages after it; `None` if it makes none"""
    check: Callable[..., None] | None = None
    """refuses, before anything is trained, what is known to fail"""


RECIPES = {
    "imp": Recipe(ImpConfig, run_imp, promise_imp),
    "elastic": Recipe(ElasticConfig, run_elastic, promise_elastic, check_elastic),
    "connectivity": Recipe(ConnectivityConfig, run_connectivity, check=check_connectivity),
}
