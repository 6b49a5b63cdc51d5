"""Files named by the SHA-256 of their content: equal content is stored once, whoever wrote it."""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Sequence

from data.errors import RunError, StoreError
from data.files import TEMPORARY, Folder, torn_name
from data.workers import num_cpus

_SUFFIX = ".safetensors"
_REMOTE_THREADS = 8
_FRESH = 3600.0
"""seconds; an older object on a store is written again, so that no `collect` takes it away now"""


class Objects:
    """The objects in a folder or below a URL, `<SHA-256>.safetensors` each."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    @property
    def num_threads(self) -> int:
        """How many objects are best read at once: one a core, more where it is far."""
        return num_cpus() if self.folder.is_local else _REMOTE_THREADS

    def file(self, digest: str) -> str:
        """The place of an object, for messages."""
        return f"{self.folder}/{_name(digest)}"

    def put(self, content: bytes) -> str:
        """Stores content, unless it is there and whole; gives its digest.

        What is there already gets as young as what is written: see `collect`.
        """
        digest = hashlib.sha256(content).hexdigest()
        if not self._is_whole(digest, len(content)):
            self.write(content)
        return digest

    def write(self, content: bytes) -> None:
        """Stores content, whatever is there under its name."""
        self.folder.write(_name(hashlib.sha256(content).hexdigest()), content)

    def get(self, digest: str, num_bytes: int) -> bytes:
        """An object whole. Raises `RunError` where it is missing or damaged."""
        with self._one_kind_of_error(digest):
            if self.folder.size(_name(digest)) != num_bytes:
                raise RunError(f"{self.file(digest)}: damaged: not of {num_bytes} bytes")
            content = self.folder.read(_name(digest))
        if hashlib.sha256(content).hexdigest() != digest:
            raise RunError(f"{self.file(digest)}: damaged: its content does not match its name")
        return content

    def get_ranges(self, digest: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Parts of an object, each by its offset and length, in ascending order; unverified.

        What lies side by side is read at once. Raises `RunError` where the object is missing.
        """
        runs: list[list[tuple[int, int]]] = []
        for offset, length in ranges:
            if runs and sum(runs[-1][-1]) == offset:
                runs[-1].append((offset, length))
            else:
                runs.append([(offset, length)])
        parts: list[bytes] = []
        with self._one_kind_of_error(digest):
            for run in runs:
                start = run[0][0]
                content = self.folder.read_range(_name(digest), start, sum(run[-1]) - start)
                parts += [content[o - start : o - start + n] for o, n in run]
        return parts

    def digests(self) -> list[str]:
        """Every object that is there, sorted."""
        names = self.folder.names()
        return [name.removesuffix(_SUFFIX) for name in names if re.fullmatch(_PATTERN, name)]

    def collect(self, used: set[str], *, grace: float, dry_run: bool = False) -> list[str]:
        """Removes what is not `used`, and what broken writes left, if older than `grace` seconds.

        Gives the names. Younger ones may belong to a ticket whose index is still to be written.
        """
        wanted = {_name(digest) for digest in used}
        unused = [
            name
            for name in self.folder.names()
            if is_torn(name) or (re.fullmatch(_PATTERN, name) and name not in wanted)
        ]
        return remove_old(self.folder, unused, grace=grace, dry_run=dry_run)

    def _is_whole(self, digest: str, num_bytes: int) -> bool:
        """Whether an object is there, undamaged, and too young to be collected."""
        name = _name(digest)
        try:
            if self.folder.size(name) != num_bytes:
                return False
            if self.folder.is_local:
                whole = self.folder.digest(name) == digest
                if whole:
                    self.folder.touch(name)
                return whole
            age = self.folder.age(name)
        except StoreError:
            raise
        except OSError:  # missing, a folder, or of somebody else: to be written again
            return False
        return age is not None and age < _FRESH

    @contextlib.contextmanager
    def _one_kind_of_error(self, digest: str) -> Iterator[None]:
        """Every failure to read an object as a `RunError` that names it."""
        try:
            yield
        except FileNotFoundError:
            raise RunError(f"{self.file(digest)}: missing") from None
        except RunError:
            raise
        except OSError as error:
            raise RunError(f"{self.file(digest)}: cannot be read: {error.strerror}") from error


def is_torn(name: str) -> bool:
    """Whether a file is what `Folder.write` leaves when it is killed."""
    return name.startswith(".") and name.endswith(TEMPORARY)


def remove_old(folder: Folder, names: list[str], *, grace: float, dry_run: bool) -> list[str]:
    """Removes those of the files that are older than `grace` seconds; gives their names."""
    return [
        name
        for name in names
        if _is_old(folder, name, grace) and (dry_run or _remove_if_old(folder, name, grace))
    ]


def _is_old(folder: Folder, name: str, grace: float) -> bool:
    try:
        age = folder.age(name)
    except FileNotFoundError:
        return False
    return age is not None and age >= grace


def _remove_if_old(folder: Folder, name: str, grace: float) -> bool:
    """Removes a file, locally unless `Objects.put` has just found it there and made it young."""
    if not folder.is_local:
        folder.remove(name)
        return True
    aside = torn_name(name)
    try:
        folder.rename(name, aside)
    except FileNotFoundError:
        return False
    if not _is_old(folder, aside, grace):
        folder.rename(aside, name)
        return False
    folder.remove(aside)
    return True


def require_memory(num_bytes: int, what: str) -> None:
    """Raises `RunError` where so much does not fit into this machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if num_bytes > memory:
        raise RunError(f"{what} of memory; this machine has {memory:,}")


_PATTERN = r"[0-9a-f]{64}\.safetensors"


def _name(digest: str) -> str:
    """The only names that are ever read or written: none leads elsewhere."""
    name = f"{digest}{_SUFFIX}"
    if not re.fullmatch(_PATTERN, name):
        raise RunError(f"{digest!r} is no digest")
    return name
