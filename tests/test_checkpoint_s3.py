"""Checkpoints and whole runs on an object store that works, is slow, fails, and is cut off."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import KILLED, killed_run
from processes import command, run_ranks, tombola
from s3 import Bucket, Proxy, faulty, s3_server, with_environment
from tiny import TOML, assert_same_run, write_config

from data.errors import RunError
from data.files import Folder
from train.checkpoint import Checkpoints
from train.ranks import ALONE

SHORT = TOML.replace("rounds = 2", "rounds = 1").replace('controls = ["random"]\n', "")
STATE: dict[str, Any] = {
    "model": {"weight": torch.arange(30_000.0), "count": torch.tensor(7)},
    "progress": {"step": 3},
}


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with s3_server() as found:
        yield found


@pytest.fixture
def proxy(bucket: Bucket) -> Iterator[Proxy]:
    """A proxy before the server, through which this process goes."""
    with faulty(bucket) as (found, _):
        yield found


@pytest.fixture
def checkpoints(bucket: Bucket, tmp_path: Path) -> Checkpoints:
    return Checkpoints(Folder(f"{bucket.url}/{tmp_path.name}"), ALONE, keep=2)


def holds(checkpoints: Checkpoints, step: int) -> None:
    """The newest checkpoint is that of `step`, and whole."""
    found = checkpoints.load_latest()
    assert found is not None
    assert found[0] == step
    assert torch.equal(found[1]["model"]["weight"], STATE["model"]["weight"])


def test_checkpoints_roll_on_a_store(checkpoints: Checkpoints) -> None:
    """The last two and the kept one are there, and the newest comes back as it was."""
    for step in range(1, 6):
        checkpoints.save(step, STATE, kept=step == 2)
    holds(checkpoints, 5)
    assert checkpoints.folder.names() == ["step-00000002", "step-00000004", "step-00000005"]


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "manifest.json"])
def test_a_server_that_fails_in(file: str, proxy: Proxy, checkpoints: Checkpoints) -> None:
    """... answers 500: the save fails in one line, the one before loads, the next one commits."""
    checkpoints.save(1, STATE)
    checkpoints.wait()
    proxy.fail(float("inf"), containing=f"step-00000002/{file}")
    checkpoints.save(2, STATE)
    with pytest.raises(RunError, match=f"{checkpoints.folder}/step-00000002.*made to fail"):
        checkpoints.save(3, STATE)
    proxy.heal()
    holds(checkpoints, 1)
    checkpoints.save(3, STATE)
    holds(checkpoints, 3)
    assert checkpoints.folder.names() == ["step-00000001", "step-00000003"]


def test_a_connection_that_is_cut(proxy: Proxy, checkpoints: Checkpoints) -> None:
    """... after half of a shard has been sent: as if the save had never been."""
    checkpoints.save(1, STATE)
    checkpoints.wait()
    proxy.cut(60_000, containing="step-00000002")
    checkpoints.save(2, STATE)
    with pytest.raises(RunError, match=f"{checkpoints.folder}/step-00000002.*closed"):
        checkpoints.wait()
    proxy.heal()
    holds(checkpoints, 1)


def test_a_slow_server_does_not_hold_up_the_training(
    proxy: Proxy, checkpoints: Checkpoints
) -> None:
    """While each request is held back, the state that was saved may change: its copy does not."""
    state = {"model": {"weight": STATE["model"]["weight"].clone()}}
    proxy.delay(0.1)
    checkpoints.save(1, state)
    state["model"]["weight"].zero_()
    assert not any("manifest" in path for method, path in proxy.requests if method == "PUT")
    checkpoints.wait()
    proxy.heal()
    holds(checkpoints, 1)


@pytest.mark.parametrize(
    ("world_size", "point"),
    [(1, "a step"), (1, "a deletion, half way"), (2, "a save, before its manifest")],
)
def test_a_run_on_a_store_killed_in(
    world_size: int, point: str, bucket: Bucket, tmp_path: Path
) -> None:
    """... goes on with the same command to the same weights, masks and metrics."""
    config = write_config(tmp_path, SHORT)
    name = f"{world_size}-{point.replace(' ', '-').replace(',', '')}"
    words = ["run", config, "--root", f"{bucket.url}/{name}"]
    codes = run_ranks(world_size, with_environment, bucket.environment, killed_run, words, point, 3)
    assert codes[0] == KILLED
    codes = run_ranks(world_size, with_environment, bucket.environment, command, words)
    assert codes == [0] * world_size
    bucket.download(name, tmp_path / "remote")
    assert tombola("run", config, "--root", str(tmp_path), world_size=world_size)[0] == 0
    assert_same_run(tmp_path / "remote/tiny", tmp_path / "tiny")


def test_a_run_whose_store_fails_ends_in_one_line(bucket: Bucket, tmp_path: Path) -> None:
    """... with exit code 1, and goes on when the store does."""
    config, output = write_config(tmp_path, SHORT), str(tmp_path / "out")
    with faulty(bucket) as (proxy, seen):
        words = ["run", config, "--root", f"{bucket.url}/fails"]
        proxy.fail(float("inf"), containing="step-00000016")
        assert run_ranks(1, with_environment, seen.environment, command, words, output) == [1]
        lines = (tmp_path / "out.0").read_text().splitlines()
        assert lines[-1].startswith(f"error: {bucket.url}/fails/tiny/imp/level-00/checkpoints/")
        assert "Traceback" not in "".join(lines)
        proxy.heal()
        assert run_ranks(1, with_environment, seen.environment, command, words, output) == [0]
    assert "goes on at step 8 of 39" in (tmp_path / "out.0").read_text()
