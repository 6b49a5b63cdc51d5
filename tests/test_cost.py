"""What an image costs: counted by hand, dense and without zeros."""

import json
from pathlib import Path

import pytest
import torch
from tiny import TOML, write_config
from torch import nn

from data.errors import UserError
from launch.cli import run_command
from pruning.cost import cost_of
from pruning.masks import Masks, prunable_shapes
from train.models import ModelSpec


def masks_of(spec: ModelSpec, density: float) -> Masks:
    generator = torch.Generator().manual_seed(0)
    shapes = prunable_shapes(spec.build())
    return Masks({n: torch.rand(s, generator=generator) < density for n, s in shapes.items()})


def by_hand(spec: ModelSpec, masks: Masks, image: tuple[int, ...]) -> tuple[int, int]:
    """Two FLOPs for each weight at each place of an output; of the kept weights alone."""
    places: dict[str, int] = {}
    model = spec.build().eval()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):

            def note(layer: nn.Module, inputs: object, output: torch.Tensor, n: str = name) -> None:
                places[f"{n}.weight"] = output[0, 0].numel() if output.dim() == 4 else 1

            layer.register_forward_hook(note)
    model(torch.zeros(1, *image))
    dense = sum(2 * mask.numel() * places[name] for name, mask in masks.items())
    return dense, sum(2 * int(mask.sum()) * places[name] for name, mask in masks.items())


@pytest.mark.parametrize(
    ("spec", "image"),
    [
        (ModelSpec("cifar_resnet8", 10, 1, {"width": 4}), (1, 8, 8)),
        (ModelSpec("mlp", 10, 1, {"side": 8}), (1, 8, 8)),
        (ModelSpec("test_resnet", 7, 3), (3, 64, 64)),
    ],
    ids=lambda value: value.name if isinstance(value, ModelSpec) else "",
)
def test_flops_are_those_of_kept_weights(spec: ModelSpec, image: tuple[int, ...]) -> None:
    masks = masks_of(spec, 0.1)
    cost = cost_of(spec, masks, image)
    assert (cost.flops, cost.sparse_flops) == by_hand(spec, masks, image)
    size = sum(p.numel() for p in spec.build().parameters())
    assert (cost.parameters, cost.bytes) == (size, 4 * size)
    assert cost.kept_parameters == size - masks.size + masks.kept
    assert cost_of(spec, masks_of(spec, 1.1), image).sparse_flops == cost.flops


def test_coefficients_skip_nothing() -> None:
    spec = ModelSpec("cifar_resnet8", 10, 1, {"width": 4, "basis": "dct"})
    cost = cost_of(spec, masks_of(spec, 0.1), (1, 8, 8))
    plain = cost_of(spec.plain, masks_of(spec.plain, 0.1), (1, 8, 8))
    assert cost.sparse_flops == cost.flops == plain.flops


def test_images_that_do_not_fit_are_one_line() -> None:
    spec = ModelSpec("cifar_resnet8", 10, 1)
    with pytest.raises(UserError, match="cifar_resnet8 does not take images of 3x8x8") as caught:
        cost_of(spec, masks_of(spec, 1.1), (3, 8, 8))
    assert "\n" not in str(caught.value)


def test_a_ticket_is_shown_with_its_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For images of the size that it was trained on."""
    words = ["run", write_config(tmp_path, TOML), "--root", str(tmp_path)]
    assert run_command([*words, "--stages.imp.rounds", "1"]) == 0
    capsys.readouterr()
    place = str(tmp_path / "tiny/imp/level-01")
    assert run_command(["tickets", "show", place, "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)["cost"]
    assert cost["image"] == [1, 8, 8]
    assert 0 < cost["sparse_flops"] < cost["flops"]
    assert run_command(["tickets", "show", place]) == 0
    shown = capsys.readouterr().out
    assert f"{cost['flops']:,} FLOPs dense, {cost['sparse_flops']:,} without zeros" in shown
