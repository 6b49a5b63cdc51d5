"""`tombola launch ... run CONFIG`: torchrun, set up so that a run outlives its nodes.

Every option of torchrun is accepted; the first word that is none begins a tombola command. What is
added: which node hosts the rendezvous, and under which addresses the nodes reach each other, is
worked out from the endpoint; a dead node is noticed within seconds; a restart never looks for dead
ranks; a save under way is waited for; and the exit code is that of the ranks.
"""

import contextlib
import ctypes
import os
import platform
import re
import signal
import sys
import tempfile
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from data.errors import RunError, UserError, did_you_mean
from launch.failures import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER
from launch.rendezvous import PORT, bounded_silence, set_up_rendezvous

RESUMING = ("run", "sweep")
"""the commands that go on with what they have done, on one rank or many"""
_PR_SET_PDEATHSIG = 1
"""of Linux: which signal a process gets when its parent ends"""
_FOLDER = "TOMBOLA_LAUNCH"
"""names the folder in which the ranks of a node leave their exit codes for its agent"""
_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
_SAVING = 1800
"""seconds: as long as `checkpoint.timeout` gives a save"""


def launch(words: Sequence[str]) -> int:
    """Runs the ranks of this node, anew when a rank of any node fails; the exit code of them all.

    Raises `UserError` for wrong options, `RunError` where the nodes do not come together.
    """
    # Before torch is loaded: of its warnings only those of hosts without names would be seen.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    parser = _parser()
    options = parser.parse_args(list(words))
    command = [options.training_script, *options.training_script_args]
    if command[0] not in RESUMING and command[:2] != ["bench", "allreduce"]:
        raise UserError(
            f"tombola launch ... {command[0]}: only `run CONFIG`, `sweep CONFIG` and `bench "
            "allreduce` are done by many ranks; give the options of launch before it (see tombola "
            "launch --help)"
        )
    _set_up(options)
    with tempfile.TemporaryDirectory(prefix="tombola-launch-") as folder:
        os.environ[_FOLDER] = folder
        return _run(options, Path(folder))


def die_with_agent() -> None:
    """On a rank: has the kernel end it when its agent is killed, if `launch` started it.

    It would train on to the end otherwise, and nobody would start the others anew without it.
    """
    if _FOLDER in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def tell_agent(code: int, *, was_signalled: bool) -> None:
    """On a rank that fails: tells the agent of its node the exit code, if `launch` started it.

    The user's mistake, and a stop with the state saved, are not tried again: the agent is ended,
    unless this rank stops since the agent told it to.
    """
    folder = os.environ.get(_FOLDER)
    if folder is None:
        return
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    local_rank = os.environ.get("LOCAL_RANK", "0")
    (Path(folder) / f"{attempt}-{local_rank}").write_text(str(code))
    if code in (EXIT_USER, EXIT_INTERRUPTED) and local_rank == "0" and not was_signalled:
        os.kill(os.getppid(), signal.SIGTERM)


# Options ---------------------------------------------------------------------------------


def _parser() -> ArgumentParser:
    """torchrun's own, with our defaults where neither a word nor a variable `PET_...` says else."""
    import torch
    from torch.distributed.run import get_args_parser

    parser: ArgumentParser = get_args_parser()
    parser.prog = "tombola launch"
    parser.usage = "tombola launch [options] run CONFIG [--section.key value]"
    parser.description = (
        "Starts the ranks of this node: give the same command on every node, with --nnodes and "
        "--rdzv-endpoint. Options are those of torchrun; exit codes those of `tombola run`."
    )
    known_words = [word for action in parser._actions for word in action.option_strings]
    vars(parser)["error"] = lambda message: _refuse(message, known_words)
    for action in parser._actions:  # of the positional words, usage tells enough
        if not action.option_strings:
            action.help = SUPPRESS
    ours = {
        "nproc_per_node": "gpu" if torch.cuda.is_available() else "1",
        "max_restarts": "3",
        "rdzv_id": "tombola",
        "signals_to_handle": _SIGNALS,
        "shutdown_timeout": _SAVING,
    }
    known = {action.dest for action in parser._actions}
    for name, value in ours.items():
        if name in known and f"PET_{name.upper()}" not in os.environ:
            parser.set_defaults(**{name: value})
    return parser


def _refuse(message: str, known: Sequence[str]) -> NoReturn:
    if "training_script" in message:
        message = "name what the ranks run: tombola launch [options] run CONFIG"
    unknown = re.match(r"unrecognized arguments: (\S+)", message)
    if unknown:
        message += did_you_mean(unknown[1].partition("=")[0], known)
    raise UserError(f"{message} (see tombola launch --help)")


