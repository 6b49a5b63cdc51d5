"""tyro as the one parser, with its errors as one line instead of a frame."""

import contextlib
import io
import re
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

import tyro

from data.errors import did_you_mean

_NO_TYPE = re.compile(r"no type matching (.*?) could be instantiated from (.*?)\. Got errors")
_NO_CHOICE = re.compile(
    r"invalid choice '(.*?)' for argument '(.*?)'\. Expected one of \((.*?)\)\."
)
_MISSING = (
    (r"Missing value for argument 'config'\. Expected 1 values\.", "CONFIG: needs a value"),
    (r"Missing value for argument '(.*?)'\. Expected \S+ values\.", r"\1: needs a value"),
    (r"Missing from tombola ([\w ]+): (.*?) \(required\)", r"\1 needs \2"),
)
"""what tyro says where something is missing, and what we say"""


_UNSET = re.compile(r"\(default:\s*(None)?\)")
"""the default of an option that is not set: what it then does is said before it"""
_COLUMN = 6
"""from which on a line goes on with what the one above says"""


class ParseError(Exception):
    """What is wrong with the words, in one line."""


def parse(kind: Any, words: Sequence[str], **options: Any) -> Any:
    """`tyro.cli` of `kind` on `words`. Raises `ParseError`; `--help` prints and exits as usual."""
    wrong, help_text = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(wrong), contextlib.redirect_stdout(help_text):
            return tyro.cli(kind, args=words, **options)
    except SystemExit as leave:
        if not leave.code:
            print(readable(help_text.getvalue()), end="")
            raise
        raise ParseError(_one_line(wrong.getvalue())) from None


def readable(help_text: str) -> str:
    """tyro's help without frames, each text as wide as the terminal, and nothing said of options
    that are not set but what they are."""
    entries: list[tuple[str, str]] = []
    for line in help_text.splitlines():
        indent = len(line) - len(line.lstrip())
        before, text = entries[-1] if entries else ("", "")
        if line.strip() and text and indent >= _COLUMN and indent == len(before):
            entries[-1] = before, f"{text} {line.strip()}"
        else:
            column = _text_of(line)
            entries.append((line[:column], line[column:]))
    width = shutil.get_terminal_size().columns
    return "".join(f"{line}\n" for entry in entries for line in _wrapped(*entry, width))


def _text_of(line: str) -> int:
    """Where the text of a line begins: of an option after its name and two spaces at least."""
    option = re.match(r"\s+(?:-|[A-Z{])\S.*?\s{2,}(?=\S)", line)
    return option.end() if option else len(line) - len(line.lstrip())


def _wrapped(before: str, text: str, width: int) -> list[str]:
    text = " ".join(_UNSET.sub("", text).split())
    if not text:
        return [before.rstrip()]
    further = " " * len(before)
    if text.startswith("usage:"):
        further += "    "
        text = text if len(text) <= width else text.replace(",", ", ")
    return textwrap.wrap(
        text,
        width,
        initial_indent=before,
        subsequent_indent=further,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _unknown(found: re.Match[str]) -> str:
    """A value that is none of some words, and which ones there are."""
    value, argument, choices = found[1], found[2], re.findall(r"'(.*?)'", found[3])
    if choices == ["True", "False"]:
        return f"{argument}: {value!r} must be true or false"
    return (
        f"{argument}: {value!r} is not known{did_you_mean(value, choices)} ({', '.join(choices)})"
    )


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
    line = _NO_CHOICE.sub(_unknown, " ".join(lines))
    for told, ours in _MISSING:
        line = re.sub(told, ours, line)
    choice = _NO_TYPE.search(line)
    if choice is not None:  # of several types none fits: what each of them said is of no help
        kind = choice[1].removeprefix("{None}|")
        return f"{line[: choice.start()]}{choice[2]} is not of the form {kind}"
    return line.replace(" Available subcommands", "; available subcommands")
