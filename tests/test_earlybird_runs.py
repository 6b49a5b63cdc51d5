"""Early-bird tickets as stages of whole runs: drawn, trained, resumed, refused, on two ranks."""

import shutil
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
from tiny import TOML, assert_same_run, facts, ticket_facts, write_config
from torch import Tensor, nn

from data.files import Folder
from launch.cli import run_command
from pruning.channels import Channels
from pruning.masks import Masks, count_kept
from pruning.tickets import Ticket
from pruning.trained import trained_weights
from train.models import ModelSpec
from train.safe_dcp import read_tensors

BASE = TOML[: TOML.index("[[stages]]")].replace("3ep", "2ep")
"""two epochs of 13 steps"""
EB = """
[[stages]]
name = "eb"
recipe = "earlybird"
density = [0.3, 0.5]
interval = "2it"
distance = 0.08
controls = ["random"]
"""
"""30 % of the channels are drawn at step 16, half of them at step 18"""
EVERY = (
    *("--checkpoint.every", "1it", "--checkpoint.keep", "99", "--log.every", "1"),
    *("--checkpoint.asynchronous", "false"),
)
SPEC = ModelSpec("cifar_resnet8", 10, 1, {"width": 4})


def channels() -> Channels:
    return Channels(SPEC.build(), (1, 8, 8))


def states(run: Path, level: str) -> dict[int, dict[str, Tensor]]:
    """All checkpoints of a phase by their steps."""
    found = sorted((run / f"eb/{level}/checkpoints").glob("step-*"))
    return {int(one.name[5:]): read_tensors(str(one), is_local=True) for one in found}


def model_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("model/"): v for k, v in state.items() if k.startswith("model/")}


def told(run: Path, level: str) -> dict[int, dict[str, Any]]:
    return {f["step"]: f for f in facts(run) if f["event"] == "train" and f["level"] == level}


def channels_of(ticket: Ticket) -> Masks:
    return Masks({scale: ticket.masks[scale] for scale in channels().shapes})


# ---- what a stage makes


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two densities with a control, every checkpoint kept."""
    return run(tmp_path_factory.mktemp("eb"), BASE + EB, *EVERY)


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with checkpoints every 8 steps, two of them kept."""
    return run(tmp_path_factory.mktemp("usual"), BASE + EB)


def test_both_densities_are_drawn_in_one_search(finished: Path) -> None:
    """At the first of its looks at which the newest of five masks is within the distance of all
    others; the search ends with the last draw, and is dense."""
    search = told(finished, "search")
    assert list(search) == list(range(1, 19))
    assert {fact["density"] for fact in search.values()} == {1.0}
    for level, (density, step) in enumerate({0.5: 18, 0.3: 16}.items()):
        assert Ticket.load(finished / f"eb/level-0{level}").step == step
        apart = {at: fact[f"distance_{density}"] for at, fact in search.items() if at >= 10}
        assert next(at for at, most in apart.items() if at % 2 == 0 and most <= 0.08) == step


def test_masks_are_those_of_the_weights_at_the_draw(finished: Path) -> None:
    """Of the channels, the exact number; the ticket starts from these weights, at this step."""
    found = channels()
    for level, (density, step, count) in enumerate([(0.5, 18, 42), (0.3, 16, 25)]):
        ticket = Ticket.load(finished / f"eb/level-0{level}")
        weights = model_of(states(finished, "search")[step])
        kept = found.keep(found.scores(weights), density, "channels")
        assert kept.kept == count
        assert ticket.masks == found.masks(kept)
        assert (ticket.method, ticket.level, ticket.parent) == ("earlybird", level, None)
        start = ticket.weights()
        assert start.keys() == weights.keys()
        assert all(torch.equal(start[name], value) for name, value in weights.items())
        assert (ticket.timing["search_steps"], ticket.timing["steps"]) == (step, 26 - step)


def test_checkpoints_of_the_draws_stay(usual: Path, finished: Path) -> None:
    """Also where the usual ones are deleted; the same tickets come of it."""
    assert set(states(usual, "search")) >= {16, 18}
    assert ticket_facts(usual).keys() == ticket_facts(finished).keys()
    for place, facts_there in ticket_facts(usual).items():
        assert facts_there["id"] == ticket_facts(finished)[place]["id"]


