"""Recursive growth as a stage of whole runs: grown, stopped, resumed, refused, on several ranks."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from family import (
    Mistake,
    assert_goes_on_with_two_ranks,
    assert_refused,
    assert_refused_by_data,
    assert_same_masks_on_two_ranks,
    run,
)
from killing import KILLED, killed_run
from processes import run_ranks, tombola
from tiny import assert_same_run, facts, final_states, ticket_facts, write_config
from torch import Tensor

from data.order import stream_seed
from launch.cli import run_command
from pruning.allocate import count_for
from pruning.growth_measures import early_area, recovery, steps_to
from pruning.tickets import Ticket
from train.models import ModelSpec
from train.session import Session

BASE = """
name = "tiny"
seed = 3
[data]
batch_size = 96
[model]
name = "mlp"
side = 8
width = 16
[train]
total = "12it"
[optimizer]
name = "adam"
lr = 1e-2
[schedule]
name = "linear"
[checkpoint]
every = "4it"
[log]
every = 1
"""
GROWTH = """
[[stages]]
name = "growth"
recipe = "growth"
recursions = 2
density = 0.2
measure = "3it"
early = "6it"
"""
ONE = GROWTH.replace("= 2", "= 1")
EVERY = ("dense", "random", "unpruned", "ungrown", "reset", "reset-budget", "dense-budget")
CONTROLS = f"controls = {json.dumps(EVERY)}\n"
RESNET = """
[[stages]]
name = "growth"
recipe = "growth"
recursions = 2
density = 0.3
insertion = "preserving"
grow = ["stages.0", "stages.2"]
exclude = ["conv1", "fc", "*shortcut*"]
recover = "4it"
measure = "3it"
early = "6it"
model.name = "cifar_resnet8"
model.side = "None"
model.width = 4
"""


def ticket(run: Path, level: str) -> Ticket:
    return Ticket.load(run / f"growth/{level}")


def end_of(run: Path, level: str) -> dict[str, Tensor]:
    """The state at the end of a phase."""
    state = final_states(run)[f"growth/{level}/checkpoints"]
    return {k.removeprefix("model/"): v for k, v in state.items() if k.startswith("model/")}


def accuracies(run: Path, level: str, split: str = "test") -> dict[int, float]:
    """What a phase reached on a split, by its steps."""
    here = (f for f in facts(run) if f["event"] == "evaluation" and f["level"] == level)
    return {f["step"]: f["accuracy"] for f in here if f["split"] == split}


def initial(num_blocks: int) -> dict[str, Tensor]:
    """The first values of a network of that depth in these runs."""
    spec = ModelSpec("mlp", 10, 1, {"side": 8, "width": 16, "blocks": [num_blocks]})
    return spec.build(stream_seed(3, "init")).state_dict()


# ---- what a stage makes


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two growths with all controls."""
    return run(tmp_path_factory.mktemp("growth"), BASE + GROWTH + CONTROLS)


def test_each_level_is_one_block_deeper(finished: Path) -> None:
    """Level 0 is the configured network; each comes from the level before."""
    tickets = [ticket(finished, f"level-0{level}") for level in (0, 1, 2)]
    assert [t.model.arguments.get("blocks") for t in tickets] == [None, [2], [3]]
    assert [t.parent for t in tickets] == [None, tickets[0].id, tickets[1].id]
    assert [t.total_steps for t in tickets] == [18, 36, 54]
    assert [t.timing["search_steps"] for t in tickets] == [12, 30, 48]
    for one in tickets:
        one.build_model()


def test_each_layer_is_pruned_once_to_its_number(finished: Path) -> None:
    """The masks of old layers are those of the level before: the target does not compound."""
    levels = [ticket(finished, f"level-0{level}").masks for level in (0, 1, 2)]
    for masks in levels:
        for row in masks.table():
            assert row.kept == count_for(0.2, row.size), row.name
    for before, after in pairwise(levels):
        assert len(after) == len(before) + 1
        assert all(torch.equal(after[name], mask) for name, mask in before.items())


def test_what_is_new_is_dense_until_it_is_pruned(finished: Path) -> None:
    """And what is old stays sparse while the new layer is trained."""
    for level in (1, 2):
        end, one = end_of(finished, f"level-0{level}-train"), ticket(finished, f"level-0{level}")
        new = f"hidden.{level}.linear.weight"
        start = one.weights()
        for name, mask in one.masks.items():
            assert bool(end[name][~mask].any()) is (name == new)
            assert torch.equal(start[name], end[name] * mask)
        mask = one.masks[new]
        assert end[new][mask].abs().min() >= end[new][~mask].abs().max()


