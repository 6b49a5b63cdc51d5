"""Channels: which there are, how they rank, and which weights go with them."""

import copy
import io
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from data.errors import RunError, UserError
from data.files import Folder
from pruning.channels import Channels, count_channels, keep_channels, scaled_layers
from pruning.elastic import DepthChange, transform
from pruning.exporting import Subnetwork, export
from pruning.importing import _fitting_masks, split_pruned
from pruning.mask_store import write_masks
from pruning.masks import Masks, maskable
from pruning.objects import Objects
from pruning.overlap import overlaps, total
from pruning.synflow import synflow
from pruning.tickets import Ticket
from pruning.weight_store import write_weights
from train.models import ModelSpec
from train.stages import stages

SMALL = ModelSpec("cifar_resnet8", 10, 1, {"width": 4})
SHAPE = (1, 8, 8)


def chain() -> nn.Module:
    """Two convolutions with 2 and 3 channels, a third without a normalisation, and a classifier."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.Conv2d(2, 3, 1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 2, 1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )


def bits(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)


def random_scores(channels: Channels, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) for name, shape in channels.shapes.items()}


# ---- which channels there are


def test_a_normalisation_scales_the_convolution_right_before_it() -> None:
    """Of the CIFAR ResNets, shortcuts included, of timm's, and of a VGG's units."""
    assert scaled_layers(SMALL.outline()) == {
        "conv1.weight": "norm1.weight",
        "stages.0.0.conv1.weight": "stages.0.0.norm1.weight",
        "stages.0.0.conv2.weight": "stages.0.0.norm2.weight",
        "stages.1.0.conv1.weight": "stages.1.0.norm1.weight",
        "stages.1.0.conv2.weight": "stages.1.0.norm2.weight",
        "stages.1.0.shortcut.0.weight": "stages.1.0.shortcut.1.weight",
        "stages.2.0.conv1.weight": "stages.2.0.norm1.weight",
        "stages.2.0.conv2.weight": "stages.2.0.norm2.weight",
        "stages.2.0.shortcut.0.weight": "stages.2.0.shortcut.1.weight",
    }
    timm = scaled_layers(ModelSpec("resnet50", 10, 3).outline())
    assert len(timm) == 53
    assert timm["conv1.weight"] == "bn1.weight"
    assert timm["layer1.0.conv3.weight"] == "layer1.0.bn3.weight"
    assert timm["layer2.0.downsample.0.weight"] == "layer2.0.downsample.1.weight"
    vgg = scaled_layers(ModelSpec("cifar_vgg16", 10, 3).outline())
    assert len(vgg) == 13
    assert vgg["stages.0.1.0.weight"] == "stages.0.1.1.weight"


def test_in_a_preactivated_block_only_what_scales_one_convolution_counts() -> None:
    """Of `resnetv2_50` the first normalisation of a block scales a sum of several."""
    found = scaled_layers(ModelSpec("resnetv2_50", 10, 3).outline())
    assert found["stages.0.blocks.1.conv1.weight"] == "stages.0.blocks.1.norm2.weight"
    assert not [name for name in found if "conv3" in name or "downsample" in name]
    assert not [name for name in found.values() if name.endswith("norm1.weight")]


def test_what_is_not_right_after_a_convolution_does_not_scale_it() -> None:
    """Another number of channels, something between, or no scale at all."""
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False)),
        nn.Sequential(nn.Conv2d(4, 8, 1), nn.PixelShuffle(2), nn.BatchNorm2d(2)),
        nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)),
    )
    assert scaled_layers(model) == {"3.0.weight": "3.1.weight"}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (ModelSpec("cifar_resnet8", 10, 1, {"norm": "group"}), "norm1 is a GroupNorm"),
        (ModelSpec("convnext_atto", 10, 3), "is a LayerNorm"),
        (ModelSpec("cifar_resnet8", 10, 1, {"activation": "sign"}), "choose another model.act"),
        (ModelSpec("vgg11", 10, 3), "no convolution is followed by a batch normalisation"),
    ],
)
def test_networks_without_channels_to_rank_are_refused(spec: ModelSpec, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        scaled_layers(spec.outline())


# ---- how they rank


SCORES = {"a": torch.tensor([5.0, 7.0, 6.0]), "b": torch.tensor([0.1, 0.3]), "c": torch.ones(2)}


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (3, {"a": [1], "b": [1], "c": [0]}),  # the best of each layer, of equal ones the first
        (4, {"a": [1, 2], "b": [1], "c": [0]}),
        (5, {"a": [0, 1, 2], "b": [1], "c": [0]}),
        (6, {"a": [0, 1, 2], "b": [1], "c": [0, 1]}),
        (7, {"a": [0, 1, 2], "b": [0, 1], "c": [0, 1]}),
    ],
)
def test_the_largest_are_kept_and_of_each_layer_the_best(
    count: int, expected: dict[str, list[int]]
) -> None:
    kept = keep_channels(SCORES, count)
    assert {name: mask.nonzero().flatten().tolist() for name, mask in kept.items()} == expected


def test_ties_are_kept_in_layer_order() -> None:
    equal = {"a": torch.ones(3), "b": torch.ones(3)}
    kept = keep_channels(equal, 4)
    assert [mask.tolist() for mask in kept.values()] == [[True] * 3, [True, False, False]]


def test_counts_are_exact_and_masks_nested() -> None:
    """Of 84 channels in 9 layers, whatever their scores are."""
    channels = Channels(SMALL.build(), SHAPE)
    assert channels.num_channels == 84
    scores = random_scores(channels)
    masks = [keep_channels(scores, count) for count in range(9, 85)]
    assert [kept.kept for kept in masks] == list(range(9, 85))
    assert all(fewer & more == fewer for fewer, more in pairwise(masks))


def test_too_few_channels_and_bad_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot keep 2 channels in 3 layers"):
        keep_channels(SCORES, 2)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="b is not finite"):
            keep_channels({**SCORES, "b": torch.tensor([0.1, bad])}, 5)
    assert count_channels(0.5, 84, 9) == 42
    assert count_channels(0.107, 84, 9) == 9  # 8.99
    with pytest.raises(UserError, match="keeps 8 of 84 channels, which is less than one in each"):
        count_channels(0.1, 84, 9)


def test_scores_are_the_sizes_of_the_scales() -> None:
    channels, model = Channels(chain(), (1, 4, 4)), chain()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([-0.5, 0.25]))  # type: ignore[operator]
    scores = channels.scores(dict(model.named_parameters()))
    assert {name: score.tolist() for name, score in scores.items()} == {
        "1.weight": [0.5, 0.25],
        "4.weight": [1.0, 1.0, 1.0],
    }


# ---- what goes with them


def test_with_a_channel_go_its_filter_its_normalisation_and_what_reads_it() -> None:
    """By hand: the second of 2 and the first of 3 go; a linear layer reads 4 pixels a channel of
    the last convolution, none of which goes."""
    kept = Masks({"1.weight": bits(1, 0), "4.weight": bits(0, 1, 1)})
    masks = Channels(chain(), (1, 4, 4)).masks(kept)
    assert list(masks) == [
        *("0.weight", "1.weight", "1.bias", "3.weight", "4.weight", "4.bias"),
        *("6.weight", "8.weight"),
    ]
    assert torch.equal(masks["0.weight"], bits(1, 0).view(2, 1, 1, 1).expand(2, 1, 3, 3))
    assert masks["1.weight"].tolist() == masks["1.bias"].tolist() == [True, False]
    assert masks["3.weight"].flatten(1).tolist() == [[False] * 2, [True, False], [True, False]]
    assert masks["4.weight"].tolist() == masks["4.bias"].tolist() == [False, True, True]
    assert masks["6.weight"].flatten(1).tolist() == [[False, True, True]] * 2
    assert bool(masks["8.weight"].all())
    assert (masks.kept, masks.size) == (9 + 2 + 2 + 4 + 4 + 16, 18 + 4 + 6 + 6 + 6 + 16)


def test_a_linear_layer_does_not_read_the_pixels_of_a_channel_that_is_gone() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)
    )
    masks = Channels(model, (1, 2, 2)).masks(Masks({"1.weight": bits(0, 1)}))
    assert masks["4.weight"].tolist() == [[False] * 4 + [True] * 4] * 2


def test_groups_read_their_own_channels() -> None:
    """Two groups of two channels; of a depth-wise convolution each reads one."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 1),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 1, groups=2),
        nn.Conv2d(4, 4, 1, groups=4, bias=False),
        nn.Flatten(),
        nn.Linear(4, 1),
    )
    masks = Channels(model, (1, 1, 1)).masks(Masks({"1.weight": bits(1, 0, 0, 0)}))
    assert masks["2.weight"].flatten(1).tolist() == [[True, False]] * 2 + [[False, False]] * 2
    assert bool(masks["3.weight"].all())  # a bias keeps what reads nothing from zero


