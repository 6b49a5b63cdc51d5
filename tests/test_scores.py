"""Scores: hand-computed values, an independent reference in float64, equal on all ranks."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_ranks
from torch import Tensor, nn

from data.errors import UserError
from data.loader import Batch
from pruning.allocate import keep_count, keep_top
from pruning.masks import Masks
from pruning.scores import grasp, magnitude, snip, synflow
from pruning.synflow import synflow_masks
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


def network() -> nn.Sequential:
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


def normalised() -> nn.Module:
    """With a batch normalisation whose running statistics are far from those of any batch."""
    model = network()
    model[1] = nn.BatchNorm2d(4)
    model[1].running_var.fill_(100.0)
    return model


def reference(batch: Batch, build: Callable[[], nn.Module] = network) -> dict[str, Tensor]:
    """|theta * dL/dtheta| of the mean loss, in float64, by a plain backward pass."""
    model = build().double()
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
    with pytest.raises(UserError, match="over 4 images is nan, and must be finite: take other"):
        snip(network(), [Batch(batch.images * float("inf"), batch.labels)])


# ---- GraSP


def two_logits(weight: list[list[float]]) -> nn.Linear:
    model = nn.Linear(2, 2, bias=False)
    model.weight.data = torch.tensor(weight)
    return model


def test_grasp_by_hand() -> None:
    """One image x = (1, 2) of class 0, equal logits, T = 1: p = 1/2, |x|^2 = 5.

    g = [-x/2, x/2]; the Hessian is A kron x x^T with A = [[1/4, -1/4], [-1/4, 1/4]], so that
    H g = [(-1/4) |x|^2 x, (1/4) |x|^2 x] = [[-1.25, -2.5], [1.25, 2.5]]; the score is theta * H g.
    """
    batch = Batch(torch.tensor([[1.0, 2.0]]), torch.tensor([0]))
    scores = grasp(two_logits([[2.0, -1.0], [2.0, -1.0]]), [batch], temperature=1.0)
    assert scores["weight"].tolist() == [[-2.5, 2.5], [2.5, -2.5]]
    cooler = grasp(two_logits([[2.0, -1.0], [2.0, -1.0]]), [batch], temperature=2.0)
    # g is divided by T, H by T squared
    assert cooler["weight"].tolist() == [[-2.5 / 8, 2.5 / 8], [2.5 / 8, -2.5 / 8]]


def test_grasp_removes_the_highest_signed_score_of_the_paper() -> None:
    """S = -theta * (H g) of the case above: the two weights with S = 2.5 go."""
    batch = Batch(torch.tensor([[1.0, 2.0]]), torch.tensor([0]))
    scores = grasp(two_logits([[2.0, -1.0], [2.0, -1.0]]), [batch], temperature=1.0)
    assert keep_top(scores, 0.5)["weight"].tolist() == [[False, True], [True, False]]


def grasp_reference(
    batch: Batch, temperature: float = 200.0, build: Callable[[], nn.Module] = network
) -> dict[str, Tensor]:
    """theta * (H g) in float64 with the whole Hessian of the weights written out."""
    model = build().double()
    named = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    sizes = [p.numel() for p in named.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = [v.view_as(p) for v, p in zip(flat.split(sizes), named.values(), strict=True)]
        given = dict(zip(named, parts, strict=True))
        logits = torch.func.functional_call(model, given, (batch.images.double(),))
        return nn.functional.cross_entropy(logits / temperature, batch.labels)

    theta = torch.cat([p.detach().flatten() for p in named.values()])
    gradient = torch.autograd.functional.jacobian(loss, theta)
    hessian = torch.autograd.functional.hessian(loss, theta)
    scores = (theta * (hessian @ gradient)).split(sizes)
    return {n: s.view_as(p) for (n, p), s in zip(named.items(), scores, strict=True)}


def assert_close(scores: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To 1e-4 of the largest score: scores are sums of terms of both signs."""
    assert scores.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(scores[name].double(), value, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("temperature", [200.0, 1.0])
def test_grasp_equals_the_written_out_hessian(temperature: float) -> None:
    """Over one batch, and over the same images in unequal parts, given only once."""
    batch = images(24)
    expected = grasp_reference(batch, temperature)
    for batches in ([batch], iter(parts(batch, 5, 17))):
        scores = grasp(network(), batches, temperature=temperature)
        assert all(score.dtype == torch.float32 for score in scores.values())
        assert_close(scores, expected)


def test_normalisations_take_the_statistics_of_the_images() -> None:
    """SNIP and GraSP are of the network in training mode, whatever mode it is given in."""
    batch = images(24)
    assert_close(snip(normalised().eval(), [batch]), reference(batch, normalised))
    expected = grasp_reference(batch, build=normalised)
    assert_close(grasp(normalised().eval(), [batch]), expected)


@pytest.mark.parametrize("score", [snip, grasp], ids=lambda score: score.__name__)
def test_a_score_is_in_full_float32(score: Any) -> None:
    """Convolutions on CUDA would take TensorFloat-32, whose fraction has 10 bits; and do again."""
    allowed: list[bool] = []

    def look(*_: Any) -> None:
        allowed.append(torch.backends.cudnn.allow_tf32)

    model = network()
    model[0].register_forward_hook(look)
    model[0].register_forward_hook(lambda layer, given, output: output.register_hook(look) and None)
    look()
    score(model, [images(4)])
    look()
    assert allowed[0]
    assert allowed[-1]
    assert len(allowed) > 3
    assert not any(allowed[1:-1])


@pytest.mark.parametrize("score", [snip, grasp, synflow], ids=lambda score: score.__name__)
def test_a_score_leaves_the_network_as_it_was(score: Any) -> None:
    """Parameters, statistics, each module's mode, gradients and random generators."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten())
    model.append(nn.Linear(8, 5))
    model.train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    score(model, [images(6)])
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model] == [True, False, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_grasp_drops_the_same_units_in_both_passes() -> None:
    """The Hessian is that of the loss whose gradient it multiplies: here by hand again.

    With a dropout of 1/2 the image is (2, 4), (2, 0), (0, 4) or (0, 0): with |x|^2 = s, the scores
    are theta * (-s/4 x, s/4 x). Other units in the second pass would give other products.
    """
    batch = Batch(torch.tensor([[1.0, 2.0]]), torch.tensor([0]))
    model = nn.Sequential(nn.Dropout(0.5), two_logits([[2.0, -1.0], [2.0, -1.0]]))
    possible = []
    for x in ([2.0, 4.0], [2.0, 0.0], [0.0, 4.0], [0.0, 0.0]):
        s = sum(value * value for value in x)
        possible.append([[-s / 2 * x[0], s / 4 * x[1]], [s / 2 * x[0], -s / 4 * x[1]]])
    found = []
    for seed in range(12):
        torch.manual_seed(seed)
        found.append((grasp(model, [batch], temperature=1.0)["1.weight"] + 0.0).tolist())
    assert all(scores in possible for scores in found)
    assert len({str(scores) for scores in found}) > 2


class Attention(nn.Module):
    """One layer of attention, with the fused function that has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 12), nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        q, k, v = self.inner(images).chunk(3, dim=-1)
        return self.outer(nn.functional.scaled_dot_product_attention(q, k, v).flatten(1))


