"""Dynamic sparse training as stages of runs: found, resumed, refused, on one rank and on two."""

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
from processes import command, run_ranks, tombola
from tiny import TOML, assert_same_run, facts, final_states, ticket_facts, write_config

from pruning import dynamic
from pruning.allocate import count_for
from pruning.densities import erk, uniform
from pruning.masks import Masks
from pruning.rewiring import Rewiring
from pruning.tickets import Ticket
from train.engine import Engine
from train.session import Outcome, Session

BASE = TOML[: TOML.index("[[stages]]")].replace("3ep", "2ep")
"""two epochs of 13 steps"""
SET = """
[[stages]]
name = "moving"
recipe = "dynamic"
method = "set"
density = 0.3
interval = "4it"
"""
RIGL = SET.replace('"set"', '"rigl"')
GMP = SET.replace('"set"', '"gmp"') + 'start = "3it"\n'
STAGES = {"set": SET, "rigl": RIGL, "gmp": GMP}
IMP = '[[stages]]\nname = "imp"\nrecipe = "imp"\nrounds = 0\n'


def shapes_of(ticket: Ticket) -> dict[str, tuple[int, ...]]:
    return {row.name: row.shape for row in ticket.masks.table()}


def initial_masks(folder: Path, level: str) -> Masks:
    """The masks with which the training of a level began."""
    from data.files import Folder
    from pruning.mask_store import read_masks
    from pruning.store import TicketFolder
    from train.ranks import ALONE

    tickets = TicketFolder(Folder(str(folder)))
    stored = tickets.chosen_masks("moving", level)
    assert stored is not None
    return read_masks(tickets.objects, stored, ALONE)


# ---- what a stage makes


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RigL at two densities, each beside its static control."""
    text = RIGL.replace("0.3", "[0.1, 0.3]") + 'controls = ["static"]\n'
    return run(tmp_path_factory.mktemp("sweep"), BASE + text)


def test_a_sweep_makes_one_ticket_a_density(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The densest first, each layer with exactly its ERK count, in one table and one picture."""
    for level, density in enumerate((0.3, 0.1)):
        ticket = Ticket.load(sweep / f"moving/level-0{level}")
        assert (ticket.method, ticket.level, ticket.step) == ("rigl", level, 0)
        kept = {row.name: row.kept for row in ticket.masks.table()}
        assert kept == erk(shapes_of(ticket), density)
        assert ticket.masks.kept == count_for(density, ticket.masks.size)
        assert ticket.timing["search_steps"] == 0
        assert ticket.timing["steps"] == 26
        assert 0 < ticket.metrics["test"]["accuracy"] <= 1
    assert (sweep / "accuracy.png").stat().st_size > 10_000
    assert run(sweep.parent, (sweep.parent / "tiny.toml").read_text()) == sweep
    table = capsys.readouterr().out
    assert "moving: test accuracy" in table
    assert all(text in table for text in ("static", " 9.99%", "30.00%"))


def test_a_ticket_has_the_masks_of_the_end_and_the_weights_of_the_beginning(sweep: Path) -> None:
    """Weights at step 0, whole; the static control keeps the masks that the ticket began with."""
    tickets = [Ticket.load(sweep / f"moving/level-0{level}") for level in (0, 1)]
    assert tickets[0].weights_digest == tickets[1].weights_digest
    assert bool((tickets[0].weights()["stages.0.0.conv1.weight"] != 0).all())
    control = Ticket.load(sweep / "moving/level-01-static")
    assert (control.method, control.control, control.parent) == ("static", True, tickets[1].id)
    assert control.masks == initial_masks(sweep, "level-01") != tickets[1].masks
    final = final_states(sweep)["moving/level-01/checkpoints"]
    for name, mask in tickets[1].masks.items():
        assert not final[f"model/{name}"][~mask].any()


def test_sparser_masks_begin_within_denser_ones(sweep: Path) -> None:
    """All densities and methods start from the same random places."""
    sparse, dense = (initial_masks(sweep, f"level-0{level}") for level in (1, 0))
    assert (sparse & dense) == sparse


