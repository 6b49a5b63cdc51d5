"""TensorBoard, Weights & Biases and MLflow get what metrics.jsonl has, each read back here."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import KILLED, killed_run
from processes import command, free_port, run_ranks
from s3 import with_environment
from tiny import TOML, facts, final_states, write_config
from waiting import wait_for

SHORT = TOML.replace("rounds = 2", "rounds = 1").replace('["random"]', "[]")
WITHOUT_LEVELS = ["--stages.imp.rounds", "0"]


def run(environment: dict[str, str], words: list[str], output: Path | None = None) -> int:
    """The exit code of a command under these variables."""
    out = None if output is None else str(output)
    (code,) = run_ranks(1, with_environment, environment, command, words, out)
    return code


def words_of(folder: Path, tracker: str, text: str = SHORT) -> list[str]:
    return ["run", write_config(folder, text), "--root", str(folder), "--log.trackers", tracker]


def expected(folder: Path, level: str) -> list[tuple[int, float]]:
    """Step and loss of the training of a level, by metrics.jsonl."""
    found = [f for f in facts(folder / "tiny") if (f["event"], f["level"]) == ("train", level)]
    return [(fact["step"], fact["loss"]) for fact in found]


def test_tensorboard_has_the_configuration(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run({}, [*words_of(tmp_path, "tensorboard"), *WITHOUT_LEVELS]) == 0
    accumulator = EventAccumulator(str(tmp_path / "tiny/tensorboard"))
    accumulator.Reload()
    (text,) = accumulator.Tensors("configuration/text_summary")
    assert b"| train.total | 3ep |" in text.tensor_proto.string_val[0]
    scalars = accumulator.Scalars("imp/level-00/train/loss")
    assert [(one.step, one.value) for one in scalars] == [
        (step, pytest.approx(loss)) for step, loss in expected(tmp_path, "level-00")
    ]


# MLflow ----------------------------------------------------------------------------------


@pytest.fixture(params=["folder", "server"])
def mlflow(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The variables with which MLflow keeps its runs in a folder, or on a server."""
    pytest.importorskip("mlflow", reason="needs mlflow: pip install 'tombola[mlflow]'")
    allowed = {"MLFLOW_ALLOW_FILE_STORE": "true"}  # which warns of its age otherwise
    if request.param == "folder":
        yield {**allowed, "MLFLOW_TRACKING_URI": f"file://{tmp_path}/mlruns"}
        return
    pytest.importorskip("sqlalchemy", reason="needs a whole MLflow: pip install mlflow")
    port = free_port()
    database = ["--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db", "--workers", "1"]
    place = ["--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *database, *place], cwd=tmp_path
    )
    try:
        wait_for(lambda: answers(port), what="the server")
        yield {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    finally:
        server.terminate()
        server.wait()


def answers(port: int) -> bool:
    """Whether a server listens there by now."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def runs_in_mlflow(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All runs of the experiment, and a client to ask for more."""
    from mlflow import MlflowClient

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    client = MlflowClient(environment["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("tombola")
    found = client.search_runs([experiment.experiment_id])
    return [(one, client) for one in found]


def test_a_killed_run_goes_on_in_the_same_run_of_mlflow(
    mlflow: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No number twice; the steps begin anew at each level."""
    words = words_of(tmp_path, "mlflow")
    assert run_ranks(1, with_environment, mlflow, killed_run, words, "a step", 39 + 12) == [KILLED]
    assert run(mlflow, [*words, "--log.every", "5", "--checkpoint.keep", "3"]) == 0
    ((one, client),) = runs_in_mlflow(mlflow, monkeypatch)
    assert one.info.status == "FINISHED"
    assert one.info.run_name == "tiny"
    assert one.data.tags["tombola.folder"] == str(tmp_path / "tiny")
    assert one.data.params["stages.imp.rewind"] == "5it"
    assert one.data.params["train.total"] == "3ep"
    for level in ("level-00", "level-01"):
        history = client.get_metric_history(one.info.run_id, f"imp/{level}/train/loss")
        found = sorted((point.step, point.value) for point in history)
        assert found == expected(tmp_path, level)
    assert "imp/level-01/test/evaluation/accuracy" in one.data.metrics
    assert "imp/level-01/train/images_per_second" in one.data.metrics
    assert not any(key.endswith(("/stop", "/step")) for key in one.data.metrics)


def folder_of_mlflow(tmp_path: Path) -> dict[str, str]:
    pytest.importorskip("mlflow", reason="needs mlflow: pip install 'tombola[mlflow]'")
    return {
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_TRACKING_URI": f"file://{tmp_path}/mlruns",
    }


def test_each_run_of_several_is_one_of_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = folder_of_mlflow(tmp_path)
    words = [*words_of(tmp_path, "mlflow"), *WITHOUT_LEVELS, "--seeds", "1", "2"]
    assert run(environment, words) == 0
    names = {one.info.run_name for one, _ in runs_in_mlflow(environment, monkeypatch)}
    assert names == {"tiny/seed-1", "tiny/seed-2"}


def failing_run(words: list[str], mlruns: str, step: int, output: str) -> None:
    """Runs a command during which a file takes the place of MLflow's folder."""
    from train.engine import Engine

    update = Engine.update

    def wrapper(self: Engine, state: Any) -> None:
        update(self, state)
        if state.step == step and os.path.isdir(mlruns):
            os.rename(mlruns, f"{mlruns}-gone")
            Path(mlruns).write_text("")

    Engine.update = wrapper  # type: ignore[method-assign]
    command(words, output)


def test_a_tracker_that_fails_does_not_end_the_training(tmp_path: Path) -> None:
    """It is told in one line; the run comes to what it comes to without."""
    environment = folder_of_mlflow(tmp_path)
    words, out = words_of(tmp_path, "mlflow"), tmp_path / "out"
    mlruns = str(tmp_path / "mlruns")
    target = (with_environment, environment, failing_run, words, mlruns, 17, str(out))
    assert run_ranks(1, *target) == [0]
    (line,) = [one for one in (tmp_path / "out.0").read_text().splitlines() if "mlflow" in one]
    assert line.startswith("log.trackers: mlflow failed, and gets no more of this attempt: ")
    assert line.endswith("; metrics.jsonl has all")
    assert run({}, [*words_of(tmp_path, "mlflow")[:-2], "--name", "without"]) == 0
    assert facts(tmp_path / "tiny") == facts(tmp_path / "without")
    states, others = final_states(tmp_path / "tiny"), final_states(tmp_path / "without")
    assert states.keys() == others.keys()
    for level, tensors in states.items():
        assert all(torch.equal(value, others[level][name]) for name, value in tensors.items())

    # A run that goes on is not kept from it either; a new one is.
    assert run(environment, words, out) == 0
    assert "mlflow failed" in (tmp_path / "out.0").read_text()
    assert run(environment, [*words, "--name", "new"], out) == 1
    assert "error: log.trackers: mlflow cannot be opened: " in (tmp_path / "out.0").read_text()


def test_a_server_that_is_away_is_one_line(tmp_path: Path) -> None:
    folder_of_mlflow(tmp_path)
    with socket.socket() as taken:  # bound, and not listening: refused at once
        taken.bind(("127.0.0.1", 0))
        away = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{taken.getsockname()[1]}"}
        words = [*words_of(tmp_path, "mlflow"), *WITHOUT_LEVELS]
        assert run(away, words, tmp_path / "out") == 1
        (line,) = (tmp_path / "out.0").read_text().splitlines()[-1:]
        assert line.startswith("error: log.trackers: mlflow cannot be opened: ")
        assert "Mend it, or leave it out" in line


def test_mlflow_needs_to_know_where(tmp_path: Path) -> None:
    folder_of_mlflow(tmp_path)
    assert run({}, words_of(tmp_path, "mlflow"), tmp_path / "out") == 2
    assert "mlflow needs the variable MLFLOW_TRACKING_URI" in (tmp_path / "out.0").read_text()


# Weights & Biases ------------------------------------------------------------------------


def records_of_wandb(path: Path) -> list[Any]:
    """The records in a file of an offline run: a header, and then as LevelDB writes logs.

    Blocks of 32 KiB; a record is a checksum, its length and whether it is whole, first, middle or
    last, and bytes of a protobuf message.
    """
    from wandb.proto import wandb_internal_pb2

    content, block, place = path.read_bytes(), 32768, 7
    found, parts = [], b""
    while place + 7 <= len(content):
        if block - place % block < 7:
            place += block - place % block
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        if kind == 0:
            break
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            found.append(record)
            parts = b""
    return found


def stopped_run(words: list[str], step: int) -> None:
    """Runs a command that is told to stop after so many steps in all."""
    from train.engine import Engine

    update, steps = Engine.update, [0]

    def wrapper(self: Engine, state: Any) -> None:
        update(self, state)
        steps[0] += 1
        if steps[0] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    Engine.update = wrapper  # type: ignore[method-assign]
    command(words)


def test_wandb_gets_the_metrics_offline(tmp_path: Path) -> None:
    """Of both attempts under one id; `step` of its own counts records, ours is a number beside."""
    pytest.importorskip("wandb", reason="needs wandb: pip install 'tombola[wandb]'")
    environment = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    words = words_of(tmp_path, "wandb")
    assert run_ranks(1, with_environment, environment, stopped_run, words, 46) == [75]
    assert run(environment, words) == 0
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    records = [record for file in files for record in records_of_wandb(file)]
    begun = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert len({one.run_id for one in begun}) == 1
    assert {one.project for one in begun} == {"tombola"}
    assert {one.display_name for one in begun} == {"tiny"}
    config = {
        update.key or ".".join(update.nested_key): json.loads(update.value_json)
        for record in records
        for update in record.config.update
    }
    assert config["train.total"] == "3ep"
    rows = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row}
        for row in (record.history.item for record in records)
        if row
    ]
    for level in ("level-00", "level-01"):
        prefix = f"imp/{level}/train"
        found = [
            (row[f"{prefix}/step"], row[f"{prefix}/loss"])
            for row in rows
            if f"{prefix}/loss" in row
        ]
        assert found == expected(tmp_path, level)
