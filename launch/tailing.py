"""The lines of a journal that another process writes, as they come."""

import json
from dataclasses import dataclass, field
from typing import Any

from data.files import Folder

_SEEN = 4096
"""bytes before the new ones that are read again, to see that the file is still the same"""


@dataclass
class Tail:
    """A file of JSON lines of which only what is new is read.

    On a disk such a file grows; on an object store it is written anew with more lines at its end.
    One that has been cut, or is another, is read from its beginning.
    """

    folder: Folder
    name: str
    records: list[dict[str, Any]] = field(default_factory=list)
    """of all lines so far"""
    num_damaged: int = 0
    """lines that are none"""
    _size: int = 0
    _offset: int = 0
    """where the first line begins that was not whole yet"""
    _before: bytes = b""
    """what stands before it"""

    def look(self) -> bool:
        """Reads what has come; whether anything has. Raises `FileNotFoundError`, `StoreError`."""
        size = self.folder.size(self.name)
        if size == self._size:
            return False
        if size < self._offset:
            self._forget()
        start = self._offset - len(self._before)
        content = self.folder.read_range(self.name, start, size - start)
        if not content.startswith(self._before):
            self._forget()
            content = self.folder.read_range(self.name, 0, size)
        self._size = size
        return self._take(content)

    def _take(self, content: bytes) -> bool:
        """Takes the whole lines of what stands from `_before` on; the rest comes again."""
        new = content[len(self._before) :]
        whole = new[: new.rfind(b"\n") + 1]
        for line in whole.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict):
                self.records.append(record)
            else:
                self.num_damaged += 1
        self._offset += len(whole)
        self._before = (self._before + whole)[-_SEEN:]
        return bool(whole)

    def _forget(self) -> None:
        self.records.clear()
        self.num_damaged = self._offset = 0
        self._before = b""