def test_the_rate_of_exploration_is_told(sweep: Path) -> None:
    """In the records it never falls, and the ticket has the last; a control explores nothing."""
    lines = [f for f in facts(sweep) if f["event"] == "train"]
    told = [f["explored"] for f in lines if f["level"] == "level-01"]
    ticket = Ticket.load(sweep / "moving/level-01")
    assert told == sorted(told)
    assert ticket.density < told[-1] < 1
    assert ticket.metrics["sparsity"] == {"explored": told[-1]}
    assert "sparsity" not in Ticket.load(sweep / "moving/level-01-static").metrics
    assert {"explored" in f for f in lines if f["level"] == "level-01-static"} == {False}


@pytest.mark.parametrize("densities", ["uniform", "erk"])
def test_set_keeps_the_counts_of_its_layers(densities: str, tmp_path: Path) -> None:
    folder = run(tmp_path, BASE + SET + f'densities = "{densities}"\nexclude = ["conv1"]\n')
    ticket = Ticket.load(folder / "moving/level-00")
    solve = {"uniform": uniform, "erk": erk}[densities]
    assert {row.name: row.kept for row in ticket.masks.table()} == solve(shapes_of(ticket), 0.3)
    assert "conv1.weight" not in ticket.masks
    assert ticket.masks != initial_masks(folder, "level-00")


@pytest.mark.parametrize(("scope", "initial"), [("layer", 1.0), ("global", 0.8)])
def test_gradual_pruning_goes_down_by_the_cubic(scope: str, initial: float, tmp_path: Path) -> None:
    """From `initial` on, every four steps from step 3 to the end of the ramp at 75 %."""
    options = f'scope = "{scope}"\ninitial = {initial}\nexclude = ["conv1"]\n'
    folder = run(tmp_path, BASE + GMP + options, "--log.every", "1")
    ticket = Ticket.load(folder / "moving/level-00")
    size = ticket.masks.size
    assert "conv1.weight" not in ticket.masks
    told = {f["step"]: f["density"] for f in facts(folder) if f["event"] == "train"}
    for step in range(1, 27):
        last = 20 if step >= 20 else 3 + (step - 3) // 4 * 4
        expected = 0.3 + (initial - 0.3) * (1 - (last - 3) / 17) ** 3 if step >= 3 else 1
        assert told[step] == pytest.approx(expected, abs=1e-3), step
    if scope == "global":
        assert ticket.masks.kept == count_for(0.3, size)
    else:
        assert {row.name: row.kept for row in ticket.masks.table()} == uniform(
            shapes_of(ticket), 0.3
        )


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_what_is_moved_and_when_is_what_the_configuration_says(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Rewiring] = []
    train = Session.train

    def watched(self: Session, *arguments: Any) -> Outcome:
        found.append(arguments[-1].keywords["rewiring"])
        return train(self, *arguments)

    monkeypatch.setattr(Session, "train", watched)
    run(
        tmp_path, BASE + STAGES[method] + 'fraction = 0.6\nuntil = "50%"\n', "--train.total", "10it"
    )
    assert found == [Rewiring(interval=4, fraction=0.6, until=5)]


def test_another_stage_trains_from_what_was_found(tmp_path: Path) -> None:
    """A ticket of RigL is one like any other."""
    line = """
[[stages]]
name = "line"
recipe = "connectivity"
ticket = "moving"
points = 3
"""
    folder = run(tmp_path, BASE + RIGL + line)
    assert (folder / "line/level-00/connectivity.json").exists()


def test_rigl_under_fp16_and_channels_last(tmp_path: Path) -> None:
    """The scaler is told of the steps that are not taken; masks are of the weights' own order."""
    folder = run(
        tmp_path, BASE + RIGL, "--train.precision", "fp16", "--train.channels-last", "true"
    )
    ticket = Ticket.load(folder / "moving/level-00")
    assert ticket.masks.kept == count_for(0.3, ticket.masks.size)
    assert ticket.masks != initial_masks(folder, "level-00")


# ---- resumed, and on several ranks


