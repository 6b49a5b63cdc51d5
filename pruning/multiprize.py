"""Multi-prize tickets: layers whose weights are random and never trained, chosen by scores.

Diffenderfer and Kailkhura 2021 (2103.09377, biprop). Of a layer's n random weights W those with
the n - floor((1 - k) n) largest `|scores|` are kept, and each of these acts as its sign times one
gain of the layer, the mean of the kept `|W|`::

    B = sign(W) * M                sign(0) = +1
    gain = sum(|W| * M) / nnz(M)
    y = conv(x, B) * gain          the gain is applied last, in float32

The gradient of the scores is the authors': dL/dw * W * sign(scores), for pruned weights too, where
w = gain * B. The chain rule, with the mask taken for `|scores|`, would give
`dL/dw * gain * sign(W) * sign(scores)` ("literal"). With real weights (`w = W * M`) the same is
edge-popup (Ramanujan et al. 2020, 1911.13299).

Masks and gains change when `keep` is called, once for each optimizer step, and not in a forward
pass.
"""

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from data.errors import UserError
from pruning.choosing import choose
from pruning.masks import prunable

Gradient = Literal["biprop", "literal"]
Weights = Literal["binary", "float"]


def binary_weight(weight: Tensor, scores: Tensor, density: float) -> Tensor:
    """The weight that the forward pass uses: `gain * sign(weight) * mask`, of the same shape.

    Differentiable in `scores`, by the authors' gradient. Ties are kept by flat index. Raises
    `UserError` for a density outside (0, 1], `ValueError` for a score that is NaN.
    """
    mask = choose({"scores": scores}, density)["scores"]
    weight = weight.detach()
    binary = signed(weight, mask)
    used: Tensor = _Chosen.apply(scores, binary * gain_of(weight, binary), weight, None)
    return used


class _Chosen(torch.autograd.Function):
    """`value`, which is w over `gain` (`None`: 1), with a gradient for the scores.

    It is `dL/dw * random * sign(scores)`; or, `literal`, `dL/dw * gain * sign(random * scores)`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        value: Tensor,
        random: Tensor,
        gain: Tensor | None,
        literal: bool = False,
    ) -> Tensor:
        ctx.save_for_backward(scores, random, gain)
        ctx.literal = literal
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scores, random, gain = ctx.saved_tensors  # gradient: dL/dvalue = gain * dL/dw
        if ctx.literal:
            found = torch.where(random < 0, -gradient, gradient)
        else:
            found = gradient * random
            found = found if gain is None else found.div_(gain)
        return found.mul_(torch.sign(scores)), None, None, None, None


def signed(weight: Tensor, mask: Tensor) -> Tensor:
    """`sign(weight)` where it is kept, else 0: exactly +1, -1 or +0."""
    return _signed_(torch.empty_like(weight).copy_(mask), weight + 0.0)


def _signed_(mask: Tensor, weight: Tensor) -> Tensor:
    """`signed` in place of `mask`, 0 and 1 as floats; `weight` has no -0."""
    return torch.copysign(mask, weight, out=mask).add_(0.0)  # which makes +0 of -0


def gain_of(weight: Tensor, binary: Tensor) -> Tensor:
    """The mean of `|weight|` where `binary`, its sign, is not 0; above 0, as float32.

    In float64, so that sums in another order come to the same.
    """
    total = (binary * weight).sum(dtype=torch.float64)
    mean = (total / binary.count_nonzero().clamp(min=1)).float()
    return mean.clamp(min=torch.finfo(torch.float32).tiny)


# Layers ---------------------------------------------------------------------------------------


class GainLayer(nn.Module):
    """A convolution or linear layer that computes `layer(x, binary) * gain`.

    Mixed into the class of a layer by `as_gain_layer`; a bias, which is added before the gain, is
    zero.
    """

    binary: Tensor
    """+1, -1 or 0 (or the kept weights themselves), of the weight's shape"""
    gain: Tensor
    """float32, no dimensions"""

    @property
    def weight(self) -> Tensor:
        """The binary weights: +1, -1 and 0."""
        return self.binary

    def forward(self, x: Tensor) -> Tensor:
        """The layer on binary weights, and the gain after it in float32."""
        y: Tensor = super().forward(x)
        wide = y if y.dtype == torch.float64 else y.float()
        return (wide * self.gain).to(y.dtype)


