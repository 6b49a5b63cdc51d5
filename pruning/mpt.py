"""The file of a multi-prize ticket: a seed, entropy-coded masks, gains, and what was trained.

It is one safetensors file whose metadata hold a JSON document, both specified in docs/formats.md.
Signs are drawn again from the seed, or are in the file where they came from elsewhere. Whatever is
read is compared with its digest, and the network must give the logits of the file again.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from data.errors import RunError, UserError
from data.files import read_content
from pruning import document
from pruning.mask_codec import decode, encode
from pruning.masks import prunable
from pruning.objects import require_memory
from pruning.packed import packed_model
from pruning.packing import Shape, canonical, pack_bits, unpack_bits
from pruning.philox import words
from pruning.prizes import Prize, PrizeLayer
from pruning.random_weights import random_signs
from pruning.signed_weights import GENERATOR, SignedLayer, seed_from_json
from pruning.tickets import model_from_json, outline_of
from pruning.weight_store import StoredTensor, weights_digest
from train.models import ModelSpec

KIND = "tombola-mpt"
SUFFIX = ".mpt"
_METADATA = "mpt"
_MASK, _SIGNS, _REST, _LOGITS = "mask/", "signs/", "rest/", "logits"
_RANS, _BITS = "rans", "bits"
_CONVENTIONS = {
    "gain": "after the layer, in float32",
    "sign_of_zero": 1,
    "padding": 0,
}
"""how the network computes; a reader that does otherwise gets other logits"""
_NUM_IMAGES, _IMAGE_STREAM = 2, 3
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
        """The file of a network, its logits computed."""
        logits = check_logits(prize.build_model(), image_shape)
        return cls(prize, logits, image_shape, preprocessing or {}, about or {})


# The check ------------------------------------------------------------------------------------


def check_images(image_shape: Shape) -> Tensor:
    """`[2, C, H, W]` float32, uniform in [-1, 1): multiples of 2^-23, equal on every machine."""
    shape = (_NUM_IMAGES, *image_shape)
    drawn = words(math.prod(shape), seed=0, layer=0, stream=_IMAGE_STREAM) >> 8
    return torch.from_numpy(drawn.astype(np.float32) / (1 << 23) - 1).view(shape)


@torch.no_grad()
def check_logits(model: nn.Module, image_shape: Shape) -> Tensor:
    """The logits of `check_images`, computed in float64 and rounded to float32.

    In float64, so that the order of sums, which is another on other machines, hardly ever shows.
    `model` stays in float64.
    """
    logits: Tensor = model.double().eval()(check_images(image_shape).double())
    return logits.float()


def compare_logits(file: MptFile) -> bool:
    """Whether the network gives the file's logits bit for bit; `False`: but for rounding.

    Raises `RunError` where it does not.
    """
    found = check_logits(file.prize.build_model(), file.image_shape)
    if torch.equal(found, file.logits):
        return True
    bound = _TOLERANCE * float(file.logits.abs().max())
    difference = float((found - file.logits).abs().max())
    if found.shape == file.logits.shape and difference <= bound:
        return False
    raise RunError(f"its network gives other logits than the file tells, by up to {difference:.3g}")


# Writing --------------------------------------------------------------------------------------


def to_bytes(file: MptFile) -> bytes:
    """The content of the file."""
    prize = file.prize
    tensors = {f"{_REST}{name}": value.contiguous() for name, value in prize.rest.items()}
    tensors[_LOGITS] = file.logits.contiguous()
    rows = []
    for name, layer in prize.layers.items():
        codec, stream = _coded(layer.mask)
        tensors[f"{_MASK}{name}"] = _bytes(stream)
        if prize.seed is None:
            tensors[f"{_SIGNS}{name}"] = _bytes(pack_bits(layer.signs))
        rows.append(_row(name, layer, codec))
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
    return safetensors.torch.save(tensors, {"format": "pt", _METADATA: text})


def _coded(mask: Tensor) -> tuple[str, bytes]:
    """A mask as its entropy-coded bytes, or as bits where those are fewer."""
    coded, bits = encode(mask.flatten().numpy()), pack_bits(mask)
    return (_RANS, coded) if len(coded) < len(bits) else (_BITS, bits)


def _row(name: str, layer: PrizeLayer, codec: str) -> dict[str, Any]:
    return {
        "name": name,
        "shape": list(layer.shape),
        "index": layer.index,
        "kept": layer.kept,
        "density": layer.kept / layer.mask.numel(),
        "gain": layer.gain,
        "codec": codec,
        "mask": hashlib.sha256(pack_bits(layer.mask)).hexdigest(),
        "signs": hashlib.sha256(pack_bits(layer.signs)).hexdigest(),
    }


def _bytes(content: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(content, np.uint8).copy())


def _digest_of(tensors: dict[str, Tensor]) -> str:
    return weights_digest({name: StoredTensor.of(value) for name, value in tensors.items()})


# Reading --------------------------------------------------------------------------------------


def from_bytes(content: bytes) -> MptFile:
    """What a file holds, all of it compared with its digests; nothing of it is run.

    Raises `ValueError` or `KeyError` where it is damaged or was never such a file, `RunError`
    where its network cannot be built.
    """
    body = document.unseal(_metadata(content), KIND)
    if body["generator"] != GENERATOR:
        raise ValueError(f"unknown generator of signs: {body['generator']!r:.40}")
    if body["conventions"] != _CONVENTIONS:
        raise ValueError(f"unknown conventions: {body['conventions']!r:.80}")
    try:
        tensors = safetensors.torch.load(content)
    except Exception as error:  # SafetensorError, and what torch makes of a hostile header
        raise ValueError(str(error).partition("\n")[0][:200] or "no safetensors file") from error
    model = model_from_json(body["model"])
    rest = {n.removeprefix(_REST): t for n, t in tensors.items() if n.startswith(_REST)}
    rows = document.sequence(body["layers"], "layers")
    layers = [_Layer.from_json(row) for row in rows]
    _require_fit(model, layers, rest)
    seed = seed_from_json(body["seed"])
    prize = Prize(model, {one.name: one.read(tensors, seed) for one in layers}, rest, seed)
    if (
        _digest_of(rest) != body["rest"]
        or _digest_of({_LOGITS: tensors[_LOGITS]}) != body["logits"]
    ):
        raise ValueError("its tensors do not match their digests")
    for name, value in tensors.items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name} is not finite")
    return MptFile(
        prize,
        tensors[_LOGITS],
        document.shape(body["image_shape"], "image_shape"),
        document.mapping(body["preprocessing"], "preprocessing"),
        document.mapping(body["about"], "about"),
    )


def _metadata(content: bytes) -> bytes:
    """The document in a safetensors header: 8 bytes of its length, then JSON."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or not 0 < length <= len(content) - 8:
        raise ValueError("no safetensors file, or cut short")
    try:
        text = json.loads(content[8 : 8 + length])["__metadata__"][_METADATA]
        return str(text).encode()
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError("no file of a multi-prize ticket") from error


