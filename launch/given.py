"""What was written in a file or on the command line, and what is said of it when it is wrong."""

import re
from dataclasses import dataclass

_NO_NUMBERS = (
    (r"could not convert string to float: .*", "must be a number"),
    (r"invalid literal for int\(\).*", "must be a whole number"),
    (r"\[.*\] is not of the form FLOAT", "must be a number"),
    (r"\[.*\] is not of the form INT", "must be a whole number"),
    (
        r"Could not find valid parse for arguments: .*",
        "must be numbers, of the kind that --help says",
    ),
)
"""what Python and tyro say of words that are none"""


@dataclass(frozen=True)
class Given:
    """A value that somebody wrote, and where."""

    key: str
    words: tuple[str, ...]
    origin: str


def explain(message: str, given: dict[str, Given], prefix: str) -> str:
    """A parser's message, with where the value was written and under which key."""
    extra = re.fullmatch(r"Unrecognized options: (.*)", message)
    if extra:
        message = _too_many(extra[1], given) or message
    option = re.search(r"--([\w.-]+)", message)
    check = re.match(r"Error parsing ([\w.]+): (\w+)", message)
    key = ""
    if option:
        key = option[1].replace("-", "_")
    elif check:  # a section's own check begins with its name and the field's
        nested = f"{check[1]}.{check[2]}"
        key = nested if nested in given else check[2]
    message = re.sub(r"Missing from \S+: .*", "is required", message)
    message = re.sub(r"no type matching (\S+) could be.*", r"must be \1", message)
    for raw, told in _NO_NUMBERS:
        message = re.sub(raw, told, message)
    reason = re.sub(r"^(Error parsing [\w.-]+|--[\w.-]+): ", "", message)
    if key in given:
        one = given[key]
        value = " ".join(one.words)
        reason = reason.removeprefix(f"{value!r} ")
        return f"{one.origin}: {prefix}{key} = {value!r}: {_without_key(reason, key)}"
    return f"{prefix}{key}: {_without_key(reason, key)}" if key else f"{prefix}{reason}"


def _too_many(extra: str, given: dict[str, Given]) -> str | None:
    """The message where a key has more words than it takes."""
    last = extra.split(", ")
    for one in given.values():
        if len(one.words) > 1 and list(one.words[-len(last) :]) == last:
            return f"--{one.key}: takes one value"
    return None


def _without_key(reason: str, key: str) -> str:
    """Drops the `name = value: ` with which a section's own check begins."""
    leaf = key.rsplit(".", 1)[-1]
    return re.sub(rf"^{leaf}( = (\[.*?\]|\(.*?\)|'.*?'|\S+?):?|:) ", "", reason)
