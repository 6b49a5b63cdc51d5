"""How multi-prize tickets are searched for: the configuration, and what it makes of a network.

`pruning.multiprize_program` has the search.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from data.errors import UserError
from pruning.allocate import Scope
from pruning.masks import prunable_shapes
from pruning.multiprize import Gradient, Weights, score, uncalled
from pruning.options import check_densities, densest_first, refuse_average, refuse_basis
from pruning.packing import Shape
from pruning.random_weights import Init, Scaled
from pruning.sources import Outlook, Promise, check_levels, finished_levels
from train.duration import check_durations
from train.models import ModelSpec, shaped_by
from train.optim import NORMALISATIONS
from train.settings import Settings

MULTIPRIZE_DEFAULTS = {"optimizer.weight_decay": "5e-4", "schedule.name": "cosine"}
"""the authors' on CIFAR-10: SGD with 0.1, a cosine, and this weight decay on the scores"""


@dataclass(frozen=True)
class MultiprizeConfig:
    """Multi-prize tickets: subnetworks of random weights, chosen by trained scores and never
    trained themselves. With model.activation = 'sign' activations are binary too (MPT-1/1)."""

    density: tuple[float, ...] | Literal["ticket"] = (0.3,)
    """the fraction kept; several are searched one after the other, the largest first; or ticket, in
    each layer as many weights as the ticket of another stage keeps there"""
    ticket: str | None = None
    """with density = ticket: an earlier stage, or RUN/STAGE, RUN/STAGE/LEVEL, STORE/ID"""
    levels: tuple[int, ...] = ()
    """with density = ticket: which levels of that stage; by default its sparsest"""
    scope: Scope = "layer"
    """keep the same fraction of each layer, or rank the scores over all layers"""
    min_kept: int = 1
    """scope = global: how many weights each layer keeps at least"""
    ramp: str | None = None
    """time in which the density falls from 50 % to its target, by a cubic curve; by default 10 % of
    the training with scope = global, else none"""
    weights: Weights = "binary"
    """signs times one gain a layer, or float: the random weights themselves (edge-popup)"""
    init: Init = "signed_constant"
    """the random weights' magnitudes: one a layer, or kaiming_normal"""
    scaled: Scaled = "none"
    """scale them up for the density, so that the variance is kept; biprop: for what is pruned, as
    the authors' code does"""
    gradient: Gradient = "biprop"
    """of the scores: the authors', or literal (a deviation: the chain rule's, with the gain)"""
    batchnorm: Literal["fixed", "learned"] = "fixed"
    """whether weights and biases of normalisations are trained (+BN in the paper)"""
    dense_first: bool = False
    """leave the layer that sees the images dense, real and random"""
    dense_last: bool = False
    """leave the classifier dense, real and random"""
    train_dense: bool = False
    """train these dense layers"""

    def __post_init__(self) -> None:
        check_durations(self, "ramp")
        check_levels(self)
        if self.density == "ticket" and self.ticket is None:
            raise ValueError("density = 'ticket': needs ticket, the stage that gives it")
        if self.density != "ticket" and self.ticket is not None:
            raise ValueError(f"ticket = {self.ticket!r}: needs density = 'ticket'")
        if self.levels and self.ticket is None:
            raise ValueError(f"levels = {list(self.levels)}: needs density = 'ticket'")
        if not isinstance(self.density, str):
            check_densities(self.density)
        if self.min_kept < 1 or (self.min_kept > 1 and self.scope != "global"):
            raise ValueError(
                f"min_kept = {self.min_kept}: must be at least 1, and more needs scope = 'global'"
            )
        if self.ticket is not None and (self.scope == "global" or self.ramp is not None):
            raise ValueError("density = 'ticket' goes by layer: leave out scope and ramp")
        if self.scaled == "biprop" and (self.ticket is not None or 1 in self.densities):
            raise ValueError("scaled = 'biprop': needs a density below 1, for the rest it scales")
        if self.train_dense and not (self.dense_first or self.dense_last):
            raise ValueError("train_dense = true: needs dense_first or dense_last")

    @property
    def densities(self) -> tuple[float, ...]:
        """Those that are given as numbers, from the densest on: level 0 is that."""
        return () if isinstance(self.density, str) else densest_first(self.density)

    @property
    def ramp_length(self) -> str:
        """The ramp as a duration."""
        return self.ramp or ("10%" if self.scope == "global" else "0it")

    def dense(self, spec: ModelSpec) -> frozenset[str]:
        """The names of the weights that are not chosen by scores."""
        first = shaped_by(spec, "in_chans") if self.dense_first else frozenset()
        last = shaped_by(spec, "num_classes") if self.dense_last else frozenset()
        return first | last

    def adapt(self, model: nn.Module, spec: ModelSpec) -> None:
        """Makes a network one whose scores are trained, in place. Raises `UserError`."""
        score(model, exclude=self.dense(spec), weights=self.weights, gradient=self.gradient)
        _freeze(model, learned=self.batchnorm == "learned", trained=self._trained(spec))

    def _trained(self, spec: ModelSpec) -> frozenset[str]:
        return self.dense(spec) if self.train_dense else frozenset()