@dataclass(frozen=True)
class _Layer:
    """A layer as the document tells of it."""

    name: str
    signed: SignedLayer
    kept: int
    codec: str
    mask: str
    signs: str

    @classmethod
    def from_json(cls, value: Any) -> "_Layer":
        row = document.mapping(value, "a layer")
        name = document.text(row["name"], "the name of a layer")
        signed = SignedLayer.from_json(row, name)
        size = math.prod(signed.shape)
        kept = document.count(row["kept"], name, size)
        if not kept or row["density"] != kept / size:
            raise ValueError(
                f"{name} keeps {kept} of {size} weights at density {row['density']!r:.40}"
            )
        digests = (document.digest(row[key], name) for key in ("mask", "signs"))
        return cls(name, signed, kept, document.text(row["codec"], "a codec"), *digests)

    def read(self, tensors: dict[str, Tensor], seed: int | None) -> PrizeLayer:
        """The layer with its mask and signs. Raises `ValueError` or `KeyError`."""
        stream = tensors[f"{_MASK}{self.name}"].numpy().tobytes()
        shape = self.signed.shape
        if self.codec not in (_RANS, _BITS):
            raise ValueError(f"unknown codec {self.codec!r:.40} of {self.name}")
        if self.codec == _BITS:
            mask = unpack_bits(stream, shape)
        else:
            size = math.prod(shape)
            mask = torch.from_numpy(decode(stream, size=size, kept=self.kept)).view(shape)
        if hashlib.sha256(pack_bits(mask)).hexdigest() != self.mask:
            raise ValueError(f"the mask of {self.name} does not match its digest")
        if seed is None:
            signs = unpack_bits(tensors[f"{_SIGNS}{self.name}"].numpy().tobytes(), (self.kept,))
        else:
            signs = random_signs(shape, seed=seed, layer=self.signed.index)[mask] > 0
        if hashlib.sha256(pack_bits(signs)).hexdigest() != self.signs:
            raise ValueError(f"the signs of {self.name} do not match their digest")
        layer = PrizeLayer(mask, signs, self.signed.gain, self.signed.index)
        if layer.kept != self.kept:
            raise ValueError(f"the mask of {self.name} does not keep what is told")
        return layer


def _require_fit(model: ModelSpec, layers: list[_Layer], rest: dict[str, Tensor]) -> None:
    """Raises `RunError` unless these are the tensors of the model, before any is decoded."""
    outline = outline_of(model, "damaged, or anyone's")
    shapes = {name: tuple(value.shape) for name, value in outline.state_dict().items()}
    signed = {layer.name: layer.signed.shape for layer in layers}
    others = {name: tuple(value.shape) for name, value in rest.items()}
    for name in signed:
        if name not in prunable(outline) or signed[name] != shapes[name]:
            raise ValueError(f"no weights {name} of {signed[name]} in its model")
    if len(signed) < len(layers) or signed.keys() & others.keys() or {**signed, **others} != shapes:
        raise ValueError("its tensors are not those of its model")
    size = sum(math.prod(shape) for shape in signed.values())
    require_memory(8 * size, f"{size:,} weights take eight bytes each")


def read(url: str) -> MptFile:
    """The file at a path or URL. Raises `UserError` where there is none, `RunError` if damaged."""
    try:
        return from_bytes(read_content(url))
    except RunError as error:
        raise RunError(f"{url}: {error}") from error
    except (ValueError, KeyError) as error:
        problem = f"no field {error.args[0]!r:.40}" if isinstance(error, KeyError) else str(error)
        raise RunError(f"{url}: damaged: {problem}") from error


def problem_of(url: str) -> str | None:
    """What is wrong with a file, its network rebuilt and run; `None` if nothing.

    A network with binary activations is run as bits as well, which must change nothing.
    """
    try:
        file = read(url)
        compare_logits(file)
        if file.prize.model.arguments.get("activation") == "sign":
            compare_packed(file)
    except UserError as error:
        return str(error)
    except RunError as error:
        return str(error) if str(error).startswith(url) else f"{url}: {error}"
    return None


@torch.no_grad()
def compare_packed(file: MptFile) -> None:
    """Raises `RunError` unless the network gives the same logits as bits, to the last one."""
    images = check_images(file.image_shape)
    plain, packed = file.prize.build_model(), packed_model(file.prize, images)
    if not torch.equal(plain(images), packed(images)):
        raise RunError("its network gives other logits when it runs as bits")