def test_a_sum_is_zero_only_where_all_of_its_terms_are() -> None:
    """The first stage of a ResNet-8 adds the block's channels to the stem's: what the next block
    reads is any that one of the two has."""
    channels = Channels(SMALL.build(), SHAPE)
    kept = dict(keep_channels(random_scores(channels), 84))
    kept["norm1.weight"], kept["stages.0.0.norm2.weight"] = bits(1, 0, 0, 1), bits(0, 1, 0, 1)
    masks = channels.masks(Masks(kept))
    reads = masks["stages.0.0.conv1.weight"][0, :, 0, 0]
    assert reads.tolist() == [True, False, False, True]
    for layer in ("conv1", "shortcut.0"):
        reads = masks[f"stages.1.0.{layer}.weight"][0, :, 0, 0]
        assert reads.tolist() == [True, True, False, True]


@pytest.mark.parametrize("seed", range(3))
def test_what_goes_is_what_no_path_crosses(seed: int) -> None:
    """Against SynFlow's scores of the network that lacks the channels: zero where no path from the
    image to the classes passes."""
    channels = Channels(SMALL.build(), SHAPE)
    kept = channels.keep(random_scores(channels, seed), 0.3, "channels")
    masks, model = channels.masks(kept), SMALL.build(seed)
    without_channels(model, channels, kept)
    for name, score in synflow(model, image_shape=SHAPE).items():
        assert torch.equal(score != 0, masks[name]), name


