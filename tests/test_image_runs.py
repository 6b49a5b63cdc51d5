"""Whole runs on real JPEGs: a second each, through DALI."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from jpegs import cuts, damage, write_tree
from killing import KILLED, killed_run
from processes import run_ranks, tombola
from tiny import assert_same_run, facts, write_config
from waiting import PATIENCE

TOML = """
name = "tiny"
seed = 3
[data]
source = "folder"
batch_size = 15
size = ["24", "24@1ep", "32@1ep"]
eval_resize = 36
eval_batch_size = 7
color_jitter = 0.2
[model]
name = "cifar_resnet8"
width = 4
[train]
total = "2ep"
evaluate = "4it"
eval_flip = true
[optimizer]
lr = 0.05
[schedule]
name = "linear"
[checkpoint]
every = "2it"
[log]
every = 3
[[stages]]
name = "imp"
recipe = "imp"
rounds = 1
prune_fraction = 0.4
rewind = "2it"
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 training and 24 held-out JPEGs of two classes."""
    return write_tree(tmp_path_factory.mktemp("images"))


def words(folder: Path, tree: Path, *more: str) -> list[str]:
    return [
        "run",
        write_config(folder, TOML),
        "--root",
        str(folder),
        "--data.root",
        str(tree),
        *more,
    ]


@pytest.mark.parametrize("world_size", [1, 2])
def test_imp_on_jpegs_killed_anywhere_ends_in_the_same_bits(
    world_size: int, tree: Path, tmp_path: Path
) -> None:
    """In the middle of an epoch, between sizes, on one rank and on two."""
    (tmp_path / "whole").mkdir()
    whole = words(tmp_path / "whole", tree)
    assert tombola(*whole, world_size=world_size) == [0] * world_size
    for step in (3, 8, 13):  # the second in the epoch of larger images, the third in level 1
        folder = tmp_path / str(step)
        folder.mkdir()
        killed = run_ranks(world_size, killed_run, words(folder, tree), "a step", step)
        assert killed == [KILLED] * world_size
        assert tombola(*words(folder, tree), world_size=world_size) == [0] * world_size
        assert_same_run(folder / "tiny", tmp_path / "whole" / "tiny")


def test_the_data_may_move_but_not_change(tree: Path, tmp_path: Path) -> None:
    """The record of the classes and images goes by names and sizes, not by place or time."""
    assert tombola(*words(tmp_path, tree, "--stages.imp.rounds", "0")) == [0]
    record = json.loads((tmp_path / "tiny/data.json").read_text())["imp"]
    assert record["classes"] == ["china", "flower"]
    assert record["images"]["train"]["china"][0] == 40
    moved = shutil.copytree(tree, tmp_path / "elsewhere")
    again = words(tmp_path, moved, "--stages.imp.rounds", "0")
    assert tombola(*again, output=tmp_path / "moved") == [0]
    named = ["--data.source", f"folder:{tree}"]  # the place, said with the kind
    assert tombola(*again, *named) == [0]
    cuts(0, 1, seed=9)[0].save(moved / "train/china/9999.JPEG")
    assert tombola(*again, output=tmp_path / "changed") == [2]
    said = (tmp_path / "changed.0").read_text()
    assert "was begun on other data" in said
    assert "train, class 'china': 40 images there and 41 here" in said


def replaced(run: Path) -> list[dict[str, Any]]:
    return [fact for fact in facts(run) if fact["event"] == "replaced"]


def test_bad_images_are_replaced_alike_on_any_ranks_and_after_a_kill(
    tree: Path, tmp_path: Path
) -> None:
    """One that the scan finds, and one that only the decoder finds."""
    bad = shutil.copytree(tree, tmp_path / "bad")
    (bad / "train/china/0003.JPEG").write_text("this is no image")
    damage(bad / "train/flower/0007.JPEG")
    runs = []
    for name, world_size in (("one", 1), ("two", 2), ("killed", 1)):
        folder = tmp_path / name
        folder.mkdir()
        line = words(folder, bad, "--data.on-bad", "skip")
        if name == "killed":
            assert run_ranks(1, killed_run, line, "a step", 9) == [KILLED]
        assert tombola(*line, world_size=world_size) == [0] * world_size
        runs.append(folder / "tiny")
    one, two, killed = runs
    assert replaced(one) == replaced(two)
    assert_same_run(killed, one)
    named = {(fact["image"], fact["by"], fact["reason"]) for fact in replaced(one)}
    assert ("train/china/0003.JPEG", "train/china/0004.JPEG", "not an image") in named
    assert {image for image, _, _ in named} == {"train/china/0003.JPEG", "train/flower/0007.JPEG"}
    last = [f for f in facts(one) if f["event"] == "train" and f["level"] == "level-00"][-1]
    assert last["replaced"] == sum(fact["level"] == "level-00" for fact in replaced(one)) > 0


def test_a_bad_image_ends_the_run_with_its_name(tree: Path, tmp_path: Path) -> None:
    """Before the first step if its header is wrong, in its turn if its data are."""
    bad = shutil.copytree(tree, tmp_path / "bad")
    damage(bad / "train/flower/0007.JPEG")
    assert tombola(*words(tmp_path, bad), output=tmp_path / "late") == [1]
    said = (tmp_path / "late.0").read_text()
    assert "cannot decode train/flower/0007.JPEG" in said
    assert "(epoch " in said
    assert "--data.on-bad skip" in said
    (bad / "train/china/0003.JPEG").write_bytes(b"")
    assert tombola(*words(tmp_path, bad), output=tmp_path / "early") == [2]
    said = (tmp_path / "early.0").read_text()
    assert "1 of 80 train images cannot be used: train/china/0003.JPEG is empty" in said


def test_an_interrupt_ends_a_run_on_images_at_once(tree: Path, tmp_path: Path) -> None:
    """Ctrl-C: long before its end, and no process stays behind."""
    line = words(tmp_path, tree, "--train.total", "2000ep", "--log.every", "1")
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", *line],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "tiny/metrics.jsonl"
    while not metrics.exists() or metrics.stat().st_size < 500:
        assert process.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "the same command goes on from what was saved" in said
    assert not [child for child in children if os.path.exists(f"/proc/{child}")]