class ScoredLayer(GainLayer):
    """A layer whose `scores` are trained, to choose among its `random` weights."""

    scores: nn.Parameter
    random: Tensor
    is_real: bool
    gradient: Gradient

    @property
    def weight(self) -> Tensor:
        """What acts in the forward pass, differentiable in the scores; else the binary weights
        alone."""
        if not torch.is_grad_enabled():
            return self.binary
        gain = None if self.is_real else self.gain
        literal = self.gradient == "literal" and not self.is_real
        chosen: Tensor = _Chosen.apply(self.scores, self.binary, self.random, gain, literal)
        return chosen

    @torch.no_grad()
    def keep(self, mask: Tensor) -> None:
        """Uses the weights where `mask` is `True`, until the next call."""
        if self.is_real:
            torch.mul(self.random, mask, out=self.binary)
            return
        _signed_(self.binary.copy_(mask), self.random)
        self.gain.copy_(gain_of(self.random, self.binary))

    @torch.no_grad()
    def draw(self, random: Tensor) -> None:
        """Takes other random weights."""
        self.random.copy_(random).add_(0.0)  # sign(-0) = +1


@cache
def _mixed(kind: type[Any], layer: type[Any]) -> type[nn.Module]:
    return type(f"{kind.__name__}{layer.__name__}", (kind, layer), {})


def as_gain_layer(layer: nn.Module, binary: Tensor, gain: Tensor) -> None:
    """Makes a convolution or linear layer a `GainLayer`, in place; its bias becomes zero."""
    _mix(layer, GainLayer)
    layer.register_buffer("binary", binary, persistent=False)
    layer.register_buffer("gain", gain.float(), persistent=False)


def _mix(layer: nn.Module, kind: type[GainLayer]) -> None:
    if type(layer).__module__.startswith("timm.") and "Std" in type(layer).__name__:
        raise UserError(
            f"{type(layer).__name__} standardises its weights, which would not be binary; choose "
            "a model without weight standardisation"
        )
    del layer.weight
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        layer.bias.requires_grad_(False)
    layer.__class__ = _mixed(kind, type(layer))  # type: ignore[arg-type]


def score(
    model: nn.Module,
    *,
    exclude: Collection[str] = (),
    weights: Weights = "binary",
    gradient: Gradient = "biprop",
) -> None:
    """Makes the convolutions and linear layers of `model` a `ScoredLayer` each, in place.

    `exclude`: weights, by name, that stay as they are. The random weights and scores are zero
    until they are drawn. Raises `UserError` where a layer cannot be made one.
    """
    weights_of = prunable(model)
    _require_unshared(model, weights_of)
    names = [name for name in weights_of if name not in exclude]
    layers = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    for layer in layers.values():
        weight: Tensor = layer.weight  # type: ignore[assignment]
        zeros = torch.zeros_like(weight, requires_grad=False)
        _mix(layer, ScoredLayer)
        layer.is_real, layer.gradient = weights == "float", gradient  # type: ignore[assignment]
        layer.register_parameter("scores", nn.Parameter(zeros.clone()))
        layer.register_buffer("random", zeros.clone(), persistent=False)
        layer.register_buffer("binary", zeros, persistent=False)
        layer.register_buffer("gain", torch.ones((), device=zeros.device), persistent=False)


def _require_unshared(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
    """Raises `UserError` where a weight, or its whole layer, is in the network twice."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in weights and any(parameter is weight for weight in weights.values()):
            raise UserError(
                f"{name} is also another layer's weight: scores cannot choose it for both; choose "
                "another model"
            )


def uncalled(model: nn.Module, images: Tensor) -> list[str]:
    """The scored layers, by their weights, that the network does not call, in layer order.

    It computes with their weights by itself then, and leaves out the gain.
    """
    layers = scored_layers(model)
    called: set[str] = set()
    hooks = [
        layer.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, layer in layers.items()
    ]
    was_training = model.training
    with torch.no_grad():
        model.eval()(images)
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    return [name for name in layers if name not in called]


def scored_layers(model: nn.Module) -> dict[str, ScoredLayer]:
    """The layers whose scores are trained, by the names of their weights, in layer order."""
    found = model.named_modules()
    return {f"{name}.weight": layer for name, layer in found if isinstance(layer, ScoredLayer)}
