"""The file of a multi-prize ticket: a seed, entropy-coded masks, gains, and what was trained.

It is one safetensors file whose metadata hold a JSON document, both specified in docs/formats.md.
Signs are drawn again from the seed, or are in the file where they came from elsewhere. Whatever is
read is compared with its digest, and the network must give the logits of the file again.
"""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from data.errors import RunError, UserError
from pruning import document
from pruning.check_images import NUM_IMAGES, check_images, check_logits, require_images
from pruning.masks import prunable
from pruning.mpt_layers import MASK, SIGNS, FileLayer, as_tensor, coded, layer_row
from pruning.objects import require_memory
from pruning.packed import num_packed, packed_model
from pruning.packing import Shape, canonical, pack_bits
from pruning.prizes import Prize
from pruning.signed_weights import GENERATOR, seed_from_json
from pruning.tensor_file import header_in, read_file, tensors_in
from pruning.tickets import model_from_json, outline_of, told_of
from pruning.weight_store import StoredTensor, weights_digest
from train.models import ModelSpec

KIND = "tombola-mpt"
SUFFIX = ".mpt"
_METADATA = "mpt"
"""alone in the header: safetensors writes several entries in a random order"""
_REST, _LOGITS = "rest/", "logits"
_CONVENTIONS = {
    "gain": "after the layer, in float32",
    "sign_of_zero": 1,
    "padding": 0,
}
"""how the network computes; a reader that does otherwise gets other logits"""
_TOLERANCE = 1e-4
"""of the largest logit: how far another machine's rounding may lead"""


@dataclass(frozen=True)
class MptFile:
    """What such a file holds."""

    prize: Prize
    logits: Tensor
    """`[2, classes]` float32, of `check_images`"""
    image_shape: Shape
    """of these images: channels, height, width"""
    preprocessing: dict[str, Any]
    """how images are made ready for the network; empty where it is not known"""
    about: dict[str, Any]
    """the ticket's id, place and metrics, and the versions that wrote the file"""

    @classmethod
    def of(
        cls,
        prize: Prize,
        image_shape: Shape,
        *,
        preprocessing: dict[str, Any] | None = None,
        about: dict[str, Any] | None = None,
    ) -> "MptFile":
        """The file of a network, its logits computed.

        Raises `ValueError` for impossible images, `RunError` where it does not take them.
        """
        require_images(image_shape, in_chans=prize.model.in_chans)
        logits = check_logits(prize.build_model(), image_shape)
        return cls(prize, logits, image_shape, preprocessing or {}, about or {})


# The check ------------------------------------------------------------------------------------


def compare_logits(file: MptFile) -> bool:
    """Whether the network gives the file's logits bit for bit; `False`: but for rounding.

    Raises `RunError` where it does not.
    """
    found = check_logits(file.prize.build_model(), file.image_shape)
    if found.shape != file.logits.shape:
        shapes = f"{list(found.shape)}, not {list(file.logits.shape)}"
        raise RunError(f"its network gives logits of shape {shapes} as the file tells")
    if torch.equal(found, file.logits):
        return True
    bound = _TOLERANCE * float(file.logits.abs().max())
    difference = float((found - file.logits).abs().max())
    if difference <= bound:
        return False
    raise RunError(f"its network gives other logits than the file tells, by up to {difference:.3g}")


@torch.no_grad()
def compare_packed(file: MptFile) -> int:
    """How many layers run as bits.

    Raises `RunError` unless the network gives the same logits then, to the last bit.
    """
    images = check_images(file.image_shape)
    plain, packed = file.prize.build_model(), packed_model(file.prize, images)
    if not torch.equal(plain(images), packed(images)):
        raise RunError("its network gives other logits when it runs as bits")
    return num_packed(packed)


# Writing --------------------------------------------------------------------------------------


def to_bytes(file: MptFile) -> bytes:
    """The content of the file."""
    prize = file.prize
    tensors = {f"{_REST}{name}": value.contiguous() for name, value in prize.rest.items()}
    tensors[_LOGITS] = file.logits.contiguous()
    rows = []
    for name, layer in prize.layers.items():
        codec, tensors[f"{MASK}{name}"] = coded(layer.mask)
        if prize.seed is None:
            tensors[f"{SIGNS}{name}"] = as_tensor(pack_bits(layer.signs))
        rows.append(layer_row(name, layer, codec))
    body = {
        "model": asdict(prize.model),
        "generator": GENERATOR,
        "seed": prize.seed,
        "conventions": _CONVENTIONS,
        "layers": rows,
        "rest": _digest_of(prize.rest),
        "image_shape": list(file.image_shape),
        "logits": _digest_of({_LOGITS: file.logits}),
        "preprocessing": file.preprocessing,
        "about": document.finite(file.about),
    }
    text = canonical(document.seal(KIND, body)).decode()
    return safetensors.torch.save(tensors, {_METADATA: text})


def _digest_of(tensors: dict[str, Tensor]) -> str:
    return weights_digest({name: StoredTensor.of(value) for name, value in tensors.items()})


# Reading --------------------------------------------------------------------------------------


