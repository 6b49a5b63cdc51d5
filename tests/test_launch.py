"""`tombola launch`: torchrun's options with our settings, and the exit codes of the ranks."""

import os
import signal
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from killing import KILLED, killed_run
from processes import run_ranks, tombola
from test_distributed import GROUP_NORM
from tiny import TOML, assert_same_run, final_states, write_config

from data.errors import Interrupted, RunError, UserError
from launch import agent, rendezvous
from launch.cli import run_command
from launch.config import read_config
from launch.failures import fail, is_lost_rank
from launch.hosts import Host, micro_batch, ranks_before, told
from train import network

REPOSITORY = Path(__file__).parent.parent
TWO = ("--nnodes", "2", "--rdzv-endpoint", "localhost")


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> list[Namespace]:
    """What torchrun would be started with; nothing is started."""
    found: list[Namespace] = []

    def run(given: Namespace, folder: Path) -> int:
        found.append(given)
        return 0

    monkeypatch.setattr(agent, "_run", run)
    for name in ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "TORCH_CPP_LOG_LEVEL", "TOMBOLA_LAUNCH"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    return found


def conf(given: Namespace) -> dict[str, str]:
    return dict(pair.split("=") for pair in given.rdzv_conf.split(","))


def test_one_node_needs_no_option(options: list[Namespace]) -> None:
    """It meets itself on the loopback, whatever its own name resolves to."""
    assert agent.launch(["run", "a.toml", "--train.total", "3ep"]) == 0
    (given,) = options
    assert given.standalone
    assert given.local_addr == "127.0.0.1"
    assert (given.module, given.training_script) == (True, "launch")
    assert given.training_script_args == ["run", "a.toml", "--train.total", "3ep"]
    assert int(given.max_restarts) == 3
    assert "SIGUSR1" in given.signals_to_handle
    assert os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


