"""The file of a 2:4 ticket: a safetensors file with two of every four weights; docs/formats.md."""

import json
from collections.abc import Mapping

import safetensors.torch
import torch
from torch import Tensor, nn

from data.errors import UserError
from pruning.masks import Masks
from pruning.semi_structured import (
    PATTERN,
    as_products,
    compress,
    decompress,
    semi_structured,
)
from pruning.tensor_file import header_in, read_file, tensors_in
from pruning.tickets import model_from_json, outline_of
from train.models import ModelSpec

_VALUES, _PLACES = ".values", ".places"


def to_bytes(state: Mapping[str, Tensor], masks: Masks, facts: Mapping[str, str]) -> bytes:
    """The file of a masked state dict, its 2:4 weights compressed.

    `facts` stand in its metadata; `model` among them is the network, as JSON. Raises `UserError`
    where no layer is 2:4.
    """
    chosen = semi_structured(masks)
    if not chosen:
        raise UserError(
            "none of its layers keeps two of every four weights along its inputs: choose another "
            '--format, or prune with recipe = "initial" and pattern = "2:4"'
        )
    packed = {name: value.contiguous() for name, value in state.items() if name not in chosen}
    for name in chosen:
        values, places = compress(state[name], masks[name])
        packed |= {name + _VALUES: values.contiguous(), name + _PLACES: places}
    return safetensors.torch.save(packed, {"format": "pt", "pattern": str(PATTERN), **facts})


def from_bytes(content: bytes) -> tuple[ModelSpec, dict[str, Tensor], list[str]]:
    """The network, its state dict and its 2:4 weights by name; nothing of it is run.

    Raises `ValueError` or `KeyError` where it is damaged or was never such a file, `RunError`
    where its network cannot be built.
    """
    header, packed = header_in(content), tensors_in(content)
    try:
        facts = json.loads(header)["__metadata__"]
        model, pattern = json.loads(facts["model"]), facts["pattern"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError("no file of a 2:4 ticket") from error
    if pattern != str(PATTERN):
        raise ValueError(f"its pattern is {pattern!r:.20}, not {PATTERN}")
    spec = model_from_json(model)
    shapes = {n: tuple(v.shape) for n, v in outline_of(spec, "damaged").state_dict().items()}
    names = [n.removesuffix(_VALUES) for n in packed if n.removesuffix(_VALUES) + _PLACES in packed]
    state = {}
    for name, shape in shapes.items():
        if name in names:
            values, places = packed.pop(name + _VALUES), packed.pop(name + _PLACES)
            state[name] = decompress(values, places, shape)
        else:
            state[name] = packed.pop(name)
            if tuple(state[name].shape) != shape:
                raise ValueError(f"{name} of shape {list(state[name].shape)}, not {list(shape)}")
    if packed:
        raise ValueError(f"holds unknown {sorted(packed)[0]!r:.80}")
    return spec, state, [name for name in shapes if name in names]


def load(
    url: str, *, device: torch.device | str = "cuda", dtype: torch.dtype = torch.bfloat16
) -> nn.Module:
    """The network of a file at a path or URL, in eval mode, on torch's semi-structured kernels.

    On another device than CUDA its 2:4 layers are products of dense matrices. Raises `UserError`
    where there is no file, or for a `dtype` that the kernels do not have, `RunError` where the file
    is damaged.
    """
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu and dtype not in (torch.bfloat16, torch.float16):
        raise UserError(f"dtype = {dtype}: 2:4 kernels compute in torch.bfloat16 or torch.float16")
    spec, state, names = read_file(url, from_bytes)
    model = spec.build()
    model.load_state_dict(state)
    model.eval().to(device, dtype).to(memory_format=torch.channels_last)
    as_products(model, names, kernels=on_gpu)
    return model