@pytest.mark.parametrize("options", [[], ["--train.micro_batch", "20", "--optimizer.name", "adam"]])
@pytest.mark.parametrize("method", STAGES)
def test_a_killed_run_goes_on_bit_for_bit(method: str, options: list[str], tmp_path: Path) -> None:
    """Weights, masks, what was explored, metrics and tickets are those of the uninterrupted run."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    text = BASE + STAGES[method]
    words = ["run", write_config(killed, text), "--root", str(killed), *options]
    assert run_ranks(1, killed_run, words, "a step", 13) == [KILLED]
    assert not (killed / "tiny/moving/level-00/ticket.json").exists()
    assert tombola(*words) == [0]
    assert_same_run(killed / "tiny", run(whole, text, *options))


def test_a_checkpoint_has_the_masks_as_bits(sweep: Path) -> None:
    """Eight weights a byte, the masks of now and of ever."""
    states = final_states(sweep)["moving/level-01/checkpoints"]
    ticket = Ticket.load(sweep / "moving/level-01")
    for row in ticket.masks.table():
        for kind in ("masks", "ever"):
            packed = states[f"sparsity/{kind}/{row.name}"]
            assert (packed.dtype, packed.numel()) == (torch.uint8, (row.size + 7) // 8)


@pytest.mark.parametrize("method", STAGES)
def test_a_run_killed_on_two_ranks_goes_on_bit_for_bit(method: str, tmp_path: Path) -> None:
    assert_goes_on_with_two_ranks(BASE + STAGES[method], tmp_path, step=13)


@pytest.mark.parametrize("method", STAGES)
def test_one_and_two_ranks_choose_the_same_masks(method: str, tmp_path: Path) -> None:
    """After 20 steps, with a normalisation that does not depend on the batch."""
    text = BASE.replace("width = 4", 'width = 8\nnorm = "group"').replace("2ep", "20it")
    assert_same_masks_on_two_ranks(
        text + STAGES[method], tmp_path, "moving/level-00", "--optimizer.lr", "0.02"
    )


def diverging(words: list[str]) -> None:
    """A run in which rank 1 sees another gradient than rank 0 when masks first change."""
    rewire = dynamic.RigL.before_update

    def other(self: Any, step: int) -> bool:
        if step == 4 and self._ranks.rank == 1:
            for name in self.masks:
                self._named[name].grad.flatten()[::3] = 9.0
        return rewire(self, step)

    dynamic.RigL.before_update = other  # type: ignore[method-assign]
    command(words, str(Path(words[1]).parent / "out"))


def test_ranks_whose_masks_differ_stop(tmp_path: Path) -> None:
    """At the first change after which they do."""
    words = ["run", write_config(tmp_path, BASE + RIGL), "--root", str(tmp_path)]
    assert run_ranks(2, diverging, words) == [1, 1]
    printed = (tmp_path / "out.0").read_text()
    assert "the masks after 4 steps differ between the ranks" in printed


def overflowing(folder: str) -> None:
    """Rank 1 alone has an infinite gradient when masks should change; says what became of it."""
    engine, model = Engine(), torch.nn.Linear(8, 1, bias=False)
    model.weight.data = torch.arange(8.0).view(1, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    masks = Masks({"weight": torch.arange(8).view(1, 8) % 2 == 0})
    sparsity = dynamic.RigL(masks, model, optimizer, rewiring=Rewiring(2, 0.5, 100), ranks=engine)
    model.weight.grad = torch.ones(1, 8)
    if engine.rank == 1:
        model.weight.grad[0, 3] = torch.inf
    taken = [sparsity.before_update(2)]
    unchanged = sparsity.masks == masks
    model.weight.grad = torch.arange(8.0).view(1, 8)
    taken.append(sparsity.before_update(3))
    kept = sparsity.masks["weight"].flatten().nonzero().flatten().tolist()
    (Path(folder) / str(engine.rank)).write_text(f"{taken} {unchanged} {kept}")
    engine.close()


def test_an_overflow_of_one_rank_puts_the_change_off_on_all(tmp_path: Path) -> None:
    """Of 0, 2, 4, 6 one goes, and 7 comes, one step later than planned and on both."""
    assert run_ranks(2, overflowing, str(tmp_path)) == [0, 0]
    said = [(tmp_path / str(rank)).read_text() for rank in (0, 1)]
    assert said == ["[True, False] True [2, 4, 6, 7]"] * 2


# ---- configuration


MISTAKES: list[Mistake] = [
    (SET.replace("0.3", "0.0"), (), "density = '0.0': must be above 0 and at most 1"),
    (SET.replace("0.3", "[0.3, 1.5]"), (), "density = '0.3 1.5': must be above 0 and at most 1"),
    (SET.replace("0.3", "[0.3, 0.3]"), (), "give at least one, and each once"),
    (SET.replace('"set"', '"sett"'), (), "method = 'sett': is not known; did you mean 'set'?"),
    (SET + "fraction = 0.0\n", (), "fraction = '0.0': must be between 0 and 1"),
    (SET + "fraction = 1.0\n", (), "fraction = '1.0': must be between 0 and 1"),
    (SET.replace("4it", "4"), (), "interval = '4': is not a duration"),
    (SET.replace("4it", "0ep"), (), "interval = '0ep': must be at least one step"),
    (SET + 'densities = "er"\n', (), "densities"),
    (SET + 'start = "2it"\n', (), "start = '2it': needs method = 'gmp'"),
    (RIGL + 'scope = "global"\n', (), "scope = 'global': needs method = 'gmp'"),
    (GMP + 'until = "9it"\n', (), "until = '9it': needs method = 'set' or 'rigl'"),
    (GMP + "fraction = 0.2\n", (), "fraction = '0.2': needs method = 'set' or 'rigl'"),
    (SET + 'controls = ["static", "static"]\n', (), "'static static': name each once"),
    (GMP + 'controls = ["static"]\n', (), "gmp has no initial random masks"),
    (GMP + 'scope = "global"\ndensities = "erk"\n', (), "needs scope = 'layer'"),
    (GMP + "initial = 0.2\n", (), "initial = '0.2': must be at least the density, 0.3"),
    (GMP + "initial = 2.0\n", (), "initial = '2.0': must be above 0 and at most 1"),
    (SET + 'exclude = ["convv1"]\n', (), "matches no convolution or linear layer"),
    (RIGL, ("--train.ema", "0.9"), "train.ema = 0.9: an average of weights does not follow masks"),
    (RIGL, ("--stages.moving.intervall", "9it"), "did you mean 'interval'?"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_one_clear_line(
    mistake: Mistake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """... before anything is trained or written."""
    assert_refused(mistake, tmp_path, capsys, base=BASE)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (
            SET.replace("4it", "2ep"),
            "interval = '2ep': the first change is at step 26: must be before the end",
        ),
        (SET.replace("4it", "1%"), "interval = '1%': is less than one step"),
        (
            SET + 'until = "3ep"\n',
            "until = '3ep' is step 39: must be at most the end of the training",
        ),
        (SET + 'until = "4it"\n', "until = '4it' is step 4, before the first change at step 4"),
        (GMP + 'stop = "2ep"\n', "stop = '2ep' is step 26: must be before the end"),
        (GMP.replace("4it", "18it"), "interval = '18it': is 18 steps, and the ramp 17: choose a"),
        (GMP + 'stop = "3it"\n', "stop = '3it' is step 3, not after start = '3it' at step 3"),
        (SET.replace("0.3", "0.001") + 'densities = "uniform"\n', "density = 0.001 keeps none of"),
        (GMP.replace("0.3", "0.00001") + 'scope = "global"\n', "density = 1e-05 keeps none of"),
    ],
)
def test_what_only_the_data_tell_is_refused_before_the_stage_is_trained(
    stage: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused_by_data(BASE + stage, expected, tmp_path, capsys, "moving")


def test_a_finished_stage_is_left_alone(tmp_path: Path) -> None:
    folder = run(tmp_path, BASE + SET)
    before, lines = ticket_facts(folder), facts(folder)
    run(tmp_path, BASE + SET)
    assert ticket_facts(folder) == before
    assert facts(folder) == lines
