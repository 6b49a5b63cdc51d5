"""The errors that end a command with one readable line instead of a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The user can mend it: a wrong key, value, path or combination. Exit code 2."""


class RunError(Exception):
    """The run cannot go on, and nothing is lost: full disk, non-finite loss. Exit code 1."""


class Diverged(RunError):
    """A training has come to what is no number: tried again, it would once more."""


class StoreError(RunError, OSError):
    """An object store failed, beyond what its client tries again by itself."""


class Interrupted(Exception):
    """SIGTERM or SIGUSR1 came, and the state is saved. Exit code 75 (EX_TEMPFAIL)."""

    met_by_all = True
    """all ranks stop together: one of them says so"""
    was_signalled = False
    """whether the signal came to this rank, and not to another"""


def did_you_mean(value: str, known: Iterable[str]) -> str:
    """`; did you mean 'near'?` for the nearest of `known`, or an empty string."""
    near = difflib.get_close_matches(value, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
