"""Who may do what in a run's folder while other processes are at work in it."""

import errno
import fcntl
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import tombola
from tiny import TOML, write_config

from data.errors import UserError
from data.files import Folder
from launch import locks
from launch.claim import Claim, claimed
from launch.cli import run_command
from launch.config import RunConfig, read_config
from launch.locks import busy_stages, folder_lock, unit_lock
from train.engine import Engine

TWO = TOML + '[[stages]]\nname = "other"\nrecipe = "imp"\nrounds = 1\n'
EVERY = ["imp.tickets", "imp.random", "other.tickets"]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "run")


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return read_config(write_config(tmp_path, TWO))


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.close()


def test_two_processes_never_do_the_same_part(tmp_path: Path) -> None:
    """While one does a part, another that wants it, or all, is refused; another part is not."""
    out = tmp_path / "out"
    run = ["run", write_config(tmp_path, TWO), "--root", str(tmp_path)]
    assert tombola(*run, "--only", "imp:tickets") == [0]
    with unit_lock(Folder(tmp_path / "tiny"), "other.tickets"):
        for words in (["--only", "other"], []):
            assert tombola(*run, *words, output=out) == [2]
            said = Path(f"{out}.0").read_text()
            assert "another process is running in this folder, at other:tickets" in said
            assert said.count("\n") == 1
        assert tombola(*run, "--only", "imp:random") == [0]


def test_a_process_started_anew_waits_for_its_dying_self(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restart by torchrun or a requeue by SLURM; at first it is refused at once."""
    monkeypatch.setattr(locks, "_SHORT", 0.0)
    held, dies = threading.Event(), threading.Event()

    def predecessor() -> None:
        with unit_lock(folder, "imp.tickets"):
            held.set()
            dies.wait(50)

    thread = threading.Thread(target=predecessor)
    thread.start()
    held.wait(50)
    for first in ("", "0"):
        if first:
            monkeypatch.setenv("SLURM_RESTART_COUNT", first)
        with pytest.raises(UserError, match="another process"), unit_lock(folder, "imp.tickets"):
            pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    threading.Timer(0.5, dies.set).start()
    with unit_lock(folder, "imp.tickets") as is_locked:
        assert dies.is_set()
        assert is_locked
    thread.join()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_told_once(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run goes on, and says what the user has to see to."""

    def flock(file: Any, how: int) -> None:
        raise OSError(code, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    words = ["run", write_config(tmp_path), "--root", str(tmp_path), "--only", "imp:tickets"]
    assert run_command(words) == 0
    told = f"{tmp_path}/tiny: this file system has no locks: start nothing twice there"
    assert " ".join(capsys.readouterr().out.split()).count(told) == 1


def test_other_errors_of_a_lock_are_errors(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails is no file system without locks."""

    def flock(file: Any, how: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="broken"), folder_lock(folder):
        pass


def test_a_folder_belongs_to_the_configuration_of_those_at_work(
    folder: Folder, config: RunConfig, engine: Engine, tmp_path: Path
) -> None:
    """Even before they have any result: two of two configurations would mix theirs."""
    faster = read_config(write_config(tmp_path, TWO), ["--optimizer.lr", "0.2"])
    longer = read_config(write_config(tmp_path, TWO), ["--stages.other.rounds", "2"])
    shorter = read_config(write_config(tmp_path, TWO), ["--stages.imp.rounds", "1"])
    with claimed(folder, config, engine, ["imp.tickets"], part="imp.tickets"):
        assert busy_stages(folder, ["other.tickets"]) == {"imp"}
        assert busy_stages(folder, ["imp.tickets"]) == set()
        for different, key in ((faster, "optimizer.lr"), (shorter, "stages.imp.rounds")):
            refused = pytest.raises(UserError, match=f"another configuration: {key} is")
            with refused, claimed(folder, different, engine, ["other.tickets"], part="other"):
                pass
        with claimed(folder, longer, engine, ["other.tickets"], part="other"):
            pass
    assert busy_stages(folder, []) == set()
    with claimed(folder, faster, engine, EVERY):
        pass


def claims(folder: Folder, config: RunConfig, engine: Engine, units: list[str], part: str) -> Claim:
    with claimed(folder, config, engine, units, part=part) as claim:
        return claim


@pytest.mark.parametrize("place", ["disk", "store"])
def test_what_others_record_later_changes_nothing_for_a_part(
    place: str, config: RunConfig, engine: Engine, tmp_path: Path
) -> None:
    """A part that began when nobody had, on one rank, goes on as one of a run begun so; each part
    has a file of its own, so that none is lost where nothing locks."""
    folder = Folder(tmp_path / "run" if place == "disk" else f"memory://{tmp_path.name}/run")
    assert claims(folder, config, engine, ["imp.tickets"], "imp.tickets").ranks_before == []
    hardware = {"world_size": 8}
    earlier = {"started": "2000-01-01T00:00:00+00:00", "hardware": hardware, "begun_with": 8}
    folder.write_json("environment-other.json", [earlier])
    assert claims(folder, config, engine, ["imp.random"], "imp.random").ranks_before == [8, 1]
    assert claims(folder, config, engine, ["imp.tickets"], "imp.tickets").ranks_before[0] == 1
    assert claims(folder, config, engine, ["imp.random"], "imp.random").ranks_before[0] == 8
    counts = {name: len(json.loads(folder.read(name))) for name in folder.names() if "env" in name}
    assert counts == {
        "environment-imp.random.json": 2,
        "environment-imp.tickets.json": 2,
        "environment-other.json": 1,
    }


def test_what_a_process_writes_first_is_no_result(
    folder: Folder, config: RunConfig, engine: Engine, tmp_path: Path
) -> None:
    """The configuration may still change; a stage whose name begins as such a file's has results,
    though, once it has any."""
    for name in ("metrics-imp.tickets.jsonl", "environment-imp.tickets.json", "data.json"):
        folder.write(name, b"")
    with claimed(folder, config, engine, EVERY):
        pass
    other = read_config(write_config(tmp_path, TWO), ["--optimizer.lr", "0.2"])
    with claimed(folder, other, engine, EVERY):
        pass
    folder.write("metrics-of-layers/level-00/masks.json", b"{}")
    refused = pytest.raises(UserError, match=r"configuration: optimizer\.lr is 0\.2 there")
    with refused, claimed(folder, config, engine, EVERY):
        pass


@pytest.mark.parametrize("name", ["tickets", "manifests", "tensorboard"])
def test_a_stage_takes_no_folder_that_a_run_has_besides(name: str, tmp_path: Path) -> None:
    text = TOML.replace('name = "imp"', f'name = "{name}"')
    with pytest.raises(UserError, match="other than 'tickets', 'manifests', 'tensorboard'"):
        read_config(write_config(tmp_path, text))
