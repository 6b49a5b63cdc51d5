"""Iterative magnitude pruning: levels, rewinding, retraining modes, controls."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TOML, facts, ticket_facts, write_config
from torch import Tensor

from launch.cli import run_command
from pruning.imp import ImpConfig
from pruning.tickets import Ticket
from train.safe_dcp import read_tensors


def run(folder: Path, *overrides: str, text: str = TOML) -> Path:
    assert run_command(["run", write_config(folder, text), "--root", str(folder), *overrides]) == 0
    return folder / "tiny"


def state(run: Path, level: str, step: int) -> dict[str, Tensor]:
    """The model and optimizer of a level's checkpoint."""
    return read_tensors(f"{run}/imp/{level}/checkpoints/step-{step:08d}", is_local=True)


def model_at(run: Path, level: str, step: int) -> dict[str, Tensor]:
    tensors = state(run, level, step)
    return {k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds of 40 %, k = 5, every control, a checkpoint every 6 steps, all kept."""
    folder = tmp_path_factory.mktemp("imp")
    controls = ("--stages.imp.controls", "random", "reinit", "oneshot")
    return run(folder, *controls, "--checkpoint.every", "6it", "--checkpoint.keep", "99")


def test_each_level_prunes_the_ceiling_of_its_share(finished: Path) -> None:
    """ceil(0.4 R) of the R survivors go; level 0 is dense."""
    kept = [Ticket.load(finished / f"imp/level-0{level}").masks.kept for level in range(3)]
    size = Ticket.load(finished / "imp/level-00").masks.size
    first = size - -(-size * 2 // 5)
    assert kept == [size, first, first - -(-first * 2 // 5)]


def test_a_level_keeps_the_largest_final_weights_of_the_one_before(finished: Path) -> None:
    """Against an independent sort of |W_T| over all layers, among the survivors."""
    for level in (1, 2):
        parent = Ticket.load(finished / f"imp/level-0{level - 1}")
        masks = Ticket.load(finished / f"imp/level-0{level}").masks
        final = model_at(finished, f"level-0{level - 1}", 39)
        scores = torch.cat(
            [(final[n].abs() * m - (~m).float()).flatten() for n, m in parent.masks.items()]
        )
        expected = scores.sort(descending=True, stable=True).indices[: masks.kept].sort().values
        chosen = torch.cat([mask.flatten() for mask in masks.values()]).nonzero().flatten()
        assert torch.equal(chosen, expected)


def test_lineage_goes_from_level_to_level(finished: Path) -> None:
    """A level's parent is the level before, a control's the ticket that it is compared with."""
    tickets = ticket_facts(finished)
    assert tickets["imp/level-00"]["parent"] is None
    assert tickets["imp/level-02"]["parent"] == tickets["imp/level-01"]["id"]
    for control in ("random", "reinit", "oneshot"):
        assert tickets[f"imp/level-02-{control}"]["parent"] == tickets["imp/level-02"]["id"]


def test_a_level_starts_from_the_masked_weights_and_buffers_of_step_k(finished: Path) -> None:
    """The ticket's own W_k is the dense training's state at step 5, batch statistics included."""
    at_k = model_at(finished, "level-00", 5)
    ticket = Ticket.load(finished / "imp/level-02")
    assert ticket.step == 5
    weights = ticket.weights()
    assert weights.keys() == at_k.keys()
    assert all(torch.equal(weights[name], value) for name, value in at_k.items())
    assert not (finished / "imp/level-01/checkpoints/step-00000005").exists()
    assert (finished / "imp/level-01/checkpoints/step-00000006").exists()


def test_masked_weights_and_momentum_are_zero_in_every_checkpoint(finished: Path) -> None:
    """At every checkpoint of every level, controls included."""
    checked = 0
    for folder in sorted(finished.glob("imp/*/checkpoints/step-*")):
        masks = Ticket.load(folder.parent.parent).masks
        tensors = read_tensors(str(folder), is_local=True)
        for name, mask in masks.items():
            assert not tensors[f"model/{name}"][~mask].any()
            momentum = tensors.get(f"optimizer/state/{name}/momentum_buffer")
            assert momentum is None or not momentum[~mask].any()
        checked += 1
    assert checked == 8 + 8 * 7


def test_the_controls_are_what_their_names_say(finished: Path) -> None:
    """random: as many per layer; reinit: the same masks, fresh weights; oneshot: by |W_k|."""
    ticket = Ticket.load(finished / "imp/level-02")
    random, reinit, oneshot = (
        Ticket.load(finished / f"imp/level-02-{name}") for name in ("random", "reinit", "oneshot")
    )
    assert [r.kept for r in random.masks.table()] == [r.kept for r in ticket.masks.table()]
    assert random.masks.digest() != ticket.masks.digest()
    assert random.weights_digest == ticket.weights_digest
    assert reinit.masks.digest() == ticket.masks.digest()
    fresh, at_k = reinit.weights(), ticket.weights()
    assert not torch.equal(fresh["conv1.weight"], at_k["conv1.weight"])
    assert fresh["norm1.running_mean"].abs().sum() == 0
    scores = torch.cat([at_k[name].abs().flatten() for name in oneshot.masks])
    threshold = scores.sort(descending=True).values[oneshot.masks.kept - 1]
    for name, mask in oneshot.masks.items():
        assert torch.equal(mask, at_k[name].abs() >= threshold)
    assert oneshot.masks.kept == ticket.masks.kept


def test_every_arm_trains_the_same_steps_on_the_original_schedule(finished: Path) -> None:
    """From k to T; the learning rate at a step is that of the dense training at this step."""
    rates: dict[str, dict[int, float]] = {}
    for fact in facts(finished):
        if fact["event"] == "train":
            rates.setdefault(fact["level"], {})[fact["step"]] = fact["lr"]
    dense = rates.pop("level-00")
    assert len(rates) == 8
    for level in rates.values():
        assert level == {step: rate for step, rate in dense.items() if step > 5}


def test_learning_rate_rewinding_keeps_the_weights(tmp_path: Path) -> None:
    """lr: a level starts from the last survivors, at step k of the schedule, and has no W_k."""
    done = run(
        tmp_path, "--stages.imp.mode", "lr", "--checkpoint.every", "6it", "--checkpoint.keep", "99"
    )
    _assert_goes_on_from_the_end(done, first_rate=0.1 * (1 - 5 / 39))
    assert ticket_facts(done)["imp/level-01"]["weights"] is None


def test_fine_tuning_keeps_the_weights_at_the_final_rate(tmp_path: Path) -> None:
    """finetune: the same number of steps, all at the rate with which the training ended."""
    options = (
        "--stages.imp.mode",
        "finetune",
        "--checkpoint.every",
        "1it",
        "--checkpoint.keep",
        "99",
    )
    done = run(tmp_path, *options)
    _assert_goes_on_from_the_end(done, first_rate=0.1 * (1 - 38 / 39))
    rates = {f["lr"] for f in facts(done) if f["event"] == "train" and f["level"] == "level-01"}
    assert len(rates) == 1
    assert rates.pop() == pytest.approx(0.1 * (1 - 38 / 39))


def _assert_goes_on_from_the_end(run: Path, first_rate: float) -> None:
    """After one step from W_T without momentum, no weight is further away than that step."""
    masks = Ticket.load(run / "imp/level-01").masks
    before, after = model_at(run, "level-00", 39), model_at(run, "level-01", 6)
    momentum = state(run, "level-01", 6)
    for name, mask in masks.items():
        step = first_rate * momentum[f"optimizer/state/{name}/momentum_buffer"]
        torch.testing.assert_close(after[name], before[name] * mask - step, rtol=0, atol=1e-6)


def test_the_optimizer_is_fresh_or_that_of_step_k(tmp_path: Path) -> None:
    """With `rewind_optimizer` the first step carries the momentum of step k, masked."""
    done = run(
        tmp_path,
        *("--stages.imp.rewind_optimizer", "true", "--stages.imp.rounds", "1"),
        *("--checkpoint.every", "6it", "--checkpoint.keep", "99"),
    )
    masks = Ticket.load(done / "imp/level-01").masks
    name = "fc.weight"
    at_k, after = state(done, "level-00", 5), state(done, "level-01", 6)
    key = f"optimizer/state/{name}/momentum_buffer"
    start = at_k[f"model/{name}"] * masks[name]
    rate = 0.1 * (1 - 5 / 39)
    torch.testing.assert_close(after[f"model/{name}"], start - rate * after[key], rtol=0, atol=1e-6)
    carried = after[key] - 0.9 * at_k[key] * masks[name]
    assert carried.norm() < after[key].norm()


def test_every_level_has_its_own_order_unless_told_otherwise(tmp_path: Path) -> None:
    """`same_order` gives all levels one stream of data; the first losses show it."""
    losses: dict[str, Any] = {}
    for option in ("false", "true"):
        (tmp_path / option).mkdir()
        full = ("--stages.imp.prune_fraction", "0.0001", "--stages.imp.rewind", "init")
        done = run(tmp_path / option, *full, "--stages.imp.same_order", option, "--log.every", "1")
        losses[option] = [
            f["loss"] for f in facts(done) if f["event"] == "train" and f["step"] == 1
        ]
    assert losses["true"][1] == pytest.approx(losses["true"][0], abs=1e-2)
    assert abs(losses["false"][1] - losses["false"][0]) > 1e-2


def test_layer_scope_prunes_each_layer_alike_and_excluded_layers_stay_dense(tmp_path: Path) -> None:
    options = ("--stages.imp.scope", "layer", "--stages.imp.exclude", "fc", "conv1")
    done = run(tmp_path, *options, "--stages.imp.controls")
    masks = Ticket.load(done / "imp/level-01").masks
    assert "fc.weight" not in masks
    assert "conv1.weight" not in masks
    for row in masks.table():
        assert row.kept == row.size - -(-row.size * 2 // 5)


def test_rewinding_to_init_keeps_the_initial_weights(tmp_path: Path) -> None:
    done = run(tmp_path, "--stages.imp.rewind", "init", "--stages.imp.controls")
    ticket = Ticket.load(done / "imp/level-02")
    assert ticket.step == 0
    assert ticket.weights()["norm1.running_mean"].abs().sum() == 0


def test_density_gives_the_number_of_rounds() -> None:
    """0.8^16 = 2.8 %; a density that a whole number of rounds reaches needs no round more."""
    assert ImpConfig(prune_fraction=0.2, density=0.03).num_rounds == 16
    assert ImpConfig(prune_fraction=0.5, density=0.25).num_rounds == 2
    assert ImpConfig(prune_fraction=0.2, density=0.8**10).num_rounds == 10
    assert ImpConfig(prune_fraction=0.2, density=1.0).num_rounds == 0


def test_a_round_that_leaves_nothing_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """... and the levels before it stay."""
    words = ["run", write_config(tmp_path), "--root", str(tmp_path), "--stages.imp.controls"]
    assert run_command([*words, "--stages.imp.prune_fraction", "0.99999"]) == 2
    assert "leaves none of the" in capsys.readouterr().err
    assert (tmp_path / "tiny/imp/level-00/ticket.json").exists()
