"""Multi-prize tickets that were not searched for, and their files taken apart and sealed again."""

import json
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from data.errors import RunError, UserError
from pruning import document, mpt
from pruning.choosing import choose
from pruning.masks import prunable
from pruning.mpt import MptFile
from pruning.multiprize import gain_of, signed
from pruning.packing import canonical
from pruning.prizes import Prize, PrizeLayer
from pruning.random_weights import Init, RandomWeights
from train.models import ModelSpec

Tensors = dict[str, Tensor]
Change = Callable[[dict[str, Any], Tensors], None]
"""of a file's document and tensors, in place"""
SPEC = ModelSpec("cifar_resnet8", 10, 3, {"width": 4})
SIGN = ModelSpec("cifar_resnet8", 10, 3, {"width": 4, "activation": "sign"})
IMAGES = (3, 16, 16)


def make_prize(
    spec: ModelSpec = SPEC,
    *,
    density: float = 0.3,
    seed: int = 7,
    explicit: bool = False,
    init: Init = "kaiming_normal",
) -> Prize:
    """A network whose weights are chosen at random; `explicit`: its signs are of no seed."""
    model, random = spec.build(seed=1), RandomWeights(seed, init)
    layers = {}
    for index, (name, weight) in enumerate(prunable(model).items()):
        shape = tuple(weight.shape)
        drawn = random.weight(shape, index, density)
        if explicit:
            drawn = drawn.flip(0)
        mask = choose({name: random.scores(shape, index)}, density)[name]
        gain = float(gain_of(drawn, signed(drawn, mask)))
        layers[name] = PrizeLayer(mask, (drawn >= 0)[mask], gain, index)
    rest = {name: value for name, value in model.state_dict().items() if name not in layers}
    generator = torch.Generator().manual_seed(2)
    for name, value in rest.items():
        drawn = torch.rand(value.shape, generator=generator)
        if name.endswith("running_mean"):
            value.copy_(drawn - 0.5)
        elif name.endswith(("running_var", "norm1.weight", "norm2.weight", "bn2.weight")):
            value.copy_(drawn + 0.5)
        if f"{name.removesuffix('bias')}weight" in layers:
            value.zero_()
    return Prize(spec, layers, rest, None if explicit else seed)


def content_of(prize: Prize, **options: Any) -> bytes:
    """Its file, for images of 16x16."""
    shape = (prize.model.in_chans, *IMAGES[1:])
    return mpt.to_bytes(MptFile.of(prize, shape, **options))


def opened(content: bytes) -> tuple[dict[str, Any], Tensors]:
    """The document of a file, without its seal, and the tensors."""
    length = int.from_bytes(content[:8], "little")
    text = json.loads(content[8 : 8 + length])["__metadata__"]["mpt"]
    body = json.loads(text)
    for field in ("format", "version", "sha256"):
        del body[field]
    return body, safetensors.torch.load(content)


def closed(body: dict[str, Any], tensors: Tensors) -> bytes:
    """The file of these, sealed."""
    text = canonical(document.seal(mpt.KIND, body)).decode()
    return safetensors.torch.save(tensors, {"mpt": text})


def changed(content: bytes, change: Change) -> bytes:
    """A file with something changed, and its document's checksum that of the change."""
    body, tensors = opened(content)
    change(body, tensors)
    return closed(body, tensors)


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(images)
    return found


def assert_same_prize(found: Prize, expected: Prize) -> None:
    """Masks, signs, gains and all other tensors are equal, bit for bit."""
    assert (found.model, found.seed) == (expected.model, expected.seed)
    assert list(found.layers) == list(expected.layers)
    for name, layer in expected.layers.items():
        assert torch.equal(found.layers[name].mask, layer.mask)
        assert torch.equal(found.layers[name].signs, layer.signs)
        assert (found.layers[name].gain, found.layers[name].index) == (layer.gain, layer.index)
    assert found.rest.keys() == expected.rest.keys()
    for name, value in expected.rest.items():
        assert found.rest[name].dtype == value.dtype
        assert torch.equal(found.rest[name], value)


def problem_of(url: str) -> str | None:
    """What `mpt.verified` says of a file; `None` if it is whole."""
    try:
        mpt.verified(url)
    except (RunError, UserError) as error:
        return str(error)
    return None
