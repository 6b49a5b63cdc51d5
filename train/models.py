"""Models by name: any timm model, and the small networks of the papers."""

import inspect
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import timm
import torch
from timm.models.resnet import ResNet
from torch import nn

from data.errors import UserError, did_you_mean
from train import cifar
from train.activations import SIGN_TAKERS, check_activation, is_plain_resnet, with_sign
from train.basis import Basis, check_basis, take_basis
from train.mlp import Mlp
from train.stages import described, stages

_MOST_BLOCKS = 1000
_TRANSLATED = ("blocks", "width", "activation")
"""the arguments that timm's models take by other names, if at all"""
_OF_TIMM = ("drop_rate", "drop_path_rate", "zero_init_last")
"""the options of timm's models alone"""


@dataclass(frozen=True)
class ModelConfig:
    """Which network is trained."""

    name: str = "cifar_resnet20"
    """any timm model, cifar_resnet{6n+2}, cifar_resnet18/34, cifar_resnet_column,
    cifar_vgg{11,13,16,19}, cifar_vgg_small or mlp"""
    width: int | None = None
    """channels of the first stage, CIFAR networks and timm ResNets; by default 16 for
    cifar_resnet{6n+2}, 8 for cifar_resnet_column, 128 for cifar_vgg_small, else 64; where blocks
    are bottlenecks, that of their inner convolutions, or units of a layer of mlp (128)"""
    side: int | None = None
    """mlp: it reads images of side x side pixels, to which larger ones are averaged; by default 28,
    as MNIST's are"""
    norm: str | None = None
    """batch or group, CIFAR networks only; by default batch"""
    activation: str | None = None
    """relu or sign (binary activations; default: relu): CIFAR networks, timm ResNets of basic
    blocks"""
    blocks: tuple[int, ...] | None = None
    """blocks in each stage, in place of those of the name: 2 3 4 3 for a ResNet between 18 and 34;
    CIFAR ResNets, mlp, and of timm what takes layers, depths or depth (ResNet, ConvNeXt, ViT)"""
    drop_rate: float | None = None
    """dropout before the classifier, timm models only"""
    drop_path_rate: float | None = None
    """stochastic depth, timm models only"""
    zero_init_last: bool | None = None
    """begin with a gain of zero at the end of each block, as timm has it; by default timm's own,
    mostly true; timm's ResNets, RegNets and relatives"""
    basis: Basis | None = None
    """what is trained and pruned: the weights (identity), or their coefficients in an orthonormal
    basis, dct or random; by default identity"""

    def __post_init__(self) -> None:
        small = find_network(self.name) is not None
        if not small and not timm.is_model(self.name):
            known = [*EXAMPLES, *timm.list_models()]
            raise ValueError(
                f"name = {self.name!r} is no timm model and no CIFAR network"
                f"{did_you_mean(self.name, known)}"
            )
        for option in _foreign(self.name, small):
            if getattr(self, option) is not None:
                raise ValueError(f"{option} is no option of {self.name}")
        if self.norm is not None and self.norm not in cifar.NORMS:
            raise ValueError(f"norm = {self.norm!r}: must be one of {', '.join(cifar.NORMS)}")
        for option in ("width", "side"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise ValueError(f"{option} = {value}: must be at least 1")
        if self.blocks is not None and self.name.startswith("cifar_vgg"):
            raise ValueError(f"blocks is no option of {self.name}")
        if self.blocks is not None:
            _check_blocks(list(self.blocks))
        if self.activation is not None:
            check_activation(self.activation)
        options = (self.width, self.activation, self.zero_init_last)
        if not small and any(option is not None for option in options):
            self._check_timm()

    def _check_timm(self) -> None:
        """Raises `ValueError` for an option that only some of timm's models have."""
        usual = _usual(self.name)
        if self.width is not None and not isinstance(usual, ResNet):
            raise ValueError(f"width is no option of {self.name}")
        if self.activation is not None and not is_plain_resnet(usual):
            raise ValueError(f"activation is no option of {self.name}: only {SIGN_TAKERS} take one")
        if self.zero_init_last is not None and "zero_init_last" not in _parameters(usual):
            raise ValueError(f"zero_init_last is no option of {self.name}; leave it out")
        if self.zero_init_last and self.activation == "sign":
            raise ValueError(
                "zero_init_last = True: no gradient passes it with activation = 'sign'"
            )


@dataclass(frozen=True)
class ModelSpec:
    """All that rebuilds a network's shape: it stands in every ticket."""

    name: str
    num_classes: int
    in_chans: int
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises `ValueError` for what would fetch or unpickle a file: a ticket may be anyone's."""
        if re.search(r"[:/]", self.name):
            raise ValueError(f"model {self.name!r} is not one that is built here")
        if "blocks" in self.arguments:
            _check_blocks(self.arguments["blocks"])
        if "activation" in self.arguments:
            check_activation(self.arguments["activation"])
        if "basis" in self.arguments:
            check_basis(self.arguments["basis"])
        for argument in self.arguments:
            if re.search(r"pretrained|checkpoint|cache|_file", argument):
                raise ValueError(f"model argument {argument!r} reads a file")

    @classmethod
    def of(cls, config: ModelConfig, *, num_classes: int, in_chans: int) -> "ModelSpec":
        """The network of `config` for a data set's classes and channels."""
        chosen = {k: v for k, v in asdict(config).items() if k != "name" and v is not None}
        if config.blocks is not None:
            chosen["blocks"] = list(config.blocks)  # as JSON has it, in which tickets are kept
        if config.basis == "identity":
            del chosen["basis"]  # the very same network
        return cls(config.name, num_classes, in_chans, chosen)

    @property
    def basis(self) -> str | None:
        """In which its weights are coefficients; `None` where they are weights."""
        found = self.arguments.get("basis", "identity")
        return None if found == "identity" else found

    @property
    def plain(self) -> "ModelSpec":
        """The same network without a basis."""
        return replace(self, arguments={k: v for k, v in self.arguments.items() if k != "basis"})

    def build(self, seed: int = 0) -> nn.Module:
        """The network with random weights drawn on the CPU from `seed`: equal on every rank.

        torch's generators are left as they were. Raises `UserError` where the network does
        not take its arguments.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # and no generator of a GPU
            try:
                model = self.plain._build()
                if self.basis is not None:
                    take_basis(model, self.basis)
                return model
            except (TypeError, AttributeError, RuntimeError, ValueError) as error:
                reason = str(error).partition("\n")[0]
                raise UserError(f"model {self.name}: {reason}") from error

    def _build(self) -> nn.Module:
        arguments = {"num_classes": self.num_classes, "in_chans": self.in_chans, **self.arguments}
        network = find_network(self.name)
        if network is not None:
            return network(**arguments)
        chosen = {name: arguments.pop(name) for name in _TRANSLATED if name in arguments}
        if chosen:
            arguments = {**_as_timm_has_it(_usual(self.name), **chosen), **arguments}
        model: nn.Module = timm.create_model(self.name, **arguments)
        blocks = chosen.get("blocks")
        if blocks is not None and blocks != [stage.num_blocks for stage in stages(model)]:
            raise ValueError(
                f"blocks = {blocks}: does not fit its stages, {described(stages(model))}"
            )
        return with_sign(model) if chosen.get("activation") == "sign" else model

    def outline(self) -> nn.Module:
        """The network without memory for its weights (on torch's `meta`). Raises as `build`."""
        with torch.device("meta"):
            return self.build()


def find_network(name: str) -> Callable[..., nn.Module] | None:
    """The constructor of a network that is built here; else `None`."""
    return Mlp if name == "mlp" else cifar.find_network(name)


EXAMPLES = (*cifar.EXAMPLES, "mlp")
"""of the names of networks that are built here"""


def _foreign(name: str, small: bool) -> tuple[str, ...]:
    """The options that other networks have."""
    if name == "mlp":
        return ("norm", *_OF_TIMM)
    return ("side", *(_OF_TIMM if small else ("norm",)))


def _check_blocks(blocks: Any) -> None:
    """Raises `ValueError` unless these are numbers of blocks, whoever wrote them."""
    whole = isinstance(blocks, list) and all(type(count) is int for count in blocks)
    if not whole or not blocks or not 1 <= min(blocks) <= max(blocks) <= _MOST_BLOCKS:
        shown = f"{blocks!r:.40}"
        raise ValueError(f"blocks = {shown}: must be from 1 to {_MOST_BLOCKS} in each stage")


def require_shapes(model: nn.Module, name: str, shapes: Iterable[tuple[int, int, int]]) -> None:
    """Raises `UserError` where a model in evaluation mode does not take images of a shape."""
    device = next(model.parameters()).device
    for shape in shapes:
        try:
            with torch.no_grad():
                model(torch.zeros(2, *shape, device=device))
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"model.name = {name!r} does not take images of {'x'.join(map(str, shape))}: "
                f"{reason}"
            ) from None


def shaped_by(spec: ModelSpec, option: str) -> frozenset[str]:
    """The names of the tensors whose shapes depend on a number of the specification.

    `num_classes` gives the head, `in_chans` the convolution that reads the images.
    """
    other = replace(spec, **{option: getattr(spec, option) + 1})
    here, there = (
        {name: value.shape for name, value in each.outline().state_dict().items()}
        for each in (spec, other)
    )
    return frozenset(name for name, shape in here.items() if there.get(name) != shape)


def _usual(name: str) -> nn.Module:
    """The outline of a timm model as it is without options."""
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name)
    return model