def without_channels(model: nn.Module, channels: Channels, kept: Masks) -> None:
    """Only the filters, scales and shifts of channels that are not kept are zero."""
    named = dict(model.named_parameters())
    with torch.no_grad():
        for layer, scale in channels.layers.items():
            for name in (layer, scale, scale.replace("weight", "bias")):
                mask = kept[scale]
                named[name].mul_(mask.view(-1, *[1] * (named[name].ndim - 1)))


@pytest.mark.parametrize("name", ["cifar_resnet8", "cifar_vgg_small", "mobilenetv3_small_050"])
def test_the_network_computes_the_same_without_what_goes(name: str) -> None:
    """In training and evaluation, with any statistics: outputs are those of the channels alone."""
    spec = ModelSpec(name, 10, 1, {} if "mobile" in name else {"width": 4})
    channels = Channels(spec.build(), (1, 32, 32))
    kept = channels.keep(random_scores(channels), 0.4, "channels")
    reference = spec.build(1)
    generator = torch.Generator().manual_seed(2)
    for tensor in (*reference.parameters(), *reference.buffers()):
        if tensor.ndim == 1:
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    whole = copy.deepcopy(reference)
    without_channels(reference, channels, kept)
    channels.masks(kept).project_(whole)
    images = torch.randn(4, 1, 32, 32, generator=generator)
    for train in (False, True):
        expected, found = (model.train(train)(images) for model in (reference, whole))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_density_of_weights_takes_the_most_channels_that_are_no_denser() -> None:
    """Against every other count; the norms' scales and shifts are among the weights."""
    channels = Channels(SMALL.build(), SHAPE)
    scores = random_scores(channels)
    densities = {n: channels.masks(keep_channels(scores, n)).density for n in range(9, 85)}
    for density in (0.05, 0.1, 0.31, 0.9, 1.0):
        kept = channels.keep(scores, density, "weights").kept
        assert kept == max(n for n, found in densities.items() if found <= density)
    least = densities[9]
    with pytest.raises(UserError, match="one channel in each of 9 layers takes") as refusal:
        channels.keep(scores, least * 0.99, "weights")
    advised = float(str(refusal.value).rpartition(" ")[2])
    assert channels.keep(scores, advised, "weights").kept == 9


def test_the_fraction_of_channels_is_exact() -> None:
    channels = Channels(SMALL.build(), SHAPE)
    scores = random_scores(channels)
    assert [channels.keep(scores, d, "channels").kept for d in (0.11, 0.5, 1.0)] == [9, 42, 84]
    assert channels.masks(channels.keep(scores, 1.0, "channels")).density == 1.0