def test_grasp_takes_fused_attention_and_compiled_networks() -> None:
    torch.manual_seed(0)
    model = Attention()
    expected = grasp(model, [images(6)])
    assert all(bool(score.any()) for score in expected.values())

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("compiled for a score")

    model.compile(backend=refuse)
    scores = grasp(model, [images(6)])
    assert all(torch.equal(score, expected[name]) for name, score in scores.items())


def test_a_network_without_second_derivatives_is_one_line() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Hardsigmoid(), nn.Linear(4, 5))
    with pytest.raises(UserError, match="GraSP: the network has no second derivative") as caught:
        grasp(model, [Batch(torch.rand(2, 3), torch.tensor([0, 1]))])
    assert "\n" not in str(caught.value)


# ---- SynFlow


def chain(*weights: list[list[float]]) -> nn.Sequential:
    """Linear layers with a ReLU between."""
    layers: list[nn.Module] = []
    for weight in weights:
        layer = nn.Linear(len(weight[0]), len(weight), bias=False)
        layer.weight.data = torch.tensor(weight)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def test_synflow_by_hand() -> None:
    """Of |W1| = [[1, 2], [3, 0]] and |W2| = [[4, 5]]: R = 4 (1 + 2) + 5 (3 + 0) = 27.

    A weight's score is the sum over the paths through it: 1*4, 2*4, 3*5, 0; and 4*3, 5*3. Each
    layer's add up to R.
    """
    model = chain([[1.0, -2.0], [-3.0, 0.0]], [[4.0, -5.0]])
    scores = synflow(model, image_shape=(2,))
    assert scores["0.weight"].tolist() == [[4.0, 8.0], [15.0, 0.0]]
    assert scores["2.weight"].tolist() == [[12.0, 15.0]]
    assert all(score.dtype == torch.float64 and score.sum() == 27 for score in scores.values())
    ours = synflow(model, [Batch(torch.full((3, 2), 7.0), torch.zeros(3, dtype=torch.int64))])
    assert all(torch.equal(score, scores[name]) for name, score in ours.items())


