"""Files of a run, on the local disk or on any fsspec URL, written whole or not at all."""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from data.errors import RunError, StoreError, UserError

TEMPORARY = ".tmp"
"""ends the name of what is being written; after a crash it may stay"""
_PATIENCE, _SLOWEST = 600.0, 100e3
"""seconds, and bytes a second: an upload to a store that is slower is given up"""
_TAGS = ("ETag", "etag", "md5Hash", "LastModified", "mtime", "created")
"""what object stores call the mark of an object's content or time"""


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it, durably."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    fsync_folder(path.parent)


def torn_name(name: str) -> str:
    """A new name for a file that is being written or removed; `TEMPORARY` says what it is."""
    return f".{name}.{uuid.uuid4().hex}{TEMPORARY}"


def fsync_folder(path: Path) -> None:
    """Makes a rename in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Folder:
    """A folder, local or remote, made when something is written; `folder / "a/b"` is below it."""

    def __init__(self, url: "str | Path | Folder") -> None:
        text = str(url)
        self.url = text if text.endswith("://") else text.rstrip("/") or "/"
        try:
            self._fs, self._path = _open(self.url)
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.url}: cannot be opened: {error}") from None
        protocol = self._fs.protocol
        self.is_local = "file" in ((protocol,) if isinstance(protocol, str) else protocol)
        if not self.is_local:
            self._fs = _Store(self._fs, self.url)

    def __reduce__(self) -> tuple[type["Folder"], tuple[str]]:
        return Folder, (self.url,)

    def __truediv__(self, name: str) -> "Folder":
        return Folder(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def parent(self) -> "Folder":
        """The folder that this one is in; local links are resolved first."""
        return Folder(os.path.dirname(os.path.realpath(self._path) if self.is_local else self.url))

    @property
    def location(self) -> str:
        """The folder as other libraries take it: an absolute path, or a URL."""
        return str(self._path) if self.is_local else self.url

    @property
    def local_path(self) -> Path | None:
        """Where the folder is on this machine, or `None` for a remote one."""
        return Path(self._path) if self.is_local else None

    def exists(self, name: str = "") -> bool:
        """Whether a file or folder of that name is there."""
        return bool(self._fs.exists(self._join(name)))

    def names(self) -> list[str]:
        """The names directly inside, sorted; empty where there is no such folder."""
        try:
            found = self._fs.ls(self._path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in found)

    def read(self, name: str) -> bytes:
        """The content of a file. Raises `FileNotFoundError`."""
        return bytes(self._fs.cat_file(self._join(name)))

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes of a file from `start`. Raises `FileNotFoundError`."""
        return bytes(self._fs.cat_file(self._join(name), start=start, end=start + length))

    def open(self, name: str) -> BinaryIO:
        """A file for reading from its beginning on. Raises `FileNotFoundError`."""
        file: BinaryIO = self._fs.open(self._join(name), "rb")
        return file

    def stat(self, name: str) -> tuple[int, int]:
        """The size of a file, and a number that changes with it: locally its time in ns."""
        if self.is_local:
            facts = os.stat(self._join(name))
            return facts.st_size, facts.st_mtime_ns
        facts = self._fs.info(self._join(name))
        tag = next((str(facts[k]) for k in _TAGS if facts.get(k) is not None), "")
        digest = hashlib.sha256(tag.encode()).digest()
        return int(facts["size"]), int.from_bytes(digest[:8], "little") >> 1

    def size(self, name: str) -> int:
        """The bytes of a file. Raises `FileNotFoundError`."""
        return int(self._fs.info(self._join(name))["size"])

    def age(self, name: str) -> float | None:
        """Seconds since a file was written, or `None` where the storage does not tell."""
        try:
            modified = self._fs.modified(self._join(name))
        except NotImplementedError:
            return None
        return float((datetime.now(UTC) - modified.astimezone(UTC)).total_seconds())

    def rename(self, name: str, other: str) -> None:
        """Gives a local file another name, in place of what has it. Raises `FileNotFoundError`."""
        os.replace(self._join(name), self._join(other))

    def touch(self, name: str) -> None:
        """Makes a local file as young as if it were written now."""
        os.utime(self._join(name))

    def digest(self, name: str) -> str:
        """The SHA-256 of a file, in hexadecimal. Raises `FileNotFoundError`."""
        told = contextlib.nullcontext() if self.is_local else _one_kind_of_error(self.url)
        with told, self._fs.open(self._join(name), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def read_json(self, name: str) -> Any:
        """The JSON document in a file. Raises `FileNotFoundError` or `ValueError`."""
        try:
            return json.loads(self.read(name))
        except RecursionError:
            raise ValueError("nested too deeply") from None

    def write(self, name: str, content: bytes) -> None:
        """Writes a file so that a reader sees all of it or none, also after a crash.

        Locally: a temporary file in the same folder, fsync, rename, fsync of the folder. On an
        object store: one PUT, which is atomic there.
        """
        if not self.is_local:
            self._fs.pipe_file(self._join(name), content, **self._patience(len(content)))
            return
        target = Path(self._join(name))
        make_folder(target.parent)
        temporary = target.with_name(torn_name(target.name))
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            fsync_folder(target.parent)
        except OSError as error:
            error.filename = str(target)  # a full disk names none
            raise
        finally:
            temporary.unlink(missing_ok=True)

    def put(self, name: str, path: Path) -> None:
        """Moves a local file here, so that a reader sees all of it or none, also after a crash.

        Into a local folder it is renamed: it must lie on the same disk. To an object store it is
        uploaded, which is atomic there, and then removed.
        """
        if not self.is_local:
            patience = self._patience(path.stat().st_size)
            self._fs.put_file(str(path), self._join(name), **patience)
            path.unlink()
            return
        target = Path(self._join(name))
        make_folder(target.parent)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        os.replace(path, target)
        fsync_folder(target.parent)

    def write_json(self, name: str, document: Any) -> None:
        """Writes a JSON document, indented, whole or not at all."""
        self.write(name, (json.dumps(document, indent=1) + "\n").encode())

    def make(self) -> None:
        """Makes the folder, where the storage knows folders."""
        self._fs.makedirs(self._path, exist_ok=True)

    def sync(self) -> None:
        """Makes the names in a local folder durable; stores need no such thing."""
        if self.is_local:
            fsync_folder(Path(self._path))

    def remove(self, name: str = "") -> None:
        """Removes a file, or a folder with all that is in it, if it is there."""
        target = self._join(name)
        if self.is_local and os.path.isdir(target):
            shutil.rmtree(target)
        elif self._fs.exists(target):
            self._fs.rm(target, recursive=True)

    def _patience(self, num_bytes: int) -> dict[str, float]:
        """The time limit of an upload: s3fs has none where a server never answers a PUT."""
        return {"timeout": _PATIENCE + num_bytes / _SLOWEST} if self._fs.async_impl else {}

    def _join(self, name: str) -> str:
        return f"{self._path}/{name}" if name else self._path


class _Store:
    """A remote file system of which every failure is an `OSError` that names the place."""

    def __init__(self, fs: Any, url: str) -> None:
        self._fs, self._url = fs, url

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._fs, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            with _one_kind_of_error(self._url):
                return found(*arguments, **options)

        return call


@contextlib.contextmanager
def _one_kind_of_error(url: str) -> Iterator[None]:
    """Stores have errors of their own: all but those of missing files become `StoreError`."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, NotImplementedError):
        raise
    except Exception as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise StoreError(f"{url}: {problem}") from error


def _open(url: str) -> tuple[Any, str]:
    if "://" not in url:
        url = os.path.abspath(os.path.expanduser(url))
        return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]
    return fsspec.core.url_to_fs(url, use_listings_cache=False)  # type: ignore[no-any-return]


class Journal:
    """An append-only file of JSON lines; opening it again drops a line torn by a crash."""

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder, self._name = folder, name
        content = folder.read(name) if folder.exists(name) else b""
        whole = content[: content.rfind(b"\n") + 1]
        self.records = _records(folder, name, whole)
        path = folder.local_path
        self._remote: list[bytes] = []
        if path is None:
            self._file, self._remote = None, [whole]
        else:
            path.mkdir(parents=True, exist_ok=True)
            self._file = open(path / name, "ab")  # noqa: SIM115 - kept open for the run
            if len(whole) < len(content):
                self._file.truncate(len(whole))

    @staticmethod
    def read(folder: Folder, name: str) -> list[dict[str, Any]]:
        """The records so far of a journal that another process may be writing."""
        content = folder.read(name)
        return _records(folder, name, content[: content.rfind(b"\n") + 1])

    def append(self, record: dict[str, Any]) -> None:
        """Adds a line; a crash of this process does not lose it on a local disk."""
        line = (json.dumps(record) + "\n").encode()
        if self._file is None:
            self._remote.append(line)
        else:
            self._file.write(line)
            self._file.flush()

    def sync(self) -> None:
        """Makes all lines so far durable: called before whatever relies on them is committed."""
        if self._file is None:
            self._folder.write(self._name, b"".join(self._remote))
        else:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Syncs and closes."""
        self.sync()
        if self._file is not None:
            self._file.close()


def _records(folder: Folder, name: str, whole: bytes) -> list[dict[str, Any]]:
    """The records in whole lines. Raises `RunError` for a line that is none."""
    records = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            where = f"{folder}/{name}, line {number}"
            raise RunError(f"{where}: damaged: remove that line, and go on")
        records.append(record)
    return records


def read_content(url: str) -> bytes:
    """The content of one file by its path or URL. Raises `UserError` where there is none."""
    try:
        return Folder(url).read("")
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{url}: no such file") from None
