"""`tombola bench imp`: both sides train the same work, parts add up, and products are products."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import train.session
from launch.bench import imp, long_level, spans
from launch.bench.long_level import Parts, Short
from launch.bench.peers import imp as peer_imp
from launch.bench.peers import scores as peer_scores
from launch.bench.peers.loader import PilImages
from launch.bench.peers.sorting import score_by_sorting, sort_mask
from launch.bench.peers.work import Training, shipped
from launch.config import RunConfig
from train.session import Session

SHORT = Short(batch_size=4, num_steps=3, num_evaluated=6, model="cifar_resnet8", size=8)
QUICK = ("--train.total", "3ep", "--stages.imp.rounds", "2")


@pytest.fixture(scope="module")
def sweep() -> RunConfig:
    """Three levels of 57 and twice 37 steps."""
    return shipped("digits-imp", "imp", QUICK)


def test_the_peer_trains_the_same_work(sweep: RunConfig) -> None:
    """As many steps and, within one weight, as many weights at each level; both learn."""
    ours, peer = imp._ours(sweep), imp._peer(sweep)
    assert [steps for _, steps, _ in ours] == [steps for _, steps, _ in peer] == [57, 37, 37]
    for (kept, _, accuracy), (peer_kept, _, peer_accuracy) in zip(ours, peer, strict=True):
        assert abs(kept - peer_kept) <= 1
        assert min(accuracy, peer_accuracy) > 0.8


def test_the_peer_reads_the_same_images(sweep: RunConfig) -> None:
    """PIL and torchvision's transforms come to the tensors that ours hold, within rounding."""
    data = Training.of(sweep).images
    images = PilImages(data.test, data.normalisation)
    found = torch.stack([images[index][0] for index in range(8)])
    torch.testing.assert_close(found, data.normalisation(torch.from_numpy(data.test.images[:8])))
    assert images[3][1] == data.test.labels[3]


def test_the_peer_leaves_pruned_weights_at_zero(sweep: RunConfig, tmp_path: Path) -> None:
    """What each level was evaluated with is zero where its mask is."""
    peer_imp.run_peer(peer_imp.Sweep.of(sweep), tmp_path)
    masks = torch.load(tmp_path / "level_2/mask.pt", weights_only=True)
    end = torch.load(tmp_path / "level_2/end.pt", weights_only=True)
    assert all(not end[name][mask == 0].any() for name, mask in masks.items())


def test_sorted_layers_keep_the_highest_scores() -> None:
    """Of ten, three; what is used has one magnitude, and all scores have a gradient."""
    scores = torch.tensor([0.1, 0.9, 0.3, 0.2, 0.8, 0.4, 0.7, 0.5, 0.6, 0.0])
    assert sort_mask(scores, 0.3).nonzero().flatten().tolist() == [1, 4, 6]
    layer = nn.Linear(5, 2)
    score_by_sorting(nn.ModuleList([layer]), 0.3)
    layer(torch.ones(1, 5)).sum().backward()
    used = layer.weight
    assert used.count_nonzero() == 3
    assert len(used.abs().unique()) == 2
    gradient = layer.scores.grad
    assert isinstance(gradient, torch.Tensor)
    torch.testing.assert_close(gradient, layer.random * layer.scores.detach().sign())


def test_the_scores_of_the_peer_learn(tmp_path: Path) -> None:
    """Two epochs of it tell most digits apart, by weights that are random."""
    training = Training.of(shipped("digits-multiprize", "mpt-1-32", ["--train.total", "2ep"]))
    assert peer_scores.run_peer(training, 0.3, tmp_path) > 0.6


def test_the_parts_of_a_level_are_its_wall_time(sweep: RunConfig) -> None:
    """What is under no name is `other`; afterwards nothing is watched any more."""
    fit, evaluate = train.session.fit, Session.evaluate
    with spans.watched() as levels:
        imp._ours(sweep)
    assert [level.name for level in levels] == ["level-00", "level-01", "level-02"]
    for level in levels:
        assert set(level.parts) == set(spans.SPANS)
        assert sum(level.parts.values()) == pytest.approx(level.seconds, rel=0.01, abs=1e-3)
        assert min(level.parts.values()) > 0
    assert train.session.fit is fit
    assert Session.evaluate is evaluate


def test_time_within_a_span_is_the_inner_ones_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that goes on by one at each reading."""
    ticks = iter(range(100))
    monkeypatch.setattr(spans.time, "perf_counter", lambda: float(next(ticks)))
    watch = spans.Stopwatch()
    with watch.span("outer"):
        with watch.span("inner"), watch.span("outer"):
            pass
    assert dict(watch.seconds) == {"outer": 3.0, "inner": 2.0}


def test_a_long_level_is_the_sum_of_products() -> None:
    """Batch 256: 5,004 steps an epoch; 18 evaluations; a save each ten minutes; fifty steps a
    record."""
    parts = Parts(256, step=0.05, image=0.001, save=0.03, record=0.01, once={"choosing masks": 2.0})
    products = long_level.extrapolated(parts)
    seconds = {product.what: product.seconds for product in products}
    assert seconds == pytest.approx(
        {
            spans.TRAINING: 90 * 5004 * 0.05,
            spans.EVALUATION: 18 * 50_000 * 0.001,
            spans.SAVING: 37 * 0.03,
            spans.RECORDING: (9007 + 18) * 0.01,
            "choosing masks": 2.0,
        }
    )
    beside = 900 + 1.11 + 90.25 + 2
    assert long_level.share_beside_training(products) == pytest.approx(beside / (22_518 + beside))
    told = long_level.told(products)
    assert told[spans.EVALUATION] == "18 x 50,000 images x 1 ms = 15 min = 3.828%"
    assert told["choosing masks"] == "2 s = 0.009%"
    assert told["the level"] == "6.53 h"


def test_parts_are_measured_by_imp_itself() -> None:
    """A step, an image, a save and a record take time; the rest comes once."""
    parts = long_level.measure_parts(SHORT)
    assert min(parts.step, parts.image, parts.save, parts.record) > 0
    assert set(parts.once) == {
        spans.LAST_SAVE,
        spans.CHOOSING,
        spans.SET_UP,
        spans.WRITING,
        spans.OTHER,
    }


def test_bench_imp_tells_the_ratio_and_the_shares(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one JSON document, whatever the runs themselves print."""
    monkeypatch.setattr(imp, "_ROUNDS", 1)
    monkeypatch.setattr(imp, "_LEVELS", 1)
    monkeypatch.setattr(imp, "_OVERRIDES", ("--train.total", "2ep"))
    monkeypatch.setattr(imp, "_SHORT", lambda: SHORT)
    imp.bench_imp(as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["peer / ours"] > 0
    assert told["both trained"]["level 1"].startswith("18 and 18 steps, 53,950 and 53,950 weights")
    assert 0 < told["share beside training, ImageNet"] < 1
    assert set(spans.SPANS) < told["a pruned level of digits"].keys()


@pytest.mark.parametrize(
    ("words", "problem"),
    [(["--levels", "-1"], "'-1': must be 0 or more"), (["--workers", "two"], "'two': must be 0")],
)
def test_the_script_says_what_an_option_must_be(
    words: list[str],
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In one line."""
    monkeypatch.setattr("sys.argv", ["imp", *words])
    with pytest.raises(SystemExit):
        peer_imp.main()
    assert problem in capsys.readouterr().err
