"""Multi-prize layers: masks, gains and gradients on fixed tensors, and which weights are kept."""

import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from data.errors import UserError
from pruning.allocate import keep_count, keep_counts
from pruning.choosing import choose, num_kept
from pruning.device_select import select_largest_of_all, select_largest_of_each
from pruning.masks import Masks, prunable
from pruning.multiprize import (
    Gradient,
    ScoredLayer,
    Weights,
    binary_weight,
    gain_of,
    score,
    scored_layers,
    signed,
)
from pruning.multiprize_config import MultiprizeConfig
from pruning.random_weights import RandomWeights
from train.models import ModelSpec

WEIGHT = torch.tensor([[0.5, -0.25, 0.0, 2.0], [-1.0, 0.75, -0.125, -3.0]])
SCORES = torch.tensor([[0.1, -0.4, 0.3, -0.2], [0.3, 0.0, -0.3, 0.05]])
UPSTREAM = torch.tensor([[1.0, 2.0, -1.0, 0.5], [3.0, -2.0, 1.0, 4.0]])


def authors(weight: Tensor, scores: Tensor, kept: int) -> tuple[Tensor, float]:
    """Mask and gain by a stable sort, as the paper has them: the gain over what is kept."""
    order = sorted(range(scores.numel()), key=lambda i: (-float(scores.flatten()[i].abs()), i))
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[:kept]] = True
    mask = mask.view(scores.shape)
    return mask, math.fsum(weight[mask].abs().tolist()) / kept


# ---- masks, gains, gradients


@pytest.mark.parametrize(("density", "kept"), [(0.05, 1), (0.2, 2), (0.5, 4), (1.0, 8)])
def test_mask_and_gain_on_fixed_tensors(density: float, kept: int) -> None:
    """n - floor((1 - k) n) are kept, ties by flat index; the gain is their mean magnitude."""
    assert num_kept(density, 8) == kept
    mask, gain = authors(WEIGHT, SCORES, kept)
    signs = torch.where(WEIGHT < 0, -1.0, 1.0)
    used = binary_weight(WEIGHT, SCORES, density)
    torch.testing.assert_close(used, gain * signs * mask, rtol=1e-6, atol=0)
    assert torch.equal(used != 0, mask)


def test_ties_are_kept_by_flat_index() -> None:
    """Of three scores of magnitude 0.3 the first two, in row-major order."""
    mask = choose({"w": SCORES}, 0.375)["w"]
    assert mask.flatten().tolist() == [False, True, True, False, True, False, False, False]


def test_the_sign_of_zero_is_one() -> None:
    """Of -0 too; and what is not kept is +0, not -0."""
    weight, mask = torch.tensor([0.0, -0.0, -2.0, 3.0]), torch.tensor([True, True, False, True])
    binary = signed(weight, mask)
    assert binary.tolist() == [1, 1, 0, 1]
    assert torch.signbit(binary).tolist() == [False] * 4


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
def test_the_gradient_is_dense_and_has_no_gain(density: float) -> None:
    """dL/dw * W * sign(s) for pruned weights as well; none where the score is zero."""
    scores = SCORES.clone().requires_grad_()
    binary_weight(WEIGHT, scores, density).backward(UPSTREAM)  # type: ignore[no-untyped-call]
    assert scores.grad is not None
    assert torch.equal(scores.grad, UPSTREAM * WEIGHT * torch.sign(SCORES))


@pytest.mark.parametrize(
    ("density", "kept"), [(0.05, 1), (0.25, 25), (0.3, 30), (0.9, 90), (0.95, 95), (1.0, 100)]
)
def test_counts_are_those_of_the_decimal_number(density: float, kept: int) -> None:
    """Not of its nearest double: (1 - 0.9) * 10 is 1 and not a little less."""
    size = 20 if density == 0.05 else 100
    assert num_kept(density, size) == kept
    assert num_kept(0.9, 10) == 9


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, math.nan])
def test_an_impossible_density_is_refused(density: float) -> None:
    with pytest.raises(UserError, match=r"density = .*: must be above 0 and at most 1"):
        binary_weight(WEIGHT, SCORES, density)


def test_a_score_that_is_not_a_number_is_refused() -> None:
    scores = SCORES.clone()
    scores[1, 2] = math.nan
    with pytest.raises(ValueError, match="not a number"):
        binary_weight(WEIGHT, scores, 0.5)


