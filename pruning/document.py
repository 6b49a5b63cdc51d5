"""JSON documents that commit to their own content, and the narrow door through which they come in.

What is read may be torn, flipped or made up: it is measured before it is parsed, its checksum is
compared, and every field is taken through a function that refuses any other type.
"""

import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from data.errors import RunError
from data.files import Folder
from pruning.packing import Shape, canonical

VERSION = 2
_MOST_BYTES = 16 << 20
_MOST_WEIGHTS = 1 << 40
_MOST_DIMENSIONS = 16
_DEEPEST = 64
T = TypeVar("T")


def write_document(folder: Folder, name: str, kind: str, body: dict[str, Any]) -> None:
    """Writes `body` with its kind, version and checksum, whole or not at all."""
    folder.write_json(name, seal(kind, body))


def seal(kind: str, body: dict[str, Any]) -> dict[str, Any]:
    """`body` with its kind, version and checksum."""
    document = {"format": kind, "version": VERSION, **body}
    return {**document, "sha256": hashlib.sha256(canonical(document)).hexdigest()}


def read_document(folder: Folder, name: str, kind: str, parse: Callable[[Any], T]) -> T:
    """What `parse` makes of a document of that kind.

    Raises `FileNotFoundError` where there is none, `RunError` naming the file where it is damaged,
    made by another version, or not what `parse` expects (it raises `ValueError`).
    """
    try:
        if folder.size(name) > _MOST_BYTES:
            raise ValueError(f"larger than {_MOST_BYTES >> 20} MiB")
        return parse(unseal(folder.read(name), kind))
    except (FileNotFoundError, RunError):
        raise
    except (KeyError, ValueError) as error:
        problem = f"no field {_short(error.args[0])}" if isinstance(error, KeyError) else str(error)
        raise RunError(f"{folder}/{name}: damaged: {problem}") from error
    except OSError as error:
        raise RunError(f"{folder}/{name}: cannot be read: {error.strerror}") from error


def unseal(content: bytes, kind: str) -> dict[str, Any]:
    """The document in these bytes, its checksum compared. Raises `ValueError`."""
    return _checked(_parsed(content), kind)


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        document = json.loads(content.decode(), object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    inside = [document]
    for _ in range(_DEEPEST):
        inside = [one for value in inside for one in _values(value)]
    if inside:
        raise ValueError("nested too deeply")
    return mapping(document, "the document")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of which every reader sees the same."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a field is there twice")
    return fields


def _values(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _checked(document: dict[str, Any], kind: str) -> dict[str, Any]:
    """The document without its checksum, which it must match."""
    if document.get("format") != kind:
        raise ValueError(f"format {_short(document.get('format'))}: not a {kind}")
    version = document.get("version")
    if type(version) is not int or version != VERSION:
        raise ValueError(f"version {_short(version)}: this Tombola reads only version {VERSION}")
    checksum = document.pop("sha256", None)
    if hashlib.sha256(canonical(document)).hexdigest() != checksum:
        raise ValueError("its content does not match its checksum")
    return document


# One field ----------------------------------------------------------------------------------


def mapping(value: Any, what: str) -> dict[str, Any]:
    """A JSON object. Raises `ValueError`, like all of these."""
    return _of_type(value, dict, what)


def sequence(value: Any, what: str) -> list[Any]:
    """A JSON array."""
    return _of_type(value, list, what)


def text(value: Any, what: str) -> str:
    """A JSON string that prints on one line."""
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"{what} is {_short(value)}, not a line of text")
    return value


def flag(value: Any, what: str) -> bool:
    """`true` or `false`."""
    return _of_type(value, bool, what)


def number(value: Any, what: str) -> float:
    """A number within the range of a `float`, or an integer as it stands."""
    if type(value) not in (int, float) or abs(value) > sys.float_info.max:
        raise ValueError(f"{what} is {_short(value)}, not a number")
    return value  # type: ignore[no-any-return]


def fraction(value: Any, what: str) -> float:
    """A number from 0 to 1."""
    if not 0 <= number(value, what) <= 1:
        raise ValueError(f"{what} is {_short(value)}, not a number from 0 to 1")
    return float(value)


def table(take: Callable[[Any, str], T], value: Any, what: str) -> dict[str, T]:
    """A JSON object, its names lines of text, and of each value what `take` makes of it."""
    rows = mapping(value, what)
    return {text(name, f"a name in {what}"): take(inner, name) for name, inner in rows.items()}


def count(value: Any, what: str, most: int = _MOST_WEIGHTS) -> int:
    """An integer from 0 to `most`."""
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{what} is {_short(value)}, not a number from 0 to {most}")
    return value


def counts(value: Any, what: str) -> tuple[int, ...]:
    """An array of them."""
    return tuple(count(one, what) for one in sequence(value, what))


def shape(value: Any, what: str) -> Shape:
    """The shape of a tensor of at most 2^40 weights, were the empty dimensions of one."""
    sizes = counts(value, what)
    if len(sizes) > _MOST_DIMENSIONS:
        raise ValueError(f"{what} has {len(sizes)} dimensions, more than {_MOST_DIMENSIONS}")
    if math.prod(max(1, size) for size in sizes) > _MOST_WEIGHTS:
        raise ValueError(f"{what} is {_short(sizes)}: more than 2^40 weights")
    return sizes


def digest(value: Any, what: str) -> str:
    """A SHA-256 in hexadecimal."""
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ValueError(f"{what} is {_short(value)}, not a SHA-256")
    return value


def digests(value: Any, what: str) -> tuple[str, ...]:
    """An array of them."""
    return tuple(digest(one, what) for one in sequence(value, what))


def optional(take: Callable[[Any, str], T], value: Any, what: str) -> T | None:
    """`None`, or what `take` makes of the value."""
    return None if value is None else take(value, what)


def finite(value: Any) -> Any:
    """A JSON value in which infinities and NaN, which JSON does not have, are `None`."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return value


def _of_type(value: Any, kind: type[T], what: str) -> T:
    if not isinstance(value, kind):
        raise ValueError(f"{what} is {_short(value)}, not of type {kind.__name__}")
    return value


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:40]}..."
