"""What a command says as it fails: one line where a person can mend it, else its cause first.

Of many ranks the one that failed speaks, with its rank and host; those that only lost it say so in
one line a node, and after it.
"""

import contextlib
import errno
import os
import platform
import re
import sys
import time
import traceback
from pathlib import Path

from data.errors import Interrupted, RunError, UserError

EXIT_FAILED, EXIT_USER, EXIT_INTERRUPTED = 1, 2, 75
_ENVIRONMENT = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
}
_SAVED = "the same command goes on from what was saved"
_LOST = re.compile(
    r"closed by peer|reset by peer|pair closure|timed out|connection refused|broken pipe|gloo|nccl",
    re.IGNORECASE,
)
"""how process groups tell that another rank is gone, or does not answer"""
_CAUSE_FIRST = 1.0
"""seconds that a rank which lost another waits, so that the other is heard first"""


def fail(error: BaseException, *, resumes: bool) -> int:
    """Says on stderr why a command ended, and gives its exit code.

    `resumes`: whether the same command would go on with what it has done.
    """
    if isinstance(error, UserError):
        return _say(error, f"error: {error}", EXIT_USER)
    if isinstance(error, RunError):
        return _say(error, f"error: {error}", EXIT_FAILED)
    if isinstance(error, Interrupted):
        return _say(error, f"interrupted: {error}; {_SAVED}", EXIT_INTERRUPTED)
    if isinstance(error, KeyboardInterrupt):
        return _say(error, f"stopped; {_SAVED}" if resumes else "stopped", EXIT_FAILED)
    if _is_out_of_memory(error):
        line = f"error: out of GPU memory: {_first_sentence(error)}. Set train.micro_batch lower"
        return _say(error, f"{line}; {_SAVED}" if resumes else line, EXIT_FAILED)
    if isinstance(error, OSError) and error.errno in _ENVIRONMENT:
        where = f": {error.filename}" if error.filename else ""
        advice = f"; mend it, and {_SAVED}" if resumes else ""
        return _say(error, f"error: {error.strerror}{where}{advice}", EXIT_FAILED)
    if _num_ranks() > 1 and is_lost_rank(error):
        return _say_lost(error)
    return _say_unforeseen(error)


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error only tells that another rank is gone, or does not answer."""
    if not isinstance(error, RuntimeError):
        return False
    import torch.distributed as dist  # by now it is loaded

    group_errors = (dist.DistBackendError, dist.DistNetworkError)
    return isinstance(error, group_errors) or _LOST.search(str(error)) is not None


def speaker() -> str:
    """How a line of this rank begins: with nothing where there is one, else with rank and host."""
    return f"[rank {_rank()}, {platform.node()}] " if _num_ranks() > 1 else ""


def _say(error: BaseException, line: str, code: int) -> int:
    """Prints the one line; what rank 0 met and told the others, rank 0 prints alone."""
    if _rank() == 0:
        print(line, file=sys.stderr)
    elif not getattr(error, "met_by_all", False):
        if _local_rank() > 0:
            time.sleep(
                _CAUSE_FIRST
            )  # by then its agent has ended it, where the first told the same
        print(f"{speaker()}{line}", file=sys.stderr)
    return code


def _say_lost(error: BaseException) -> int:
    """One line a node, after a while: agents end the other ranks of a node meanwhile."""
    if _local_rank() == 0:
        time.sleep(_CAUSE_FIRST)
        told = re.sub(r"^(\[[^\]]*\]\s*)+", "", " ".join(str(error).split()))
        line = f"error: another rank is gone, or does not answer ({_first_sentence(told)[:200]})"
        print(f"{speaker()}{line}; {_SAVED}", file=sys.stderr)
    return EXIT_FAILED


def _say_unforeseen(error: BaseException) -> int:
    """The traceback; of many ranks the first of each node, what happened in its first line."""
    trace = "".join(traceback.format_exception(error))
    if _num_ranks() > 1:
        if not _is_first_of_node():
            return EXIT_FAILED
        what = " ".join(f"{type(error).__name__}: {error}".split())
        lines = [f"error: {what}", *trace.splitlines()]
        trace = "".join(f"{speaker()}{line}\n" for line in lines)
    sys.stderr.write(trace)  # at once, so that the ranks' lines do not mix
    sys.stderr.flush()
    return EXIT_FAILED


def _is_first_of_node() -> bool:
    """Whether no other rank of this attempt on this node has told of its failure yet."""
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")  # ATTEMPT/RANK/error.json, of an agent's own
    if not own:
        return True
    with contextlib.suppress(OSError):
        try:
            (Path(own).parents[1] / "told").touch(exist_ok=False)
        except FileExistsError:
            return False
    return True


def _is_out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _first_sentence(error: object) -> str:
    return re.split(r"\.\s", " ".join(str(error).split()))[0].rstrip(".")


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def _num_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