def test_a_gain_is_above_zero() -> None:
    """Were all kept weights zero, nothing is divided by it."""
    assert float(gain_of(torch.zeros(3), torch.ones(3))) > 0
    assert float(gain_of(torch.ones(3), torch.zeros(3))) > 0


# ---- layers


def layer_of(
    layer: nn.Module, density: float, *, weights: Weights = "binary", gradient: Gradient = "biprop"
) -> ScoredLayer:
    """The layer with random weights and scores, its mask chosen."""
    holder = nn.Sequential(layer)
    score(holder, weights=weights, gradient=gradient)
    ((_, scored),) = scored_layers(holder).items()
    drawn, shape = RandomWeights(7, "kaiming_normal"), tuple(scored.scores.shape)
    scored.draw(drawn.weight(shape, 0, density))
    scored.scores.data.copy_(drawn.scores(shape, 0))
    scored.keep(choose({"w": scored.scores}, density)["w"])
    return scored


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(3, 5, 3, padding=1),
        lambda: nn.Conv2d(4, 6, 3, 2, groups=2, bias=False),
        lambda: nn.Linear(11, 4),
    ],
    ids=["conv", "grouped", "linear"],
)
@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
def test_a_layer_computes_as_with_the_functional_weight(
    make: Callable[[], nn.Module], density: float
) -> None:
    """Its output and the gradients of scores and inputs are those of gain * sign(W) * M."""
    torch.manual_seed(0)
    scored = layer_of(make(), density)
    conv = isinstance(scored, nn.Conv2d)
    x = torch.randn(
        (2, scored.scores.shape[1] * getattr(scored, "groups", 1), 7, 7)[: 4 if conv else 2]
    )
    mine, theirs = (x.clone().requires_grad_() for _ in range(2))
    y = scored(mine)
    scores = scored.scores.detach().clone().requires_grad_()
    weight = binary_weight(scored.random, scores, density)
    expected = (
        F.conv2d(theirs, weight, None, scored.stride, scored.padding, 1, scored.groups)
        if conv
        else F.linear(theirs, weight)
    )
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scored.scores.grad, scores.grad, rtol=1e-4, atol=1e-6)


def test_the_convolution_reads_exact_signs() -> None:
    """+1, -1 or 0, which bf16 and fp16 hold exactly; the gain is float32 and comes after."""
    scored = layer_of(nn.Conv2d(8, 8, 3), 0.3)
    assert scored.binary.unique().tolist() == [-1, 0, 1]
    x = torch.randint(0, 2, (2, 8, 9, 9)) * 2.0 - 1
    with torch.autocast("cpu", torch.bfloat16):
        y = scored(x)
    sums = F.conv2d(x, scored.binary)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, (sums * scored.gain).bfloat16())
    assert scored.gain.dtype == scored.scores.dtype == torch.float32


