"""Dual tickets as stages of whole runs: made, resumed, refused, on one rank and on two."""

from pathlib import Path
from typing import Any

import pytest
import torch
from family import (
    Mistake,
    assert_goes_on_with_two_ranks,
    assert_refused,
    assert_refused_by_data,
    run,
)
from killing import KILLED, killed_run
from processes import run_ranks, tombola
from tiny import TOML, assert_same_run, facts, final_states, ticket_facts, write_config
from torch import Tensor

from data.order import stream_seed
from launch.config import read_config
from pruning.dual import Going, num_pruned
from pruning.masks import Masks
from pruning.tickets import Ticket
from train.models import ModelSpec
from train.safe_dcp import read_tensors

BASE = TOML[: TOML.index("[[stages]]")].replace("3ep", "2ep")
"""two epochs of 13 steps"""
DUAL = """
[[stages]]
name = "dual"
recipe = "dual"
density = [0.2, 0.5]
controls = ["random", "budget"]
transform.ramp = "8it"
transform.stabilise = "12it"
transform.interval = "2it"
transform.lr = 0.05
"""
CYCLES = """
[[stages]]
name = "dual"
recipe = "dual"
density = 0.1
exclude = ["fc"]
transform.cycles = 3
transform.ramp = "4it"
transform.stabilise = "3it"
transform.lr = 0.05
"""
EVERY = ("--checkpoint.every", "1it", "--checkpoint.keep", "99")


def states(run: Path, level: str) -> dict[int, dict[str, Tensor]]:
    """All checkpoints of a phase by their steps."""
    found = sorted((run / f"dual/{level}/checkpoints").glob("step-*"))
    return {int(one.name[5:]): read_tensors(str(one), is_local=True) for one in found}


def model_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("model/"): v for k, v in state.items() if k.startswith("model/")}


def trained(run: Path, level: str) -> dict[int, dict[str, Any]]:
    return {f["step"]: f for f in facts(run) if f["event"] == "train" and f["level"] == level}


# ---- what a stage makes


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two densities with both controls, every checkpoint kept."""
    return run(tmp_path_factory.mktemp("dual"), BASE + DUAL, *EVERY, "--log.every", "1")


def test_each_layer_loses_its_number(finished: Path) -> None:
    """min(ceil(r n), n - 1), the densest level first; what goes there goes at the next, too."""
    tickets = [Ticket.load(finished / f"dual/level-0{level}") for level in (0, 1)]
    for ticket, density in zip(tickets, (0.5, 0.2), strict=True):
        assert (ticket.method, ticket.step, ticket.parent) == ("dual", 0, None)
        for row in ticket.masks.table():
            assert row.size - row.kept == num_pruned(density, row.size), row.name
    assert tickets[0].masks & tickets[1].masks == tickets[1].masks


def test_the_transformation_is_a_dense_training_of_its_own(finished: Path) -> None:
    """On its own constant rate, its lambda in the metrics, all weights there until its end."""
    told = trained(finished, "level-01-transform")
    expected = [step / 4 for step in (1, 1, 2, 2, 3, 3, 4, 4)] + [1.0] * 12
    assert [told[step]["lambda"] for step in range(1, 21)] == expected
    assert {fact["lr"] for fact in told.values()} == {0.05}
    assert {fact["density"] for fact in told.values()} == {1.0}
    assert told[20]["going_norm"] < told[1]["going_norm"] / 2
    weights = model_of(states(finished, "level-01-transform")[20])
    masks = Ticket.load(finished / "dual/level-01").masks
    assert all(bool(weights[name][~mask].all()) for name, mask in masks.items())


def test_what_went_stays_zero_after_every_later_step(finished: Path) -> None:
    """Weights and momentum, in the ticket's training and in those of its controls."""
    checked = 0
    for level in ("level-00", "level-01", "level-01-random", "level-01-budget"):
        masks = Ticket.load(finished / f"dual/{level}").masks
        for state in states(finished, level).values():
            for name, mask in masks.items():
                assert not state[f"model/{name}"][~mask].any()
                assert not state[f"optimizer/state/{name}/momentum_buffer"][~mask].any()
            checked += 1
    assert checked == 3 * 26 + 46


def test_a_ticket_starts_where_its_transformation_ended(finished: Path) -> None:
    """What stays and the statistics as they were, what goes zero; the optimizer is fresh."""
    end = model_of(states(finished, "level-01-transform")[20])
    ticket = Ticket.load(finished / "dual/level-01")
    start = ticket.weights()
    assert start.keys() == end.keys()
    for name, value in end.items():
        expected = value * ticket.masks[name] if name in ticket.masks else value
        assert torch.equal(start[name], expected)
    assert start["norm1.running_mean"].any()
    first = states(finished, "level-01")[1]
    for name, mask in ticket.masks.items():
        momentum = first[f"optimizer/state/{name}/momentum_buffer"]  # the first gradient alone
        torch.testing.assert_close(
            first[f"model/{name}"], (start[name] - 0.1 * momentum) * mask, rtol=0, atol=1e-7
        )