def _freeze(model: nn.Module, *, learned: bool, trained: frozenset[str]) -> None:
    """Leaves the scores to be trained, what is `trained`, and normalisations if they are learned.

    These begin as the identity: timm starts some with zero or nearly so, and would stay there.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained or name.rpartition(".")[2] == "scores")
    for module in model.modules():
        normalises = isinstance(module, NORMALISATIONS) or "Norm" in type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            if name.startswith("gamma") or (normalises and name == "weight"):
                nn.init.ones_(parameter)
            elif normalises and name == "bias":
                nn.init.zeros_(parameter)
            else:
                continue
            parameter.requires_grad_(learned)


# Before anything is trained ------------------------------------------------------------------


def foresee_multiprize(
    stage: str, config: MultiprizeConfig, settings: Settings, outlook: Outlook
) -> Promise:
    """What the stage will have made. Raises `UserError` for what is known to fail."""
    reason = "averaged scores choose other weights than those that were trained"
    refuse_average(stage, settings, reason)
    refuse_basis(stage, settings, "binary weights are chosen as they are, and not as coefficients")
    spec = ModelSpec.of(settings.model, num_classes=10, in_chans=3)
    model = spec.outline()
    try:
        config.adapt(model, spec)
        require_called(_foreseen_uncalled(model))
    except UserError as error:
        raise UserError(f"stages.{stage}: {settings.model.name}: {error}") from None
    if config.ticket is None:
        return Promise(dict.fromkeys(range(len(config.densities)), settings.model))
    finished = finished_levels(outlook.run, stage)
    if finished is not None:
        return Promise(dict.fromkeys(finished, settings.model))
    where = f"stages.{stage}.ticket"
    found = outlook.sources(where, config.ticket, config.levels, needed="masks")
    for _, source in found:
        here = ModelSpec.of(
            settings.model, num_classes=source.num_classes, in_chans=source.in_chans
        )
        require_layers(where, source.name, shapes_of(source), shapes_of(here))
    return Promise(dict.fromkeys((level for level, _ in found), settings.model))


def shapes_of(spec: ModelSpec) -> dict[str, Shape]:
    """The shapes of all weights of a network that can be chosen, in layer order."""
    return prunable_shapes(spec.outline())


def _foreseen_uncalled(outline: nn.Module) -> list[str]:
    """As `uncalled`, of a network without memory for its weights; nothing where it cannot run."""
    known = getattr(outline, "default_cfg", {}).get("input_size", (3, 32, 32))
    try:
        return uncalled(outline, torch.zeros(2, *known, device="meta"))
    except Exception:  # what a network may do that needs values: the run itself will tell
        return []


def require_called(lost: Sequence[str]) -> None:
    """Raises `UserError` where a network computes with the weight of a layer by itself."""
    if lost:
        raise UserError(
            f"it does not call its layer {lost[0]}, so that scores cannot choose its weights; "
            "choose another model"
        )


def require_layers(
    where: str, source: str, masked: Mapping[str, Shape], here: Mapping[str, Shape]
) -> None:
    """Raises `UserError` unless the masks of a ticket are of weights that this model has."""
    for name, shape in masked.items():
        if here.get(name) != shape:
            raise UserError(
                f"{where}: {source} has {name} of {shape}, this model {here.get(name, 'none')}: "
                "name a ticket of the same network"
            )
