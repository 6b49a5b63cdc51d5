"""Work on weights that every rank has, shared out: each rank takes a part of every layer.

A share is a contiguous part of a layer's flat order, in rank order, and begins at a multiple of
eight weights, so that the ranks' packed bits are joined byte by byte.
"""

from collections.abc import Mapping
from itertools import pairwise

from torch import Tensor

from pruning.packing import pack_bits, unpack_bits
from train.ranks import Ranks


def cut(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """This rank's share of each tensor, flat; a view where the tensor is contiguous."""
    return {name: _part(tensor, *_bounds(tensor, ranks)) for name, tensor in tensors.items()}


def join(
    shares: Mapping[str, Tensor], whole: Mapping[str, Tensor], ranks: Ranks
) -> dict[str, Tensor]:
    """The whole bool tensors of all ranks' bool `shares`, on every rank.

    `whole`: tensors of the shapes that were cut, in their order, on the devices of the result.
    """
    sizes = {name: _num_bytes(tensor, ranks) for name, tensor in whole.items()}
    packed = ranks.together(lambda: b"".join(pack_bits(shares[name]) for name in whole))
    places = [0] * ranks.world_size
    joined: dict[str, Tensor] = {}
    for name, tensor in whole.items():
        parts = []
        for rank, size in enumerate(sizes[name]):
            parts.append(packed[rank][places[rank] : places[rank] + size])
            places[rank] += size
        joined[name] = unpack_bits(b"".join(parts), tuple(tensor.shape)).to(tensor.device)
    return joined


def _part(tensor: Tensor, start: int, stop: int) -> Tensor:
    part = tensor.detach().reshape(-1)[start:stop]
    return part if tensor.is_contiguous() else part.clone()  # else it would keep a whole copy


def _bounds(tensor: Tensor, ranks: Ranks) -> tuple[int, int]:
    start = sum(_num_bytes(tensor, ranks)[: ranks.rank]) * 8
    stop = start + _num_bytes(tensor, ranks)[ranks.rank] * 8
    return min(start, tensor.numel()), min(stop, tensor.numel())


def _num_bytes(tensor: Tensor, ranks: Ranks) -> list[int]:
    """Into how many packed bytes each rank's share of a tensor goes."""
    total, world_size = (tensor.numel() + 7) // 8, ranks.world_size
    ends = [total * rank // world_size for rank in range(world_size + 1)]
    return [stop - start for start, stop in pairwise(ends)]
