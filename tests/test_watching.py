"""`tombola watch`: what a run is at that somebody else writes, from its files alone."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from killing import KILLED, killed_run
from processes import run_ranks, tombola
from rich.console import Console
from s3 import Bucket, s3_server
from tiny import TOML, write_config
from waiting import wait_for

from data.errors import StoreError
from data.files import Folder, Journal
from launch import watching
from launch.cli import run_command
from launch.tailing import Tail
from launch.watched import Watched

SHORT = TOML.replace("rounds = 2", "rounds = 1")


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with s3_server() as found:
        yield found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a finished run, `tiny`."""
    folder = tmp_path_factory.mktemp("watched")
    assert tombola("run", write_config(folder, SHORT), "--root", str(folder)) == [0]
    return folder


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a look at once prints."""
    capsys.readouterr()
    assert run_command(["watch", *words, "--once"]) == 0
    return capsys.readouterr().out


def document(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert run_command(["watch", *words, "--json"]) == 0
    runs: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["runs"]
    return runs


# Journals --------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_only_what_is_new_is_read(
    where: str, tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 2000 lines each once, whether the file grows or is written anew with more."""
    folder = Folder(tmp_path if where == "disk" else f"{bucket.url}/new")
    lengths: list[int] = []
    read_range = Folder.read_range

    def counted(self: Folder, name: str, start: int, length: int) -> bytes:
        content = read_range(self, name, start, length)
        lengths.append(len(content))
        return content

    monkeypatch.setattr(Folder, "read_range", counted)
    journal = Journal(folder, "metrics.jsonl")
    tail = Tail(folder, "metrics.jsonl")
    for first in range(0, 2000, 200):
        for step in range(first, first + 200):
            journal.append({"step": step, "text": "x" * 80})
        journal.sync()
        assert tail.look()
        assert not tail.look()
    assert [record["step"] for record in tail.records] == list(range(2000))
    assert sum(lengths) < 1.3 * folder.size("metrics.jsonl")


def test_a_torn_last_line_comes_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(Folder(tmp_path), path.name)
    path.write_bytes(b'{"step": 1}\n{"ste')
    assert tail.look()
    assert tail.records == [{"step": 1}]
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n')
    assert tail.look()
    assert (tail.records[1:], tail.num_damaged) == ([{"step": 2}], 0)
    path.write_bytes(path.read_bytes() + b"\0\xff no line\n[3]\n" + b'{"step": 4}\n')
    assert tail.look()
    assert (tail.records[2:], tail.num_damaged) == ([{"step": 4}], 2)