def test_the_training_goes_on_on_the_schedule(finished: Path) -> None:
    """From the step of the draw, with the rate that the whole training has there, on fresh
    momentum, and without the penalty."""
    rates = {step: 0.1 * (1 - (step - 1) / 26) for step in range(1, 27)}
    for phase, steps in (
        ("search", range(1, 19)),
        ("level-00", range(19, 27)),
        ("level-01", range(17, 27)),
        ("level-01-random", range(17, 27)),
    ):
        trained = told(finished, phase)
        assert list(trained) == list(steps)
        assert all(fact["lr"] == pytest.approx(rates[step]) for step, fact in trained.items())
    ticket, first = Ticket.load(finished / "eb/level-01"), states(finished, "level-01")[17]
    start = ticket.weights()
    for name, mask in ticket.masks.items():
        momentum = first[f"optimizer/state/{name}/momentum_buffer"]  # the first gradient alone
        expected = (start[name] - rates[17] * momentum) * mask
        torch.testing.assert_close(first[f"model/{name}"], expected, rtol=0, atol=1e-7)


def test_what_goes_stays_zero_after_every_later_step(finished: Path) -> None:
    """Filters, what reads them, scales and shifts, and their momentum."""
    checked = 0
    for level in ("level-00", "level-01", "level-00-random", "level-01-random"):
        masks = Ticket.load(finished / f"eb/{level}").masks
        assert {"norm1.weight", "norm1.bias", "fc.weight"} < set(masks)
        for state in states(finished, level).values():
            for name, mask in masks.items():
                assert not state[f"model/{name}"][~mask].any()
                assert not state[f"optimizer/state/{name}/momentum_buffer"][~mask].any()
            checked += 1
    assert checked == 2 * (8 + 10)


def test_masked_channels_are_dead_after_the_training(finished: Path) -> None:
    """What their normalisations give is exactly 0, of images that were never seen."""
    for level in ("level-01", "level-01-random"):
        ticket = Ticket.load(finished / f"eb/{level}")
        model = ticket.model.build()
        model.load_state_dict(trained_weights(ticket, Folder(finished / f"eb/{level}")))
        images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        for scale, mask in channels_of(ticket).items():
            out = output_of(model.eval(), scale.removesuffix(".weight"), images)
            assert not out[:, ~mask].any(), scale
            assert bool(out[:, mask].ne(0).any()), scale


