"""A safetensors file that may be anyone's: measured before it is parsed, and nothing of it run."""

from collections.abc import Callable
from typing import TypeVar

import safetensors.torch
from torch import Tensor

from data.errors import RunError
from data.files import read_content

_MOST_BYTES = 16 << 20
"""of the header"""
T = TypeVar("T")


def read_file(url: str, parse: Callable[[bytes], T]) -> T:
    """What `parse` makes of the file at a path or URL.

    Raises `UserError` where there is none, `RunError` naming it where it cannot be read, or where
    `parse` finds it damaged (it raises `ValueError`, `KeyError` or `RunError`).
    """
    try:
        return parse(read_content(url))
    except RunError as error:
        raise RunError(f"{url}: {error}") from error
    except OSError as error:
        raise RunError(f"{url}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError) as error:
        problem = f"no field {error.args[0]!r:.40}" if isinstance(error, KeyError) else str(error)
        raise RunError(f"{url}: damaged: {problem}") from error


def header_in(content: bytes) -> bytes:
    """The header, which should be JSON: after 8 bytes of its length. Raises `ValueError`."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or not 0 < length <= len(content) - 8:
        raise ValueError("no safetensors file, or cut short")
    if length > _MOST_BYTES:
        raise ValueError(f"its header is larger than {_MOST_BYTES >> 20} MiB")
    return content[8 : 8 + length]


def tensors_in(content: bytes) -> dict[str, Tensor]:
    """The tensors by name. Raises `ValueError`."""
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(content)
    except Exception as error:  # SafetensorError, and what torch makes of a hostile header
        raise ValueError(str(error).partition("\n")[0][:200] or "no safetensors file") from error
    return tensors
