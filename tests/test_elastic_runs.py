"""Elastic tickets as a stage of a run: sources, controls, lineage, resume, ranks, mistakes."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from family import BASE, DEEPER, IMP, SHALLOWER, Mistake, assert_refused, run
from idx_files import write_idx
from killing import KILLED, killed_run
from processes import run_ranks, tombola
from tiny import assert_same_run, facts, ticket_facts, write_config

from data.files import Folder
from launch.cli import run_command
from pruning.elastic import DepthChange, stages, transform
from pruning.masks import Masks
from pruning.store import TicketStore
from pruning.tickets import Ticket
from train.safe_dcp import read_tensors

CONTROLS = ("random", "reinit", "permuted", "snip")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """IMP on ResNet-14, its last ticket stretched with every control, two tickets squeezed."""
    folder = tmp_path_factory.mktemp("elastic")
    controls = ("--stages.deeper.controls", *CONTROLS, "--checkpoint.keep", "99")
    return run(folder, BASE + IMP + DEEPER + SHALLOWER, *controls)


def moved(source: Ticket, target: Ticket) -> tuple[dict[str, torch.Tensor], Masks]:
    """Weights and masks of the source, moved by the pure functions."""
    change = DepthChange.between(stages(source.outline()), stages(target.outline()))
    shapes = target.outline().state_dict()
    names = [name for name in shapes if change.origin(name) in source.masks]
    weights = transform(source.weights(), change, shapes)
    return weights, Masks(transform(source.masks, change, {n: shapes[n] for n in names}))


def test_an_elastic_ticket_is_its_source_transformed(finished: Path) -> None:
    """Masks and weights of step k, statistics included, by one map; of the right model."""
    source, ticket = (
        Ticket.load(finished / "imp/level-02"),
        Ticket.load(finished / "deeper/level-02"),
    )
    weights, masks = moved(source, ticket)
    assert ticket.model.name == "cifar_resnet20"
    assert ticket.masks.digest() == masks.digest()
    stored = ticket.weights()
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[name], value) for name, value in weights.items())
    assert ticket.density == pytest.approx(masks.density)
    assert ticket.density != pytest.approx(source.density, rel=1e-3)  # replication drifts it


def test_its_parent_is_the_source(finished: Path) -> None:
    tickets = ticket_facts(finished)
    ticket = tickets["deeper/level-02"]
    assert ticket["parent"] == tickets["imp/level-02"]["id"]
    assert [a["place"] for a in ticket["lineage"]] == [
        "imp/level-02",
        "imp/level-01",
        "imp/level-00",
    ]
    assert ticket["method"] == "elastic"
    assert ticket["step"] == 5
    assert ticket["config"]["map"] == "0:0;1:1,2"
    for control in CONTROLS:
        assert tickets[f"deeper/level-02-{control}"]["parent"] == ticket["id"]


def test_it_trains_from_step_k_on_the_targets_schedule(finished: Path) -> None:
    """The first step after k is 6; the rates are those of the dense training at these steps."""
    rates: dict[str, dict[int, float]] = {}
    for fact in facts(finished):
        if fact["event"] == "train":
            rates.setdefault(f"{fact['stage']}/{fact['level']}", {})[fact["step"]] = fact["lr"]
    dense = {step: rate for step, rate in rates["imp/level-00"].items() if step > 5}
    assert len(set(dense.values())) == len(dense)  # no rate is that of another step
    assert rates["deeper/level-02"] == dense
    assert rates["deeper/level-02-reinit"] == dense
    first = finished / "deeper/level-02/checkpoints"
    assert min(path.name for path in first.iterdir()) == "step-00000008"


def test_the_first_step_is_taken_from_the_masked_weights(tmp_path: Path) -> None:
    """At step k + 1 no weight is further from W_k than the first step, without old momentum."""
    words = ("--checkpoint.every", "1it", "--checkpoint.keep", "99")
    done = run(tmp_path, BASE + IMP + DEEPER, *words)
    ticket = Ticket.load(done / "deeper/level-02")
    after = read_tensors(str(done / "deeper/level-02/checkpoints/step-00000006"), is_local=True)
    rate = 0.1 * (1 - 5 / 26)  # of step 5, linear over 2 epochs of 13 steps
    weights = ticket.weights()
    for name, mask in ticket.masks.items():
        step = rate * after[f"optimizer/state/{name}/momentum_buffer"]
        expected = weights[name] * mask - step
        torch.testing.assert_close(after[f"model/{name}"], expected, rtol=0, atol=1e-6)


def test_masked_weights_stay_zero(finished: Path) -> None:
    """In every checkpoint of every arm."""
    checked = 0
    for folder in sorted(finished.glob("deeper/*/checkpoints/step-*")):
        masks = Ticket.load(folder.parent.parent).masks
        tensors = read_tensors(str(folder), is_local=True)
        assert all(not tensors[f"model/{name}"][~mask].any() for name, mask in masks.items())
        checked += 1
    assert checked >= 15


def test_the_controls_are_what_their_names_say(finished: Path) -> None:
    """random: as many per layer; reinit: other weights; permuted and snip: other replicas only."""
    ticket = Ticket.load(finished / "deeper/level-02")
    beside = {name: Ticket.load(finished / f"deeper/level-02-{name}") for name in CONTROLS}
    counts = [row.kept for row in ticket.masks.table()]
    for name in ("random", "reinit", "permuted"):
        assert [row.kept for row in beside[name].masks.table()] == counts
    assert beside["reinit"].masks.digest() == ticket.masks.digest()
    assert beside["reinit"].weights_digest != ticket.weights_digest
    for name in ("random", "permuted", "snip"):
        assert beside[name].weights_digest == ticket.weights_digest
        assert beside[name].masks.kept == ticket.masks.kept
    replicas = {name for name in ticket.masks if name.split(".")[:1] == ["stages"]}
    replicas = {name for name in replicas if name.split(".")[2] == "2"}
    for name in ("permuted", "snip"):
        masks = beside[name].masks
        changed = {n for n in masks if not torch.equal(masks[n], ticket.masks[n])}
        assert changed <= replicas
        assert len(changed) > len(replicas) / 2
    assert beside["random"].masks.digest() != ticket.masks.digest()


def test_several_levels_are_squeezed_by_their_order(finished: Path) -> None:
    """ResNet-14 to 8 keeps the first block of each stage; level 0 stays dense."""
    dense, sparse = (Ticket.load(finished / f"shallower/level-0{level}") for level in (0, 2))
    assert dense.density == 1.0
    assert dense.config["map"] == sparse.config["map"] == "0:0"
    assert sparse.parent == Ticket.load(finished / "imp/level-02").id


def test_the_tables_show_controls_and_how_far_imp_is(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Running a finished run again trains nothing and prints the same."""
    root = finished.parent
    words = ["--stages.deeper.controls", *CONTROLS, "--checkpoint.keep", "99"]
    assert run_command(["run", str(root / "tiny.toml"), "--root", str(root), *words]) == 0
    printed = capsys.readouterr().out
    assert "deeper: test accuracy" in printed
    assert "permut" in printed
    assert "in the paper it stays 0.5 to 2.3 points under IMP's" in " ".join(printed.split())


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Within the training of an elastic ticket, and between masks and training of a control."""
    text = BASE + IMP + DEEPER + 'controls = ["snip"]\n'
    (tmp_path / "reference").mkdir()
    reference = run(tmp_path / "reference", text)
    for point, count in (("a step", 65), ("a save, before its manifest", 14), ("two levels", 4)):
        root = tmp_path / f"{count}"
        root.mkdir()
        words = ["run", write_config(root, text), "--root", str(root)]
        assert run_ranks(1, killed_run, words, point, count) == [KILLED]
        assert tombola(*words) == [0]
        assert_same_run(root / "tiny", reference)


# ---- where tickets come from


def test_two_ranks_come_to_the_same_ticket_as_one(finished: Path, tmp_path: Path) -> None:
    """From one source the same tickets and controls, whatever the ranks sum in another order."""
    text = BASE + DEEPER.replace('"imp"', f'"{finished}/imp"') + 'controls = ["permuted"]\n'
    found = on_one_and_two_ranks(text, tmp_path)
    ids = [{name: t["id"] for name, t in tickets.items()} for tickets in found]
    assert ids[0] == ids[1]
    assert ids[0]["deeper/level-02"] == Ticket.load(finished / "deeper/level-02").id


def on_one_and_two_ranks(text: str, folder: Path) -> list[dict[str, dict[str, Any]]]:
    """The tickets of the same run on one rank and on two."""
    found = []
    for world_size in (1, 2):
        root = folder / str(world_size)
        root.mkdir()
        words = ["run", write_config(root, text), "--root", str(root)]
        assert tombola(*words, world_size=world_size) == [0] * world_size
        found.append(ticket_facts(root / "tiny"))
    return found


def test_two_ranks_choose_replicas_by_snip_as_one_does(tmp_path: Path) -> None:
    """Without batch statistics, which are those of a rank's share; but for ties by rounding."""
    group = BASE.replace("width = 4", 'width = 4\nnorm = "group"')
    (tmp_path / "source").mkdir()
    source = run(tmp_path / "source", group + IMP)
    text = group + DEEPER.replace('"imp"', f'"{source}/imp"') + 'controls = ["snip"]\n'
    on_one_and_two_ranks(text, tmp_path)
    one, two = (
        Ticket.load(tmp_path / f"{ranks}/tiny/deeper/level-02-snip").masks for ranks in (1, 2)
    )
    assert one.kept == two.kept
    assert (one & two).kept >= one.kept - 2


