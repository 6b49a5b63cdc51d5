"""The file of a multi-prize ticket: what is written comes back bit for bit, and is as small."""

import hashlib
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from binary import (
    IMAGES,
    SIGN,
    SPEC,
    assert_same_prize,
    changed,
    content_of,
    logits,
    make_prize,
    opened,
    problem_of,
)
from torch import Tensor, nn

from data.errors import RunError, UserError
from data.files import Folder
from pruning import mpt
from pruning.check_images import check_images, check_logits
from pruning.importing import store_prize
from pruning.mpt import MptFile, from_bytes
from pruning.multiprize import GainLayer
from pruning.packed import num_packed, packed_model
from pruning.prizes import Prize
from pruning.tickets import Ticket
from train.models import ModelSpec

TIMM = ModelSpec("test_resnet", 7, 3)
SEEDED, EXPLICIT = "seed", "signs"
FORMS = pytest.mark.parametrize("explicit", [False, True], ids=[SEEDED, EXPLICIT])


# The round trip --------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("spec", [SPEC, SIGN, TIMM], ids=["cifar", "sign", "timm"])
def test_a_network_comes_back_bit_for_bit(spec: ModelSpec, explicit: bool) -> None:
    """Masks, signs, gains and all else, and so its logits; and nothing more stands in the file."""
    prize = make_prize(spec, explicit=explicit)
    file = MptFile.of(prize, IMAGES)
    read = from_bytes(mpt.to_bytes(file))
    assert_same_prize(read.prize, prize)
    assert torch.equal(read.logits, file.logits)
    assert (read.image_shape, read.preprocessing, read.about) == (IMAGES, {}, {})
    images = torch.randn(3, *IMAGES)
    found, expected = read.prize.build_model(), prize.build_model()
    assert torch.equal(logits(found, images), logits(expected, images))
    _, tensors = opened(mpt.to_bytes(file))
    kinds = {name.partition("/")[0] for name in tensors}
    assert kinds == {"mask", "rest", "logits"} | ({"signs"} if explicit else set())


@pytest.mark.parametrize("density", [0.001, 0.05, 0.5, 1.0])
@FORMS
def test_every_density_comes_back(density: float, explicit: bool) -> None:
    """From one weight a layer to all of them."""
    prize = make_prize(density=density, explicit=explicit)
    assert min(layer.kept for layer in prize.layers.values()) >= 1
    assert_same_prize(from_bytes(content_of(prize)).prize, prize)


def test_what_is_told_beside_the_network_comes_back() -> None:
    """Preprocessing and origin; what is no number is none."""
    told: dict[str, Any] = {
        "preprocessing": {"image_shape": [3, 16, 16], "mean": [0.5], "std": [0.1], "resize": None},
        "about": {"ticket": "ab" * 32, "metrics": {"test": {"accuracy": 0.5, "loss": math.inf}}},
    }
    read = from_bytes(content_of(make_prize(), **told))
    assert read.preprocessing == told["preprocessing"]
    assert read.about["metrics"] == {"test": {"accuracy": 0.5, "loss": None}}


CODE = """
import hashlib
from binary import content_of, make_prize
print(hashlib.sha256(content_of(make_prize())).hexdigest())
"""


def test_equal_networks_have_equal_files() -> None:
    """... written twice, in another process, and again after reading."""
    content = content_of(make_prize())
    for _ in range(8):
        assert content_of(make_prize()) == content
    assert mpt.to_bytes(from_bytes(content)) == content
    folder = Path(__file__).parent
    told = subprocess.run(
        [sys.executable, "-c", CODE],
        check=True,
        capture_output=True,
        text=True,
        cwd=folder.parent,
        env={"PYTHONPATH": f"{folder}:{folder.parent}", "OMP_NUM_THREADS": "1"},
    )
    assert told.stdout.strip() == hashlib.sha256(content).hexdigest()