def test_a_channel_that_is_gone_is_exactly_zero_for_every_image() -> None:
    """Behind its normalisation, whatever the statistics are; all others are not."""
    channels, model = Channels(SMALL.build(), SHAPE), SMALL.build(1)
    kept = channels.keep(random_scores(channels), 0.3, "channels")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, 1, 2)  # type: ignore[arg-type]
            nn.init.uniform_(module.bias, 0.5, 1)
    channels.masks(kept).project_(model)
    seen = 0
    for train in (False, True):
        for scale, mask in kept.items():
            out: list[Tensor] = []
            norm = model.get_submodule(scale.removesuffix(".weight"))
            hook = norm.register_forward_hook(lambda *call, out=out: out.append(call[2]))
            model.train(train)(torch.randn(4, *SHAPE))
            hook.remove()
            assert torch.equal(out[0].ne(0).sum((0, 2, 3)) > 0, mask), scale
            seen += 1
    assert seen == 18


# ---- who reads the masks of a ticket


@pytest.fixture(scope="module")
def ticket(tmp_path_factory: pytest.TempPathFactory) -> Ticket:
    """A ticket of channels, with weights."""
    channels, model = Channels(SMALL.build(), SHAPE), SMALL.build(1)
    masks = channels.masks(channels.keep(random_scores(channels), 0.5, "channels"))
    return ticket_of(masks, model, tmp_path_factory.mktemp("objects"))


def ticket_of(masks: Masks, model: nn.Module, folder: Path) -> Ticket:
    objects = Objects(Folder(folder))
    return Ticket(
        method="earlybird",
        level=0,
        model=SMALL,
        step=3,
        stored_masks=write_masks(objects, masks),
        stored_weights=write_weights(objects, dict(model.state_dict())),
        objects=objects,
    )


def test_a_ticket_of_channels_builds_its_network(ticket: Ticket) -> None:
    model = ticket.build_model()
    for name, mask in ticket.masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask & (model.get_parameter(name) != 0))
        assert not model.get_parameter(name)[~mask].any()
    assert ticket.density == ticket.masks.density < 0.5


def test_masks_of_other_parameters_are_refused(tmp_path: Path) -> None:
    """Of a linear layer's bias, or of a scale of another shape."""
    model = SMALL.build()
    for name, size in (("fc.bias", 10), ("norm1.weight", 5)):
        masks = Masks({name: torch.ones(size, dtype=torch.bool)})
        with pytest.raises(RunError, match=rf"no weights {name} of \({size},\) in its model"):
            ticket_of(masks, model, tmp_path).require_fit()


def test_torch_prunes_channels_alike_and_they_come_back(ticket: Ticket) -> None:
    """Exported for torch.nn.utils.prune and imported, masks and weights are the same."""
    content = export(Subnetwork.at_start(ticket), "pruning")
    state = torch.load(io.BytesIO(content), weights_only=True)
    masks, weights = split_pruned(state, "file")
    assert "norm1.bias_orig" in state
    network = SMALL.build()
    assert _fitting_masks(masks, network, "file", complete=False) == ticket.masks
    network.load_state_dict(weights)
    ticket.masks.project_(network)
    images = torch.randn(2, *SHAPE)
    expected = ticket.build_model().eval()(images)
    assert torch.equal(network.eval()(images), expected)


def test_a_network_of_another_depth_takes_the_channels_along() -> None:
    """Elastic tickets copy the masks of normalisations as those of weights."""
    deeper = ModelSpec("cifar_resnet14", 10, 1, {"width": 4})
    channels = Channels(deeper.build(), SHAPE)
    masks = channels.masks(channels.keep(random_scores(channels), 0.5, "channels"))
    change = DepthChange.between(stages(deeper.outline()), stages(SMALL.outline()))
    squeezed = transform(masks, change, maskable(SMALL.outline()))
    assert torch.equal(squeezed["stages.1.0.norm2.bias"], masks["stages.1.0.norm2.bias"])
    assert not squeezed["stages.1.0.norm2.bias"].all()


def test_the_overlap_of_tickets_counts_normalisations(ticket: Ticket) -> None:
    rows = overlaps(ticket.masks, ticket.masks)
    assert "stages.2.0.norm1.bias" in [row.name for row in rows]
    assert total(rows).common == ticket.masks.kept