def flows(model: nn.Module, masks: Masks | None = None) -> dict[str, Tensor]:
    """|dR/dtheta * theta| by a plain backward pass over a copy in float64."""
    copied = copy.deepcopy(model).double().eval()
    for parameter in copied.parameters():
        parameter.data.abs_()
    if masks is not None:
        masks.project_(copied)
    copied(torch.ones(1, 1, 4, 4, dtype=torch.float64)).sum().backward()
    weights = {n: p for n, p in copied.named_parameters() if p.ndim > 1}
    return {n: (p * p.grad).abs().detach() for n, p in weights.items() if p.grad is not None}


def test_synflow_equals_a_reference_in_float64() -> None:
    """With biases and normalisations, whose parameters count by absolute value too."""
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1
    expected, scores = flows(model), synflow(model, image_shape=(1, 4, 4))
    for name, value in expected.items():
        torch.testing.assert_close(scores[name], value, rtol=1e-12, atol=0)


def test_synflow_reads_running_statistics() -> None:
    """Normalisations are in evaluation mode: with batch statistics one image of ones gives none."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2), nn.Flatten())
    model[0].weight.data = torch.tensor([1.0, -3.0]).view(2, 1, 1, 1)
    model[1].running_var = torch.tensor([4.0, 9.0]) - model[1].eps
    scores = synflow(model, image_shape=(1, 1, 1))
    torch.testing.assert_close(scores["0.weight"].flatten().float(), torch.tensor([0.5, 1.0]))


def test_iterated_synflow_by_hand() -> None:
    """Of the six weights above three stay, in two iterations: round(6 * (1/2) ** (1/2)) = 4, 3.

    The four highest are 15 and 12, 15 and 8: without the path 1 * 4 the flow is 8 + 15, in each
    layer, and the lowest of 8, 15, 8 and 15 goes: of equal ones the last, which is 4. At once 15,
    12 and 15 would have stayed.
    """
    model = chain([[1.0, -2.0], [-3.0, 0.0]], [[4.0, -5.0]])
    masks = synflow_masks(model, (2,), 3, iterations=2)
    assert masks["0.weight"].tolist() == [[False, True], [True, False]]
    assert masks["2.weight"].tolist() == [[False, True]]
    once = synflow_masks(model, (2,), 3, iterations=1)
    assert once["0.weight"].tolist() == [[False, False], [True, False]]


def iterated_reference(model: nn.Module, kept: int, steps: int) -> Masks:
    """Algorithm 1 by sorting the float64 scores of all layers."""
    masks = Masks.ones(model)
    for step in range(1, steps + 1):
        scores = flows(model, masks)
        left = [
            s.masked_fill(~mask, -1)
            for s, mask in zip(scores.values(), masks.values(), strict=True)
        ]
        flat = torch.cat([score.flatten() for score in left])
        count = round(masks.size * (kept / masks.size) ** (step / steps))
        chosen = torch.zeros(masks.size, dtype=torch.bool)
        chosen[flat.argsort(descending=True, stable=True)[:count]] = True
        pieces = chosen.split([mask.numel() for mask in masks.values()])
        named = zip(masks.items(), pieces, strict=True)
        masks = Masks({name: piece.view_as(mask) for (name, mask), piece in named})
    return masks


def test_iterated_synflow_equals_a_reference_in_float64() -> None:
    for kept in (200, 37, 5):
        found = synflow_masks(network(), (1, 4, 4), kept, iterations=20)
        assert found == iterated_reference(network(), kept, 20)
        assert found.kept == kept


def test_iterated_synflow_keeps_each_layers_count() -> None:
    masks = synflow_masks(network(), (1, 4, 4), {"0.weight": 7, "4.weight": 30}, iterations=9)
    assert [row.kept for row in masks.table()] == [7, 30]


def test_iterated_synflow_does_not_lose_a_layer_that_one_pass_loses() -> None:
    """Maximal critical compression (Theorem 3): here a path for ten weights of three layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, 2))
    assert not keep_count(synflow(model, image_shape=(4,)), 10)["1.weight"].any()
    masks = synflow_masks(model, (4,), 10)
    assert masks.kept == 10
    assert all(row.kept for row in masks.table())