def test_a_level_goes_on_from_what_the_one_before_was_trained_to(finished: Path) -> None:
    """An identity after a ReLU changes nothing: the grown network begins where that one ended."""
    for level in (1, 2):
        before = ticket(finished, f"level-0{level - 1}").metrics
        for split in ("validation", "test"):
            begun = accuracies(finished, f"level-0{level}-train", split)[0]
            assert begun == before[split]["accuracy"]


def test_a_ticket_tells_its_curve_and_what_pruning_cost(finished: Path) -> None:
    """The curve is of the held-out images; accuracies around the pruning are those of records."""
    metrics = ticket(finished, "level-01").metrics
    curve = accuracies(finished, "level-01-train", "validation")
    assert list(curve) == [0, 3, 6, 9, 12]
    assert metrics["curve"] == {str(step): value for step, value in curve.items()}
    test = metrics["test"]
    assert test["accuracy_before_pruning"] == accuracies(finished, "level-01-train")[12]
    assert test["accuracy_after_pruning"] == accuracies(finished, "level-01")[0]
    assert metrics["growth"] == {
        "kept_ratio": pytest.approx((205 + 51 + 32) / (1024 + 256 + 160)),
        "early_steps": 6.0,
    }


def test_the_dense_control_of_level_0_is_its_training(finished: Path) -> None:
    """It is not trained twice."""
    dense = ticket(finished, "level-00-dense")
    assert dense.metrics["curve"] == ticket(finished, "level-00").metrics["curve"]
    assert not (finished / "growth/level-00-train").exists()
    trained = [f for f in facts(finished) if f["event"] == "train" and "00-dense" in f["level"]]
    assert [f["step"] for f in trained] == list(range(1, 13))


def test_the_dense_control_is_a_fresh_network_as_deep(finished: Path) -> None:
    dense, beside = ticket(finished, "level-02-dense"), ticket(finished, "level-02")
    assert (dense.parent, dense.control, dense.density) == (beside.id, True, 1.0)
    assert dense.model == beside.model
    first = initial(3)
    assert all(torch.equal(value, first[name]) for name, value in dense.weights().items())
    assert dense.total_steps == 12


def test_random_insertions_are_a_recursion_of_their_own(finished: Path) -> None:
    """From level 0 on; the new block is as the network is built."""
    one, two = (ticket(finished, f"level-0{level}-random") for level in (1, 2))
    assert not (finished / "growth/level-00-random").exists()
    assert all(torch.equal(two.masks[name], mask) for name, mask in one.masks.items())
    assert two.parent == ticket(finished, "level-02").id
    assert two.total_steps == 54
    before = accuracies(finished, "level-00")[6]
    assert accuracies(finished, "level-01-random-train")[0] != before
    assert one.model == ticket(finished, "level-01").model


def test_growth_and_pruning_are_each_left_out(finished: Path) -> None:
    grown, pruned = ticket(finished, "level-02-unpruned"), ticket(finished, "level-02-ungrown")
    assert (grown.density, grown.model) == (1.0, ticket(finished, "level-02").model)
    assert pruned.model == ticket(finished, "level-00").model
    assert pruned.masks == ticket(finished, "level-00").masks
    assert grown.total_steps == pruned.total_steps == 54
    for level in ("ungrown", "unpruned"):
        ended = accuracies(finished, f"level-01-{level}")[6]
        assert accuracies(finished, f"level-02-{level}-train")[0] == ended


def test_reset_starts_from_the_first_values_of_the_deepest_network(finished: Path) -> None:
    """Its masks are the largest weights of each layer that the dense network ended with."""
    reset, budget = ticket(finished, "level-02-reset"), ticket(finished, "level-02-reset-budget")
    first, end = initial(3), end_of(finished, "level-02-dense")
    assert all(torch.equal(value, first[name]) for name, value in reset.weights().items())
    for name, mask in reset.masks.items():
        assert mask.sum() == count_for(0.2, mask.numel())
        assert end[name][mask].abs().min() >= end[name][~mask].abs().max()
    assert budget.masks == reset.masks
    assert budget.weights_digest == reset.weights_digest


