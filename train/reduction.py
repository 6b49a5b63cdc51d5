"""What the ranks tell each other of their gradients: of a sparse network, only what it keeps.

DDP sums gradients bucket by bucket while the backward pass goes on. Here a bucket of which masks
keep little is packed: its kept entries are gathered by their places, summed over the ranks and put
back among zeros. What is kept gets the sum that it would get otherwise, to the bit where the ranks'
parts are added in the same order (always on two ranks); what is pruned gets zero, which is what the
masks make of it anyway; so an overflow there, in fp16, skips no step.

Places, not boolean masks: selecting by these reads all of a bucket, several times over.
"""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future

ReduceDtype = Literal["fp32", "bf16"]


class Reduction:
    """A DDP communication hook of one network: the sum, not the mean, of the ranks' gradients.

    `need` says which entries the next backward passes must give; at first, all. Buckets of which a
    smaller share than `pack_below` is needed are packed. With `reduce_dtype = "bf16"` what
    is sent is rounded to bfloat16, packed or not.
    """

    def __init__(
        self, model: nn.Module, *, pack_below: float = 0.4, reduce_dtype: ReduceDtype = "fp32"
    ) -> None:
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._pack_below, self._rounds = pack_below, reduce_dtype == "bf16"
        self._masks: Mapping[str, Tensor] = {}
        self._places: dict[tuple[int, ...], Tensor | None] = {}

    def need(self, masks: Mapping[str, Tensor]) -> None:
        """From now on gives what these masks keep of each weight, of others all; the same on all
        ranks.

        Parameter name -> bool tensor of its shape, on its device. A mapping is read once, when its
        buckets come: give another one where it changes.
        """
        if masks is not self._masks and (masks or self._masks):
            self._masks = masks
            self._places.clear()

    def sum(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """The sum of a bucket over the ranks, in place of it: `register_comm_hook(reduction,
        Reduction.sum)`."""
        buffer, places = bucket.buffer(), self._places_in(bucket)
        sent = buffer if places is None else buffer.index_select(0, places)
        if self._rounds:
            sent = sent.bfloat16()

        def received(future: Future[list[Tensor]]) -> Tensor:
            (total,) = future.value()
            if places is not None:
                return buffer.zero_().index_copy_(0, places, total.to(buffer.dtype))
            return buffer if total is buffer else buffer.copy_(total)

        return dist.all_reduce(sent, async_op=True).get_future().then(received)

    def _places_in(self, bucket: dist.GradBucket) -> Tensor | None:
        """Where the needed entries of a bucket stand in it; `None` where it is not packed.

        Buckets are known by what they hold: DDP numbers them anew after its first backward pass.
        """
        parameters = bucket.parameters()
        key = tuple(map(id, parameters))
        if key not in self._places:
            self._places[key] = self._find_places(parameters)
        return self._places[key]

    def _find_places(self, parameters: list[Tensor]) -> Tensor | None:
        masks = [self._masks.get(self._names[parameter]) for parameter in parameters]  # type: ignore[index]
        sizes = [parameter.numel() for parameter in parameters]
        pairs = list(zip(masks, sizes, strict=True))
        kept = sum(size if mask is None else int(mask.count_nonzero()) for mask, size in pairs)
        if kept >= self._pack_below * sum(sizes):
            return None
        needed = [
            torch.ones(parameter.numel(), dtype=torch.bool, device=parameter.device)
            if mask is None
            else _in_memory_order(mask, parameter)
            for mask, parameter in zip(masks, parameters, strict=True)
        ]
        return torch.cat(needed).nonzero().flatten()


def _in_memory_order(mask: Tensor, parameter: Tensor) -> Tensor:
    """The mask's entries as those of the parameter lie in memory, and of its gradient in a bucket:
    `[numel]`; not its flat order where the memory format is `channels_last`.
    """
    laid = torch.empty_like(parameter, dtype=torch.bool).copy_(mask)
    return laid.as_strided((laid.numel(),), (1,))
