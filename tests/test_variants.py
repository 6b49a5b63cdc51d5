"""Runs of one configuration are averaged, those of others compared, and named by what differs."""

from pathlib import Path

import pytest
import tomli_w
from tiny import TOML, write_config

from data.files import Folder
from launch.config import read_config
from launch.variants import differing, short, variants

SNIP = '\n[[stages]]\nname = "snip"\nrecipe = "initial"\ndensity = 0.6\n'


def made(folder: Path, name: str, *options: str, text: str = TOML) -> Folder:
    """A run that has its configuration and nothing else."""
    (folder / name).mkdir()
    config = read_config(write_config(folder, text), ["--name", name, *options])
    run = Folder(folder / name)
    run.write("config.toml", tomli_w.dumps(config.document()).encode())
    return run


def test_runs_that_differ_in_seeds_alone_are_one_variant(tmp_path: Path) -> None:
    """... and in what changes nothing that is computed."""
    first = made(tmp_path, "a", "--seed", "1")
    second = made(tmp_path, "b", "--seed", "2", "--checkpoint.every", "9it", "--log.every", "2")
    (one,) = variants([first, second])
    assert (one.runs, one.label) == ([first, second], "")
    assert "seed" not in one.settings


def test_variants_are_named_by_what_differs(tmp_path: Path) -> None:
    runs = [
        made(tmp_path, f"{rewind}-{lr}", "--stages.imp.rewind", rewind, "--optimizer.lr", lr)
        for lr in ("0.1", "0.2")
        for rewind in ("init", "5it")
    ]
    found = variants(runs)
    assert [one.label for one in found] == [
        "lr 0.1, rewind init",
        "lr 0.1, rewind 5it",
        "lr 0.2, rewind init",
        "lr 0.2, rewind 5it",
    ]
    assert differing(found) == {
        "optimizer.lr": [0.1, 0.1, 0.2, 0.2],
        "stages.imp.rewind": ["init", "5it", "init", "5it"],
    }


def test_a_stage_of_one_run_alone_makes_no_variant(tmp_path: Path) -> None:
    runs = [made(tmp_path, "a"), made(tmp_path, "b", text=TOML + SNIP)]
    (one,) = variants(runs)
    assert one.runs == runs
    assert one.settings["stages.snip.recipe"] == "initial"


def test_where_much_differs_the_runs_name_themselves(tmp_path: Path) -> None:
    options = ("--model.width", "8", "--optimizer.lr", "1", "--train.total", "4ep")
    runs = [made(tmp_path, "a"), made(tmp_path, "b", *options, "--stages.imp.rounds", "3")]
    assert [one.label for one in variants(runs)] == ["a", "b"]


@pytest.mark.parametrize(
    ("key", "others", "told"),
    [
        ("optimizer.lr", [], "lr"),
        ("stages.a.rewind", ["stages.b.rewind"], "a.rewind"),
        ("stages.a.optimizer.lr", ["optimizer.lr"], "a.optimizer.lr"),
    ],
)
def test_a_key_is_as_long_as_it_must_be(key: str, others: list[str], told: str) -> None:
    assert short(key, [key, *others]) == told
