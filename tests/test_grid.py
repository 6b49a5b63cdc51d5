"""`tombola sweep`: a run for each combination of values, each done once, and compared."""

import json
from pathlib import Path

import pytest
from killing import KILLED, killed_run
from processes import run_ranks, tombola
from tiny import TOML, assert_same_run, write_config

from data.files import Folder
from launch.cli import run_command
from launch.config import read_config
from launch.grid import read_grid, runs_below
from launch.sweep import axes_of, cell_name

SHORT = TOML.replace("3ep", "2ep").replace("rounds = 2", "rounds = 1").replace('["random"]', "[]")
REWIND = ["--stages.imp.rewind", "init,5it"]
SEEDS = ["--seed", "3,4"]
PLACES = ["rewind-init/seed-3", "rewind-init/seed-4", "rewind-5it/seed-3", "rewind-5it/seed-4"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a finished sweep over two rewinding points and two seeds."""
    folder = tmp_path_factory.mktemp("grid")
    words = ["sweep", write_config(folder, SHORT), "--root", str(folder), *SEEDS, *REWIND]
    assert tombola(*words) == [0]
    return folder


def places(path: str, *options: str) -> list[str]:
    return list(read_grid(path, options).runs)


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line with which a command is refused."""
    capsys.readouterr()
    assert run_command(list(words)) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    return printed


def contents(folder: Path, *names: str) -> dict[str, bytes]:
    """What is in the files of a folder that have these names."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for name in names
        for path in sorted(folder.rglob(name))
    }


# Names -----------------------------------------------------------------------------------


def test_runs_lie_in_folders_that_name_their_values(tmp_path: Path) -> None:
    """In the order given, the seeds innermost; the last word of a key where it is enough."""
    path = write_config(tmp_path)
    assert places(path, *SEEDS, *REWIND) == PLACES
    assert places(path, *REWIND) == ["rewind-init", "rewind-5it"]
    assert places(path, *REWIND, "--optimizer.lr", "0.1,1e-2") == [
        "rewind-init__lr-0.1",
        "rewind-init__lr-1e-2",
        "rewind-5it__lr-0.1",
        "rewind-5it__lr-1e-2",
    ]
    assert (
        places(path, "--model.name=cifar_resnet8,cifar_resnet14", "--optimizer.name", "sgd,adamw")[
            1
        ]
        == "model.name-cifar_resnet8__optimizer.name-adamw"
    )


def test_seeds_alone_are_what_run_makes_of_them(tmp_path: Path) -> None:
    path = write_config(tmp_path, SHORT)
    assert read_grid(path, SEEDS).runs == read_grid(path, ["--seeds", "3", "4"]).runs
    assert places(path, *SEEDS) == ["seed-3", "seed-4"]
    own = write_config(tmp_path, SHORT.replace("seed = 3", "seeds = [3, 4]"))
    assert places(own) == ["seed-3", "seed-4"]
    assert places(own, *REWIND) == PLACES


def test_values_of_several_words_are_quoted(tmp_path: Path) -> None:
    stage = '[[stages]]\nname = "snip"\nrecipe = "initial"\ndensity = 0.6\n'
    path = write_config(tmp_path, TOML + stage)
    runs = read_grid(path, ["--stages.snip.density", "0.5 0.1,0.2"]).runs
    assert list(runs) == ["density-0.5--0.1", "density-0.2"]
    assert [run.stages[1].config.density for run in runs.values()] == [(0.5, 0.1), (0.2,)]
    flags = read_grid(path, ["--train.eval-flip", "true,false"]).runs
    assert [run.settings.train.eval_flip for run in flags.values()] == [True, False]


def test_no_two_values_have_one_name() -> None:
    """Whatever does not belong into a name becomes a digest, and what looks alike stays apart."""
    values = [
        "a",
        "a b",
        "a--b",
        "a_b",
        "a__b",
        "a/b",
        "/a/b",
        "a\\b",
        "-a",
        "é",
        "a" * 300,
        "..",
        "a,b",
    ]
    values += ["a" * 301, "s3://bucket/a", "a.b", "a-b"]
    names = [cell_name(["source"], [value]) for value in values]
    assert len(set(names)) == len(values)
    for name in names:
        assert axes_of(name) == ("source",)
        assert len(name) <= 255
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_")
    many = [f"axis{n}" for n in range(8)]
    assert len(cell_name(many, ["x" * 100] * 8)) <= 255
    assert axes_of(cell_name(many, ["x_y"] * 8)) == tuple(many)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "no option has several values, as in --seed 0,1: use tombola run for one run"),
        (["--seed", "4"], "use tombola run for one run"),
        (["--optimizer.lr", "0.1,,0.2"], "--optimizer.lr 0.1,,0.2: has an empty value"),
        (["--optimizer.lr", "0.1,0.2,"], "has an empty value"),
        (["--optimizer.lr", "0.1,0.2,0.1"], "names 0.1 twice: give each value once"),
        (["--optimizer.lr", "0.1,0.10"], "lr-0.10 is the same configuration as lr-0.1"),
        ([*SEEDS, *SEEDS], "seed is given twice"),
        ([*SEEDS, "--seeds", "5"], "seed is given twice"),
        ([*REWIND, "--stages.imp.rewind", "1it"], "stages.imp.rewind is given twice"),
        (["--seed", "3,x"], "seeds = '3 x': must be numbers"),
        (["--name", "a,b"], "--name a,b: the runs have one name"),
        (["--data.root", "/a,/b"], "is no setting in which runs are compared"),
        (["--log.trackers", "wandb,mlflow"], "is no setting in which runs are compared"),
        (["--store", "a,b", *SEEDS], "--store a,b: all runs are in one place"),
        (
            ["--stages.imp.rounds", "1", "2,3"],
            'quote values of several words: --stages.imp.rounds "',
        ),
        (["--optimizer.lrr", "1,2"], "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        (["--optimizer.lr", "0.1,fast"], "optimizer.lr = 'fast': must be a number"),
        (["--only", "snip", *SEEDS], "--only snip: no stage named 'snip'"),
    ],
)
def test_a_wrong_grid_is_one_line(
    options: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path)
    assert expected in error_of(capsys, "sweep", path, "--root", str(tmp_path), *options)
    assert {one.name for one in tmp_path.iterdir()} == {"tiny.toml"}


def test_what_is_wrong_in_the_last_run_is_said_before_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = '[[stages]]\nname = "line"\nrecipe = "connectivity"\nticket = "imp"\n'
    path = write_config(tmp_path, TOML + line)
    words = ["--stages.line.ticket", "imp,nowhere"]
    assert "ticket = 'nowhere': is no earlier stage" in error_of(
        capsys, "sweep", path, "--root", str(tmp_path), *words
    )
    assert not (tmp_path / "tiny").exists()


# Runs ------------------------------------------------------------------------------------


def test_each_is_a_run_like_any_other(root: Path, tmp_path: Path) -> None:
    words = ["run", write_config(tmp_path, SHORT), "--root", str(tmp_path)]
    assert tombola(*words, "--seed", "4", "--stages.imp.rewind", "init", "--name", "seed-4") == [0]
    assert_same_run(root / "tiny/rewind-init/seed-4", tmp_path / "seed-4")
    found = runs_below(Folder(root / "tiny"))
    assert list(found) == [*PLACES[2:], *PLACES[:2]]  # numbers by size, and before words


def test_a_run_goes_on_by_its_own_configuration(root: Path) -> None:
    own = root / "tiny/rewind-5it/seed-3"
    assert read_config(str(own / "config.toml")).settings.seed == 3
    before = contents(own, "metrics.jsonl", "ticket.json")
    assert tombola("run", str(own / "config.toml"), "--root", str(own.parent)) == [0]
    assert contents(own, "metrics.jsonl", "ticket.json") == before


def test_a_finished_sweep_computes_nothing(root: Path) -> None:
    words = ["sweep", str(root / "tiny.toml"), "--root", str(root), *SEEDS, *REWIND]
    names = ("metrics.jsonl", "ticket.json", "manifest.json", "*.safetensors", "*.distcp")
    before = {path: path.stat().st_mtime_ns for name in names for path in root.rglob(name)}
    assert tombola(*words) == [0]
    after = {path: path.stat().st_mtime_ns for name in names for path in root.rglob(name)}
    assert after == before


def test_a_killed_sweep_goes_on(root: Path, tmp_path: Path) -> None:
    """Each run of two levels has 26 steps and 26 or 21: step 140 is of the third."""
    path = write_config(tmp_path, SHORT)
    words = ["sweep", path, "--root", str(tmp_path), *SEEDS, *REWIND]
    assert run_ranks(1, killed_run, words, "a step", 140) == [KILLED]
    there = tmp_path / "tiny"
    assert (there / PLACES[1] / "imp/level-01/ticket.json").exists()
    assert not (there / PLACES[2] / "imp/level-01/ticket.json").exists()
    assert not (there / PLACES[3]).exists()
    before = contents(there / "rewind-init", "metrics.jsonl", "ticket.json")
    assert tombola(*words) == [0]
    assert contents(there / "rewind-init", "metrics.jsonl", "ticket.json") == before
    for place in PLACES:
        assert_same_run(there / place, root / "tiny" / place)


def test_an_axis_may_get_more_values(root: Path, tmp_path: Path) -> None:
    """... of which only the new ones are run; all must be of one configuration."""
    path = write_config(tmp_path, SHORT)
    words = ["sweep", path, "--root", str(tmp_path), "--seeds", "3", "--stages.imp.rewind"]
    assert tombola(*words, "init,5it") == [0]
    old = tmp_path / "tiny"
    before = contents(old, "metrics.jsonl", "ticket.json")
    assert tombola(*words, "5it,1it") == [0]
    after = contents(old, "metrics.jsonl", "ticket.json")
    assert {name: after[name] for name in before} == before
    assert list(runs_below(Folder(old))) == [
        "rewind-1it/seed-3",
        "rewind-5it/seed-3",
        "rewind-init/seed-3",
    ]
    assert_same_run(old / "rewind-5it/seed-3", root / "tiny/rewind-5it/seed-3")


def test_another_configuration_is_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run that is there, or of one beside it; and runs over other axes."""
    words = ["sweep", write_config(tmp_path, SHORT), "--root", str(root), "--stages.imp.rewind"]
    wider = ["--seeds", "3", "--model.width", "8"]
    for values in ("init,5it", "2it,4it"):
        line = error_of(capsys, *words, values, *wider)
        assert "seed-3 belongs to another configuration: model.width is 4 there and 8 here" in line
    line = error_of(capsys, *words, "init,5it")
    assert "tiny holds runs over rewind, seed: choose another --name for runs over rewind" in line
    line = error_of(capsys, "run", str(tmp_path / "tiny.toml"), "--root", str(root))
    assert "tiny holds runs over rewind, seed: choose another --name for one run" in line
    assert len(list((root / "tiny").rglob("config.toml"))) == 4


def test_a_run_that_diverges_does_not_stop_the_others(tmp_path: Path) -> None:
    """They are done, and the command fails in the end."""
    path = write_config(tmp_path, SHORT)
    words = ["sweep", path, "--root", str(tmp_path), "--optimizer.lr", "1e30,0.1"]
    assert tombola(*words, output=tmp_path / "out") == [1]
    printed = (tmp_path / "out.0").read_text()
    assert "the loss is not finite at step" in printed
    assert "error: 1 of 2 runs failed, the others are done: the loss is not finite" in printed
    assert (tmp_path / "tiny/lr-0.1/imp/level-01/ticket.json").exists()


def test_a_mistake_of_one_run_does_not_stop_the_others(tmp_path: Path) -> None:
    """Found out when the network is there; in the first run it is taken for a mistake in all."""
    path = write_config(tmp_path, SHORT)
    words = ["sweep", path, "--root", str(tmp_path), "--stages.imp.rounds", "0"]
    words.append("--stages.imp.exclude")
    assert tombola(*words, "fc,nowhere,conv1", output=tmp_path / "out") == [2]
    printed = (tmp_path / "out.0").read_text()
    assert "1 of 3 runs failed, the others are done: " in printed
    assert "exclude = 'nowhere' matches no" in printed.splitlines()[-1]
    there = tmp_path / "tiny"
    assert (there / "exclude-conv1/imp/level-00/ticket.json").exists()
    assert tombola(*words, "nowhere,conv1,fc", "--name", "b", output=tmp_path / "out") == [2]
    assert not (tmp_path / "b/exclude-conv1").exists()


def test_several_ranks_do_a_sweep(root: Path, tmp_path: Path) -> None:
    words = ["sweep", write_config(tmp_path, SHORT), "--root", str(tmp_path), *REWIND]
    words += ["--stages.imp.rounds", "0"]
    assert tombola(*words, world_size=2, output=tmp_path / "out") == [0, 0]
    for cell in ("rewind-init", "rewind-5it"):
        told = json.loads((tmp_path / f"tiny/{cell}/environment.json").read_text())
        assert told[0]["hardware"]["world_size"] == 2
        assert (tmp_path / f"tiny/{cell}/imp/level-00/ticket.json").exists()
    assert (tmp_path / "out.1").read_text() == ""


# What is told ----------------------------------------------------------------------------


def test_a_report_compares_all_runs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["report", "tiny", "--json", "--root", str(root)]) == 0
    (document,) = json.loads(capsys.readouterr().out)
    assert len(document["runs"]) == 4
    found = {(row["variant"], round(row["density"], 1)) for row in document["comparison"]}
    assert found == {(f"rewind {k}", d) for k in ("init", "5it") for d in (1.0, 0.6)}
    assert all(len(row["accuracies"]) == 2 for row in document["comparison"])
    assert run_command(["report", "tiny/rewind-init", "--json", "--root", str(root)]) == 0
    (document,) = json.loads(capsys.readouterr().out)
    assert [run[-6:] for run in document["runs"]] == ["seed-3", "seed-4"]


def test_a_dry_run_tells_how_far_each_is(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """... and makes nothing."""
    path = write_config(tmp_path, SHORT)
    words = ["sweep", path, "--root", str(root), "--dry-run", "--seed", "3,5", *REWIND]
    (root / "tiny/rewind-init/seed-3/imp/level-01/ticket.json").rename(root / "aside")
    try:
        assert run_command(words) == 0
    finally:
        (root / "aside").rename(root / "tiny/rewind-init/seed-3/imp/level-01/ticket.json")
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        f"{root}/tiny/rewind-init/seed-3  1 of 2 levels",
        f"{root}/tiny/rewind-init/seed-5  not begun",
        f"{root}/tiny/rewind-5it/seed-3  done",
        f"{root}/tiny/rewind-5it/seed-5  not begun",
    ]
    assert not list(root.rglob("seed-5"))