def _set_up(options: Namespace) -> None:
    """Fills in what the user left open, and turns the words into a call of `python -m launch`."""
    from torch.distributed.run import determine_local_world_size, parse_min_max_nnodes

    try:
        _, most = parse_min_max_nnodes(options.nnodes)
    except (RuntimeError, ValueError):
        raise UserError(f"--nnodes {options.nnodes}: give a number, or MIN:MAX") from None
    ranks = f"--nproc-per-node {options.nproc_per_node}"
    try:
        num_ranks = determine_local_world_size(options.nproc_per_node)
    except ValueError as error:
        raise UserError(f"{ranks}: {error}: give a number, or gpu where there are some") from None
    if num_ranks < 1:
        raise UserError(f"{ranks}: must be at least 1")
    options.training_script_args = [options.training_script, *options.training_script_args]
    options.module, options.training_script = True, "launch"
    # Restarted ranks would read the dead ones' addresses in a store that outlives them.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if options.nproc_per_node != "1":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, without its banner
    static = getattr(options, "master_addr", "127.0.0.1")
    if not options.rdzv_endpoint and static != "127.0.0.1":
        options.rdzv_endpoint = f"{static}:{options.master_port or PORT}"
    if options.standalone or (most == 1 and not options.rdzv_endpoint):
        options.standalone = True
        options.local_addr = options.local_addr or "127.0.0.1"
        return
    set_up_rendezvous(options)


# The agent -------------------------------------------------------------------------------


def _run(options: Namespace, folder: Path) -> int:
    """Runs torch's elastic agent, and gives the exit code of this node's ranks."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.run import run

    from launch.agent_log import quiet_logs

    with quiet_logs(ended=lambda: bool(_code_of(folder))) as say, bounded_silence(options):
        try:
            run(options)
        except Exception as error:
            if (number := _signal_behind(error)) is not None:
                return _code_of(folder) or _code_of_signal(number)
            if isinstance(error, ChildFailedError):
                return _code_of_failure(error, int(options.max_restarts), say)
            if not isinstance(error, RendezvousError | DistError):
                raise
            code = _code_of(folder)
            if code in (EXIT_USER, EXIT_INTERRUPTED):
                return code  # of all nodes; the one that hosts the rendezvous ended first
            raise _apart(options, error) from error
    return 0


def _signal_behind(error: BaseException | None) -> signal.Signals | None:
    """The signal that ended the agent, if one did.

    torch's handler raises wherever the agent is just then: also where its own clean-up fails of it,
    with an error of another kind, once the ranks have ended.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    while error is not None and not isinstance(error, SignalException):
        error = error.__cause__ or error.__context__
    return None if error is None else signal.Signals(error.sigval)


def _apart(options: Namespace, error: Exception) -> RunError:
    """What to do when the nodes did not come together, or lost one another."""
    from torch.distributed.elastic.rendezvous.api import RendezvousTimeoutError

    told = str(error.__cause__ or error) or type(error).__name__
    if isinstance(error, RendezvousTimeoutError):
        told = "some did not come in time"
    return RunError(
        f"{platform.node()}: the nodes are not together at {options.rdzv_endpoint} "
        f"({' '.join(told.split())[:200]}). See that {options.nnodes} nodes run this command and "
        "reach that address, and start it again on all of them"
    )


def _code_of(folder: Path) -> int:
    """The exit code that the ranks left in their last attempt; 0 where none did."""
    left = [(int(path.name.partition("-")[0]), _read(path)) for path in folder.iterdir()]
    last = max((attempt for attempt, _ in left), default=0)
    codes = {code for attempt, code in left if attempt == last}
    return next((c for c in (EXIT_FAILED, EXIT_USER, EXIT_INTERRUPTED) if c in codes), 0)


def _read(path: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return EXIT_FAILED


def _code_of_signal(number: signal.Signals) -> int:
    """Of ranks that a signal ended before they had anything to save."""
    return EXIT_FAILED if number is signal.SIGINT else EXIT_INTERRUPTED


def _code_of_failure(error: object, restarts: int, say: Callable[[str], None]) -> int:
    """The first failed rank's own exit code where it means something; else tells of the end."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    assert isinstance(error, ChildFailedError)
    rank, failure = error.get_first_failure()
    if failure.exitcode in (EXIT_USER, EXIT_INTERRUPTED):
        return failure.exitcode
    how = "failed again" if restarts else "failed"
    say(f"rank {rank} {how}: given up after {restarts} restarts (--max-restarts)")
    return EXIT_FAILED
