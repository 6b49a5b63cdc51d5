"""An interrupted run equals the uninterrupted one, bit for bit, wherever it was killed."""

import functools
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from killing import KILLED, killed_run
from processes import command, run_ranks, tombola
from tiny import TOML, assert_same_run, facts, final_states, ticket_facts, write_config


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run on one process."""
    return finished(tmp_path_factory.mktemp("reference"), world_size=1)


def finished(root: Path, world_size: int) -> Path:
    assert (
        tombola("run", write_config(root), "--root", str(root), world_size=world_size)
        == [0] * world_size
    )
    return root / "tiny"


@pytest.mark.parametrize(
    ("point", "count"),
    [
        ("a step", 3),
        ("a step", 29),
        ("a step", 70),
        ("a save, before its shards", 2),
        ("a save, before its manifest", 3),
        ("a save, before its manifest", 9),
        ("a deletion", 2),
        ("a deletion, half way", 3),
        ("a shard, half of it on the disk", 3),
        ("the third step beside a save", 3),
        ("a line of metrics", 11),
        ("the end of a level, before its ticket", 2),
        ("two levels", 1),
        ("two levels", 3),
    ],
)
def test_a_run_killed_in(point: str, count: int, reference: Path, tmp_path: Path) -> None:
    """... goes on with the same command to the same weights, masks and metrics."""
    words = ["run", write_config(tmp_path), "--root", str(tmp_path)]
    assert run_ranks(1, killed_run, words, point, count) == [KILLED]
    assert tombola(*words) == [0]
    assert_same_run(tmp_path / "tiny", reference)


def test_a_run_killed_again_and_again_ends_the_same(reference: Path, tmp_path: Path) -> None:
    """A machine that dies every 23 steps costs time, and nothing else."""
    words = ["run", write_config(tmp_path), "--root", str(tmp_path)]
    deaths = 0
    while run_ranks(1, killed_run, words, "a step", 23) == [KILLED]:
        deaths += 1
        assert deaths < 30
    assert deaths > 3
    assert_same_run(tmp_path / "tiny", reference)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The uninterrupted run on that many ranks."""
    return functools.cache(lambda size: finished(tmp_path_factory.mktemp("whole"), size))


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_run_killed_on_several_ranks(
    world_size: int, whole: Callable[[int], Path], tmp_path: Path
) -> None:
    """On 3 ranks the order of summation matters too: DDP's buckets must be those of before."""
    words = ["run", write_config(tmp_path), "--root", str(tmp_path)]
    codes = run_ranks(world_size, killed_run, words, "a step", 29)
    assert codes == [KILLED] * world_size
    assert tombola(*words, world_size=world_size) == [0] * world_size
    assert_same_run(tmp_path / "tiny", whole(world_size))


@pytest.mark.parametrize(
    ("world_size", "options"), [(1, ["--train.micro_batch", "48"]), (3, [])], ids=["1", "3"]
)
def test_a_run_killed_on_two_ranks_goes_on_on(
    world_size: int, options: list[str], tmp_path: Path
) -> None:
    """... fewer, which accumulate, or more: it takes the steps that are left and records each."""
    config = write_config(tmp_path, TOML.replace("rounds = 2", "rounds = 1"))
    # A save waits until it is written: beside the training it may be lost with what is killed.
    words = ["run", config, "--root", str(tmp_path), "--checkpoint.asynchronous", "false"]
    assert run_ranks(2, killed_run, words, "a step", 29) == [KILLED] * 2
    output = tmp_path / "out"
    codes = tombola(*words, *options, world_size=world_size, output=output)
    assert codes == [0] * world_size
    assert "goes on at step 24 of 39" in (tmp_path / "out.0").read_text()
    lines = [line for line in facts(tmp_path / "tiny") if line["event"] == "train"]
    seen = [line["step"] for line in lines if line["level"] == "level-00"]
    assert seen == [*range(5, 39, 5), 39]
    assert all(math.isfinite(line["loss"]) for line in lines)


@pytest.mark.parametrize(
    "point",
    [
        "a shard, half of it on the disk",
        "a save, before its manifest",
        "a deletion, half way",
        "the third step beside a save",
    ],
)
def test_two_ranks_of_which_one_is_killed_in(
    point: str, whole: Callable[[int], Path], tmp_path: Path
) -> None:
    """... both end at once, where the other would wait for it, and go on to the same."""
    words = ["run", write_config(tmp_path), "--root", str(tmp_path)]
    assert run_ranks(2, killed_first, words, point, 3) == [KILLED, 1]
    assert tombola(*words, world_size=2) == [0, 0]
    assert_same_run(tmp_path / "tiny", whole(2))


def killed_first(words: list[str], point: str, count: int) -> None:
    """`killed_run` on rank 0 alone."""
    if os.environ["RANK"] == "0":
        killed_run(words, point, count)
    command(words)


def test_running_a_finished_run_again_trains_nothing(reference: Path) -> None:
    """The same command finds every ticket finished: not one step, not one new line."""
    before = facts(reference), sorted(p for p in reference.rglob("*") if p.name != ".lock")
    words = ["run", str(reference.parent / "tiny.toml"), "--root", str(reference.parent)]
    assert run_ranks(1, killed_run, words, "a step", 1) == [0]
    assert (
        facts(reference),
        sorted(p for p in reference.rglob("*") if p.name != ".lock"),
    ) == before