@pytest.mark.parametrize(
    "other",
    [b'{"step": 7}\n', b'{"step": 7}\n{"step": 8}\n{"step": 9}\n'],
    ids=["shorter", "longer"],
)
def test_another_file_of_the_name_is_read_from_its_beginning(tmp_path: Path, other: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(Folder(tmp_path), path.name)
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n')
    assert tail.look()
    path.write_bytes(other)
    assert tail.look()
    assert tail.records == [json.loads(line) for line in other.splitlines()]


# Runs ------------------------------------------------------------------------------------


def test_a_run_is_told_with_its_levels(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By name, by path, in words and as JSON."""
    printed = told(capsys, "tiny", "--root", str(root))
    assert "attempt 1, 1 rank from " in printed
    assert "levels 2/2, done" in printed
    assert "imp/level-01-random  density 59.99%  step 39/39  loss " in printed
    assert "  validation 0." in printed
    assert "ETA 0:00:00" in printed
    assert " s ago" in printed
    assert "level  density  ticket  random  images/s" in printed
    (run,) = document(capsys, str(root / "tiny"))
    index = json.loads((root / "tiny/imp/level-01/ticket.json").read_text())
    level = run["stages"]["imp"][1]
    assert level["ticket"] == index["about"]["metrics"]["test"]["accuracy"]
    (part,) = run["parts"]
    assert (part["stage"], part["level"], part["step"], part["stop"]) == (
        "imp",
        "level-01-random",
        39,
        39,
    )
    assert set(part["accuracies"]) == {"validation", "test"}
    assert (run["num_finished"], run["num_levels"]) == (2, 2)


def test_a_run_under_way_is_followed(tmp_path: Path) -> None:
    """Killed in its second level, and again on its way to the end."""
    words = ["run", write_config(tmp_path, SHORT), "--root", str(tmp_path)]
    watched = Watched(Folder(tmp_path / "tiny"))
    assert run_ranks(1, killed_run, words, "a step", 39 + 17) == [KILLED]
    state = watched.look()
    (now,) = state.parts
    assert (now.level, now.step, now.stop) == ("level-01", 20, 39)
    assert now.eta is not None
    assert now.eta > 0
    assert now.accuracies.keys() == {"validation"}
    assert (state.attempts, state.num_finished, state.num_levels) == (1, 1, 2)
    assert not state.is_done
    assert tombola(*words) == [0]
    state = watched.look()
    assert [ticket.name for ticket in state.tickets] == ["level-00", "level-01", "level-01-random"]
    assert (state.attempts, state.is_done) == (2, True)


def test_a_run_that_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    """From before its beginning to its end; a process of its own, which Ctrl-C ends with 0."""
    root, out = str(tmp_path / "runs"), tmp_path / "out"
    words = [sys.executable, "-u", "-m", "launch", "watch", "tiny", "--root", root]
    with open(out, "w") as file:
        process = subprocess.Popen([*words, "--interval", "0.1"], stdout=file, stderr=file)
    try:
        wait_for(lambda: "tiny: no run there yet" in out.read_text())
        assert tombola("run", write_config(tmp_path, SHORT), "--root", root) == [0]
        wait_for(lambda: "levels 2/2" in out.read_text())
    finally:
        process.send_signal(signal.SIGINT)
    assert process.wait() == 0
    lines = out.read_text().splitlines()
    assert lines[0] == "tiny: no run there yet"
    assert all(line.startswith(f"{root}/tiny: ") for line in lines[1:])
    assert "imp/level-01-random" in lines[-1]


def test_nothing_to_see_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["tiny", "--root", str(tmp_path)]
    assert told(capsys, *place) == "tiny: no run there yet\n"
    assert document(capsys, *place) == []
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/config.toml").write_text("")  # damaged, or not whole yet
    assert told(capsys, *place).endswith("no line yet\n")
    assert run_command(["watch", *place, "--interval", "0"]) == 2
    assert "--interval 0.0: must be above 0" in capsys.readouterr().err


def test_a_long_silence_is_told(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """... but of a run that is done."""
    run = tmp_path / "tiny"
    shutil.copytree(root / "tiny", run)
    os.utime(run / "metrics.jsonl", (time.time() - 7300,) * 2)
    printed = told(capsys, str(run))
    assert "last line 2 h ago" in printed
    assert "silent" not in printed
    (run / "imp/level-01/ticket.json").unlink()
    assert "last line 2 h ago, long silent" in told(capsys, str(run))
    assert document(capsys, str(run))[0]["parts"][0]["is_silent"]


def test_parts_of_a_run_are_told_side_by_side(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = root / "tiny/metrics-imp.random.jsonl"
    part.write_bytes((root / "tiny/metrics.jsonl").read_bytes().splitlines(True)[0])
    try:
        printed = told(capsys, "tiny", "--root", str(root))
        assert "imp/level-00 (part imp.random)  density 100.00%  step 5/39" in printed
        assert "imp/level-01-random  density 59.99%  step 39/39" in printed
    finally:
        part.unlink()


def test_of_several_runs_each_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", write_config(tmp_path, SHORT), "--root", str(tmp_path), "--seed", "1,2"]
    words += ["--stages.imp.rewind", "init,5it", "--stages.imp.rounds", "0"]
    assert tombola(*words) == [0]
    printed = told(capsys, "tiny", "--root", str(tmp_path))
    for name in ("rewind-init/seed-1", "rewind-5it/seed-2"):
        assert name in printed
    runs = document(capsys, "tiny", "--root", str(tmp_path))
    assert [run["num_finished"] for run in runs] == [1] * 4
    (one,) = document(capsys, "tiny/rewind-init/seed-2", "--root", str(tmp_path))
    assert one["run"].endswith("rewind-init/seed-2")


def test_a_run_on_an_object_store_is_watched(
    tmp_path: Path, bucket: Bucket, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path, SHORT)
    words = ["run", path, "--root", bucket.url, "--stages.imp.rounds", "0"]
    assert run_command(words) == 0
    printed = told(capsys, "tiny", "--root", bucket.url)
    assert "levels 1/1, done" in printed
    assert " s ago" in printed
    (run,) = document(capsys, f"{bucket.url}/tiny")
    assert run["parts"][0]["step"] == 39


def test_a_terminal_is_drawn_anew_and_a_failing_store_tried_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    monkeypatch.setattr(
        watching, "Console", lambda **_: Console(file=out, force_terminal=True, width=120)
    )
    looks = [0]
    look = Watched.look

    def failing(self: Watched) -> Any:
        looks[0] += 1
        if looks[0] == 2:
            raise StoreError("s3://bucket: TimeoutError: made to fail")
        return look(self)

    def interrupted(seconds: float) -> None:
        if looks[0] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Watched, "look", failing)
    monkeypatch.setattr(time, "sleep", interrupted)
    assert run_command(["watch", "tiny", "--root", str(root)]) == 0
    assert looks[0] == 3
    before, told, after = out.getvalue().partition("made to fail; trying again")
    assert told
    assert before.count("step 39/39") == 2  # what was known stays beside what is wrong
    assert "step 39/39" in after
    assert "made to fail" not in after
