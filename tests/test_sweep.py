"""Runs over several seeds, and the table that compares all methods at the same densities."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from killing import KILLED, killed_run
from processes import command, run_ranks, tombola
from tiny import TOML, assert_same_run, write_config

from data.errors import UserError
from launch.cli import run_command
from launch.comparison import Row, Run, comparison
from launch.config import read_config
from launch.plots import comparison_plot

SINGLE = TOML.replace("3ep", "2ep").replace("rounds = 2", "rounds = 1")
SWEEP = SINGLE.replace("seed = 3", "seeds = [3, 4]")
SNIP = """
[[stages]]
name = "snip"
recipe = "initial"
density = 0.6
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a finished run over the seeds 3 and 4."""
    folder = tmp_path_factory.mktemp("sweep")
    assert tombola("run", write_config(folder, SWEEP + SNIP), "--root", str(folder)) == [0]
    return folder


def lines(capsys: pytest.CaptureFixture[str], words: list[str], code: int) -> str:
    assert run_command(words) == code
    return capsys.readouterr().err


# Runs ------------------------------------------------------------------------------------


def test_each_seed_is_a_run_like_any_other(root: Path, tmp_path: Path) -> None:
    words = ["run", write_config(tmp_path, SINGLE + SNIP), "--root", str(tmp_path)]
    assert tombola(*words, "--seed", "4", "--name", "seed-4") == [0]
    assert_same_run(root / "tiny/seed-4", tmp_path / "seed-4")
    assert {path.name for path in (root / "tiny").iterdir()} == {
        "seed-3",
        "seed-4",
        "comparison.png",
    }


def test_a_seed_goes_on_by_its_own_configuration(root: Path) -> None:
    own = root / "tiny/seed-3/config.toml"
    assert read_config(str(own)).settings.seed == 3
    before = (root / "tiny/seed-3/metrics.jsonl").read_bytes()
    assert tombola("run", str(own), "--root", str(root / "tiny")) == [0]
    assert (root / "tiny/seed-3/metrics.jsonl").read_bytes() == before


def test_a_run_killed_in_its_second_seed_goes_on(root: Path, tmp_path: Path) -> None:
    words = ["run", write_config(tmp_path, SWEEP + SNIP), "--root", str(tmp_path)]
    # Each seed trains three arms of 26 or 21 steps, and one of SNIP: step 110 is of the second.
    assert run_ranks(1, killed_run, words, "a step", 110) == [KILLED]
    assert (tmp_path / "tiny/seed-3/snip/level-00/ticket.json").exists()
    assert not (tmp_path / "tiny/seed-4/snip").exists()
    assert tombola(*words) == [0]
    for seed in ("seed-3", "seed-4"):
        assert_same_run(tmp_path / "tiny" / seed, root / "tiny" / seed)


def signalled_at_the_end(words: list[str]) -> None:
    """Runs a command in a process that is told to stop when its first run has its last ticket."""
    from pruning.store import TicketFolder
    from pruning.tickets import Ticket

    write = TicketFolder.write

    def wrapper(self: TicketFolder, ticket: Ticket) -> None:
        write(self, ticket)
        if ticket.place == "snip/level-00":
            os.kill(os.getpid(), signal.SIGTERM)

    TicketFolder.write = wrapper  # type: ignore[method-assign]
    command(words)


def test_a_signal_at_the_end_of_a_seed_stops_the_next(root: Path, tmp_path: Path) -> None:
    """No training of the first is left that could tell of it."""
    words = ["run", write_config(tmp_path, SWEEP + SNIP), "--root", str(tmp_path)]
    assert run_ranks(1, signalled_at_the_end, words) == [75]
    assert (tmp_path / "tiny/seed-3/snip/level-00/ticket.json").exists()
    saved = (tmp_path / "tiny/seed-4/imp/level-00/checkpoints").iterdir()
    assert [path.name for path in saved] == ["step-00000001"]
    assert tombola(*words) == [0]
    assert_same_run(tmp_path / "tiny/seed-4", root / "tiny/seed-4")


def test_a_seed_may_come_later(root: Path, tmp_path: Path) -> None:
    words = ["run", write_config(tmp_path, SWEEP + SNIP), "--root", str(tmp_path)]
    assert tombola(*words, "--seeds", "4") == [0]
    assert tombola(*words) == [0]
    assert_same_run(tmp_path / "tiny/seed-3", root / "tiny/seed-3")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--seeds", "3", "3"], "seeds = '3 3': give each once"),
        (["--seeds", "-1"], "seeds = '-1': must not be negative"),
        (["--seed", "3"], "seed and seeds are both set: for one run of several set --seeds N"),
        (["--seeds"], "command line: seeds: name at least one: --seeds 0 1 2"),
        (["--stages.imp.seeds", "3"], "unknown key 'stages.imp.seeds'"),
    ],
)
def test_wrong_seeds_are_one_line(
    overrides: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", write_config(tmp_path, SWEEP), "--root", str(tmp_path), *overrides]
    printed = lines(capsys, words, 2)
    assert expected in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "tiny").exists()


def test_all_seeds_are_of_one_configuration(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A further seed with other settings would be compared with what it is not like."""
    words = ["run", write_config(tmp_path, SWEEP + SNIP), "--root", str(root)]
    printed = lines(capsys, [*words, "--seeds", "5", "--model.width", "8"], 2)
    assert "tiny/seed-3 belongs to another configuration: model.width is 4 there" in printed
    assert not (root / "tiny/seed-5").exists()


