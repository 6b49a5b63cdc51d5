"""The command as a user meets it: what it prints, what it refuses, how it ends."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import tombola
from tiny import TOML, facts, write_config

from launch.cli import run_command


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with one finished run, `tiny`."""
    folder = tmp_path_factory.mktemp("runs")
    assert run_command(["run", write_config(folder), "--root", str(folder)]) == 0
    return folder


def test_a_run_prints_a_table_and_draws_a_plot(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Level, density, accuracy of ticket and control, images/s; a PNG in the run folder."""
    run_command(["run", str(root / "tiny.toml"), "--root", str(root)])
    printed = capsys.readouterr().out
    for heading in ("level", "density", "test accuracy", "ticket", "random", "images/s"):
        assert heading in printed
    assert "35.98%" in printed
    assert f"{root}/tiny/accuracy.png" in printed
    assert (root / "tiny/accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_the_run_folder_holds_what_scripts_rely_on(root: Path) -> None:
    """config.toml, environment.json, metrics.jsonl, checkpoints, tickets, their objects."""
    run = root / "tiny"
    environment = json.loads((run / "environment.json").read_text())[0]
    assert environment["versions"]["torch"]
    assert environment["hardware"]["world_size"] == 1
    assert 'total = "3ep"' in (run / "config.toml").read_text()
    assert (run / "imp/level-01/checkpoints/step-00000039/manifest.json").exists()
    ticket = json.loads((run / "imp/level-01/ticket.json").read_text())
    for file in (*ticket["masks"]["shards"], *ticket["weights"]["files"]):
        assert (run / f"tickets/objects/{file['sha256']}.safetensors").exists()
    assert {"train", "evaluation"} == {fact["event"] for fact in facts(run)}
    splits = {(f["split"], f["step"]) for f in facts(run) if f["event"] == "evaluation"}
    assert splits == {("validation", 13), ("validation", 26), ("validation", 39), ("test", 39)}


def test_tickets_are_listed_and_shown(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By path or by name under --root; with --json one document and nothing else."""
    assert run_command(["tickets", "list", str(root / "tiny")]) == 0
    assert "imp/level-02-random" in capsys.readouterr().out
    assert run_command(["tickets", "list", "tiny", "--root", str(root), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [t["name"] for t in listed] == [
        "level-00",
        "level-01",
        "level-01-random",
        "level-02",
        "level-02-random",
    ]
    assert run_command(["tickets", "show", "tiny", "--root", str(root), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["name"] == "level-02"
    assert sum(layer["kept"] for layer in shown["layers"]) == shown["kept"]
    assert run_command(["tickets", "show", "tiny", listed[1]["id"][:8], "--root", str(root)]) == 0
    printed = capsys.readouterr().out
    assert "imp/level-01 <- imp/level-00" in printed
    assert "73 in all, 39 to find it" in printed  # 3 epochs of 13 steps, and those from step 5 on
    assert "stages.0.0.conv1.weight" in printed


def fails(capsys: pytest.CaptureFixture[str], words: list[str], code: int = 2) -> str:
    """The one line with which a command fails."""
    assert run_command(words) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_tickets_that_are_not_there(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """... are one line with the near one."""
    assert "did you mean 'tiny'?" in fails(
        capsys, ["tickets", "list", "tinny", "--root", str(root)]
    )
    words = ["tickets", "show", "tiny", "imp/level-1", "--root", str(root)]
    assert "no ticket 'imp/level-1'; did you mean 'imp/level-01'?" in fails(capsys, words)


def test_a_wrong_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, ["runn"])
    assert "Unrecognized options: runn; available subcommands: run, sweep, watch, launch" in line
    assert "see tombola --help" in fails(capsys, ["run"])
    assert "see tombola --help" in fails(capsys, ["tickets", "list"])
    assert "see tombola --help" in fails(capsys, ["bench", "engines"])


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    """`tombola run --help`: the command's, the sections' and the recipe's, with defaults."""
    assert run_command(["run", "--help"]) == 0
    printed = capsys.readouterr().out
    for option in ("--root", "--data.batch-size", "--train.total", "--prune-fraction", "0.2"):
        assert option in printed


def test_a_run_folder_of_another_configuration(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """... shows the difference and touches nothing."""
    before = (root / "tiny/config.toml").read_text()
    words = ["run", str(root / "tiny.toml"), "--root", str(root)]
    line = fails(capsys, [*words, "--train.total", "4ep", "--stages.imp.rounds", "1"])
    assert "belongs to another configuration" in line
    assert "stages.imp.rounds is 2 there and 1 here" in line
    assert "train.total is '3ep' there and '4ep' here" in line
    assert (root / "tiny/config.toml").read_text() == before
    assert run_command([*words, "--checkpoint.keep", "5", "--log.every", "7"]) == 0


def test_two_processes_do_not_share_a_run_folder(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    with open(root / "tiny/.lock-imp.tickets", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        line = fails(capsys, ["run", str(root / "tiny.toml"), "--root", str(root)])
    assert "another process is running in this folder" in line


def test_rewinding_beyond_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", write_config(tmp_path), "--root", str(tmp_path)]
    line = fails(capsys, [*words, "--stages.imp.rewind", "3ep"])
    assert "stages.imp.rewind = '3ep' is step 39: must be before the end" in line


def test_what_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data root, a tracker's package, a layer to exclude, a batch larger than the data."""
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    words = ["run", write_config(tmp_path), "--root", str(tmp_path), "--name"]
    missing = ["--data.source", "cifar10", "--data.root", "/nowhere"]
    assert "data.root = '/nowhere' holds no complete CIFAR10" in fails(
        capsys, [*words, "a", *missing]
    )
    assert "pip install 'tombola[wandb]'" in fails(capsys, [*words, "b", "--log.trackers", "wandb"])
    line = fails(capsys, [*words, "c", "--stages.imp.exclude", "head"])
    assert "exclude = 'head' matches no convolution or linear layer" in line
    assert "must be between 1 and the 1258" in fails(
        capsys, [*words, "d", "--data.batch_size", "5000"]
    )


def test_a_non_finite_loss_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, the step, and the checkpoint before it still there."""
    words = ["run", write_config(tmp_path), "--root", str(tmp_path), "--optimizer.lr", "1e30"]
    line = fails(capsys, words, code=1)
    assert "the loss is not finite at step" in line


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    """Exit code 1; with room made, the same command goes on to the end."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(disk)])
    if mounted.returncode:
        pytest.skip("this machine does not allow mounts")
    try:
        words = ["run", write_config(tmp_path), "--root", str(disk)]
        assert tombola(*words, output=tmp_path / "out") == [1]
        printed = (tmp_path / "out.0").read_text()
        assert "error: No space left on device" in printed
        assert "Traceback" not in printed
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        assert tombola(*words, output=tmp_path / "out") == [0]
        assert "goes on at step" in (tmp_path / "out.0").read_text()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_run_on_an_object_store(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """`--root` may be any fsspec URL; the run is complete there, and finished when run again."""
    words = ["run", write_config(tmp_path), "--root", "memory://bucket"]
    assert run_command(words) == 0
    capsys.readouterr()
    assert run_command(["tickets", "list", "memory://bucket/tiny", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 5
    assert run_command(words) == 0
    assert "memory://bucket/tiny/accuracy.png" in capsys.readouterr().out


def test_tensorboard_receives_the_metrics(tmp_path: Path) -> None:
    """`log.trackers = ["tensorboard"]` writes event files into the run folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = ["run", write_config(tmp_path), "--root", str(tmp_path), "--stages.imp.rounds", "0"]
    assert run_command([*words, "--log.trackers", "tensorboard"]) == 0
    accumulator = EventAccumulator(str(tmp_path / "tiny/tensorboard"))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    assert "imp/level-00/train/loss" in tags
    assert "imp/level-00/test/evaluation/accuracy" in tags
    steps = [event.step for event in accumulator.Scalars("imp/level-00/train/loss")]
    assert steps == [5, 10, 15, 20, 25, 30, 35, 39]


@pytest.mark.parametrize(
    "option",
    [
        ["--train.ema", "0.9"],
        ["--train.mixup", "0.2", "--train.cutmix", "1.0"],
        ["--train.label_smoothing", "0.1", "--train.clip", "1.0"],
        ["--train.precision", "bf16", "--train.channels_last", "true"],
        ["--train.micro_batch", "40"],
        ["--optimizer.name", "adamw", "--optimizer.decay_norm_and_bias", "false"],
        ["--schedule.name", "cosine", "--schedule.warmup", "5it"],
        ["--model.name", "test_byobnet", "--model.width", "None"],
    ],
    ids=lambda option: option[0],
)
def test_every_option_of_training_runs(option: list[str], tmp_path: Path) -> None:
    words = ["run", write_config(tmp_path), "--root", str(tmp_path), "--stages.imp.rounds", "1"]
    assert run_command([*words, "--stages.imp.controls", *option]) == 0


def test_the_installed_command_and_the_module_are_the_same(tmp_path: Path) -> None:
    """`tombola` and `python -m launch` end with the same exit code and line."""
    command = Path(sys.executable).parent / "tombola"
    for words in ([str(command)], [sys.executable, "-m", "launch"]):
        done = subprocess.run(
            [*words, "run", "none.toml"], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 2
        assert done.stderr == "error: none.toml: no such configuration file\n"


def test_a_terminal_shows_a_live_line(tmp_path: Path) -> None:
    """In a terminal the progress is a line that changes; the finished levels stay."""
    import pty

    words = [sys.executable, "-m", "launch", "run", write_config(tmp_path), "--root", str(tmp_path)]
    master, slave = pty.openpty()
    process = subprocess.Popen(words, stdout=slave, stderr=slave, cwd=Path(__file__).parent.parent)
    os.close(slave)
    printed = b""
    while True:
        try:
            part = os.read(master, 4096)
        except OSError:
            break
        if not part:
            break
        printed += part
    assert process.wait() == 0
    text = printed.decode()
    for fact in ("density 59.99%", "images/s", "ETA", "loss", "step "):
        assert fact in text
    assert "\x1b[" in text


assert TOML.count("[[stages]]") == 1


def test_a_run_that_computed_nothing_does_not_take_the_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistake is mended under the same name."""
    words = ["run", write_config(tmp_path), "--root", str(tmp_path), "--stages.imp.rounds", "0"]
    fails(capsys, [*words, "--stages.imp.rewind", "9ep"])
    fails(capsys, [*words, "--data.source", "cifar10", "--data.root", "/nowhere"])
    assert run_command(words) == 0


def test_the_data_may_move_between_two_attempts(root: Path) -> None:
    """Where the images are changes nothing of what is computed."""
    words = ["run", str(root / "tiny.toml"), "--root", str(root)]
    assert run_command([*words, "--data.root", "/elsewhere"]) == 0


def test_a_runs_own_configuration_goes_on_with_it(root: Path) -> None:
    """... also where an option was set to None, against its default."""
    words = ["run", str(root / "tiny.toml"), "--root", str(root), "--name", "own"]
    options = ["--stages.imp.rounds", "0", "--train.evaluate", "None"]
    assert run_command([*words, *options]) == 0
    assert run_command(["run", str(root / "own/config.toml"), "--root", str(root)]) == 0


@pytest.mark.parametrize("spelling", ["~/runs", "file://{}/runs", "{}/runs/"])
def test_a_root_may_be_spelt_in_any_way(
    spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Home, URL or path: the run is in one place, whole."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    words = ["run", write_config(tmp_path), "--stages.imp.rounds", "0"]
    assert run_command([*words, f"--root={spelling.format(tmp_path)}"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "tiny.toml"}
    assert (tmp_path / "runs/tiny/imp/level-00/checkpoints/step-00000039/manifest.json").exists()


def test_a_root_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown protocol, a missing package, a file in the way."""
    (tmp_path / "file").write_text("")
    words = ["run", write_config(tmp_path), "--root"]
    assert "foo://bucket: cannot be opened" in fails(capsys, [*words, "foo://bucket"])
    fails(capsys, [*words, str(tmp_path / "file")], code=1)


def test_what_a_model_does_not_take_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", write_config(tmp_path), "--root", str(tmp_path), "--model.width", "None"]
    line = fails(capsys, [*words, "--model.name", "vit_tiny_patch16_224"])
    assert "model.name = 'vit_tiny_patch16_224' does not take images of 1x8x8" in line


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_mistake_under_several_ranks_is_said_once(tmp_path: Path) -> None:
    """What only rank 0 finds out ends all ranks, and is printed by one."""
    words = ["run", write_config(tmp_path), "--root", str(tmp_path), "--log.trackers", "wandb"]
    assert tombola(*words, world_size=2, output=tmp_path / "out") == [2, 2]
    assert "pip install 'tombola[wandb]'" in (tmp_path / "out.0").read_text()
    assert (tmp_path / "out.1").read_text() == ""


def test_mixup_on_odd_shares_is_refused_on_every_rank(tmp_path: Path) -> None:
    """96 images on two ranks are even shares; 98 are not."""
    words = ["run", write_config(tmp_path), "--root", str(tmp_path), "--train.mixup", "0.1"]
    codes = tombola(*words, "--data.batch_size", "98", world_size=2, output=tmp_path / "out")
    assert codes == [2, 2]
    assert "choose a multiple of 4" in (tmp_path / "out.0").read_text()


def test_a_damaged_line_of_metrics_is_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line that is no JSON ends the run in one line, and nothing is thrown away."""
    words = ["run", str(root / "tiny.toml"), "--root", str(root)]
    path = root / "tiny/metrics.jsonl"
    before = path.read_bytes()
    path.write_bytes(before.replace(b"{", b"\0", 1))
    line = fails(capsys, words, code=1)
    assert "metrics.jsonl, line 1: damaged" in line
    path.write_bytes(before)
    assert run_command(words) == 0


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--version"]) == 0
    assert capsys.readouterr().out.startswith("tombola ")
