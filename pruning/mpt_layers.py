"""The layers of a multi-prize ticket's file: a row of its document each, and one or two tensors."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pruning import document
from pruning.mask_codec import decode, encode
from pruning.packing import pack_bits, unpack_bits
from pruning.prizes import PrizeLayer
from pruning.random_weights import random_signs
from pruning.signed_weights import SignedLayer

MASK, SIGNS = "mask/", "signs/"
"""begin the names of tensors"""
_RANS, _BITS = "rans", "bits"


@dataclass(frozen=True)
class FileLayer:
    """A layer as the document tells of it."""

    name: str
    """of its weight"""
    signed: SignedLayer
    kept: int
    codec: str
    mask: str
    """SHA-256 of its bits"""
    signs: str
    """the same of the kept weights' signs"""

    @classmethod
    def from_json(cls, value: Any) -> "FileLayer":
        """Raises `ValueError` or `KeyError`."""
        row = document.mapping(value, "a layer")
        name = document.text(row["name"], "the name of a layer")
        signed = SignedLayer.from_json(row, name)
        size = math.prod(signed.shape)
        kept = document.count(row["kept"], name, size)
        if not kept or document.number(row["density"], "a density") != kept / size:
            raise ValueError(
                f"{name} keeps {kept} of {size} weights at density {row['density']!r:.40}"
            )
        codec = document.text(row["codec"], "a codec")
        if codec not in (_RANS, _BITS):
            raise ValueError(f"unknown codec {codec!r:.40} of {name}")
        digests = (document.digest(row[key], name) for key in ("mask", "signs"))
        return cls(name, signed, kept, codec, *digests)

    def read(self, tensors: Mapping[str, Tensor], seed: int | None) -> PrizeLayer:
        """The layer with its mask and signs; without a seed these are among the tensors.

        Raises `ValueError`.
        """
        mask = self._mask(_content(tensors, f"{MASK}{self.name}"))
        if hashlib.sha256(pack_bits(mask)).hexdigest() != self.mask:
            raise ValueError(f"the mask of {self.name} does not match its digest")
        if seed is None:
            signs = unpack_bits(_content(tensors, f"{SIGNS}{self.name}"), (self.kept,))
        else:
            drawn = random_signs(self.signed.shape, seed=seed, layer=self.signed.index)
            signs = drawn[mask] > 0
        if hashlib.sha256(pack_bits(signs)).hexdigest() != self.signs:
            raise ValueError(f"the signs of {self.name} do not match their digest")
        return PrizeLayer(mask, signs, self.signed.gain, self.signed.index)

    def _mask(self, content: bytes) -> Tensor:
        shape = self.signed.shape
        if self.codec == _RANS:
            found = decode(content, size=math.prod(shape), kept=self.kept)
            return torch.from_numpy(found).view(shape)
        mask = unpack_bits(content, shape)
        if np.count_nonzero(mask.numpy()) != self.kept:
            raise ValueError(f"the mask of {self.name} does not keep {self.kept} weights")
        return mask


def layer_row(name: str, layer: PrizeLayer, codec: str) -> dict[str, Any]:
    """What `FileLayer.from_json` reads."""
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


def coded(mask: Tensor) -> tuple[str, Tensor]:
    """The codec of a mask and its bytes: entropy-coded, or bits where those are fewer."""
    content, bits = encode(mask.flatten().numpy()), pack_bits(mask)
    if len(content) < len(bits):
        return _RANS, as_tensor(content)
    return _BITS, as_tensor(bits)


def as_tensor(content: bytes) -> Tensor:
    """Bytes as a uint8 tensor."""
    return torch.from_numpy(np.frombuffer(content, np.uint8).copy())


def _content(tensors: Mapping[str, Tensor], name: str) -> bytes:
    """The bytes of a tensor that is nothing else. Raises `ValueError`."""
    tensor = tensors[name]
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        shape = list(tensor.shape)
        raise ValueError(f"{name} is {tensor.dtype} of shape {shape}, not a row of bytes")
    return tensor.numpy().tobytes()