@pytest.mark.parametrize("kind", ["level", "stage", "below the root", "store", "beginning"])
def test_a_ticket_comes_from(kind: str, finished: Path, tmp_path: Path) -> None:
    """... a level of another run, its stage, a run beside this one, or a store by its id."""
    source = Ticket.load(finished / "imp/level-02")
    store = TicketStore(Folder(tmp_path / "store"))
    store.add(source)
    shutil.copytree(finished, tmp_path / "other")
    place = {
        "level": f"{finished}/imp/level-02",
        "stage": f"{finished}/imp",
        "below the root": "other/imp/level-02",
        "store": f"{tmp_path}/store/{source.id}.json",
        "beginning": f"file://{tmp_path}/store/{source.id[:8]}",
    }[kind]
    done = run(tmp_path, BASE + DEEPER.replace('"imp"', f'"{place}"'), "--train.total", "7it")
    assert ticket_facts(done)["deeper/level-02"]["parent"] == source.id


def test_a_resume_with_another_source_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run that it came from was trained anew: nothing is mixed, nothing is overwritten."""
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    text = BASE + DEEPER.replace('"imp"', f'"{other}/imp/level-02"')
    run(tmp_path, text, "--train.total", "7it")
    shutil.rmtree(other / "imp/level-02")
    shutil.copytree(other / "imp/level-01", other / "imp/level-02")
    (tmp_path / "tiny/deeper/level-02/ticket.json").unlink()  # as before the training ended
    words = ["run", str(tmp_path / "tiny.toml"), "--root", str(tmp_path), "--train.total", "7it"]
    assert run_command(words) == 2
    assert "was begun with other tickets" in capsys.readouterr().err


def test_a_finished_stage_needs_its_source_no_more(finished: Path, tmp_path: Path) -> None:
    """The run that it came from is gone: the same command still does nothing, and well."""
    shutil.copytree(finished, tmp_path / "other")
    text = BASE + DEEPER.replace('"imp"', '"other/imp"') + 'controls = ["random"]\n'
    done = run(tmp_path, text, "--train.total", "7it")
    before = facts(done), ticket_facts(done)
    shutil.rmtree(tmp_path / "other")
    run(tmp_path, text, "--train.total", "7it")
    assert (facts(done), ticket_facts(done)) == before


# ---- another data set


def test_a_ticket_moves_to_another_data_set(finished: Path, tmp_path: Path) -> None:
    """From step 0 of the schedule; the head is copied where the classes are as many."""
    write_idx(tmp_path / "idx", num_classes=10)
    options = ("--data.source", f"idx:{tmp_path}/idx", "--data.batch_size", "32")
    text = BASE + DEEPER.replace('"imp"', f'"{finished}/imp"') + "transfer = true\n"
    done = run(tmp_path, text, *options, "--train.total", "3it")
    ticket, source = Ticket.load(done / "deeper/level-02"), Ticket.load(finished / "imp/level-02")
    weights, masks = moved(source, ticket)
    assert ticket.step == 0
    assert ticket.masks.digest() == masks.digest()
    assert torch.equal(ticket.weights()["fc.weight"], weights["fc.weight"])
    steps = {f["step"] for f in facts(done) if f["event"] == "train"}
    assert min(steps) <= 3


@pytest.mark.parametrize("num_classes", [7, 10])
def test_a_fresh_head_is_dense(num_classes: int, finished: Path, tmp_path: Path) -> None:
    """For another number of classes, or on request; all else is copied."""
    write_idx(tmp_path / "idx", num_classes=num_classes)
    text = BASE + DEEPER.replace('"imp"', f'"{finished}/imp"') + "transfer = true\n"
    fresh = ("--stages.deeper.head", "fresh") if num_classes == 10 else ()
    options = ("--data.source", f"idx:{tmp_path}/idx", "--data.batch_size", "32", *fresh)
    done = run(tmp_path, text, *options, "--train.total", "3it")
    ticket, source = Ticket.load(done / "deeper/level-02"), Ticket.load(finished / "imp/level-02")
    assert ticket.model.num_classes == num_classes
    assert ticket.masks["fc.weight"].all()
    assert list(ticket.masks) == list(Masks.ones(ticket.outline()))
    assert torch.equal(ticket.weights()["conv1.weight"], source.weights()["conv1.weight"])
    if num_classes == 10:
        assert not torch.equal(ticket.weights()["fc.weight"], source.weights()["fc.weight"])


# ---- mistakes


MISTAKES: dict[str, Mistake] = {
    "no such stage": (
        IMP + DEEPER.replace('"imp"', '"ipm"'),
        (),
        "stages.deeper.ticket = 'ipm': is no earlier stage; did you mean 'imp'? (earlier stages",
    ),
    "a later stage": (
        DEEPER + IMP,
        (),
        "is no earlier stage (there is no earlier stage with tickets)",
    ),
    "another family": (
        IMP + DEEPER,
        ("--stages.deeper.model.name", "cifar_vgg16"),
        "a ticket of cifar_resnet14 cannot become one of cifar_vgg16: another number of stages",
    ),
    "another width": (
        IMP + DEEPER,
        ("--stages.deeper.model.width", "8"),
        "conv1.weight is of another shape: 4x3x3x3 there, 8x3x3x3 here",
    ),
    "learning-rate rewinding": (
        IMP + DEEPER,
        ("--stages.imp.mode", "lr"),
        "keeps no weights of step k to train another ticket from; set mode = 'weights' there",
    ),
    "no such level": (
        IMP + DEEPER,
        ("--stages.deeper.levels", "9"),
        "stages.deeper.ticket = 'imp': there is no level 9 (there is 0, 1, 2)",
    ),
    "a map of another depth": (
        IMP + DEEPER,
        ("--stages.deeper.map", "0:0;1:1"),
        "map = '0:0;1:1': covers 2 blocks, stages.0 has 3",
    ),
    "no map": (IMP + DEEPER, ("--stages.deeper.map", "0-0"), "is not SOURCE:TARGET"),
    "nothing to permute": (
        IMP + SHALLOWER,
        ("--stages.shallower.controls", "permuted"),
        "controls = 'permuted': no block is replicated; leave it out",
    ),
    "a head without a transfer": (
        IMP + DEEPER,
        ("--stages.deeper.head", "fresh"),
        "needs transfer = true, for another data set",
    ),
    "no place": (
        DEEPER.replace('"imp"', '"runs/none"'),
        (),
        "ticket = 'runs/none': runs/none: no ticket here",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_trained(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(MISTAKES[name], tmp_path, capsys)


def test_a_ticket_is_required(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = BASE + IMP + DEEPER.replace('ticket = "imp"\n', "")
    assert run_command(["run", write_config(tmp_path, text), "--root", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: stages.deeper.ticket: is required\n"


def test_a_setting_that_a_stage_inherits_is_refused_with_its_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shared width is none of timm's RegNets'."""
    text = BASE + IMP + DEEPER.replace("cifar_resnet20", "regnetx_002")
    assert run_command(["run", write_config(tmp_path, text), "--root", str(tmp_path)]) == 2
    assert "(in stage 'deeper', which sets model.name)" in capsys.readouterr().err