def _as_timm_has_it(
    usual: nn.Module,
    *,
    blocks: list[int] | None = None,
    width: int | None = None,
    activation: str | None = None,
) -> dict[str, Any]:
    """The arguments by which timm builds a variant of its usual model.

    Raises `ValueError` if it cannot.
    """
    arguments: dict[str, Any] = {}
    if blocks is not None:
        arguments |= _blocks_as_timm_has_them(usual, blocks)
    if width is not None:
        if not isinstance(usual, ResNet):
            raise ValueError(f"width = {width}: it takes none; leave model.width out")
        arguments["channels"] = tuple(width << stage for stage in range(4))
    if activation is not None and not is_plain_resnet(usual):
        raise ValueError(f"activation = {activation!r}: only {SIGN_TAKERS} take one")
    if activation == "sign":
        arguments["zero_init_last"] = False  # with it no gradient would pass its blocks
    return arguments


def _blocks_as_timm_has_them(usual: nn.Module, blocks: list[int]) -> dict[str, Any]:
    """The argument by which a timm model takes its blocks. Raises `ValueError` if none does."""
    found, known = stages(usual), _parameters(usual)
    if len(found) != len(blocks):
        raise ValueError(f"blocks = {blocks}: it has {len(found)} stages ({described(found)})")
    if "depth" in known:
        return {"depth": blocks[0]}
    for argument in ("layers", "depths"):
        if argument in known:
            return {argument: tuple(blocks)}
    raise ValueError(f"blocks = {blocks}: it takes no such list; leave model.blocks out")


def _parameters(usual: nn.Module) -> Collection[str]:
    """The names of what the class of a model is made with."""
    return inspect.signature(type(usual).__init__).parameters.keys()
