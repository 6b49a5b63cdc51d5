"""What torch's elastic agent says, as lines for a person: which node, what happened, once."""

import contextlib
import logging
import platform
import signal
import sys
from collections.abc import Callable, Iterator

_LOGGER = "torch.distributed.elastic"
_AGENT = "torch.distributed.elastic.agent.server.api"


@contextlib.contextmanager
def quiet_logs(*, ended: Callable[[], bool]) -> Iterator[Callable[[str], None]]:
    """A context in which the agent's records become lines; gives what says one more.

    `ended` tells whether the ranks have said themselves why they end.
    """
    logger, agent = logging.getLogger(_LOGGER), logging.getLogger(_AGENT)
    before = logger.propagate, agent.level
    handler = _Lines(ended)
    logger.addHandler(handler)
    logger.propagate = False
    agent.setLevel(logging.INFO)  # restarts are told at this level
    try:
        yield handler.say
    finally:
        logger.removeHandler(handler)
        logger.propagate = before[0]
        agent.setLevel(before[1])


class _Lines(logging.Handler):
    """Translates the few records that matter; passes on warnings and errors that it does not know.

    A rank's own failure is told by the rank: only of one that was killed the agent speaks.
    """

    def __init__(self, ended: Callable[[], bool]) -> None:
        super().__init__()
        self._ended = ended

    def emit(self, record: logging.LogRecord) -> None:
        message, arguments = str(record.msg), record.args
        if message.startswith("failed (exitcode") and isinstance(arguments, tuple):
            code, local_rank, pid = arguments[:3]
            if isinstance(code, int) and code < 0:
                self.say(f"local rank {local_rank} (pid {pid}) was killed by {_name(-code)}")
        elif "attempts left" in message and isinstance(arguments, tuple):
            left, most = arguments[2:4]
            if isinstance(left, int) and isinstance(most, int):
                self.say(f"a rank failed: restart {most - left + 1} of {most}")
        elif "new nodes from group_rank" in message:
            self.say("the number of nodes changes: the ranks start anew")
        elif "death signal" in message and isinstance(arguments, tuple):
            if not self._ended():
                self.say(f"{_name(arguments[0])}: the ranks save and stop")
        elif "closing signal" in message or "has failed to" in message:
            return  # of every rank, and of the rendezvous: what ends the agent is told at its end
        elif record.levelno >= logging.WARNING:
            self.say(f"torchrun: {' '.join(record.getMessage().split())[:300]}")

    def say(self, line: str) -> None:
        """Prints a line of this node's agent."""
        print(f"[{platform.node()}] {line}", file=sys.stderr, flush=True)


def _name(number: object) -> str:
    """What a signal is called."""
    with contextlib.suppress(ValueError, TypeError):
        return signal.Signals(number).name  # type: ignore[arg-type]
    return str(number)
