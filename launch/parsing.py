"""tyro as the one parser, with its errors as one line instead of a frame."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import tyro


class ParseError(Exception):
    """What is wrong with the words, in one line."""


def parse(kind: Any, words: Sequence[str], **options: Any) -> Any:
    """`tyro.cli` of `kind` on `words`. Raises `ParseError`; `--help` prints and exits as usual."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(kind, args=words, **options)
    except SystemExit as leave:
        if not leave.code:
            raise
        raise ParseError(_one_line(printed.getvalue())) from None


def _one_line(framed: str) -> str:
    """The text of tyro's first frame, without the rule and the advice below it."""
    lines: list[str] = []
    for line in framed.splitlines()[1:]:
        text = line.strip("│ ")
        if not set(text) - set("─╰╯╭╮") or text.startswith("For full helptext"):
            break
        lines.append(text)
    return " ".join(lines)
