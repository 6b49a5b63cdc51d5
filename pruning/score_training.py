"""Training under masks that follow the scores: what multi-prize tickets do in every step."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from data.errors import RunError
from pruning import choosing
from pruning.allocate import Scope
from pruning.choosing import choose
from pruning.masks import Masks
from pruning.multiprize import scored_layers
from train.ranks import Ranks
from train.watch import FirstStep, diverged

_RAMP_START = 0.5


@dataclass(frozen=True)
class Share:
    """How many weights are kept at each step, and over which of them the scores are ranked."""

    density: float | Mapping[str, int]
    """the fraction that is kept in the end, or how many weights of each layer"""
    scope: Scope = "layer"
    least: int = 1
    """with `scope = "global"`: how many weights each layer keeps at least"""
    ramp: int = 0
    """steps over which the density falls from 50 %, by the third power of what is left of them"""

    def density_at(self, step: int) -> float | Mapping[str, int]:
        """What is kept in the forward pass of `step`."""
        density = self.density
        if isinstance(density, Mapping) or step >= self.ramp or density >= _RAMP_START:
            return density
        return density + (_RAMP_START - density) * (1 - step / self.ramp) ** 3

    def choose(self, scores: Mapping[str, Tensor], step: int) -> Masks:
        """The masks of the forward pass of `step`. Raises as `pruning.multiprize.choose`."""
        return choose(scores, self.density_at(step), self.scope, self.least)


class TrainedScores:
    """A `Sparsity`: after every update the masks are those of the largest scores.

    They are a function of scores and step alone, so that a checkpoint need not hold them. Each
    rank chooses for itself. After every update it is noted whether all have the same scores, to
    the bit, and whether these are numbers; on a GPU that is read where a step is logged,
    evaluated or saved, since it has to be waited for then anyway.
    """

    def __init__(
        self, share: Share, ranks: Ranks, model: nn.Module, optimizer: Optimizer | None = None
    ) -> None:
        self._layers, self._share, self._ranks = scored_layers(model), share, ranks
        self._step = 0
        device = next(iter(self._layers.values())).scores.device
        self._first_different, self._first_nan = FirstStep(device), FirstStep(device)
        self._weights = self._digest_of_weights()
        ranks.require_same(self._weights, "the random weights")  # DDP would not tell
        self._choose()

    def _digest_of_weights(self) -> str:
        """The SHA-256 over the random weights, which are drawn anew on each machine."""
        digest = hashlib.sha256()
        for layer in self._layers.values():
            digest.update(layer.random.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    @property
    def _scores(self) -> dict[str, Tensor]:
        return {name: layer.scores.detach() for name, layer in self._layers.items()}

    def _choose(self) -> None:
        scores = self._scores
        self._look_at(scores)
        if not choosing.on_device(scores):
            self._require_same()  # before a NaN of one rank is met, that the others do not have
        try:
            self.masks = self._share.choose(scores, self._step)
        except ValueError as error:  # a NaN, on the CPU
            raise diverged(self._step, error) from error
        for name, mask in self.masks.items():
            self._layers[name].keep(mask)

    def _look_at(self, scores: Mapping[str, Tensor]) -> None:
        """Notes whether all ranks have the same scores, and numbers."""
        broken = torch.stack([score.isnan().any() for score in scores.values()])
        self._first_nan.note(broken.any(), self._step)
        if self._ranks.world_size == 1:
            return
        bits = [score.view(torch.int32).sum(dtype=torch.int64) for score in scores.values()]
        sums = torch.stack(bits)
        lowest, highest = self._ranks.reduce(torch.stack([sums, -sums]), "min")
        self._first_different.note((lowest != -highest).any(), self._step)

    def _check(self) -> None:
        """Raises `RunError` on all ranks for what was noted."""
        self._require_same()
        step = self._first_nan.read()
        if step is not None:
            raise diverged(step, "a score is not a number")

    def _require_same(self) -> None:
        step = self._first_different.read()
        if step is not None:
            raise RunError(
                f"after {step} steps the scores differ between the ranks; the run stops here"
            )

    @property
    def density(self) -> float:
        """The fraction of the scored weights that is kept now."""
        return self.masks.density

    def gradient_masks(self, step: int) -> Mapping[str, Tensor]:
        """All: scores of pruned weights move, too."""
        return {}

    def before_update(self, step: int) -> bool:
        """Never vetoes: gradients are dense, of pruned weights too."""
        return True

    def after_update(self, step: int) -> None:
        """Chooses the masks of the next forward pass. On the CPU raises `RunError` for a NaN."""
        self._step = step + 1
        self._choose()

    def facts(self) -> dict[str, float]:
        """None beyond the density. Raises `RunError` if scores differed or were NaN."""
        self._check()
        return {}

    def state_dict(self) -> dict[str, Any]:
        """How far the ramp has come, and digests of masks and weights, equal on all ranks.

        Raises `RunError` as `facts`.
        """
        self._check()
        digest = self.masks.digest()
        self._ranks.require_same(digest, "the masks of the scores")
        return {"step": self._step, "digest": digest, "weights": self._weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Chooses the masks again, by the scores that are loaded already.

        Raises `ValueError` where they are not those of the checkpoint, or the weights are not.
        """
        if state["weights"] != self._weights:
            raise ValueError("this machine draws other random weights than the checkpoint's had")
        self._step = int(state["step"])
        self._choose()
        if state["digest"] != self.masks.digest():
            raise ValueError("the checkpoint's scores choose other masks than they did")