def test_scores_get_float32_gradients_under_autocast() -> None:
    """bf16 scores would be tied by the thousand."""
    scored = layer_of(nn.Conv2d(8, 8, 3), 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        scored(torch.randn(2, 8, 9, 9)).float().square().mean().backward()
    assert scored.scores.grad is not None
    assert scored.scores.grad.dtype == torch.float32


def test_the_literal_gradient_is_that_of_the_chain_rule() -> None:
    """dL/dw * gain * sign(W) * sign(s), the mask taken for |s|."""
    scored = layer_of(nn.Linear(6, 3, bias=False), 0.5, gradient="literal")
    x, upstream = torch.randn(4, 6), torch.randn(4, 3)
    scored(x).backward(upstream)
    gradient = upstream.T @ x * scored.gain * torch.sign(scored.random)
    torch.testing.assert_close(scored.scores.grad, gradient * torch.sign(scored.scores.detach()))


def test_edge_popup_keeps_the_weights_themselves() -> None:
    """w = W * M, without a gain; the gradient of the scores is dL/dw * W * sign(s)."""
    scored = layer_of(nn.Linear(6, 3, bias=False), 0.5, weights="float")
    mask = choose({"w": scored.scores}, 0.5)["w"]
    assert torch.equal(scored.binary, scored.random * mask)
    x, upstream = torch.randn(4, 6), torch.randn(4, 3)
    scored(x).backward(upstream)
    expected = upstream.T @ x * scored.random * torch.sign(scored.scores.detach())
    torch.testing.assert_close(scored.scores.grad, expected)


def test_masks_do_not_follow_the_scores_by_themselves() -> None:
    """Neither in training nor in evaluation: they are chosen once an update, by `keep`."""
    scored = layer_of(nn.Linear(6, 3), 0.5)
    x = torch.randn(4, 6)
    before = scored(x).detach()
    with torch.no_grad():
        scored.scores.copy_(torch.rand(3, 6))
    assert torch.equal(scored(x).detach(), before)
    with torch.no_grad():
        assert torch.equal(scored(x), before)
    scored.keep(choose({"w": scored.scores}, 0.5)["w"])
    assert not torch.equal(scored(x).detach(), before)


@pytest.mark.parametrize("batchnorm", ["fixed", "learned"])
def test_only_scores_have_gradients(batchnorm: Literal["fixed", "learned"]) -> None:
    """And normalisations, if they are learned: DDP has nothing else to exchange, and no optimizer
    a state of it. The random weights are no parameters, and in no checkpoint."""
    spec = ModelSpec("resnet18", 10, 3, {"width": 8})
    model = spec.build()
    MultiprizeConfig(batchnorm=batchnorm).adapt(model, spec)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    scores = {f"{name.removesuffix('weight')}scores" for name in prunable(spec.outline())}
    norms = {n for n in spec.outline().state_dict() if ".bn" in n or n.startswith("bn")}
    norms |= {n for n in spec.outline().state_dict() if "downsample.1" in n}
    learned = {n for n in norms if n.endswith(("weight", "bias"))}
    assert trained == (scores | learned if batchnorm == "learned" else scores)
    names = {name.rpartition(".")[2] for name in model.state_dict()}
    assert names.isdisjoint({"random", "binary", "gain"})


def test_normalisations_begin_with_one_and_zero() -> None:
    """timm starts the last one of a residual branch with zero, where it would stay."""
    spec = ModelSpec("resnet18", 10, 3, {"width": 8})
    model = spec.build()
    MultiprizeConfig().adapt(model, spec)
    state = model.state_dict()
    assert bool((state["layer1.0.bn2.weight"] == 1).all())
    assert not bool(state["layer1.0.bn2.bias"].any())


def test_a_bias_is_zero_and_stays_so() -> None:
    scored = layer_of(nn.Linear(6, 3), 0.5)
    assert isinstance(scored.bias, nn.Parameter)
    assert not scored.bias.requires_grad
    assert not bool(scored.bias.any())


def test_weight_standardisation_is_refused() -> None:
    """Its layers compute with other weights than they hold."""
    model = ModelSpec("resnetv2_50x1_bit", 10, 3).outline()
    with pytest.raises(UserError, match="standardises its weights"):
        score(model)


# ---- which weights are kept


@given(
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=6),
    percent=st.integers(1, 100),
    least=st.integers(1, 5),
    seed=st.integers(0, 100),
)
@settings(max_examples=100)
def test_a_global_choice_has_its_count_and_its_least(
    sizes: list[int], percent: int, least: int, seed: int
) -> None:
    """Exactly the count over all layers; no layer below its least; else the largest scores."""
    generator = torch.Generator().manual_seed(seed)
    scores = {
        f"layer{i}": torch.randn(size, generator=generator) * 10.0**-i
        for i, size in enumerate(sizes)
    }
    density, count = percent / 100, num_kept(percent / 100, sum(sizes))
    needed = sum(min(least, size) for size in sizes)
    if count < needed:
        with pytest.raises(UserError, match="keep more"):
            choose(scores, density, "global", least)
        return
    masks = choose(scores, density, "global", least)
    assert masks.kept == count
    for row in masks.table():
        assert row.kept >= min(least, row.size)
        magnitudes = scores[row.name].abs()
        kept = magnitudes[masks[row.name]]
        assert float(kept.min()) >= float(magnitudes.topk(row.kept).values[-1])
    above = [n for n in masks if int(masks[n].sum()) > min(least, masks[n].numel())]
    lowest = min((float(scores[n].abs()[masks[n]].min()) for n in above), default=math.inf)
    dropped = [float(scores[n].abs()[~masks[n]].max()) for n in masks if not masks[n].all()]
    assert max(dropped, default=0) <= lowest


