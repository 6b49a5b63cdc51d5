"""Benchmarks whose work can be made small: they run, and what they compare is the same work."""

import json

import pytest
import torch
from torch import Tensor

from launch.bench import scores, xnor


def small(_: str) -> dict[str, Tensor]:
    """Scores of two layers."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"conv": (16, 8, 3, 3), "fc": (10, 16)}
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


def test_scores_compares_choices_of_the_same_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fifth of each layer; both ways use the same binary weights, and find the same gradients."""
    monkeypatch.setattr(scores, "scores_of", small)
    scores.bench_scores(as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["differing weights (ties)"] == 0
    assert told["sort / selection"] > 0
    drawn = {name: torch.randn_like(value) for name, value in small("").items()}
    ours, theirs = scores._Ours(small(""), drawn), scores._Biprop(small(""), drawn)
    ours.step()
    theirs.step()
    layers = zip(ours.layers.values(), ours.used, theirs.scores, theirs.used, strict=True)
    for layer, binary, other_scores, other_used in layers:
        torch.testing.assert_close(binary * layer.gain, other_used)
        assert layer.scores.grad is not None
        # of the same number, the gradient of `binary` is that of the weight times the gain
        torch.testing.assert_close(layer.scores.grad * layer.gain, other_scores.grad)


def test_xnor_gives_equal_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And tells the bytes of both: 2 bits a weight against 32, where channels fill whole words."""
    monkeypatch.setattr(xnor, "_ROUNDS", 1)
    monkeypatch.setattr(xnor, "_LAYERS", {"small": ((64, 4),)})
    xnor.bench_xnor(as_json=True)
    told = json.loads(capsys.readouterr().out)["small, 64 x 4 x 4"]
    assert told["equal results"] is True
    assert told["float32 bytes"] == 16 * told["packed bytes"]
