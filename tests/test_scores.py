"""Scores: hand-computed values, an independent reference in float64, equal on all ranks."""

from pathlib import Path

import pytest
import torch
from processes import run_ranks
from torch import Tensor, nn

from data.errors import UserError
from data.loader import Batch
from pruning.scores import magnitude, snip
from train.engine import Engine


def test_magnitude_is_the_absolute_value() -> None:
    model = nn.Linear(3, 1, bias=False)
    model.weight.data = torch.tensor([[-2.0, 0.5, 0.0]])
    assert magnitude(model)["weight"].tolist() == [[2.0, 0.5, 0.0]]


def test_snip_by_hand() -> None:
    """Two classes, one image x = (1, 2) of class 0: with zero logits dL/dW = (p - y) x^T."""
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor([[2.0, -1.0], [2.0, -1.0]])  # equal logits: p = 1/2
    scores = snip(model, [Batch(torch.tensor([[1.0, 2.0]]), torch.tensor([0]))])
    # gradient: [-1/2 * x, 1/2 * x] = [[-0.5, -1], [0.5, 1]], times the weights
    assert scores["weight"].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    model.weight.data[1] *= 0.5
    model.weight.data[0] *= 0.5
    assert snip(model, [Batch(torch.tensor([[1.0, 2.0]]), torch.tensor([0]))])[
        "weight"
    ].tolist() == [[0.5, 0.5], [0.5, 0.5]]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 5),
    )


def images(num: int, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        torch.randn(num, 1, 4, 4, generator=generator),
        torch.randint(0, 5, (num,), generator=generator),
    )


def reference(batch: Batch) -> dict[str, Tensor]:
    """|theta * dL/dtheta| of the mean loss, in float64, by a plain backward pass."""
    model = network().double()
    nn.functional.cross_entropy(model(batch.images.double()), batch.labels).backward()
    weights = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    return {n: (p * p.grad).abs().detach() for n, p in weights.items() if p.grad is not None}


def parts(batch: Batch, *ends: int) -> list[Batch]:
    """The batch cut at `ends`."""
    starts = (0, *ends)
    cuts = zip(starts, (*ends, len(batch.images)), strict=True)
    return [Batch(batch.images[a:b], batch.labels[a:b]) for a, b in cuts]


def test_snip_equals_a_reference_in_float64() -> None:
    """Over one batch, and over the same images in unequal parts."""
    batch = images(24)
    expected = reference(batch)
    for batches in ([batch], parts(batch, 5, 17)):
        scores = snip(network(), batches)
        assert scores.keys() == expected.keys()
        for name, score in scores.items():
            torch.testing.assert_close(score.double(), expected[name], rtol=1e-5, atol=1e-8)


def test_snip_leaves_the_network_as_it_was() -> None:
    """Statistics, mode, gradients and random generators; statistics are those of the batch."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten())
    model.append(nn.Linear(8, 5))
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    snip(model, [images(6)])
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_snip_is_in_float32_whatever_the_images_are() -> None:
    """Loaders of image files on a GPU give the type of the mixed precision."""
    batch = images(6)
    half = Batch(batch.images.bfloat16(), batch.labels)
    expected = snip(network(), [Batch(half.images.float(), batch.labels)])
    assert all(torch.equal(score, expected[n]) for n, score in snip(network(), [half]).items())


def test_excluded_layers_have_no_score() -> None:
    assert list(snip(network(), [images(4)], exclude=["0"])) == ["4.weight"]


def test_snip_without_images_or_with_an_infinite_loss_is_one_line() -> None:
    with pytest.raises(UserError, match="the loss over 0 images is 0"):
        snip(network(), [])
    batch = images(4)
    with pytest.raises(UserError, match="the loss over 4 images is nan; it must be finite"):
        snip(network(), [Batch(batch.images * float("inf"), batch.labels)])


def scored(folder: str) -> None:
    """The scores of this rank, from its share of 24 images in two batches of its own size."""
    engine = Engine()
    batch = images(24)
    share = slice(
        24 * engine.rank // engine.world_size, 24 * (engine.rank + 1) // engine.world_size
    )
    own = Batch(batch.images[share], batch.labels[share])
    scores = snip(network(), parts(own, 3), ranks=engine)
    torch.save(scores, Path(folder, f"{engine.world_size}.{engine.rank}"))
    engine.close()


def test_the_ranks_average_their_gradients(tmp_path: Path) -> None:
    """On 1, 2 and 3 ranks the same scores, bit for bit equal among the ranks of a run."""
    expected = reference(images(24))
    for world_size in (1, 2, 3):
        assert run_ranks(world_size, scored, str(tmp_path)) == [0] * world_size
        found = [
            torch.load(tmp_path / f"{world_size}.{rank}", weights_only=True)
            for rank in range(world_size)
        ]
        for name, value in expected.items():
            assert all(torch.equal(one[name], found[0][name]) for one in found)
            torch.testing.assert_close(found[0][name].double(), value, rtol=1e-5, atol=1e-8)