def test_synflow_neither_overflows_nor_underflows() -> None:
    """R = (1e4) ** 30 and (1e-4) ** 30 are beyond float32; the order of the scores is not lost."""
    for scale in (1e4, 1e-4):
        model = chain(*[[[scale, 2 * scale], [2 * scale, scale]] for _ in range(30)])
        masks = synflow_masks(model, (2,), 60, iterations=1)
        assert all(mask.tolist() == [[False, True], [True, False]] for mask in masks.values())


def test_a_flow_that_is_zero_or_infinite_is_one_line() -> None:
    with pytest.raises(UserError, match=r"SynFlow: a score of 0\.weight is not finite"):
        synflow(chain(*[[[1e30]] for _ in range(12)]), image_shape=(1,))
    with pytest.raises(UserError, match=r"SynFlow: all scores of 0\.weight are zero"):
        synflow(chain(*[[[1e-30]] for _ in range(12)]), image_shape=(1,))
    dead = chain([[0.0]], [[1.0]])
    with pytest.raises(UserError, match=r"scores of 0\.weight are zero: no gradient reaches it"):
        synflow_masks(dead, (1,), 1)


def test_too_few_weights_for_any_flow_is_one_line() -> None:
    """One weight of a chain of four."""
    with pytest.raises(UserError, match=r"with 3 of 4 weights left, after .* nothing flows"):
        synflow_masks(chain([[1.0]], [[2.0]], [[3.0]], [[4.0]]), (1,), 1)


# ---- several ranks


def scored(folder: str) -> None:
    """The scores of this rank, from its share of 24 images in two batches of its own size."""
    engine = Engine()
    batch = images(24)
    share = slice(
        24 * engine.rank // engine.world_size, 24 * (engine.rank + 1) // engine.world_size
    )
    own = parts(Batch(batch.images[share], batch.labels[share]), 3)
    found = {
        "snip": snip(network(), own, ranks=engine),
        "grasp": grasp(network(), own, ranks=engine),
        "synflow": synflow(network(), own, ranks=engine),
    }
    torch.save(found, Path(folder, f"{engine.world_size}.{engine.rank}"))
    engine.close()


def test_the_ranks_average_their_gradients(tmp_path: Path) -> None:
    """On 1, 2 and 3 ranks the same scores, bit for bit equal among the ranks of a run."""
    batch = images(24)
    expected = {
        "snip": reference(batch),
        "grasp": grasp_reference(batch),
        "synflow": flows(network()),
    }
    for world_size in (1, 2, 3):
        assert run_ranks(world_size, scored, str(tmp_path)) == [0] * world_size
        found = [
            torch.load(tmp_path / f"{world_size}.{rank}", weights_only=True)
            for rank in range(world_size)
        ]
        for method, values in expected.items():
            assert_close(found[0][method], values)
            for name in values:
                assert all(torch.equal(one[method][name], found[0][method][name]) for one in found)
