"""tyro as the one parser, with its errors as one line instead of a frame."""

import contextlib
import io
import re
from collections.abc import Sequence
from typing import Any

import tyro

_NO_TYPE = re.compile(r"no type matching (.*?) could be instantiated from (.*?)\. Got errors")


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
    """The text of tyro's first frame, drawn or in ASCII, without the advice at its end."""
    lines: list[str] = []
    for line in framed.splitlines()[1:]:
        text = line.strip("│| ")
        is_rule = not set(text) - set("─-╰╯╭╮+")
        if is_rule and not lines:
            continue
        if text.startswith(("For full helptext", "Argument helptext", "Perhaps you meant")):
            break
        if not is_rule:
            lines.append(text)
    line = " ".join(lines)
    choice = _NO_TYPE.search(line)
    if choice is not None:  # of several types none fits: what each of them said is of no help
        return f"{line[: choice.start()]}{choice[2]} is not of the form {choice[1]}"
    return line.replace(" Available subcommands", "; available subcommands")