def output_of(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    found: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_hook(lambda *call: found.append(call[2]))
    with torch.no_grad():
        model(images)
    hook.remove()
    return found[0]


def test_a_control_has_as_many_channels_in_each_layer_at_random(finished: Path) -> None:
    for level in ("level-00", "level-01"):
        ticket, control = (
            Ticket.load(finished / f"eb/{name}") for name in (level, f"{level}-random")
        )
        mine, theirs = channels_of(ticket), channels_of(control)
        for scale in mine:
            assert count_kept(mine[scale]) == count_kept(theirs[scale])
        assert mine != theirs
        assert control.masks == channels().masks(theirs)
        assert control.weights_digest == ticket.weights_digest
        assert (control.step, control.parent) == (ticket.step, ticket.id)


def test_a_finished_run_does_nothing(
    usual: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It does not need its search any more, and shows its table."""
    copy = Path(shutil.copytree(usual.parent, tmp_path / "copy")) / "tiny"
    shutil.rmtree(copy / "eb/search")
    before = facts(copy), ticket_facts(copy)
    run(copy.parent, BASE + EB)
    assert (facts(copy), ticket_facts(copy)) == before
    assert not (copy / "eb/search").exists()
    table = capsys.readouterr().out
    assert "eb: test accuracy" in table
    assert "random" in table


def test_of_weights_the_density_is_at_most_what_was_asked(tmp_path: Path) -> None:
    """Nearer to it than a channel more would be; a moving average begins with the training."""
    stage = EB.replace("[0.3, 0.5]", "0.3").replace("0.08", '0.9\nof = "weights"')
    folder = run(tmp_path, BASE + stage, "--train.total", "12it", "--train.ema", "0.9", *EVERY)
    ticket = Ticket.load(folder / "eb/level-00")
    assert 0.27 < ticket.density <= 0.3
    assert ticket.step == 10  # any five masks are near enough
    for level, averaged in (("search", False), ("level-00", True)):
        names = states(folder, level)[12 if averaged else 10]
        assert any(name.startswith("ema/") for name in names) is averaged


def test_other_stages_take_tickets_of_channels(tmp_path: Path) -> None:
    """Squeezed to another depth, and as densities of a binary subnetwork."""
    stages = """
[[stages]]
name = "squeezed"
recipe = "elastic"
ticket = "eb"
levels = [0]
model.name = "cifar_resnet8"
[[stages]]
name = "binary"
recipe = "multiprize"
density = "ticket"
ticket = "eb"
levels = [0]
"""
    text = BASE.replace("cifar_resnet8", "cifar_resnet14").replace("2ep", "12it")
    stage = EB.replace("[0.3, 0.5]", "0.5").replace("0.08", "0.9")
    folder = run(tmp_path, text + stage + stages)
    source = Ticket.load(folder / "eb/level-00")
    squeezed = Ticket.load(folder / "squeezed/level-00")
    assert squeezed.parent == source.id
    assert torch.equal(squeezed.masks["norm1.bias"], source.masks["norm1.bias"])
    binary = Ticket.load(folder / "binary/level-00")
    assert {row.name: row.kept for row in binary.masks.table()} == {
        row.name: row.kept for row in source.masks.table() if row.name in binary.masks
    }


SQUEEZED = """
[[stages]]
name = "squeezed"
recipe = "elastic"
ticket = "eb"
model.name = "cifar_resnet8"
controls = ["{control}"]
"""


def test_a_stretched_ticket_of_channels_takes_no_control_of_single_weights(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither of a stage to come, nor of one that was run; its own masks it keeps in `reinit`."""
    expected = "controls = 'random': chooses single weights, and of this ticket whole channels went"
    stage = SQUEEZED.format(control="random")
    assert_refused((EB + stage, (), expected), tmp_path, capsys, base=BASE)
    stored = stage.replace('"eb"', f'"{finished}/eb"')
    assert_refused((stored, (), expected), tmp_path, capsys, base=BASE)
    fresh = run(tmp_path, BASE + stored.replace("random", "reinit"))
    ticket, control = (Ticket.load(fresh / f"squeezed/level-01{x}") for x in ("", "-reinit"))
    assert control.masks == ticket.masks


# ---- not drawn


def test_what_is_not_drawn_is_one_line_and_the_rest_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says how far the masks differ; run again, it trains and records nothing more."""
    words = ["run", write_config(tmp_path, BASE + EB.replace("0.08", "0.06"))]
    seen = []
    for _ in range(2):
        assert run_command([*words, "--root", str(tmp_path)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "stages.eb: density = 0.5: not drawn in 25 steps" in error
        assert "more than distance = 0.06 of the channels (0.0714 at 0.5)" in error
        seen.append((facts(tmp_path / "tiny"), ticket_facts(tmp_path / "tiny")))
    assert seen[0] == seen[1]
    assert list(seen[0][1]) == ["eb/level-01", "eb/level-01-random"]


# ---- resumed, and on several ranks


@pytest.mark.parametrize(
    ("point", "count"),
    [
        ("a save, before its manifest", 2),  # of the first draw
        ("the end of a phase, before its evaluation", 1),  # of the first draw
        ("the end of a phase, before its evaluation", 2),  # of the last draw
        ("the end of a level, before its ticket", 1),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(
    point: str, count: int, usual: Path, tmp_path: Path
) -> None:
    """Weights, masks, metrics and tickets are those of the uninterrupted run."""
    words = ["run", write_config(tmp_path, BASE + EB), "--root", str(tmp_path)]
    assert run_ranks(1, killed_run, words, point, count) == [KILLED]
    assert not (tmp_path / "tiny/eb/level-00/ticket.json").exists()
    assert tombola(*words) == [0]
    assert_same_run(tmp_path / "tiny", usual)


def test_a_search_killed_between_two_draws_measures_none_again(
    finished: Path, tmp_path: Path
) -> None:
    """It goes on from step 17, where the draw of step 16 is no end any more."""
    words = ["run", write_config(tmp_path, BASE + EB), "--root", str(tmp_path), *EVERY]
    assert run_ranks(1, killed_run, words, "a step", 18) == [KILLED]
    assert max(states(tmp_path / "tiny", "search")) == 17
    assert tombola(*words) == [0]
    assert_same_run(tmp_path / "tiny", finished)


@pytest.mark.parametrize(("density", "step"), [("[0.3, 0.5]", 17), ("0.5", 23)])
def test_a_run_killed_on_two_ranks_goes_on_bit_for_bit(
    density: str, step: int, tmp_path: Path
) -> None:
    """In the search, and in the training."""
    stage = EB.replace('controls = ["random"]', "").replace("[0.3, 0.5]", density)
    assert_goes_on_with_two_ranks(BASE + stage, tmp_path, step=step)


def test_one_and_two_ranks_draw_the_same_tickets(tmp_path: Path) -> None:
    """With the batch statistics of one rank's micro-batches those of two ranks."""
    tickets = []
    for world_size in (1, 2):
        root = tmp_path / str(world_size)
        root.mkdir()
        words = ["run", write_config(root, BASE + EB), "--root", str(root)]
        words += ["--train.micro-batch", "48"]
        assert tombola(*words, world_size=world_size) == [0] * world_size
        names = ("level-00", "level-01", "level-01-random")
        found = [Ticket.load(root / f"tiny/eb/{name}") for name in names]
        tickets.append([(ticket.step, ticket.masks.digest()) for ticket in found])
    assert tickets[0] == tickets[1]


# ---- configuration


def test_a_resolved_configuration_reads_back(usual: Path, tmp_path: Path) -> None:
    """So that a run goes on with its own config.toml."""
    copy = Path(shutil.copytree(usual.parent, tmp_path / "copy")) / "tiny"
    before = ticket_facts(copy)
    assert tombola("run", str(copy / "config.toml"), "--root", str(copy.parent)) == [0]
    assert ticket_facts(copy) == before


MISTAKES: list[Mistake] = [
    (EB.replace("0.5]", "0.0]"), (), "density = '0.3 0.0': must be above 0 and at most 1"),
    (EB.replace("0.5]", "0.3]"), (), "give at least one, and each once"),
    (EB + 'of = "filters"\n', (), "of"),
    (EB.replace("0.08", "1.0"), (), "distance = '1.0': must be at least 0 and below 1"),
    (EB.replace("0.08", "-0.1"), (), "distance = '-0.1': must be at least 0 and below 1"),
    (EB + "penalty = -1.0\n", (), "penalty = '-1.0': must not be negative"),
    (EB.replace('"2it"', '"2"'), (), "interval = '2': is not a duration"),
    (EB + 'search = "half"\n', (), "search = 'half': is not a duration"),
    (EB.replace('["random"]', '["reinit"]'), (), "controls"),
    (EB, ("--model.norm", "group"), "stages.eb: cifar_resnet8: channels are ranked by the scales"),
    (EB, ("--model.basis", "dct"), "model.basis = 'dct': a filter of coefficients is no channel"),
    (EB, ("--model.activation", "sign"), "after the sign a channel of zeros is one of ones"),
    (
        EB.replace("0.5]", "0.1]"),
        (),
        "stages.eb: cifar_resnet8: density = 0.1 keeps 8 of 84 channels, which is less than one in "
        "each of 9 layers: keep at least 0.1071",
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_one_clear_line(
    mistake: Mistake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(mistake, tmp_path, capsys, base=BASE)


LATE: list[tuple[str, str]] = [
    (EB.replace('"2it"', '"1%"'), "stages.eb.interval = '1%': is less than one step"),
    (
        EB.replace('"2it"', '"0.5ep"'),
        "stages.eb.interval = '0.5ep': 5 masks, which a ticket takes, are there after 35 steps, "
        "and the search ends at step 25 of 26: choose a shorter interval, or a longer search",
    ),
    (EB + 'search = "9it"\n', "are there after 10 steps, and the search ends at step 9 of 26"),
    (
        EB.replace("0.5]", "0.01]") + 'of = "weights"\n',
        "stages.eb: cifar_resnet8: density = 0.01: one channel in each of 9 layers takes",
    ),
]


@pytest.mark.parametrize(("stage", "expected"), LATE, ids=range(len(LATE)))
def test_what_only_the_data_tell_is_one_line_before_any_training(
    stage: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused_by_data(BASE + stage, expected, tmp_path, capsys, "eb")