def test_a_stage_without_results_may_change_and_come_later(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the finished stages came to stays; a stage with results may not change."""
    done = run(tmp_path, BASE + IMP)
    before = ticket_facts(done)
    later = BASE + IMP + DEEPER + "levels = [1]\n"
    words = ["run", write_config(tmp_path, later), "--root", str(tmp_path)]
    assert run_command([*words, "--stages.deeper.train.total", "4it"]) == 2  # before step k
    assert run_command([*words, "--stages.deeper.train.total", "9it"]) == 0
    tickets = ticket_facts(done)
    assert tickets.keys() - before.keys() == {"deeper/level-01"}
    assert all(tickets[name] == ticket for name, ticket in before.items())
    capsys.readouterr()
    assert run_command([*words, "--stages.deeper.train.total", "8it"]) == 2
    assert "stages.deeper.train.total is '9it' there and '8it' here" in capsys.readouterr().err
    assert run_command([*words, "--stages.imp.rounds", "1"]) == 2


def test_a_place_that_is_a_run_says_what_to_name(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = BASE + DEEPER.replace('"imp"', f'"{finished}/"')
    assert run_command(["run", write_config(tmp_path, text), "--root", str(tmp_path)]) == 2
    assert "is a run: name a stage or a level of it, as RUN/STAGE" in capsys.readouterr().err


def test_sources_that_cannot_be_used_are_one_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another number of classes or channels, a step beyond the end, weights that are gone."""
    write_idx(tmp_path / "idx", num_classes=7)
    text = BASE + DEEPER.replace('"imp"', f'"{finished}/imp"')
    other_data = ("--data.source", f"idx:{tmp_path}/idx", "--data.batch_size", "32")
    expected: list[tuple[tuple[str, ...], str]] = [
        (other_data, "its head has 10 classes, the data have 7; for another data set set transfer"),
        (
            ("--train.total", "5it"),
            "is of step 5: must be before the end",
        ),
        (("--stages.deeper.levels", "7"), "there is no level 7 (there is 0, 1, 2)"),
    ]
    for options, line in expected:
        words = ["run", write_config(tmp_path, text), "--root", str(tmp_path), *options]
        assert run_command(words) == 2
        assert line in capsys.readouterr().err
        assert not (tmp_path / "tiny/deeper").exists()


def test_lost_weights_of_step_k_are_one_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The object that is missing is named; nothing is half begun, so another source may follow."""
    shutil.copytree(finished, tmp_path / "other")
    weights = Ticket.load(finished / "imp/level-02").stored_weights
    assert weights is not None
    lost = tmp_path / f"other/tickets/objects/{weights.files[0].sha256}.safetensors"
    lost.unlink()
    text = BASE + DEEPER.replace('"imp"', '"other/imp"')
    assert run_command(["run", write_config(tmp_path, text), "--root", str(tmp_path)]) == 1
    printed = capsys.readouterr().err
    assert str(lost.name) in printed
    assert printed.count("\n") == 1
    assert {path.name for path in (tmp_path / "tiny/deeper").iterdir()} == {"sources.json"}
    assert not (tmp_path / "tiny/tickets").exists()
    mended = BASE + DEEPER.replace('"imp"', f'"{finished}/imp"')
    assert ticket_facts(run(tmp_path, mended, "--train.total", "7it"))


def test_a_ticket_of_learning_rate_rewinding_in_another_run_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(tmp_path, BASE + IMP, "--stages.imp.mode", "lr", "--stages.imp.rounds", "1")
    text = BASE + DEEPER.replace('"imp"', f'"{done}/imp"')
    words = ["run", write_config(tmp_path, text), "--root", str(tmp_path), "--name", "next"]
    assert run_command(words) == 2
    assert "imp/level-01 has no weights of step k" in capsys.readouterr().err
