"""The recipes that a stage may name: a configuration, and the program that it configures."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pruning.connectivity_program import (
    ConnectivityConfig,
    foresee_connectivity,
    run_connectivity,
)
from pruning.dual_config import DUAL_DEFAULTS, DualConfig, foresee_dual
from pruning.dual_program import run_dual
from pruning.dynamic_config import DynamicConfig, foresee_dynamic
from pruning.dynamic_program import run_dynamic
from pruning.earlybird_config import EarlyBirdConfig, foresee_earlybird
from pruning.earlybird_program import run_earlybird
from pruning.elastic_program import ElasticConfig, foresee_elastic, run_elastic
from pruning.growth_config import GrowthConfig, foresee_growth
from pruning.growth_program import run_growth
from pruning.imp import ImpConfig, foresee_imp, run_imp
from pruning.initial_config import InitialConfig, foresee_initial
from pruning.initial_program import run_initial
from pruning.multiprize_config import (
    MULTIPRIZE_DEFAULTS,
    MultiprizeConfig,
    foresee_multiprize,
)
from pruning.multiprize_program import run_multiprize
from pruning.sources import Outlook, Promise
from train.session import Session
from train.settings import Settings


@dataclass(frozen=True)
class Recipe:
    """A lottery-ticket method as a stage of a run."""

    config: type[Any]
    run: Callable[[Session, str, Any], object]
    foresee: Callable[[str, Any, Settings, Outlook], Promise | None]
    """refuses, before anything is trained, what is known to fail; tells which tickets there will
    be for the stages after it, or `None`"""
    defaults: dict[str, str] = field(default_factory=dict)
    """what it wants of a shared section where neither the run nor the stage sets anything in it"""
    splits: bool = True
    """whether each control needs nothing but the tickets, so that a job of its own may train it"""


RECIPES = {
    "imp": Recipe(ImpConfig, run_imp, foresee_imp),
    "elastic": Recipe(ElasticConfig, run_elastic, foresee_elastic),
    "multiprize": Recipe(MultiprizeConfig, run_multiprize, foresee_multiprize, MULTIPRIZE_DEFAULTS),
    "initial": Recipe(InitialConfig, run_initial, foresee_initial),
    "dynamic": Recipe(DynamicConfig, run_dynamic, foresee_dynamic),
    "dual": Recipe(DualConfig, run_dual, foresee_dual, DUAL_DEFAULTS),
    "earlybird": Recipe(EarlyBirdConfig, run_earlybird, foresee_earlybird),
    "growth": Recipe(GrowthConfig, run_growth, foresee_growth, splits=False),
    "connectivity": Recipe(ConnectivityConfig, run_connectivity, foresee_connectivity),
}