def test_one_run_and_several_do_not_share_a_folder(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    single = write_config(tmp_path, SINGLE)
    printed = lines(capsys, ["run", single, "--root", str(root)], 2)
    assert "tiny holds runs over seed: choose another --name for one run" in printed
    assert not (root / "tiny/config.toml").exists()

    own = root / "tiny/seed-3"
    words = ["run", write_config(tmp_path, SWEEP), "--root", str(own.parent), "--name", own.name]
    assert "seed-3 holds one run: choose another --name for runs over seed" in lines(
        capsys, words, 2
    )


def test_what_is_wrong_in_a_later_stage_is_said_before_any_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = SNIP + 'exclude = ["nowhere"]\n'
    words = ["run", write_config(tmp_path, SWEEP + wrong), "--root", str(tmp_path)]
    assert "exclude = 'nowhere'" in lines(capsys, words, 2)
    assert not (tmp_path / "tiny").exists()


# The comparison --------------------------------------------------------------------------


def test_a_report_of_several_seeds_compares_them(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same of the folder and of the runs by name; the runs' own tables are as ever."""
    place = ["--root", str(root)]
    assert run_command(["report", "tiny", "--json", *place]) == 0
    (document,) = json.loads(capsys.readouterr().out)
    rows = {
        (row["stage"], row["method"], round(row["density"], 1)): row
        for row in document["comparison"]
    }
    assert set(rows) == {
        ("imp", "imp", 1.0),
        ("imp", "imp", 0.6),
        ("imp", "random", 0.6),
        ("snip", "snip", 0.6),
    }
    found = rows["imp", "imp", 0.6]
    tickets = [
        json.loads((root / f"tiny/seed-{seed}/imp/level-01/ticket.json").read_text())
        for seed in (3, 4)
    ]
    assert len(found["accuracies"]) == len(tickets) == 2
    assert found["mean"] == pytest.approx(sum(found["accuracies"]) / 2)
    assert found["spread"] == pytest.approx(abs(found["accuracies"][0] - found["accuracies"][1]))
    assert (found["search_steps"], found["steps"]) == (26, 26 + 21)

    runs = ["tiny/seed-3", "tiny/seed-4"]
    assert run_command(["report", *runs, "--compare", "--json", *place]) == 0
    assert json.loads(capsys.readouterr().out)[0]["comparison"] == document["comparison"]
    assert run_command(["report", "tiny/seed-3", *place]) == 0
    assert "snip: test accuracy" in capsys.readouterr().out


def test_what_needs_one_run_names_those_that_are_there(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"file://{root}/tiny"
    for words in (["list", "tiny"], ["verify", "tiny"], ["list", url]):
        words = ["tickets", *words]
        printed = lines(capsys, [*words, "--root", str(root)], 2)
        assert "holds several runs: name one of them, as" in printed
        assert printed.rstrip().endswith("tiny/seed-3")
    words = ["report", "tiny", "--compare", "--barrier", "--root", str(root)]
    assert "--compare and --barrier: choose one" in lines(capsys, words, 2)


def ticket(
    stage: str, level: int, density: float, accuracy: float, **options: Any
) -> SimpleNamespace:
    """As much of a ticket as is compared."""
    steps = {"steps": 100.0, "search_steps": options.pop("search", 0.0)}
    return SimpleNamespace(
        stage=stage,
        level=level,
        density=density,
        stored_masks=SimpleNamespace(num_kept=round(1000 * density)),
        accuracy=accuracy,
        timing=steps,
        config={"settings": {"data": {"batch_size": 36}}},
        total_steps=int(sum(steps.values())),
        **{"method": stage, "control": False, **options},
    )


def compare(*runs: list[SimpleNamespace]) -> list[Row]:
    return comparison([Run(run) for run in runs])  # type: ignore[arg-type]


def test_methods_are_compared_at_the_densities_that_most_of_them_have() -> None:
    """A truth table: half of the stages reach 0.5 and 0.1, one alone 0.25; the dense stand above.

    0.098 and 0.1 are one density, 0.09 is another.
    """
    random = {"method": "random", "control": True}
    first = [
        ticket("imp", 0, 1.0, 0.9),
        ticket("imp", 1, 0.5, 0.8, search=100.0),
        ticket("imp", 1, 0.5, 0.6, **random),
        ticket("imp", 2, 0.25, 0.75, search=200.0),
        ticket("imp", 3, 0.1, 0.7, search=300.0),
        ticket("snip", 0, 0.5, 0.7),
        ticket("snip", 1, 0.098, 0.5),
        ticket("set", 0, 0.09, 0.4),
    ]
    second = [
        ticket("imp", 3, 0.1, 0.8, search=300.0),
        ticket("snip", 1, 0.096, 0.4),
    ]
    rows = compare(first, second)
    assert [(row.name, row.group, row.accuracies) for row in rows] == [
        ("imp", 1.0, (0.9,)),
        ("imp", 0.5, (0.8,)),
        ("imp: random", 0.5, (0.6,)),
        ("snip", 0.5, (0.7,)),
        ("imp", 0.1, (0.7, 0.8)),
        ("snip", 0.1, (0.5, 0.4)),
    ]
    last = rows[-1]
    assert (last.mean, last.spread) == (pytest.approx(0.45), pytest.approx(0.1))
    assert (last.density, last.kept) == (pytest.approx(0.097), 97)
    assert (rows[-2].steps, rows[-2].search_steps) == (400, 300)


def test_of_several_levels_at_a_density_the_last_counts() -> None:
    """As of a network that grew, whose levels all keep the same fraction."""
    rows = compare([ticket("growth", level, 0.1, 0.5 + level / 10) for level in (1, 2, 0)])
    assert [row.accuracies for row in rows] == [(0.7,)]


def test_only_what_is_dense_counts_as_dense() -> None:
    """A first round that leaves 95 % is no dense network; 92 % is taken for as much as 95 %."""
    rows = compare([ticket("imp", n, d, d) for n, d in enumerate((1.0, 0.95, 0.92))])
    assert [(row.group, row.accuracies) for row in rows] == [(1.0, (1.0,)), (0.95, (0.92,))]


def test_variants_are_not_averaged() -> None:
    """Each has its rows, and counts as a stage where densities are chosen."""
    tickets = [[ticket("imp", 1, 0.5, 0.8)], [ticket("imp", 1, 0.5, 0.6), ticket("imp", 2, 0.2, 1)]]
    runs = [Run(run, label) for label, run in zip(("k 0", "k 5"), tickets, strict=True)]  # type: ignore[arg-type]
    rows = comparison(runs)
    assert [(row.name, row.accuracies) for row in rows] == [
        ("imp (k 0)", (0.8,)),
        ("imp (k 5)", (0.6,)),
        ("imp (k 5)", (1.0,)),
    ]


def test_hours_are_those_of_all_devices() -> None:
    """400 steps of 36 images at 4 a second are an hour; on two devices, two."""
    one = ticket("imp", 1, 0.5, 0.8, search=300.0)
    one.timing["images_per_second"] = 4.0
    assert comparison([Run([one], num_devices=2)])[0].hours == 2.0  # type: ignore[list-item]
    untold = ticket("imp", 1, 0.5, 0.8)
    assert comparison([Run([one]), Run([untold])])[0].hours is None  # type: ignore[list-item]


def test_the_comparison_is_a_picture() -> None:
    rows = compare([ticket("imp", 0, 1.0, 0.9), ticket("imp", 1, 0.1, 0.8)])
    assert comparison_plot(rows).startswith(b"\x89PNG")
    assert comparison_plot([]).startswith(b"\x89PNG")


def test_seeds_in_a_file_are_read(tmp_path: Path) -> None:
    config = read_config(write_config(tmp_path, SWEEP), ["--seeds", "7"])
    assert config.seeds == (7,)
    one = config.with_seed(7)
    assert (one.settings.name, one.settings.seed, one.seeds) == ("seed-7", 7, ())
    assert one.stages[0].settings.seed == 7
    with pytest.raises(UserError, match="seed and seeds are both set"):
        read_config(write_config(tmp_path, SWEEP.replace("name =", "seed = 1\nname =", 1)))


def test_seeds_of_the_command_line_take_the_place_of_a_seed_in_the_file(tmp_path: Path) -> None:
    """Most files have one; a seed beside them on the command line is a contradiction."""
    path = write_config(tmp_path, SINGLE)
    config = read_config(path, ["--seeds", "0", "1"])
    assert config.seeds == (0, 1)
    assert config.with_seed(1).stages[0].settings.seed == 1
    with pytest.raises(UserError, match="command line: seed and seeds are both set"):
        read_config(path, ["--seeds", "0", "1", "--seed", "1"])