def test_the_file_of_a_resnet_18_is_near_the_entropy_of_its_masks() -> None:
    """20 % kept: within 3 % of n H(k) / 8 and the bytes of all other tensors; see the method."""
    prize = make_prize(ModelSpec("cifar_resnet18", 10, 3), density=0.2, init="signed_constant")
    content = content_of(prize)
    sizes = [layer.mask.numel() for layer in prize.layers.values()]
    entropy = -(0.2 * math.log2(0.2) + 0.8 * math.log2(0.8))
    rest = sum(value.nbytes for value in prize.rest.values())
    expected = sum(sizes) * entropy / 8 + rest
    assert 0.97 * expected < len(content) < 1.03 * expected
    assert 40 * len(content) < 4 * sum(sizes) + rest
    assert_same_prize(from_bytes(content).prize, prize)


def test_signs_are_drawn_again_from_the_seed_alone() -> None:
    """Two networks that differ in the seed have files that differ, and no signs in them."""
    first, second = (opened(content_of(make_prize(seed=seed)))[0] for seed in (7, 8))
    assert (first["seed"], second["seed"]) == (7, 8)
    pairs = zip(first["layers"], second["layers"], strict=True)
    assert all(one["signs"] != other["signs"] for one, other in pairs)


# What is computed ------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("spec", [SPEC, TIMM], ids=["cifar", "timm"])
def test_gains_come_after_layers_that_are_exactly_binary(spec: ModelSpec, explicit: bool) -> None:
    """The layer itself has weights -1, 0 and +1; what follows is one multiplication."""
    prize = make_prize(spec, explicit=explicit)
    model = prize.build_model()
    layers = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, GainLayer)}
    assert layers.keys() == prize.layers.keys()
    for name, layer in layers.items():
        weight = layer.weight
        assert weight.dtype == torch.float32
        assert set(weight.unique().tolist()) <= {-1.0, 0.0, 1.0}
        assert torch.equal(weight != 0, prize.layers[name].mask)
    name, layer = next(iter(layers.items()))
    assert isinstance(layer, nn.Conv2d)
    images = torch.randn(2, *IMAGES)
    plain = nn.functional.conv2d(
        images, prize.layers[name].binary, None, layer.stride, layer.padding
    )
    assert torch.equal(layer(images), plain * torch.tensor(prize.layers[name].gain))


@FORMS
@pytest.mark.parametrize("spec", [SPEC, TIMM], ids=["cifar", "timm"])
def test_the_tickets_plain_network_is_equal_but_for_rounding(
    spec: ModelSpec, explicit: bool, tmp_path: Path
) -> None:
    """... with gain * sign * mask for weights, as other tools take it."""
    prize = make_prize(spec, explicit=explicit)
    ticket = Ticket.load(store_prize(prize, str(tmp_path), {}))
    assert_same_prize(Prize.of(ticket), prize)
    plain = ticket.build_model()
    for name, layer in prize.layers.items():
        assert torch.equal(plain.state_dict()[name], layer.binary * torch.tensor(layer.gain))
    images = torch.randn(4, *IMAGES)
    expected = logits(prize.build_model(), images)
    torch.testing.assert_close(logits(plain, images), expected, rtol=1e-4, atol=1e-5)


def test_the_check_images_are_those_of_the_format() -> None:
    """Between -1 and 1, multiples of 2^-23, by known values: not another release's or machine's."""
    images = check_images(IMAGES)
    assert images.shape == (2, *IMAGES)
    assert images.dtype == torch.float32
    assert -1 <= images.min() < -0.99 < 0.99 < images.max() < 1
    assert torch.equal(images * 2**23, (images * 2**23).round())
    content = images.numpy().tobytes()
    assert hashlib.sha256(content).hexdigest() == CHECK_IMAGES


CHECK_IMAGES = "da80d7590a3fcc5800935124a7f5748fb84286a115b5d299ad9a3679cefb749c"


def test_the_logits_hardly_depend_on_the_order_of_sums() -> None:
    """Computed in float64: channels in another order in memory give the same float32."""
    file = MptFile.of(make_prize(), IMAGES)
    model: nn.Module = file.prize.build_model().to(memory_format=torch.channels_last)
    found = check_logits(model, IMAGES)
    assert torch.allclose(found, file.logits, rtol=1e-6, atol=0)