def test_controls_have_the_masks_and_the_initial_weights(finished: Path) -> None:
    """random trains as long as the ticket after its transformation, budget as long in all."""
    ticket = Ticket.load(finished / "dual/level-01")
    controls = [Ticket.load(finished / f"dual/level-01-{name}") for name in ("random", "budget")]
    for control in controls:
        assert control.masks == ticket.masks
        assert control.parent == ticket.id
        assert not control.weights()["norm1.running_mean"].any()
    assert controls[0].weights_digest == controls[1].weights_digest != ticket.weights_digest
    assert [one.total_steps for one in (ticket, *controls)] == [46, 26, 46]
    assert (ticket.timing["search_steps"], controls[1].timing["search_steps"]) == (20, 0)


def test_the_matched_budget_stretches_the_schedule(finished: Path) -> None:
    """At each of its steps the rate of the training's step that is as far from the end."""
    usual, longer = trained(finished, "level-00-random"), trained(finished, "level-00-budget")
    rates = [usual[step]["lr"] for step in range(1, 27)]
    assert [longer[step]["lr"] for step in range(1, 47)] == [rates[s * 26 // 46] for s in range(46)]


def test_the_ticket_tells_what_the_removal_cost(finished: Path) -> None:
    """The accuracy just before is the transformation's last; just after, the training's step 0."""
    measured = {
        (f["level"], f["step"], f["split"]): f["accuracy"]
        for f in facts(finished)
        if f["event"] == "evaluation"
    }
    metrics = Ticket.load(finished / "dual/level-01").metrics
    for split in ("validation", "test"):
        before = metrics[split]["accuracy_before_removal"]
        assert before == measured["level-01-transform", 20, split]
        assert metrics[split]["accuracy_after_removal"] == measured["level-01", 0, split]
        assert metrics[split]["accuracy"] == measured["level-01", 26, split]
    assert "accuracy_before_removal" not in ticket_metrics(finished, "level-01-random")


def ticket_metrics(run: Path, level: str) -> dict[str, float]:
    found: dict[str, float] = Ticket.load(run / f"dual/{level}").metrics["test"]
    return found


def test_a_finished_run_shows_its_table(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is trained again."""
    before = ticket_facts(finished)
    run(finished.parent, (finished.parent / "tiny.toml").read_text(), *EVERY, "--log.every", "1")
    assert ticket_facts(finished) == before
    table = capsys.readouterr().out
    assert "dual: test accuracy" in table
    assert all(word in table for word in ("random", "budget", "50."))


def test_removal_costs_no_accuracy_once_the_weights_are_drawn_to_zero(tmp_path: Path) -> None:
    """Within 0.01, of a network that has learned its digits: as the shipped demo transforms it."""
    demo = Path(__file__).parent.parent / "launch/configs/digits-dual.toml"
    text = demo.read_text().replace("digits-dual", "tiny").replace("[0.1, 0.05, 0.02, 0.01]", "0.1")
    folder = run(tmp_path, text, "--stages.dual.controls")
    metrics = Ticket.load(folder / "dual/level-00").metrics["test"]
    before = metrics["accuracy_before_removal"]
    assert before > 0.95
    assert metrics["accuracy_after_removal"] == pytest.approx(before, abs=0.01)


def test_over_cycles_more_goes_and_the_optimizer_begins_anew(tmp_path: Path) -> None:
    """After 3, 7, 14 and 21 steps; lambda from 0 in each; excluded layers are never drawn."""
    folder = run(tmp_path, BASE + CYCLES, *EVERY, "--log.every", "1")
    told = trained(folder, "level-00-transform")
    assert [told[step]["lambda"] for step in range(1, 22)] == [0.25, 0.5, 0.75, 1, 1, 1, 1] * 3
    saved = states(folder, "level-00-transform")
    for step, state in saved.items():
        has_momentum = any("momentum_buffer" in name for name in state)
        assert has_momentum is (step % 7 != 0), step
    norms = [told[step]["going_norm"] for step in (7, 8)]
    assert norms[1] > norms[0]  # P has grown
    assert "fc.weight" not in Ticket.load(folder / "dual/level-00").masks


def test_min_goes_by_the_initial_weights(tmp_path: Path) -> None:
    """The ablation: what is kept are the largest of each layer before any training."""
    stage = CYCLES.replace("exclude", 'pick = "min"\ncontrols = ["random"]\nexclude')
    folder = run(tmp_path, BASE + stage)
    ticket = Ticket.load(folder / "dual/level-00")
    initial = Ticket.load(folder / "dual/level-00-random").weights()
    for name, mask in ticket.masks.items():
        kept, gone = initial[name][mask].abs(), initial[name][~mask].abs()
        assert kept.min() >= gone.max()


def test_the_transformation_has_batches_of_its_own(tmp_path: Path) -> None:
    """Of 48 images: an epoch is as many images, and so is a share of the training."""
    stage = DUAL.replace('"8it"', '"50%"').replace('"12it"', '"0.5ep"')
    stage += "transform.batch_size = 48\n"
    folder = run(tmp_path, BASE + stage.replace("[0.2, 0.5]", "0.2"), "--log.every", "1")
    told = trained(folder, "level-00-transform")
    assert len(told) == 26 + 13  # half of 2 epochs of 96, and half an epoch of 26 steps
    assert told[26]["epoch"] == 1
    assert trained(folder, "level-00")[13]["epoch"] == 1
    assert Ticket.load(folder / "dual/level-00-budget").total_steps == 26 + 39


def test_a_moving_average_begins_with_the_training(tmp_path: Path) -> None:
    """The transformation is measured as it is, since its weights are what is pruned."""
    folder = run(tmp_path, BASE + DUAL.replace("[0.2, 0.5]", "0.2"), "--train.ema", "0.9")
    saved = final_states(folder)
    assert not [n for n in saved["dual/level-00-transform/checkpoints"] if n.startswith("ema/")]
    assert [n for n in saved["dual/level-00/checkpoints"] if n.startswith("ema/")]


# ---- resumed, and on several ranks


@pytest.mark.parametrize(
    ("text", "point", "count"),
    [
        (DUAL, "a step", 13),  # in the transformation
        (CYCLES, "a step", 16),  # in its third cycle
        (DUAL, "a save, before its manifest", 3),  # of its last step
        (DUAL, "a transformation, before its training", 1),
        (DUAL, "a step", 33),  # in the training
        (DUAL, "the end of a level, before its ticket", 1),
        (DUAL, "a step", 20 + 26 + 26 + 30),  # in the budget control
        (DUAL, "a transformation, before its training", 2),  # of the second level
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(
    text: str, point: str, count: int, tmp_path: Path
) -> None:
    """Weights, masks, metrics and tickets are those of the uninterrupted run."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    words = ["run", write_config(killed, BASE + text), "--root", str(killed)]
    assert run_ranks(1, killed_run, words, point, count) == [KILLED]
    assert not (killed / "tiny/dual/level-01/ticket.json").exists()
    assert tombola(*words) == [0]
    assert_same_run(killed / "tiny", run(whole, BASE + text))


def test_a_run_killed_on_two_ranks_goes_on_bit_for_bit(tmp_path: Path) -> None:
    assert_goes_on_with_two_ranks(BASE + CYCLES, tmp_path, step=11)


def test_one_and_two_ranks_make_the_same_ticket(tmp_path: Path) -> None:
    """The same masks, and weights to the error of summation, without batch statistics."""
    tickets = []
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        text = BASE.replace("width = 4", 'width = 8\nnorm = "group"').replace("2ep", "10it")
        stage = CYCLES.replace("lr = 0.05", "lr = 0.01")  # so that no ReLU switches by rounding
        words = ["run", write_config(folder, text + stage), "--root", str(folder)]
        assert tombola(*words, world_size=world_size) == [0] * world_size
        tickets.append(Ticket.load(folder / "tiny/dual/level-00"))
    one, two = tickets
    assert one.masks == two.masks
    for name, value in one.weights().items():
        torch.testing.assert_close(two.weights()[name], value, rtol=0, atol=1e-4)


# ---- configuration


def test_the_defaults_are_the_papers_proportions(tmp_path: Path) -> None:
    """Of 200 epochs 64 and 51.2, or in 5 cycles 12.8 and 12.8 each; weight decay 5e-4."""
    plain = '[[stages]]\nname = "dual"\nrecipe = "dual"\n'
    base = BASE.replace("[optimizer]\nlr = 0.1\n", "")
    once = read_config(write_config(tmp_path, base + plain)).stages[0]
    assert once.settings.optimizer.weight_decay == 5e-4
    options = ["--stages.dual.transform.cycles", "5"]
    cycles = read_config(write_config(tmp_path, base + plain), options).stages[0]
    lengths = [
        (one.config.transform.ramp_length, one.config.transform.stabilise_length)
        for one in (once, cycles)
    ]
    assert lengths == [("32%", "25.6%"), ("6.4%", "6.4%")]
    intervals = [one.config.transform.interval_length for one in (once, cycles)]
    assert intervals == ["5it", "1it"]


def test_a_resolved_configuration_reads_back(tmp_path: Path) -> None:
    """So that a run goes on with its own config.toml."""
    folder = run(tmp_path, BASE + CYCLES, "--train.total", "3it")
    before = ticket_facts(folder)
    assert tombola("run", str(folder / "config.toml"), "--root", str(tmp_path)) == [0]
    assert ticket_facts(folder) == before


MISTAKES: list[Mistake] = [
    (DUAL.replace("0.5]", "0.0]"), (), "density = '0.2 0.0': must be above 0 and at most 1"),
    (DUAL.replace("0.5]", "1.5]"), (), "must be above 0 and at most 1"),
    (DUAL.replace("0.5]", "0.2]"), (), "give at least one, and each once"),
    (DUAL.replace('"budget"]', '"random"]'), (), "controls = 'random random': name each once"),
    (DUAL.replace('"budget"]', '"reinit"]'), (), "controls"),
    (DUAL + "transform.limit = 0.0\n", (), "transform.limit = '0.0': must be above 0"),
    (DUAL + "transform.limit = inf\n", (), "transform.limit = 'inf': must be above 0 and finite"),
    (DUAL + "transform.increment = -0.1\n", (), "transform.increment = '-0.1': must be above 0"),
    (DUAL + "transform.cycles = 0\n", (), "transform.cycles = '0': must be at least 1"),
    (DUAL + 'transform.schedule = "x^4"\n', (), "transform.schedule"),
    (DUAL.replace("lr = 0.05", "lr = 0.0"), (), "transform.lr = '0.0': must be above 0"),
    (DUAL.replace('"8it"', '"8"'), (), "transform.ramp = '8': is not a duration"),
    (DUAL.replace('"8it"', '"init"'), (), "transform.ramp = 'init': must be at least one step"),
    (DUAL.replace('"2it"', '"0it"'), (), "transform.interval = '0it': must be at least one step"),
    (
        DUAL + "transform.increment = 0.1\n",
        (),
        "lambda reaches limit = 1.0 after 10 increments, which take 19 steps of the 8 of the ramp",
    ),
    (CYCLES.replace('["fc"]', '["fx"]'), (), "stages.dual.exclude = 'fx' matches no"),
    (CYCLES.replace('["fc"]', '["*"]'), (), "stages.dual.exclude leaves no layer to prune"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_one_clear_line(
    mistake: Mistake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(mistake, tmp_path, capsys, base=BASE)


def test_a_layer_of_one_weight_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of it can go; the line says how to leave it dense."""
    from torch import nn

    model = nn.Sequential(nn.Linear(64, 1), nn.Linear(1, 1, bias=False), nn.Linear(1, 10))
    monkeypatch.setattr(ModelSpec, "outline", lambda self: model)
    expected = "layer 1 has 1 weight, of which none can go: leave it dense with exclude = '1'"
    stage = CYCLES.replace('"fc"', '"2"')
    assert_refused((stage, (), expected), tmp_path, capsys, base=BASE)


LATE: list[tuple[str, str]] = [
    (
        DUAL.replace('"8it"', '"50%"') + "transform.increment = 0.01\n",
        "stages.dual.transform.increment = 0.01: lambda reaches limit = 1.0 after 100 increments, "
        "which take 199 steps of the 13 of the ramp",
    ),
    (DUAL.replace('"8it"', '"1%"'), "stages.dual.transform.ramp = '1%': is less than one step"),
    (
        DUAL + "transform.batch_size = 5000\n",
        "stages.dual.transform.batch_size = 5000: must be between 1 and the 1258 training images",
    ),
    (
        DUAL + "transform.batch_size = 33\ntrain.mixup = 0.2\n",
        "stages.dual.transform.batch_size = 33: train.mixup and train.cutmix pair the images",
    ),
]


@pytest.mark.parametrize(("stage", "expected"), LATE, ids=range(len(LATE)))
def test_what_only_the_data_tell_is_one_line_before_any_training(
    stage: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused_by_data(BASE + stage, expected, tmp_path, capsys, "dual")


def test_the_masks_are_those_of_the_seed_of_the_run(tmp_path: Path) -> None:
    """A function of seed and layer, which anyone can draw again."""
    folder = run(tmp_path, BASE + CYCLES, "--train.total", "3it")
    model = ModelSpec("cifar_resnet8", 10, 1, {"width": 4}).outline()
    drawn = Going.of(model.to_empty(device="cpu"), seed=stream_seed(3, "dual", "masks"))
    ticket = Ticket.load(folder / "dual/level-00")
    expected = {name: mask for name, mask in drawn.kept(0.1).items() if name != "fc.weight"}
    assert ticket.masks == Masks(expected)