def from_bytes(content: bytes) -> MptFile:
    """What a file holds, all of it compared with its digests; nothing of it is run.

    Raises `ValueError` or `KeyError` where it is damaged or was never such a file, `RunError`
    where its network cannot be built.
    """
    text = _metadata(content)
    body = document.unseal(text, KIND)
    if canonical(json.loads(text)) != text:
        raise ValueError("its document is not canonical JSON")
    if body["generator"] != GENERATOR:
        raise ValueError(f"unknown generator of signs: {body['generator']!r:.40}")
    if canonical(body["conventions"]) != canonical(_CONVENTIONS):
        raise ValueError(f"unknown conventions: {body['conventions']!r:.80}")
    model, seed = model_from_json(body["model"]), seed_from_json(body["seed"])
    if model.basis is not None:
        raise ValueError(f"binary weights in the basis {model.basis!r}, which they cannot be in")
    image_shape = document.shape(body["image_shape"], "image_shape")
    require_images(image_shape, in_chans=model.in_chans)
    layers = [FileLayer.from_json(row) for row in document.sequence(body["layers"], "layers")]
    tensors = tensors_in(content)
    rest = {n.removeprefix(_REST): t for n, t in tensors.items() if n.startswith(_REST)}
    _require_names(tensors, layers, rest, signs=seed is None)
    _require_fit(model, layers, rest, tensors[_LOGITS])
    if _digest_of(rest) != body["rest"]:
        raise ValueError("what is not binary does not match its digest")
    if _digest_of({_LOGITS: tensors[_LOGITS]}) != body["logits"]:
        raise ValueError("the logits do not match their digest")
    _require_values(layers, rest, tensors[_LOGITS])
    prize = Prize(model, {one.name: one.read(tensors, seed) for one in layers}, rest, seed)
    return MptFile(
        prize,
        tensors[_LOGITS],
        image_shape,
        document.mapping(body["preprocessing"], "preprocessing"),
        document.mapping(body["about"], "about"),
    )


def _metadata(content: bytes) -> bytes:
    """The document in a safetensors header."""
    header = header_in(content)
    try:
        text: str = json.loads(header)["__metadata__"][_METADATA]
        return text.encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError("no file of a multi-prize ticket") from error


def _require_names(
    tensors: dict[str, Tensor], layers: list[FileLayer], rest: dict[str, Tensor], *, signs: bool
) -> None:
    """Raises `ValueError` unless the file holds these tensors, once each, and no others."""
    expected = {f"{MASK}{layer.name}" for layer in layers} | {f"{_REST}{name}" for name in rest}
    expected |= {f"{SIGNS}{layer.name}" for layer in layers if signs} | {_LOGITS}
    for name in sorted(expected ^ tensors.keys()):
        verb = "lacks" if name in expected else "holds unknown"
        raise ValueError(f"it {verb} {name!r:.80}")


def _require_fit(
    model: ModelSpec, layers: list[FileLayer], rest: dict[str, Tensor], logits: Tensor
) -> None:
    """Raises `ValueError` unless these are the tensors of the model, before any is decoded."""
    outline = outline_of(model, "damaged")
    expected = {name: (tuple(t.shape), t.dtype) for name, t in outline.state_dict().items()}
    found = {name: (tuple(t.shape), t.dtype) for name, t in rest.items()}
    weights = prunable(outline)
    for layer in layers:
        shape = layer.signed.shape
        if layer.name not in weights or expected[layer.name][0] != shape:
            raise ValueError(f"no weights {layer.name!r:.80} of {shape} in its model")
        if layer.name in found:
            raise ValueError(f"{layer.name} is there twice")
        found[layer.name] = expected[layer.name]
    names = [layer.name for layer in layers]
    if names != [name for name in weights if name in names]:
        raise ValueError("its layers are not in the order of its model")
    if not layers or found != expected:
        raise ValueError("its tensors are not those of its model")
    if logits.shape != (NUM_IMAGES, model.num_classes) or logits.dtype != torch.float32:
        raise ValueError(f"logits of {logits.dtype} and shape {list(logits.shape)}")
    size = sum(math.prod(layer.signed.shape) for layer in layers)
    require_memory(8 * size, f"{size:,} weights take eight bytes each")


def _require_values(layers: list[FileLayer], rest: dict[str, Tensor], logits: Tensor) -> None:
    """Raises `ValueError` unless all is finite, and zero what is added before a gain."""
    for name, value in {**rest, _LOGITS: logits}.items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name} is not finite")
    for layer in layers:
        bias = rest.get(f"{layer.name.removesuffix('weight')}bias")
        if bias is not None and bool(bias.any()):
            raise ValueError(f"the bias of {layer.name} is not zero")


def read(url: str) -> MptFile:
    """The file at a path or URL. Raises `UserError` where there is none, `RunError` if damaged."""
    return read_file(url, from_bytes)


def verified(url: str) -> MptFile:
    """The file at a path or URL, its network rebuilt and run. Raises as `read`."""
    return verify(url)[0]


def verify(url: str) -> tuple[MptFile, str]:
    """The same, and in one line what was found.

    A network with binary activations is run as bits as well, which must change nothing.
    """
    file = read(url)
    told = f"{file.prize.model.name} at {file.prize.density:.2%}"
    try:
        told_of(file.about)
        equal = compare_logits(file)
        told += f", the same logits{'' if equal else ' but for rounding'}"
        if file.prize.model.arguments.get("activation") == "sign":
            told += f", {compare_packed(file)} of {len(file.prize.layers)} layers run as bits"
    except (RunError, UserError) as error:
        raise RunError(f"{url}: {error}") from error
    except ValueError as error:
        raise RunError(f"{url}: damaged: {error}") from error
    return file, told