def signalled_run(words: list[str], number: int, step: int) -> None:
    """Runs a command in a process that sends itself a signal in the middle of a step."""
    from train.engine import Engine

    update = Engine.update
    left = [step]

    def wrapper(self: Engine, *arguments: Any, **options: Any) -> None:
        left[0] -= 1
        if left[0] == 0 and self.rank == self.world_size - 1:
            os.kill(os.getpid(), number)
        update(self, *arguments, **options)

    Engine.update = wrapper  # type: ignore[method-assign]
    command(words)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_signal_finishes_the_step_saves_and_leaves_with_75(
    number: int, world_size: int, whole: Callable[[int], Path], tmp_path: Path
) -> None:
    """One rank is told; all ranks stop after the same step, and the run goes on from there."""
    words = ["run", write_config(tmp_path), "--root", str(tmp_path)]
    assert run_ranks(world_size, signalled_run, words, number, 11) == [75] * world_size
    saved = sorted(p.name for p in (tmp_path / "tiny/imp/level-00/checkpoints").iterdir())
    assert saved[-1] == f"step-{11 if world_size == 1 else 12:08d}"
    assert tombola(*words, world_size=world_size) == [0] * world_size
    assert_same_run(tmp_path / "tiny", whole(world_size))


def test_a_damaged_checkpoint_is_passed_over(reference: Path, tmp_path: Path) -> None:
    """One flipped bit in the newest: the one before it is taken, and the output says so."""
    words = ["run", write_config(tmp_path), "--root", str(tmp_path)]
    assert run_ranks(1, killed_run, words, "a step", 33) == [KILLED]
    found = (tmp_path / "tiny/imp/level-00/checkpoints").glob("step-*/manifest.json")
    before, newest = sorted(path.parent for path in found)[-2:]
    shard = newest / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert tombola(*words, output=tmp_path / "out") == [0]
    printed = (tmp_path / "out.0").read_text()
    assert f"damaged checkpoint passed over: {newest}: __0_0.distcp does not match" in printed
    assert f"goes on at step {int(before.name[5:])} of 39" in printed
    assert_same_run(tmp_path / "tiny", reference)


def test_the_step_k_and_the_end_of_each_level_stay(reference: Path) -> None:
    """Rolling deletion keeps the last two, and never touches a kept checkpoint."""
    names = {
        level: sorted(p.name for p in (reference / f"imp/{level}/checkpoints").iterdir())
        for level in ("level-00", "level-01")
    }
    assert names["level-00"] == [f"step-{step:08d}" for step in (5, 24, 32, 39)]
    assert names["level-01"] == [f"step-{step:08d}" for step in (24, 32, 39)]
    assert len(final_states(reference)) == 5


def test_a_damaged_end_of_a_level_names_the_remedy(reference: Path, tmp_path: Path) -> None:
    """The next level needs it: one line, and with the level's folder removed the run goes on."""
    words = ["run", write_config(tmp_path), "--root", str(tmp_path)]
    assert run_ranks(1, killed_run, words, "two levels", 2) == [KILLED]
    level = tmp_path / "tiny/imp/level-01"
    (level / "checkpoints/step-00000039/__0_0.distcp").write_bytes(b"damaged")
    assert tombola(*words, output=tmp_path / "out") == [1]
    assert f"remove {level} to train that level again" in (tmp_path / "out.0").read_text()
    shutil.rmtree(level)
    assert tombola(*words) == [0]
    assert ticket_facts(tmp_path / "tiny") == ticket_facts(reference)


def refuses_to_choose_again(words: list[str]) -> None:
    """Runs a command in which choosing masks for level 1 would give others than before."""
    from pruning import imp

    def other(*arguments: object) -> object:
        raise AssertionError("the masks of level 1 were chosen before")

    imp.prune_fraction = other  # type: ignore[assignment]
    command(words)


def test_masks_are_chosen_once(reference: Path, tmp_path: Path) -> None:
    """A training that was interrupted goes on with its masks, without choosing them again."""
    text = TOML.replace("rounds = 2", "rounds = 1")
    words = ["run", write_config(tmp_path, text), "--root", str(tmp_path)]
    assert run_ranks(1, killed_run, words, "a step", 50) == [KILLED]
    assert run_ranks(1, refuses_to_choose_again, words) == [0]
    chosen = ticket_facts(tmp_path / "tiny")["imp/level-01"]["masks"]
    assert chosen == ticket_facts(reference)["imp/level-01"]["masks"]


def timed_saves(folder: str) -> None:
    """Writes at which of 8 polls the ranks agree to save, when a save is due at the third."""
    from train.engine import Engine
    from train.signals import Signals

    engine = Engine()
    signals = Signals(world_size=engine.world_size, is_main=engine.is_main, save_minutes=1e9)
    saves = []
    for poll in range(8):
        if poll == 2:
            signals._save_seconds = 0.0
        if signals.poll().save:
            saves.append(poll)
            signals._save_seconds = 1e9
    signals.drain()
    Path(folder, str(engine.rank)).write_text(str(saves))
    engine.close()


def test_a_timed_save_happens_once_on_all_ranks(tmp_path: Path) -> None:
    """Asked for at poll 2, agreed on at poll 3, by both ranks, and not once more."""
    assert run_ranks(2, timed_saves, str(tmp_path)) == [0, 0]
    assert {path.read_text() for path in tmp_path.iterdir()} == {"[3]"}