def test_other_logits_by_rounding_alone_are_accepted() -> None:
    """As another machine may give them: bit for bit, but for rounding, or refused."""
    file = MptFile.of(make_prize(), IMAGES)
    assert mpt.compare_logits(file)
    largest = file.logits.abs().max()
    file.logits[0, 0] += 0.9e-4 * largest
    assert not mpt.compare_logits(file)
    file.logits[0, 0] += 0.2e-4 * largest
    with pytest.raises(RunError, match="other logits than the file tells, by up to"):
        mpt.compare_logits(file)


@pytest.mark.parametrize(
    ("spec", "num_real"),
    [(SIGN, 2), (ModelSpec("cifar_vgg_small", 10, 3, {"width": 4, "activation": "sign"}), 1)],
    ids=["resnet", "vgg"],
)
def test_a_network_of_binary_activations_runs_as_bits(spec: ModelSpec, num_real: int) -> None:
    """All layers but the first and a last one whose input is averaged; to the last bit."""
    file = MptFile.of(make_prize(spec), IMAGES)
    packed = packed_model(file.prize, check_images(IMAGES))
    assert num_packed(packed) == len(file.prize.layers) - num_real
    mpt.compare_packed(file)


def test_a_network_of_real_activations_does_not_run_as_bits() -> None:
    with pytest.raises(UserError, match="no layer of this network reads signs alone"):
        mpt.compare_packed(MptFile.of(make_prize(), IMAGES))


def test_a_wrong_layer_of_bits_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the packed network differs in one gain, it is told."""
    file = MptFile.of(make_prize(SIGN), IMAGES)

    def differing(prize: Prize, images: Tensor) -> nn.Module:
        model = packed_model(prize, images)
        model.get_submodule("conv1").get_buffer("gain").mul_(-1)
        return model

    monkeypatch.setattr(mpt, "packed_model", differing)
    with pytest.raises(RunError, match="other logits when it runs as bits"):
        mpt.compare_packed(file)


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ((3, 0, 16), "images of shape"),
        ((1, 16, 16), "not of 3 channels"),
        ((3, 16), "images of shape"),
        ((3, 1 << 20, 1 << 20), "larger than"),
    ],
)
def test_impossible_images_are_refused(shape: tuple[int, ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        MptFile.of(make_prize(), shape)


def test_images_that_the_network_does_not_take_are_refused() -> None:
    """A transformer is for one size."""
    prize = make_prize(ModelSpec("test_vit", 5, 3))
    with pytest.raises(RunError, match="does not take images of 3x50x50: "):
        MptFile.of(prize, (3, 50, 50))


# Reading ---------------------------------------------------------------------------------


def test_a_file_is_read_from_a_path_and_from_an_object_store(tmp_path: Path) -> None:
    content, prize = content_of(make_prize()), make_prize()
    for url in (str(tmp_path), "memory://files"):
        Folder(url).write("x.mpt", content)
        assert_same_prize(mpt.read(f"{url}/x.mpt").prize, prize)
        assert problem_of(f"{url}/x.mpt") is None


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    for place in (tmp_path / "x.mpt", tmp_path):
        with pytest.raises(UserError, match="no such file"):
            mpt.read(str(place))
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be read: Not a directory"):
        mpt.read(str(tmp_path / "file/x.mpt"))


def test_logits_of_another_network_are_told(tmp_path: Path) -> None:
    """A file that is whole, but was made for another network: the problem names the file."""

    def change(body: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors["logits"] = tensors["logits"] + 1
        body["logits"] = mpt._digest_of({"logits": tensors["logits"]})

    path = tmp_path / "x.mpt"
    path.write_bytes(changed(content_of(make_prize()), change))
    assert mpt.read(str(path)).prize.density < 1
    problem = problem_of(str(path))
    assert problem is not None
    assert problem.startswith(f"{path}: its network gives other logits than the file tells, by up")