def test_one_keeps_everything() -> None:
    """The authors' code prunes everything at k = 1."""
    for scope in ("layer", "global"):
        masks = choose({"a": SCORES, "b": SCORES * 0}, 1.0, scope)  # type: ignore[arg-type]
        assert masks.density == 1


def test_a_global_percent_empties_no_layer_and_gives_no_nan() -> None:
    """Where one layer's scores are far below all others'."""
    model = ModelSpec("cifar_resnet8", 10, 3, {"width": 8}).build()
    score(model)
    drawn, layers = RandomWeights(1), scored_layers(model)
    for index, layer in enumerate(layers.values()):
        shape = tuple(layer.scores.shape)
        layer.draw(drawn.weight(shape, index, 0.01))
        layer.scores.data.copy_(drawn.scores(shape, index) * 1e-3**index)
    masks = choose({name: layer.scores for name, layer in layers.items()}, 0.01, "global")
    for name, layer in layers.items():
        layer.keep(masks[name])
        assert bool(masks[name].any())
    logits = model(torch.randn(4, 3, 16, 16))
    logits.sum().backward()
    assert bool(logits.isfinite().all())
    for layer in layers.values():
        assert layer.scores.grad is not None
        assert bool(layer.scores.grad.isfinite().all())


def test_infinite_scores_do_not_empty_other_layers() -> None:
    infinite = torch.full((8,), math.inf)
    scores = {"a": infinite, "b": torch.ones(4), "c": torch.ones(4)}
    kept = {row.name: row.kept for row in choose(scores, 0.25, "global").table()}
    assert kept == {"a": 2, "b": 1, "c": 1}


def test_counts_by_layer_are_kept() -> None:
    masks = choose({"a": SCORES, "b": SCORES}, {"a": 3, "b": 7})
    assert [row.kept for row in masks.table()] == [3, 7]


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    share=st.floats(0, 1),
    seed=st.integers(0, 100),
)
@settings(max_examples=60)
def test_a_device_chooses_as_the_host_does(sizes: list[int], share: float, seed: int) -> None:
    """Counts, ties, signs of zero: what runs on GPUs gives the masks of `pruning.select`."""
    generator = torch.Generator().manual_seed(seed)
    scores = {
        f"layer{i}": torch.randint(-3, 4, (size, 2), generator=generator) * 0.5
        for i, size in enumerate(sizes)
    }
    counts = {name: math.floor(share * value.numel()) for name, value in scores.items()}
    assert Masks(select_largest_of_each(scores, counts)) == keep_counts(scores, counts)
    count = sum(counts.values())
    assert Masks(select_largest_of_all(scores, count)) == keep_count(scores, count)


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    extra=st.floats(0, 1),
    least=st.integers(1, 4),
    seed=st.integers(0, 100),
)
@settings(max_examples=60)
def test_what_each_layer_keeps_at_least_comes_first(
    sizes: list[int], extra: float, least: int, seed: int
) -> None:
    """As if layers that one threshold leaves too little were taken out of it, until none is."""
    generator = torch.Generator().manual_seed(seed)
    scores = {
        f"layer{i}": torch.randint(0, 4, (size,), generator=generator) * 0.1**i
        for i, size in enumerate(sizes)
    }
    reserves = {name: min(least, len(value)) for name, value in scores.items()}
    size, needed = sum(sizes), sum(reserves.values())
    count = needed + math.floor(extra * (size - needed))
    density = count / size
    reserved: dict[str, torch.Tensor] = {}
    while True:
        free = {name: value for name, value in scores.items() if name not in reserved}
        expected = {**keep_count(free, count - sum(reserves[n] for n in reserved)), **reserved}
        short = [name for name in free if int(expected[name].sum()) < reserves[name]]
        if not short:
            break
        reserved |= {n: keep_count({n: scores[n]}, reserves[n])[n] for n in short}
    if num_kept(density, size) == count:
        assert choose(scores, density, "global", least) == Masks(
            {name: expected[name] for name in scores}
        )


def test_a_weight_that_two_layers_share_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(UserError, match=r"1\.weight is also another layer's weight"):
        score(model)


def test_a_layer_that_stands_in_a_network_twice_is_refused() -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(UserError, match=r"1\.weight is also another layer's weight"):
        score(nn.Sequential(layer, layer))