@pytest.mark.parametrize("here", [True, False])
def test_several_nodes_need_an_endpoint_alone(
    here: bool, options: list[Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of them hosts it is told by addresses; each is reached on the way there."""
    monkeypatch.setattr(network, "address_towards", lambda host: "10.0.0.7")
    monkeypatch.setattr(network, "is_here", lambda host: here)
    words = ["--nnodes", "1:4", "--rdzv-endpoint", "10.0.0.7", "--rdzv-conf", "join_timeout=9"]
    assert agent.launch([*words, "--rdzv-conf", "join_timeout=9,read_timeout=5", "run", "a"]) == 0
    (given,) = options
    assert given.rdzv_endpoint == "10.0.0.7:29400"
    assert (given.rdzv_backend, given.local_addr) == ("c10d", "10.0.0.7")
    assert conf(given) == {
        "is_host": str(here).lower(),
        "join_timeout": "9",
        "keep_alive_interval": "3",
        "keep_alive_max_attempt": "3",
        "last_call_timeout": "10",
        "read_timeout": "5",
    }


def test_the_words_of_a_static_rendezvous_are_understood(options: list[Namespace]) -> None:
    """--node-rank and --master-addr, as other launchers have them; here without a stale store."""
    words = ["--nnodes", "2", "--node-rank", "1", "--master-addr", "localhost"]
    assert agent.launch([*words, "--master-port", "5000", "run", "a.toml"]) == 0
    (given,) = options
    assert (given.rdzv_backend, given.rdzv_endpoint) == ("c10d", "localhost:5000")
    assert "is_host" not in conf(given)  # of several on one machine, torch finds the first


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "name what the ranks run: tombola launch [options] run CONFIG"),
        (("--nnodes", "2"), "name what the ranks run"),
        (("--nnodes", "2", "run", "a"), "--nnodes 2 needs --rdzv-endpoint HOST:PORT"),
        (("--nnodes", "two", "run", "a"), "--nnodes two: give a number, or MIN:MAX"),
        (
            ("--nproc-per-node", "two", "run", "a"),
            "two: give a number, or gpu where there are some",
        ),
        (("--nproc-per-node", "gpu", "run", "a"), "--nproc-per-node gpu: Cuda is not available"),
        (("--nproc-per-node", "0", "run", "a"), "--nproc-per-node 0: must be at least 1"),
        (
            (*TWO, "--rdzv-conf", "read_timeout=5m", "run", "a"),
            "--rdzv-conf read_timeout=5m: give a",
        ),
        (("--nnods", "2", "run", "a"), "did you mean '--nnodes'?"),
        (("--max-restarts", "x", "run", "a"), "--max-restarts"),
        (("tickets", "list"), "only `run CONFIG`, `sweep CONFIG` and `bench allreduce` are done"),
    ],
)
def test_a_wrong_option_is_one_clear_line(
    words: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["launch", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert line in error
    assert error.count("\n") == 1


def test_a_name_that_stays_unknown_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_PATIENCE", 0.0)
    words = ["--nnodes", "2", "--rdzv-endpoint", "no-such-host.invalid:1", "run", "a.toml"]
    with pytest.raises(UserError, match=r"--rdzv-endpoint no-such-host\.invalid: no such host"):
        agent.launch(words)


def started(*words: str, root: Path) -> subprocess.Popen[str]:
    """`tombola launch` of two ranks in a process of its own."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "launch", "launch", "--nproc-per-node", "2"),
            *("run", *words, "--root", str(root)),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("left", [75, 2, None])
def test_a_signal_that_breaks_the_agents_own_clean_up_is_a_signal(
    left: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's handler raises anywhere, as at the first line of a `try` whose `finally` needs it."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException

    def interrupted(options: Namespace) -> None:
        try:
            raise SignalException("got signal", sigval=signal.SIGTERM)
        finally:
            raise UnboundLocalError("start")

    monkeypatch.setattr(run, "run", interrupted)
    if left is not None:
        (tmp_path / "0-0").write_text(str(left))
    options = Namespace(rdzv_conf="", rdzv_endpoint="", max_restarts="3")
    assert agent._run(options, tmp_path) == (left or 75)


def test_an_error_of_the_agent_is_no_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed import run

    def broken(options: Namespace) -> None:
        raise UnboundLocalError("start")

    monkeypatch.setattr(run, "run", broken)
    with pytest.raises(UnboundLocalError):
        agent._run(Namespace(rdzv_conf="", rdzv_endpoint="", max_restarts="3"), tmp_path)


def test_a_node_whose_name_is_its_loopback_is_met_by_name(
    options: list[Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Debian's /etc/hosts has it: 127.0.0.1 would be each other node itself."""
    monkeypatch.setattr(network, "resolved", lambda host: [(socket.AF_INET, ("127.0.1.1", 1))])
    words = ["--nnodes", "2", "--rdzv-endpoint", "node0", "run", "a.toml"]
    assert agent.launch(words) == 0
    assert options[0].local_addr is None


def test_two_ranks_stopped_by_a_signal_go_on(tmp_path: Path) -> None:
    """The agent ends with 75, the same command with 0, in the bits of ranks without an agent."""
    config = write_config(tmp_path, TOML.replace("rounds = 2", "rounds = 0"))
    long = ["--train.total", "40ep"]
    process = started(config, *long, root=tmp_path)
    while not list(tmp_path.glob("tiny/imp/level-00/checkpoints/*/manifest.json")):
        assert process.poll() is None, process.communicate()[0]
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate()
    assert process.returncode == 75, told
    assert told.count("interrupted: saved at step") == 1
    assert "Traceback" not in told
    again = started(config, *long, root=tmp_path)
    told, _ = again.communicate()
    assert again.returncode == 0, told
    assert "goes on at step" in told
    words = ["run", config, *long, "--root", str(tmp_path / "plain")]
    assert tombola(*words, world_size=2) == [0, 0]
    assert_same_run(tmp_path / "tiny", tmp_path / "plain" / "tiny")


def test_accelerate_launches_the_same_command(tmp_path: Path) -> None:
    """On two ranks, as its multi-GPU launcher starts them."""
    config = write_config(tmp_path, TOML.replace("rounds = 2", "rounds = 0"))
    launcher = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
        *("--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
    ]
    done = subprocess.run(
        [*launcher, "-m", "launch", "run", config, "--root", str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 ranks on 1 host: " in done.stdout
    assert (tmp_path / "tiny/imp/level-00/ticket.json").exists()


# What is said ----------------------------------------------------------------------------


class _Everyone(UserError):
    met_by_all = True


@pytest.mark.parametrize(
    ("error", "rank", "code", "said"),
    [
        (UserError("a: b"), None, 2, "error: a: b\n"),
        (UserError("a: b"), 0, 2, "error: a: b\n"),
        (UserError("a: b"), 1, 2, "[rank 1, HOST] error: a: b\n"),
        (_Everyone("a: b"), 1, 2, ""),
        (RunError("full"), 1, 1, "[rank 1, HOST] error: full\n"),
        (Interrupted("saved at step 3"), 1, 75, ""),
        (RuntimeError("[a.cc:1] Connection closed by peer [::1]:2"), 1, 1, ""),
    ],
)
def test_a_failure_is_told_with_rank_and_host(
    error: Exception,
    rank: int | None,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("platform.node", lambda: "HOST")
    if rank is not None:
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
    assert fail(error, resumes=True) == code
    assert capsys.readouterr().err == said


def _raised() -> Exception:
    """An error with a traceback."""
    try:
        raise ZeroDivisionError("of nothing")
    except ZeroDivisionError as error:
        return error


def test_the_rank_that_failed_is_told_once_a_node_with_its_cause_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every line of its traceback begins with the rank; the next rank of the node says nothing."""
    monkeypatch.setattr("platform.node", lambda: "HOST")
    monkeypatch.delattr("sys.tracebacklimit", raising=False)  # SkyPilot sets it, in other tests
    for rank in (1, 0):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        (tmp_path / str(rank)).mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        assert fail(_raised(), resumes=True) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "[rank 1, HOST] error: ZeroDivisionError: of nothing"
    assert lines[1] == "[rank 1, HOST] Traceback (most recent call last):"
    assert all(line.startswith("[rank 1, HOST] ") for line in lines)


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("[/gloo/pair.cc:5] Connection closed by peer [10.0.0.2]:9"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (RuntimeError("Timed out waiting 10000ms for recv operation to complete"), True),
        (torch.distributed.DistBackendError("NCCL error: remote process exited"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("gloo"), False),
    ],
)
def test_a_lost_rank_is_told_from_other_errors(error: Exception, is_lost: bool) -> None:
    assert is_lost_rank(error) is is_lost


# Other numbers of ranks ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "world_size", "before", "expected"),
    [
        (None, 2, [], None),
        (None, 2, [2], None),
        (None, 2, [1, 2], None),
        (None, 1, [2], 48),
        (None, 2, [5, 2], 20),
        (7, 1, [2], 7),
    ],
)
def test_fewer_ranks_accumulate_what_more_had(
    chosen: int | None, world_size: int, before: list[int], expected: int | None, tmp_path: Path
) -> None:
    words = [] if chosen is None else ["--train.micro-batch", str(chosen)]
    (stage,) = read_config(write_config(tmp_path), words).stages
    assert micro_batch(stage, world_size, before) == expected


def test_what_is_said_of_ranks(tmp_path: Path) -> None:
    config = read_config(write_config(tmp_path))
    assert told(config, [Host("a", None)], []) == []
    hosts = [Host("a", "H100"), Host("a", "H100"), Host("b", "H100")]
    assert told(config, hosts, [3]) == [
        "3 ranks on 2 hosts: a (2 x H100), b (1 x H100); global batch 96, at most 32 a rank"
    ]
    assert told(config, [Host("a", None)], [3, 4]) == [
        "1 rank, 4 before: global batch, schedule and order of the samples stay; each rank "
        "accumulates parts of 32 images"
    ]
    assert ranks_before([{"hardware": {"world_size": 4}}, {}, "torn"]) == [4]


def test_one_rank_goes_on_with_the_batch_statistics_of_two(tmp_path: Path) -> None:
    """With batch normalisation, too: the parts that it accumulates are the two ranks' shares."""
    text = GROUP_NORM.replace('norm = "group"', 'norm = "batch"')
    states = []
    for name in ("two", "one"):
        root = tmp_path / name
        root.mkdir()
        words = ["run", write_config(root, text), "--root", str(root)]
        if name == "one":
            assert run_ranks(2, killed_run, words, "a step", 20) == [KILLED, KILLED]
            assert tombola(*words) == [0]
        else:
            assert tombola(*words, world_size=2) == [0, 0]
        states.append(final_states(root / "tiny")["imp/level-00/checkpoints"])
    two, one = states
    for name, value in two.items():
        if name.startswith("model/") and "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(one[name], value, rtol=0, atol=1e-5)