def test_budgets_are_those_of_the_recursion(finished: Path) -> None:
    """The schedule is stretched over all of their steps."""
    names = ("", "-reset-budget", "-dense-budget", "-reset")
    assert [ticket(finished, f"level-02{name}").total_steps for name in names] == [54, 54, 54, 24]
    rates = {
        name: [f["lr"] for f in facts(finished) if f["event"] == "train" and f["level"] == name]
        for name in ("level-02-dense", "level-02-dense-budget", "level-02", "level-02-reset-budget")
    }
    usual = rates["level-02-dense"]
    assert [len(found) for found in rates.values()] == [12, 54, 6, 42]
    for found in rates.values():
        assert found == [usual[step * 12 // len(found)] for step in range(len(found))]


def test_a_finished_run_shows_its_tables_and_builds_no_network(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "build_network", None)
    before = ticket_facts(finished)
    run(finished.parent, BASE + GROWTH + CONTROLS)
    assert ticket_facts(finished) == before
    shown = capsys.readouterr().out
    assert "goes on" not in shown
    for title in ("growth: test accuracy", "growth: the last level", "what keeping the weights"):
        assert title in shown
    assert (finished / "growth.png").read_bytes()[:4] == b"\x89PNG"
    assert not (finished / "accuracy.png").exists()


def test_the_report_has_the_measures(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["report", str(finished), "--json"]) == 0
    (document,) = json.loads(capsys.readouterr().out)
    assert [row["blocks"] for row in document["stages"]["growth"]] == ["1", "2", "3"]
    assert set(EVERY) <= set(document["stages"]["growth"][2])
    rows = document["growth"]["growth"]
    assert [(row["method"], row["level"]) for row in rows] == [
        *(("growth", level) for level in (0, 1, 2)),
        *(("random", level) for level in (1, 2)),
        *(("ungrown", level) for level in (1, 2)),
        *(("unpruned", level) for level in (0, 1, 2)),
    ]
    assert rows[0]["early_area"] == 1.0  # it is the dense network's own curve
    assert rows[0]["steps_to_95"] == rows[0]["dense_steps_to_95"]
    metrics = ticket(finished, "level-02").metrics["test"]
    dense = ticket(finished, "level-02-dense").metrics["test"]
    assert rows[2]["gap"] == metrics["accuracy"] - dense["accuracy"]
    assert rows[2]["before"] == metrics["accuracy_before_pruning"]


def test_growth_stops_where_it_is_sparse_and_near_the_dense_network(tmp_path: Path) -> None:
    """Of 1024 + 160 + 256 d weights 20 % and the classifier: 0.289 at level 1, 0.275 at level 2."""
    stage = GROWTH.replace("= 2", "= 4") + 'exclude = ["fc"]\ncontrols = ["dense", "reset"]\n'
    folder = run(tmp_path, BASE + stage + "ratio = 0.28\ntolerance = 1.0\n")
    found = sorted(path.name for path in (folder / "growth").iterdir() if path.is_dir())
    assert found[-3:] == ["level-02-dense", "level-02-reset", "level-02-train"]
    ratios = [ticket(folder, f"level-0{n}").metrics["growth"]["kept_ratio"] for n in (1, 2)]
    assert ratios[0] > 0.28 >= ratios[1]


def test_growth_goes_on_while_it_is_not_near(tmp_path: Path) -> None:
    """Level 0 differs from its dense network by some images."""
    folder = run(tmp_path, BASE + ONE + 'controls = ["dense"]\ntolerance = 0.0\n')
    assert ticket(folder, "level-01").level == 1


def test_stages_of_a_residual_network_grow_in_turn(tmp_path: Path) -> None:
    """A preserving block of each; statistics go on; what is excluded is in no mask."""
    folder = run(tmp_path, BASE + RESNET)
    tickets = [ticket(folder, f"level-0{level}") for level in (0, 1, 2)]
    blocks = [one.model.arguments.get("blocks") for one in tickets]
    assert blocks == [None, [2, 1, 1], [2, 1, 2]]
    assert {name.split(".")[0] for name in tickets[2].masks} == {"stages"}
    assert not [name for name in tickets[2].masks if "shortcut" in name]
    for level in (1, 2):
        begun = accuracies(folder, f"level-0{level}-train")[0]
        assert begun == tickets[level - 1].metrics["test"]["accuracy"]
    assert tickets[2].metrics["growth"]["kept_ratio"] > tickets[2].density


def test_a_moving_average_is_what_is_pruned_and_grown(tmp_path: Path) -> None:
    folder = run(tmp_path, BASE + ONE, "--train.ema", "0.5")
    states = final_states(folder)
    one = ticket(folder, "level-01")
    averaged = states["growth/level-01-train/checkpoints"]
    for name, mask in one.masks.items():
        assert torch.equal(one.weights()[name], averaged[f"ema/{name}"] * mask)
    assert accuracies(folder, "level-01-train")[0] == accuracies(folder, "level-00")[6]


LATER = """
[[stages]]
name = "deeper"
recipe = "elastic"
ticket = "growth"
levels = [1, 2]
model.blocks = [4]
[[stages]]
name = "stable"
recipe = "connectivity"
ticket = "growth"
levels = [2]
points = 3
num_batches = 1
"""


def test_other_stages_take_grown_tickets(tmp_path: Path) -> None:
    """Each of the depth that it has: 2 and 3 blocks become 4."""
    folder = run(tmp_path, BASE + GROWTH + LATER)
    found = [Ticket.load(folder / f"deeper/level-0{level}") for level in (1, 2)]
    assert [one.config["map"] for one in found] == ["0:0;1:1,2,3", "0:0;1:1,2;2:3"]
    assert [one.parent for one in found] == [ticket(folder, f"level-0{n}").id for n in (1, 2)]
    assert (folder / "stable/level-02/connectivity.json").exists()


# ---- the measures


def test_steps_to_an_accuracy_are_those_of_the_first_point_that_has_it() -> None:
    curve = {0: 0.1, 5: 0.6, 10: 0.9, 15: 0.8}
    assert [steps_to(a, curve) for a in (0.1, 0.55, 0.6, 0.7, 0.95)] == [0, 5, 5, 10, None]


def test_the_early_area_is_by_trapezoids_and_relative() -> None:
    """2.5 (0.5 + 0.7) + 2.5 (0.7 + 0.9) = 7 over 2.5 (0.1 + 0.5) + 2.5 (0.5 + 0.7) = 4.5."""
    curve = {0: 0.5, 5: 0.7, 10: 0.9, 15: 1.0}
    dense = {0: 0.1, 5: 0.5, 10: 0.7, 15: 1.0}
    assert early_area(curve, dense, 10) == pytest.approx(7 / 4.5)
    assert early_area(curve, dense, 14) == pytest.approx(7 / 4.5)
    assert early_area(dense, dense, 15) == 1.0
    assert early_area(curve, {}, 10) is None


def test_recovery_is_the_share_of_the_cost_that_came_back() -> None:
    assert recovery(0.9, 0.5, 0.8) == pytest.approx(0.75)
    assert recovery(0.9, 0.5, 1.0) == pytest.approx(1.25)
    assert recovery(0.9, 0.9, 0.95) is None


# ---- resumed, and on several ranks

THREE = GROWTH.replace("= 2", "= 3")


@pytest.mark.parametrize(
    ("text", "point", "count"),
    [
        (GROWTH, "a step", 18 + 5),  # in the growth of level 1
        (GROWTH, "the end of a level, before its ticket", 2),
        (ONE + 'controls = ["random", "reset"]\n', "a step", 36 + 8),  # in a random insertion
        (ONE + 'controls = ["dense", "reset"]\n', "a step", 36 + 5),  # in a dense network
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
    assert tombola(*words) == [0]
    assert_same_run(killed / "tiny", run(whole, BASE + text))


def test_a_damaged_end_of_a_level_names_the_remedy(tmp_path: Path) -> None:
    """The network that grows from it needs it: with the level's folder removed the run goes on."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    words = ["run", write_config(killed, BASE + ONE), "--root", str(killed)]
    assert run_ranks(1, killed_run, words, "a step", 18 + 2) == [KILLED]
    level = killed / "tiny/growth/level-00"
    (level / "checkpoints/step-00000006/__0_0.distcp").write_bytes(b"damaged")
    assert tombola(*words, output=tmp_path / "out") == [1]
    assert f"remove {level} to train that level again" in (tmp_path / "out.0").read_text()
    shutil.rmtree(level)
    assert tombola(*words) == [0]
    assert ticket_facts(killed / "tiny") == ticket_facts(run(whole, BASE + ONE))


def test_a_run_killed_in_recursion_3_on_two_ranks_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """The network is built again as deep as it was."""
    assert_goes_on_with_two_ranks(BASE + THREE, tmp_path, step=3 * 18 + 6)
    killed = tmp_path / "killed/tiny"
    assert [name for name in end_of(killed, "level-03-train") if name.startswith("hidden.3.")]
    attempts = json.loads((killed / "environment.json").read_text())
    assert len(attempts) == 2


def test_one_and_two_ranks_make_the_same_masks(tmp_path: Path) -> None:
    assert_same_masks_on_two_ranks(BASE + GROWTH, tmp_path, "growth/level-02")


# ---- configuration

MISTAKES: list[Mistake] = [
    (GROWTH.replace("= 2", "= 0"), (), "recursions = '0': must be at least 1"),
    (GROWTH.replace("0.2", "0.0"), (), "density = '0.0': must be above 0 and at most 1"),
    (GROWTH + "tolerance = 0.01\n", (), "tolerance = '0.01': is from the dense network's accuracy"),
    (GROWTH + 'tolerance = 2.0\ncontrols = ["dense"]\n', (), "must be between 0 and 1"),
    (GROWTH + "ratio = 0.1\n", (), "ratio = '0.1': has no effect without tolerance"),
    (GROWTH + 'controls = ["reset", "reset"]\n', (), "controls = 'reset reset': name each once"),
    (GROWTH + 'controls = ["rest"]\n', (), "controls = 'rest': is not known"),
    (GROWTH + 'grow = ["hidden", "hidden"]\n', (), "grow = 'hidden hidden': name each once"),
    (GROWTH + 'recover = "half"\n', (), "recover = 'half': is not a duration"),
    (GROWTH + 'insertion = "identity"\n', (), "insertion = 'identity': is not known"),
    (GROWTH, ("--model.basis", "random"), "stages.growth: model.basis = 'random': a new block is"),
    (
        GROWTH + 'grow = ["hiden"]\n',
        (),
        "stages.growth.grow = 'hiden': no stage of mlp, which has hidden",
    ),
    (GROWTH + 'exclude = ["fx"]\n', (), "stages.growth.exclude = 'fx' matches no"),
    (GROWTH + 'exclude = ["*"]\n', (), "stages.growth: exclude leaves no layer to prune"),
    (
        GROWTH.replace("0.2", "0.003"),
        (),
        "stages.growth.density = 0.003 keeps none of the 160 weights of fc.weight: keep more, or "
        "leave it dense with exclude = 'fc'",
    ),
    (
        GROWTH + 'model.name = "cifar_vgg11"\nmodel.side = "None"\n',
        (),
        "stages.growth: blocks is no option of cifar_vgg11",
    ),
    (
        GROWTH + 'model.name = "vgg11"\nmodel.side = "None"\nmodel.width = "None"\n',
        (),
        "stages.growth: vgg11 has no list of like blocks",
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_one_clear_line(
    mistake: Mistake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(mistake, tmp_path, capsys, base=BASE)


def test_a_block_without_a_known_preserving_insertion_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pruning.growth._make_preserving", lambda block: False)
    expected = "stages.growth: no preserving insertion is known for blocks Unit: choose insertion"
    stage = GROWTH + 'insertion = "preserving"\n'
    assert_refused((stage, (), expected), tmp_path, capsys, base=BASE)


LATE: list[tuple[str, str]] = [
    (GROWTH + 'recover = "1%"\n', "stages.growth.recover = '1%': is less than one step"),
    (GROWTH.replace('"3it"', '"1%"'), "stages.growth.measure = '1%': is less than one step"),
    (
        GROWTH.replace('"6it"', '"2it"'),
        "stages.growth.early = '2it': is step 2: must be from measure, 3, to the end, 12",
    ),
    (
        GROWTH.replace('"6it"', '"2ep"'),
        "stages.growth.early = '2ep': is step 26: must be from measure, 3, to the end, 12",
    ),
    (
        GROWTH + 'insertion = "preserving"\nmodel.side = 9\n',
        "'mlp' does not take images of 1x8x8: side = 9 is more than their 8x8 pixels: set "
        "model.side = 8",
    ),
]


@pytest.mark.parametrize(("stage", "expected"), LATE, ids=range(len(LATE)))
def test_what_only_the_data_tell_is_one_line_before_any_training(
    stage: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused_by_data(BASE + stage, expected, tmp_path, capsys, "growth")


def test_an_insertion_that_changes_logits_is_refused_when_the_stage_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is believed to preserve them is tried."""

    def broken(block: Any) -> bool:
        torch.nn.init.ones_(block.linear.weight)
        return True

    monkeypatch.setattr("pruning.growth._make_preserving", broken)
    expected = "stages.growth.insertion = 'preserving': the new block of mlp changes logits by"
    stage = GROWTH + 'insertion = "preserving"\n'
    assert_refused_by_data(BASE + stage, expected, tmp_path, capsys, "growth")


def test_a_resolved_configuration_reads_back(tmp_path: Path) -> None:
    """So that a run goes on with its own config.toml."""
    folder = run(tmp_path, BASE + RESNET, "--train.total", "6it", "--stages.growth.recursions", "1")
    before = ticket_facts(folder)
    assert run_command(["run", str(folder / "config.toml"), "--root", str(tmp_path)]) == 0
    assert ticket_facts(folder) == before
